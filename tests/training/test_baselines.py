"""What lungscope is measured beside finds the same lungs and the same class with the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lungscope.bundle import Bundle
from lungscope.cli.analyze import demo_film
from lungscope.evaluation.parity import agreement
from lungscope.pipeline import Analyzer
from lungscope.training.baselines import Eager, graphs


@pytest.mark.slow
def test_the_eager_pipeline_agrees(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_grad_cam", reason="pip install grad-cam")
    pytest.importorskip("data_store", reason="the extra 'demo' (pydicom-data) is not installed")
    bundle = Bundle.load()
    found = agreement(Analyzer(bundle, device="cpu"), Eager(bundle).analyze, [demo_film()])
    assert (found["films"], found["failed"], found["same_class"]) == (1, 0, 1)
    assert found["dice"]["lowest"] > 0.995
    # Theirs is stretched to 0..1 over the view, ours is in logit units: the same but for the scale.
    assert found["correlation"]["lowest"] > 0.97
    image = np.random.default_rng(0).random((1, 1, bundle.segmenter.size, bundle.segmenter.size), dtype=np.float32)
    found = {name: make(bundle.segmenter.members[0].path)(image) for name, make in graphs(bundle).items()}
    if "ONNX Runtime" in found:
        expected = found["eager PyTorch"].sigmoid().numpy()
        np.testing.assert_allclose(found["ONNX Runtime"][0], expected, atol=0.02)
