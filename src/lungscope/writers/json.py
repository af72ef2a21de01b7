"""JSON out: report.json, run.json, and the rows of results.jsonl."""

from __future__ import annotations

import errno
import json
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from lungscope.report import Failure, Report, plain
from lungscope.writers.atomic import named, whole_file, write_text

RESULTS = "results.jsonl"
RUN = "run.json"
#: Of each row, as `row` makes it.
BEGINNING = b'{"status": "'


def dumps(document: Any, *, indent: int | None = 2) -> str:
    """`document` as strict JSON, ASCII only, NaN as null."""
    return json.dumps(plain(document), indent=indent, allow_nan=False)


def write_json(path: Path, document: Any) -> None:
    """Write `document` to `path`, whole or not at all."""
    write_text(path, dumps(document) + "\n")


def row(result: Report | Failure, folder: str | None) -> dict[str, Any]:
    """A film's row in results.jsonl. folder: where its files are, relative to results.jsonl; None where it has none."""
    if isinstance(result, Failure):
        return {"status": "failed", **result.to_json()}
    document = result.to_json()
    classification, severity = document["classification"] or {}, document["severity"] or {}
    return {
        "status": "done",
        "path": document["source"]["path"],
        "sha256": document["source"]["sha256"],
        "folder": folder,
        "label": classification.get("label"),
        "probabilities": classification.get("probabilities"),
        "abstained": classification.get("abstained"),
        "conformal_set": classification.get("conformal_set"),
        "severity": severity.get("global"),
        "zones": {name: zone and zone["score"] for name, zone in severity.get("zones", {}).items()},
        "grades": {name: zone and zone["grade"] for name, zone in severity.get("zones", {}).items()},
        "extent_percent": severity.get("extent_percent"),
        "lungs_area_px": {side: document["lungs"][side]["area_px"] for side in ("left", "right")},
        "warnings": [warning["code"] for warning in document["run"]["warnings"]],
        "ms": sum(document["run"]["timings_ms"].values()),
    }


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a results.jsonl, one at a time."""
    with path.open(encoding="ascii") as file:
        yield from map(json.loads, file)


def whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a results.jsonl whose writer may have been killed: what is no whole row is passed over."""
    with path.open("rb") as file:
        yield from filter(None, map(_whole, file))


def is_results(path: Path) -> bool:
    """Whether a file can be a results.jsonl of lungscope's: it is empty, or its first row is one, whole or cut off.

    Raises OSError where it can not be read.
    """
    with path.open("rb") as file:
        line = file.readline()
    entry = _whole(line)
    if entry is not None:
        return entry["status"] in ("done", "failed")
    return not line.endswith(b"\n") and line.startswith(BEGINNING[: len(line)])


def arrange(path: Path, order: Iterable[str], without: Container[str] = ()) -> None:
    """Rewrite a results.jsonl: of each film the last whole row, those in `order` (paths as in its rows) in that order,
    then the others as they stand, but for those in `without`."""
    places: dict[str, int] = {}
    with whole_file(path) as out, path.open("rb") as file:
        place = 0
        for line in file:
            if entry := _whole(line):
                places[entry["path"]] = place
            place += len(line)
        first = [places.pop(name) for name in order if name in places]
        for place in (*first, *(place for name, place in places.items() if name not in without)):
            file.seek(place)
            out.write(file.readline())


def _whole(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError):
        entry = json.loads(line)
        if line.endswith(b"\n") and isinstance(entry, dict) and {"path", "status"} <= entry.keys():
            return entry
    return None


class Results:
    """results.jsonl, written a whole row at a time: after an interruption it is valid as far as it goes.

    append: after the rows that are there; else they are removed.
    """

    def __init__(self, folder: Path, *, append: bool = False) -> None:
        self._file = (folder / RESULTS).open("ab" if append else "wb", buffering=0)

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, entry: dict[str, Any]) -> None:
        """Append a row. Raises OSError where it is not taken whole."""
        data = (dumps(entry, indent=None) + "\n").encode("ascii")
        with named(self._file.name):
            if (written := self._file.write(data)) != len(data):
                raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes of a row were written")
