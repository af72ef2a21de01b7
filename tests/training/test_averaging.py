"""One segmenter with the mean of several trainings' weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bundles import write_bundle
from lungscope.bundle import Bundle, sha256_of
from lungscope.data.split import Split
from lungscope.data.store import Store
from lungscope.errors import BundleError, RecipeError
from lungscope.training import averaging
from lungscope.training.averaging import average
from lungscope.training.engine import Hardware
from lungscope.training.recipe import Phase, Recipe, load_recipe
from lungscope.training.segmenter import train_segmenter
from lungscope.training.views import lung_facts
from programs import program

CPU = Hardware("cpu", precision="32-true")


def recipe(network: str = "linknet-mobilenetv2") -> Recipe:
    return replace(load_recipe("segmenter-paper"), network=network, phases=(Phase(64, 1, 1e-3),), batch=16)


@pytest.fixture(scope="module")
def runs(drawn: tuple[Store, Split], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run, and one that went on from it."""
    folder = tmp_path_factory.mktemp("runs")
    first = train_segmenter(recipe(), [drawn], folder / "first", seed=0, hardware=CPU)
    train_segmenter(recipe(), [drawn], folder / "second", seed=1, hardware=CPU, initial=first)
    return [folder / "first", folder / "second"]


def test_the_mean_has_the_shares_that_are_asked_for(
    runs: list[Path], drawn: tuple[Store, Split], tmp_path: Path
) -> None:
    found = average(runs, [drawn], tmp_path / "mean", shares=(1, 3), hardware=CPU)
    first, second = (load_file(run / "weights.safetensors") for run in runs)
    mean = load_file(found)
    assert mean.keys() == first.keys()
    moved = 0
    for name, value in mean.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.25 * first[name] + 0.75 * second[name], rtol=1e-5, atol=1e-6)
            moved += int(not torch.equal(value, second[name]))
        else:
            assert torch.equal(value, second[name])
    assert moved > 50
    facts, last = (json.loads((run / "weights.json").read_text()) for run in (tmp_path / "mean", runs[1]))
    assert facts.pop("mean_of") == [
        {
            "weights_sha256": sha256_of(run / "weights.safetensors"),
            "share": share,
            **json.loads((run / "weights.json").read_text()),
        }
        for run, share in zip(runs, (0.25, 0.75), strict=True)
    ]
    assert last.pop("epoch") == 0
    assert facts["gpu"] is None
    assert {**facts, "metrics": None} == {**last, "metrics": None}
    assert facts["metrics"].keys() >= {"val_loss", "val_dice", "val_dice_drawn"}
    assert facts["metrics"] != last["metrics"]


def test_a_run_with_itself_scores_as_before(runs: list[Path], drawn: tuple[Store, Split], tmp_path: Path) -> None:
    found = average([runs[1], runs[1]], [drawn], tmp_path / "mean", hardware=CPU)
    for name, value in load_file(found).items():
        torch.testing.assert_close(value, load_file(runs[1] / "weights.safetensors")[name])
    before = json.loads((runs[1] / "weights.json").read_text())["metrics"]
    after = json.loads(found.with_suffix(".json").read_text())["metrics"]
    assert after["val_dice"] == pytest.approx(before["val_dice"], abs=1e-4)


def test_what_has_no_mean_is_refused(runs: list[Path], drawn: tuple[Store, Split], tmp_path: Path) -> None:
    store, split = drawn

    def refused(match: str, *given: Path, **options: tuple[float, ...]) -> None:
        with pytest.raises(RecipeError, match=match):
            average(given, [drawn], tmp_path / "mean", hardware=CPU, **options)
        assert not (tmp_path / "mean" / "weights.safetensors").exists()

    refused("two runs or more", runs[0])
    refused("each a share above 0", *runs, shares=(1.0, 0.0))
    refused("each a share above 0", *runs, shares=(1.0,))
    refused("each a share above 0", *runs, shares=(1.0, float("nan")))
    other = train_segmenter(recipe("fpn-mobilenetv2"), [drawn], tmp_path / "other", seed=0, hardware=CPU).parent
    refused("these runs are of fpn-mobilenetv2 at 64², linknet-mobilenetv2 at 64²", runs[0], other)
    fewer = Split(tuple(replace(row, part="test") if n == 80 else row for n, row in enumerate(split.rows)))
    with pytest.raises(RecipeError, match="other val or test parts than are given"):
        average(runs, [(store, fewer)], tmp_path / "mean", hardware=CPU)
    leaking = train_segmenter(recipe(), [(store, fewer)], tmp_path / "leaking", seed=0, hardware=CPU).parent
    refused("other val or test parts than are given", leaking, runs[1])
    with pytest.raises(BundleError, match="a finished training run"):
        average([runs[0], tmp_path], [drawn], tmp_path / "mean", hardware=CPU)
    (tmp_path / "mean").mkdir()
    (tmp_path / "mean" / "mine").touch()
    refused("is not empty", *runs)


def test_a_classifier_is_scored_on_lungs_that_its_last_run_was_shown(
    drawn: tuple[Store, Split], tmp_path: Path
) -> None:
    bundle = Bundle.load(write_bundle(tmp_path / "bundle"))
    lungs = lung_facts(bundle.segmenter.pool, bundle.segmenter.threshold, bundle.segmenter.size)
    found = {member.path.name: member.sha256 for member in bundle.segmenter.members}
    for facts in ({"segmenter": {"segmenter.onnx": "0"}}, {"segmenter": found, "lungs": {**lungs, "threshold": 0.31}}):
        with pytest.raises(RecipeError, match="another segmenter or threshold"):
            averaging._classifier(facts, recipe(), [drawn], bundle)


def test_the_command_says_what_it_made(runs: list[Path], drawn: tuple[Store, Split], tmp_path: Path) -> None:
    store, split = drawn
    split.write(tmp_path / "split.csv", {})
    given = ["--data", store.root, "--split", tmp_path / "split.csv", "--share", "1", "--share", "1", "--json"]
    done = program("train", "average", *runs, *given, "--precision", "32-true", "--out", tmp_path / "mean")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["sha256"] == sha256_of(tmp_path / "mean" / "weights.safetensors")
    assert result["epoch"] is None
    assert 0 < result["metrics"]["val_dice"] <= 1
