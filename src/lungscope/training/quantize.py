"""int8 by NNCF's post-training quantisation, and the gates of the precisions that this machine computes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungscope import quantization
from lungscope.bundle import Bundle
from lungscope.data.split import Split
from lungscope.data.store import Store
from lungscope.errors import DataError, UsageError
from lungscope.evaluation.gate import evenly, find_margin, measure_gate
from lungscope.hardware import cores
from lungscope.pipeline import Analyzer
from lungscope.precision import CAPABILITIES
from lungscope.radiograph import Geometry
from lungscope.report import Report
from lungscope.stages.classification import lung_view
from lungscope.training.export import amend_bundle

#: Films that ranges are measured on.
FILMS = 200
#: Films that the margin of a precision is measured on: it is set by one film in 200.
MARGIN_FILMS = 1000

Images = NDArray[np.float32]


def quantize_bundle(bundle: Bundle, data: Sequence[tuple[Store, Split]], *, films: int = FILMS) -> Bundle:
    """Quantise every graph of `bundle` on about `films` films of the training parts, and put the files into it.
    Returns it, reloaded; the gate of int8 is to be measured then. Raises DataError where no film can be used."""
    segmented, classified = calibration_images(bundle, data, films)
    gates = {name: gate for name, gate in _gates(bundle).items() if name != "int8"}
    files = {}
    with TemporaryDirectory(dir=bundle.root.parent, prefix=".quantize-") as scratch:
        for weights in bundle.weights:
            images = segmented if weights in bundle.segmenter.members else classified
            name = weights.path.stem + quantization.SUFFIX
            quantization.save(quantize_graph(weights.path, images), Path(scratch) / name)
            files[weights.path.name] = name
        for name in files.values():
            (Path(scratch) / name).replace(bundle.root / name)
    return amend_bundle(bundle, precision={"int8": files, "gates": gates})


def measure_gates(
    bundle: Bundle,
    data: Sequence[tuple[Store, Split]],
    *,
    limit: int | None = None,
    device: str = "auto",
    begin: Callable[[str], Callable[[int, int], None] | None] = lambda precision: None,
) -> Bundle:
    """Measure every precision that `device` computes natively on the validation parts and put the gates into the
    manifest, beside those that were measured elsewhere. Returns the bundle, reloaded.

    begin: called with the name of each part of it; what it returns is told how many films are done, and of how many.
    Raises UsageError for a device that does not exist.
    """
    Analyzer(bundle, device=device, precision="f32")
    for precision in CAPABILITIES:
        if precision == "f32" or (precision == "int8" and not bundle.offered.quantised):
            continue
        try:
            Analyzer(bundle, device=device, precision=precision)
        except UsageError:  # not native here
            continue
        margin = 0.0
        if bundle.classifier is not None:
            told = begin(f"{precision}, margin")
            margin = find_margin(bundle, precision, data, limit or MARGIN_FILMS, device=device, progress=told)
        gate, measured = measure_gate(
            bundle, precision, data, margin=margin, limit=limit, device=device, progress=begin(precision)
        )
        section = bundle.manifest.get("precision", {"int8": {}})
        gates = _gates(bundle) | {precision: gate.to_json() | {"measured": measured}}
        bundle = amend_bundle(bundle, precision={"int8": section["int8"], "gates": gates})
    return bundle


def calibration_images(bundle: Bundle, data: Sequence[tuple[Store, Split]], films: int) -> tuple[Images, Images]:
    """What the networks see of about `films` films, evenly from the training parts, f32 [N, 1, S, S] in 0..1: the
    segmenters, and the classifier (N = 0 without one; where there are labels, of labelled films alone)."""
    analyzer = Analyzer(replace(bundle, classifier=None), precision="f32", streams=cores())
    whole, cut = [], []
    for store, split in data:
        records = [store.records[i] for i in evenly(split.select(store, "train"), max(1, films // len(data)))]
        for record, report in zip(records, analyzer.analyze_many(map(store.path_of, records)), strict=True):
            if not isinstance(report, Report):
                continue
            geometry = Geometry.of_film(report.film.pixels, bundle.segmenter.size)
            whole.append(geometry.to_network(report.film.pixels))
            if bundle.classifier is not None and record.label in bundle.classifier.labels:
                cut.append(lung_view(report.film.pixels, report.lungs, bundle.classifier.view)[0])
    if not whole or (bundle.classifier is not None and not cut):
        raise DataError(
            "No film of the training parts can be used to quantise with. Name a store that has labelled ones"
        )
    return _stacked(whole), _stacked(cut)


def _stacked(images: list[Images]) -> Images:
    return np.stack(images)[:, None] if images else np.zeros((0, 1, 1, 1), np.float32)


def quantize_graph(path: Path, images: Images) -> quantization.Quantization:
    """Quantise an ONNX file over the ranges that its values take on `images`, f32 [N, 1, S, S].

    Weights take half of int8's range: sums of pairs then fit into the 16 bits that processors without VNNI have, where
    they would saturate (NNCF's OverflowFix).
    """
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    model = quantization.read(path)
    attention = any(node.get_type_name() == "Softmax" for node in model.get_ordered_ops())
    with redirect_stdout(sys.stderr):  # its bars; standard output is the command's
        quantised = nncf.quantize(
            model,
            nncf.Dataset([{"image": image[None]} for image in images]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(images),
            model_type=nncf.ModelType.TRANSFORMER if attention else None,
            ignored_scope=nncf.IgnoredScope(names=_after_map(model)),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE,
                disable_bias_correction=attention,
                backend_params={"compress_weights": False},
            ),
        )
    return quantization.difference(model, quantised)


def _after_map(model: Any) -> list[str]:
    """What makes logits of a classifier's map: rounded there, they would not be the map's mean plus bias any longer."""
    todo = [port.get_node().input_value(0) for port in model.outputs if "cam" in port.get_names()]
    names: dict[str, None] = {}
    while todo:
        for target in todo.pop().get_target_inputs():
            node = target.get_node()
            if node.get_type_name() != "Result":
                names[node.get_friendly_name()] = None
                todo += node.outputs()
    return list(names)


def _gates(bundle: Bundle) -> dict[str, Any]:
    gates: dict[str, Any] = bundle.manifest.get("precision", {"gates": {}})["gates"]
    return gates
