"""A run survives a kill, measures itself with batch-norm statistics that fit, and never mixes two runs."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from lungscope.bundle import sha256_of
from lungscope.data.split import Split
from lungscope.data.store import Store
from lungscope.errors import DataError, RecipeError, UsageError
from lungscope.training.engine import Hardware, KeepAverage, KeepBest, Run, Task, validate
from lungscope.training.films import EpochSampler, MaskedFilms
from lungscope.training.networks import build_segmenter
from lungscope.training.recipe import Augment, Best, Phase, load_recipe
from lungscope.training.segmenter import SegmenterTask, train_segmenter
from lungscope.training.views import lung_facts
from lungscope.training.weights import load_weights
from programs import environment

CPU = Hardware(accelerator="cpu", precision="32-true")

RECIPE = """
kind = "segmenter"
reason = "For tests."
network = "fpn-mobilenetv2"
phases = [{ size = 64, epochs = 3, lr = 2e-3, films = 32 }]
batch = 8
optimizer = "adamw"
weight_decay = 0.01
loss = "bce+dice"
schedule = { name = "one-cycle", warmup = 0.3 }
best = { monitor = "val_loss", mode = "min" }
balance = "even"
batch_norm_batches = 2

[augment]
rotation = 5.0
noise = 0.01
opacity = 0.5
"""
STEPS, EPOCHS = 4, 3

#: Trains as the command does; with a step given, the process gets SIGKILL when it has done so many of them.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from lungscope.data.split import Split
from lungscope.data.store import Store
from lungscope.training.engine import Hardware, KeepBest
from lungscope.training.recipe import load_recipe
from lungscope.training.segmenter import SegmenterTask, train_segmenter

store, split, recipe, out, last_step = sys.argv[1:]
step, done = SegmenterTask.training_step, 0

def counted(self, batch, index):
    global done
    if done == int(last_step):
        os.kill(os.getpid(), signal.SIGKILL)
    done += 1
    return step(self, batch, index)

SegmenterTask.training_step = counted
train_segmenter(
    load_recipe(recipe), [(Store.open(Path(store)), Split.read(Path(split)))], Path(out), seed=1,
    hardware=Hardware(accelerator="cpu", precision="32-true"),
)
print(done)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def unbroken(drawn: tuple[Store, Split], recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    train_segmenter(load_recipe(str(recipe)), [drawn], folder, seed=1, hardware=CPU)
    return folder


def epochs_logged(folder: Path) -> list[int]:
    lines = (folder / "phase-1" / "csv" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("epoch")
    return sorted({int(value) for line in lines[1:] if (value := line.split(",")[column])})


@pytest.mark.slow
@pytest.mark.parametrize("ema", [0.0, 0.7])
def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(
    drawn: tuple[Store, Split], recipe: Path, unbroken: Path, tmp_path: Path, ema: float
) -> None:
    store, split = drawn
    if ema:
        recipe = tmp_path / "ema.toml"
        recipe.write_text(RECIPE.replace("batch = 8", f"batch = 8\nema = {ema}"))
        unbroken = tmp_path / "unbroken"
        train_segmenter(load_recipe(str(recipe)), [drawn], unbroken, seed=1, hardware=CPU)
    split.write(tmp_path / "split.csv", {})
    folder = tmp_path / "run"

    def train(last_step: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SCRIPT, store.root, tmp_path / "split.csv", recipe, folder, last_step]
        return subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=environment(), timeout=300, check=False
        )

    killed = train(STEPS + 2)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (folder / "phase-1" / "last.ckpt").exists()
    assert not (folder / "weights.safetensors").exists()

    resumed = train(-1)
    assert resumed.returncode == 0, resumed.stderr
    assert int(resumed.stdout.split()[-1]) == (EPOCHS - 1) * STEPS, "the first epoch was done and is not done again"

    # On one machine the two are equal but for the order in which threads add up, which f32 rounding lets through.
    expected, found = (load_file(root / "weights.safetensors") for root in (unbroken, folder))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    facts = [json.loads((root / "weights.json").read_text()) for root in (unbroken, folder)]
    assert facts[0]["epoch"] == facts[1]["epoch"]
    assert facts[0]["metrics"]["val_loss"] == pytest.approx(facts[1]["metrics"]["val_loss"], rel=1e-3)

    again = train(0)
    assert again.returncode == 0, again.stderr
    assert int(again.stdout.split()[-1]) == 0, "a finished run is not trained again"


def test_a_run_leaves_tensors_and_json(unbroken: Path) -> None:
    state = load_file(unbroken / "weights.safetensors")
    network = build_segmenter("fpn-mobilenetv2")
    network.load_state_dict(state)
    facts = json.loads((unbroken / "weights.json").read_text())
    assert facts["network"] == "fpn-mobilenetv2"
    assert facts["stores"] == ["drawn"]
    assert facts["films"] == {"train": 72, "val": 12}
    assert (facts["size"], facts["seed"], facts["precision"]) == (64, 1, "32-true")
    assert facts["recipe"]["batch"] == 8
    assert set(facts["metrics"]) == {"val_loss", "val_dice", "val_dice_drawn"}
    assert epochs_logged(unbroken) == [0, 1, 2]
    assert list((unbroken / "phase-1" / "tensorboard").glob("events*"))
    assert not list(unbroken.rglob("*.part"))


def test_what_a_run_resumes_from_holds_no_objects(unbroken: Path) -> None:
    checkpoint = torch.load(unbroken / "phase-1" / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == EPOCHS - 1
    assert checkpoint["global_step"] == EPOCHS * STEPS
    assert checkpoint["optimizer_states"][0]["state"]


def test_the_weights_kept_are_those_of_the_best_epoch(unbroken: Path) -> None:
    lines = (unbroken / "phase-1" / "csv" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("val_loss")
    losses = [float(value) for line in lines[1:] if (value := line.split(",")[column])]
    assert len(losses) == EPOCHS
    facts = json.loads((unbroken / "weights.json").read_text())
    assert facts["epoch"] == losses.index(min(losses))
    assert facts["metrics"]["val_loss"] == pytest.approx(min(losses), rel=1e-4)


def test_the_weights_kept_are_the_average_that_was_validated(
    drawn: tuple[Store, Split], recipe: Path, tmp_path: Path
) -> None:
    known = load_recipe(str(recipe))
    average = replace(known, ema=0.9, phases=(replace(known.phases[0], epochs=1),))
    run = train_segmenter(average, [drawn], tmp_path, seed=1, hardware=CPU)
    kept, facts = load_file(run), json.loads(run.with_suffix(".json").read_text())
    checkpoint = torch.load(tmp_path / "phase-1" / "last.ckpt", weights_only=True)
    for name, value in kept.items():
        torch.testing.assert_close(checkpoint["state_dict"][f"network.{name}"], value)
    trained = checkpoint["current_model_state"]
    moved = [not torch.equal(trained[f"network.{name}"], value) for name, value in kept.items() if value.ndim > 1]
    assert all(moved), "the weights that are trained go on beside it"
    store, split = drawn
    network = build_segmenter(known.network)
    network.load_state_dict(kept)
    task = SegmenterTask(network, average, average.phases[0], 1, ["drawn"])
    found = validate(task, MaskedFilms([(store, split.select(store, "val"))]), 8, CPU)
    assert found["val_loss"] == pytest.approx(facts["metrics"]["val_loss"], rel=1e-4)


def test_the_average_leaves_whole_numbers_alone() -> None:
    module = lightning.LightningModule()
    module.weight = nn.Parameter(torch.zeros(3))
    module.register_buffer("table", torch.arange(1000), persistent=False)
    average = KeepAverage(0.9)
    average.setup(SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu"))), module, "fit")
    kept = average._average_model
    assert kept is not None
    kept.update_parameters(module)
    nn.init.ones_(module.weight)
    for _ in range(2):
        kept.update_parameters(module)
    torch.testing.assert_close(kept.module.weight, torch.full((3,), 0.19))
    assert (kept.module.table == module.table).all()


def test_a_run_of_before_is_not_gone_on_with_differently(tmp_path: Path) -> None:
    """A run's facts may lack what later versions say; that is as good as no, and not as good as yes."""

    def run(**facts: object) -> Run:
        return Run(load_recipe("segmenter-cpu"), tmp_path, 0, CPU, None, None, [], facts)

    run(shown="lungs")._claim_folder()
    run(shown="lungs", aligned=False)._claim_folder()
    with pytest.raises(RecipeError, match="differs in aligned"):
        run(shown="lungs", aligned=True)._claim_folder()
    run(shown="lungs", lungs={"threshold": 0.4}, parts_by_store={"a": {"val": "0"}})._claim_folder()


def test_a_run_is_not_gone_on_with_in_another_precision_or_in_other_numbers(tmp_path: Path) -> None:
    def run(hardware: Hardware) -> Run:
        return Run(load_recipe("segmenter-cpu"), tmp_path, 0, hardware, None, None, [], {})

    run(CPU)._claim_folder()
    run(replace(CPU, precision="f32", workers=1))._claim_folder()
    with pytest.raises(RecipeError, match="differs in precision"):
        run(replace(CPU, precision="bf16"))._claim_folder()
    with pytest.raises(RecipeError, match="differs in processes"):
        run(replace(CPU, devices=2))._claim_folder()
    claim = tmp_path / "run.json"
    claim.write_text(json.dumps({k: v for k, v in json.loads(claim.read_text()).items() if k != "precision"}))
    run(replace(CPU, precision="bf16"))._claim_folder()


class Told(Task):
    """Its validation loss and accuracy are told beforehand, epoch by epoch."""

    LOSS, ACCURACY = (0.5, 0.4, 0.6, 0.7, 0.3), (0.1, 0.2, 0.3, 0.4, 0.9)

    def prepare(self, batch: list[torch.Tensor], *, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return batch[0], batch[0].mean((1, 2, 3))

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output.flatten() - target).square().mean()

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.log("val_loss", self.LOSS[self.current_epoch])
        self.log("val_accuracy", self.ACCURACY[self.current_epoch])


