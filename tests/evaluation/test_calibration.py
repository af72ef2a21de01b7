"""Temperature scaling recovers a known temperature and never harms the likelihood."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lungscope.evaluation import metrics
from lungscope.evaluation.calibration import (
    BOUNDS,
    abstention_threshold,
    fit_temperature,
    negative_log_likelihood,
    softmax,
)


def films(n: int = 6000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax is the true distribution, and classes drawn from it."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, 3))
    return logits, (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_a_known_temperature_is_found(temperature: float) -> None:
    logits, truth = films()
    assert fit_temperature(logits * temperature, truth) == pytest.approx(temperature, rel=0.05)


def test_scaling_lowers_the_likelihood_and_ece_and_keeps_the_decision() -> None:
    logits, truth = films()
    sharp = logits * 3
    found = fit_temperature(sharp, truth)
    grid = [negative_log_likelihood(sharp, truth, t) for t in np.geomspace(*BOUNDS, 400)]
    assert negative_log_likelihood(sharp, truth, found) <= min(grid) + 1e-9
    before, after = softmax(sharp), softmax(sharp, found)
    assert metrics.ece(truth, after) < 0.25 * metrics.ece(truth, before)
    assert (before.argmax(axis=1) == after.argmax(axis=1)).all()


def test_separable_films_reach_the_lower_bound() -> None:
    assert fit_temperature([[0.2, 0.0], [0.0, 0.2]], [0, 1]) == pytest.approx(BOUNDS[0], rel=1e-3)


def test_softmax_is_stable_and_its_likelihood_is_log_loss() -> None:
    assert softmax([1000.0, 1000.0]).tolist() == [0.5, 0.5]
    assert softmax([[-1000.0, 0.0]]).tolist() == [[0.0, 1.0]]
    logits, truth = films(200)
    assert negative_log_likelihood(logits, truth) == pytest.approx(metrics.log_loss(truth, softmax(logits)))


@pytest.mark.parametrize("logits", [[], [[math.nan, 1.0]], [1.0, 2.0], [[1.0, 2.0], [1.0, 2.0]]])
def test_unusable_logits_are_refused(logits: list[object]) -> None:
    with pytest.raises(ValueError, match="finite logits"):
        fit_temperature(logits, [0])


def test_the_abstention_threshold_by_hand() -> None:
    def sure(*confidences: float) -> list[list[float]]:
        return [[c, 1 - c] for c in confidences]

    # Right, right, wrong, right, in falling confidence: 2 of 2 are right, then 2 of 3, then 3 of 4.
    truth = [0, 0, 1, 0]
    films = sure(0.9, 0.8, 0.7, 0.6)
    assert abstention_threshold(films, truth, 0.75) == 0.6
    assert abstention_threshold(films, truth, 0.8) == 0.8
    assert abstention_threshold(films, [1, 1, 1, 1], 0.5) == 1.0, "not to be reached"
    # The wrong one is as sure as a right one: they are answered together, 2 of 3.
    assert abstention_threshold(sure(0.9, 0.8, 0.8), [0, 0, 1], 0.9) == 0.9
    assert abstention_threshold(sure(0.9, 0.8, 0.8), [0, 0, 1], 0.6) == 0.8
