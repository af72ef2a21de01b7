"""Lung masks for films on which nobody drew any: drawn by segmenters, and kept where they agree.

Self-training (Lee 2013, "Pseudo-Label"; Xie et al. 2020, "Self-training with Noisy Student"): what a segmenter finds on
a film as it is becomes the truth for another one, which is shown the film turned, toned and painted over. With soft
labels, what several find becomes what one is to find (Hinton et al. 2015, "Distilling the Knowledge in a Neural
Network").
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lungscope.batch import in_order
from lungscope.bundle import Bundle
from lungscope.data.importing import on_store_grid, shares_on_store_grid
from lungscope.data.split import Row, Split
from lungscope.data.store import SCHEMA_VERSION, Record, Store, write_records
from lungscope.errors import DataError, InputError, UsageError
from lungscope.hardware import cores
from lungscope.pipeline import Analyzer, FindLungs
from lungscope.radiograph import Pixels, Radiograph
from lungscope.readers import read
from lungscope.stages.segmentation import Mask, dice
from lungscope.stages.segmentation import split as split_mask

SPLIT = "split.csv"
DISAGREE = "disagree"


@dataclass(frozen=True)
class PseudoLabelled:
    """looked_at: films of the train part that were segmented; kept: those in the new store, by label.
    left_out: how many were not kept, by reason: `disagree`, a warning's code or an error's."""

    store: Path
    split: Path
    looked_at: int
    kept: dict[str, int]
    left_out: dict[str, int]

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "store": str(self.store), "split": str(self.split)}


def pseudo_label(
    store: Store,
    split: Split,
    bundles: Sequence[Bundle],
    dest: Path,
    *,
    agree: float = 0.97,
    per_label: int = 0,
    soft: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PseudoLabelled:
    """Segment those films of the train part of `store` that have no lung mask, and keep them with the masks found in
    the new store `dest`, with a split of its own, in which all are for training.

    Every bundle looks at a film and at its mirror image. A film is kept where any two of these masks overlap by a Dice
    of `agree` or more, and where no lungs found on the film itself look implausible. Its mask is where the mean of the
    probabilities reaches one half, holes filled and specks dropped; it also lies as PNG, 0 or 255, on the film's own
    grid in `dest`/masks.

    per_label: no more films of a label than that, drawn by `seed`; 0 takes all. soft: label films that have a lung
    mask, too, and let the store's masks be the mean of the probabilities itself, for a recipe with `soft`.
    Val and test parts are not looked at. Nothing stands at `dest` before all is done.
    Raises UsageError where `dest` exists or no bundle is given, DataError where no film is kept.
    """
    if dest.exists():
        raise UsageError(f"{dest} exists. Choose a DEST that does not")
    if not bundles or not 0 < agree <= 1:
        raise UsageError(f"{len(bundles)} bundles and agreement {agree}: give one or more, and a Dice above 0, up to 1")
    wanted = [i for i in split.select(store, "train") if soft or not store.records[i].mask]
    chosen = _drawn(wanted, store, per_label, seed)
    finders = [
        Analyzer(replace(bundle, classifier=None), precision="f32", streams=cores()).find_lungs for bundle in bundles
    ]
    work = dest.with_name(f".{dest.name}.{os.getpid()}.part")
    (work / "masks").mkdir(parents=True)
    try:
        kept: list[int] = []
        grids: list[NDArray[np.uint8]] = []
        left_out: Counter[str] = Counter()

        def look(i: int) -> str | tuple[Mask, Pixels]:
            try:
                return _agreed(read(store.path_of(store.records[i])), finders, agree)
            except InputError as error:
                return error.code

        for n, found in enumerate(in_order(look, chosen)):
            if isinstance(found, str):
                left_out[found] += 1
            else:
                mask, probability = found
                if not cv2.imwrite(str(work / "masks" / f"{len(kept)}.png"), mask.astype(np.uint8) * np.uint8(255)):
                    raise DataError(f"{work}: a mask could not be written. Is the disk full?")
                if soft:
                    grids.append(np.rint(255 * shares_on_store_grid(probability, store.size)).astype(np.uint8))
                else:
                    grids.append(on_store_grid(mask, store.size))
                kept.append(chosen[n])
            progress(n + 1, len(chosen))
        if not kept:
            why = ", ".join(f"{reason} {count:,}" for reason, count in left_out.most_common()) or "none to look at"
            raise DataError(f"{store.name}: none of {len(chosen):,} films was kept ({why}). Lower the agreement")
        masks = (dest / "masks").resolve()
        records = [replace(store.records[i], mask=str(masks / f"{n}.png")) for n, i in enumerate(kept)]
        np.save(work / "images.npy", store.images[kept], allow_pickle=False)
        np.save(work / "masks.npy", np.stack(grids), allow_pickle=False)
        write_records(work / "records.csv", records)
        facts = {
            "made_by": "lungscope data pseudo-label",
            "segmenters": [[weights.sha256 for weights in bundle.segmenter.members] for bundle in bundles],
            "agree": agree,
            "per_label": per_label,
            "soft": soft,
            "seed": seed,
            "looked_at": len(chosen),
            "left_out": dict(left_out),
        }
        _own_split(dest.name, store, split, records, kept).write(work / SPLIT, facts)
        about = {"schema_version": SCHEMA_VERSION, "name": dest.name, "size": store.size, "origin": str(store.origin)}
        (work / "store.json").write_text(json.dumps(about | {"pseudo_labels": facts}))
        work.rename(dest)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    labels = Counter(store.records[i].label for i in kept)
    return PseudoLabelled(dest, dest / SPLIT, len(chosen), dict(labels), dict(left_out))


def pseudo_labels(store: Store) -> dict[str, Any] | None:
    """By what a store's masks were made, as `store.json` has it; None for a store that was imported."""
    found: dict[str, Any] | None = json.loads((store.root / "store.json").read_text()).get("pseudo_labels")
    return found


