"""How fast networks are trained here, beside the loop that a script has: a film opened with PIL when its turn comes,
torchvision's transforms, f32, the optimiser's step.

Each of the two runs in a process of its own, since how memory is kept is a process's. They take turns, step by step,
so that what else the machine does falls on both alike.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import cv2
import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from lungscope.data.importing import import_films
from lungscope.data.store import Store
from lungscope.errors import DataError, LungscopeError, RecipeError, look_up
from lungscope.readers import read
from lungscope.training.budget import load_budget
from lungscope.training.classifier import ClassifierTask
from lungscope.training.engine import Hardware, Run, Task
from lungscope.training.films import LabelledViews, MaskedFilms
from lungscope.training.networks import CLASSIFIERS, SEGMENTERS, build_classifier, build_segmenter
from lungscope.training.recipe import Phase, Recipe, changed, load_recipe
from lungscope.training.segmenter import SegmenterTask, Target

#: Sides and number of the files that `write_films` writes: films of public data sets are of about this side.
SIDE, FILES = 299, 32
#: Steps that are not counted: memory and thread pools are cold in them.
WARM_UP = 2


@dataclass(frozen=True)
class Job:
    """What is trained: a network's name in the registry, on films of `store` at `size`, `batch` of them a step, loaded
    by `workers` processes beside the one that trains."""

    network: str
    store: Path
    size: int = 256
    batch: int = 16
    workers: int = 0

    def recipe(self, steps: int) -> Recipe:
        """The shipped recipe for two cores at this network, size and batch, for so many steps."""
        kind = "classifier" if self.network in CLASSIFIERS else "segmenter"
        phase = {"size": self.size, "epochs": 1, "lr": 1e-4, "films": steps * self.batch}
        changes = {"network": self.network, "batch": self.batch, "balance": "even", "phases": [phase]}
        return changed(load_recipe(f"{kind}-cpu"), changes, "training speed")

    def build(self) -> nn.Module:
        """The network, with random weights."""
        if self.network in CLASSIFIERS:
            return build_classifier(self.network, classes=3, size=self.size)
        return build_segmenter(self.network)

    def task(self, network: nn.Module, recipe: Recipe, phase: Phase, seed: int) -> Task:
        """The network's task in lungscope's loop."""
        if self.network in CLASSIFIERS:
            return ClassifierTask(network, recipe, phase, seed, 3)
        return SegmenterTask(network, recipe, phase, seed, ["films"])


def networks() -> list[str]:
    """What is measured unless told otherwise: CoAtNet-0, and the members of the cpu budget's ensemble."""
    ensemble = load_budget("cpu").segmentation.ensemble
    return ["coatnet0", *ensemble]


def write_films(film: Path, folder: Path) -> Path:
    """`FILES` PNG files of one film, with labels and masks, and a store of them; returns the store's folder. As a mask
    stands what is darker than the film's median: its content costs no time."""
    pixels = cv2.resize(read(film).pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    for number, label in zip(range(FILES), cycle(["COVID", "Normal", "Viral Pneumonia"]), strict=False):
        for kind, grid in (("images", pixels), ("masks", pixels < np.median(pixels))):
            path = folder / "films" / label / kind / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.rint(255 * np.clip(grid, 0, 1)).astype(np.uint8))
    return import_films(folder / "films", folder / "store", layout="radiography").store


def check(jobs: Sequence[Job]) -> None:
    """Refuse what can not be trained, before minutes have gone by: raises RecipeError for a network that does not exist
    or a size that it can not take, DataError where a store has too few films for a batch."""
    for job in jobs:
        look_up(job.network, [*CLASSIFIERS, *SEGMENTERS], what="network", error=RecipeError)
        job.recipe(1)
        records = Store.open(job.store).records
        count = len(records) if job.network in CLASSIFIERS else sum(bool(record.mask) for record in records)
        if count < job.batch:
            raise DataError(
                f"{job.store} has {count} films that {job.network} can be trained on; a batch is {job.batch}. "
                "Take another store, or a smaller --batch"
            )


def measure(jobs: Sequence[Job], repeats: int) -> dict[str, Any]:
    """By network: films per second of lungscope's loop and of the plain one, and how many times as fast ours is; each
    with the median, the lowest and the highest of `repeats` steps. The ratio is that of steps next to each other.

    Raises LungscopeError where one of the loops ends.
    """
    found = {}
    for job in jobs:
        rates: dict[str, list[float]] = {"lungscope": [], "plain": []}
        with _loop(_lungscope, job, repeats) as ours, _loop(_plain, job, repeats) as plain:
            for turn in range(WARM_UP + repeats):
                for name, step in (("lungscope", ours), ("plain", plain)):
                    rate = job.batch / step()
                    if turn >= WARM_UP:
                        rates[name].append(rate)
        pairs = zip(rates["lungscope"], rates["plain"], strict=True)
        found[job.network] = {
            "size": job.size,
            "batch": job.batch,
            "workers": job.workers,
            "precision": Hardware().lightning_precision(),
            "steps": repeats,
            **{name: _spread(values) for name, values in rates.items()},
            "ratio": _spread([mine / theirs for mine, theirs in pairs]),
        }
    return found


