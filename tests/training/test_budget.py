"""Budgets: what a grid holds, and what is refused before hours are spent on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lungscope.errors import RecipeError
from lungscope.evaluation.benchmark import PAPER_CLASSIFIERS, PAPER_SEGMENTERS, Cell
from lungscope.training.budget import load_budget, shared_recipe
from lungscope.training.recipe import shipped

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PAPER_ENSEMBLE = ("unet-inceptionresnetv2", "linknet-seresnext50", "fpn-efficientnetb2")
BUDGET = """
reason = "For tests."
[segmentation]
recipe = "segmenter-grid"
seeds = [0, 1]
ensemble = ["fpn-vgg16", "unet-vgg16"]
pools = ["mean"]
[[segmentation.variants]]
name = "slow"
reason = "a slow average"
networks = ["fpn-mobilenetv2"]
changes = { batch_norm_momentum = 0.001 }
[classification]
recipe = "classifier-grid"
seeds = [0]
inputs = ["lungs"]
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", shipped("budget"))
def test_a_shipped_budget_has_the_papers_tables(name: str) -> None:
    budget = load_budget(name)
    cells = list(budget.cells("segmentation"))
    plain = [cell.network for cell in cells if cell.variant is None]
    assert sorted(plain) == sorted(PAPER_SEGMENTERS)
    assert budget.segmentation.ensemble == PAPER_ENSEMBLE
    assert [cell.variant for cell in cells if cell.network == "ensemble"] == ["mean", "union", "vote"]
    varied = {(cell.network, cell.variant) for cell in cells if cell.variant and cell.network != "ensemble"}
    assert len(varied) == 6 and all(network.endswith("mobilenetv2") for network, _ in varied)
    shown = {(c.network, c.input) for c in budget.cells("classification") if c.variant is None}
    assert shown == {(network, view) for network in PAPER_CLASSIFIERS for view in ("lungs", "image", "background")}


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("*/*/*-seed*.json")), ids=lambda path: f"{path.parents[1].name}-{path.stem}"
)
def test_a_result_in_docs_is_of_the_budget_that_is_shipped(path: Path) -> None:
    """Else its grid could not be gone on with."""
    result = json.loads(path.read_text(encoding="utf-8"))
    grid = load_budget(result["budget"]["name"]).grid(result["kind"])
    assert (result["budget"]["recipe"], result["budget"]["sha256"]) == shared_recipe(grid)


def test_an_ensemble_comes_right_after_its_members(tmp_path: Path) -> None:
    names = [cell.name for cell in load_budget(written(tmp_path, BUDGET)).cells("segmentation")]
    assert names[:3] == ["fpn-vgg16-seed0", "unet-vgg16-seed0", "ensemble-mean-seed0"]
    assert len(names) == len(set(names)) == 2 * (15 + 1 + 1)
    assert "fpn-mobilenetv2-slow-seed1" in names


def test_a_variant_changes_what_it_says_and_nothing_else(tmp_path: Path) -> None:
    budget = load_budget(written(tmp_path, BUDGET))
    plain = budget.recipe(Cell("segmentation", "fpn-mobilenetv2", 0))
    slow = budget.recipe(Cell("segmentation", "fpn-mobilenetv2", 0, "slow"))
    assert (plain.batch_norm_momentum, slow.batch_norm_momentum) == (0.0, 0.001)
    assert plain.network == slow.network == "fpn-mobilenetv2"
    assert (plain.phases, plain.augment, plain.loss) == (slow.phases, slow.augment, slow.loss)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('pools = ["mean"]', 'pools = ["median"]', "pool 'median' does not exist"),
        ('inputs = ["lungs"]', 'inputs = ["heart"]', "input 'heart' does not exist"),
        ('"fpn-vgg16", ', '"fpn-vgg19", ', "Did you mean 'fpn-vgg16'"),
        ('name = "slow"', 'name = "slow"\nspeed = 1', "key 'speed' does not exist"),
        ("batch_norm_momentum", "momentum", "key 'momentum' does not exist"),
        ('recipe = "classifier-grid"', 'recipe = "segmenter-grid"', "is not one for classification"),
        ("seeds = [0, 1]", "seeds = []", "needs seeds"),
        ('pools = ["mean"]\n', "", "an ensemble with pools"),
        ('inputs = ["lungs"]', 'pools = ["mean"]', "for segmentation"),
        ('recipe = "classifier-grid"', 'recipe = "no-such"', "recipe 'no-such' does not exist"),
    ],
)
def test_what_makes_no_sense_is_refused(old: str, new: str, reason: str, tmp_path: Path) -> None:
    assert old in BUDGET
    with pytest.raises(RecipeError, match=reason):
        load_budget(written(tmp_path, BUDGET.replace(old, new)))


def test_an_unknown_budget_names_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match="cpu, paper"):
        load_budget("gpu")
