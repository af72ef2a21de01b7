"""The files of a whole run, made out of results.jsonl when it ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lungscope.writers.index import write_index
from lungscope.writers.json import RUN
from lungscope.writers.tables import require_pyarrow, write_csv, write_parquet

#: The file of each format, and what writes it: given its path and the content of run.json.
RUN_FORMATS: dict[str, tuple[str, Callable[[Path, Mapping[str, Any]], None]]] = {
    "html": ("index.html", write_index),
    "csv": ("results.csv", write_csv),
    "parquet": ("results.parquet", write_parquet),
}


def check_run(formats: Sequence[str]) -> None:
    """Raise MissingExtraError where a format of a run needs a package that is not installed."""
    if "parquet" in formats:
        require_pyarrow()


def begin_run(out: Path, formats: Sequence[str]) -> None:
    """Make `out`, and remove what an earlier run says of itself: it must not stand beside the rows of this one.

    Only files that the run.json there tells of are removed: any other results.csv is not lungscope's. Raises
    MissingExtraError, and changes nothing, where a format needs a package that is not installed.
    """
    check_run(formats)
    out.mkdir(parents=True, exist_ok=True)
    for name in _formats_of(out / RUN):
        if name in RUN_FORMATS:
            (out / RUN_FORMATS[name][0]).unlink(missing_ok=True)
    (out / RUN).unlink(missing_ok=True)


def end_run(out: Path, run: Mapping[str, Any], formats: Sequence[str]) -> None:
    """Write the files of the run in those of `formats` that have one. run: the content of run.json."""
    for name in dict.fromkeys(formats):
        if name in RUN_FORMATS:
            file, write = RUN_FORMATS[name]
            write(out / file, run)


def _formats_of(path: Path) -> list[str]:
    """The formats that a run.json tells of; none where there is no whole one."""
    try:
        return [str(name) for name in json.loads(path.read_bytes())["formats"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []
