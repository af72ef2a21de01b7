"""Numbers about numbers, in NumPy: what data audits and evaluation share.

An undefined value is NaN, never 0 or 1, and `summarise` says how many were defined (MONAI's `get_not_nans`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def auc(score: ArrayLike, positive: ArrayLike) -> float:
    """Area under the ROC curve of `score` f64 [N] for `positive` bool [N]; NaN where either side is empty
    or any score is NaN.

    The rank statistic of Mann and Whitney: the chance that a positive outranks a negative, ties counting one half.
    """
    s, p = np.asarray(score, np.float64), np.asarray(positive, np.bool_)
    if s.shape != p.shape or s.ndim != 1:
        raise ValueError(f"scores {s.shape} and positives {p.shape} must both be [N]")
    n = int(p.sum())
    if n in (0, p.size) or np.isnan(s).any():
        return math.nan
    return float((ranks(s)[p].sum() - n * (n + 1) / 2) / (n * (p.size - n)))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation, -1..1, of two series [N]; ties share their mean rank.

    Only places where both are defined enter. NaN with fewer than two such places or where either series is constant.
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"series of shapes {a.shape} and {b.shape}; both must be [N]")
    both = ~(np.isnan(a) | np.isnan(b))
    if both.sum() < 2:
        return math.nan
    u, v = (ranks(series[both]) - (both.sum() + 1) / 2 for series in (a, b))
    scale = math.sqrt(float((u @ u) * (v @ v)))
    return float(u @ v) / scale if scale else math.nan


def ranks(values: Floats) -> Floats:
    """Ranks 1..N of `values` [N], f64; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return np.asarray((last - (count - 1) / 2)[place], np.float64)


def mean_defined(values: ArrayLike, axis: int = -1) -> Floats:
    """Mean over the values along `axis` that are not NaN; NaN where none is."""
    v = np.asarray(values, np.float64)
    defined = ~np.isnan(v)
    return ratio(np.where(defined, v, 0.0).sum(axis=axis), defined.sum(axis=axis))


@dataclass(frozen=True)
class Summary:
    """A score over films. `defined` of `films` values entered; all others were NaN. `p5` and `p95` are percentiles."""

    films: int
    defined: int
    mean: float
    std: float
    p5: float
    median: float
    p95: float
    minimum: float
    maximum: float

    def to_json(self) -> dict[str, float | int | None]:
        return {name: or_null(value) for name, value in vars(self).items()}


def summarise(values: ArrayLike) -> Summary:
    """Mean, population standard deviation and percentiles of the defined values of [N]; all NaN where none is."""
    v = np.asarray(values, np.float64).ravel()
    known = v[~np.isnan(v)]
    if known.size == 0:
        return Summary(v.size, 0, *[math.nan] * 7)
    p5, median, p95 = (float(q) for q in np.percentile(known, (5, 50, 95)))
    low, high = float(known.min()), float(known.max())
    return Summary(v.size, known.size, float(known.mean()), float(known.std()), p5, median, p95, low, high)


def ratio(numerator: NDArray[np.number], denominator: NDArray[np.number]) -> Floats:
    """Quotient of two arrays that broadcast, f64; NaN where the denominator is 0."""
    n, d = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    quotient: Floats = np.divide(n, d, out=np.full(np.broadcast_shapes(n.shape, d.shape), np.nan), where=d != 0)
    return quotient


def or_null(value: float) -> float | None:
    """`value`, or None where JSON has no word for it (NaN, infinity)."""
    return value if math.isfinite(value) else None


def number(value: float | None, digits: int = 4) -> str:
    """A score as people read it; `undefined` for None."""
    return "undefined" if value is None else f"{value:.{digits}f}"


def with_interval(value: float | None, interval: Sequence[float | None], digits: int = 4) -> str:
    """A score and its interval: `0.9000 [0.8000, 0.9500]`."""
    return f"{number(value, digits)} [{number(interval[0], digits)}, {number(interval[1], digits)}]"
