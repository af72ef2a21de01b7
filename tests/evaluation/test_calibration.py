"""Temperature scaling recovers a known temperature and never harms the likelihood."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lungscope.evaluation import metrics
from lungscope.evaluation.calibration import (
    BOUNDS,
    HEALTHY,
    fit_conformal,
    fit_opaque,
    fit_temperature,
    negative_log_likelihood,
    softmax,
)
from lungscope.stages.classification import Conformal


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


@pytest.mark.parametrize("apart", [0.2, 20.0, 1000.0])
def test_separable_films_reach_the_lower_bound(apart: float) -> None:
    assert fit_temperature([[apart, 0.0], [0.0, apart]], [0, 1]) == pytest.approx(BOUNDS[0], rel=1e-3)


def test_softmax_is_stable_and_its_likelihood_is_log_loss() -> None:
    assert softmax([1000.0, 1000.0]).tolist() == [0.5, 0.5]
    assert softmax([[-1000.0, 0.0]]).tolist() == [[0.0, 1.0]]
    logits, truth = films(200)
    assert negative_log_likelihood(logits, truth) == pytest.approx(metrics.log_loss(truth, softmax(logits)))


@pytest.mark.parametrize("logits", [[], [[math.nan, 1.0]], [1.0, 2.0], [[1.0, 2.0], [1.0, 2.0]]])
def test_unusable_logits_are_refused(logits: list[object]) -> None:
    with pytest.raises(ValueError, match="finite logits"):
        fit_temperature(logits, [0])


def test_nine_of_ten_healthy_zones_score_nothing() -> None:
    levels = np.linspace(0, 0.4, 101)
    limit = fit_opaque(levels)
    assert limit == 0.36
    assert np.mean(levels <= limit) >= HEALTHY
    assert fit_opaque([0, 0.1, 0.2, 0.3, 0.4]) == 0.4, "four of five are too few"
    assert fit_opaque([0.30001] * 4) == 0.301, "no zone is lost to rounding"
    assert fit_opaque([0.0004] * 4) == 0.001, "above 0 is every place"
    with pytest.raises(ValueError, match="healthy"):
        fit_opaque([])


def test_conformal_thresholds_by_hand() -> None:
    # 19 films of class 0 with probabilities 0.05, 0.10 … 0.95: the floor(20 * 0.1) = 2nd smallest, 0.10.
    own = np.arange(1, 20) / 20
    films = np.stack([own, 1 - own], axis=1)
    assert fit_conformal(films, [0] * 19, 0.9) == Conformal(0.9, (own[1], 0.0)), "a class without films is always in"
    assert fit_conformal(films, [0] * 19, 0.95).thresholds[0] == own[0]
    assert fit_conformal(films[:18], [0] * 18, 0.95).thresholds[0] == 0, "too few to rule anything out"


@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_sets_cover_each_class_as_often_as_stated(coverage: float) -> None:
    logits, truth = films(40_000)
    logits[:, 0] -= 1.5 * (truth == 0)  # A class that the network is bad at is covered as often as the others.
    p = softmax(logits)
    sets = fit_conformal(p[::2], truth[::2], coverage)
    covered = sets.holds(p[1::2])[np.arange(20_000), truth[1::2]]
    for k in range(3):
        assert covered[truth[1::2] == k].mean() == pytest.approx(coverage, abs=0.015)


@pytest.mark.parametrize(("films", "truth", "coverage"), [([], [], 0.9), ([[0.5, 0.5]], [0], 1.0), ([[1.0]], [], 0.9)])
def test_sets_need_films_and_a_coverage(films: list[object], truth: list[int], coverage: float) -> None:
    with pytest.raises(ValueError, match="coverage in 0"):
        fit_conformal(films, truth, coverage)
