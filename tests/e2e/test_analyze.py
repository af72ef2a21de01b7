"""`lungscope analyze` from the outside: files, rows, statuses, interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any

import cv2
import numpy as np
import pytest

from bundles import write_bundle
from films import TISSUE, draw, save
from lungscope.batch import run_films
from lungscope.cli.analyze import TABLE_ROWS, demo_film, films_in
from lungscope.errors import LungscopeError, UsageError
from lungscope.pipeline import Analyzer
from lungscope.report import Report
from programs import environment, program, python

ALL = {"report.json", "lungs.png", "saliency.npy", "overlay.png", "report.html"}


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def mixed(folder: Path) -> list[Path]:
    """Films of which some are broken, two share a stem, and one crashes nothing."""
    folder.mkdir(parents=True)
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("this is no image")
    blank = save(folder / "blank.png", np.full((300, 300), TISSUE, np.float32))
    assert blank.exists()
    whole = save(folder / "whole.png", draw(opacities=[(0.7, 0.28, 0.12)]))
    (folder / "cut.png").write_bytes(whole.read_bytes()[:400])
    save(folder / "a" / "same.png", draw())
    save(folder / "b" / "same.png", draw(400, 300))
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_mixed_folder(tiny: Path, tmp_path: Path) -> None:
    films = mixed(tmp_path / "in")
    missing = tmp_path / "missing.png"
    out = tmp_path / "out"
    done = program("analyze", tmp_path / "in", missing, "--out", out, "--model", tiny, "--json")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    found = rows(out)
    assert [row["path"] for row in found] == [str(path) for path in (*films, missing)]
    failed = {Path(row["path"]).name: row["error"] for row in found if row["status"] == "failed"}
    assert {name: error["code"] for name, error in failed.items()} == {
        "empty.png": "unreadable",
        "text.png": "unreadable",
        "cut.png": "unreadable",
        "blank.png": "quality",
        "missing.png": "unreadable",
    }
    assert all(name in error["message"] for name, error in failed.items())
    good = [row for row in found if row["status"] == "done"]
    assert len({row["folder"].casefold() for row in good}) == len(good) == 3
    for row in good:
        folder = out / row["folder"]
        assert {path.name for path in folder.iterdir()} == ALL
        report = json.loads((folder / "report.json").read_text())
        assert Report.from_json(report).to_json() == report
        assert report["source"]["path"] == row["path"]
        mask = cv2.imread(str(folder / "lungs.png"), cv2.IMREAD_UNCHANGED)
        saliency = np.load(folder / "saliency.npy")
        assert mask.shape == saliency.shape == (report["image"]["height"], report["image"]["width"])
        assert set(np.unique(mask)) == {0, 255}
        assert not saliency[mask == 0].any()
        peak = report["saliency"]["peak"]
        if peak is not None:
            assert saliency[peak["row"], peak["col"]] == saliency.max()
    run = json.loads(done.stdout)
    assert (run["inputs"], run["done"], run["failed"], run["interrupted"]) == (8, 3, 5, False)
    on_disk = json.loads((out / "run.json").read_text())
    assert on_disk == {name: value for name, value in run.items() if name != "rows"}
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["index.html", "results.jsonl", "run.json", *(row["folder"] for row in good)]
    )


def test_all_done_is_status_zero_and_a_table(tiny: Path, tmp_path: Path) -> None:
    film = save(tmp_path / "one [bold].png", draw(lungs=["left"]))
    done = program("analyze", film, "--out", tmp_path / "out", "--model", tiny, "--write", "json")
    assert done.returncode == 0, done.stderr
    assert "one [bold].png" in done.stdout
    assert "Normal" in done.stdout
    assert "– / 0 %" in done.stdout, "right and left"
    assert "Not for diagnosis." in done.stdout
    assert {path.name for path in (tmp_path / "out" / "one [bold]").iterdir()} == {"report.json"}


def test_a_film_without_an_answer_says_what_it_may_be(tmp_path: Path) -> None:
    model = write_bundle(tmp_path / "model", thresholds=(0, 0, 1))
    film = save(tmp_path / "one.png", draw())
    done = program("analyze", film, "--out", tmp_path / "out", "--model", model, "--write", "json")
    assert done.returncode == 0, done.stderr
    assert "no answer" in done.stdout
    row = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    assert (row["abstained"], row["conformal_set"]) == (True, ["COVID-19", "Normal"])


def test_analyze_loads_no_torch(tiny: Path, tmp_path: Path) -> None:
    film = save(tmp_path / "film.png", draw())
    arguments = ["lungscope", "analyze", str(film), "--out", str(tmp_path / "out"), "--model", str(tiny), "--json"]
    done = python(
        f"import sys; sys.argv = {arguments!r}\n"
        "from lungscope.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "assert 'openvino' in sys.modules\n"
        "heavy = {'torch', 'timm', 'lightning', 'segmentation_models_pytorch', 'torchvision'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "film" / "report.json").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--model", "/no/such/bundle"], 3, "No bundle '/no/such/bundle'"),
        (["--write", "json,pgn"], 2, "Did you mean 'png'?"),
        (["--write", "xml"], 2, "Allowed: json, png, html, dicom, csv, parquet"),
        (["--new-study"], 2, "Add dicom to --write"),
        (["--device", "tpu"], 2, "Device 'tpu' does not exist"),
        (["--precision", "fp32"], 2, "Precision 'fp32' does not exist. Allowed: auto, f32"),
        (["--precision", "int8"], 3, "Precision 'int8' needs a quantisation"),
    ],
)
def test_what_can_not_run_writes_nothing(
    tiny: Path, tmp_path: Path, arguments: Sequence[str], status: int, message: str
) -> None:
    film = save(tmp_path / "film.png", draw())
    model = [] if "--model" in arguments else ["--model", tiny]
    done = program("analyze", film, "--out", tmp_path / "out", *model, *arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(tiny: Path, tmp_path: Path) -> None:
    film = save(tmp_path / "film.png", draw())
    done = program("analyze", film, "--out", film, "--model", tiny)
    assert done.returncode == 2
    assert "can not be a folder" in done.stderr


@pytest.mark.parametrize("out", ["s3://bucket/results", "file:///tmp/results"])
@pytest.mark.parametrize(
    "command",
    [
        ["analyze", "film.png", "--out"],
        ["data", "import", "films"],
        ["data", "audit", "store", "--out"],
        ["evaluate", "classifier", "--out"],
        ["benchmark", "batch", "--out"],
        ["benchmark", "segmentation", "--work"],
        ["serve", "--keep"],
        ["pacs", "--spool"],
    ],
    ids=" ".join,
)
def test_results_go_to_no_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Sequence[str], out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "film.png", draw())
    done = program(*command, out)
    assert done.returncode == 2, done.stderr
    assert f"{out} is a URL, and what is written goes to this machine" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"film.png"}


def test_demo_is_a_real_film(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("data_store", reason="the extra 'demo' (pydicom-data) is not installed")
    done = program("analyze", "--demo", "--out", tmp_path, "--model", tiny, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "RG1_UNCR" / "report.json").read_text())
    assert (report["image"]["height"], report["image"]["width"]) == (1955, 1841)


def test_demo_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lungscope.cli.analyze.DEMO_FILM", "no-such-film.dcm")
    with pytest.raises(LungscopeError, match=r"pip install 'lungscope\[demo\]'"):
        demo_film()


def test_results_of_an_earlier_run_are_no_films(tmp_path: Path) -> None:
    film = save(tmp_path / "film.png", draw())
    overlay = save(tmp_path / "out" / "film" / "overlay.png", draw())
    assert films_in([tmp_path], tmp_path / "out") == [film]
    assert films_in([overlay], tmp_path / "out") == [overlay]
    assert films_in([tmp_path], tmp_path / "in" / ".." / "out") == [film]


def test_results_among_films_are_refused_and_never_a_run_of_nothing(tmp_path: Path) -> None:
    film = save(tmp_path / "in" / "film.png", draw())
    assert films_in([tmp_path / "in"], tmp_path) == [film], "a folder named inside --out is films"
    with pytest.raises(UsageError, match="is an input itself"):
        films_in([tmp_path / "in"], tmp_path / "in" / ".." / "in")
    with pytest.raises(UsageError, match=r"No film in .* but results in"):
        films_in([tmp_path], tmp_path / "in")
    done = program("analyze", tmp_path / "in", "--out", tmp_path / "out", "--write", ",")
    assert (done.returncode, "names no format" in done.stderr) == (2, True)


def test_a_run_that_was_cut_off_has_no_summary_of_an_earlier_one(tiny: Path, tmp_path: Path) -> None:
    film = save(tmp_path / "film.png", draw())
    assert program("analyze", film, "--out", tmp_path / "out", "--model", tiny).returncode == 0
    assert (tmp_path / "out" / "run.json").exists()
    assert program("analyze", film, "--out", tmp_path / "out", "--model", tmp_path / "absent").returncode == 3
    assert (tmp_path / "out" / "run.json").exists(), "a run that never began changes nothing"
    code = """
