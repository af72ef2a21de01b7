"""How long the networks of a budget take for one film, all on one machine and in turn, so that they can be compared."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from lungscope import runtime
from lungscope.evaluation.benchmark import TIMES_SCHEMA, Kind
from lungscope.evaluation.provenance import commit, machine
from lungscope.evaluation.speed import interleaved
from lungscope.training.budget import NETWORKS, Budget
from lungscope.training.export import ClassifierGraph, SegmenterGraph, store_as_f16, to_onnx
from lungscope.training.networks import build_classifier, build_segmenter
from lungscope.training.recipe import load_recipe

#: Classes of a timed classifier: those of the paper.
CLASSES = 3


def time_networks(
    budget: Budget,
    repeats: int,
    *,
    device: str = "auto",
    progress: Callable[[str], None] = lambda network: None,
) -> dict[str, Any]:
    """Milliseconds of one film in every network of `budget`, at its last size, in f32 in the runtime that ships.

    Weights are drawn at random: time does not depend on them. progress: called with each network as it is made.
    """
    engine = runtime.Runtime(device)
    sizes = {kind: load_recipe(budget.grid(kind).recipe).phases[-1].size for kind in NETWORKS}
    calls: dict[tuple[Kind, str], Callable[[], Any]] = {}
    with TemporaryDirectory() as folder:
        for kind, names in NETWORKS.items():
            image = np.random.default_rng(0).random((1, 1, sizes[kind], sizes[kind]), dtype=np.float32)
            for name in names:
                progress(name)
                path = Path(folder) / f"{kind}-{name}.onnx"
                _export(kind, name, sizes[kind], path)
                calls[kind, name] = partial(engine.compile(path, batch=1), {"image": image})
                path.unlink()
        timings = interleaved({f"{kind}/{name}": call for (kind, name), call in calls.items()}, repeats)
    return {
        "schema_version": TIMES_SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": engine.versions,
        "hardware": {**machine(), "device": engine.device.lower()},
        "precision": engine.precision,
        "sizes": sizes,
        "ms": {kind: {name: timings[f"{kind}/{name}"].to_json() for name in names} for kind, names in NETWORKS.items()},
    }


def _export(kind: Kind, name: str, size: int, path: Path) -> None:
    torch.manual_seed(0)
    if kind == "segmentation":
        to_onnx(SegmenterGraph(build_segmenter(name)), size, path, ["probability"])
    else:
        network = build_classifier(name, classes=CLASSES, size=size)
        to_onnx(ClassifierGraph(network, name), size, path, ["logits", "cam"])
    store_as_f16(path)
