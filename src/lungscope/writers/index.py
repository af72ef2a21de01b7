"""index.html: all films of a run on one page that sorts and filters them, with nothing that is not inside it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from lungscope.stages.severity import contradicts
from lungscope.writers.atomic import whole_file
from lungscope.writers.html import PAGE
from lungscope.writers.json import RESULTS, read_rows
from lungscope.writers.page import asset, bar, closing, facts, opening

#: What the page holds of each film, in this order (`assets/run.js`).
FIELDS = (
    "name", "path", "href", "label", "probability", "abstained", "set", "severity", "zones", "right", "left",
    "warnings", "contradictory", "ms", "code", "message",
)  # fmt: skip

#: Key, title, which way the first click sorts, and the cells' style. "second": hidden where the screen is narrow.
_COLUMNS = (
    ("name", "Film", "up", ""),
    ("label", "Class", "up", ""),
    ("probability", "Probability", "up", "number"),
    ("size", "Conformal set", "down", "second"),
    ("severity", "Severity", "down", "number"),
    (None, "Zones", "", "second"),
    ("right", "Right extent", "down", "number second"),
    ("left", "Left extent", "down", "number second"),
    ("ms", "ms", "down", "number second"),
)


def write_index(path: Path, run: Mapping[str, Any]) -> None:
    """Write the run's page to `path`, out of results.jsonl beside it, a film at a time.

    run: the content of run.json. Text out of the films is data and never markup; nothing is loaded, and no script runs
    but the page's own (`assets/run.js`).
    """
    results = path.with_name(RESULTS)
    counts = _Counts()
    for row in read_rows(results):
        counts.add(row)
    style, script = asset("base.css", "run.css"), asset("run.js")
    mixed = bool(run.get("others") or run.get("unchecked"))
    films = run["inputs"] + run.get("others", 0)
    title = f"{films:,} film{'s' * (films != 1)}"
    head = [
        opening(title, style, script),
        f"<header><h1>{title}</h1><p>{escape(run['started'])} · bundle {escape(run['bundle']['name'])} "
        f"{escape(run['bundle']['version'])}</p></header>",
        f'<p class="disclaimer">{escape(run["disclaimer"])}</p>',
        _interrupted(run),
        f'<div class="overview">{_answers(run, counts)}{_histogram(counts.severities)}</div>',
        "<noscript><p>The list of films needs this page's own script. results.jsonl holds the same.</p></noscript>",
        f'<div id="list" hidden>{_form(run, counts)}{_table()}</div>',
        _facts(run),
        f'<script type="application/json" id="data">{{"fields": {_json(FIELDS)}, "rows": [\n',
    ]
    with whole_file(path) as file:
        file.write("\n".join(filter(None, head)).encode("utf-8", "replace"))
        for number, row in enumerate(read_rows(results)):
            # An earlier run may have written other formats.
            without_page = mixed and not (results.parent / (row.get("folder") or "") / PAGE).exists()
            file.write((",\n" * (number > 0) + _json(_values(row, without_page))).encode("ascii"))
        file.write(("]}</script>\n" + closing(script)).encode("utf-8"))


def _values(row: Mapping[str, Any], without_page: bool) -> list[Any]:
    """A row of results.jsonl as the values of `FIELDS`. without_page: it is of a film that has no page of its own."""
    error = row.get("error") or {}
    label, zones, extent = row.get("label"), row.get("zones") or {}, row.get("extent_percent") or {}
    # The folder's bytes, percent-encoded: a name that is no text, or holds "#" or ":", leads to its page all the same.
    folder = row.get("folder")
    return [
        PurePath(row["path"]).name or row["path"],
        row["path"],
        None if folder is None or without_page else f"./{quote(os.fsencode(folder))}/{PAGE}",
        label,
        None if label is None else row["probabilities"][label],
        bool(row.get("abstained")),
        row.get("conformal_set"),
        row.get("severity"),
        list(zones.values()) if zones else None,
        extent.get("right"),
        extent.get("left"),
        row.get("warnings", []),
        _contradictory(row),
        row.get("ms"),
        error.get("code"),
        error.get("message"),
    ]


def _contradictory(row: Mapping[str, Any]) -> bool:
    return row.get("label") is not None and contradicts(row["label"], row["zones"].values())


def _json(value: Any) -> str:
    """JSON that can not end the script element that it stands in."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


@dataclass(frozen=True)
class _Counts:
    """How many films: of each kind that can be shown, with each answer, of each most probable class, of each global
    severity."""

    kinds: Counter[str] = field(default_factory=Counter)
    answers: Counter[str | None] = field(default_factory=Counter)
    classes: Counter[str | None] = field(default_factory=Counter)
    severities: Counter[int] = field(default_factory=Counter)

    def add(self, row: Mapping[str, Any]) -> None:
        self.kinds["all"] += 1
        if row["status"] == "failed":
            self.kinds["failed"] += 1
            return
        self.kinds["done"] += 1
        self.kinds["unanswered"] += bool(row["abstained"])
        self.kinds["warned"] += bool(row["warnings"])
        self.kinds["contradictory"] += _contradictory(row)
        self.classes[row["label"]] += 1
        if not row["abstained"]:
            self.answers[row["label"]] += 1
        if row["severity"] is not None:
            self.severities[row["severity"]] += 1


