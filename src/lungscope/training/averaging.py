"""One network out of several trainings of it, with the mean of their weights.

Runs that began at the same weights, or at one another's, can lie in one basin: the mean of their weights then scores
about as the best of them does, and can hold better on films unlike those of the last run (Wortsman et al. 2022, "Model
soups" and "Robust fine-tuning of zero-shot models"). Batch-norm statistics are averaged as the weights are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from lungscope.bundle import Bundle, sha256_of
from lungscope.data.split import Split, parts_digest
from lungscope.data.store import Store
from lungscope.errors import RecipeError
from lungscope.training.classifier import ClassifierTask, labelled_views
from lungscope.training.engine import Hardware, Task, validate
from lungscope.training.export import Trained
from lungscope.training.films import MaskedFilms
from lungscope.training.networks import build_classifier, build_segmenter
from lungscope.training.recipe import Recipe, read_table
from lungscope.training.segmenter import SegmenterTask
from lungscope.training.views import saw_lungs_of, view_of
from lungscope.training.weights import refuse_filled, save_weights


def average(
    runs: Sequence[Path],
    data: list[tuple[Store, Split]],
    folder: Path,
    *,
    bundle: Bundle | None = None,
    shares: Sequence[float] = (),
    hardware: Hardware,
) -> Path:
    """Write the mean of the weights of `runs` to `folder`/weights.safetensors, and beside it what it is the mean of,
    its scores on the val parts of `data`, and else what the last run's file says.

    bundle: whose segmenter finds the lungs that classifiers are shown; segmenters need none. shares: how much each run
    counts, above 0; they need not sum to 1. Empty: all alike.
    Returns the path of the weights. Raises RecipeError for fewer than two runs, runs of different networks, inputs or
    input sizes, classifiers without a bundle or with another than that which found the last one's lungs, runs whose val
    or test part is not that of `data`, shares that do not fit, a mean without a finite score, or a `folder` that holds
    something; BundleError for a folder without a finished run.
    """
    trained = [Trained.open(run) for run in runs]
    shares = tuple(shares) or (1.0,) * len(trained)
    if len(trained) < 2 or len(shares) != len(trained) or not all(0 < share < math.inf for share in shares):
        raise RecipeError(f"{len(trained)} runs, shares {list(shares)}: give two runs or more, each a share above 0")
    if len(kinds := {_kind(run.facts) for run in trained}) > 1:
        raise RecipeError(
            f"The mean of weights is one network's at one size; these runs are of {', '.join(sorted(kinds))}"
        )
    refuse_filled(folder)
    parts = parts_digest(data)
    for run in trained:
        if any(run.facts["parts"][part] != parts[part] for part in ("val", "test")):
            raise RecipeError(
                f"{run.weights} was trained with other val or test parts than are given. Give its stores and splits; "
                "runs of different splits have no mean, as each may have trained on what the other is measured on"
            )
    facts = trained[-1].facts
    recipe: Recipe = read_table(Recipe, facts["recipe"], str(trained[-1].weights))
    task, val = _segmenter(facts, recipe, data) if "labels" not in facts else _classifier(facts, recipe, data, bundle)
    task.network.load_state_dict(_mean([load_file(run.weights) for run in trained], shares))
    scores = validate(task, val, recipe.batch, hardware)
    if not all(math.isfinite(score) for score in scores.values()):
        raise RecipeError(f"The mean of these runs has no finite score ({scores}): they did not begin at one another's")
    mean_of = [
        {"weights_sha256": sha256_of(run.weights), "share": share / sum(shares), **run.facts}
        for run, share in zip(trained, shares, strict=True)
    ]
    about = {name: fact for name, fact in facts.items() if name != "epoch"}
    weights = folder / "weights.safetensors"
    save_weights(task.network, weights, {**about, "mean_of": mean_of, "metrics": scores})
    return weights


def _kind(facts: dict[str, Any]) -> str:
    shown = f", shown {view_of(facts)} of {', '.join(facts['labels'])}" if "labels" in facts else ""
    return f"{facts['network']} at {facts['size']}²{shown}"


def _segmenter(facts: dict[str, Any], recipe: Recipe, data: list[tuple[Store, Split]]) -> tuple[Task, Dataset[Any]]:
    names = [store.name for store, _ in data]
    phase = replace(recipe.phases[-1], size=int(facts["size"]))
    task = SegmenterTask(build_segmenter(facts["network"]), recipe, phase, facts["seed"], names)
    return task, MaskedFilms([(store, split.select(store, "val")) for store, split in data])


def _classifier(
    facts: dict[str, Any], recipe: Recipe, data: list[tuple[Store, Split]], bundle: Bundle | None
) -> tuple[Task, Dataset[Any]]:
    if bundle is None:
        raise RecipeError("These runs are of a classifier: name the bundle whose segmenter finds its lungs")
    if not saw_lungs_of(facts, bundle):
        raise RecipeError(
            f"The last of these runs was shown lungs that another segmenter or threshold found than bundle "
            f"{bundle.name!r} has. Name that bundle with --model"
        )
    names, _, val = labelled_views(data, bundle, view_of(facts))
    if names != facts["labels"]:
        raise RecipeError(f"The runs know {', '.join(facts['labels'])}; the stores have {', '.join(names)}")
    size = int(facts["size"])
    network = build_classifier(facts["network"], classes=len(names), size=size)
    return ClassifierTask(network, recipe, replace(recipe.phases[-1], size=size), facts["seed"], len(names)), val


def _mean(states: Sequence[dict[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Tensor by tensor, in f64; counters of batches are the last one's."""
    total = sum(shares)
    mean = {}
    for name, last in states[-1].items():
        if last.is_floating_point():
            parts = [share / total * state[name].double() for state, share in zip(states, shares, strict=True)]
            mean[name] = torch.stack(parts).sum(0).to(last.dtype)
        else:
            mean[name] = last
    return mean
