"""What computing in another precision than f32 changes, measured through the path that ships."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lungscope.batch import in_order
from lungscope.bundle import Bundle
from lungscope.data.split import Split
from lungscope.data.store import Store
from lungscope.errors import DataError
from lungscope.evaluation import metrics
from lungscope.evaluation.provenance import facts
from lungscope.evaluation.scoring import Mask, Progress, on_grid, truth_in
from lungscope.hardware import cores
from lungscope.pipeline import Analyzer
from lungscope.precision import LEAST_SAME_CLASS, LEAST_SAME_MASK, Compared, Gate
from lungscope.report import Failure, Report
from lungscope.stages.severity import LIMITS, Zone

Item = TypeVar("Item")

#: The share of films that a precision moves by no more than its margin.
MOVED_LESS = 0.995

#: The stages that the networks are in.
_NETWORKS = ("segmentation", "classification")


@dataclass(frozen=True)
class _Film:
    """A film in f32 and in the other precision. dice: with its drawn lungs. right: its class; None where not known.

    seconds: in the networks. again: computed in f32 by the other, too. severity: absolute differences of the
    zones' scores.
    """

    dice: tuple[float, float] | None
    right: tuple[bool, bool] | None
    same_mask: float
    same_class: bool
    seconds: tuple[float, float] | None
    again: bool
    severity: list[int]


def find_margin(
    bundle: Bundle,
    precision: str,
    data: Sequence[tuple[Store, Split]],
    films: int,
    *,
    device: str = "auto",
    progress: Progress | None = None,
) -> float:
    """By how many logits `precision` moves a film's class ahead of the others at most, but for one film in 200; over
    about `films` films of the training parts, evenly. A film whose class leads by less could have another class in f32,
    one whose class leads by more hardly: it would have to be one of the 200, and closer than it was moved. 0 where none
    moves ahead.

    Raises DataError where no film can be analysed.
    """
    exact, other = (Analyzer(bundle, device=device, precision=p, streams=cores(), margin=0) for p in ("f32", precision))
    paths = [
        store.path_of(store.records[i])
        for store, split in data
        for i in evenly(split.select(store, "train"), max(1, films // len(data)))
    ]

    def one(path: Path) -> float | None:
        first, second = (next(analyzer.analyze_many([path])) for analyzer in (exact, other))
        if not (isinstance(first, Report) and isinstance(second, Report)):
            return None
        if first.classification is None or second.classification is None:
            return None
        return second.classification.lead - _ahead(first.classification.logits, second.classification.index)

    moved = []
    for done, shift in enumerate(in_order(one, paths), 1):
        moved += [] if shift is None else [shift]
        if progress is not None:
            progress(done, len(paths))
    if not moved:
        raise DataError(f"None of {len(paths)} films of the training parts could be analysed and classified.")
    return max(0.0, float(np.quantile(moved, MOVED_LESS, method="higher")))


def measure_gate(
    bundle: Bundle,
    precision: str,
    data: Sequence[tuple[Store, Split]],
    part: str = "val",
    *,
    margin: float = 0.0,
    limit: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> tuple[Gate, dict[str, Any]]:
    """Compare `precision` with f32 on the films of `part` that have drawn lungs or a label; each film in both, one
    after the other. Returns the gate, and on what it was measured.

    margin: see `Analyzer`. limit: at most so many films of each store, evenly. A film that fails counts as an empty
    mask and a wrong class.
    Raises DataError where no film has drawn lungs, or none a label and the bundle has a classifier, or none can be
    analysed.
    """
    exact = Analyzer(bundle, device=device, precision="f32", streams=cores())
    other = Analyzer(bundle, device=device, precision=precision, streams=cores(), margin=margin)
    other.load_all()
    labels = () if bundle.classifier is None else bundle.classifier.labels
    films: list[tuple[Path, Path | None, str]] = []
    for store, split in data:
        chosen = [store.records[i] for i in split.select(store, part)]
        usable = [record for record in chosen if record.mask or record.label in labels]
        films += [
            (store.path_of(record), store.mask_path_of(record), record.label if record.label in labels else "")
            for record in evenly(usable, limit)
        ]

    def one(film: tuple[Path, Path | None, str]) -> _Film:
        path, mask, label = film
        first, second = (next(analyzer.analyze_many([path])) for analyzer in (exact, other))
        return _compare(first, second, mask, label)

    rows = []
    for row in in_order(one, films):
        rows.append(row)
        if progress is not None:
            progress(len(rows), len(films))
    dice, right = [row.dice for row in rows if row.dice], [row.right for row in rows if row.right]
    if not dice or (labels and not right):
        what = "drawn lungs" if not dice else f"one of the labels {', '.join(labels)}"
        raise DataError(f"No film of part {part!r} has {what}, which the gate needs. Name a store that has them.")
    times = np.sum([row.seconds for row in rows if row.seconds], axis=0)
    if not np.all(times):
        raise DataError(f"None of {len(rows)} films of part {part!r} could be analysed in f32 and {precision}.")
    severity = [difference for row in rows for difference in row.severity]
    gate = Gate(
        films=len(rows),
        dice=_mean(dice),
        accuracy=_mean(right) if labels else None,
        same_mask=float(np.nanmean([row.same_mask for row in rows])),
        same_class=float(np.mean([row.same_class for row in rows])) if labels else None,
        speed=float(times[0] / times[1]),
        margin=margin,
        again=float(np.mean([row.again for row in rows])),
        severity_mae=float(np.mean(severity)) if severity else None,
    )
    return gate, {"part": part, "stores": [store.name for store, _ in data], **_facts(other)}


def evenly(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` of `items`, in order, evenly from the first to the last; None for all."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[i] for i in np.linspace(0, len(items) - 1, count).astype(int)]


def parity(
    analyzer: Analyzer, reference: Callable[[Path], tuple[str, Mask]], paths: Sequence[Path], progress: Progress | None
) -> dict[str, Any]:
    """How far `analyzer` and `reference`, which gives a film's class and lungs bool [H, W], agree on films.

    same_class: share with one class. same_mask: mean Dice of both masks, least_mask the least. A film that the analyzer
    can not analyse is listed in "failed" and counts in neither.
    """
    same, dice, different, failed = [], [], [], []
    for n, path in enumerate(paths, 1):
        result = next(analyzer.analyze_many([path]))
        if isinstance(result, Failure) or result.classification is None:
            failed.append(path.name)
        else:
            label, mask = reference(path)
            same.append(result.classification.label == label)
            dice.append(_dice(result.lungs.mask, mask))
            if not same[-1]:
                different.append({"film": path.name, "ours": result.classification.label, "reference": label})
        if progress is not None:
            progress(n, len(paths))
    if not same:
        raise DataError(f"None of {len(paths)} films could be analysed and classified.")
    return {
        "films": len(same),
        "same_class": float(np.mean(same)),
        "same_mask": float(np.nanmean(dice)),
        "least_mask": float(np.nanmin(dice)),
        "different": different,
        "failed": failed,
        "passed": bool(np.mean(same) >= LEAST_SAME_CLASS and np.nanmean(dice) >= LEAST_SAME_MASK),
    }


def _facts(analyzer: Analyzer) -> dict[str, Any]:
    found = facts(analyzer, [])
    if analyzer.precision == "int8":
        used = [weights.int8 for weights in analyzer.bundle.weights if weights.int8 is not None]
        found["weights"] |= {file.path.name: file.sha256 for file in used}
    return {name: found[name] for name in ("created", "weights", "commit", "versions", "hardware")}


def _compare(exact: Report | Failure, other: Report | Failure, drawn: Path | None, label: str) -> _Film:
    reports = [result if isinstance(result, Report) else None for result in (exact, other)]
    classes = [None if r is None or r.classification is None else r.classification.label for r in reports]
    dice, seconds, again, severity = None, None, False, []
    if drawn is not None:
        truth = truth_in(drawn)
        scores = [0.0 if r is None else _dice(on_grid(r.lungs.mask, truth.shape), truth) for r in reports]
        dice = (scores[0], scores[1])
    first, second = reports
    if first is not None and second is not None:
        same_mask = _dice(second.lungs.mask, first.lungs.mask)
        times = [sum(r.run.timings_ms.get(stage, 0.0) for stage in _NETWORKS) for r in (first, second)]
        seconds, again = (times[0] / 1000, times[1] / 1000), second.run.precision == "f32"
        if first.severity is not None and second.severity is not None:
            zones = ((first.severity.zones[name], second.severity.zones[name]) for name in first.severity.zones)
            severity = [_apart(a, b) for a, b in zones]
    else:
        same_mask = float("nan") if first is second else 0.0
    right = (classes[0] == label, classes[1] == label) if label else None
    return _Film(dice, right, same_mask, classes[0] == classes[1], seconds, again, severity)


def _apart(a: Zone | None, b: Zone | None) -> int:
    if a is None or b is None:
        return 0 if a is b else len(LIMITS)
    return abs(a.score - b.score)


def _ahead(logits: NDArray[np.float32], label: int) -> float:
    """How far the logit of `label` is above the largest other one."""
    return float(logits[label] - np.delete(logits, label).max())


def _dice(predicted: Mask, truth: Mask) -> float:
    return float(metrics.dice(predicted, truth)[0])


def _mean(pairs: Sequence[tuple[float, float]]) -> Compared:
    f32, value = np.mean(pairs, axis=0)
    return Compared(len(pairs), float(f32), float(value))