def _interrupted(run: Mapping[str, Any]) -> str:
    if not run["interrupted"]:
        return ""
    seen, unchecked = run["done"] + run["failed"], run.get("unchecked", 0)
    before = f", {unchecked:,} of them as an earlier run left them" if unchecked else ""
    return (
        '<section class="warnings"><h2>This run was interrupted</h2>'
        f"<p>{seen:,} of {run['inputs']:,} films are here{before}; the others were not looked at.</p></section>"
    )


def _answers(run: Mapping[str, Any], counts: _Counts) -> str:
    rows = [(label, counts.answers[label], "best") for label in run["bundle"]["labels"]]
    if not rows:
        rows.append(("Lungs only", counts.answers[None], "best"))
    if run["bundle"]["conformal_coverage"] is not None:
        rows.append(("No answer", counts.kinds["unanswered"], "rest"))
    rows.append(("Failed", counts.kinds["failed"], "rest"))
    items = "".join(
        f'<li class="class {style}"><span>{escape(name)}</span>{bar(count / max(1, counts.kinds["all"]))}'
        f'<span class="number">{count:,}</span></li>'
        for name, count, style in rows
    )
    return f'<section><h2>Answers</h2><ul class="classes">{items}</ul></section>'


def _histogram(severities: Counter[int]) -> str:
    """How many films have each global severity, 0 to 18."""
    if not severities:
        return ""
    top = max(severities.values())
    shapes = []
    for score in range(19):
        count, x = severities[score], 20 * score
        height = 90 * count / top
        shapes.append(f'<text x="{x + 10}" y="118">{score}</text>')
        if count:
            shapes.append(f'<rect x="{x + 2}" y="{104 - height:.1f}" width="16" height="{height:.1f}"/>')
            shapes.append(f'<text x="{x + 10}" y="{100 - height:.1f}">{count:,}</text>')
    words = "; ".join(f"{score}: {severities[score]:,}" for score in sorted(severities))
    return (
        "<section><h2>Films by global severity, 0 to 18</h2>"
        f'<svg class="histogram" viewBox="0 0 380 122" role="img" aria-label="Films by severity: {words}">'
        f'<line x1="0" x2="380" y1="104.5" y2="104.5"/>{"".join(shapes)}</svg></section>'
    )


def _form(run: Mapping[str, Any], counts: _Counts) -> str:
    labels, sets = run["bundle"]["labels"], run["bundle"]["conformal_coverage"] is not None
    kinds = [
        ("all", "films"),
        ("done", "analysed"),
        *([("unanswered", "no answer")] if sets else []),
        *([("contradictory", "class and severity contradict")] if labels else []),
        ("warned", "with warnings"),
        ("failed", "failed"),
    ]
    tiles = "".join(
        f'<label><input type="radio" name="show" value="{kind}"{" checked" * (kind == "all")}>'
        f"<b>{counts.kinds[kind]:,}</b>{words}</label>"
        for kind, words in kinds
    )
    options = "".join(
        f'<option value="{escape(label)}">{escape(label)} ({counts.classes[label]:,})</option>' for label in labels
    )
    return (
        f'<form id="filter"><fieldset class="tiles"><legend>Show</legend>{tiles}</fieldset><section class="fields">'
        '<label class="wide">Name, path, warning or error <input type="search" name="text" autocomplete="off"></label>'
        f'<label>Most probable class <select name="label"><option value="">any</option>{options}</select></label>'
        '<label>Conformal set <select name="set"><option value="">any</option><option value="1">one class</option>'
        '<option value="2">several classes</option><option value="0">no class</option></select></label>'
        '<label>Severity from <input type="number" name="severity" min="0" max="18"></label>'
        '<label>Probability up to, % <input type="number" name="probability" min="0" max="100" step="any"></label>'
        '<button type="reset">Reset</button></section></form>'
    )


def _table() -> str:
    heads = "".join(
        f'<th scope="col" class="{style}">'
        + (f'<button type="button" data-key="{key}" data-first="{first}">{title}</button>' if key else title)
        + "</th>"
        for key, title, first, style in _COLUMNS
    )
    return (
        '<p class="found" id="found" role="status"></p>'
        f'<table id="films"><caption>Films</caption><thead><tr>{heads}</tr></thead><tbody></tbody></table>'
        '<nav class="pages" id="pages" aria-label="Pages"><button type="button" id="previous">Previous</button>'
        '<span id="place"></span><button type="button" id="next">Next</button></nav>'
    )


def _facts(run: Mapping[str, Any]) -> str:
    bundle, coverage, others = run["bundle"], run["bundle"]["conformal_coverage"], run.get("others", 0)
    rows = [
        ("Results", escape(run["out"])),
        *([("Not in this run", f"{others:,} of these films: as earlier runs left them")] if others else []),
        ("Time", f"{run['seconds']:.1f} s, {run['films_per_second']:.2f} films/s"),
        ("Bundle", escape(f"{bundle['name']} {bundle['version']}")),
        (
            "Conformal sets",
            "none fitted" if coverage is None else f"{100 * coverage:g} % of each class's films covered",
        ),
        *((name, f"<code>{escape(digest)}</code>") for name, digest in bundle["weights"].items()),
        ("Device, precision", escape(f"{run['device']}, {run['precision']}")),
        ("Versions", escape(", ".join(f"{name} {version}" for name, version in run["versions"].items()))),
    ]
    return f"<section><h2>How this was made</h2>{facts(rows)}</section>"
