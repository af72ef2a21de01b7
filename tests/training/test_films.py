from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lungscope.errors import RecipeError
from lungscope.training import films
from lungscope.training.classifier import strata_of
from lungscope.training.films import EpochSampler, LabelledViews
from lungscope.training.recipe import changed, load_recipe


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


@pytest.mark.parametrize("strata", [None, [0, 1] * 25])
def test_processes_share_one_order_between_them(strata: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = EpochSampler(50, seed=0, strata=strata, films=41)
    alone = list(sampler)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(films, "rank_and_world_size", lambda rank=rank: (rank, 3))
        assert len(sampler) == 13
        shares.append(list(sampler))
    assert [i for step in zip(*shares, strict=True) for i in step] == alone[:39]


def test_strata_by_source_are_the_sources_of_each_class() -> None:
    labels, sources = np.array([0, 0, 1, 1, 1]), ["", "a", "a", "b", "a"]
    views = np.zeros((5, 8, 8), np.uint8)
    films = LabelledViews(views, labels, [4, 3, 2, 1], sources=sources)
    assert films.strata == [1, 1, 1, 0]
    assert films.by_source == [0, 1, 0, 2], "class 1 from a, from b, from a; class 0 from a"
    recipe = load_recipe("classifier-grid")
    assert strata_of(films, recipe) == films.strata
    by_source = changed(recipe, {"balance": "source"}, "test")
    assert strata_of(films, by_source) == films.by_source
    with pytest.raises(RecipeError, match="no class has films of two known sources"):
        strata_of(LabelledViews(views, labels, [0, 1, 2, 3]), by_source)
