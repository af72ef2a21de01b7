"""From trained weights to a bundle: ONNX graphs, parity gates, calibration, and the papers that go with them."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from lungscope.bundle import MANIFEST, SCHEMA_VERSION, Bundle, sha256_of
from lungscope.data.split import Split
from lungscope.data.store import Store
from lungscope.errors import BundleError, DataError
from lungscope.report import DISCLAIMER
from lungscope.runtime import Runtime
from lungscope.stages.classification import Conformal
from lungscope.training.networks import (
    build_classifier,
    build_segmenter,
    features,
    finds_grade,
    finds_opacity,
    head_of,
    maps_of,
)
from lungscope.training.views import lung_facts, same_lungs, saw_one_of, view_facts, view_of
from lungscope.training.weights import HALF, load_weights
from lungscope.writers.atomic import write_text

log = logging.getLogger(__name__)

OPSET = 18

#: Above which opacity a place is involved, until that is measured on healthy lungs.
OPAQUE = 0.1

#: Films, about, that the parity gates look at.
PARITY_FILMS = 16

#: Largest difference that the gate lets through between torch and the runtime in f32, of probabilities and of logits.
TOLERANCE = 1e-3
#: The same between f32 and the f16 form in which weights are stored.
STORED_TOLERANCE = 2e-2


class SegmenterGraph(nn.Module):
    """image f32 [N, 1, S, S] in 0..1 → f32 [N, 1, S, S] each: probability of lung, and opacity and grade of a network
    that finds them; see `networks.maps_of`. The networks take 0..1 as it is."""

    def __init__(self, network: nn.Module, maps: Sequence[str] = ("probability",)) -> None:
        super().__init__()
        self.network, self.maps = network, tuple(maps)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found = self.network(image).split(1, 1)
        return tuple(
            map_ if name == "grade" else torch.sigmoid(map_) for name, map_ in zip(self.maps, found, strict=True)
        )


class ClassifierGraph(nn.Module):
    """image f32 [N, 1, S, S] in 0..1 → logits f32 [N, K] and cam f32 [N, K, h, w], with mean(cam) + bias = logits.

    The head is a linear layer on averaged features, so that applying it at every place before averaging gives the map
    of Grad-CAM up to a positive constant (Selvaraju et al. 2017, section 3; Zhou et al. 2016) without a backward pass.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network, self.name = network, name

    @property
    def head(self) -> nn.Linear:
        return head_of(self.network, self.name)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        cam = nn.functional.conv2d(features(self.network, image), self.head.weight[:, :, None, None])
        return cam.mean((2, 3)) + self.head.bias, cam


@dataclass(frozen=True)
class Trained:
    """Weights of a run and the facts beside them."""

    weights: Path
    facts: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Trained:
        """`path`: a run's folder or its `.safetensors`. Raises BundleError where there is none."""
        weights = path / "weights.safetensors" if path.is_dir() else path
        facts = weights.with_suffix(".json")
        if not weights.is_file() or not facts.is_file():
            raise BundleError(f"{path}: expected a finished training run with weights.safetensors and weights.json")
        return cls(weights, json.loads(facts.read_text()))

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> list[Trained]:
        """The segmenters of a finished bundle, as they are stored, each with the facts of its run and the bundle's
        limits of opacity and of grades."""
        spec, runs = bundle.segmenter, bundle.manifest.get("training", {}).get("runs", [])
        known = [*runs[: len(spec.members)], *({} for _ in spec.members)]
        limits: dict[str, Any] = {} if spec.opaque is None else {"opaque": spec.opaque}
        limits |= {} if spec.grades is None else {"grades": list(spec.grades)}
        return [
            cls(member.path, {**run, "network": member.network, "size": spec.size, **limits})
            for member, run in zip(spec.members, known, strict=False)
        ]

    @classmethod
    def classifier_of(cls, bundle: Bundle) -> Trained:
        """The classifier of a finished bundle, as it is stored, with the facts of its run. Raises BundleError where
        there is none."""
        spec = bundle.classifier
        if spec is None:
            raise BundleError(f"bundle {bundle.name!r} has no classifier")
        runs = bundle.manifest.get("training", {}).get("runs", [])
        view = view_facts(spec.view)
        known = {"network": spec.weights.network, "labels": list(spec.labels), **view}
        return cls(spec.weights.path, {**(runs[-1] if runs else {}), **known})


