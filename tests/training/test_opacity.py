"""A segmenter with a second map: how opaque the lungs are, learnt from painted opacities on clear lungs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lungscope.errors import RecipeError
from lungscope.training.networks import build_segmenter, finds_opacity
from lungscope.training.recipe import load_recipe
from lungscope.training.segmenter import SegmenterTask, Target
from lungscope.training.weights import load_weights, save_weights

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
    recipe = load_recipe("segmenter-student")
    assert replace(recipe, network=NAME).augment.opacity > 0
