"""What a data set holds that a result could come from without any disease.

Counts, duplicates, unreadable files, masks that do not match, and intensities and sizes by class.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lungscope.data.duplicates import near_duplicates
from lungscope.data.importing import read_rejected
from lungscope.data.layouts import Rejected, called_as_published
from lungscope.data.store import Record, Store
from lungscope.errors import DataError
from lungscope.radiograph import Geometry
from lungscope.statistics import Floats, Summary, auc, or_null, summarise

#: Films of each class in the public release of the COVID-19 Radiography Database (version 5 on Kaggle).
PUBLISHED = {"COVID-19": 3616, "Normal": 10192, "Viral Pneumonia": 1345, "Lung Opacity": 6012}

#: Share of the film that both lungs cover. Beyond this it is hardly a pair of lungs on a frontal film.
LUNG_SHARE = (0.05, 0.70)
#: A lung area is odd this many robust standard deviations (1.4826 x median absolute deviation) from the store's median.
LUNG_SHARE_DEVIATIONS = 4.0
#: A deviation is taken to be at least this share of the film, so that a store of near-equal masks has no odd ones.
LEAST_DEVIATION = 0.01
#: Width of the frame whose brightness is measured, as a share of the film's shorter side.
BORDER = 0.05
#: Area under the ROC curve from which one number is said to give a class away.
TELLING = 0.75
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)

#: What is measured of each film. Intensities are 0..1 of the cached film without its padding.
FEATURES = (
    "height", "width", "aspect", "mean", "std", *(f"p{q}" for q in PERCENTILES),
    "border", "black_share", "white_share", "lung_share",
)  # fmt: skip


@dataclass(frozen=True)
class FilmRef:
    """One film of one store; `index` is its place in the store's arrays."""

    store: str
    id: str
    label: str
    index: int


@dataclass(frozen=True)
class Pair:
    """Two films that are the same picture. exact: the same file content. correlation: see `near_duplicates`."""

    first: FilmRef
    second: FilmRef
    correlation: float
    exact: bool

    @property
    def across_classes(self) -> bool:
        return self.first.label != self.second.label

    @property
    def across_stores(self) -> bool:
        return self.first.store != self.second.store


@dataclass(frozen=True)
class MaskFinding:
    """A lung mask that is missing where its class has masks, or covers an odd share of its film."""

    film: FilmRef
    code: str
    lung_share: float
    reason: str


@dataclass(frozen=True)
class ClassFacts:
    """One class of a store. `statistics` and `separation` go by `FEATURES`. sources: films of each, "" where it is not
    known.

    separation: how well the feature alone tells this class from the others, as the area under the ROC curve (0.5: not
    at all; 0 or 1: perfectly). A class that its frame or its size gives away can be "recognised" without any lung.
    histogram: f64 [256], the mean share of a film's pixels at each grey level.
    """

    label: str
    films: int
    published: int | None
    sources: dict[str, int]
    with_mask: int
    statistics: dict[str, Summary]
    separation: dict[str, float]
    histogram: Floats


@dataclass(frozen=True)
class StoreFacts:
    """One store. `changed`: source files that are gone or have other content than at the import."""

    name: str
    root: Path
    films: int
    classes: tuple[ClassFacts, ...]
    rejected: tuple[Rejected, ...]
    changed: tuple[Rejected, ...]
    masks: tuple[MaskFinding, ...]


@dataclass(frozen=True)
class Audit:
    """All that was found, over one or more stores. `findings` says in sentences what a reader must know first."""

    stores: tuple[StoreFacts, ...]
    pairs: tuple[Pair, ...]
    findings: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """The same facts for JSON; undefined numbers become null."""
        return {
            "schema_version": "1",
            "findings": list(self.findings),
            "stores": [_store_json(store) for store in self.stores],
            "duplicates": [
                {**asdict(pair), "across_classes": pair.across_classes, "across_stores": pair.across_stores}
                for pair in self.pairs
            ],
        }


def audit(stores: Sequence[Store], *, progress: Callable[[str, int, int], None] = lambda phase, done, n: None) -> Audit:
    """Look through `stores`. Source films are read once, to compare their content with what was imported.

    Raises DataError without stores or where two of them have one name.
    """
    names = Counter(store.name for store in stores)
    if not stores or max(names.values()) > 1:
        twice = ", ".join(name for name, n in names.items() if n > 1) or "none given"
        raise DataError(f"an audit needs one or more stores of different names: {twice}. Import with --name")
    facts = tuple(_audit_store(store, progress) for store in stores)
    pairs = _pairs(stores)
    return Audit(facts, pairs, tuple(_findings(facts, pairs)))


