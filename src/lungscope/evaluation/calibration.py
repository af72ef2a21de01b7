"""Temperature scaling: one number that makes softmax probabilities honest without changing any decision.

Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from lungscope.evaluation.metrics import Floats

#: Temperatures that are looked at. Where the logits separate the films perfectly the best one is 0, and a value at or
#: near the lower bound is returned.
BOUNDS = (0.05, 20.0)


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
        low, high = (low, right) if nll[0] < nll[1] else (left, high)
    return math.exp((low + high) / 2)


def abstention_threshold(probabilities: ArrayLike, truth: ArrayLike, accuracy: float) -> float:
    """The lowest probability at which the films answered on held-out data are right at least `accuracy` of the time.

    probabilities [N, K], class indices [N]. 1.0 (answer hardly anything) where no threshold reaches it.
    """
    p = np.asarray(probabilities, np.float64)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == np.asarray(truth)
    order = np.argsort(-confidence, kind="stable")
    share = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    # Films of equal confidence are answered together or not at all.
    last = np.append(np.diff(confidence[order]) != 0, True)
    good = np.flatnonzero((share >= accuracy) & last)
    return float(confidence[order][good[-1]]) if good.size else 1.0
