"""A report's JSON: complete, finite, and the same after a round trip."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from films import draw, radiograph
from lungscope.errors import DataError
from lungscope.pipeline import Analyzer
from lungscope.report import DISCLAIMER, SECTIONS, Report, plain


@pytest.fixture(scope="module")
def report(analyzer: Analyzer) -> Report:
    return analyzer.analyze(radiograph(draw(), spacing_mm=(0.4, 0.4), Modality="CR"))


def test_every_section_is_there(report: Report) -> None:
    document = report.to_json()
    assert tuple(document) == SECTIONS
    assert document["schema_version"] == "2"
    assert document["disclaimer"] == DISCLAIMER == "Research software, not a medical device. Not for diagnosis."
    assert document["image"] == {
        "height": 320,
        "width": 288,
        "spacing_mm": [0.4, 0.4],
        "spacing_origin": "PixelSpacing",
    }
    assert document["source"]["tags"] == {"Modality": "CR"}
    assert set(document["severity"]["zones"]) == set("ABCDEF")
    assert set(document["run"]["bundle"]["weights"]) == {"segmenter.onnx", "classifier.onnx"}
    stages = ["quality", "segmentation", "classification", "localization", "severity"]
    assert list(document["run"]["timings_ms"]) == stages


def test_round_trip(report: Report) -> None:
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    summary = Report.from_json(document)
    assert summary.to_json() == document == report.to_json()
    assert summary.classification is not None
    assert summary.classification["label"] == "Normal"


def test_other_schemas_and_parts_of_a_report_are_refused(report: Report) -> None:
    document = report.to_json()
    with pytest.raises(DataError, match="schema_version '9'"):
        Report.from_json(document | {"schema_version": "9"})
    del document["lungs"]
    with pytest.raises(DataError, match="lungs missing"):
        Report.from_json(document)


def test_numbers_that_are_not_finite_become_null(report: Report) -> None:
    saliency = report.saliency
    assert saliency is not None
    odd = replace(report, saliency=replace(saliency, fraction_in_lungs=float("nan")))
    assert odd.to_json()["saliency"]["fraction_in_lungs"] is None
    assert plain({"a": (np.float32(np.inf), np.int64(3), np.bool_(True), 1.23456789, -0.0)}) == {
        "a": [None, 3, True, 1.23457, 0.0]
    }
