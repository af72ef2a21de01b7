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
from lungscope.writers.folder import write
from lungscope.writers.json import RESULTS, whole_rows

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
    assert first["interrupted"] and first["inputs"] == 12
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


def test_nothing_of_another_precision_is_kept(tmp_path: Path) -> None:
    bundle, film = with_int8(tmp_path / "bundle"), save(tmp_path / "a.png", draw())
    for precision in ("f32", "int8"):
        analyzer = Analyzer(bundle, precision=precision)
        assert run_films(analyzer, [film], tmp_path / "out", ["csv"], resume=True)["kept"] == 0


def last(out: Path) -> dict[str, dict[str, Any]]:
    """Of each film the row that counts in a run that was killed."""
    return {row["path"]: row for row in whole_rows(out / RESULTS)}


def test_an_earlier_row_goes_when_its_film_has_a_new_one_and_not_before(analyzer: Analyzer, tmp_path: Path) -> None:
    films, out, stop = some(tmp_path / "in", 12), tmp_path / "out", threading.Event()
    run_films(analyzer, films, out, ["csv"])
    before = last(out)

    def killed() -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        run_films(analyzer, films, out, ["csv", "parquet"], resume=True, workers=1, progress=killed)
    there = last(out)
    assert there.keys() == before.keys()
    assert [path for path in there if there[path] != before[path]] == [str(films[0])]

    formats = ["csv", "parquet"]
    run = run_films(analyzer, films, out, formats, resume=True, workers=1, stop=stop, progress=stop.set)
    new = [row for row in rows(out) if row.get("made_with") != before[row["path"]].get("made_with")]
    assert run["interrupted"] and run["kept"] == 1 and 1 <= len(new) < 12
    assert [row["path"] for row in rows(out)] == list(map(str, films))
    assert all(row == before[row["path"]] for row in rows(out) if row not in new)
    assert (run["unchecked"], run["done"], run["failed"], run["others"]) == (12 - len(new), 11, 1, 0)
    assert len((out / "results.csv").read_text().splitlines()) == 1 + 12

    as_before = sum(row["status"] == "done" for row in rows(out) if row not in new)
    assert run_films(analyzer, films, out, ["csv"], resume=True)["kept"] == as_before


def test_films_that_a_run_is_not_given_keep_their_rows_and_folders(analyzer: Analyzer, tmp_path: Path) -> None:
    mine, other = some(tmp_path / "a", 4), save(tmp_path / "b" / "0.png", draw(400, 400))
    out, formats = tmp_path / "out", ["json", "html"]
    run_films(analyzer, mine, out, ["json"])
    before, at = rows(out), stamps(out)
    run = run_films(analyzer, [other], out, formats, resume=True)
    assert (run["inputs"], run["done"], run["failed"], run["unchecked"], run["others"]) == (1, 1, 0, 0, 4)
    assert [row["path"] for row in rows(out)] == [str(other), *map(str, mine)]
    assert rows(out)[1:] == before
    assert at.items() <= stamps(out).items(), "a film with another's stem gets a folder of its own"
    page = (out / "index.html").read_text()
    assert "<h1>5 films</h1>" in page and "4 of these films" in page
    assert page.count("/report.html") == 1, "no link leads nowhere"
    for given in (mine[1:2], mine[1:]):
        run = run_films(analyzer, given, out, ["json"], resume=True)
        assert (run["kept"], run["others"]) == (len(given) - (len(given) > 1), 5 - len(given))
    run = run_films(analyzer, [mine[0], other], out, ["csv"], resume=True)
    assert len((out / "results.csv").read_text().splitlines()) == 1 + 5
    assert {"1", "3"} <= stamps(out).keys()


