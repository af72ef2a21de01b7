"""Train, validation and test parts of one or more stores, as a file that is committed and checked."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np

from lungscope.data.duplicates import CROPS, NEAR_DUPLICATE, groups, near_duplicates
from lungscope.data.store import Store
from lungscope.errors import DataError, look_up
from lungscope.writers.atomic import write_text

PARTS = ("train", "val", "test")
FRACTIONS = (0.7, 0.1, 0.2)
COLUMNS = ("store", "id", "sha256", "label", "group", "part")


@dataclass(frozen=True)
class Row:
    """One film's place in a split. `group` names the duplicate group or patient that it belongs to."""

    store: str
    id: str
    sha256: str
    label: str
    group: str
    part: str


@dataclass(frozen=True)
class Split:
    """A split file, checked: no group and no file content on two sides."""

    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        for key in ("group", "sha256"):
            sides: dict[str, str] = {}
            for row in self.rows:
                value = getattr(row, key)
                if sides.setdefault(value, row.part) != row.part:
                    raise DataError(
                        f"split: {key} {value!r} is on two sides ({sides[value]} and {row.part}, film {row.id!r}). "
                        "All films of a group belong to one part. Make the split again: lungscope data split"
                    )

    @classmethod
    def read(cls, path: Path) -> Split:
        """Read and check a split file. Raises DataError where it is not one or breaks the rule of groups."""
        try:
            with path.open(newline="", encoding="utf-8") as stream:
                reader = csv.DictReader(stream)
                if tuple(reader.fieldnames or ()) != COLUMNS:
                    raise DataError(f"{path}: columns {reader.fieldnames}, a split has {list(COLUMNS)}")
                rows = tuple(Row(**{name: row[name] for name in COLUMNS}) for row in reader)
            beside = path.with_suffix(".json")
            if beside.is_file():
                known = json.loads(beside.read_text()).get("sha256")
                if known != hashlib.sha256(path.read_bytes()).hexdigest():
                    raise DataError(
                        f"{path} is not the split that {beside.name} describes: it was altered. Make it again"
                    )
        except OSError as error:
            how = f"Make a split: lungscope data split STORE... --out {path}"
            raise DataError(f"{path}: {error.strerror}. {how}") from error
        for row in rows:
            look_up(row.part, PARTS, what=f"{path}: part", error=DataError)
        return cls(rows)

    @classmethod
    def read_all(cls, paths: Iterable[Path]) -> Split:
        """Several split files as one, checked across them."""
        return cls(tuple(row for path in paths for row in cls.read(path).rows))

    def write(self, path: Path, facts: dict[str, object]) -> None:
        """Write `path` (CSV) and beside it a JSON with `facts`, the counts and the CSV's SHA-256."""
        path.parent.mkdir(parents=True, exist_ok=True)
        table = StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([getattr(row, name) for name in COLUMNS] for row in self.rows)
        digest = hashlib.sha256(table.getvalue().encode()).hexdigest()
        counts = Counter((row.store, row.label or "-", row.part) for row in self.rows)
        facts = {**facts, "sha256": digest, "counts": {" / ".join(key): n for key, n in sorted(counts.items())}}
        write_text(path, table.getvalue())
        write_text(path.with_suffix(".json"), json.dumps(facts, indent=2) + "\n")

    def select(self, store: Store, part: str) -> list[int]:
        """Indices into `store` of the films of one part, in the store's order.

        Raises DataError where a film of the store is not in the split or its content has changed.
        """
        look_up(part, PARTS, what="part", error=DataError)
        known = {(row.store, row.id): row for row in self.rows}
        chosen = []
        for i, record in enumerate(store.records):
            row = known.get((store.name, record.id))
            if row is None or row.sha256 != record.sha256:
                why = "is not in the split" if row is None else "has other content than when the split was made"
                raise DataError(f"{store.name}: {record.id!r} {why}. Make the split again, or import the store again")
            if row.part == part:
                chosen.append(i)
        return chosen

    def groups_of(self, store: Store, indices: Iterable[int]) -> list[str]:
        """The group of each film, for bootstrap intervals over groups."""
        known = {(row.store, row.id): row.group for row in self.rows}
        return [known[store.name, store.records[i].id] for i in indices]


