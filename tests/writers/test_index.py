"""index.html: what it holds of a run, and that nothing out of a film becomes markup."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lungscope.report import DISCLAIMER
from lungscope.writers.index import FIELDS, write_index
from markup import EVIL, Tags

LABELS = ("COVID-19", "Normal")


def done(name: str, covid: float = 0.1, **more: Any) -> dict[str, Any]:
    """A row of results.jsonl, as `lungscope analyze` writes it."""
    label = "COVID-19" if covid > 0.5 else "Normal"
    return {
        "status": "done",
        "path": f"/films/{name}.png",
        "sha256": "0" * 64,
        "folder": name,
        "label": label,
        "probabilities": {"COVID-19": covid, "Normal": 1 - covid},
        "abstained": False,
        "conformal_set": [label],
        "severity": 0 if label == "Normal" else 3,
        "zones": dict.fromkeys("ABCDEF", 0)
        if label == "Normal"
        else dict(zip("ABCDEF", (0, 0, 0, 0, 0, 3), strict=True)),
        "extent_percent": {"right": 10.0, "left": 20.0},
        "lungs_area_px": {"right": 100, "left": 90},
        "warnings": [],
        "ms": 12.0,
        **more,
    }


def failed(name: str, message: str = "broken") -> dict[str, Any]:
    return {"status": "failed", "path": f"/films/{name}", "error": {"code": "unreadable", "message": message}}


def index(folder: Path, rows: list[dict[str, Any]], **more: Any) -> str:
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")
    number = sum(row["status"] == "failed" for row in rows)
    run = {
        "disclaimer": DISCLAIMER, "started": "2026-01-01T00:00:00+00:00", "seconds": 2.0, "inputs": len(rows),
        "done": len(rows) - number, "failed": number, "interrupted": False, "films_per_second": 1.0, "out": "out",
        "bundle": {"name": "tiny", "version": "1", "labels": list(LABELS), "conformal_coverage": 0.9, "weights": {}},
        "device": "cpu", "precision": "f32", "versions": {"lungscope": "0"}, **more,
    }  # fmt: skip
    write_index(folder / "index.html", run)
    return (folder / "index.html").read_text(encoding="utf-8")


def films(text: str) -> list[dict[str, Any]]:
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    document = json.loads(data)
    assert document["fields"] == list(FIELDS)
    return [dict(zip(FIELDS, row, strict=True)) for row in document["rows"]]


def test_every_row_is_there_with_what_is_sorted_and_filtered_by(tmp_path: Path) -> None:
    unsure = done("b", 0.6, abstained=True, conformal_set=list(LABELS), warnings=["small"])
    first, second, third = films(index(tmp_path, [done("a"), unsure, failed("c.png", "no image")]))
    assert (first["name"], first["href"], first["label"], first["probability"]) == (
        "a.png",
        "./a/report.html",
        "Normal",
        0.9,
    )
    assert (first["severity"], first["zones"], first["contradictory"]) == (0, [0] * 6, False)
    assert (first["right"], first["left"]) == (10, 20)
    assert (second["abstained"], second["set"], second["warnings"]) == (True, list(LABELS), ["small"])
    assert (second["probability"], second["severity"], second["zones"]) == (0.6, 3, [0, 0, 0, 0, 0, 3])
    assert (third["code"], third["message"], third["href"], third["label"]) == ("unreadable", "no image", None, None)


def test_the_summary_counts(tmp_path: Path) -> None:
    rows = [
        *(done(f"n{number}") for number in range(3)),
        done("u", abstained=True, conformal_set=[]),
        done("c", 0.9),
        done("x", zones=dict.fromkeys("ABCDEF", 3), severity=18, warnings=["small"]),
        failed("f"),
    ]
    text = index(tmp_path, rows)
    kinds = dict(re.findall(r'value="(\w+)"(?: checked)?><b>([\d,]+)</b>', text))
    assert kinds == {"all": "7", "done": "6", "unanswered": "1", "contradictory": "1", "warned": "1", "failed": "1"}
    answers = re.findall(r'<span>([\w\s-]+)</span><svg[^>]*>.*?</svg><span class="number">(\d+)', text)
    assert answers == [("COVID-19", "1"), ("Normal", "4"), ("No answer", "1"), ("Failed", "1")]
    assert 'aria-label="Films by severity: 0: 4; 3: 1; 18: 1"' in text
    assert DISCLAIMER in text


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    assert "interrupted" not in index(tmp_path, [done("a")])
    assert "1 of 9 films are here;" in index(tmp_path, [done("a")], interrupted=True, inputs=9)
    text = index(tmp_path, [done("a"), done("b")], interrupted=True, inputs=9, unchecked=1)
    assert "2 of 9 films are here, 1 of them as an earlier run left them;" in text


def test_a_run_of_failures_alone_and_a_bundle_that_only_segments(tmp_path: Path) -> None:
    assert len(films(index(tmp_path, [failed("a"), failed("b")]))) == 2
    bare = done("a", label=None, probabilities=None, abstained=None, conformal_set=None, severity=None, zones={})
    bundle = {"name": "tiny", "version": "1", "labels": [], "conformal_coverage": None, "weights": {}}
    text = index(tmp_path, [bare | {"extent_percent": None}], bundle=bundle)
    (film,) = films(text)
    assert (film["label"], film["probability"], film["zones"], film["right"], film["set"]) == (None,) * 5
    assert "Lungs only" in text


def test_nothing_out_of_a_film_becomes_markup(tmp_path: Path) -> None:
    evil = done("a", path=f"/films/{EVIL}", folder=EVIL, warnings=[EVIL])
    bundle = {"name": EVIL, "version": EVIL, "labels": [EVIL], "conformal_coverage": 0.9, "weights": {EVIL: EVIL}}
    text = index(tmp_path, [evil, failed(EVIL, EVIL)], bundle=bundle, out=EVIL, device=EVIL)
    clean = index(tmp_path, [done("a"), failed("b")])
    assert text.lower().count("<script") == clean.count("<script") == 2
    assert text.lower().count("</script") == clean.count("</script") == 2
    tags = Tags(text)
    assert not {"img", "link", "iframe", "a"} & {tag for tag, _ in tags.found}
    assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]
    first, second = films(text)
    assert (first["path"], first["warnings"], second["message"]) == (f"/films/{EVIL}", [EVIL], EVIL)
    assert first["href"].startswith("./%22%3E%3Cscript%3E")


@pytest.mark.parametrize("name", ["javascript:alert(1)", "a#b?c%d", "ä", "\udcff"])
def test_a_films_address_leads_to_its_folder(tmp_path: Path, name: str) -> None:
    (film,) = films(index(tmp_path, [done("a", folder=name)]))
    assert re.fullmatch(r"\./[\w.%()-]+/report\.html", film["href"])