def table(found: dict[str, Any]) -> Iterator[str]:
    """What `measure` found, in words."""
    for name, row in found.items():
        ours, plain, ratio = (
            f"{row[key]['median']:.2f} [{row[key]['lowest']:.2f}, {row[key]['highest']:.2f}]"
            for key in ("lungscope", "plain", "ratio")
        )
        yield (
            f"training {name} at {row['size']}², batch {row['batch']}, {row['precision']}: "
            f"lungscope {ours} films/s, plain loop {plain} films/s, ratio {ratio}"
        )


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "lowest": min(values), "highest": max(values)}


@contextmanager
def _loop(work: Callable[[Job, int, Connection], None], job: Job, repeats: int) -> Iterator[Callable[[], float]]:
    """A training in a process of its own; what is yielded does one step of it and returns the seconds."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(job, WARM_UP + repeats + 1, there))
    process.start()
    there.close()

    def step() -> float:
        try:
            here.send("go")
            return float(here.recv())
        except (EOFError, OSError) as error:
            raise LungscopeError(
                f"Training {job.network} ended, and its reason is above. With too little memory: a smaller --batch."
            ) from error

    try:
        yield step
    finally:
        process.kill()
        process.join()
        here.close()


class _Turns(Callback):
    """Holds a training up between its steps."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.wait()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.done()

    def wait(self) -> None:
        self.pipe.recv()
        self.start = perf_counter()

    def done(self) -> None:
        """Say how long a step took, its films' loading included, and wait for the next turn."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.pipe.send(perf_counter() - self.start)
        self.wait()


def _lungscope(job: Job, steps: int, pipe: Connection) -> None:
    """Train as `lungscope train` does."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    store = Store.open(job.store)
    films: LabelledViews | MaskedFilms
    if job.network in CLASSIFIERS:
        labels = np.arange(len(store.records)) % 3
        films = LabelledViews(store.images, labels, range(len(labels)))
    else:
        films = MaskedFilms([(store, range(len(store.records)))])
    with TemporaryDirectory() as folder:
        hardware = Hardware(workers=job.workers)
        recipe = job.recipe(steps)
        run = Run(recipe, Path(folder), 0, hardware, films, films, films.strata, callbacks=[_Turns(pipe)])
        run.fit(lambda size: job.build(), lambda network, phase, seed: job.task(network, recipe, phase, seed))


def _plain(job: Job, steps: int, pipe: Connection) -> None:
    """Train as a script does."""
    recipe = job.recipe(steps)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = job.build().to(device).train()
    task = job.task(nn.Identity(), recipe, recipe.phases[0], 0)  # for its loss
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=recipe.weight_decay)
    films = _Files(Store.open(job.store), job.size, masks=job.network not in CLASSIFIERS)
    loader = DataLoader(
        films, job.batch, shuffle=True, drop_last=True, num_workers=job.workers, persistent_workers=job.workers > 0
    )
    turns = _Turns(pipe)
    turns.wait()
    while True:
        for x, target in loader:
            optimizer.zero_grad()
            target = target.to(device)
            if films.masks:
                target = Target(
                    target, torch.zeros_like(target), torch.zeros(len(target), dtype=torch.bool, device=device)
                )
            loss = task.loss(network(x.to(device)), target)
            torch.autograd.backward(loss)
            optimizer.step()
            turns.done()


class _Files(Dataset[tuple[Tensor, Any]]):
    """Films of a store, read from their files: (film f32 [1, S, S] in 0..1, a class or mask f32 [1, S, S])."""

    def __init__(self, store: Store, size: int, *, masks: bool) -> None:
        self.store, self.size, self.masks = store, size, masks
        self.records = [record for record in store.records if record.mask or not masks]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, n: int) -> tuple[Tensor, Any]:
        record = self.records[n]
        angle, mirror = float(torch.empty(()).uniform_(-10, 10)), bool(torch.rand(()) < 0.5)

        def load(path: Path, how: InterpolationMode) -> Tensor:
            with Image.open(path) as file:
                image = transforms.resize(file.convert("L"), [self.size, self.size], how)
            image = transforms.rotate(transforms.hflip(image) if mirror else image, angle, how)
            tensor: Tensor = transforms.to_tensor(image)
            return tensor

        film = load(self.store.path_of(record), InterpolationMode.BILINEAR)
        path = self.store.mask_path_of(record)
        if self.masks and path is not None:
            return film, (load(path, InterpolationMode.NEAREST) >= 0.5).float()
        return film, n % 3