def parity_films(data: Sequence[tuple[Store, Split]]) -> NDArray[np.float32]:
    """Films f32 [N, 1, S, S] in 0..1 on which torch and the runtime must agree, evenly from the validation parts.
    Raises DataError where these have none."""
    films = []
    for store, split in data:
        chosen = split.select(store, "val")
        step = max(1, len(chosen) * len(data) // PARITY_FILMS)
        films += [store.images[i] for i in chosen[::step]]
    if not films:
        raise DataError("these stores have no validation film. Make the split again with a share for val")
    return np.stack(films)[:, None].astype(np.float32) / np.float32(255)


def to_onnx(graph: nn.Module, size: int, path: Path, outputs: list[str]) -> None:
    """Write `graph` as ONNX with input "image" f32 [N, 1, size, size], N free.

    Parameters stay as they are under their own names, nothing folded into anything (the runtime does that when it
    compiles), so that training can go on from the file: see `weights.load_weights`.
    """
    example = torch.rand(2, 1, size, size)
    with torch.no_grad():
        torch.onnx.export(
            graph.eval(),
            (example,),
            path,
            input_names=["image"],
            output_names=outputs,
            opset_version=OPSET,
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            dynamic_axes={name: {0: "N"} for name in ["image", *outputs]},
        )


def store_as_f16(path: Path) -> None:
    """Rewrite an ONNX file with its f32 matrices and kernels stored as f16 and cast back when the graph is loaded;
    half the bytes. Vectors stay f32: the variance of a batch-norm layer can be too small for f16."""
    model = onnx.load(path)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        name, stored = tensor.name, f"{tensor.name}{HALF}"
        half = numpy_helper.to_array(tensor).astype(np.float16)
        if not np.isfinite(half).all():
            raise BundleError(f"{path.name}: a weight of {name} is too large for f16; export it with f32 weights")
        tensor.CopyFrom(numpy_helper.from_array(half, stored))
        casts.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
    for node in reversed(casts):
        model.graph.node.insert(0, node)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def parity(graph: nn.Module, path: Path, films: NDArray[np.float32], outputs: list[str]) -> dict[str, float]:
    """Largest absolute difference of each output between torch and the runtime in f32 on `films` f32 [N, 1, S, S]."""
    with torch.no_grad():
        reference = graph.eval()(torch.from_numpy(films))
    reference = [reference] if isinstance(reference, Tensor) else list(reference)
    found = Runtime("cpu", "f32").compile(path, outputs=tuple(outputs))({"image": films})
    return {
        name: float(np.abs(found[name] - expected.numpy()).max())
        for name, expected in zip(outputs, reference, strict=True)
    }


def export_graph(graph: nn.Module, path: Path, films: NDArray[np.float32], outputs: list[str]) -> dict[str, float]:
    """Export, gate in f32, and store weights as f16 where that passes a gate, too, else as they are. Returns the
    differences; raises BundleError where the runtime computes the graph differently from torch."""
    to_onnx(graph, films.shape[-1], path, outputs)
    exact = parity(graph, path, films, outputs)
    # Maps and logits have no fixed range; the tolerance is a share of what they span on these films.
    spans = {name: _span(graph, films, outputs, name) for name in outputs}
    for name, span in spans.items():
        if not exact[name] <= TOLERANCE * span:
            raise BundleError(
                f"{path.name}: runtime and torch differ by {exact[name]:.2g} in {name}; the gate is {TOLERANCE}"
            )
    whole = path.read_bytes()
    store_as_f16(path)
    stored = parity(graph, path, films, outputs)
    if wide := [name for name, span in spans.items() if not stored[name] <= STORED_TOLERANCE * span]:
        changes = ", ".join(f"{name} by {stored[name]:.2g}" for name in wide)
        log.warning("%s: stored as f32; f16 would change %s, the gate is %g", path.name, changes, STORED_TOLERANCE)
        path.write_bytes(whole)
        stored = exact
    return {f"{name}_f32": exact[name] for name in outputs} | {f"{name}_stored": stored[name] for name in outputs}


def _span(graph: nn.Module, films: NDArray[np.float32], outputs: list[str], name: str) -> float:
    with torch.no_grad():
        result = graph(torch.from_numpy(films))
    output = result if isinstance(result, Tensor) else result[outputs.index(name)]
    return max(1.0, float(output.max() - output.min()))


@contextmanager
def in_place_of(out: Path) -> Iterator[Path]:
    """Where a bundle's folder is to be made, which takes the place of `out` when the block ends without an error.
    Raises BundleError where `out` is there and is no bundle."""
    if out.exists() and not (out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))):
        raise BundleError(f"{out} exists and is no bundle (no {MANIFEST}), so it is not replaced. Name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".bundle-") as scratch:
        folder = Path(scratch) / "bundle"
        yield folder
        if out.exists():
            out.replace(Path(scratch) / "before")  # goes with the scratch folder, once the new one stands
        folder.replace(out)


def export_bundle(
    segmenters: list[Trained],
    classifier: Trained | None,
    out: Path,
    *,
    films: NDArray[np.float32],
    name: str,
    version: str,
    pool: str = "mean",
    threshold: float = 0.5,
    segmenter_size: int | None = None,
    mirror: float = 0.0,
    papers: dict[str, str] | None = None,
) -> Bundle:
    """Write a bundle to `out`, replacing one that is there, and return it as the package itself loads it.

    films: f32 [N, 1, S, S] in 0..1, real ones, for the parity gates; resized to each network's grid.
    pool, threshold: see `SegmenterSpec`. mirror: see `ClassifierSpec`. papers: further text files by name (data card,
    metrics, licence). Raises BundleError where a gate fails.
    """
    with in_place_of(out) as folder:
        folder.mkdir()
        differences: dict[str, Any] = {
            "films": len(films),
            "tolerance_f32": TOLERANCE,
            "tolerance_stored": STORED_TOLERANCE,
        }
        size = segmenter_size or _one_size(segmenters)
        members = []
        for number, trained in enumerate(segmenters, 1):
            network = build_segmenter(trained.facts["network"])
            load_weights(network, trained.weights)
            file = "segmenter.onnx" if len(segmenters) == 1 else f"segmenter-{number}.onnx"
            maps = maps_of(trained.facts["network"])
            differences[file] = export_graph(SegmenterGraph(network, maps), folder / file, _resized(films, size), maps)
            members.append({"network": trained.facts["network"], "file": file})
        document: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "name": name,
            "version": version,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "licence": "Research use only; see LICENCE and DATA_CARD.md",
            "disclaimer": DISCLAIMER,
            "files": {},
            "segmenter": {"members": members, "pool": pool, "threshold": threshold, "size": size, "labels": ["lung"]},
            "classifier": None,
        }
        if all(finds_opacity(trained.facts["network"]) for trained in segmenters):
            document["segmenter"]["opaque"] = segmenters[0].facts.get("opaque", OPAQUE)
        # Limits are of one network's grades.
        if len(segmenters) == 1 and finds_grade(segmenters[0].facts["network"]):
            document["segmenter"]["grades"] = segmenters[0].facts["grades"]
        if classifier is not None:
            document["classifier"], differences["classifier.onnx"] = _export_classifier(
                classifier, folder / "classifier.onnx", films, mirror
            )
        for paper, text in (papers or {}).items():
            write_text(folder / paper, text)
        runs = [*segmenters, classifier] if classifier else segmenters
        document["parity"] = differences
        document["training"] = {
            # What comes out of a bundle has the digest of the run that it was first exported from.
            "runs": [{"weights_sha256": sha256_of(run.weights), **run.facts} for run in runs]
        }
        if classifier is not None:
            finders = {
                member["file"]: same_lungs(sha256_of(folder / member["file"]), trained.facts)
                for member, trained in zip(members, segmenters, strict=True)
            }
            lungs = lung_facts(pool, threshold, size)
            same = saw_one_of(classifier.facts.get("segmenter", {}), finders)
            same = same and classifier.facts.get("lungs", lungs) == lungs
            document["training"]["classifier_saw_lungs_of_this_segmenter"] = same
            if not same:
                log.warning("the classifier was trained on lungs that another segmenter, or this one otherwise, found")
        document["files"] = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
        (folder / MANIFEST).write_text(json.dumps(document, indent=2) + "\n")
        Bundle.load(folder)
    return Bundle.load(out)


