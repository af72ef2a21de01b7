"""What a segmentation or a classification is worth. NumPy and OpenCV only.

An undefined value is NaN, never 0 or 1, and `summarise` says how many were defined (MONAI's `get_not_nans`).

Shapes: N films, K classes, H x W pixels. Masks are bool [H, W] or [N, H, W]; a single mask counts as N = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lungscope.statistics import Floats as Floats
from lungscope.statistics import Integers as Integers
from lungscope.statistics import Summary as Summary
from lungscope.statistics import auc as auc
from lungscope.statistics import mean_defined as mean_defined
from lungscope.statistics import or_null as or_null
from lungscope.statistics import ranks as ranks
from lungscope.statistics import ratio
from lungscope.statistics import spearman as spearman
from lungscope.statistics import summarise as summarise

Mask = NDArray[np.bool_]

#: Number of equal-width confidence bins of `ece` and `reliability` (Guo et al. 2017, section 4).
ECE_BINS = 15

#: A pixel and its four neighbours.
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


# Segmentation ---------------------------------------------------------------------------------------------------------


def dice(predicted: Mask, truth: Mask, *, ignore_empty: bool = True) -> Floats:
    """Strict per-image Dice, 2|P∩T| / (|P|+|T|), f64 [N] in 0..1.

    As MONAI's `DiceMetric`: where the truth is empty the value is NaN (`ignore_empty=True`), or else 1 if the
    prediction is empty too and 0 if it is not. Nothing is smoothed, and nothing is pooled over images.
    """
    p, t = _pair(predicted, truth)
    sizes = p.sum(axis=1) + t.sum(axis=1)
    return _overlap(2 * (p & t).sum(axis=1), sizes, t, ignore_empty)


def iou(predicted: Mask, truth: Mask, *, ignore_empty: bool = True) -> Floats:
    """Strict per-image intersection over union, Dice / (2 - Dice), f64 [N] in 0..1. An empty truth is as in `dice`."""
    p, t = _pair(predicted, truth)
    return _overlap((p & t).sum(axis=1), (p | t).sum(axis=1), t, ignore_empty)


def binary_accuracy(predicted: Mask, truth: Mask) -> Floats:
    """Share of pixels on which both masks agree, f64 [N] in 0..1. Always defined."""
    p, t = _pair(predicted, truth)
    return np.asarray((p == t).mean(axis=1), np.float64)


def coverage(predicted: Mask, target: Mask) -> Floats:
    """Share of `target` (lung, or drawn disease) that lies inside `predicted`, f64 [N]; NaN where `target` is empty."""
    p, t = _pair(predicted, target)
    return ratio((p & t).sum(axis=1), t.sum(axis=1))


def precision(predicted: Mask, truth: Mask) -> Floats:
    """Share of `predicted` that lies inside `truth`, f64 [N]; NaN where nothing was predicted."""
    return coverage(truth, predicted)


def hd95(predicted: Mask, truth: Mask, *, spacing: float = 1.0) -> Floats:
    """Symmetric 95 % Hausdorff distance of the masks' surfaces, f64 [N], in pixels or the unit of `spacing`.

    spacing: distance of pixel centres, the same in both directions. The surface of a mask is its pixels that have a
    4-neighbour outside it; beyond the image counts as outside. The value is the larger of the two directed 95th
    percentiles (linear interpolation), as in MONAI's `compute_hausdorff_distance`; it is not the percentile of both
    directions pooled. NaN where either mask is empty.
    """
    pairs = zip(_stack(predicted), _stack(truth), strict=True)
    return np.array([spacing * _hd95(p, t) for p, t in pairs], np.float64)


def score_masks(predicted: Mask, truth: Mask) -> dict[str, Floats]:
    """All mask scores by name, each f64 [N]: `dice`, `iou`, `binary_accuracy`, `hd95`, `coverage`, `precision`."""
    scores = (dice, iou, binary_accuracy, hd95, coverage, precision)
    return {score.__name__: score(predicted, truth) for score in scores}


def _hd95(p: Mask, t: Mask) -> float:
    if not p.any() or not t.any():
        return math.nan
    either = p | t
    rows, columns = np.flatnonzero(either.any(axis=1)), np.flatnonzero(either.any(axis=0))
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    padded = [np.pad(mask[window], 1).astype(np.uint8) for mask in (p, t)]
    surfaces = [cv2.subtract(mask, cv2.erode(mask, _CROSS)) for mask in padded]
    directed = [
        np.percentile(cv2.distanceTransform(1 - there, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[here > 0], 95)
        for here, there in (surfaces, reversed(surfaces))
    ]
    return float(max(directed))


def _overlap(numerator: NDArray[np.int_], denominator: NDArray[np.int_], truth: Mask, ignore_empty: bool) -> Floats:
    if ignore_empty:
        return np.where(truth.any(axis=1), ratio(numerator, denominator), np.nan)
    return np.where(denominator == 0, 1.0, ratio(numerator, denominator))


def _pair(a: Mask, b: Mask) -> tuple[Mask, Mask]:
    """Both masks as bool [N, pixels]. Raises ValueError on another dtype or unequal shapes."""
    x, y = _stack(a), _stack(b)
    if x.shape != y.shape:
        raise ValueError(f"masks of shapes {a.shape} and {b.shape} do not compare; bring them to one grid first")
    return x.reshape(len(x), -1), y.reshape(len(y), -1)


def _stack(mask: Mask) -> Mask:
    if mask.dtype != np.bool_ or mask.ndim not in (2, 3):
        raise ValueError(f"a mask is bool [H, W] or [N, H, W]; got {mask.dtype} {mask.shape}. Threshold it first")
    return mask if mask.ndim == 3 else mask[None]


# Classification, from the confusion matrix ----------------------------------------------------------------------------


def confusion_matrix(truth: ArrayLike, predicted: ArrayLike, classes: int) -> Integers:
    """Counts i64 [K, K]: rows are the true class, columns the predicted one. Both inputs are class indices [N]."""
    t, p = _classes(truth, classes), _classes(predicted, classes)
    if t.shape != p.shape:
        raise ValueError(f"{t.size} true classes but {p.size} predicted ones")
    return np.bincount(t * classes + p, minlength=classes * classes).reshape(classes, classes)


@dataclass(frozen=True)
class PerClass:
    """One-vs-rest rates, each f64 [..., K]; NaN where the denominator is 0."""

    sensitivity: Floats
    specificity: Floats
    precision: Floats
    f1: Floats


def per_class(confusion: NDArray[np.number]) -> PerClass:
    """One-vs-rest rates of confusion matrices [..., K, K].

    sensitivity = TP/(TP+FN), specificity = TN/(TN+FP), precision = TP/(TP+FP), F1 = 2TP/(2TP+FP+FN).
    """
    hit = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    true, called = confusion.sum(axis=-1), confusion.sum(axis=-2)
    total = confusion.sum(axis=(-2, -1))[..., None]
    return PerClass(
        sensitivity=ratio(hit, true),
        specificity=ratio(total - true - called + hit, total - true),
        precision=ratio(hit, called),
        f1=ratio(2 * hit, true + called),
    )


def accuracy(confusion: NDArray[np.number]) -> Floats:
    """Share of films called right, f64 [...] of confusion matrices [..., K, K]; NaN without films."""
    return ratio(np.trace(confusion, axis1=-2, axis2=-1), confusion.sum(axis=(-2, -1)))


def balanced_accuracy(confusion: NDArray[np.number]) -> Floats:
    """Mean sensitivity over the classes that occur, f64 [...] of confusion matrices [..., K, K]."""
    return mean_defined(per_class(confusion).sensitivity)


def macro_f1(confusion: NDArray[np.number]) -> Floats:
    """Mean F1 over the classes that occur or were predicted, f64 [...] of confusion matrices [..., K, K]."""
    return mean_defined(per_class(confusion).f1)


# Classification, from the probabilities -------------------------------------------------------------------------------


def class_auc(truth: ArrayLike, probabilities: ArrayLike) -> Floats:
    """One-vs-rest AUC of each class, f64 [K], from class indices [N] and probabilities [N, K].

    NaN where a class occurs never or always.
    """
    t, p = _scored(truth, probabilities)
    return np.array([auc(p[:, k], t == k) for k in range(p.shape[1])], np.float64)


def macro_auc(truth: ArrayLike, probabilities: ArrayLike) -> float:
    """Unweighted mean of the defined one-vs-rest AUCs."""
    return float(mean_defined(class_auc(truth, probabilities)))


def log_loss(truth: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean of -ln p(true class), in nats, from class indices [N] and probabilities [N, K].

    Probabilities are held at or above the f64 machine epsilon, as in scikit-learn. NaN without films.
    """
    t, p = _scored(truth, probabilities)
    picked = np.clip(p[np.arange(t.size), t], np.finfo(np.float64).eps, 1.0)
    return float(np.mean(-np.log(picked))) if t.size else math.nan


