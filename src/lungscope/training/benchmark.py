"""Run the cells of a benchmark: train, export, measure through the path that ships, write the result."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lungscope.bundle import Bundle, sha256_of
from lungscope.data.split import Split, parts_digest, truth_digest
from lungscope.data.store import Store
from lungscope.errors import BundleError, DataError
from lungscope.evaluation import scoring
from lungscope.evaluation.benchmark import SCHEMA_VERSION, Cell, Kind, identity
from lungscope.evaluation.calibration import calibrate
from lungscope.evaluation.provenance import facts
from lungscope.hardware import cores
from lungscope.pipeline import Analyzer
from lungscope.radiograph import Radiograph
from lungscope.readers import read
from lungscope.report import Report
from lungscope.stages.classification import INPUTS, ViewSpec
from lungscope.stages.segmentation import LungMask
from lungscope.training.budget import Budget, shared_recipe
from lungscope.training.classifier import train_classifier, view_spec
from lungscope.training.engine import EPOCHS, Hardware
from lungscope.training.export import Trained, amend_bundle, export_bundle, parity_films
from lungscope.training.networks import build_classifier, build_segmenter
from lungscope.training.segmenter import train_segmenter
from lungscope.training.views import cut_views, finder_facts
from lungscope.writers.atomic import write_text
from lungscope.writers.json import dumps

log = logging.getLogger(__name__)

#: Films on which a cell's time is taken, one after the other.
TIMED_FILMS = 20


class KnownLungs:
    """Finds a film's lungs as `bundle` does, and knows them by the film's SHA-256 from then on: all classifiers of a
    sitting are measured on the same films. Of a LungMask everything is kept but the map before thresholding."""

    def __init__(self, bundle: Bundle) -> None:
        self._find = Analyzer(replace(bundle, classifier=None), precision="f32", streams=cores()).find_lungs
        self._known: dict[str, tuple[LungMask, NDArray[np.uint8], NDArray[np.uint8]]] = {}

    def __call__(self, film: Radiograph) -> LungMask:
        if film.source.sha256 not in self._known:
            found = self._find(film)
            none = np.zeros((0, 0), np.bool_)
            bare = replace(found, mask=none, left=none, right=none, probability=none.astype(np.float32))
            self._known[film.source.sha256] = bare, np.packbits(found.left), np.packbits(found.right)
        bare, *sides = self._known[film.source.sha256]
        h, w = film.shape
        left, right = (np.unpackbits(side, count=h * w).reshape(h, w).astype(np.bool_) for side in sides)
        mask = left | right
        return replace(bare, mask=mask, left=left, right=right, probability=mask.astype(np.float32))


@dataclass(frozen=True)
class Bench:
    """What all cells of a sitting share.

    out: the results' folder, one JSON a cell under `out`/KIND/. work: trainings and bundles in the making.
    segmenter: the bundle that finds the lungs for classifiers.
    """

    budget: Budget
    budget_name: str
    data: Sequence[tuple[Store, Split]]
    split_files: Sequence[Path]
    out: Path
    work: Path
    hardware: Hardware
    segmenter: Bundle

    @cached_property
    def lungs(self) -> KnownLungs:
        """The lungs that classifiers are measured on."""
        return KnownLungs(self.segmenter)

    def result(self, cell: Cell) -> Path:
        """The file of a cell's result."""
        return self.out / cell.kind / f"{cell.name}.json"

    def folder(self, cell: Cell) -> Path:
        return self.work / cell.kind / cell.name

    def run(self, cell: Cell) -> Path:
        """Train and measure `cell`, going on where a sitting was cut off; a cell that has its result is left alone.

        Returns the result's path. Raises DataError where a result there is of another budget, other parts, other
        labels and masks or lungs found otherwise, or where the weights of an ensemble's members are not in `work`, or
        not those that their results are of.
        """
        path = self.result(cell)
        if path.exists():
            self._check(path, cell)
            return path
        document = self._identity(cell)
        log.info("%s", cell.name)
        measured = self._ensemble(cell) if cell.network == "ensemble" else self._network(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, dumps({**document, **measured}, indent=1) + "\n")
        return path

    def cut(self, cells: Sequence[Cell]) -> None:
        """Cut what the networks of `cells` are shown, so that every film's lungs are found once and not once a view."""
        specs = {}
        for cell in cells:
            if cell.kind == "classification" and not self.result(cell).exists():
                spec = self._view(cell)
                specs[str(spec)] = spec
        for store, _ in self.data:
            if specs and any(record.label for record in store.records):
                cut_views(store, self.segmenter, specs, store.root / "views")

    def _view(self, cell: Cell) -> ViewSpec:
        variant, recipe = self.budget.variant(cell), self.budget.recipe(cell)
        shown = next(known for known in INPUTS if known == cell.input)
        if variant is None:
            return view_spec(shown, recipe)
        return view_spec(shown, recipe, variant.crop, equalised=variant.equalised, aligned=variant.aligned)

    def _identity(self, cell: Cell) -> dict[str, Any]:
        """What says whether two results belong together."""
        grid = self.budget.grid(cell.kind)
        recipe, digest = shared_recipe(grid)
        variant = self.budget.variant(cell)
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": cell.kind,
            "name": cell.name,
            "network": cell.network,
            "variant": cell.variant,
            "reason": None if variant is None else variant.reason,
            "changes": {} if variant is None else variant.changes,
            "seed": cell.seed,
            "input": cell.input,
            "crop": None if variant is None else variant.crop,
            "equalised": variant is not None and variant.equalised,
            "aligned": variant is not None and variant.aligned,
            "members": list(grid.ensemble) if cell.network == "ensemble" else None,
            **({"segmenter": None, "lungs": None} if cell.kind == "segmentation" else finder_facts(self.segmenter)),
            "budget": {
                "name": self.budget_name,
                "reason": " ".join(self.budget.reason.split()),
                "sha256": digest,
                "recipe": recipe,
            },
            "parts": parts_digest(self._ready(cell)),
            "truth": truth_digest(self._ready(cell)),
        }

    def _check(self, path: Path, cell: Cell) -> None:
        try:
            mine, theirs = identity(self._identity(cell)), identity(json.loads(path.read_text(encoding="utf-8")))
            # Results of before do not say which truth they are of, nor how the segmenter's map became lungs.
            silent = {key for key in ("truth", "lungs") if not theirs[key]}
            differ = [key for key in mine if mine[key] != theirs[key] and key not in silent]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is no benchmark result ({error}). Remove it, or name another folder") from error
        if differ:
            raise DataError(
                f"{path} is the result of another {', '.join(differ)}. Results are never overwritten: name another "
                "--out"
            )

    def _ready(self, cell: Cell) -> list[tuple[Store, Split]]:
        """The stores that a kind of cell can be trained on: with lung masks, or with labels. Raises DataError where
        none has such films to be measured on."""
        needed = _needed(cell.kind)
        data = [
            (store, split) for store, split in self.data if any(getattr(record, needed) for record in store.records)
        ]
        for part in ("val", "test"):
            if data and not _with_films(data, part, needed):
                raise DataError(f"no film of the {part} parts has a {needed}, on which {cell.name} would be measured")
        return data

    def _network(self, cell: Cell) -> dict[str, Any]:
        recipe, folder, data = self.budget.recipe(cell), self.folder(cell), self._ready(cell)
        films = parity_films(data)
        if cell.kind == "segmentation":
            run = train_segmenter(recipe, data, folder / "run", seed=cell.seed, hardware=self.hardware)
            trained = Trained.open(run)
            bundle = export_bundle([trained], None, folder / "bundle", films=films, name=cell.name, version="0")
            scores = _score_segmenter(bundle, data)
            size = _parameters(build_segmenter(cell.network))
        else:
            run = train_classifier(
                recipe,
                data,
                self.segmenter,
                folder / "run",
                view=self._view(cell),
                seed=cell.seed,
                hardware=self.hardware,
            )
            trained, finder = Trained.open(run), Trained.of_bundle(self.segmenter)
            spec = self.segmenter.segmenter
            bundle = export_bundle(
                finder,
                trained,
                folder / "bundle",
                films=films,
                name=cell.name,
                version="0",
                pool=spec.pool,
                threshold=spec.threshold,
            )
            scores = _score_classifier(bundle, data, self.lungs)
            labels, side = len(trained.facts["labels"]), int(trained.facts["size"])
            size = _parameters(build_classifier(cell.network, classes=labels, size=side))
        return {
            "films": trained.facts["films"],
            "parameters": size,
            "training": _training(trained, folder / "run"),
            **scores,
            **self._facts(bundle, cell, data),
        }

    def _ensemble(self, cell: Cell) -> dict[str, Any]:
        members = [replace(cell, network=name, variant=None) for name in self.budget.grid(cell.kind).ensemble]
        if missing := [member.name for member in members if not self.result(member).exists()]:
            raise DataError(f"{cell.name} needs {', '.join(missing)} first")
        try:
            trained = [Trained.open(self.folder(member) / "run") for member in members]
        except BundleError as error:
            raise DataError(
                f"{cell.name}: weights of its members are not all in {self.work} ({error}). Name the --work folder "
                "that they "
                "were trained in, or copy it here"
            ) from error
        rows = [json.loads(self.result(member).read_text(encoding="utf-8")) for member in members]
        for member, run, row in zip(members, trained, rows, strict=True):
            if sha256_of(run.weights) != row["training"]["weights_sha256"]:
                raise DataError(
                    f"{cell.name}: {run.weights} are not the weights that {self.result(member)} is the result of. Name "
                    "the --work folder that these were trained in, or copy them here"
                )
        data = self._ready(cell)
        out = self.folder(cell) / "bundle"
        bundle = export_bundle(
            trained, None, out, films=parity_films(data), name=cell.name, version="0", pool=str(cell.variant)
        )
        training = {
            "seconds": sum(row["training"]["seconds"] for row in rows),
            "precision": rows[0]["training"]["precision"],
            "gpu": rows[0]["training"].get("gpu"),
            "weights_sha256": [sha256_of(run.weights) for run in trained],
        }
        return {
            "films": rows[0]["films"],
            "parameters": sum(row["parameters"] for row in rows),
            "training": training,
            **_score_segmenter(bundle, data),
            **self._facts(bundle, cell, data),
        }

    def _facts(self, bundle: Bundle, cell: Cell, data: Sequence[tuple[Store, Split]]) -> dict[str, Any]:
        """How fast the cell's stage is, and what all of it was measured with."""
        analyzer = Analyzer(bundle, precision="f32")
        measured = facts(analyzer, list(self.split_files))
        keys = ("created", "weights", "split", "commit", "versions", "hardware")
        return {"latency_ms": _latency(analyzer, data, cell.kind), **{key: measured[key] for key in keys}}


