"""The training loop shared by segmenters and classifiers: Lightning, plus what a run needs to survive a kill.

A run's folder holds, for each phase, `phase-K/last.ckpt` (optimizer state, for resuming),
`phase-K/weights.safetensors` with a JSON beside it (the best epoch so far), CSV and TensorBoard logs,
`phase-K/epochs.json` once the phase is over; and at the end `weights.safetensors` and `weights.json` of the run.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import sys
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, distributed, nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Dataset

from lungscope.bundle import sha256_of
from lungscope.errors import RecipeError, UsageError
from lungscope.hardware import keep_freed_memory
from lungscope.training.energy import EnergyMeter
from lungscope.training.films import EpochSampler, rank_and_world_size
from lungscope.training.recipe import Phase, Recipe, as_table
from lungscope.training.weights import load_weights, origin_of, save_weights
from lungscope.writers.atomic import write_text

log = logging.getLogger(__name__)

#: In a phase's folder: that it is over, and how its epochs went.
DONE, EPOCHS = "done", "epochs.json"

#: Facts that runs of before do not have, and are gone on with for all that.
LATER = ("lungs", "truth", "parts_by_store", "precision", "processes")

#: Added to the seed with every phase.
PHASE_SEED = 15_485_863


#: What Lightning calls the precisions that every other command has a name for.
PRECISIONS = {"f32": "32-true", "bf16": "bf16-mixed", "f16": "16-mixed"}


@dataclass(frozen=True)
class Hardware:
    """Where to train. `precision`: f32, bf16, f16 or a Lightning name, or `auto`: bf16 where the processor multiplies
    it, else f32."""

    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    precision: str = "auto"
    workers: int = 0

    def lightning_precision(self) -> Any:
        """The name that `lightning.Trainer` takes."""
        if self.precision != "auto":
            return PRECISIONS.get(self.precision, self.precision)
        if self.gpu():
            return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16-mixed" if fast else "32-true"

    def trainer(self, **options: Any) -> lightning.Trainer:
        """A trainer for here. Raises UsageError for an accelerator or a precision that there is none for."""
        try:
            return lightning.Trainer(
                accelerator=self.accelerator,
                devices=self.devices,
                num_nodes=self.nodes,
                precision=self.lightning_precision(),
                **options,
            )
        except (ValueError, MisconfigurationException) as error:
            raise UsageError(
                f"Training can not be set up with accelerator {self.accelerator!r}, {self.devices} devices and "
                f"precision {self.precision!r}: {error}"
            ) from error

    @property
    def processes(self) -> int:
        """How many train together, a recipe's batch each."""
        return self.devices * self.nodes

    def gpu(self) -> str | None:
        """The name of the NVIDIA GPU that trains; None where none does."""
        return torch.cuda.get_device_name() if torch.cuda.is_available() and self.accelerator != "cpu" else None