def test_a_phase_that_stopped_early_is_over_after_a_kill_too(tmp_path: Path) -> None:
    best, phases = Best("val_accuracy", "max"), (Phase(32, 5, 0.01, 0),)
    recipe = replace(load_recipe("classifier-paper"), phases=phases, batch=2, stop_after=2, best=best)
    films = TensorDataset(torch.rand(4, 1, 4, 4))

    def run() -> list[int]:
        weights = Run(recipe, tmp_path, 0, CPU, films, films, [0] * 4, {}).fit(
            lambda size: nn.Sequential(nn.Conv2d(1, 1, 4)),
            lambda network, phase, seed: Told(network, recipe, phase, seed),
        )
        assert json.loads(weights.with_suffix(".json").read_text())["epoch"] == 3
        return [row["epoch"] for row in json.loads((tmp_path / "phase-1" / "epochs.json").read_text())]

    assert run() == [0, 1, 2, 3]
    for name in ("phase-1/done", "phase-1/epochs.json", "weights.safetensors", "weights.json"):
        (tmp_path / name).unlink()
    assert run() == [0, 1, 2, 3]


class Noisy(Told):
    """Draws noise for every training batch, also for those that batch-norm statistics are made of."""

    def prepare(self, batch: list[torch.Tensor], *, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, target = super().prepare(batch, train=train)
        return (x + torch.rand_like(x) if train else x), target


class Cut(Callback):
    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.current_epoch == 2:
            raise InterruptedError


def test_neither_workers_nor_a_kill_change_what_is_drawn(tmp_path: Path) -> None:
    """In a process of its own: workers are forked, which many threads of other tests' libraries do not bear."""
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; import pathlib, test_engine as t; t.draw_alike(pathlib.Path.cwd())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "unbroken-1" / "weights.safetensors").exists()


def draw_alike(tmp_path: Path) -> None:
    best, phases = Best("val_accuracy", "max"), (Phase(32, 4, 0.01, 0),)
    recipe = replace(load_recipe("classifier-paper"), phases=phases, batch=2, best=best, batch_norm_batches=2)
    films = TensorDataset(torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)))

    def run(folder: str, workers: int, *callbacks: Callback) -> dict[str, torch.Tensor]:
        own = Run(recipe, tmp_path / folder, 0, replace(CPU, workers=workers), films, films, [0] * 6, {})
        return load_file(
            replace(own, callbacks=[*callbacks]).fit(
                lambda size: nn.Sequential(nn.Conv2d(1, 1, 4), nn.BatchNorm2d(1)),
                lambda network, phase, seed: Noisy(network, recipe, phase, seed),
            )
        )

    expected = run("alone", 0)
    for workers in (0, 1):
        with pytest.raises(InterruptedError):
            run(f"killed-{workers}", workers, Cut())
        for found in (run(f"unbroken-{workers}", workers), run(f"killed-{workers}", workers)):
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0.0)