def _training(trained: Trained, run: Path) -> dict[str, Any]:
    epochs = [
        row for path in sorted(run.glob(f"phase-*/{EPOCHS}")) for row in json.loads(path.read_text(encoding="utf-8"))
    ]
    return {
        "seconds": round(sum(row["seconds"] for row in epochs), 1),
        "joules": _joules(epochs),
        "best_epoch": trained.facts["epoch"],
        "precision": trained.facts["precision"],
        "gpu": trained.facts.get("gpu"),
        "torch": trained.facts["torch"],
        "weights_sha256": sha256_of(trained.weights),
        "epochs": epochs,
    }


def _joules(epochs: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """What every epoch's meters counted; None where one was not read."""
    found = {}
    for kind in ("processors", "gpus"):
        counted = [row.get("joules", {}).get(kind) for row in epochs]
        found[kind] = None if None in counted else round(sum(counted), 1)
    return found


def _score_segmenter(bundle: Bundle, data: Sequence[tuple[Store, Split]]) -> dict[str, Any]:
    analyzer = Analyzer(bundle, precision="f32", streams=cores())
    measured = _with_films(data, "test", "mask")
    stores = [scoring.score_segmenter(analyzer, store, split, "test") for store, split in measured]
    return {"stores": stores}


def _score_classifier(bundle: Bundle, data: Sequence[tuple[Store, Split]], lungs: KnownLungs) -> dict[str, Any]:
    """Temperature and conformal sets are fitted on validation, and put into the bundle that is then scored."""
    analyzer = Analyzer(bundle, precision="f32", streams=cores(), find_lungs=lungs)
    val = _joined(analyzer, data, "val")
    temperature, conformal = calibrate(val.logits, val.truth)
    amend_bundle(bundle, temperature=temperature, conformal=conformal)
    test = _joined(analyzer, data, "test")
    plain = {part: scoring.score_predictions(found, 1.0) for part, found in (("val", val), ("test", test))}
    scores = scoring.score_predictions(test, temperature, conformal)
    scores["uncalibrated"] = {name: plain["test"][name] for name in ("log_loss", "brier", "ece")}
    return {
        "val": {name: plain["val"][name] for name in ("films", "accuracy", "macro_f1", "log_loss", "ece")},
        "test": scores,
    }


def _joined(analyzer: Analyzer, data: Sequence[tuple[Store, Split]], part: str) -> scoring.Predictions:
    """Predictions of a part of all stores; where there are several, a film's id has its store's name before it."""
    all_found = []
    for store, split in _with_films(data, part, "label"):
        found = scoring.predict(analyzer, store, split, part)
        before = f"{store.name}/" if len(data) > 1 else ""
        failed = [{**row, "id": before + row["id"]} for row in found.failed]
        all_found.append(replace(found, ids=[before + id_ for id_ in found.ids], failed=failed))
    return scoring.Predictions(
        labels=all_found[0].labels,
        ids=[id_ for found in all_found for id_ in found.ids],
        groups=[group for found in all_found for group in found.groups],
        sources=[source for found in all_found for source in found.sources],
        truth=np.concatenate([found.truth for found in all_found]),
        logits=np.concatenate([found.logits for found in all_found]),
        failed=[row for found in all_found for row in found.failed],
    )


def _needed(kind: Kind) -> Literal["mask", "label"]:
    """What a film of a kind of cell has."""
    return "mask" if kind == "segmentation" else "label"


def _with_films(
    data: Sequence[tuple[Store, Split]], part: str, needed: Literal["mask", "label"]
) -> list[tuple[Store, Split]]:
    """The stores that have films with what is needed in a part; those of pseudo-labels have them for training alone."""
    return [
        (store, split)
        for store, split in data
        if any(getattr(store.records[i], needed) for i in split.select(store, part))
    ]


def _latency(analyzer: Analyzer, data: Sequence[tuple[Store, Split]], stage: Kind) -> dict[str, Any]:
    """Milliseconds of a stage for one film after the other, on as many threads as the runtime takes."""
    store, split = _with_films(data, "test", _needed(stage))[0]
    films = [read(store.path_of(store.records[i])) for i in split.select(store, "test")[:TIMED_FILMS]]
    times = [
        result.run.timings_ms[stage]
        for _ in range(2)
        for result in analyzer.analyze_many(films)
        if isinstance(result, Report) and stage in result.run.timings_ms
    ]
    if not times:
        return {"films": 0, "fastest": None, "median": None}
    return {"films": len(films), "fastest": min(times), "median": statistics.median(times)}


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