def _one_size(segmenters: Sequence[Trained]) -> int:
    """The side that all segmenters were trained at."""
    sizes = sorted({int(trained.facts["size"]) for trained in segmenters})
    if len(sizes) > 1:
        raise BundleError(
            f"an ensemble has one grid, and its segmenters were trained at sides of {', '.join(map(str, sizes))}. Say "
            "which with --segmenter-size"
        )
    return sizes[0]


def amend_bundle(
    bundle: Bundle,
    *,
    opaque: float | None = None,
    healthy: dict[str, int] | None = None,
    temperature: float | None = None,
    conformal: Conformal | None = None,
    files: dict[str, str] | None = None,
    precision: dict[str, Any] | None = None,
) -> Bundle:
    """Put what was measured on a bundle into it: limit of opacity, calibration and precisions into the manifest, text
    files beside it. Returns it, reloaded.

    healthy: on how many films and zones the limit of opacity was fitted.
    precision: as the manifest has it; its quantisation files lie in the bundle's folder already.
    """
    document = json.loads(json.dumps(bundle.manifest))
    if bundle.classifier is None and (temperature is not None or conformal is not None):
        raise BundleError(f"bundle {bundle.name!r} has no classifier to calibrate")
    if opaque is not None:
        document["segmenter"]["opaque"] = opaque
        document["training"]["healthy"] = healthy
    if temperature is not None:
        document["classifier"]["temperature"] = temperature
    if conformal is not None:
        document["classifier"]["conformal"] = _conformal(conformal)
    for name, text in (files or {}).items():
        write_text(bundle.root / name, text)
        document["files"][name] = sha256_of(bundle.root / name)
    if precision is not None:
        for name in document.get("precision", {"int8": {}})["int8"].values():
            document["files"].pop(name, None)
        document["precision"] = precision
        document["files"] |= {name: sha256_of(bundle.root / name) for name in precision["int8"].values()}
    write_text(bundle.root / MANIFEST, json.dumps(document, indent=2) + "\n")
    return Bundle.load(bundle.root)


