"""What in a run's folder is lungscope's, so that nothing else is ever removed or written over; one run at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from lungscope.errors import UsageError
from lungscope.writers.atomic import named, whole_file
from lungscope.writers.json import RESULTS, whole_rows
from lungscope.writers.run import begin_run, check_run

#: The list of folders that lungscope made and no row names, in the folder of the results.
BEGUN = ".begun"


@contextmanager
def claimed(out: Path, formats: Sequence[str]) -> Iterator[Claim]:
    """The claim of a run that writes to `out` alone, from its beginning to its end.

    Raises UsageError where another run writes there, or `out` can not be written; and as `check_run` does, before
    anything is changed.
    """
    try:
        check_run(out, formats)
        out.mkdir(parents=True, exist_ok=True)
        (out / RESULTS).open("ab").close()
    except OSError as error:
        raise _refused(out, error) from error
    with _alone(out):
        try:
            claim = Claim(out)
            begin_run(out, formats)
        except OSError as error:
            raise _refused(out, error) from error
        with claim:
            yield claim
            claim.settle()


class Claim:
    """The folders in `out` that lungscope made: those that rows of results.jsonl name, and those in a list beside it,
    of earlier runs and of one that is not closed. Safe to use from several threads.

    Raises OSError where `out` can not be written.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._list, self._lock = out / BEGUN, Lock()
        listed = map(_name, self._list.read_bytes().splitlines()) if self._list.exists() else ()
        self._ours = {name for name in (*self._in_rows(), *listed) if name}
        self._write(self._ours)
        self._file = self._list.open("ab", buffering=0)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, name: str) -> bool:
        return name in self._ours

    def take(self, name: str) -> bool:
        """Note, before it is written to, that a folder is lungscope's. False where it is another's: it holds something,
        and no run made it. Raises OSError where it can not be looked into, or the list not be written."""
        with self._lock:
            if name in self._ours:
                return True
            folder = self.out / name
            if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
                return False
            self._ours.add(name)
            with named(self._list):
                self._file.write(_line(name))
            return True

    def settle(self) -> None:
        """The run is closed: of the list keep what no row names, which are folders of earlier runs."""
        self._file.close()  # Windows neither removes nor replaces what is open
        left = [name for name in self._ours - self._in_rows() if (self.out / name).is_dir()]
        if left:
            self._write(left)
        else:
            self._list.unlink(missing_ok=True)

    def _in_rows(self) -> set[str]:
        return {str(entry["folder"]) for entry in whole_rows(self.out / RESULTS) if entry.get("folder")}

    def _write(self, names: Iterable[str]) -> None:
        with whole_file(self._list) as file:
            file.write(b"".join(map(_line, sorted(names))))


def _line(name: str) -> bytes:
    return json.dumps(name).encode() + b"\n"


def _name(line: bytes) -> str:
    """The name in a line; "" for one that was cut off."""
    with suppress(ValueError):
        return str(json.loads(line))
    return ""


def _refused(out: Path, error: OSError) -> UsageError:
    return UsageError(
        f"--out {out} can not be a folder: results can not be written to it ({error.strerror}). Name one that can be "
        "written."
    )


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Let no other run write to `out` meanwhile. Raises UsageError where one does. Where a system or a file system
    knows no such locks, nothing is kept out."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"--out {out}: another run is writing to it. Wait until that has ended, or name another folder."
            ) from error
        except OSError:
            pass
        yield
    finally:
        os.close(handle)
