"""Small real bundles: ONNX graphs written by hand, so that tests run the same runtime as the shipped weights do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lungscope import quantization
from lungscope.bundle import Bundle
from lungscope.quantization import Quantization, Quantizer

LABELS = ("COVID-19", "Normal", "Viral Pneumonia")
SIZE = 64
CELLS = 8
#: cam_k = SLOPE_k * (mean grey of the cell) + OFFSET_k; logit_k = mean(cam_k) + BIAS_k.
SLOPE = (30.0, 0.0, 2.0)
OFFSET = (-4.0, 1.0, -1.0)
BIAS = (-0.5, 1.0, -0.25)
#: The segmenter calls lung what is darker than this, over a 5 x 5 neighbourhood, and the film's mere edge is not.
DARK = 0.55


def write_segmenter(
    path: Path,
    *,
    dark: float = DARK,
    steep: float = 40,
    size: int = SIZE,
    opacity: bool = False,
    grade: bool = False,
) -> None:
    """probability = sigmoid(steep * (dark - mean of the 5 x 5 neighbourhood)); steep < 0 takes what is bright.
    opacity, grade: that mean itself, where asked for."""
    nodes = [
        helper.make_node("AveragePool", ["image"], ["smooth"], kernel_shape=[5, 5], pads=[2, 2, 2, 2]),
        helper.make_node("Sub", ["dark", "smooth"], ["below"]),
        helper.make_node("Mul", ["below", "steep"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["probability"]),
    ]
    outputs = {"probability": ["N", 1, size, size]}
    for name in ["opacity"] * opacity + ["grade"] * grade:
        nodes.append(helper.make_node("Identity", ["smooth"], [name]))
        outputs[name] = ["N", 1, size, size]
    _save(path, nodes, {"dark": np.float32(dark), "steep": np.float32(steep)}, size, outputs)


def write_classifier(
    path: Path,
    *,
    slope: Sequence[float] = SLOPE,
    offset: Sequence[float] = OFFSET,
    bias: Sequence[float] = BIAS,
    size: int = SIZE,
) -> None:
    """cam = 1 x 1 convolution of the cells' mean grey; logits = mean(cam) + bias."""
    cell = size // CELLS
    nodes = [
        helper.make_node("AveragePool", ["image"], ["cells"], kernel_shape=[cell, cell], strides=[cell, cell]),
        helper.make_node("Conv", ["cells", "slope", "offset"], ["cam"], kernel_shape=[1, 1]),
        helper.make_node("ReduceMean", ["cam"], ["/mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Add", ["/mean", "bias"], ["logits"]),
    ]
    weights = {
        "slope": np.asarray(slope, np.float32).reshape(-1, 1, 1, 1),
        "offset": np.asarray(offset, np.float32),
        "bias": np.asarray(bias, np.float32),
    }
    classes = len(slope)
    _save(path, nodes, weights, size, {"logits": ["N", classes], "cam": ["N", classes, CELLS, CELLS]})


def write_bundle(
    root: Path,
    *,
    darks: Sequence[float] = (DARK,),
    pool: str = "mean",
    threshold: float = 0.5,
    classifier: bool = True,
    labels: Sequence[str] = LABELS,
    thresholds: Sequence[float] | None = (0.5, 0.5, 0.5),
    temperature: float = 1.0,
    crop: bool = True,
    steep: float = 40,
    opacity: bool = False,
    grades: Sequence[float] | None = None,
) -> Path:
    """Write a whole, valid bundle with one segmenter for each of `darks` (its own notion of dark)."""
    root.mkdir(parents=True, exist_ok=True)
    members = []
    for number, dark in enumerate(darks):
        name = f"segmenter{number}.onnx" if number else "segmenter.onnx"
        write_segmenter(root / name, dark=dark, steep=steep, opacity=opacity, grade=grades is not None)
        members.append({"network": f"threshold-{dark}", "file": name})
    document: dict[str, Any] = {
        "schema_version": "3",
        "name": "tiny",
        "version": "0.1.0",
        "created": "2026-01-01T00:00:00Z",
        "licence": "Apache-2.0",
        "disclaimer": "For tests.",
        "files": {},
        "segmenter": {"members": members, "pool": pool, "threshold": threshold, "size": SIZE, "labels": ["lung"]},
        "classifier": None,
    }
    if opacity:
        document["segmenter"]["opaque"] = 0.1
    if grades is not None:
        document["segmenter"]["grades"] = list(grades)
    if classifier:
        write_classifier(root / "classifier.onnx")
        document["classifier"] = {
            "network": "cells",
            "file": "classifier.onnx",
            "labels": list(labels),
            "bias": list(BIAS),
            "view": {"input": "lungs", "crop": crop, "margin": 0.05, "size": SIZE},
            "temperature": temperature,
            "conformal": None if thresholds is None else {"coverage": 0.9, "thresholds": list(thresholds)},
        }
    (root / "LICENCE").write_text("Apache-2.0\n", encoding="utf-8")
    seal(root, document)
    return root


def seal(root: Path, document: dict[str, Any]) -> None:
    """Write `document` as the manifest, with the digests of the files that lie beside it."""
    files = sorted(path for path in root.iterdir() if path.name != "manifest.json")
    document["files"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (root / "manifest.json").write_text(json.dumps(document), encoding="utf-8")


def _save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, np.float32 | NDArray[np.float32]],
    size: int,
    outputs: dict[str, list[str | int]],
) -> None:
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, size, size])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def with_int8(root: Path, *, darkest: float = 0, logits: tuple[float, float, float] | None = None) -> Bundle:
    """A tiny bundle whose int8 sees no grey below `darkest` when it segments, and has other biases if asked for."""
    write_bundle(root)
    smooth = Quantizer((("smooth", 0),), 256, np.float32(darkest), np.float32(1))
    quantization.save(Quantization((smooth,), {}), root / "segmenter.int8.npz")
    biases = {} if logits is None else {("logits", 1): np.float32(logits)}
    quantization.save(Quantization((), biases), root / "classifier.int8.npz")
    document = json.loads((root / "manifest.json").read_text())
    document["precision"] = {
        "int8": {"segmenter.onnx": "segmenter.int8.npz", "classifier.onnx": "classifier.int8.npz"},
        "gates": {},
    }
    seal(root, document)
    return Bundle.load(root)
