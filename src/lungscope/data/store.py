"""A store: a data set after import, verified and cached for fast epochs.

A store is a folder with
    store.json     schema_version, name, side of the cached grid, origin (the folder the films lie in)
    records.csv    one row a film, in the order of the arrays
    images.npy     u8 [N, S, S], films letterboxed to S x S, 0..255, bright = dense
    masks.npy      u8 [N, S, S], lung masks on the same grid, 0 or 255; all 0 where `Record.mask` is empty.
                   Soft pseudo-labels: 0..255, how sure the segmenters were
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lungscope.errors import DataError

SCHEMA_VERSION = "1"


@dataclass(frozen=True)
class Record:
    """One film. Paths are relative to the store's origin, or absolute, as those of pseudo-labels are; an empty string
    means "none" or "not known". source: the hospital or collection that it came from; stores of before have none."""

    id: str
    image: str
    label: str
    mask: str
    patient: str
    sha256: str
    height: int
    width: int
    source: str = ""


@dataclass(frozen=True)
class Store:
    """An imported data set. `images` and `masks` are memory-mapped."""

    root: Path
    name: str
    origin: Path
    size: int
    records: tuple[Record, ...]
    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]

    @classmethod
    def open(cls, root: Path) -> Store:
        """Open a finished store. Raises DataError where it is missing, unfinished or of another schema."""
        facts_file = root / "store.json"
        if not facts_file.is_file():
            how = f"Make it: lungscope data import SRC {root}"
            raise DataError(f"{root} is not a finished store (no store.json). {how}")
        facts = json.loads(facts_file.read_text())
        if facts.get("schema_version") != SCHEMA_VERSION:
            raise DataError(f"{root}: schema {facts.get('schema_version')!r}, this version reads {SCHEMA_VERSION!r}")
        with (root / "records.csv").open(newline="") as stream:
            rows = [
                Record(**row, height=int(height), width=int(width))
                for row in csv.DictReader(stream)
                for height, width in [(row.pop("height"), row.pop("width"))]
            ]
        images = np.load(root / "images.npy", mmap_mode="r", allow_pickle=False)
        masks = np.load(root / "masks.npy", mmap_mode="r", allow_pickle=False)
        if not len(rows) == len(images) == len(masks):
            raise DataError(f"{root}: {len(rows)} records, {len(images)} images, {len(masks)} masks. Import it again")
        return cls(root, facts["name"], Path(facts["origin"]), int(facts["size"]), tuple(rows), images, masks)

    def path_of(self, record: Record) -> Path:
        return self.origin / record.image

    def mask_path_of(self, record: Record) -> Path | None:
        return self.origin / record.mask if record.mask else None


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write `records.csv`."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([field.name for field in fields(Record)])
        writer.writerows(astuple(record) for record in records)
