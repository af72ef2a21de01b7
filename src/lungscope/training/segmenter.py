"""Train a lung segmenter (paper, "Segmentation")."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lungscope.data.pseudo import pseudo_labels
from lungscope.data.split import Split, parts_by_store, parts_digest, truth_digest
from lungscope.data.store import Store
from lungscope.errors import DataError, RecipeError
from lungscope.stages.severity import NORMAL
from lungscope.training.augment import paint_opacities, random_affine, random_tone, to_float, warp
from lungscope.training.engine import Hardware, Run, Task
from lungscope.training.films import MaskedFilms
from lungscope.training.networks import GRADE, Graded, build_segmenter, finds_opacity
from lungscope.training.recipe import Phase, Recipe
from lungscope.training.weights import refuse_other_parts

#: Weight of the opacity map's loss beside the lung map's.
OPACITY_WEIGHT = 0.3


class Target(NamedTuple):
    """lung: f32 [N, 1, S, S] 0 or 1; with a `soft` recipe 0..1. covered: f32 [N, 1, S, S] 0..1, how much a painted
    opacity hides. clear: bool [N], whether there was no opacity before."""

    lung: Tensor
    covered: Tensor
    clear: Tensor


class SegmenterTask(Task):
    """Binary segmentation; logs `val_loss`, `val_dice` (strict, mean over films, mean over stores) and one for each
    store.

    A network with a second map learns on clear lungs how much of each place a painted opacity covers.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, phase: Phase, seed: int, stores: list[str]) -> None:
        if isinstance(network, Graded):
            raise RecipeError(
                f"grades are fitted to a trained segmenter, by `lungscope train severity`, and survive no training: "
                f"name the network without {GRADE!r}"
            )
        super().__init__(network, recipe, phase, seed)
        self.stores = stores
        self.dice: dict[int, list[Tensor]] = defaultdict(list)

    def prepare(self, batch: Any, *, train: bool) -> tuple[Tensor, Target]:
        films, masks, _, clear = batch
        x, mask = to_float(films, self.phase.size), to_float(masks, self.phase.size)
        covered = torch.zeros_like(x)
        if train:
            spec = self.recipe.augment
            both = warp(torch.cat([x, mask], 1), random_affine(len(x), spec, x), spec.fill)
            x, mask = both[:, :1], both[:, 1:]
            if spec.opacity:
                x, covered = paint_opacities(x, mask, spec.opacity)
            x = random_tone(x, spec)
        return x, Target(mask if self.recipe.soft else (mask >= 0.5).float(), covered, clear)

    def loss(self, output: Tensor, target: Target) -> Tensor:
        lung, truth = output[:, :1], target.lung
        loss = F.binary_cross_entropy_with_logits(lung, truth)
        if self.recipe.loss == "bce+dice":
            p = lung.sigmoid()
            # p · truth where truth is 0 or 1; best at p = truth in between, too (Wang 2023, "Dice Semimetric Losses").
            overlap = (p + truth - (p - truth).abs()).sum((1, 2, 3)) / 2
            loss = loss + (1 - (2 * overlap + 1) / (p.sum((1, 2, 3)) + truth.sum((1, 2, 3)) + 1)).mean()
        if output.shape[1] > 1:
            known = truth * target.clear.to(truth.dtype).view(-1, 1, 1, 1)
            each = F.binary_cross_entropy_with_logits(output[:, 1:], target.covered, reduction="none")
            loss = loss + OPACITY_WEIGHT * (each * known).sum() / known.sum().clamp_min(1)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        x, target = self.prepare(batch, train=False)
        output = self.forward_network(x)
        self.log("val_loss", self.loss(output, target), batch_size=len(x), sync_dist=True)
        found, truth = output[:, :1] > 0, target.lung >= 0.5
        overlap = 2 * (found * truth).sum((1, 2, 3))
        dice = overlap / (found.sum((1, 2, 3)) + truth.sum((1, 2, 3))).clamp_min(1)
        for s in batch[2].unique().tolist():
            self.dice[s].append(dice[batch[2] == s])

    def on_validation_epoch_end(self) -> None:
        means = {self.stores[s]: torch.cat(values).mean() for s, values in sorted(self.dice.items())}
        self.dice.clear()
        self.log_dict({f"val_dice_{name}": value for name, value in means.items()}, sync_dist=True)
        self.log("val_dice", torch.stack(list(means.values())).mean(), sync_dist=True)


def train_segmenter(
    recipe: Recipe,
    data: list[tuple[Store, Split]],
    folder: Path,
    *,
    seed: int,
    hardware: Hardware,
    initial: Path | None = None,
    encoder_only: bool = False,
) -> Path:
    """Train `recipe.network` on the masked films of the train parts; validate on the val parts; never touch the test
    parts.

    initial: weights to start from, of the same network, with or without its map of opacity; with `encoder_only`, of any
    with the same encoder. A network with that map needs opacities to be painted, and films of the class Normal.
    Returns the path of `folder/weights.safetensors`. Raises RecipeError or DataError where recipe and data do not fit.
    """
    if recipe.kind != "segmenter":
        raise RecipeError(f"expected a segmenter's recipe, got a {recipe.kind}'s")
    if initial is not None:
        refuse_other_parts(initial, data)
    train = MaskedFilms([(store, split.select(store, "train")) for store, split in data])
    val = MaskedFilms([(store, split.select(store, "val")) for store, split in data])
    if not len(train) or not len(val):
        raise DataError(f"{len(train)} training and {len(val)} validation films have a lung mask; both are needed")
    if finds_opacity(recipe.network) and not (recipe.augment.opacity and train.clear):
        raise RecipeError(
            f"{recipe.network} learns opacity from opacities painted on clear lungs: the recipe paints them on "
            f"{recipe.augment.opacity:.0%} of films, and {train.clear} training films with a mask are of the class "
            f"{NORMAL}; both are needed. `lungscope data pseudo-label` makes masks for such films"
        )
    names = [store.name for store, _ in data]
    facts = {
        "network": recipe.network,
        "stores": names,
        "films": {"train": len(train), "val": len(val)},
        "parts": parts_digest(data),
        "parts_by_store": parts_by_store(data),
        "truth": truth_digest(data),
        "pseudo_labels": {store.name: found for store, _ in data if (found := pseudo_labels(store)) is not None},
    }
    run = Run(recipe, folder, seed, hardware, train, val, train.strata, facts, initial, encoder_only)
    return run.fit(
        lambda size: build_segmenter(recipe.network),
        lambda network, phase, seed: SegmenterTask(network, recipe, phase, seed, names),
    )