def test_an_epoch_has_the_order_of_its_seed_whatever_was_drawn_before(tmp_path: Path) -> None:
    recipe = replace(load_recipe("classifier-paper"), batch=2)
    films = TensorDataset(torch.arange(6))
    loader = Run(recipe, tmp_path, 0, CPU, films, films, [0] * 6, {})._loader(films, Phase(32, 2, 0.01, 0), 3)
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        orders = [torch.cat([batch for (batch,) in loader]).tolist() for _ in range(2)]
        expected = EpochSampler(6, seed=3)
        expected.set_epoch(epoch)
        assert orders == [list(expected)] * 2


def test_a_run_on_lungs_found_otherwise_is_another_run(tmp_path: Path) -> None:
    def run(threshold: float) -> Run:
        recipe = load_recipe("classifier-cpu")
        return Run(recipe, tmp_path, 0, CPU, None, None, [], {"lungs": lung_facts("mean", threshold, 64)})

    run(0.5)._claim_folder()
    run(0.5)._claim_folder()
    with pytest.raises(RecipeError, match="differs in lungs"):
        run(0.4)._claim_folder()


@pytest.mark.parametrize(("change", "seed", "named"), [({"batch": 4}, 1, "recipe"), ({}, 2, "seed")])
def test_a_folder_of_another_run_is_refused(
    drawn: tuple[Store, Split], recipe: Path, unbroken: Path, change: dict[str, int], seed: int, named: str
) -> None:
    before = (unbroken / "run.json").read_bytes()
    other = replace(load_recipe(str(recipe)), **change)
    with pytest.raises(RecipeError, match=f"differs in {named}"):
        train_segmenter(other, [drawn], unbroken, seed=seed, hardware=CPU)
    assert (unbroken / "run.json").read_bytes() == before


def test_a_run_from_other_initial_weights_is_another_run(
    drawn: tuple[Store, Split], recipe: Path, unbroken: Path
) -> None:
    initial = unbroken / "weights.safetensors"
    with pytest.raises(RecipeError, match="differs in initial"):
        train_segmenter(load_recipe(str(recipe)), [drawn], unbroken, seed=1, hardware=CPU, initial=initial)


def test_a_classifiers_recipe_trains_no_segmenter(drawn: tuple[Store, Split], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="segmenter's recipe"):
        train_segmenter(load_recipe("classifier-paper"), [drawn], tmp_path, seed=0, hardware=CPU)


def test_films_of_both_parts_are_needed(drawn: tuple[Store, Split], recipe: Path, tmp_path: Path) -> None:
    store, split = drawn
    rows = tuple(replace(row, part="train") for row in split.rows)
    with pytest.raises(DataError, match="0 validation films"):
        train_segmenter(load_recipe(str(recipe)), [(store, Split(rows))], tmp_path, seed=0, hardware=CPU)


def test_a_phase_starts_from_the_best_weights_of_the_one_before(
    drawn: tuple[Store, Split], recipe: Path, tmp_path: Path
) -> None:
    """The second phase learns at rate zero, so what it ends with is what it was given."""
    base = load_recipe(str(recipe))
    two = replace(
        base,
        phases=(Phase(64, 2, 2e-3, 16), Phase(96, 1, 0.0, 8)),
        schedule=replace(base.schedule, name="plateau"),
        augment=Augment(),
    )
    train_segmenter(two, [drawn], tmp_path / "run", seed=0, hardware=CPU)
    first, second, final = (
        load_file(tmp_path / "run" / part / "weights.safetensors") for part in ("phase-1", "phase-2", "")
    )
    learned = dict(build_segmenter("fpn-mobilenetv2").named_parameters()).keys()
    assert all(torch.equal(first[name], second[name]) for name in learned)
    assert all(torch.equal(second[name], final[name]) for name in second)
    assert json.loads((tmp_path / "run" / "weights.json").read_text())["size"] == 96

    frozen = replace(two, phases=(Phase(64, 1, 0.0, 8),))
    initial = tmp_path / "run" / "weights.safetensors"
    train_segmenter(frozen, [drawn], tmp_path / "next", seed=5, hardware=CPU, initial=initial)
    started = load_file(tmp_path / "next" / "weights.safetensors")
    assert all(torch.equal(started[name], final[name]) for name in learned)

    before, after = (json.loads((tmp_path / run / "weights.json").read_text()) for run in ("run", "next"))
    assert "initial" not in before and after["initial"]["parts"] == before["parts"]
    assert after["initial"]["weights_sha256"] == sha256_of(initial)
    store, split = drawn
    turned = {"test": "train", "train": "test"}
    other = Split(tuple(replace(row, part=turned.get(row.part, row.part)) for row in split.rows))
    with pytest.raises(RecipeError, match="other val or test parts of these stores"):
        train_segmenter(frozen, [(store, other)], tmp_path / "leaks", seed=5, hardware=CPU, initial=initial)
    assert not (tmp_path / "leaks").exists()


