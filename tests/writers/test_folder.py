"""The files of a film, and folder names that never collide."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from films import draw, radiograph
from lungscope.pipeline import Analyzer
from lungscope.report import Report
from lungscope.writers.atomic import whole_file, write_text
from lungscope.writers.folder import DEFAULT_FORMATS, folder_names, write
from lungscope.writers.json import Results

ALL = {"report.json", "lungs.png", "saliency.npy", "overlay.png", "report.html"}


@pytest.fixture(scope="module")
def report(analyzer: Analyzer) -> Report:
    return analyzer.analyze(radiograph(draw(), path=Path("a.png")))


def test_files_hold_what_the_report_holds(report: Report, tmp_path: Path) -> None:
    write(report, tmp_path / "a", DEFAULT_FORMATS)
    assert {path.name for path in (tmp_path / "a").iterdir()} == ALL
    mask = cv2.imread(str(tmp_path / "a" / "lungs.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(mask, report.lungs.mask * np.uint8(255))
    saliency = np.load(tmp_path / "a" / "saliency.npy", allow_pickle=False)
    assert saliency.dtype == np.float32
    assert report.saliency is not None
    np.testing.assert_array_equal(saliency, report.saliency.map)
    assert json.loads((tmp_path / "a" / "report.json").read_text()) == report.to_json()


@pytest.mark.parametrize(
    ("formats", "files"),
    [
        (["json"], {"report.json"}),
        (["png"], {"lungs.png", "saliency.npy", "overlay.png"}),
        (["html"], {"report.html"}),
    ],
)
def test_only_what_was_asked_for_is_there_even_after_an_earlier_run(
    report: Report, tmp_path: Path, formats: list[str], files: set[str]
) -> None:
    (tmp_path / "mine.txt").write_text("not lungscope's")
    (tmp_path / ".report.json.123.part").touch()  # as a process that was killed leaves it
    write(report, tmp_path, DEFAULT_FORMATS)
    write(report, tmp_path, formats)
    assert {path.name for path in tmp_path.iterdir()} == files | {"mine.txt"}


def test_a_bundle_that_only_segments_leaves_no_saliency(report: Report, tmp_path: Path) -> None:
    write(replace(report, classification=None, saliency=None, severity=None), tmp_path, DEFAULT_FORMATS)
    assert {path.name for path in tmp_path.iterdir()} == ALL - {"saliency.npy"}


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_text(path, "first")
    with pytest.raises(RuntimeError), whole_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "first"
    assert [found.name for found in tmp_path.iterdir()] == ["x"]
    write_text(path, "half a surrogate: \udc80")
    assert path.read_text() == "half a surrogate: ?"


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may become larger than that, as if the disk were full."""
    resource = pytest.importorskip("resource", reason="no limits of a process here")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_the_disk_has_no_room_for_is_named(report: Report, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"too large.*saliency\.npy") as caught, room_for(100_000):
        write(report, tmp_path, ["png"])
    assert caught.value.errno == errno.EFBIG
    assert not (tmp_path / "saliency.npy").exists()
    with pytest.raises(OSError, match=r"results\.jsonl"), Results(tmp_path) as results, room_for(1000):
        results.add({"path": "a" * 990, "status": "failed"})
    full = pytest.raises(OSError, match=r"too large.*results\.jsonl")
    with full, Results(tmp_path, append=True) as results, room_for(1000):
        results.add({"path": "a", "status": "failed"})


def test_an_error_without_a_number_names_the_file_too(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"x: 3 requested and 2 written"), whole_file(tmp_path / "x"):
        raise OSError("3 requested and 2 written")
    with pytest.raises(FileNotFoundError, match="another"), whole_file(tmp_path / "x"):
        (tmp_path / "another").read_bytes()


def names(*paths: str) -> list[str]:
    return folder_names([Path(path) for path in paths])


def test_a_stem_of_its_own_is_the_name() -> None:
    assert names("/d/a.png", "/d/b.dcm", "/d/1.2.840.dcm") == ["a", "b", "1.2.840"]


def test_films_with_one_stem_get_names_that_depend_on_their_path_alone() -> None:
    first, second, other = names("/d/a.png", "/e/A.dcm", "/d/b.png")
    assert re.fullmatch(r"a-[0-9a-f]{8}", first)
    assert re.fullmatch(r"A-[0-9a-f]{8}", second)
    assert first.casefold() != second.casefold()
    assert other == "b"
    assert names("/e/A.dcm", "/d/a.png") == [second, first]
    # The digest is fixed here so that it stays the same between versions: sha256("/d/a.png").
    assert first == "a-ce658b6f"


def test_a_film_leaves_the_folders_of_other_films_alone() -> None:
    paths = [Path("/d/a.png"), Path("/d/b.png")]
    assert folder_names(paths, {Path("/e/a.png"): "a", Path("/e/c.png"): "B"}) == [names("/d/a.png", "/e/a.png")[0],
        names("/d/b.png", "/e/b.png")[0]]  # fmt: skip
    assert folder_names(paths, {Path("/e/c.png"): "c"}) == ["a", "b"]


def test_a_film_named_like_anothers_hashed_name_does_not_meet_it() -> None:
    hashed = names("/d/a.png", "/e/a.png")[0]
    found = names("/d/a.png", "/e/a.png", f"/d/{hashed}.png")
    assert len({name.casefold() for name in found}) == 3


@pytest.mark.parametrize(
    "path",
    [
        "/d/results.jsonl.png",
        "/d/Run.json.dcm",
        "/d/index.html.png",
        "/d/results.CSV.png",
        "/",
        "/d/..",
        "/d/....png",
        "/d/a .png",
    ],
)
def test_names_that_would_hide_the_runs_own_files_or_leave_its_folder_are_not_used(path: str) -> None:
    (name,) = names(path)
    assert name.casefold() not in {"results.jsonl", "results.csv", "run.json", "index.html", "", ".", ".."}
    assert "/" not in name
    assert re.search(r"-[0-9a-f]{8}$", name)


def test_ten_thousand_films_with_one_stem() -> None:
    assert len(set(names(*(f"/d{number}/x.png" for number in range(10_000))))) == 10_000
