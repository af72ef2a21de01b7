"""What a classifier's training says before it begins."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from timm.layers import DropPath

from lungscope.bundle import Bundle
from lungscope.errors import DataError
from lungscope.training.classifier import train_classifier
from lungscope.training.engine import Hardware
from lungscope.training.networks import CLASSIFIERS, build_classifier, takes_drop_path
from lungscope.training.recipe import load_recipe
from nets import SMALL


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_network_that_leaves_drop_path_out_is_named(
    name: str, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = replace(load_recipe("classifier-grid"), network=name)
    network = build_classifier(name, classes=2, size=SMALL[name], drop_path=recipe.drop_path)
    dropped = any(isinstance(module, DropPath) and module.drop_prob for module in network.modules())
    assert dropped == takes_drop_path(name)
    told = []
    for drop_path in (recipe.drop_path, 0.0):
        with caplog.at_level(logging.WARNING), pytest.raises(DataError, match="two labels"):
            other = replace(recipe, drop_path=drop_path)
            train_classifier(other, [], Bundle.load(tiny), tmp_path, seed=0, hardware=Hardware("cpu"))
        told.append([record.getMessage() for record in caplog.records if "drop_path" in record.getMessage()])
        caplog.clear()
    assert told == [[] if dropped else [f"{name} is trained without drop_path: the recipe's 0.05 has no effect"], []]
