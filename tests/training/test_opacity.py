"""A segmenter with a second map: how opaque the lungs are, learnt from painted opacities on clear lungs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from lungscope.data.split import Row, Split
from lungscope.data.store import Store
from lungscope.errors import RecipeError
from lungscope.training.engine import Hardware
from lungscope.training.films import MaskedFilms
from lungscope.training.networks import build_segmenter, finds_opacity
from lungscope.training.recipe import load_recipe
from lungscope.training.segmenter import SegmenterTask, Target, train_segmenter
from lungscope.training.weights import load_weights, save_weights
from stores import write_store

NAME = "linknet-efficientnetlite2-opacity"


def task() -> SegmenterTask:
    recipe = load_recipe("segmenter-student")
    return SegmenterTask(torch.nn.Identity(), recipe, recipe.phases[0], 0, ["a"])


def test_only_clear_lungs_teach_opacity() -> None:
    """A film that may have been diseased before it was painted, and what lies outside the lungs, do not count."""
    lung = torch.zeros(2, 1, 8, 8)
    lung[..., :4] = 1
    covered = torch.full((2, 1, 8, 8), 0.5)
    output = torch.zeros(2, 2, 8, 8)
    target = Target(lung, covered, torch.tensor([True, False]))
    plain = task().loss(output, target)
    for change, counts in (((0, slice(0, 4)), True), ((0, slice(4, 8)), False), ((1, slice(0, 4)), False)):
        other = output.clone()
        film, columns = change
        other[film, 1, :, columns] = 3.0
        assert bool(task().loss(other, target) > plain) is counts
    one_map = task().loss(output[:, :1], target)
    assert one_map < plain


def test_weights_of_a_segmenter_of_lungs_alone_start_one_that_finds_opacity(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lungs = build_segmenter(NAME.removesuffix("-opacity")).eval()
    save_weights(lungs, tmp_path / "lungs.safetensors", {})
    torch.manual_seed(1)
    both = build_segmenter(NAME).eval()
    load_weights(both, tmp_path / "lungs.safetensors")
    x = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        maps = both(x)
        assert maps.shape == (1, 2, 64, 64)
        torch.testing.assert_close(maps[:, :1], lungs(x))
        assert not torch.equal(maps[:, 1:], maps[:, :1])
    save_weights(both, tmp_path / "both.safetensors", {})
    with pytest.raises(RecipeError, match="does not fit"):
        load_weights(lungs, tmp_path / "both.safetensors")


def test_its_name_says_so() -> None:
    assert finds_opacity(NAME)
    assert not finds_opacity("linknet-efficientnetlite2")
    assert finds_opacity(load_recipe("segmenter-student").network)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Films "a" and "c" are Normal, "b" has COVID-19, and "broken" was never read."""
    found = write_store(tmp_path)
    masks = np.zeros_like(found.masks)
    masks[:, 16:48, 8:24] = masks[:, 16:48, 40:56] = 255
    np.save(found.root / "masks.npy", masks)
    return Store.open(found.root)


def test_normal_films_are_clear_and_each_class_of_each_store_is_a_stratum(store: Store) -> None:
    films = MaskedFilms([(store, [0, 1, 2]), (store, [2])])
    assert [bool(films[n][3]) for n in range(4)] == [True, False, True, True]
    assert films.strata == [0, 1, 0, 2]
    assert films.clear == 3


def test_a_batch_becomes_films_with_what_covers_them(store: Store) -> None:
    torch.manual_seed(0)
    films = MaskedFilms([(store, [0, 1])])
    batch = default_collate([films[0], films[1]])
    recipe = load_recipe("segmenter-student")
    recipe = replace(recipe, augment=replace(recipe.augment, opacity=1.0))
    task = SegmenterTask(torch.nn.Identity(), recipe, replace(recipe.phases[0], size=64), 0, ["films"])
    x, target = task.prepare(batch, train=True)
    assert x.shape == target.lung.shape == target.covered.shape == (2, 1, 64, 64)
    assert target.clear.tolist() == [True, False]
    assert target.covered.amax((1, 2, 3)).min() > 0
    assert target.covered[target.lung > 0].mean() > 2 * target.covered[target.lung == 0].mean()
    _, shown = task.prepare(batch, train=False)
    assert shown.covered.max() == 0


@pytest.mark.parametrize("lacking", ["paint", "clear lungs"])
def test_what_could_never_learn_opacity_is_refused(lacking: str, store: Store, tmp_path: Path) -> None:
    recipe = load_recipe("segmenter-student")
    if lacking == "paint":
        recipe = replace(recipe, augment=replace(recipe.augment, opacity=0.0))
    else:
        store = replace(store, records=tuple(replace(record, label="COVID-19") for record in store.records))
    parts = dict(zip("abc", ("train", "train", "val"), strict=True)) | {"broken": "test"}
    split = Split(tuple(Row("films", r.id, r.sha256, r.label, r.id, parts[r.id]) for r in store.records))
    with pytest.raises(RecipeError, match="learns opacity from opacities painted on clear lungs"):
        train_segmenter(recipe, [(store, split)], tmp_path / "run", seed=0, hardware=Hardware("cpu"))


def test_soft_masks_are_learnt_as_they_are() -> None:
    """A network that is as sure as those who labelled it can not do better; with yes or no, the loss is what it was."""
    recipe = replace(load_recipe("segmenter-slim-distil"), augment=load_recipe("segmenter-paper").augment)
    films = torch.full((2, 1, 64, 64), 100, dtype=torch.uint8)
    masks = torch.zeros_like(films)
    masks[..., :20], masks[..., 20:40] = 255, 102
    batch = (films, masks, torch.zeros(2), torch.tensor([True, True]))
    phase = replace(recipe.phases[0], size=64)
    soft = SegmenterTask(torch.nn.Identity(), recipe, phase, 0, ["a"])
    hard = SegmenterTask(torch.nn.Identity(), replace(recipe, soft=False), phase, 0, ["a"])
    truth = soft.prepare(batch, train=False)[1]
    assert truth.lung.unique().tolist() == pytest.approx([0, 0.4, 1])
    assert hard.prepare(batch, train=False)[1].lung.unique().tolist() == [0, 1]

    def logits(between: float) -> torch.Tensor:
        p = truth.lung.clamp(1e-4, 1 - 1e-4).clone()
        p[..., 20:40] = between
        return p.logit()

    losses = {between: float(soft.loss(logits(between), truth)) for between in (0.3, 0.35, 0.4, 0.45, 0.5)}
    assert min(losses, key=losses.__getitem__) == 0.4

    p, yes = torch.rand(2, 1, 64, 64), (truth.lung >= 0.5).float()
    dice = (2 * (p * yes).sum((1, 2, 3)) + 1) / (p.sum((1, 2, 3)) + yes.sum((1, 2, 3)) + 1)
    known = torch.nn.functional.binary_cross_entropy(p, yes) + (1 - dice).mean()
    torch.testing.assert_close(hard.loss(p.logit(), Target(yes, yes, batch[3])), known)
