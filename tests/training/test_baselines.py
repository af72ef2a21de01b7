"""What lungscope is measured beside finds the same lungs and the same class with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lungscope.bundle import Bundle
from lungscope.cli.analyze import demo_film
from lungscope.pipeline import Analyzer
from lungscope.training.baselines import Eager, graphs
from lungscope.training.networks import finds_grade
from programs import program


@pytest.mark.slow
def test_the_eager_pipeline_agrees(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_grad_cam", reason="pip install grad-cam")
    pytest.importorskip("data_store", reason="the extra 'demo' (pydicom-data) is not installed")
    bundle = Bundle.load()
    report = Analyzer(bundle, device="cpu").analyze(demo_film())
    label, mask, cam = Eager(bundle).analyze(demo_film())
    assert report.classification is not None and report.saliency is not None
    assert label == report.classification.label
    both = np.count_nonzero(mask & report.lungs.mask)
    assert 2 * both / (np.count_nonzero(mask) + np.count_nonzero(report.lungs.mask)) > 0.995
    # Theirs is stretched to 0..1 over the view, ours is in logit units: the same but for the scale.
    assert np.corrcoef(cam[mask], report.saliency.map[mask])[0, 1] > 0.97
    image = np.random.default_rng(0).random((1, 1, bundle.segmenter.size, bundle.segmenter.size), dtype=np.float32)
    found = {name: make(bundle.segmenter.members[0].path)(image) for name, make in graphs(bundle).items()}
    if "ONNX Runtime" in found:
        # Grades alone are no logits.
        *logits, grade = found["eager PyTorch"].split(1, 1)
        expected = np.concatenate([*(map_.sigmoid().numpy() for map_ in logits), grade.numpy()], axis=1)
        assert finds_grade(bundle.segmenter.members[0].network) and len(logits) == 2
        np.testing.assert_allclose(np.concatenate(found["ONNX Runtime"], axis=1), expected, atol=0.02)


@pytest.mark.slow
def test_the_command_measures_it_in_turn(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_grad_cam", reason="pip install grad-cam")
    pytest.importorskip("data_store", reason="the extra 'demo' (pydicom-data) is not installed")
    done = program("benchmark", "runtime", "--film", demo_film(), "--repeats", "1", "--films", "1", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runtime.json").read_text())
    name = demo_film().name
    assert set(result["single_films"][name]["latency_ms"]) == {"lungscope", "eager PyTorch"}
    beside = [set(run.get("beside", ())) for run in result["batches"].values()]
    assert {"eager PyTorch"} in beside and beside.count(set()) == 1, "where nothing but a table is written"
    runs = {f"lungscope analyze, {name}, first start": 1, f"lungscope analyze, {name}": 3, f"eager PyTorch, {name}": 3}
    assert {process: found["starts"] for process, found in result["processes"].items()} == runs
    assert all("eager PyTorch" in graph["ms"] for graph in result["networks"]["graphs"].values())