class Task(lightning.LightningModule):
    """One phase of training one network. Subclasses say how a batch becomes input, loss and validation metrics."""

    def __init__(self, network: nn.Module, recipe: Recipe, phase: Phase, seed: int) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.recipe, self.phase, self.seed = recipe, phase, seed

    @abstractmethod
    def prepare(self, batch: Any, *, train: bool) -> tuple[Tensor, Any]:
        """A collated batch → (network input f32 [N, 1, S, S], target)."""

    @abstractmethod
    def loss(self, output: Tensor, target: Any) -> Tensor:
        """Mean loss of a batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed an epoch's draws at its first batch, so that nothing counts that this process did before.

        After the first epoch one number is drawn and left: the recorded results are of what comes after it.
        """
        if batch_idx == 0:
            own = 7_919 * self.global_rank
            torch.manual_seed(self.seed * 100_003 + self.phase.size * 1_009 + self.current_epoch + own)
            if self.current_epoch:
                torch.empty((), dtype=torch.int64).random_()

    def forward_network(self, x: Tensor) -> Tensor:
        output: Tensor = self.network(x.contiguous(memory_format=torch.channels_last))
        return output.float()

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, target = self.prepare(batch, train=True)
        loss = self.loss(self.forward_network(x), target)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(x), sync_dist=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.recipe.optimizer]
        optimizer = kind(_decay_groups(self.network, self.recipe.weight_decay), lr=self.phase.lr)
        schedule = self.recipe.schedule
        if schedule.name == "one-cycle":
            steps = int(self.trainer.estimated_stepping_batches)
            # torch divides by the steps of the warm-up less one.
            warmup = schedule.warmup if schedule.warmup * steps != 1 else schedule.warmup * (1 + 1e-6)
            cycle = OneCycleLR(optimizer, self.phase.lr, total_steps=steps, pct_start=warmup)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}
        # As Keras counts, which the paper uses: the rate falls at the `patience`-th epoch without an improvement of
        # 1e-4. torch waits one epoch more, and takes its threshold as a share.
        plateau = ReduceLROnPlateau(
            optimizer,
            factor=schedule.factor,
            patience=schedule.patience - 1,
            threshold=1e-4,
            threshold_mode="abs",
            min_lr=schedule.floor,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    def on_train_epoch_end(self) -> None:
        """Step a plateau schedule here and not where Lightning would: after the epoch's checkpoint is written, so that
        a resumed run would miss the step."""
        plateau = self.lr_schedulers()
        if isinstance(plateau, ReduceLROnPlateau):
            plateau.step(self.trainer.callback_metrics["val_loss"])

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def on_validation_epoch_start(self) -> None:
        """Recompute batch-norm statistics for the weights as they are now.

        Running averages with a small momentum (0.01 in EfficientNet) lag far behind weights that move fast, and a good
        network then scores as a broken one (Wu & Johnson 2021, "Rethinking Batch in BatchNorm", section 3).
        """
        loader = self.trainer.train_dataloader
        if self.recipe.batch_norm_batches and loader is not None:
            refresh_batch_norm(self, loader, self.recipe.batch_norm_batches)


def _stopped_early(checkpoint: dict[str, Any], callbacks: Sequence[Callback]) -> bool:
    """Whether a phase was over by early stopping when its last epoch was written down: Lightning would go on."""
    states = [checkpoint["callbacks"].get(each.state_key) for each in callbacks if isinstance(each, EarlyStopping)]
    return any(state and state["wait_count"] >= state["patience"] for state in states)


def validate(task: Task, films: Dataset[Any], batch: int, hardware: Hardware) -> dict[str, float]:
    """What `task` logs of `films` with the weights that its network has."""
    trainer = replace(hardware, devices=1, nodes=1).trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (found,) = trainer.validate(task, DataLoader(films, batch_size=batch), verbose=False)
    return {name: float(value) for name, value in found.items()}


def refresh_batch_norm(task: Task, loader: DataLoader[Any], batches: int) -> None:
    """Replace the running statistics of every batch-norm layer by their average over `batches` training batches, and
    over the processes that train together."""

    def inputs() -> Iterator[Tensor]:
        for batch in islice(loader, batches):
            yield task.prepare(task.transfer_batch_to_device(batch, task.device, 0), train=True)[0]

    with torch.no_grad():
        update_bn(inputs(), task.network)
        processes = rank_and_world_size()[1]
        if processes > 1:
            for buffer in task.network.buffers():
                if buffer.is_floating_point():
                    distributed.all_reduce(buffer)
                    buffer /= processes


def set_momentum(network: nn.Module, momentum: float) -> None:
    """Give every batch-norm layer of `network` this momentum, as torch counts it: the weight of the newest batch in the
    running averages, one minus what Keras calls by that name. 0 leaves the network's own."""
    for module in network.modules():
        if momentum and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum


def _decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels, none for norms, biases and position tables."""
    decay = [p for n, p in network.named_parameters() if p.ndim >= 2 and "rel_pos" not in n]
    plain = [p for n, p in network.named_parameters() if p.ndim < 2 or "rel_pos" in n]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


class KeepBest(Callback):
    """Saves the weights of the best epoch as safetensors with a JSON beside them, and says how each epoch went.

    `epochs` has one row an epoch, over every sitting of the phase: size, epoch, seconds and joules since the one
    before, losses and validation scores.
    """

    def __init__(self, folder: Path, recipe: Recipe, phase: Phase, facts: dict[str, Any]) -> None:
        self.folder, self.recipe, self.phase, self.facts = folder, recipe, phase, facts
        self.best: float | None = None
        self.epochs: list[dict[str, Any]] = []
        self.started = self.turned = time.monotonic()
        self.meter = EnergyMeter()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.epochs = state_dict["best"], state_dict["epochs"]

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        now = time.monotonic()
        # Rates are logged, too.
        names = [key for key in trainer.callback_metrics if key.startswith(("train_", "val_"))]
        metrics = {key: float(trainer.callback_metrics[key]) for key in names}
        facts = {"size": self.phase.size, "epoch": trainer.current_epoch, "seconds": round(now - self.turned, 1)}
        self.epochs.append({**facts, "joules": self.meter.joules(), "metrics": metrics})
        self.turned = now

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # Others are still those of the epoch before.
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val_")}
        score, best = metrics[self.recipe.best.monitor], self.best
        beats = best is None or (score < best if self.recipe.best.mode == "min" else score > best)
        better = math.isfinite(score) and beats
        log.info(
            "size %d epoch %d/%d (%.0f s) %s%s",
            self.phase.size,
            trainer.current_epoch + 1,
            self.phase.epochs,
            time.monotonic() - self.started,
            "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()),
            "  *" if better else "",
        )
        if better and trainer.is_global_zero and isinstance(pl_module, Task):
            self.best = score
            facts = {**self.facts, "size": self.phase.size, "epoch": trainer.current_epoch, "metrics": metrics}
            save_weights(pl_module.network, self.folder / "weights.safetensors", facts)


class KeepAverage(WeightAveraging):
    """Trains the weights and validates their exponential moving average, of which `decay` stays at each step, until
    every callback before this one is done with it. Lightning's `EMAWeightAveraging` takes the average away before
    `on_validation_end`, where weights are kept, and averages tables of whole numbers, too (CoAtNet has some)."""

    def __init__(self, decay: float) -> None:
        def moved(average: Tensor, weights: Tensor, _: int | Tensor) -> Tensor:
            return average.lerp(weights, 1 - decay) if average.is_floating_point() else weights

        super().__init__(avg_fn=moved)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        # The module is brought there only after this.
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        pass

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)


@dataclass
class Run:
    """One training, from a recipe and data to `folder/weights.safetensors`.

    strata: of each training film, for a recipe that draws evenly over them.
    initial: weights to start from; with `encoder_only` nothing of them but the encoder.
    """

    recipe: Recipe
    folder: Path
    seed: int
    hardware: Hardware
    train: Dataset[Any]
    val: Dataset[Any]
    strata: list[int]
    facts: dict[str, Any] = field(default_factory=dict)
    initial: Path | None = None
    encoder_only: bool = False
    callbacks: list[Callback] = field(default_factory=list)

    def fit(self, build_network: Any, build_task: Any) -> Path:
        """Train phase after phase; a phase that is done is skipped, one that was cut off goes on from its last epoch.

        build_network: size → nn.Module. build_task: (network, phase, seed) → Task. Returns the path of the run's
        weights. Raises RecipeError where `folder` already holds a run of another recipe, seed, precision or number of
        processes, of other facts or other initial weights.
        """
        self._claim_folder()
        keep_freed_memory(None)
        torch.set_float32_matmul_precision("high")
        previous = self.initial
        for number, phase in enumerate(self.recipe.phases, 1):
            folder = self.folder / f"phase-{number}"
            if not (folder / DONE).exists():
                torch.manual_seed(self.seed)
                network = build_network(phase.size)
                set_momentum(network, self.recipe.batch_norm_momentum)
                if previous is not None:
                    load_weights(network, previous, encoder_only=self.encoder_only and previous is self.initial)
                # Phases of one size must not draw the same numbers again.
                seed = self.seed + PHASE_SEED * (number - 1)
                self._fit_phase(build_task(network, phase, seed), phase, folder)
                _wait_for_all()
                if not (folder / "weights.safetensors").exists():
                    raise RecipeError(
                        f"{folder}: no epoch had a finite {self.recipe.best.monitor}, so there is nothing to keep. "
                        "Lower the learning rate, or look into the data"
                    )
                (folder / DONE).touch()
            previous = folder / "weights.safetensors"
        if previous is None:
            raise RecipeError("a recipe needs at least one phase")
        final = self.folder / "weights.safetensors"
        if rank_and_world_size()[0] == 0:
            network = build_network(self.recipe.phases[-1].size)
            load_weights(network, previous)
            save_weights(network, final, json.loads(previous.with_suffix(".json").read_text()))
        _wait_for_all()
        return final

    def _claim_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = json.loads(json.dumps({"recipe": as_table(self.recipe), "seed": self.seed, **self.facts}))
        mine |= {"precision": self.hardware.lightning_precision(), "processes": self.hardware.processes}
        mine["initial"] = None if self.initial is None else sha256_of(self.initial)
        if self.encoder_only:
            mine["initial"] = f"the encoder of {mine['initial']}"
        claim = self.folder / "run.json"
        if claim.exists():
            theirs = json.loads(claim.read_text())
            asked = {*mine, *theirs} - {key for key in LATER if key not in theirs}
            # What one of both does not say is as good as no.
            differ = sorted(key for key in asked if (mine.get(key) or None) != (theirs.get(key) or None))
            if differ:
                raise RecipeError(
                    f"{self.folder} holds a run that differs in {', '.join(differ)}. Use another folder, or the same "
                    "recipe, data, seed, precision and number of devices to go on with it"
                )
        else:
            write_text(claim, json.dumps(mine, indent=2) + "\n")

    def _fit_phase(self, task: Task, phase: Phase, folder: Path) -> None:
        recipe, hardware = self.recipe, self.hardware
        facts = {
            **self.facts,
            "recipe": as_table(recipe),
            "seed": self.seed,
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
            "gpu": hardware.gpu(),
            "precision": hardware.lightning_precision(),
            "processes": hardware.processes,
        }
        if (origin := None if self.initial is None else origin_of(self.initial)) is not None:
            facts["initial"] = origin
        keep = KeepBest(folder, recipe, phase, facts)
        callbacks: list[Callback] = [
            keep,
            ModelCheckpoint(
                folder,
                filename="last",
                save_top_k=1,
                every_n_epochs=1,
                enable_version_counter=False,
                save_on_train_epoch_end=True,
            ),
            LearningRateMonitor("epoch"),
            *([KeepAverage(decay=recipe.ema)] if recipe.ema else []),
            *self.callbacks,
        ]
        if recipe.stop_after:
            callbacks.append(EarlyStopping("val_loss", patience=recipe.stop_after, mode="min"))
        trainer = hardware.trainer(
            # SMP's EfficientNets keep a last convolution that no decoder uses.
            strategy="ddp_find_unused_parameters_true" if hardware.processes > 1 else "auto",
            # EpochSampler shares the training films out itself; every process sees all validation films.
            use_distributed_sampler=False,
            max_epochs=phase.epochs,
            callbacks=callbacks,
            logger=[
                CSVLogger(folder, name="", version="csv"),
                TensorBoardLogger(folder, name="", version="tensorboard"),
            ],
            enable_progress_bar=sys.stderr.isatty(),
            enable_model_summary=False,
            num_sanity_val_steps=0,
            gradient_clip_val=recipe.clip_gradient or None,
            log_every_n_steps=1,
            deterministic="warn",
        )
        last = folder / "last.ckpt"
        train = self._loader(self.train, phase, task.seed)
        if not len(train):
            raise RecipeError(f"{len(self.strata)} training films do not fill one batch of {recipe.batch}")
        before = torch.load(last, map_location="cpu", weights_only=True) if last.exists() else None
        if before is not None and isinstance(train.sampler, EpochSampler):
            # Lightning fetches the first batch of a resumed epoch before it tells the sampler which epoch that is.
            train.sampler.set_epoch(before["epoch"] + 1)
        if before is not None and _stopped_early(before, callbacks):
            keep.load_state_dict(before["callbacks"][keep.state_key])
        else:
            trainer.fit(
                task,
                train,
                self._loader(self.val, None, task.seed),
                ckpt_path=None if before is None else str(last),
                weights_only=True,
            )
        if rank_and_world_size()[0] == 0:
            write_text(folder / EPOCHS, json.dumps(keep.epochs, indent=1) + "\n")

    def _loader(self, films: Dataset[Any], phase: Phase | None, seed: int) -> DataLoader[Any]:
        """Training batches of a phase, or validation batches where `phase` is None."""
        sampler = None
        if phase is not None:
            strata = None if self.recipe.balance == "natural" else self.strata
            sampler = EpochSampler(len(self.strata), seed=seed, strata=strata, films=phase.films)
        return DataLoader(
            films,
            batch_size=self.recipe.batch,
            sampler=sampler,
            num_workers=self.hardware.workers,
            drop_last=phase is not None,
            persistent_workers=self.hardware.workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Else each iterator that is made draws from the generator that augments, and how many are made depends on
            # workers and kills.
            generator=torch.Generator().manual_seed(seed),
        )


def _wait_for_all() -> None:
    """Wait until every process that trains together is here: what one writes, the others read."""
    if rank_and_world_size()[1] > 1:
        distributed.barrier()