def test_one_film_has_one_row_however_its_path_is_spelled(
    analyzer: Analyzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)
    out, empty = tmp_path / "out", Path("in")
    assert run_films(analyzer, [empty], out, ["csv"])["failed"] == 1
    some(tmp_path / "in", 4)
    films = [Path("in", f"{n}.png") for n in range(4)]
    assert run_films(analyzer, [empty], out, ["csv"], resume=True)["failed"] == 1
    assert run_films(analyzer, films[:2], out, ["csv"], resume=True)["others"] == 0, "the folder is no film any more"
    run = run_films(analyzer, [film.absolute() for film in films[1:]], out, ["csv"], resume=True)
    assert (run["done"], run["failed"], run["kept"], run["others"]) == (2, 1, 0, 1)
    assert [row["path"] for row in rows(out)] == [*(str(film.absolute()) for film in films[1:]), str(films[0])]
    run = run_films(analyzer, [empty / "none"], out, ["csv"], resume=True)
    assert run["others"] == 4, "a folder that is empty for a night takes nothing along"


def test_a_folder_that_was_being_written_again_is_not_kept(
    analyzer: Analyzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    films, out = some(tmp_path / "in")[:2], tmp_path / "out"
    other = Analyzer(write_bundle(tmp_path / "other", threshold=0.6), device="cpu")
    run_films(analyzer, films, out, ["json"])
    before = last(out)

    def killed(*arguments: Any, **options: Any) -> None:
        write(*arguments, **options)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("lungscope.batch.write", killed)
        with pytest.raises(SystemExit):
            run_films(other, films, out, ["json"], resume=True, workers=1)
    assert last(out) == before
    run = run_films(analyzer, films, out, ["json"], resume=True)
    assert run["kept"] < 2, "its files are of other weights than its row"
    for row in rows(out):
        assert {path.name for path in (out / row["folder"]).iterdir()} == {"report.json"}
        report = json.loads((out / row["folder"] / "report.json").read_text())
        assert report["lungs"] == analyzer.analyze(Path(row["path"])).to_json()["lungs"]
        assert report["lungs"] != other.analyze(Path(row["path"])).to_json()["lungs"]


def test_a_picture_that_dicom_objects_have_no_study_for_has_its_row_in_the_tables(
    analyzer: Analyzer, tmp_path: Path
) -> None:
    pytest.importorskip("highdicom", reason="the extra 'dicom-out' (highdicom) is not installed")
    films, out = some(tmp_path / "in"), tmp_path / "out"
    run = run_films(analyzer, films, out, ["dicom", "csv"])
    assert (run["done"], run["failed"]) == (5, 1)
    assert all(row["warnings"][-1] == "no-study" for row in rows(out) if row["status"] == "done")
    assert {row.get("folder") for row in rows(out)} == {None}
    assert not [path for path in out.iterdir() if path.is_dir()]
    assert run_films(analyzer, films, out, ["dicom", "csv"], resume=True)["kept"] == 5
    assert run_films(analyzer, films, out, ["dicom", "csv"], resume=True, new_study=True)["kept"] == 0
    assert run_films(analyzer, films, out, ["dicom"])["failed"] == 6


def test_tables_alone_go_on_too(analyzer: Analyzer, tmp_path: Path) -> None:
    films, out = some(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    run_films(analyzer, films, out, ["csv"])
    table = (out / "results.csv").read_text()
    run = run_films(analyzer, films, out, ["csv"], resume=True)
    assert run["kept"] == 5
    assert run["films_per_second"] * run["seconds"] == pytest.approx(1), "what was kept took no time"
    assert (out / "results.csv").read_text() == table
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "results.csv", "run.json"}
    with (out / RESULTS).open("a") as file:
        file.write(json.dumps({**rows(out)[2], "path": str(films[0])}) + "\n")
    assert run_films(analyzer, films, out, ["csv"], resume=True)["kept"] == 4, "of two rows the last one counts: failed"


def test_a_run_lets_go_of_what_close_calls_needed(tmp_path: Path) -> None:
    analyzer = Analyzer(with_int8(tmp_path / "bundle"), precision="int8", margin=99)
    films = [save(tmp_path / f"{n}.png", draw()) for n in range(3)]
    assert run_films(analyzer, films, tmp_path / "out", ["csv"])["done"] == 3
    assert analyzer._exact is None
