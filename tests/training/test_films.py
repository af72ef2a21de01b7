from __future__ import annotations

from collections import Counter

from lungscope.training.films import EpochSampler


def test_an_epochs_order_depends_on_seed_and_epoch_alone() -> None:
    first, again = EpochSampler(50, seed=3), EpochSampler(50, seed=3)
    again.set_epoch(4)
    list(again)
    again.set_epoch(0)
    assert list(first) == list(again)
    again.set_epoch(1)
    assert list(first) != list(again)
    assert sorted(first) == list(range(50))


def test_part_of_the_films_without_repeats() -> None:
    order = list(EpochSampler(50, seed=0, films=20))
    assert len(order) == len(set(order)) == 20
    assert len(list(EpochSampler(50, seed=0, films=80))) == 50


def test_even_draws_each_stratum_equally_often() -> None:
    strata = [0] * 900 + [1] * 100
    drawn = Counter(strata[i] for i in EpochSampler(1000, seed=0, strata=strata, films=4000))
    assert abs(drawn[0] - 2000) < 150