def _drawn(films: list[int], store: Store, per_label: int, seed: int) -> list[int]:
    if not per_label:
        return films
    rng = np.random.default_rng(seed)
    left: Counter[str] = Counter()
    drawn = []
    for i in rng.permutation(films).tolist():
        left[store.records[i].label] += 1
        if left[store.records[i].label] <= per_label:
            drawn.append(i)
    return sorted(drawn)


def _agreed(film: Radiograph, finders: Sequence[FindLungs], agree: float) -> str | tuple[Mask, Pixels]:
    """The mask bool [H, W] that all looks at the film agree on, and the mean of their probabilities f32 [H, W], 0 or 1
    where a hole was filled or a speck dropped; or the reason why there is none."""
    mirrored = replace(film, pixels=np.ascontiguousarray(film.pixels[:, ::-1]))
    looks: list[tuple[Mask, Pixels]] = []
    for find in finders:
        lungs = find(film)
        if lungs.warnings:
            return lungs.warnings[0].code
        looks.append((lungs.mask, lungs.probability))
        other = find(mirrored)
        looks.append((other.mask[:, ::-1], other.probability[:, ::-1]))
    if min(dice(a, b) for (a, _), (b, _) in combinations(looks, 2)) < agree:
        return DISAGREE
    mean: Pixels = np.mean([probability for _, probability in looks], axis=0, dtype=np.float32)
    right, left, _ = split_mask(mean >= 0.5)
    mask = right | left
    return mask, np.where(mask == (mean >= 0.5), mean, mask).astype(np.float32)


def _own_split(name: str, store: Store, split: Split, records: Sequence[Record], kept: Sequence[int]) -> Split:
    """All films for training, in the groups that they have in `split`."""
    groups = split.groups_of(store, kept)
    return Split(
        tuple(
            Row(name, record.id, record.sha256, record.label, group, "train")
            for record, group in zip(records, groups, strict=True)
        )
    )