import sys
from unittest import mock
from lungscope import batch
from lungscope.cli import main
sys.argv = ["lungscope", "analyze", *sys.argv[1:]]
with mock.patch.object(batch, "record", side_effect=OSError("the disk went away")):
    main.main()
"""
    command = [sys.executable, "-c", code, film, "--out", tmp_path / "out", "--model", tiny]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 3, done.stderr
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize("module", ["openvino", "cv2"])
def test_a_broken_installation_is_told_as_such(module: str, tmp_path: Path) -> None:
    film = save(tmp_path / "film.png", draw())
    code = f"""
import sys
sys.modules[{module!r}] = None
from lungscope.cli import main
sys.argv = ["lungscope", *sys.argv[1:]]
main.main()
"""
    for arguments in (["analyze", film, "--out", tmp_path / "out"], ["doctor"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True, text=True, env=environment(), check=False,
        )  # fmt: skip
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr
        assert module in done.stdout + done.stderr


def test_a_film_whose_folder_can_not_be_cleared_fails_alone(analyzer: Analyzer, tmp_path: Path) -> None:
    films = [save(tmp_path / f"{name}.png", draw()) for name in ("a", "b")]
    (tmp_path / "out" / "a" / "report.json").mkdir(parents=True)
    run = run_films(analyzer, films, tmp_path / "out", ["json"])
    assert (run["done"], run["failed"]) == (1, 1)


def test_a_film_that_fails_leaves_no_files_of_an_earlier_run(analyzer: Analyzer, tmp_path: Path) -> None:
    film = save(tmp_path / "film.png", draw())
    out = tmp_path / "out"
    out.mkdir()
    assert run_films(analyzer, [film], out, ["json", "png", "html"])["done"] == 1
    film.write_text("broken now")
    run = run_films(analyzer, [film], out, ["json"])
    assert (run["done"], run["failed"]) == (0, 1)
    assert not (out / "film").exists()


@pytest.mark.parametrize("there", ["a", "a/film.dcm", "a/deep/overlay.png"])
@pytest.mark.parametrize("formats", [["json", "png"], ["csv"]])
def test_what_lungscope_did_not_make_is_neither_removed_nor_written_over(
    analyzer: Analyzer, tmp_path: Path, there: str, formats: list[str]
) -> None:
    films = [save(tmp_path / "out" / f"{name}.png", draw()) for name in ("a", "b")]
    original = tmp_path / "out" / there
    original.parent.mkdir(exist_ok=True, parents=True)
    original.write_bytes(b"an original")
    for _ in range(2):
        run = run_films(analyzer, films, tmp_path / "out", formats)
        assert original.read_bytes() == b"an original"
        assert (run["done"], run["failed"]) == ((2, 0) if formats == ["csv"] else (1, 1))
    if run["failed"]:
        error = rows(tmp_path / "out")[0]["error"]
        assert error["code"] == "usage" and "did not make" in error["message"]


def test_a_run_that_was_killed_knows_the_folders_that_it_made(
    analyzer: Analyzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    films = [save(tmp_path / f"{name}.png", draw()) for name in ("a\nb", "c")]
    out = tmp_path / "out"
    run_films(analyzer, films[:1], out, ["json"])

    def killed(report: Report, folder: Path, *_: object, **__: object) -> None:
        if folder.name == "c":
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("lungscope.batch.write", killed)
        with pytest.raises(SystemExit):
            run_films(analyzer, films, out, ["json", "png"])
    (out / "c").mkdir(exist_ok=True)
    (out / "c" / "overlay.png").write_bytes(b"half of the killed run's")
    (out / "c" / ".report.json.1.part").write_bytes(b"and a part")
    assert run_films(analyzer, films, out, ["json"], resume=True)["done"] == 2
    assert sorted(path.name for path in (out / "c").iterdir()) == ["report.json"]
    assert sorted(path.name for path in out.iterdir()) == ["a\nb", "c", "results.jsonl", "run.json"]


def test_folders_of_earlier_runs_stay_lungscopes(analyzer: Analyzer, tmp_path: Path) -> None:
    films = [save(tmp_path / f"{name}.png", draw()) for name in ("a", "b", "c")]
    out = tmp_path / "out"
    for some in (films, films[1:2], films[:1], films):
        assert run_films(analyzer, some, out, ["json"])["failed"] == 0
    stop = Event()
    run_films(analyzer, films, out, ["json", "png"], workers=1, stop=stop, progress=stop.set)
    assert run_films(analyzer, films, out, ["json", "png"], resume=True)["failed"] == 0
    assert not (out / ".begun").exists(), "every folder has its row"


def test_a_film_in_the_folder_of_its_own_results_stays(analyzer: Analyzer, tmp_path: Path) -> None:
    run_films(analyzer, [save(tmp_path / "lungs.png", draw())], tmp_path / "out", ["json", "png"])
    film = save(tmp_path / "out" / "lungs" / "lungs.png", draw(400, 300))
    before = film.read_bytes()
    assert run_films(analyzer, [film], tmp_path / "out", ["json", "png"])["failed"] == 1
    assert film.read_bytes() == before


def test_a_folder_that_can_not_be_prepared_is_a_usage_error(analyzer: Analyzer, tmp_path: Path) -> None:
    (tmp_path / "out" / "run.json").mkdir(parents=True)
    with pytest.raises(UsageError, match="can not be written"):
        run_films(analyzer, [save(tmp_path / "film.png", draw())], tmp_path / "out", ["json"])


def test_a_link_that_loops_stops_no_run(tmp_path: Path) -> None:
    film = save(tmp_path / "films" / "film.png", draw())
    (tmp_path / "films" / "loop").symlink_to("loop")
    assert sorted(films_in([tmp_path / "films"], tmp_path / "out")) == [film, tmp_path / "films" / "loop"]


def test_two_runs_do_not_write_to_one_folder(analyzer: Analyzer, tmp_path: Path) -> None:
    film = save(tmp_path / "film.png", draw())

    def other(progress: object = None) -> None:
        with pytest.raises(UsageError, match="another run is writing"):
            run_films(analyzer, [film], tmp_path / "out", ["json"], resume=True)

    run = run_films(analyzer, [film], tmp_path / "out", ["json"], progress=other)
    assert run["done"] == 1
    assert run_films(analyzer, [film], tmp_path / "out", ["json"], resume=True)["kept"] == 1


def test_rows_that_something_else_took_are_missed(analyzer: Analyzer, tmp_path: Path) -> None:
    films = [save(tmp_path / f"{name}.png", draw()) for name in ("a", "b")]
    other = tmp_path / "other"

    def take() -> None:
        other.touch()
        other.replace(tmp_path / "out" / "results.jsonl")

    with pytest.raises(LungscopeError, match="something else wrote"):
        run_films(analyzer, films, tmp_path / "out", ["json"], progress=take)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_film_that_became_a_pipe_does_not_stop_what_is_resumed(analyzer: Analyzer, tmp_path: Path) -> None:
    films = [save(tmp_path / f"{name}.png", draw()) for name in ("a", "b")]
    run_films(analyzer, films, tmp_path / "out", ["json"])
    films[0].unlink()
    os.mkfifo(films[0])
    run = run_films(analyzer, films, tmp_path / "out", ["json"], resume=True)
    assert (run["done"], run["failed"], run["kept"]) == (1, 1, 1)


def test_results_behind_a_link_are_no_films(analyzer: Analyzer, tmp_path: Path) -> None:
    film = save(tmp_path / "films" / "film.png", draw())
    run_films(analyzer, [film], tmp_path / "films" / "results", ["json", "png"])
    (tmp_path / "link").symlink_to(tmp_path / "films" / "results")
    assert films_in([tmp_path / "films"], tmp_path / "link") == [film]
    (tmp_path / "all").symlink_to(tmp_path / "films")
    with pytest.raises(UsageError, match="is an input itself"):
        films_in([tmp_path / "films"], tmp_path / "all")


def test_names_say_nothing_to_the_terminal(tiny: Path, tmp_path: Path) -> None:
    save(tmp_path / "in" / "\x1b[31mred\x1b]0;pwn\x07.png", draw())
    (tmp_path / "in" / "\x1b[31mbroken.png").write_text("no film")
    save(tmp_path / "in" / "胸.png", draw())
    command = [sys.executable, "-m", "lungscope.cli.main", "analyze", tmp_path / "in", "--out", tmp_path / "out"]
    done = subprocess.run(
        [*map(str, command), "--model", str(tiny)],
        capture_output=True, env=environment() | {"PYTHONIOENCODING": "latin-1"}, encoding="latin-1", check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "\x1b[31m" not in done.stdout + done.stderr and "\\x1b[31mred" in done.stdout
    missing = program("analyze", tmp_path / "\x1b[31mnone", "--out", tmp_path / "other", "--model", "\x1b[31mno")
    assert missing.returncode == 3 and "\x1b" not in missing.stderr


def test_rows_of_other_films_are_told_of(tiny: Path, tmp_path: Path) -> None:
    films = [save(tmp_path / f"film{number}.png", draw()) for number in range(3)]
    arguments = ["--out", tmp_path / "out", "--model", tiny, "--write", "csv"]
    assert program("analyze", *films, *arguments).returncode == 0
    done = program("analyze", films[1], *arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert "1 of 1 films analysed, 1 of them by an earlier run" in done.stdout
    assert "Films that this run was not given, whose rows stay: 2." in done.stdout
    assert "film1.png" in done.stdout and "film0.png" not in done.stdout
    assert len(rows(tmp_path / "out")) == 3


def test_many_films_are_not_kept(tiny: Path, tmp_path: Path) -> None:
    films = [tmp_path / f"missing{number}.png" for number in range(TABLE_ROWS + 1)]
    done = program("analyze", *films, "--out", tmp_path / "out", "--model", tiny, "--write", "csv", "--json")
    run = json.loads(done.stdout)
    assert run["rows"] is None, "beyond a screenful they are in results.jsonl alone"
    assert len(rows(tmp_path / "out")) == run["failed"] == len(films)


@pytest.mark.skipif(sys.platform == "win32", reason="signals can not be sent to one process on Windows")
@pytest.mark.parametrize(("ends", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_whole_files_and_valid_rows(tiny: Path, tmp_path: Path, ends: int, status: int) -> None:
    first = save(tmp_path / "in" / "film000.png", draw(1200, 1000))
    for number in range(1, 200):
        os.link(first, tmp_path / "in" / f"film{number:03}.png")
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "lungscope.cli.main", "analyze", str(tmp_path / "in"), "--out", str(out)]
    with subprocess.Popen(
        [*arguments, "--model", str(tiny), "--write", "json,png,html,csv"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 300
        results = out / "results.jsonl"
        while time.monotonic() < deadline and not (results.exists() and results.read_bytes().count(b"\n") >= 3):
            time.sleep(0.02)
        process.send_signal(ends)
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == status, stderr
    assert "Traceback" not in stderr
    assert "Interrupted: " in stdout
    found = rows(out)
    assert 3 <= len(found) < 200
    run = json.loads((out / "run.json").read_text())
    assert run["interrupted"] is True
    assert run["done"] == len(found)
    assert not list(out.rglob("*.part"))
    assert f"{len(found)} of 200 films are here" in (out / "index.html").read_text()
    assert len((out / "results.csv").read_text().splitlines()) == 1 + len(found)
    for row in found:
        assert {path.name for path in (out / row["folder"]).iterdir()} == ALL
    assert {path.name for path in out.iterdir() if path.is_dir()} == {row["folder"] for row in found}
    films = sorted((tmp_path / "in").iterdir())[: len(found) + 2]
    again = program("analyze", *films, "--out", out, "--model", tiny, "--write", "json,png,html,csv", "--resume")
    assert again.returncode == 0, again.stderr
    assert f"{len(films)} films analysed, {len(found)} of them by an earlier run" in again.stdout
    assert rows(out)[: len(found)] == found
    assert [row["path"] for row in rows(out)] == [str(film) for film in films]