@pytest.mark.slow
def test_stale_batch_norm_breaks_validation_and_a_refresh_mends_it(
    drawn: tuple[Store, Split], recipe: Path, tmp_path: Path
) -> None:
    """One epoch moves the weights further than running averages with EfficientNet's momentum can follow."""
    momenta = {m.momentum for m in build_segmenter("fpn-efficientnetb2").modules() if isinstance(m, nn.BatchNorm2d)}
    assert min(m for m in momenta if m is not None) == pytest.approx(0.01)
    base = replace(
        load_recipe(str(recipe)), network="fpn-efficientnetb2", phases=(Phase(64, 1, 2e-3, 256),), augment=Augment()
    )
    dice, weights = {}, {}
    for batches in (0, 8):
        folder = tmp_path / str(batches)
        path = train_segmenter(replace(base, batch_norm_batches=batches), [drawn], folder, seed=0, hardware=CPU)
        dice[batches] = json.loads(path.with_suffix(".json").read_text())["metrics"]["val_dice"]
        weights[batches] = load_file(path)
    learned = dict(build_segmenter("fpn-efficientnetb2").named_parameters()).keys()
    for name in learned:
        torch.testing.assert_close(weights[0][name], weights[8][name], rtol=1e-3, atol=1e-4)
    assert dice[8] > 0.8, dice
    assert dice[0] < dice[8] - 0.3, dice


def test_auto_precision_is_one_that_lightning_knows() -> None:
    assert Hardware().lightning_precision() in ("32-true", "bf16-mixed")
    assert Hardware(precision="64-true").lightning_precision() == "64-true"
    assert Hardware(precision="f32").lightning_precision() == "32-true"


@pytest.mark.parametrize("hardware", [Hardware("cpu", precision="f31"), Hardware("abacus")])
def test_hardware_that_is_not_there_is_named(hardware: Hardware) -> None:
    with pytest.raises(UsageError, match=r"f31|abacus"):
        hardware.trainer()