def brier(truth: ArrayLike, probabilities: ArrayLike) -> float:
    """Brier (1950) score: mean over films of the squared error summed over the classes, 0..2. NaN without films."""
    t, p = _scored(truth, probabilities)
    return float(np.mean(((p - np.eye(p.shape[1])[t]) ** 2).sum(axis=1))) if t.size else math.nan


@dataclass(frozen=True)
class ReliabilityBin:
    """Films whose top probability lies in (low, high]; the first bin also holds 0. NaN means where the bin is empty."""

    low: float
    high: float
    films: int
    confidence: float
    accuracy: float


def reliability(truth: ArrayLike, probabilities: ArrayLike, bins: int = ECE_BINS) -> tuple[ReliabilityBin, ...]:
    """Top-label confidence against accuracy in `bins` equal-width bins (Guo et al. 2017, section 2)."""
    t, p = _scored(truth, probabilities)
    top, right = p.max(axis=1), p.argmax(axis=1) == t
    place = _bin_of(top, bins)
    films, confidence, hits = (np.bincount(place, weights, bins) for weights in (None, top, right.astype(np.float64)))
    rows = enumerate(zip(films, ratio(confidence, films), ratio(hits, films), strict=True))
    return tuple(ReliabilityBin(i / bins, (i + 1) / bins, int(n), float(c), float(a)) for i, (n, c, a) in rows)


