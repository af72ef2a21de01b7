"""Films in a batch: in order, a bounded number at once, and a run that goes on keeps exactly what still holds."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundles import with_int8, write_bundle
from films import draw, save
from lungscope.batch import AHEAD, in_order, run_films
from lungscope.pipeline import Analyzer
from lungscope.writers.json import RESULTS

FORMATS = ["json", "png"]


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]


def some(folder: Path, count: int = 6) -> list[Path]:
    """Films of which the third is broken."""
    films = [save(folder / f"{n}.png", draw(200 + 8 * n, 200)) for n in range(count)]
    films[2].write_text("no image")
    return films


def stamps(out: Path) -> dict[str, int]:
    """When each film's report was written, in nanoseconds."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/report.json")}


def test_results_come_in_order_whatever_takes_longest() -> None:
    def work(n: int) -> int:
        time.sleep(0.02 * (5 - n))
        return n

    assert list(in_order(work, range(5), workers=3)) == list(range(5))


def test_no_more_is_begun_than_is_allowed() -> None:
    begun, together, lock = [0], [0, 0], threading.Lock()

    def items() -> Iterator[int]:
        for n in range(40):
            begun[0] += 1
            yield n

    def work(n: int) -> int:
        with lock:
            together[0] += 1
            together[1] = max(together)
        time.sleep(0.002)
        with lock:
            together[0] -= 1
        return n

    for done, n in enumerate(in_order(work, items(), workers=2)):
        assert n == done
        assert begun[0] - done <= 2 * AHEAD
    assert together[1] == 2


def test_an_error_stops_what_has_not_begun() -> None:
    begun = []

    def work(n: int) -> int:
        begun.append(n)
        if n == 1:
            raise ValueError("two")
        time.sleep(0.01)
        return n

    results = in_order(work, range(100), workers=1)
    assert next(results) == 0
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert max(begun) <= 1 + AHEAD


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_are_those_of_one_film_after_the_other(analyzer: Analyzer, tmp_path: Path, workers: int) -> None:
    films, calls = some(tmp_path / "in"), []
    run = run_films(analyzer, films, tmp_path / "out", FORMATS, workers=workers, progress=lambda: calls.append(1))
    assert (run["done"], run["failed"], run["kept"], run["interrupted"], len(calls)) == (5, 1, 0, False, 6)
    for film, row, result in zip(films, rows(tmp_path / "out"), analyzer.analyze_many(films), strict=True):
        assert row["path"] == str(film)
        if row["status"] == "failed":
            assert row["error"]["message"] == result.message
            continue
        assert row["sha256"] == result.source.sha256
        assert row["probabilities"] == pytest.approx(result.to_json()["classification"]["probabilities"])
        np.testing.assert_array_equal(np.load(tmp_path / "out" / row["folder"] / "saliency.npy"), result.saliency.map)


def test_a_stopped_run_goes_on_and_ends_as_if_never_stopped(analyzer: Analyzer, tmp_path: Path) -> None:
    films, out, stop = some(tmp_path / "in", 12), tmp_path / "out", threading.Event()
    first = run_films(analyzer, films, out, FORMATS, workers=1, stop=stop, progress=stop.set)
    assert first["interrupted"]
    assert 1 <= first["done"] + first["failed"] == len(rows(out)) <= 1 + AHEAD
    before = stamps(out)
    # What a killed process may leave: half a row at the end.
    with (out / RESULTS).open("ab") as file:
        file.write(b'{"status": "done", "pa')
    second = run_films(analyzer, films, out, FORMATS, resume=True)
    assert (second["done"], second["failed"], second["interrupted"]) == (11, 1, False)
    assert second["kept"] == len(before)
    assert before.items() <= stamps(out).items(), "what was done is not written again"
    assert [row["path"] for row in rows(out)] == [str(film) for film in films]


def test_what_has_changed_is_done_again(analyzer: Analyzer, tmp_path: Path) -> None:
    films, out = some(tmp_path / "in"), tmp_path / "out"
    run_films(analyzer, films, out, FORMATS)
    before = stamps(out)
    save(films[0], draw(300, 300))  # other content
    save(films[2], draw(300, 300))  # whole now
    (out / "1" / "report.json").rename(out / "gone.json")
    for file in (out / "1").iterdir():
        file.unlink()
    (out / "1").rmdir()
    films[4].write_text("broken now")
    run = run_films(analyzer, [*films[1:], films[0]], out, FORMATS, resume=True)
    assert (run["kept"], run["done"], run["failed"]) == (2, 5, 1)
    assert {name for name, at in stamps(out).items() if before.get(name) == at} == {"3", "5"}
    assert [Path(row["path"]).stem for row in rows(out)] == ["1", "2", "3", "4", "5", "0"], "the order of this run"
    assert not (out / "4").exists()


def test_nothing_of_other_weights_or_formats_is_kept(tiny: Path, analyzer: Analyzer, tmp_path: Path) -> None:
    films, out = some(tmp_path / "in"), tmp_path / "out"
    run_films(analyzer, films, out, FORMATS)
    assert run_films(analyzer, films, out, ["json"], resume=True)["kept"] == 0
    assert run_films(analyzer, films, out, ["json"], resume=True)["kept"] == 5
    other = Analyzer(write_bundle(tmp_path / "other", threshold=0.6), device="cpu")
    assert run_films(other, films, out, ["json"], resume=True)["kept"] == 0
    assert run_films(other, films, out, ["json"])["kept"] == 0, "only where it is asked for"


def test_tables_alone_go_on_too(analyzer: Analyzer, tmp_path: Path) -> None:
    films, out = some(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    run_films(analyzer, films, out, ["csv"])
    table = (out / "results.csv").read_text()
    assert run_films(analyzer, films, out, ["csv"], resume=True)["kept"] == 5
    assert (out / "results.csv").read_text() == table
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "results.csv", "run.json"}


def test_a_run_lets_go_of_what_close_calls_needed(tmp_path: Path) -> None:
    analyzer = Analyzer(with_int8(tmp_path / "bundle"), precision="int8", margin=99)
    films = [save(tmp_path / f"{n}.png", draw()) for n in range(3)]
    assert run_films(analyzer, films, tmp_path / "out", ["csv"])["done"] == 3
    assert analyzer._exact is None
