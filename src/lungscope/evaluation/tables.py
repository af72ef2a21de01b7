"""A benchmark's results as pages: Markdown, HTML and JSON with the same tables, and plots beside them."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lungscope.evaluation import plots
from lungscope.evaluation.benchmark import (
    Kind,
    Table,
    Times,
    budget,
    label_of,
    load_cells,
    load_times,
    notes,
    summary,
    tables,
)
from lungscope.report import DISCLAIMER
from lungscope.stages.classification import INPUT_NAMES
from lungscope.writers.atomic import write_text
from lungscope.writers.page import asset, closing, opening

_STYLE = """
h1 { margin-bottom: 14px; } h2 { margin-top: 30px; }
.scroll { overflow-x: auto; } .scroll table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.scroll th, .scroll td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
.scroll th { color: var(--dim); font-weight: 500; white-space: normal; vertical-align: bottom; }
img { max-width: 100%; height: auto; border-radius: 8px; }
"""


def render(folder: Path, kind: Kind) -> list[Path]:
    """Write `folder`/KIND.md, .html, .json and its plots from the results in `folder`/KIND/; the same results give the
    same bytes. Returns what was written. Raises DataError where results are missing or do not go together."""
    cells, times = load_cells(folder / kind, kind), load_times(folder, kind)
    drawn = _plots(cells, kind, times)
    files = {f"{kind}-{name}.svg": text for name, text in drawn.items()}
    files[f"{kind}.md"] = _markdown(cells, kind, times, sorted(files))
    files[f"{kind}.html"] = _html(cells, kind, times, drawn)
    files[f"{kind}.json"] = json.dumps(summary(cells, kind), indent=1, allow_nan=False) + "\n"
    for name, text in files.items():
        write_text(folder / name, text)
    return [folder / name for name in files]


def _markdown(cells: Sequence[dict[str, Any]], kind: Kind, times: Times | None, pictures: Sequence[str]) -> str:
    parts = [f"# {kind.capitalize()} benchmark, budget `{cells[0]['budget']['name']}`", *_facts(cells, times)]
    for table in tables(cells, kind, times):
        parts.append(f"## {table.title}\n\n{_markdown_table(table)}" + (f"\n\n{table.note}" if table.note else ""))
    parts.append("## What can not be compared\n\n" + "\n".join(f"- {note}" for note in notes(cells, kind)))
    parts.append("\n".join(f"![{name}]({name})" for name in pictures))
    return "\n\n".join([*parts, DISCLAIMER]) + "\n"


def _markdown_table(table: Table) -> str:
    rows = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _html(cells: Sequence[dict[str, Any]], kind: Kind, times: Times | None, drawn: dict[str, str]) -> str:
    title = f"{kind.capitalize()} benchmark, budget {cells[0]['budget']['name']}"
    parts = [f"<header><h1>{escape(title)}</h1></header>", f'<p class="disclaimer">{escape(DISCLAIMER)}</p>']
    parts += [f"<p>{escape(fact)}</p>" for fact in _facts(cells, times)]
    for table in tables(cells, kind, times):
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
        parts.append(f"<h2>{escape(table.title)}</h2>")
        parts.append(
            f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )
        parts.append(f'<p class="note">{escape(table.note)}</p>' if table.note else "")
    items = "".join(f"<li>{escape(note)}</li>" for note in notes(cells, kind))
    parts.append(f"<h2>What can not be compared</h2><ul>{items}</ul>")
    for name, picture in drawn.items():
        data = base64.b64encode(picture.encode()).decode("ascii")
        parts.append(f'<p><img alt="{escape(name)}" src="data:image/svg+xml;base64,{data}"></p>')
    return opening(title, asset("base.css") + _STYLE) + "\n".join(filter(None, parts)) + closing()


def _facts(cells: Sequence[dict[str, Any]], times: Times | None) -> list[str]:
    """The budget, the films, and where and from what code the cells come."""
    spent = budget(cells)
    recipe = spent["recipe"]
    phases = ", then ".join(
        f"{phase['epochs']} epochs at {phase['size']}²" + (f" of {phase['films']} films" if phase["films"] else "")
        for phase in recipe["phases"]
    )
    hardware = sorted(
        {
            (f"{gpu}, " if (gpu := cell["training"].get("gpu")) else "")
            + f"{cell['hardware']['cores']} cores of {cell['hardware']['processor']}, {cell['training']['precision']}"
            for cell in cells
        }
    )
    commits = sorted({re.sub("(?<=^.{12})[0-9a-f]+", "", cell["commit"] or "unknown") for cell in cells})
    films = cells[0]["films"]
    return [
        f"{len(cells)} results. Budget: {phases}, batches of {recipe['batch']}, from random weights. {spent['reason']}",
        f"Films: {films['train']} to train, {films['val']} to validate; scores are of the test part, through the "
        "path that ships, with 95 % bootstrap intervals over duplicate groups or patients.",
        f"Trained on: {'; '.join(hardware)}. Commits: {', '.join(commits)}.",
        *([] if times is None else [times.facts]),
    ]


def _plots(cells: Sequence[dict[str, Any]], kind: Kind, times: Times | None) -> dict[str, str]:
    plain = [cell for cell in cells if cell["variant"] is None]
    if not plain:
        return {}
    if kind == "segmentation":
        first = plain[0]["stores"][0]["store"]
        sizes = [_segmenter_point(cell, _millions) for cell in plain]
        drawn = {"dice-parameters": plots.scatter(f"Dice on {first} by size", sizes, "parameters, millions", "Dice")}
        if times is not None:
            speeds = [_segmenter_point(cell, times.of) for cell in plain if times.of(cell) is not None]
            drawn["dice-latency"] = plots.scatter(f"Dice on {first} by time", speeds, "one film, ms", "Dice")
        for n, store in enumerate(row["store"] for row in plain[0]["stores"]):
            drawn[f"boxes-{store}"] = plots.boxes(
                f"Dice of the films of {store}", [_box(cell, n) for cell in plain], "Dice"
            )
        monitor, name = "val_dice", "validation Dice"
    else:
        lungs = [cell for cell in plain if cell["input"] == "lungs"]
        drawn = {
            "inputs": plots.intervals(
                "Accuracy by what the network sees", [_classifier_point(cell) for cell in plain], "accuracy"
            )
        }
        if lungs:
            sizes = [_classifier_point(cell, _millions, cell["network"]) for cell in lungs]
            drawn["accuracy-parameters"] = plots.scatter(
                "Accuracy on the lungs alone by size", sizes, "parameters, millions", "accuracy"
            )
            if times is not None:
                timed = [cell for cell in lungs if times.of(cell) is not None]
                speeds = [_classifier_point(cell, times.of, cell["network"]) for cell in timed]
                drawn["accuracy-latency"] = plots.scatter(
                    "Accuracy on the lungs alone by time", speeds, "one film, ms", "accuracy"
                )
        monitor, name = "val_accuracy", "validation accuracy"
    drawn["curves"] = plots.curves("Training", [_curve(cell, monitor) for cell in plain], "epoch", name)
    return drawn


def _millions(cell: dict[str, Any]) -> float:
    return float(cell["parameters"]) / 1e6


def _segmenter_point(cell: dict[str, Any], size: Any) -> plots.Point:
    score = cell["stores"][0]["scores"]["dice"]
    decoder, _, encoder = label_of(cell).partition("-")
    low, high = _ends(score["mean"], score["interval"])
    return plots.Point(decoder, encoder, size(cell), score["mean"], low, high)


def _classifier_point(cell: dict[str, Any], size: Any = None, group: str = "") -> plots.Point:
    test = cell["test"]
    low, high = _ends(test["accuracy"], test["intervals"]["accuracy"])
    x = 0.0 if size is None else size(cell)
    return plots.Point(label_of(cell), group or INPUT_NAMES[cell["input"]], x, test["accuracy"], low, high)


def _ends(value: float, interval: Sequence[float | None]) -> Iterator[float]:
    """Where the line of a score in a plot ends: at the score itself where it has no interval."""
    return (value if end is None else end for end in interval)


def _box(cell: dict[str, Any], store: int) -> plots.Box:
    values = [row["dice"] for row in cell["stores"][store]["per_film"]]
    p5, p25, p50, p75, p95 = (float(q) for q in np.percentile(values, (5, 25, 50, 75, 95)))
    return plots.Box(label_of(cell), cell["network"].partition("-")[2], (p5, p25, p50, p75, p95))


def _curve(cell: dict[str, Any], monitor: str) -> plots.Line:
    points = tuple((n, row["metrics"][monitor]) for n, row in enumerate(cell["training"]["epochs"], 1))
    shown = f", {cell['input']}" if cell.get("input") else ""
    group = cell["input"] if cell.get("input") else cell["network"].partition("-")[2]
    return plots.Line(f"{label_of(cell)}{shown}", group, points)