@pytest.mark.slow
def test_two_processes_train_one_network(drawn: tuple[Store, Split], recipe: Path, tmp_path: Path) -> None:
    store, split = drawn
    split.write(tmp_path / "split.csv", {})
    command = [
        sys.executable, "-m", "lungscope.cli.main", "train", "segmenter", "--data", store.root,
        "--split", tmp_path / "split.csv", "--recipe", recipe, "--out", tmp_path / "run", "--accelerator", "cpu",
        "--devices", "2", "--precision", "32-true", "--json",
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment(), timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["val_dice"] > 0, "the result is printed once"
    steps = (tmp_path / "run" / "phase-1" / "csv" / "metrics.csv").read_text().splitlines()
    column = steps[0].split(",").index("step")
    assert max(int(line.split(",")[column]) for line in steps[1:]) == EPOCHS * STEPS // 2 - 1
    network = build_segmenter("fpn-mobilenetv2")
    load_weights(network, tmp_path / "run" / "weights.safetensors")


def test_a_checkpoint_holds_the_plateau_schedule_as_of_its_epoch(drawn: tuple[Store, Split], tmp_path: Path) -> None:
    plateau = 'schedule = { name = "plateau", factor = 0.5, patience = 0, floor = 1e-6 }'
    recipe = tmp_path / "plateau.toml"
    recipe.write_text(RECIPE.replace('schedule = { name = "one-cycle", warmup = 0.3 }', plateau))
    train_segmenter(load_recipe(str(recipe)), [drawn], tmp_path / "run", seed=1, hardware=CPU)
    last = torch.load(tmp_path / "run" / "phase-1" / "last.ckpt", weights_only=True)
    assert last["lr_schedulers"][0]["last_epoch"] == EPOCHS


@pytest.mark.parametrize("patience", [4, 7])
def test_the_rate_falls_at_the_epoch_at_which_keras_lets_it_fall(patience: int) -> None:
    recipe = load_recipe("segmenter-paper")
    recipe = replace(recipe, schedule=replace(recipe.schedule, patience=patience))
    task = SegmenterTask(build_segmenter("fpn-mobilenetv2"), recipe, recipe.phases[0], 0, ["a"])
    plateau = task.configure_optimizers()["lr_scheduler"]["scheduler"]
    rates = []
    for loss in [1.0, 0.5, *[0.49995] * (2 * patience)]:
        plateau.step(loss)
        rates.append(plateau.get_last_lr()[0])
    # Keras: `patience` epochs in a row that are not better than 0.5 by 1e-4, and the rate falls at the last of them.
    assert [i for i in range(1, len(rates)) if rates[i] < rates[i - 1]] == [1 + patience, 1 + 2 * patience]
    assert rates[1 + patience] == pytest.approx(rates[0] * recipe.schedule.factor)


@pytest.mark.parametrize(
    ("mode", "scores", "kept"),
    [("max", [0.5, 0.5, 0.6], [0.5, 0.6]), ("min", [0.5, 0.5, 0.4], [0.5, 0.4]), ("min", [math.nan, 0.5], [0.5])],
)
def test_the_best_epoch_is_the_first_of_equals_and_a_number(
    mode: str, scores: list[float], kept: list[float], tmp_path: Path
) -> None:
    recipe = load_recipe("segmenter-paper")
    recipe = replace(recipe, best=Best("val_dice", mode))
    task = SegmenterTask(nn.Conv2d(1, 1, 1), recipe, recipe.phases[0], 0, ["a"])
    keep, found = KeepBest(tmp_path, recipe, recipe.phases[0], {}), []
    for epoch, score in enumerate(scores):
        metrics = {"val_dice": score, "train_loss": 9.0}
        trainer = SimpleNamespace(callback_metrics=metrics, current_epoch=epoch, is_global_zero=True)
        before = keep.best
        keep.on_validation_end(trainer, task)
        if keep.best != before:
            found.append(keep.best)
    assert found == kept
    assert "train_loss" not in json.loads((tmp_path / "weights.json").read_text())["metrics"]


def test_too_few_films_for_a_batch_are_an_error_and_not_a_finished_phase(
    drawn: tuple[Store, Split], recipe: Path, tmp_path: Path
) -> None:
    large = replace(load_recipe(str(recipe)), batch=100)
    with pytest.raises(RecipeError, match="do not fill one batch of 100"):
        train_segmenter(large, [drawn], tmp_path / "run", seed=1, hardware=CPU)
    assert not (tmp_path / "run" / "phase-1" / "done").exists()


def test_a_run_on_other_parts_is_another_run(drawn: tuple[Store, Split], recipe: Path, unbroken: Path) -> None:
    store, split = drawn
    train = [row for row in split.rows if row.part == "train"]
    test = [row for row in split.rows if row.part == "test"]
    moved = {train[0].id: "test", test[0].id: "train"}
    other = Split(tuple(replace(row, part=moved.get(row.id, row.part)) for row in split.rows))
    with pytest.raises(RecipeError, match="differs in parts"):
        train_segmenter(load_recipe(str(recipe)), [(store, other)], unbroken, seed=1, hardware=CPU)


def test_a_run_on_other_labels_or_masks_is_another_run(
    drawn: tuple[Store, Split], recipe: Path, unbroken: Path, tmp_path: Path
) -> None:
    """But one of before, which does not say what it was taught, is gone on with."""
    store, split = drawn
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    masks, labels = store.masks.copy(), [replace(record, label="Normal") for record in store.records]
    masks[0, :9] = 255
    for other in (replace(store, masks=masks), replace(store, records=tuple(labels))):
        with pytest.raises(RecipeError, match="differs in truth"):
            train_segmenter(load_recipe(str(recipe)), [(other, split)], folder, seed=1, hardware=CPU)
    claim = json.loads((folder / "run.json").read_text())
    del claim["truth"]
    (folder / "run.json").write_text(json.dumps(claim))
    train_segmenter(load_recipe(str(recipe)), [(replace(store, masks=masks), split)], folder, seed=1, hardware=CPU)
