"""results.csv and results.parquet: a run's rows with flat, typed columns."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from lungscope.errors import MissingExtraError
from lungscope.report import DISCLAIMER
from lungscope.writers.atomic import whole_file
from lungscope.writers.json import RESULTS, read_rows

#: Rows that are held at a time, and a row group of Parquet.
ROW_GROUP = 8192
#: Between the parts of one cell: the classes of a conformal set, the codes of warnings.
SEPARATOR = "; "


def columns(labels: Sequence[str]) -> dict[str, type]:
    """Name and type of each column, in order, for a bundle with these class labels. docs/reports.md explains them."""
    return {
        "path": str,
        "status": str,
        "error_code": str,
        "error_message": str,
        "sha256": str,
        "folder": str,
        "label": str,
        "probability": float,
        **dict.fromkeys(probability_columns(labels), float),
        "abstained": bool,
        "conformal_set": str,
        "conformal_set_size": int,
        "severity_global": int,
        **{f"zone_{letter}": int for letter in "abcdef"},
        **{f"grade_{letter}": float for letter in "abcdef"},
        "extent_right_percent": float,
        "extent_left_percent": float,
        "lung_right_area_px": int,
        "lung_left_area_px": int,
        "warnings": str,
        "time_ms": float,
    }


def probability_columns(labels: Sequence[str]) -> list[str]:
    """A column name for each label: probability_ and its letters and digits in lower case, the rest as "_"; no two
    alike."""
    names: list[str] = []
    for label in labels:
        slug = re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_") or "class"
        name, number = f"probability_{slug}", 1
        while name in names:
            number += 1
            name = f"probability_{slug}_{number}"
        names.append(name)
    return names


def flat(row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """A row of results.jsonl as the values of `columns`; None where there is none."""
    error, zones, grades = row.get("error") or {}, row.get("zones") or {}, row.get("grades") or {}
    extent = row.get("extent_percent") or {}
    label, probabilities, held = row.get("label"), row.get("probabilities") or {}, row.get("conformal_set")
    areas, warnings = row.get("lungs_area_px") or {}, row.get("warnings")
    return {
        "path": row["path"],
        "status": row["status"],
        "error_code": error.get("code"),
        "error_message": error.get("message"),
        "sha256": row.get("sha256"),
        "folder": row.get("folder"),
        "label": label,
        "probability": probabilities.get(label),
        **dict(zip(probability_columns(labels), map(probabilities.get, labels), strict=True)),
        "abstained": row.get("abstained"),
        "conformal_set": None if held is None else SEPARATOR.join(held),
        "conformal_set_size": None if held is None else len(held),
        "severity_global": row.get("severity"),
        **{f"zone_{letter.lower()}": zones.get(letter) for letter in "ABCDEF"},
        **{f"grade_{letter.lower()}": grades.get(letter) for letter in "ABCDEF"},
        "extent_right_percent": extent.get("right"),
        "extent_left_percent": extent.get("left"),
        "lung_right_area_px": areas.get("right"),
        "lung_left_area_px": areas.get("left"),
        "warnings": None if warnings is None else SEPARATOR.join(warnings),
        "time_ms": row.get("ms"),
    }


def write_csv(path: Path, run: Mapping[str, Any]) -> None:
    """Write a run's rows, out of results.jsonl beside `path`, as CSV (RFC 4180, UTF-8): an empty cell for None, true
    and false for a bool. run: the content of run.json."""
    labels = run["bundle"]["labels"]
    with whole_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="")
        writer = csv.DictWriter(text, list(columns(labels)))
        writer.writeheader()
        for row in read_rows(path.with_name(RESULTS)):
            values = flat(row, labels)
            writer.writerow(
                {name: str(value).lower() if isinstance(value, bool) else value for name, value in values.items()}
            )
        text.flush()
        text.detach()


def write_parquet(path: Path, run: Mapping[str, Any]) -> None:
    """Write a run's rows, out of results.jsonl beside `path`, as Parquet, `ROW_GROUP` rows at a time.

    run: the content of run.json. The file's metadata has the disclaimer and the bundle. Raises MissingExtraError
    without pyarrow.
    """
    pyarrow, parquet = require_pyarrow()
    labels, bundle = run["bundle"]["labels"], run["bundle"]
    kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    schema = pyarrow.schema(
        [(name, kinds[kind]) for name, kind in columns(labels).items()],
        metadata={"disclaimer": DISCLAIMER, "bundle": f"{bundle['name']} {bundle['version']}"},
    )
    rows = (flat(row, labels) for row in read_rows(path.with_name(RESULTS)))
    with whole_file(path) as file, parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for group in _groups(rows):
            # Half a surrogate pair, out of a file name that is no text, can not stand in UTF-8.
            for row in group:
                row |= {
                    name: value.encode("utf-8", "replace").decode()
                    for name, value in row.items()
                    if isinstance(value, str)
                }
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


def require_pyarrow() -> tuple[ModuleType, ModuleType]:
    """The modules pyarrow and pyarrow.parquet. Raises MissingExtraError where they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError("`--write parquet`", "table") from error
    return pyarrow, pyarrow.parquet


def _groups(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while group := list(islice(rows, ROW_GROUP)):
        yield group
