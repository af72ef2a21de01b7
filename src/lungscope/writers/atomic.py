"""Files appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; it takes the name `path` when the block ends, and vanishes if that fails.

    durable: on the disk before the block is left, so that not even a loss of power takes it back (POSIX only).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with named(path), temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def named(path: Path | str) -> Iterator[None]:
    """Have an OSError of the block that names no file, as that of a full disk does, name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            if error.errno is None:
                raise OSError(f"{path}: {error}") from error
            error.filename = str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk: a rename is durable only then (POSIX only)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8; what UTF-8 can not hold (half a surrogate pair out of a file name) becomes "?"."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8", "replace"))
