"""Percentile bootstrap intervals over groups of films.

Films of one patient or one duplicate group are not independent, so whole groups are drawn, with replacement, as many as
there are (cluster bootstrap; Efron and Tibshirani 1993, chapters 8 and 13).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lungscope.evaluation.metrics import confusion_matrix
from lungscope.statistics import Floats, Integers, or_null

RESAMPLES = 2000
LEVEL = 0.95
#: Draws held in memory at once, as cells of a resamples x groups table of f64 (64 MB).
_CELLS = 8_000_000


@dataclass(frozen=True)
class Interval:
    """A value on all films, and its percentile interval at `level` over resampled groups.

    undefined: resamples on which the value was NaN; they are left out. The interval is NaN where all of them were, and
    where all others are alike, as those of one group or of films that were all right: they tell nothing of chance.
    """

    value: float
    low: float
    high: float
    level: float
    films: int
    groups: int
    resamples: int
    undefined: int

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """low and high; None where they are NaN."""
        return or_null(self.low), or_null(self.high)

    def to_json(self) -> dict[str, float | int | None]:
        return {name: or_null(value) for name, value in vars(self).items()}


def bootstrap(
    statistic: Callable[[Integers], float],
    groups: Sequence[object],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    corrected: bool = False,
) -> Interval:
    """Interval of any statistic of film indices i64 [M], in which a film drawn twice is listed twice.

    groups: one key a film [N]. corrected: for a statistic >= 0 that chance makes larger, take from the interval twice
    what the resamples' mean is above the value, which itself is above the truth by about as much (the bootstrap's
    estimate of bias; Efron and Tibshirani 1993, chapter 10). It ends at 0 at the least, and may end below the value.
    The statistic is called once a resample; for means, ratios and confusion
    matrices the functions below need one matrix product.
    """
    group = _group_index(groups)
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    starts = np.cumsum(sizes) - sizes
    values = []
    for counts in _draws(sizes.size, resamples, seed):
        for times in counts:
            drawn = np.repeat(np.arange(sizes.size), times)
            length = sizes[drawn]
            offset = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
            values.append(statistic(order[np.repeat(starts[drawn], length) + offset]))
    value, drawn_values = statistic(np.arange(len(groups))), np.array(values, np.float64)
    if corrected:
        drawn_values = np.maximum(0, drawn_values - 2 * (np.nanmean(drawn_values) - value))
    return _interval(value, drawn_values, level, len(groups), sizes.size)


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    groups: Sequence[object],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Interval of sum(numerator) / sum(denominator), both [N]: shares, rates, pooled means. NaN where it is x / 0."""
    parts = np.stack([np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)], axis=1)

    def ratio(sums: Floats) -> Floats:
        top, bottom = sums[..., 0], sums[..., 1]
        quotient: Floats = np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)
        return quotient

    return _bootstrap_sums(parts, ratio, groups, resamples, level, seed)


def bootstrap_mean(
    values: ArrayLike, groups: Sequence[object], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Interval of the mean over films of the defined (not NaN) values [N]."""
    v = np.asarray(values, np.float64)
    defined = ~np.isnan(v)
    return bootstrap_ratio(np.where(defined, v, 0), defined, groups, resamples=resamples, level=level, seed=seed)


def bootstrap_confusion(
    statistic: Callable[[Floats], Floats],
    truth: ArrayLike,
    predicted: ArrayLike,
    classes: int,
    groups: Sequence[object],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Interval of a statistic of the confusion matrix, mapping [..., K, K] to [...] as `metrics.macro_f1` does.

    truth, predicted: class indices [N].
    """
    t, p = np.asarray(truth), np.asarray(predicted)
    confusion_matrix(t, p, classes)
    cells = np.zeros((t.size, classes * classes))
    cells[np.arange(t.size), t * classes + p] = 1

    def of_cells(sums: Floats) -> Floats:
        return statistic(sums.reshape(*sums.shape[:-1], classes, classes))

    return _bootstrap_sums(cells, of_cells, groups, resamples, level, seed)


def _bootstrap_sums(
    parts: Floats,
    statistic: Callable[[Floats], Floats],
    groups: Sequence[object],
    resamples: int,
    level: float,
    seed: int,
) -> Interval:
    """Interval of a statistic of column sums: `parts` f64 [N, C] is summed by group, and the sums are drawn."""
    group = _group_index(groups)
    if len(parts) != group.size:
        raise ValueError(f"{len(parts)} values but {group.size} groups; one group key a film is needed")
    count = int(group.max()) + 1
    by_group = np.stack([np.bincount(group, column, count) for column in parts.T], axis=1)
    draws = _draws(count, resamples, seed)
    values = np.concatenate([statistic(times.astype(np.float64) @ by_group) for times in draws])
    return _interval(float(statistic(parts.sum(axis=0))), values, level, group.size, count)


def _draws(groups: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """How often each group is drawn, i64 [rows, groups], in blocks of rows."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS // groups)
    for start in range(0, resamples, rows):
        n = min(rows, resamples - start)
        drawn = rng.integers(groups, size=(n, groups)) + np.arange(n)[:, None] * groups
        yield np.bincount(drawn.ravel(), minlength=n * groups).reshape(n, groups)


def _group_index(groups: Sequence[object]) -> Integers:
    if len(groups) == 0:
        raise ValueError("a bootstrap needs at least one film")
    first: dict[object, int] = {}
    return np.array([first.setdefault(key, len(first)) for key in groups], np.int64)


def _interval(value: float, values: Floats, level: float, films: int, groups: int) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    defined = values[~np.isnan(values)]
    tail = (1 - level) / 2
    differ = defined.size > 0 and defined.min() < defined.max()
    low, high = np.quantile(defined, (tail, 1 - tail)) if differ else (math.nan, math.nan)
    return Interval(
        float(value), float(low), float(high), level, films, groups, values.size, values.size - defined.size
    )