# One store ------------------------------------------------------------------------------------------------------------


def _audit_store(store: Store, progress: Callable[[str, int, int], None]) -> StoreFacts:
    table, histograms = _measure(store, progress)
    labels = np.array([record.label for record in store.records])
    masked = np.array([bool(record.mask) for record in store.records])
    classes = []
    for label in dict.fromkeys(record.label for record in store.records):
        mine = labels == label
        classes.append(
            ClassFacts(
                label=label,
                films=int(mine.sum()),
                published=PUBLISHED.get(label) if _as_published(store, label) else None,
                sources=dict(Counter(record.source for record in store.records if record.label == label)),
                with_mask=int(masked[mine].sum()),
                statistics={name: summarise(column[mine]) for name, column in table.items()},
                separation={name: _separation(column, mine) for name, column in table.items()},
                histogram=histograms[mine].mean(axis=0),
            )
        )
    return StoreFacts(
        name=store.name,
        root=store.root,
        films=len(store.records),
        classes=tuple(classes),
        rejected=read_rejected(store.root),
        changed=_changed(store, progress),
        masks=tuple(_odd_masks(store, table["lung_share"])),
    )


def _measure(store: Store, progress: Callable[[str, int, int], None]) -> tuple[dict[str, Floats], NDArray[np.float32]]:
    """Each of `FEATURES` as f64 [N] (NaN where undefined), and the grey-level shares f32 [N, 256] of every film."""
    n = len(store.records)
    rows = np.full((n, len(FEATURES)), np.nan)
    histograms = np.zeros((n, 256), np.float32)
    for i, record in enumerate(store.records):
        window = _content(record, store.size)
        film = store.images[i][window]
        counts = np.bincount(film.ravel(), minlength=256)
        share = counts / film.size
        levels = np.arange(256) / 255
        mean = float(share @ levels)
        cumulative = np.cumsum(share)
        rows[i] = (
            record.height,
            record.width,
            record.height / record.width,
            mean,
            np.sqrt(max(float(share @ levels**2) - mean**2, 0.0)),
            *(np.searchsorted(cumulative, q / 100 - 1e-9) / 255 for q in PERCENTILES),
            _border_brightness(film),
            share[:3].sum(),
            share[253:].sum(),
            (store.masks[i][window] >= 128).mean() if record.mask else np.nan,
        )
        histograms[i] = share
        if i % 256 == 0 or i == n - 1:
            progress("measure", i + 1, n)
    return dict(zip(FEATURES, rows.T, strict=True)), histograms


def _content(record: Record, size: int) -> tuple[slice, slice]:
    """The part of the cached grid that holds film and no padding."""
    box = Geometry.letterbox((record.height, record.width), size)

    def span(start: int, length: int) -> slice:
        first = int(np.ceil(-start * size / box.side))
        return slice(first, max(first + 1, int(np.floor((length - start) * size / box.side))))

    return span(box.top, record.height), span(box.left, record.width)


def _border_brightness(film: NDArray[np.uint8]) -> float:
    """Mean of the film's outermost frame, 0..1."""
    width = max(1, round(min(film.shape) * BORDER))
    inside = film[width:-width, width:-width]
    total = int(film.sum(dtype=np.int64)) - int(inside.sum(dtype=np.int64))
    return total / max(film.size - inside.size, 1) / 255


def _separation(column: Floats, mine: NDArray[np.bool_]) -> float:
    known = ~np.isnan(column)
    return auc(column[known], mine[known])


def _changed(store: Store, progress: Callable[[str, int, int], None]) -> tuple[Rejected, ...]:
    def check(record: Record) -> Rejected | None:
        try:
            with store.path_of(record).open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            return Rejected(record.image, "film", "missing", error.strerror or str(error))
        if digest != record.sha256:
            return Rejected(record.image, "film", "changed", "other content than at the import; import the store again")
        return None

    found = []
    with ThreadPoolExecutor() as pool:
        for done, item in enumerate(pool.map(check, store.records), 1):
            found += [item] if item else []
            if done % 256 == 0 or done == len(store.records):
                progress("verify", done, len(store.records))
    return tuple(found)


def _as_published(store: Store, label: str) -> bool:
    return all(called_as_published(label, record.id) for record in store.records if record.label == label)


