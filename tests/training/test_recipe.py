from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lungscope.errors import RecipeError
from lungscope.training.networks import CLASSIFIERS, SEGMENTERS
from lungscope.training.recipe import STRIDE, load_recipe, shipped


@pytest.mark.parametrize("name", shipped("recipe"))
def test_every_shipped_recipe_is_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.network in (SEGMENTERS if recipe.kind == "segmenter" else CLASSIFIERS)
    assert all(phase.size % STRIDE == 0 for phase in recipe.phases)
    assert len(recipe.reason) > 20


def test_the_papers_segmenter() -> None:
    recipe = load_recipe("segmenter-paper")
    phase = recipe.phases[0]
    assert (phase.size, phase.epochs, recipe.batch, recipe.optimizer, recipe.loss) == (256, 50, 32, "adam", "bce")
    assert (recipe.schedule.name, recipe.schedule.factor, recipe.schedule.patience) == ("plateau", 0.5, 4)
    assert recipe.schedule.floor == 1e-6
    assert recipe.stop_after == 25
    assert (recipe.best.monitor, recipe.best.mode) == ("val_loss", "min")


def test_the_papers_classifier() -> None:
    recipe = load_recipe("classifier-paper")
    phase = recipe.phases[0]
    assert (phase.size, phase.epochs, phase.lr, recipe.batch) == (256, 50, 1e-3, 32)
    assert (recipe.optimizer, recipe.loss) == ("adam", "cross-entropy")
    augment = recipe.augment
    assert (augment.rotation, augment.shift, augment.shear, augment.zoom) == (20.0, 0.2, 0.2, 0.2)
    assert augment.fill == "nearest"
    assert (recipe.schedule.factor, recipe.schedule.patience, recipe.schedule.floor) == (0.2, 7, 1e-7)
    assert recipe.stop_after == 15
    assert (recipe.best.monitor, recipe.best.mode) == ("val_accuracy", "max")


def test_the_control_differs_from_the_shipped_classifier_in_its_budget_alone() -> None:
    shipped, control = load_recipe("classifier-imagenet"), load_recipe("classifier-control")
    assert dataclasses.replace(control, phases=shipped.phases, reason=shipped.reason) == shipped


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("batch = 32", 'batch = "many"'), "batch: expected int"),
        (("batch = 32", "batches = 32"), "'batches' does not exist.*Did you mean 'batch'"),
        (('loss = "bce"', 'loss = "mse"'), "'mse' does not exist"),
        (('optimizer = "adam"\n', ""), "missing optimizer"),
        (("phases = [{ size = 256, epochs = 50, lr = 1e-3 }]", "phases = []"), "at least one"),
        (("batch = 32", "batch ="), "not valid TOML"),
        (("batch = 32", "batch = 0"), "batch at least 1"),
        (("size = 256", "size = 100"), "multiples of 32.*size 100"),
        (('loss = "bce"', 'loss = "cross-entropy"'), "loss of a segmenter: 'cross-entropy' does not exist"),
        (('monitor = "val_loss"', 'monitor = "val_f1"'), "monitor of a segmenter: 'val_f1' does not exist"),
        (("batch = 32", "batch = 32\ndrop = 0.2"), "a segmenter has no drop"),
        (("batch = 32", 'batch = 32\nbalance = "source"'), "balance 'source' is a classifier's"),
        (("batch = 32", "batch = 32\nema = 1.0"), "ema is a share, 0 up to but not 1"),
        (("lr = 1e-3", "lr = -1e-3"), "a learning rate is above 0"),
        (("floor = 1e-6", "floor = 1e-6, warmup = 1.0"), "warmup is a share of the steps"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(tmp_path: Path, change: tuple[str, str], complaint: str) -> None:
    import lungscope.training

    shipped = Path(lungscope.training.__file__).parent / "recipes" / "segmenter-paper.toml"
    text = shipped.read_text()
    assert change[0] in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(*change))
    with pytest.raises(RecipeError, match=complaint):
        load_recipe(str(path))


def test_an_unknown_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match="segmenter-paper"):
        load_recipe("segmenter-papre")
