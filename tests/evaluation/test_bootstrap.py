"""Bootstrap intervals against theory, a slow reference, and each other."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from lungscope.evaluation import metrics
from lungscope.evaluation.bootstrap import bootstrap, bootstrap_confusion, bootstrap_mean, bootstrap_ratio

RNG = np.random.default_rng(7)


def test_the_interval_of_a_mean_agrees_with_theory() -> None:
    values = RNG.normal(5, 2, 400)
    got = bootstrap_mean(values, range(400))
    assert got.value == pytest.approx(values.mean())
    error = 1.96 * values.std() / 20
    assert got.low == pytest.approx(values.mean() - error, abs=0.02)
    assert got.high == pytest.approx(values.mean() + error, abs=0.02)
    assert (got.films, got.groups, got.resamples, got.undefined, got.level) == (400, 400, 2000, 0, 0.95)


def test_coverage_of_the_truth_is_near_the_level() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        groups = np.repeat(np.arange(60), 3)
        values = np.repeat(rng.normal(size=60), 3) + rng.normal(0, 0.3, 180)
        interval = bootstrap_mean(values, groups.tolist(), resamples=400, seed=seed)
        hits += interval.low <= 0 <= interval.high
    assert 0.89 <= hits / 200 <= 0.99


def test_groups_widen_the_interval() -> None:
    values = np.repeat(RNG.normal(size=50), 8)
    alone = bootstrap_mean(values, range(400))
    grouped = bootstrap_mean(values, np.repeat(np.arange(50), 8).tolist())
    assert grouped.groups == 50
    ratio = (grouped.high - grouped.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(math.sqrt(8), rel=0.15)


def test_fast_and_general_ways_agree_exactly() -> None:
    groups = [f"patient{i}" for i in RNG.integers(0, 20, 120)]
    truth, called = RNG.integers(0, 3, 120), RNG.integers(0, 3, 120)
    values = RNG.normal(size=120)

    def f1(indices: np.ndarray) -> float:
        return float(metrics.macro_f1(metrics.confusion_matrix(truth[indices], called[indices], 3)))

    slow = bootstrap(lambda indices: float(values[indices].mean()), groups, resamples=300, seed=3)
    fast = bootstrap_mean(values, groups, resamples=300, seed=3)
    assert (slow.low, slow.high) == pytest.approx((fast.low, fast.high))
    slow = bootstrap(f1, groups, resamples=300, seed=3)
    fast = bootstrap_confusion(metrics.macro_f1, truth, called, 3, groups, resamples=300, seed=3)
    assert (slow.value, slow.low, slow.high) == pytest.approx((fast.value, fast.low, fast.high))


def test_whole_groups_are_drawn() -> None:
    groups = ["a", "b", "a", "c", "c", "c"]
    seen: list[tuple[int, ...]] = []

    def note(indices: np.ndarray) -> float:
        seen.append(tuple(sorted(indices.tolist())))
        return 0.0

    bootstrap(note, groups, resamples=60, seed=0)
    members = {"a": (0, 2), "b": (1,), "c": (3, 4, 5)}
    possible = {
        tuple(sorted((*members[x], *members[y], *members[z]))) for x in members for y in members for z in members
    }
    assert set(seen) <= possible
    assert len(set(seen)) > 5


def test_seed_decides() -> None:
    values = RNG.normal(size=30)
    first, same, other = (bootstrap_mean(values, range(30), seed=s, resamples=200) for s in (1, 1, 2))
    assert first == same
    assert first != other


@pytest.mark.parametrize("off", [0.02, 0.05])
def test_a_corrected_interval_holds_the_truth_though_chance_makes_the_statistic_larger(
    off: float,
) -> None:
    """A network that is right less often than it says by `off`, which so is its ECE."""
    rng = np.random.default_rng(3)
    held = {True: 0, False: 0}
    for _ in range(40):
        top = rng.uniform(0.6, 1, 300)
        probabilities, truth = np.stack([top, 1 - top], 1), (rng.random(300) > top - off).astype(np.int64)
        for corrected in held:
            found = bootstrap(
                lambda i, t=truth, p=probabilities: metrics.ece(t[i], p[i]),
                range(300),
                resamples=200,
                corrected=corrected,
            )
            assert 0 <= found.low < found.high
            held[corrected] += found.low <= off <= found.high
    assert held[True] >= 32 and held[True] > held[False]


def test_undefined_values_are_left_out_and_undefined_resamples_counted() -> None:
    got = bootstrap_mean([1.0, math.nan, 3.0], range(3), resamples=500)
    assert got.value == 2
    assert got.undefined == pytest.approx(500 / 27, abs=15)
    assert 1 <= got.low <= got.high <= 3
    nothing = bootstrap_mean([math.nan, math.nan], range(2), resamples=10)
    assert nothing.undefined == 10
    assert nothing.to_json()["low"] is None


def test_where_all_resamples_are_alike_there_is_no_interval() -> None:
    for values, groups in (([0.9, 0.7, 0.8], "aaa"), ([1.0] * 10, range(10))):
        got = bootstrap_mean(values, groups, resamples=50)
        assert got.value == pytest.approx(np.mean(values)) and got.undefined == 0
        assert got.to_json()["low"] is None and got.to_json()["high"] is None


def test_ratio_pools_before_dividing() -> None:
    assert bootstrap_ratio([1, 1], [1, 9], ["a", "b"], resamples=50).value == 0.2


def test_what_cannot_be_resampled_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one film"):
        bootstrap_mean([], [])
    with pytest.raises(ValueError, match="one group key a film"):
        bootstrap_mean([1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match="level"):
        bootstrap_mean([1.0], ["a"], level=95)


def test_thousands_of_groups_are_fast() -> None:
    truth = RNG.integers(0, 3, 2700)
    called = np.where(RNG.random(2700) < 0.9, truth, RNG.integers(0, 3, 2700))
    start = time.process_time()
    interval = bootstrap_confusion(metrics.macro_f1, truth, called, 3, range(2700))
    assert time.process_time() - start < 10
    assert interval.low < interval.value < interval.high
