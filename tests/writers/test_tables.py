"""results.csv and results.parquet: every row of results.jsonl, flat and typed, and no folder for a table alone."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bundles import LABELS, write_bundle
from films import draw, save
from lungscope.batch import run_films
from lungscope.errors import UsageError
from lungscope.pipeline import Analyzer
from lungscope.report import DISCLAIMER
from lungscope.writers import tables
from lungscope.writers.run import begin_run, end_run
from lungscope.writers.tables import columns, flat, probability_columns
from programs import program, python

parquet = pytest.importorskip("pyarrow.parquet", reason="the extra 'table' (pyarrow) is not installed")


def some(folder: Path) -> list[Path]:
    """Films with and without disease, one of them with an awkward name, and files that fail."""
    folder.mkdir(parents=True)
    save(folder / "clear.png", draw())
    save(folder / 'ill, "so\nto say".png', draw(opacities=[(0.7, 0.28, 0.14), (0.7, 0.72, 0.14), (0.4, 0.28, 0.14)]))
    save(folder / "one.png", draw(lungs=["left"]))
    (folder / "text.png").write_text("no image")
    return [*sorted(folder.iterdir()), folder / "missing.png"]


def run(analyzer: Analyzer, films: Sequence[Path], out: Path, *formats: str) -> list[dict[str, Any]]:
    begin_run(out, formats)
    run_films(analyzer, films, out, formats)
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_both_tables_hold_every_row_and_no_film_gets_a_folder(analyzer: Analyzer, tmp_path: Path) -> None:
    rows = run(analyzer, some(tmp_path / "in"), tmp_path / "out", "csv", "parquet")
    files = {"results.jsonl", "run.json", "results.csv", "results.parquet"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert [row["status"] for row in rows] == ["done", "done", "done", "failed", "failed"]
    table = parquet.read_table(tmp_path / "out" / "results.parquet")
    typed, text = table.to_pylist(), read_csv(tmp_path / "out" / "results.csv")
    assert typed == [flat(row, LABELS) for row in rows]
    assert table.schema.metadata == {b"disclaimer": DISCLAIMER.encode(), b"bundle": b"tiny 0.1.0"}
    for cells, values in zip(text, typed, strict=True):
        assert list(cells) == list(values) == list(columns(LABELS))
        for name, kind in columns(LABELS).items():
            cell = cells[name]
            assert values[name] == (
                None if cell == "" and values[name] != "" else cell == "true" if kind is bool else kind(cell)
            )


def test_grades_are_columns_where_a_bundle_has_them(tmp_path: Path) -> None:
    """The tiny segmenter's are a zone's grey, and its limits are such that no zone of a clear film scores."""
    graded = Analyzer(write_bundle(tmp_path / "bundle", opacity=True, grades=(0.4, 0.6, 0.8)))
    run(graded, some(tmp_path / "in"), tmp_path / "out", "parquet")
    clear, ill, *_ = parquet.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    for letter in "abcdef":
        assert 0 < clear[f"grade_{letter}"] < 0.4 and clear[f"zone_{letter}"] == 0
        assert ill[f"grade_{letter}"] >= clear[f"grade_{letter}"] - 1e-6
    assert sum(ill[f"grade_{letter}"] for letter in "abcdef") > sum(clear[f"grade_{letter}"] for letter in "abcdef")


def test_what_the_columns_say(analyzer: Analyzer, tmp_path: Path) -> None:
    films = some(tmp_path / "in")
    rows = run(analyzer, films, tmp_path / "out", "json", "parquet")
    table = parquet.read_table(tmp_path / "out" / "results.parquet")
    clear, ill, one, broken, missing = table.to_pylist()
    for row, values in zip(rows[:3], (clear, ill, one), strict=True):
        report = json.loads((tmp_path / "out" / values["folder"] / "report.json").read_text())
        assert values["path"] == row["path"] == report["source"]["path"]
        assert values["probability"] == report["classification"]["probability"]
        assert values["probability_viral_pneumonia"] == report["classification"]["probabilities"]["Viral Pneumonia"]
        assert values["conformal_set_size"] == len(report["classification"]["conformal_set"])
        for side in ("right", "left"):
            assert values[f"extent_{side}_percent"] == report["severity"]["extent_percent"][side]
            assert values[f"lung_{side}_area_px"] == report["lungs"][side]["area_px"]
        for letter, zone in report["severity"]["zones"].items():
            assert values[f"zone_{letter.lower()}"] == (zone and zone["score"])
            assert values[f"grade_{letter.lower()}"] is None, "this bundle has none"
    assert (clear["label"], clear["severity_global"], clear["abstained"]) == ("Normal", 0, False)
    assert ill["severity_global"] > 0
    assert (one["severity_global"], one["zone_a"], one["warnings"]) == (None, None, "lung-missing")
    assert (broken["status"], broken["error_code"], broken["label"]) == ("failed", "unreadable", None)
    assert missing["error_message"] == f"{films[-1]}: does not exist. Check the path."


def test_types_and_columns_do_not_depend_on_the_films(analyzer: Analyzer, tmp_path: Path) -> None:
    run(analyzer, [tmp_path / "missing.png"], tmp_path / "failed", "csv", "parquet")
    run(analyzer, some(tmp_path / "in"), tmp_path / "some", "csv", "parquet")
    first, second = (parquet.read_schema(tmp_path / name / "results.parquet") for name in ("failed", "some"))
    assert first.equals(second)
    assert {str(kind) for kind in first.types} == {"string", "int64", "double", "bool"}
    heads = {(tmp_path / name / "results.csv").read_text().splitlines()[0] for name in ("failed", "some")}
    assert heads == {",".join(columns(LABELS))}


def test_a_bundle_that_only_segments(tmp_path: Path) -> None:
    bare = Analyzer(write_bundle(tmp_path / "bare", classifier=False), device="cpu")
    run(bare, some(tmp_path / "in"), tmp_path / "out", "parquet")
    values = parquet.read_table(tmp_path / "out" / "results.parquet").to_pylist()[0]
    assert not [name for name in values if name.startswith("probability_")]
    assert (values["label"], values["abstained"], values["zone_a"]) == (None, None, None)
    assert values["lung_right_area_px"] > 0


def test_labels_that_look_alike_keep_a_column_each() -> None:
    assert probability_columns(["COVID-19", "covid 19", "*", "–", "COVID-19 2"]) == [
        "probability_covid_19", "probability_covid_19_2", "probability_class", "probability_class_2",
        "probability_covid_19_2_2",
    ]  # fmt: skip


def test_parquet_is_written_a_group_of_rows_at_a_time(
    analyzer: Analyzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ROW_GROUP", 2)
    run(analyzer, some(tmp_path / "in"), tmp_path / "out", "parquet")
    facts = parquet.ParquetFile(tmp_path / "out" / "results.parquet").metadata
    assert (facts.num_rows, [facts.row_group(k).num_rows for k in range(facts.num_row_groups)]) == (5, [2, 2, 1])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no file names that are not text")
def test_a_name_that_is_no_text_is_written_with_a_question_mark(analyzer: Analyzer, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    save(path, draw())
    run(analyzer, [path], tmp_path / "out", "csv", "parquet", "html")
    (typed,) = parquet.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    (text,) = read_csv(tmp_path / "out" / "results.csv")
    assert typed["path"] == text["path"] == f"{tmp_path}/?.png"
    assert '"./%FF/report.html"' in (tmp_path / "out" / "index.html").read_text()


def test_a_table_that_can_not_be_finished_is_not_there(analyzer: Analyzer, tmp_path: Path) -> None:
    run(analyzer, [tmp_path / "missing.png"], tmp_path, "csv", "parquet")
    record = json.loads((tmp_path / "run.json").read_text())
    begin_run(tmp_path, ["csv"])
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".csv", ".parquet", ".html")]
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"status": "done", "pa')
    for name in ("csv", "parquet", "html"):
        with pytest.raises(json.JSONDecodeError):
            end_run(tmp_path, record, [name])
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl"}


def test_a_run_with_tables_alone_leaves_nothing_of_an_earlier_one(analyzer: Analyzer, tmp_path: Path) -> None:
    films = some(tmp_path / "in")
    run(analyzer, films, tmp_path / "out", "json", "html", "csv")
    (tmp_path / "out" / "clear" / "mine.txt").write_text("not lungscope's")
    run(analyzer, films, tmp_path / "out", "parquet")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.jsonl",
        "run.json",
        "results.parquet",
        "clear",
        ".begun",  # that the folder is lungscope's no row says any more
    }
    assert [path.name for path in (tmp_path / "out" / "clear").iterdir()] == ["mine.txt"]


def test_a_table_that_is_not_lungscopes_stays(analyzer: Analyzer, tmp_path: Path) -> None:
    for name in ("results.csv", "index.html"):
        (tmp_path / name).write_text("mine")
    for _ in range(2):
        run(analyzer, [tmp_path / "missing.png"], tmp_path, "json")
    before = content(tmp_path)
    assert before["results.csv"] == before["index.html"] == b"mine"
    for name, file in (("csv", "results.csv"), ("html", "index.html")):
        with pytest.raises(UsageError, match=rf"{file} that lungscope did not make.*Name another folder"):
            run_films(analyzer, [tmp_path / "missing.png"], tmp_path, ["json", name])
        assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.json", "no JSON"),
        ("run.json", '{"formats": ["csv"], "experiment": "mine"}'),
        ("results.jsonl", '{"my": "rows"}\n'),
        ("results.jsonl", '{"path": "a", "status": "mine"}\n'),
        ("results.jsonl", "mine"),
        ("results.csv", "a,b\n"),
        ("index.html", "<h1>mine</h1>"),
        ("results.parquet", "mine"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_file_that_is_not_lungscopes_is_refused_before_anything_is_written(
    analyzer: Analyzer, tmp_path: Path, name: str, text: str, resume: bool
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=f"holds a {name} that lungscope did not make"):
        run_films(analyzer, [tmp_path / "missing.png"], tmp_path, ["html", "csv", "parquet"], resume=resume)
    assert content(tmp_path) == {name: text.encode()}


@pytest.mark.parametrize("rows", ["", '{"sta', '{"status": "done", "pa', '{"path": "a", "status": "failed"}\n{"sta'])
def test_what_a_run_that_was_cut_off_left_is_lungscopes(analyzer: Analyzer, tmp_path: Path, rows: str) -> None:
    (tmp_path / "results.jsonl").write_text(rows)
    if rows:
        (tmp_path / "results.csv").write_text("of an earlier run")
    run_films(analyzer, [tmp_path / "missing.png"], tmp_path, ["csv"], resume=True)
    assert len(read_csv(tmp_path / "results.csv")) == 1 + ("failed" in rows), "whole rows stay"


def test_parquet_without_its_extra_says_what_to_install_before_any_work(tiny: Path, tmp_path: Path) -> None:
    film, out = save(tmp_path / "film.png", draw()), tmp_path / "out"
    arguments = ["lungscope", "analyze", str(film), "--out", str(out), "--model", str(tiny), "--write", "FORMAT"]
    code = (
        "import sys\n"
        "sys.modules['pyarrow'] = None\n"
        f"sys.argv = {arguments!r}\n"
        "from lungscope.cli.main import main\n"
        "main()\n"
    )
    done = python(code.replace("FORMAT", "json,parquet"))
    assert done.returncode == 3, done.stderr
    assert "pip install 'lungscope[table]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert python(code.replace("FORMAT", "csv,html")).returncode == 0, "the base install has the other formats"
    assert {path.name for path in out.iterdir()} == {"results.csv", "results.jsonl", "run.json", "index.html", "film"}


def test_the_program_writes_tables(tiny: Path, tmp_path: Path) -> None:
    some(tmp_path / "in")
    done = program("analyze", tmp_path / "in", "--out", tmp_path / "out", "--model", tiny, "--write", "parquet,csv")
    assert done.returncode == 1, done.stderr
    assert len(read_csv(tmp_path / "out" / "results.csv")) == 4
    assert json.loads((tmp_path / "out" / "run.json").read_text())["bundle"]["labels"] == list(LABELS)