def _bin_of(top: Floats, bins: int) -> Integers:
    """In which of `bins` equal ones, each without its lower end, top probabilities [N] lie; 0 is in the first."""
    return np.clip(np.ceil(top * bins).astype(np.int64) - 1, 0, bins - 1)


def ece(truth: ArrayLike, probabilities: ArrayLike, bins: int = ECE_BINS) -> float:
    """Expected calibration error: mean over films of |accuracy - confidence| of their bin, 0..1. NaN without films."""
    table = [row for row in reliability(truth, probabilities, bins) if row.films]
    total = sum(row.films for row in table)
    return sum(row.films * abs(row.accuracy - row.confidence) for row in table) / total if total else math.nan


def ece_by_chance(probabilities: ArrayLike, bins: int = ECE_BINS, draws: int = 1000) -> tuple[float, float]:
    """ECE, its median and 95th percentile, that chance alone gives as many films with these probabilities [N, K] where
    each top one is right as often as it says (Bröcker and Smith 2007, "Increasing the reliability of reliability
    diagrams"). NaN without films."""
    top = np.asarray(probabilities, np.float64).max(axis=1)
    if not top.size:
        return math.nan, math.nan
    rng, place = np.random.default_rng(0), _bin_of(top, bins)
    found = [np.abs(np.bincount(place, (rng.random(top.size) < top) - top, bins)).sum() for _ in range(draws)]
    median, high = np.quantile(found, (0.5, 0.95)) / top.size
    return float(median), float(high)


@dataclass(frozen=True)
class ClassificationScores:
    """What a classifier is worth on N films. Rates are 0..1; `confusion` has the true class in its rows."""

    labels: tuple[str, ...]
    films: int
    confusion: Integers
    rates: PerClass
    auc: Floats
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    macro_auc: float
    log_loss: float
    brier: float
    ece: float
    reliability: tuple[ReliabilityBin, ...]

    def to_json(self) -> dict[str, object]:
        """The same facts for JSON; an undefined value (NaN) becomes null."""
        plain = ("accuracy", "balanced_accuracy", "macro_f1", "macro_auc", "log_loss", "brier", "ece")
        columns = {**vars(self.rates), "auc": self.auc}
        return {
            "labels": list(self.labels),
            "films": self.films,
            "confusion": self.confusion.tolist(),
            **{name: or_null(getattr(self, name)) for name in plain},
            "classes": {
                label: {
                    "films": int(self.confusion[k].sum()),
                    **{name: or_null(float(column[k])) for name, column in columns.items()},
                }
                for k, label in enumerate(self.labels)
            },
            "reliability": [
                {name: or_null(value) for name, value in vars(row).items()} for row in self.reliability if row.films
            ],
        }


def score_classification(truth: ArrayLike, probabilities: ArrayLike, labels: tuple[str, ...]) -> ClassificationScores:
    """Every classification score of class indices [N] and probabilities [N, K], K = len(labels)."""
    t, p = _scored(truth, probabilities)
    if p.shape[1] != len(labels):
        raise ValueError(f"{p.shape[1]} probabilities a film but {len(labels)} labels: {', '.join(labels)}")
    confusion = confusion_matrix(t, p.argmax(axis=1), len(labels))
    areas = class_auc(t, p)
    return ClassificationScores(
        labels=labels,
        films=t.size,
        confusion=confusion,
        rates=per_class(confusion),
        auc=areas,
        accuracy=float(accuracy(confusion)),
        balanced_accuracy=float(balanced_accuracy(confusion)),
        macro_f1=float(macro_f1(confusion)),
        macro_auc=float(mean_defined(areas)),
        log_loss=log_loss(t, p),
        brier=brier(t, p),
        ece=ece(t, p),
        reliability=reliability(t, p),
    )


# Shared ---------------------------------------------------------------------------------------------------------------


def _classes(indices: ArrayLike, classes: int) -> Integers:
    i = np.asarray(indices)
    if i.ndim != 1 or (i.size and not np.issubdtype(i.dtype, np.integer)):
        raise ValueError(f"class indices must be whole numbers [N]; got {i.dtype} {i.shape}")
    if i.size and not 0 <= i.min() <= i.max() < classes:
        raise ValueError(f"class indices must lie in 0..{classes - 1}; got {i.min()}..{i.max()}")
    return i.astype(np.int64)


def _scored(truth: ArrayLike, probabilities: ArrayLike) -> tuple[Integers, Floats]:
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2:
        raise ValueError(f"probabilities must be [N, K]; got {p.shape}")
    t = _classes(truth, p.shape[1])
    if len(t) != len(p):
        raise ValueError(f"{len(t)} true classes but probabilities of {len(p)} films")
    if p.size and not (p.min() >= 0 and np.allclose(p.sum(axis=1), 1, atol=1e-3)):
        raise ValueError("each film's probabilities must be >= 0 and add up to 1 (logits? apply softmax first)")
    return t, p
