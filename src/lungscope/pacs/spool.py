"""The queue of films and results on disk. Whatever moment a process is killed at, `Spool` finds one of these states:

    incoming/KEY.dcm      received and acknowledged; its study is still arriving
    ready/KEY.dcm         waits for analysis
    analysing/KEY.dcm     in hand (KEY.starts: a byte for each process that ended with it in hand)
    results/KEY/          film.json, and an object a file: *.dcm waits, *.tried may have arrived without having been
                          acknowledged, *.sent was acknowledged by the destination
    sent/KEY.json         the journal: everything of that film was acknowledged
    failed/KEY.json       why there is no result for failed/KEY.dcm, or which results in failed/KEY/ were not taken

KEY is the film's SOP Instance UID and the start of the SHA-256 of its bytes, so that a film which comes again is known
by what it is, and a corrected one is another. A step from one state to the next is one rename, after what it stands
for is on the disk. What is moved by hand from failed/ to ready/ or results/ is taken up again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from lungscope.errors import UsageError
from lungscope.writers.atomic import sync_folder, whole_file

#: In the order in which a film passes through them.
STAGES = ("incoming", "ready", "analysing", "results", "sent", "failed")
#: A film that this many processes ended with is not tried again.
STARTS = 5

WAITING, TRIED, SENT = ".dcm", ".tried", ".sent"
FACTS = "film.json"


class Spool:
    """The queue under `root`, for one process at a time. Safe to use from several threads.

    Raises UsageError where another process uses `root`, or where it can not be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            for stage in STAGES:
                (root / stage).mkdir(exist_ok=True, mode=0o700)
            self._lock_file = (root / "lock").open("a")
        except OSError as error:
            raise UsageError(f"--spool {root} can not be written: {error.strerror}. Name another folder.") from error
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"--spool {root} is in use by another process. Give each node its own folder.") from error
        self._receiving = Lock()
        self._recover()

    def close(self) -> None:
        """Let another process use the folder."""
        self._lock_file.close()

    def depth(self, stage: str) -> int:
        """How many films are in `stage` (one of `STAGES`, but the journal)."""
        suffix = "" if stage == "results" else ".json" if stage == "failed" else ".dcm"
        return sum(path.suffix == suffix or stage == "results" for path in self._listed(stage))

    # Films

    def receive(
        self, sop_instance_uid: str, data: bytes, *, or_as: Callable[[], bytes] | None = None
    ) -> tuple[str, bool]:
        """Put a film, the bytes of a DICOM file, into incoming/; it is on the disk when this returns.

        or_as: gives other bytes by which the film may be known. Returns its key, and whether it is a film that was not
        here before. Raises OSError where the disk does not take it, ValueError for a UID that is none (PS3.5 9.1).
        """
        if not re.fullmatch(r"[0-9][0-9.]{0,63}", sop_instance_uid):
            raise ValueError(f"{sop_instance_uid!r} is no UID")
        key = _key_of(sop_instance_uid, data)
        other = key if or_as is None else _key_of(sop_instance_uid, or_as())
        with self._receiving:
            for known in (key, other):
                if self.knows(known):
                    return known, False
            with whole_file(self._film("incoming", key), durable=True) as file:
                file.write(data)
        return key, True

    def knows(self, key: str) -> bool:
        """Whether the film is in any state. Looked for in the order of states, so that one on its way is found."""
        return any(self._film(stage, key).exists() for stage in STAGES[:3]) or self._past_analysis(key)

    def release(self, key: str) -> None:
        """A film's study has arrived: let the film be analysed. Nothing happens for one that was released before."""
        with suppress(FileNotFoundError):
            _move(self._film("incoming", key), self._film("ready", key))

    def take(self) -> Path | None:
        """The film that has waited longest, moved into analysing/; None where none waits.

        What is in analysing/ without an answer comes first: the disk failed before an earlier one was put back.
        """
        if in_hand := self._in_hand():
            return in_hand[0]
        films = [path for path in self._listed("ready") if path.suffix == ".dcm"]
        if not films:
            return None
        film = min(films, key=lambda path: (path.stat().st_mtime_ns, path.name))
        return _move(film, self._film("analysing", _key(film)))

    def put_back(self, film: Path) -> None:
        """Let `film`, which `take` returned, wait again. Where its answer is there, it is let go of."""
        with self._receiving:  # `knows` could miss a film that goes back
            if film in self._in_hand():
                _move(film, self._film("ready", _key(film)))

    def fail(self, film: Path, code: str, message: str) -> None:
        """Put `film`, which `take` returned, away for good, with the reason beside it."""
        key = _key(film)
        self._note("failed", key, {"error": {"code": code, "message": message}})
        _move(film, self._film("failed", key))
        self._starts(key).unlink(missing_ok=True)

    def keep(self, film: Path, objects: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
        """Put the results of `film`, which `take` returned, in line for delivery, and let go of the film.

        objects: bytes of DICOM files by name, in the order in which they are to be sent. facts: for the journal.
        """
        key = _key(film)
        target, folder = self.root / "results" / key, self.root / "results" / f".{key}"
        if not target.exists():  # else they are the film's own, of an earlier try
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
            for number, (name, data) in enumerate(objects.items(), start=1):
                with whole_file(folder / f"{number}-{name}{WAITING}", durable=True) as file:
                    file.write(data)
            with whole_file(folder / FACTS, durable=True) as file:
                file.write(_json(facts))
            folder.replace(target)
        sync_folder(target.parent)
        self._forget_reason(key)
        self._let_go(film)

    # Results

    def deliveries(self) -> list[Path]:
        """The folders of results that wait to be sent, oldest first."""
        folders = [path for path in self._listed("results") if (path / FACTS).exists()]
        return sorted(folders, key=lambda path: ((path / FACTS).stat().st_mtime_ns, path.name))

    def objects(self, delivery: Path) -> list[Path]:
        """The objects of a delivery that were not acknowledged, in the order in which they are to be sent. Those that
        were tried come last: a destination may break off over one, each time."""
        left = [path for path in delivery.iterdir() if path.suffix in (WAITING, TRIED)]
        return sorted(left, key=lambda path: (path.suffix == TRIED, path.name))

    def mark_tried(self, item: Path) -> Path:
        """Note, before an object is sent, that the destination may have it from now on."""
        return item if item.suffix == TRIED else _move(item, item.with_suffix(TRIED))

    def acknowledge(self, item: Path) -> None:
        """Note that the destination has the object."""
        _move(item, item.with_suffix(SENT))

    def finish(self, delivery: Path, facts: Mapping[str, Any]) -> None:
        """Write a delivery, all of it acknowledged, into the journal, with `facts` about how, and let go of it."""
        about: dict[str, Any] = json.loads((delivery / FACTS).read_bytes())
        self._note("sent", delivery.name, about | dict(facts))
        self._forget_reason(delivery.name)
        shutil.rmtree(delivery)

    def refuse(self, delivery: Path, code: str, message: str) -> list[str]:
        """Put a delivery that the destination does not take, or not all of, away, with the reason beside it: the error,
        and the kinds that were sent and that were not. Returns the latter."""
        sent = sorted(path for path in delivery.iterdir() if path.suffix == SENT)
        left = [kind_of(path) for path in self.objects(delivery)]
        error = {"code": code, "message": message}
        self._note("failed", delivery.name, {"error": error, "sent": [*map(kind_of, sent)], "not_sent": left})
        _move(delivery, self.root / "failed" / delivery.name)
        return left

    def _recover(self) -> None:
        """Bring what an earlier process left in hand back in line."""
        for stage in STAGES:
            for path in (self.root / stage).glob(".*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for film in self._in_hand():
            with self._starts(_key(film)).open("ab") as file:
                file.write(b".")
                starts = file.tell()
            if starts < STARTS:
                self.put_back(film)
            else:
                self.fail(film, "crashed", f"{starts} processes ended while they analysed this film. Look at it apart.")
        for film in self._listed("incoming"):
            self.release(_key(film))
        for delivery in self._listed("results"):
            if (self.root / "sent" / f"{delivery.name}.json").exists():
                shutil.rmtree(delivery)
        for note in (self.root / "failed").glob("*.json"):
            if not note.with_suffix(".dcm").exists() and not note.with_suffix("").exists():
                note.unlink()

    def _in_hand(self) -> list[Path]:
        """The films in analysing/; those whose answer is there are let go of, once it is sure to be on the disk."""
        films = [path for path in self._listed("analysing") if path.suffix == ".dcm"]
        answered = {film for film in films if self._past_analysis(_key(film))}
        for film in answered:
            for stage in ("results", "sent", "failed"):
                sync_folder(self.root / stage)
            self._let_go(film)
        return [film for film in films if film not in answered]

    def _let_go(self, film: Path) -> None:
        film.unlink()
        self._starts(_key(film)).unlink(missing_ok=True)

    def _forget_reason(self, key: str) -> None:
        """Of what was moved by hand from failed/ to where it is taken up again."""
        (self.root / "failed" / f"{key}.json").unlink(missing_ok=True)

    def _past_analysis(self, key: str) -> bool:
        return any(
            path.exists()
            for path in (
                self.root / "results" / key,
                self.root / "sent" / f"{key}.json",
                self._film("failed", key),
                self.root / "failed" / key,
            )
        )

    def _listed(self, stage: str) -> list[Path]:
        return [path for path in (self.root / stage).iterdir() if not path.name.startswith(".")]

    def _film(self, stage: str, key: str) -> Path:
        return self.root / stage / f"{key}.dcm"

    def _starts(self, key: str) -> Path:
        return self.root / "analysing" / f"{key}.starts"

    def _note(self, stage: str, key: str, content: Mapping[str, Any]) -> None:
        with whole_file(self.root / stage / f"{key}.json", durable=True) as file:
            file.write(_json(content))


def kind_of(item: Path) -> str:
    """What an object of a delivery is: the name that `Spool.keep` was given for it."""
    return item.stem.partition("-")[2]


def _key_of(sop_instance_uid: str, data: bytes) -> str:
    return f"{sop_instance_uid}-{hashlib.sha256(data).hexdigest()[:16]}"


def _key(film: Path) -> str:
    return film.name.removesuffix(".dcm")


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"


def _move(path: Path, target: Path) -> Path:
    """Rename, durably; both names lie in this spool."""
    path.replace(target)
    for folder in {target.parent, path.parent}:
        sync_folder(folder)
    return target