def make_split(
    stores: Sequence[Store],
    *,
    seed: int,
    fractions: tuple[float, float, float] = FRACTIONS,
    same_patients: bool = False,
) -> tuple[Split, dict[str, object]]:
    """Split `stores` by duplicate group and, where known, patient; stratified by store and label.

    same_patients: whether one patient identifier in two stores is one patient; else each store counts its own.
    Returns the split and the facts that belong beside it (seed, fractions, threshold and crops, number of groups, and
    of patient identifiers that several stores have).
    """
    if abs(sum(fractions) - 1) > 1e-9 or min(fractions) < 0:
        raise DataError(f"fractions must be three numbers >= 0 that add up to 1; got {fractions}")
    names = [store.name for store in stores]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"two stores are called {', '.join(twice)}. Import one of them with --name")
    films = [(store, i) for store in stores for i in range(len(store.records))]
    if not films:
        raise DataError("nothing to split: the stores hold no films")
    pairs = [(i, j) for i, j, _ in near_duplicates([store.images for store in stores])]
    near = len(pairs)
    first: dict[tuple[str, str], int] = {}
    for n, (store, i) in enumerate(films):
        record = store.records[i]
        pairs.append((first.setdefault(("sha256", record.sha256), n), n))
        if record.patient:
            patient = record.patient if same_patients else f"{store.name}/{record.patient}"
            pairs.append((first.setdefault(("patient", patient), n), n))
    group = groups(len(films), pairs)

    members: dict[int, list[int]] = defaultdict(list)
    for n, g in enumerate(group):
        members[int(g)].append(n)
    strata: dict[tuple[str, str], list[int]] = defaultdict(list)
    for g in sorted(members):
        store, i = films[g]
        strata[store.name, store.records[i].label].append(g)
    part: dict[int, str] = {}
    rng = np.random.default_rng(seed)
    for key in sorted(strata):
        order = rng.permutation(np.array(strata[key]))
        total = sum(len(members[int(g)]) for g in order)
        bounds = np.cumsum(fractions) * total
        done = 0
        for g in order:
            size = len(members[int(g)])
            part[int(g)] = PARTS[int(np.searchsorted(bounds[:2], done + size / 2, side="right"))]
            done += size
    rows = []
    for n, (store, i) in enumerate(films):
        g = int(group[n])
        owner, first_film = films[g]
        record = store.records[i]
        rows.append(
            Row(
                store.name,
                record.id,
                record.sha256,
                record.label,
                f"{owner.name}/{owner.records[first_film].id}",
                part[g],
            )
        )
    facts: dict[str, object] = {
        "seed": seed,
        "fractions": list(fractions),
        "near_duplicate_above": NEAR_DUPLICATE,
        "near_duplicate_crops": list(CROPS),
        "films": len(films),
        "groups": len(members),
        "near_duplicate_pairs": near,
        "same_patients": same_patients,
        "patients_in_several_stores": _in_several(stores),
    }
    return Split(tuple(rows)), facts


def _in_several(stores: Sequence[Store]) -> int:
    """How many patient identifiers stand in more than one store."""
    patients = [{record.patient for record in store.records if record.patient} for store in stores]
    return sum(n > 1 for n in Counter(patient for found in patients for patient in found).values())


def parts_digest(data: Iterable[tuple[Store, Split]]) -> dict[str, str]:
    """SHA-256 of each part's films, by store, name and content: runs of the same digests saw the same films."""
    data = list(data)
    films = {
        part: sorted(f"{store.name}/{store.records[i].id}/{store.records[i].sha256}" for store, split in data
                     for i in split.select(store, part))
        for part in PARTS
    }  # fmt: skip
    return {part: hashlib.sha256("\n".join(lines).encode()).hexdigest() for part, lines in films.items()}


def parts_by_store(data: Iterable[tuple[Store, Split]]) -> dict[str, dict[str, str]]:
    """`parts_digest` of each store by its name, to be compared where only some of the stores are at hand."""
    data = list(data)
    names = dict.fromkeys(store.name for store, _ in data)
    return {name: parts_digest(pair for pair in data if pair[0].name == name) for name in names}


def truth_digest(data: Iterable[tuple[Store, Split]]) -> str:
    """SHA-256 of what is known of the films of all parts: each one's label and, on the store's grid, lung mask."""
    lines = []
    for store, split in data:
        for i in (i for part in PARTS for i in split.select(store, part)):
            record = store.records[i]
            mask = hashlib.sha256(store.masks[i]).hexdigest() if record.mask else ""
            lines.append(f"{store.name}/{record.id}/{record.label}/{store.size}/{mask}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
