"""Train a classifier on segmented lungs, or on one of the two controls (paper, "Classification")."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from lungscope.bundle import Bundle
from lungscope.data.split import Split, parts_by_store, parts_digest, truth_digest
from lungscope.data.store import Store
from lungscope.errors import DataError, RecipeError
from lungscope.stages.classification import Input, ViewSpec
from lungscope.training.augment import random_affine, random_tone, to_float, warp
from lungscope.training.engine import Hardware, Run, Task
from lungscope.training.films import LabelledViews
from lungscope.training.networks import build_classifier, takes_drop_path
from lungscope.training.recipe import Phase, Recipe
from lungscope.training.views import cut_views, finder_facts, view_facts
from lungscope.training.weights import refuse_other_parts

log = logging.getLogger(__name__)

#: A label of fewer training films is remarked on: it may be a slip of spelling.
FEW = 20


class ClassifierTask(Task):
    """Softmax classification; logs `val_loss` (without smoothing), `val_accuracy` and `val_f1` (macro) over all
    films."""

    def __init__(self, network: nn.Module, recipe: Recipe, phase: Phase, seed: int, classes: int) -> None:
        super().__init__(network, recipe, phase, seed)
        self.classes = classes
        self.outputs: list[Tensor] = []
        self.targets: list[Tensor] = []

    def prepare(self, batch: Any, *, train: bool) -> tuple[Tensor, Tensor]:
        views, target = batch
        x = to_float(views, self.phase.size)
        if train:
            spec = self.recipe.augment
            x = random_tone(warp(x, random_affine(len(x), spec, x), spec.fill), spec)
        return x, target

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        smoothing = self.recipe.label_smoothing if self.training else 0.0
        return F.cross_entropy(output, target, label_smoothing=smoothing)

    def validation_step(self, batch: Any, index: int) -> None:
        x, target = self.prepare(batch, train=False)
        self.outputs.append(self.forward_network(x))
        self.targets.append(target)

    def on_validation_epoch_end(self) -> None:
        output, target = torch.cat(self.outputs), torch.cat(self.targets)
        self.outputs.clear()
        self.targets.clear()
        metrics = {
            "val_loss": self.loss(output, target),
            "val_accuracy": multiclass_accuracy(output, target, self.classes, average="micro"),
            "val_f1": multiclass_f1_score(output, target, self.classes, average="macro"),
        }
        self.log_dict(metrics, prog_bar=True, sync_dist=True)


#: What a cut-out view is widened by, as a share of its side on each end.
MARGIN = 0.06


def view_spec(
    shown: Input, recipe: Recipe, crop: bool | None = None, *, equalised: bool = False, aligned: bool = False
) -> ViewSpec:
    """What a classifier of `recipe` is shown, at the size of its last phase. Unless `crop` says otherwise the lungs and
    their outline are cut out close, and the other controls keep the whole frame, as a network without a segmenter would
    see it. Raises RecipeError for lungs that are to be aligned and not cut out."""
    crop = shown in ("lungs", "outline") if crop is None else crop
    if aligned and not crop:
        raise RecipeError(f"lungs are aligned by cutting them out; {shown!r} keeps the whole frame. Cut it out, too")
    return ViewSpec(shown, crop, MARGIN if crop else 0.0, recipe.phases[-1].size, equalised, aligned)


def labelled_views(
    data: list[tuple[Store, Split]], bundle: Bundle, spec: ViewSpec
) -> tuple[list[str], LabelledViews, LabelledViews]:
    """The labels that `data` has, sorted, and what a classifier is shown of train and val parts, lungs found by
    `bundle`'s segmenter. Raises DataError where there are fewer than two labels, no validation film, or no training
    film of a label."""
    views, labels, sources, parts = [], [], list[str](), {"train": list[int](), "val": list[int]()}
    names = sorted({record.label for store, _ in data for record in store.records if record.label})
    if len(names) < 2:
        raise DataError(f"a classifier needs at least two labels; the stores have {names}")
    offset = 0
    for store, split in data:
        cut = cut_views(store, bundle, {"view": spec}, store.root / "views")["view"]
        for part, indices in parts.items():
            indices += [offset + i for i in split.select(store, part) if store.records[i].label and cut.usable[i]]
        views.append(cut.views)
        labels += [names.index(record.label) if record.label else -1 for record in store.records]
        sources += [record.source for record in store.records]
        offset += len(store.records)
    films = views[0] if len(views) == 1 else np.concatenate(views)
    truth = np.array(labels, np.int64)
    train, val = (
        LabelledViews(films, truth, parts[part], equalise=spec.equalised, sources=sources) for part in ("train", "val")
    )
    if not len(train) or not len(val):
        raise DataError(
            f"{len(train)} training and {len(val)} validation films have a label and lungs; both are needed"
        )
    for label, name in enumerate(names):
        taught, seen = train.strata.count(label), val.strata.count(label)
        if not taught:
            raise DataError(
                f"no training film with lungs is labelled {name!r}, of {len(names)} labels: {', '.join(names)}. "
                "Label its films as the others, or split again"
            )
        level = logging.WARNING if taught < FEW or not seen else logging.INFO
        log.log(level, "label %s: %d training and %d validation films", name, taught, seen)
    return names, train, val


def strata_of(films: LabelledViews, recipe: Recipe) -> list[int]:
    """What `recipe` draws evenly over, where it does. Raises RecipeError where that is sources, and no class has films
    of two that are known."""
    if recipe.balance != "source":
        return films.strata
    known = {(label, source) for label, source in zip(films.strata, films.sources, strict=True) if source}
    if len(known) == len({label for label, _ in known}):
        raise RecipeError(
            "balance 'source': no class has films of two known sources. Import the set again if that was done by an "
            "older version, or name sources in a .csv table"
        )
    return films.by_source


def train_classifier(
    recipe: Recipe,
    data: list[tuple[Store, Split]],
    bundle: Bundle,
    folder: Path,
    *,
    view: ViewSpec | None = None,
    seed: int,
    hardware: Hardware,
    initial: Path | None = None,
    encoder_only: bool = False,
) -> Path:
    """Train `recipe.network` on the train parts, seeing `view` (None: the lungs as `view_spec` has them), with lungs
    found by `bundle`'s segmenter. initial: weights to start from; with `encoder_only` a segmenter's, of which nothing
    is taken but the encoder.

    Returns the path of `folder/weights.safetensors`; the JSON beside it names the labels and the view. Raises
    RecipeError or DataError where recipe and data do not fit.
    """
    if recipe.kind != "classifier":
        raise RecipeError(f"expected a classifier's recipe, got a {recipe.kind}'s")
    if initial is not None:
        refuse_other_parts(initial, data)
    if recipe.drop_path and not takes_drop_path(recipe.network):
        log.warning("%s is trained without drop_path: the recipe's %g has no effect", recipe.network, recipe.drop_path)
    spec = view or view_spec("lungs", recipe)
    names, train, val = labelled_views(data, bundle, spec)
    facts = {
        "network": recipe.network,
        "labels": names,
        **view_facts(spec),
        **finder_facts(bundle),
        "stores": [store.name for store, _ in data],
        "films": {"train": len(train), "val": len(val)},
        "parts": parts_digest(data),
        "parts_by_store": parts_by_store(data),
        "truth": truth_digest(data),
    }
    strata = strata_of(train, recipe)
    if strata != train.strata:
        facts["strata"] = hashlib.sha256(json.dumps(strata).encode()).hexdigest()
    run = Run(recipe, folder, seed, hardware, train, val, strata, facts, initial, encoder_only)
    return run.fit(
        lambda size: build_classifier(
            recipe.network, classes=len(names), size=size, drop=recipe.drop, drop_path=recipe.drop_path
        ),
        lambda network, phase, seed: ClassifierTask(network, recipe, phase, seed, len(names)),
    )
