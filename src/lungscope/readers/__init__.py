"""Film files in, `Radiograph`s out. After here nobody asks what kind of file it was."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from threading import Thread

from lungscope.errors import UnreadableFileError, UnsupportedImageError
from lungscope.radiograph import Radiograph, Source
from lungscope.readers.common import MAX_BYTES, MAX_PIXELS, NO_FILM

__all__ = ["decode", "find", "prepare", "read", "real"]

#: Bytes from which hashing takes longer than starting a thread that does it beside decoding.
_LARGE = 2**20

#: What the system answers where nothing is behind a path (EINVAL: Windows, to a name that no file can have), and where
#: something is that can not be read as a file. Anything else is a fault of the machine.
_NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL)
_NO_FILE = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENAMETOOLONG)


def read(path: str | os.PathLike[str]) -> Radiograph:
    """Read one film file. Its content decides what it is, never its name.

    Raises UnreadableFileError for what is missing, a folder, not permitted, empty, broken or no image;
    UnsupportedImageError for an image that is no single grey radiograph. Both name the file. OSError, MemoryError and
    ImportError are faults of the machine, which say nothing of the film.
    """
    path = Path(path)
    try:
        about = path.stat()  # `exists` and its like have no word for faults of the machine from Python 3.14 on
        if S_ISDIR(about.st_mode):
            _entries(path)  # raises where the folder cannot be listed
            what = "holds no film file" if find([path]) == [path] else "is a folder"
            raise UnreadableFileError(f"{path}: {what}. Give a film file, or a folder with films in it.")
        if not S_ISREG(about.st_mode):
            raise UnreadableFileError(f"{path}: is a device, pipe or socket. Give a film file.")
        if about.st_size > MAX_BYTES:
            raise UnsupportedImageError(
                f"{path}: has {about.st_size:,} bytes; at most {MAX_BYTES:,} are read. Give a single film."
            )
        data = path.read_bytes()
    except ValueError as error:  # a NUL in its name
        raise UnreadableFileError(f"{path}: does not exist. Check the path.") from error
    except OSError as error:
        if error.errno in _NOTHING:
            what = "is a link that leads nowhere" if path.is_symlink() else "does not exist"
            raise UnreadableFileError(f"{path}: {what}. Check the path.") from error
        if error.errno not in _NO_FILE:
            raise
        reason = (error.strerror or str(error)).lower()
        raise UnreadableFileError(f"{path}: cannot be read: {reason}. Check the path and its permissions.") from error
    return decode(data, str(path), path=path)


def prepare(path: Path) -> None:
    """Begin to import what reading this film will take, on a thread: loading a bundle leaves Python time for it. What
    is wrong with the film or the installation, `read` will say."""

    def load() -> None:
        with suppress(Exception):
            with path.open("rb") as file:
                kind = "dicom" if _is_dicom(file.read(132)) else "raster"
            import_module(f"lungscope.readers.{kind}")

    Thread(target=load, daemon=True).start()


def decode(data: bytes, name: str, *, path: Path | None = None, max_pixels: int = MAX_PIXELS) -> Radiograph:
    """Read one film from the bytes of its file. `name` is what errors call it. Raises as `read` does.

    path: what the film's source says. max_pixels: a header that promises more is refused before anything is decoded.
    """
    if not data:
        raise UnreadableFileError(f"{name}: is empty (0 bytes). Export or copy the film again.")
    if len(data) < _LARGE:
        return _decode(data, name, path, max_pixels, hashlib.sha256(data).hexdigest)
    with ThreadPoolExecutor(1) as beside:
        digest = beside.submit(hashlib.sha256, data)
        return _decode(data, name, path, max_pixels, lambda: digest.result().hexdigest())


def _decode(data: bytes, name: str, path: Path | None, max_pixels: int, sha256: Callable[[], str]) -> Radiograph:
    # Imported here, so that a folder of PNGs never waits for pydicom, nor a DICOM node for Pillow.
    if _is_dicom(data):
        from lungscope.readers import dicom

        film = dicom.decode(data, name, max_pixels)
    else:
        from lungscope.readers import raster

        film = raster.decode(data, name, max_pixels)
    source = Source(path, sha256(), film.format, film.tags)
    return Radiograph(film.pixels, source, film.spacing_mm, film.spacing_origin)


def find(inputs: Iterable[Path]) -> list[Path]:
    """Expand folders, recursively and sorted, into the files in them; each file once, in the order of `inputs`.

    Every file counts, whatever its name, so that nothing is left out in silence; only hidden files and folders and
    DICOMDIR, Thumbs.db and desktop.ini are passed over. Links are followed, each folder once. Nothing is raised: a
    path that is missing, and a folder that is empty or cannot be listed, stay in the list, so that `read` says what
    is wrong with them and the others go on.
    """
    found: dict[Path, Path] = {}
    seen: set[Path] = set()
    for item in map(Path, inputs):
        films = _expand(item, seen)
        if not films and not _expand(item, set()):
            films = [item]
        for path in films:
            found.setdefault(absolute(path), path)
    return list(found.values())


def absolute(path: Path) -> Path:
    """`path` from the root, without "." and ".."; links stay as they are."""
    return Path(os.path.normpath(path.absolute()))


def real(path: Path) -> Path:
    """`path` from the root, links followed; of links that loop, as far as they go."""
    return Path(os.path.realpath(path))


def _expand(path: Path, seen: set[Path]) -> list[Path]:
    """The files below `path`, passing over the folders in `seen`, which were listed before."""
    films, waiting = list[Path](), [path]
    while waiting:  # folders may lie deeper than Python recurses
        path = waiting.pop()
        try:
            if not path.is_dir():
                films.append(path)
                continue
            folder = real(path)
            if folder in seen:
                continue
            seen.add(folder)
            waiting += [path / entry.name for entry in reversed(_entries(path))]
        except OSError:
            films.append(path)
    return films


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        films = [entry for entry in entries if entry.name[0] != "." and entry.name.lower() not in NO_FILM]
    return sorted(films, key=lambda entry: entry.name)


def _is_dicom(data: bytes) -> bool:
    """PS3.10 7.1: 128 free bytes, then "DICM". Older files begin with group 0002 or 0008, little endian."""
    return data[128:132] == b"DICM" or (data[:2] in (b"\x02\x00", b"\x08\x00") and data[3:4] == b"\x00")
