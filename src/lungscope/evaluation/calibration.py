"""Honest probabilities, sets and limits, all fitted on held-out films.

Temperature scaling: one number that calibrates softmax without changing any decision (Guo et al. 2017, "On Calibration
of Modern Neural Networks", section 4.2). Conformal sets: the classes that can not be ruled out at a stated coverage.
A limit of opacity: where healthy lungs end.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from lungscope.evaluation.metrics import Floats
from lungscope.stages.classification import Conformal

#: Temperatures that are looked at. Where the logits separate the films perfectly the best one is 0, and a value at or
#: near the lower bound is returned.
BOUNDS = (0.05, 20.0)
#: Share of each class's films whose conformal set is to hold the class.
COVERAGE = 0.95
#: So many films of a class it takes, that one of them may lie below its threshold.
LEAST_FILMS = round(1 / (1 - COVERAGE)) - 1
#: Share of the zones of healthy lungs that are to be clear: to have hardly a place that is involved.
HEALTHY = 0.9


def softmax(logits: ArrayLike, temperature: float = 1.0) -> Floats:
    """softmax(logits / temperature) over the last axis, f64, same shape."""
    scaled = np.asarray(logits, np.float64) / temperature
    exponential = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(exponential / exponential.sum(axis=-1, keepdims=True), np.float64)


def negative_log_likelihood(logits: ArrayLike, truth: ArrayLike, temperature: float = 1.0) -> float:
    """Mean of -ln softmax(logits / temperature)[true class] in nats, from logits [N, K] and class indices [N]."""
    scaled = np.asarray(logits, np.float64) / temperature
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    picked = scaled[np.arange(len(scaled)), np.asarray(truth)]
    return float(np.mean(np.log(np.exp(scaled).sum(axis=1)) - picked))


def fit_temperature(logits: ArrayLike, truth: ArrayLike) -> float:
    """The temperature in `BOUNDS` with the least negative log-likelihood on held-out logits [N, K] and classes [N].

    The likelihood is convex in 1/temperature, hence has one minimum over the logarithm of the temperature.
    Raises ValueError without films or with logits that are not finite.
    """
    scores, classes = np.asarray(logits, np.float64), np.asarray(truth)
    if scores.ndim != 2 or not scores.size or len(scores) != len(classes) or not np.isfinite(scores).all():
        raise ValueError(
            f"a temperature needs finite logits [N, K] and classes [N]; got shapes {scores.shape} and {classes.shape}"
        )
    low, high = math.log(BOUNDS[0]), math.log(BOUNDS[1])
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-7:
        left, right = high - golden * (high - low), low + golden * (high - low)
        nll = [negative_log_likelihood(scores, classes, math.exp(x)) for x in (left, right)]
        # Towards lower ones where both are 0: of films that are far apart.
        low, high = (low, right) if nll[0] <= nll[1] else (left, high)
    return math.exp((low + high) / 2)


def fit_opaque(levels: ArrayLike) -> float:
    """The least opacity, 0.001..1 in steps of 0.001, above which a place may count as involved so that at least
    `HEALTHY` of the zones of healthy lungs are clear.

    levels: f64 [Z] in 0..1, the least limit at which each zone is clear (`stages.severity.opacity_levels`). Raises
    ValueError without zones.
    """
    found = np.asarray(levels, np.float64)
    if not found.size:
        raise ValueError("a limit of opacity needs zones of healthy lungs; got none")
    return max(1, math.ceil(1000 * float(np.quantile(found, HEALTHY, method="higher")))) / 1000


def calibrate(logits: ArrayLike, truth: ArrayLike) -> tuple[float, Conformal]:
    """Temperature and conformal sets of `COVERAGE`, both fitted on the same held-out logits [N, K] and classes [N]."""
    temperature = fit_temperature(logits, truth)
    return temperature, fit_conformal(softmax(logits, temperature), truth, COVERAGE)


def fit_conformal(probabilities: ArrayLike, truth: ArrayLike, coverage: float) -> Conformal:
    """Thresholds at which each class's sets hold the true class for `coverage` of its films, from held-out
    probabilities [N, K] and classes [N].

    The threshold of a class is the floor((n + 1)(1 - coverage))-th smallest probability that its n films give it: with
    films exchangeable with these, a new one's set then holds its class with a chance of at least `coverage`, whatever
    the network, as long as it was not chosen on these films (Vovk 2012, section 4). It is 0, which holds the class
    always, where n is too small for that.
    Raises ValueError for a coverage outside 0..1 or without films.
    """
    p, classes = np.asarray(probabilities, np.float64), np.asarray(truth)
    if not 0 < coverage < 1 or p.ndim != 2 or not p.size or len(p) != len(classes):
        raise ValueError(
            f"a coverage in 0..1, probabilities [N, K] and classes [N] are needed; got {coverage}, shapes {p.shape} "
            f"and {classes.shape}"
        )
    thresholds = []
    for k in range(p.shape[1]):
        own = np.sort(p[classes == k, k])
        # The small number keeps 100 * (1 - 0.95) from being 4.999….
        rank = math.floor((len(own) + 1) * (1 - coverage) + 1e-9)
        thresholds.append(float(own[rank - 1]) if rank else 0.0)
    return Conformal(coverage, tuple(thresholds))
