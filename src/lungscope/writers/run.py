"""The files of a whole run, made out of results.jsonl when it ends."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lungscope.errors import UsageError
from lungscope.writers.index import write_index
from lungscope.writers.json import RESULTS, RUN, is_results
from lungscope.writers.tables import require_pyarrow, write_csv, write_parquet

#: The file of each format, and what writes it: given its path and the content of run.json.
RUN_FORMATS: dict[str, tuple[str, Callable[[Path, Mapping[str, Any]], None]]] = {
    "html": ("index.html", write_index),
    "csv": ("results.csv", write_csv),
    "parquet": ("results.parquet", write_parquet),
}


def check_run(out: Path, formats: Sequence[str]) -> None:
    """Raise, before anything is changed, MissingExtraError where a format of a run needs a package that is not
    installed, and UsageError where the run would remove or write over a file in `out` that is not lungscope's.

    A page or table is lungscope's where the run.json there tells of it; without one, where rows of a run stand there,
    which was cut off. Raises OSError where a file can not be read.
    """
    if "parquet" in formats:
        require_pyarrow()
    told = _formats_of(out / RUN)
    results = (out / RESULTS).exists() and is_results(out / RESULTS)
    cut_off = results and (out / RESULTS).stat().st_size > 0 and not (out / RUN).exists()
    ours = {RUN: told is not None, RESULTS: results}
    for name in formats:
        if name in RUN_FORMATS:
            ours[RUN_FORMATS[name][0]] = cut_off if told is None else name in told
    for file, is_ours in ours.items():
        if not is_ours and os.path.lexists(out / file):
            raise UsageError(
                f"--out {out} holds a {file} that lungscope did not make, and the run would write over it. Name "
                "another folder."
            )


def begin_run(out: Path, formats: Sequence[str]) -> None:
    """Make `out`, and remove what an earlier run says of itself: it must not stand beside the rows of this one.

    Raises as `check_run` does, and then changes nothing.
    """
    check_run(out, formats)
    out.mkdir(parents=True, exist_ok=True)
    for name in _formats_of(out / RUN) or ():
        if name in RUN_FORMATS:
            (out / RUN_FORMATS[name][0]).unlink(missing_ok=True)
    (out / RUN).unlink(missing_ok=True)


def end_run(out: Path, run: Mapping[str, Any], formats: Sequence[str]) -> None:
    """Write the files of the run in those of `formats` that have one. run: the content of run.json."""
    for name in dict.fromkeys(formats):
        if name in RUN_FORMATS:
            file, write = RUN_FORMATS[name]
            write(out / file, run)


def _formats_of(path: Path) -> list[str] | None:
    """The formats that a run.json tells of; None where there is none of lungscope's."""
    try:
        run = json.loads(path.read_bytes())
        return [str(name) for name in run["formats"]] if "schema_version" in run else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
