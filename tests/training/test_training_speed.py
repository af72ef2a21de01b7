"""Training speed: both loops train the network that was asked for, and only counted steps count."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from films import draw, save
from lungscope.data.store import Store, write_records
from lungscope.errors import DataError, LungscopeError, RecipeError
from lungscope.training import speed
from lungscope.training.speed import Job
from programs import program


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speed")
    return speed.write_films(save(folder / "film.png", draw()), folder)


def test_films_lie_as_files_and_in_a_store(store: Path) -> None:
    opened = Store.open(store)
    assert len(opened.records) == speed.FILES
    assert len({record.label for record in opened.records}) == 3
    assert all(record.mask for record in opened.records)
    assert 0.2 < (opened.masks[0] > 0).mean() < 0.8
    assert opened.images[0].std() > 20


def test_a_plain_data_set_turns_film_and_mask_alike(store: Path) -> None:
    torch.manual_seed(0)
    films = speed._Files(Store.open(store), 64, masks=True)
    for film, mask in (films[n] for n in range(4)):
        assert film.shape == mask.shape == (1, 64, 64)
        assert 0 <= film.min() < film.max() <= 1 and set(mask.unique().tolist()) == {0.0, 1.0}
        # The mask is what is darker than the film's median; what a turn brings in from outside is black in both.
        inside = film > 0
        assert film[inside & (mask == 1)].mean() < film[inside & (mask == 0)].mean() - 0.1
    _, label = speed._Files(Store.open(store), 64, masks=False)[4]
    assert label == 1


@pytest.mark.slow
def test_both_loops_are_timed_in_turns(store: Path) -> None:
    network = "fpn-mobilenetv2"
    found = speed.measure([Job(network, store, 64, 4)], 3)[network]
    assert (found["size"], found["batch"], found["steps"]) == (64, 4, 3)
    for name in ("lungscope", "plain", "ratio"):
        assert 0 < found[name]["lowest"] <= found[name]["median"] <= found[name]["highest"]
    bounds = [found["lungscope"][a] / found["plain"][b] for a, b in (("lowest", "highest"), ("highest", "lowest"))]
    assert bounds[0] <= found["ratio"]["median"] <= bounds[1]
    (line,) = speed.table({network: found})
    assert f"training {network} at 64², batch 4" in line


@pytest.mark.slow
def test_a_loop_that_breaks_is_told(store: Path, tmp_path: Path) -> None:
    opened = Store.open(store)
    records = [replace(record, image="gone.png") for record in opened.records]
    broken = tmp_path / "store"
    broken.mkdir()
    for name in ("store.json", "images.npy", "masks.npy"):
        (broken / name).write_bytes((store / name).read_bytes())
    write_records(broken / "records.csv", records)
    with pytest.raises(LungscopeError, match="Training resnet50 ended"):
        speed.measure([Job("resnet50", broken, 64, 4)], 1)


def test_what_can_not_be_trained_is_refused_at_once(store: Path) -> None:
    with pytest.raises(DataError, match=r"has 32 films that coatnet0 can be trained on; a batch is 33.*--batch"):
        speed.check([Job("coatnet0", store, 64, 33)])
    with pytest.raises(RecipeError, match="Did you mean 'coatnet0'"):
        speed.check([Job("coatnet", store)])
    with pytest.raises(RecipeError, match="multiples of 32"):
        speed.check([Job("coatnet0", store, 100)])


def test_the_networks_are_coatnet_and_the_ensemble() -> None:
    assert speed.networks() == ["coatnet0", "unet-inceptionresnetv2", "linknet-seresnext50", "fpn-efficientnetb2"]


@pytest.mark.slow
def test_the_command_adds_to_what_was_measured(store: Path, tmp_path: Path) -> None:
    (tmp_path / "runtime.json").write_text(json.dumps({"device": "cpu"}))
    options = ["--network", "resnet50", "--size", "32", "--batch", "2", "--repeats", "1", "--data", store]
    done = program("benchmark", "runtime", "--training", *options, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runtime.json").read_text())
    assert result["device"] == "cpu"
    assert set(result["training"]["networks"]) == {"resnet50"}
    assert result["training"]["machine"]["cores"] >= 1
    assert np.isfinite(result["training"]["networks"]["resnet50"]["ratio"]["median"])
    assert "training resnet50 at 32²" in done.stdout
