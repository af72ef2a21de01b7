"""A process that walks a film, an unreadable one and one whose results are not all taken through the queue, once for
each step on the file system, and is killed before that step; then a second process goes on where the first was.

Run as a program: steps.py FOLDER prints a JSON list with what is there in the end, for each step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from lungscope.pacs.spool import TRIED, Spool

GOOD, BAD, PARTLY = ("1.2.3", b"a film"), ("1.2.4", b"a broken film"), ("1.2.5", b"a film that is taken in part")
OBJECTS = {GOOD[1]: {"lungs": b"SEG", "report": b"SR"}, PARTLY[1]: {"lungs": b"refused", "report": b"another"}}
#: Everything that changes the file system, as `sys.addaudithook` names it.
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def walk(root: Path, outside: Path) -> None:
    """The way of the films, as sender, node and destination go it. outside: what the others know."""
    acknowledged, arrived = outside / "acknowledged", outside / "arrived"
    spool = Spool(root)
    for uid, data in (GOOD, BAD, PARTLY):
        if uid not in lines(acknowledged):
            key, _ = spool.receive(uid, data)
            note(acknowledged, uid)
            spool.release(key)
    while film := spool.take():
        if film.read_bytes() == BAD[1]:
            spool.fail(film, "unreadable", "It is broken.")
        else:
            spool.keep(film, OBJECTS[film.read_bytes()], {"sop_instance_uid": film.name})
    for delivery in spool.deliveries():
        refused = False
        for item in spool.objects(delivery):
            if item.read_text() == "refused":
                refused = True
                continue
            if item.suffix != TRIED or item.read_text() not in lines(arrived):
                item = spool.mark_tried(item)
                note(arrived, item.read_text())
            spool.acknowledge(item)
        if refused:
            spool.refuse(delivery, "refused", "No SEG.")
        else:
            spool.finish(delivery, {"destination": "here"})


def note(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text + "\n")


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def in_a_process(root: Path, outside: Path, last: int | None) -> bool:
    """Walk in a process that is killed before step `last`. True where it came to its end."""
    if (child := os.fork()) == 0:
        steps = count()

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            path = arguments[0] if arguments else None
            here = isinstance(path, str | os.PathLike) and str(path).startswith(str(root.parent))
            if event in CHANGES and here and next(steps) == last:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        walk(root, outside)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0


def runs(folder: Path) -> Iterator[dict[str, object]]:
    for step in count():
        root, outside = folder / str(step) / "spool", folder / str(step) / "outside"
        outside.mkdir(parents=True)
        if in_a_process(root, outside, step):
            return
        assert in_a_process(root, outside, None)
        names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        yield {"files": names, "arrived": lines(outside / "arrived"), "acknowledged": lines(outside / "acknowledged")}


if __name__ == "__main__":
    os.fsync = lambda handle: None  # a killed process loses nothing that it wrote, and hundreds of walks are long
    sys.stdout.write(json.dumps(list(runs(Path(sys.argv[1])))))
