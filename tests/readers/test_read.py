"""`read` and `find`: the contract that holds for every kind of file, and what is said of broken ones."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.corpus import WRITERS, draw_chest, write_broken, write_films

from lungscope.errors import InputError, QualityError, UnreadableFileError, UnsupportedImageError
from lungscope.readers import decode, find, read
from lungscope.stages.quality import inspect
from programs import python

LOSSY = {"jpeg": 0.08, "rgb-jpeg": 0.08, "dicom-jpeg": 0.08, "dicom-j2k-lossy": 0.05, "dicom-jpegls-near": 0.001}
BLAND = {"one-pixel", "black", "white", "strip", "faint", "dicom-black"}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_broken(tmp_path_factory.mktemp("broken"))


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_comes_out_as_the_same_film(tmp_path: Path, kind: str) -> None:
    picture = draw_chest(150, 130, np.random.default_rng(1))
    path = WRITERS[kind](picture, tmp_path / "film")
    film = read(path)
    assert film.pixels.dtype == np.float32 and film.pixels.flags["C_CONTIGUOUS"]
    assert film.pixels.min() >= 0 and film.pixels.max() <= 1
    assert np.abs(film.pixels - picture).max() <= LOSSY.get(kind, 0.002)
    assert film.source.path == path
    assert film.source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert film.source.tags and all(isinstance(value, str) for value in film.source.tags.values())
    assert inspect(film).warnings == () or [w.code for w in inspect(film).warnings] == ["small"]


def test_the_name_of_a_file_means_nothing(tmp_path: Path) -> None:
    picture = draw_chest(100, 100, np.random.default_rng(1))
    path = WRITERS["dicom"](picture, tmp_path / "film").rename(tmp_path / "film.png")
    assert read(path).source.format == "DICOM"
    assert decode(path.read_bytes(), "upload").source.path is None


def test_every_broken_kind_is_an_error_that_names_the_file(broken: dict[str, Path]) -> None:
    for kind, path in broken.items():
        with pytest.raises(InputError) as caught:
            inspect(read(path))
        assert str(path) in str(caught.value), kind
        assert (type(caught.value) is QualityError) == (kind in BLAND), kind


@pytest.mark.parametrize(
    ("kind", "error", "reason"),
    [
        ("empty", UnreadableFileError, "0 bytes"),
        ("text", UnreadableFileError, "not an image"),
        ("text-dicom", UnreadableFileError, "not an image"),
        ("bomb", UnsupportedImageError, "pixels"),
        ("dicom-bomb", UnsupportedImageError, "20000 x 20000"),
        ("truncated-png", UnreadableFileError, "cut short"),
        ("truncated-jpeg", UnreadableFileError, "cut short"),
        ("truncated-dicom", UnreadableFileError, "cut short"),
        ("truncated-j2k", UnreadableFileError, "cut short"),
        ("nan", UnsupportedImageError, "NaN"),
        ("ct", UnsupportedImageError, "modality CT"),
        ("photograph", UnsupportedImageError, "colour"),
        ("dicom-colour", UnsupportedImageError, "colour"),
        ("frames", UnsupportedImageError, "2 frames"),
        ("pages", UnsupportedImageError, "2 pages"),
        ("lateral", UnsupportedImageError, "frontal"),
        ("black", QualityError, "blank"),
        ("one-pixel", QualityError, "1 x 1"),
        ("faint", QualityError, "12-bit"),
    ],
)
def test_the_reason_is_given(broken: dict[str, Path], kind: str, error: type[InputError], reason: str) -> None:
    with pytest.raises(error, match=reason):
        inspect(read(broken[kind]))


def test_a_file_larger_than_any_film_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lungscope.readers.MAX_BYTES", 10)
    (tmp_path / "a.png").write_bytes(bytes(11))
    with pytest.raises(UnsupportedImageError, match=r"a\.png: has 11 bytes; at most 10 are read"):
        read(tmp_path / "a.png")


def test_folders_are_expanded_sorted_and_each_file_once(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.dcm", "a.jpg", ".hidden/x.png", "b/.DS_Store", "b/DICOMDIR", "c/no-suffix"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [
        path.relative_to(tmp_path).as_posix() for path in find([tmp_path / "b" / "2.png", tmp_path, tmp_path / "b"])
    ]
    assert names == ["b/2.png", "a.jpg", "b/1.dcm", "c/no-suffix"]
    assert find([tmp_path / "c", tmp_path / "c"]) == [tmp_path / "c" / "no-suffix"]


def test_links_that_loop_end_and_dangling_ones_are_reported(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "film.png").touch()
    (tmp_path / "in" / "back").symlink_to(tmp_path)
    (tmp_path / "in" / "self.png").symlink_to(tmp_path / "in" / "self.png")
    assert [path.name for path in find([tmp_path])] == ["film.png", "self.png"]
    with pytest.raises(UnreadableFileError, match=r"self\.png.*leads nowhere"):
        read(tmp_path / "in" / "self.png")


def test_an_empty_folder_and_a_missing_path_stay_and_say_why(tmp_path: Path) -> None:
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    missing = tmp_path / "missing.png"
    assert find([tmp_path / "empty", missing]) == [tmp_path / "empty", missing]
    with pytest.raises(UnreadableFileError, match="empty: holds no film"):
        read(tmp_path / "empty")
    with pytest.raises(UnreadableFileError, match="does not exist"):
        read(missing)


def test_an_unreadable_folder_stays_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "film.png").touch()
    scandir = os.scandir

    def refuse(path: Path) -> object:  # root may list any folder, so permissions alone would test nothing here
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert find([tmp_path]) == [tmp_path / "film.png", tmp_path / "locked"]
    with pytest.raises(UnreadableFileError, match="locked: cannot be read: permission denied"):
        read(tmp_path / "locked")


@pytest.mark.parametrize("call", ["stat", "open", "scandir"])
@pytest.mark.parametrize(
    ("number", "is_of_the_path"),
    [
        (errno.EMFILE, False),
        (errno.EIO, False),
        (errno.ESTALE, False),
        (errno.ENOMEM, False),
        (errno.EACCES, True),
        (errno.EPERM, True),
        (errno.ENAMETOOLONG, True),
        (errno.ENOTDIR, True),
    ],
)
def test_a_fault_of_the_machine_is_none_of_the_film(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, is_of_the_path: bool
) -> None:
    path = (
        tmp_path
        if call == "scandir"
        else WRITERS["png8"](draw_chest(9, 9, np.random.default_rng(1)), tmp_path / "film")
    )
    module = io if call == "open" else os
    whole = getattr(module, call)

    def fails(name: object, *arguments: object, **options: object) -> object:
        if str(name) == str(path):
            raise OSError(number, os.strerror(number), str(name))
        return whole(name, *arguments, **options)

    monkeypatch.setattr(module, call, fails)
    with pytest.raises(UnreadableFileError if is_of_the_path else OSError, match=re.escape(str(path))):
        read(path)


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="does not exist"):
        read(tmp_path / "a\0b")
    with pytest.raises(UnreadableFileError, match="too long"):
        read(tmp_path / ("a" * 1000))


@pytest.mark.parametrize("error", [MemoryError(), ModuleNotFoundError("No module named 'pylibjpeg'")])
def test_a_machine_that_can_not_decode_says_nothing_of_the_film(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = WRITERS["dicom"](draw_chest(150, 130, np.random.default_rng(1)), tmp_path / "film")

    def fails(dataset: object) -> None:
        raise error

    monkeypatch.setattr("lungscope.readers.dicom.grey_scale", fails)
    with pytest.raises(type(error)):
        read(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnreadableFileError, match="pipe"):
        read(tmp_path / "pipe.png")


def test_films_can_be_written_again_and_are_the_same(tmp_path: Path) -> None:
    paths = write_films(tmp_path / "films", 3, seed=5)
    assert [path.read_bytes() for path in paths] == [p.read_bytes() for p in write_films(tmp_path / "again", 3, seed=5)]
    assert find([tmp_path / "films"]) == paths


def test_reading_a_png_loads_neither_pydicom_nor_torch(tmp_path: Path) -> None:
    path = write_films(tmp_path, 1)[0]
    code = f"import sys; from lungscope.readers import read; read({str(path)!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "PIL.Image" in loaded and not loaded & {"pydicom", "torch"}


@pytest.mark.parametrize(("kind", "pydicom"), [("dicom", True), ("png8", False)])
def test_what_a_film_needs_is_imported_ahead(tmp_path: Path, kind: str, pydicom: bool) -> None:
    path = WRITERS[kind](draw_chest(150, 130, np.random.default_rng(1)), tmp_path / "film")
    done = python(
        "import sys, threading\nfrom pathlib import Path\nfrom lungscope.readers import prepare\n"
        f"prepare(Path({str(path)!r}))\n"
        "[thread.join() for thread in threading.enumerate() if thread is not threading.current_thread()]\n"
        "print('pydicom' in sys.modules, 'lungscope.readers.raster' in sys.modules)"
    )
    assert done.stdout.split() == [str(pydicom), str(not pydicom)], done.stderr


def test_what_is_wrong_with_a_film_is_not_told_ahead(tmp_path: Path) -> None:
    done = python(
        "import threading\nfrom pathlib import Path\nfrom lungscope.readers import prepare\n"
        f"prepare(Path({str(tmp_path / 'none.png')!r}))\n"
        "[thread.join() for thread in threading.enumerate() if thread is not threading.current_thread()]"
    )
    assert (done.returncode, done.stderr) == (0, "")