def _odd_masks(store: Store, shares: Floats) -> list[MaskFinding]:
    known = shares[~np.isnan(shares)]
    median = float(np.median(known)) if known.size else 0.0
    spread = max(1.4826 * float(np.median(np.abs(known - median))), LEAST_DEVIATION) if known.size else 0.0
    with_masks = {record.label for record in store.records if record.mask}
    findings = []
    for i, (record, share) in enumerate(zip(store.records, shares.tolist(), strict=True)):
        film = FilmRef(store.name, record.id, record.label, i)
        if not record.mask:
            if record.label in with_masks:
                reason = "no usable mask, though others of its class have one"
                findings.append(MaskFinding(film, "missing", share, reason))
        elif not LUNG_SHARE[0] <= share <= LUNG_SHARE[1]:
            low, high = LUNG_SHARE
            reason = f"lungs cover {share:.1%}; expected {low:.0%} to {high:.0%}"
            findings.append(MaskFinding(film, "odd-area", share, reason))
        elif abs(share - median) > LUNG_SHARE_DEVIATIONS * spread:
            reason = f"lungs cover {share:.1%}; the store's median is {median:.1%}, robust deviation {spread:.1%}"
            findings.append(MaskFinding(film, "odd-area", share, reason))
    return findings


# Over all stores ------------------------------------------------------------------------------------------------------


def _pairs(stores: Sequence[Store]) -> tuple[Pair, ...]:
    """Exact and near-duplicates: across classes first, then by correlation. Of k films of one content, k - 1 pairs."""
    films = [
        FilmRef(store.name, record.id, record.label, i) for store in stores for i, record in enumerate(store.records)
    ]
    hashes = [record.sha256 for store in stores for record in store.records]
    same: dict[str, list[int]] = defaultdict(list)
    for n, digest in enumerate(hashes):
        same[digest].append(n)
    exact = [(members[0], other) for members in same.values() for other in members[1:]]
    near = near_duplicates([store.images for store in stores])
    pairs = [Pair(films[i], films[j], 1.0, True) for i, j in exact]
    pairs += [Pair(films[i], films[j], min(r, 1.0), False) for i, j, r in near if hashes[i] != hashes[j]]
    return tuple(sorted(pairs, key=lambda pair: (not pair.across_classes, not pair.exact, -pair.correlation)))


def _findings(stores: Sequence[StoreFacts], pairs: Sequence[Pair]) -> list[str]:
    out = []
    for store in stores:
        for item in store.classes:
            if item.published is not None and item.films != item.published:
                out.append(
                    f"{store.name}: {item.films:,} films of {item.label}; the public release has {item.published:,} "
                    f"({item.films - item.published:+,})."
                )
        lost = sum(item.kind != "mask" for item in store.rejected)
        if lost:
            out.append(f"{store.name}: {lost:,} files could not be read.")
        if store.changed:
            out.append(f"{store.name}: {len(store.changed):,} films are gone or have changed since the import.")
        bad = len(store.masks) + sum(item.kind == "mask" for item in store.rejected)
        if bad:
            out.append(f"{store.name}: {bad:,} remarks on lung masks.")
        for item in store.classes if len(store.classes) > 1 else ():
            alone = [
                name for name in item.sources if name and sum(name in other.sources for other in store.classes) == 1
            ]
            if alone:
                out.append(
                    f"{store.name}: {', '.join(alone)} has films of {item.label or 'no class'} alone: what marks the "
                    "source tells the class."
                )
            strength = {name: max(v, 1 - v) for name, v in item.separation.items() if name != "lung_share"}
            told = ", ".join(f"{name} (AUC {v:.2f})" for name, v in strength.items() if v >= TELLING)
            if told:
                label = item.label or "unlabelled"
                out.append(f"{store.name}: {label} is told from the rest without any lung by {told}.")
    exact, across = sum(pair.exact for pair in pairs), sum(pair.across_classes for pair in pairs)
    if pairs:
        out.append(
            f"{exact:,} exact and {len(pairs) - exact:,} near-duplicate pairs, {across:,} of them across classes. "
            "Split by group: lungscope data split."
        )
    return out


def _store_json(store: StoreFacts) -> dict[str, object]:
    return {
        "name": store.name,
        "root": str(store.root),
        "films": store.films,
        "classes": [
            {
                "label": item.label,
                "films": item.films,
                "published": item.published,
                "sources": item.sources,
                "with_mask": item.with_mask,
                "statistics": {name: summary.to_json() for name, summary in item.statistics.items()},
                "separation": {name: or_null(value) for name, value in item.separation.items()},
                "histogram": [round(float(value), 6) for value in item.histogram],
            }
            for item in store.classes
        ],
        "rejected": [asdict(item) for item in store.rejected],
        "changed": [asdict(item) for item in store.changed],
        "masks": [{**asdict(item), "lung_share": or_null(item.lung_share)} for item in store.masks],
    }