def _export_classifier(
    trained: Trained, path: Path, films: NDArray[np.float32], mirror: float
) -> tuple[dict[str, Any], dict[str, float]]:
    facts = trained.facts
    size, labels, name = int(facts["size"]), list(facts["labels"]), facts["network"]
    network = build_classifier(name, classes=len(labels), size=size)
    load_weights(network, trained.weights)
    graph = ClassifierGraph(network.eval(), name)
    _gate_logits(network, graph, _resized(films, size))
    differences = export_graph(graph, path, _resized(films, size), ["logits", "cam"])
    view = view_of(facts)
    return {
        "network": name,
        "file": path.name,
        "labels": labels,
        "bias": graph.head.bias.tolist(),
        "view": asdict(view),
        "temperature": 1.0,
        "conformal": None,
        "mirror": mirror,
    }, differences


def _conformal(conformal: Conformal) -> dict[str, Any]:
    return {"coverage": conformal.coverage, "thresholds": list(conformal.thresholds)}


def _gate_logits(network: nn.Module, graph: ClassifierGraph, films: NDArray[np.float32]) -> None:
    """The map's mean plus bias must be what the network itself answers; it is not where a head is more than linear."""
    x = torch.from_numpy(films)
    with torch.no_grad():
        own, summed = network(x), graph(x)[0]
    difference, span = float((own - summed).abs().max()), max(1.0, float(own.max() - own.min()))
    if not difference <= TOLERANCE * span:
        raise BundleError(
            f"{graph.name}: its logits differ by {difference:.2g} from its map's mean plus bias; the gate is "
            f"{TOLERANCE}. Its head is not one linear layer on averaged features"
        )


def _resized(films: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    x = torch.from_numpy(films)
    resized: NDArray[np.float32] = nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True).numpy()
    return resized
