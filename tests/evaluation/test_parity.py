"""Agreement counts what differs, and leaves out what could not be compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bundles import seal, write_bundle, write_classifier
from films import draw, save
from lungscope.evaluation.parity import agreement
from lungscope.pipeline import Analyzer
from lungscope.radiograph import Pixels
from lungscope.stages.segmentation import Mask


def test_agreement_counts_what_differs(tmp_path: Path) -> None:
    root = write_bundle(tmp_path / "bundle")
    write_classifier(root / "classifier.onnx", offset=(0, 0, 0))  # a class whose map is not the same everywhere
    seal(root, json.loads((root / "manifest.json").read_text()))
    analyzer = Analyzer(root)
    sick = draw(opacities=[(0.4, 0.28, 0.2), (0.6, 0.72, 0.2)])
    films = [save(tmp_path / f"{n}.png", sick) for n in range(4)]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no film")
    report = analyzer.analyze(films[0])
    assert report.classification is not None and report.saliency is not None
    label, mask, cam = report.classification.label, report.lungs.mask, report.saliency.map
    half = mask.copy()
    half[np.arange(mask.shape[0]) % 2 == 0] = False

    def reference(path: Path) -> tuple[str, Mask, Pixels]:
        n = int(path.stem)
        return "another" if n == 1 else label, half if n == 2 else mask, np.zeros_like(cam) if n == 3 else 2 * cam

    steps: list[tuple[int, int]] = []
    found = agreement(analyzer, reference, [*films, broken], lambda *step: steps.append(step))
    assert (found["films"], found["failed"], found["same_class"]) == (4, 1, 0.75)
    assert [(row["film"], row["reference"]) for row in found["other_class"]] == [("1.png", "another")]
    expected = 2 * half.sum() / (half.sum() + mask.sum())
    assert found["dice"]["lowest"] == pytest.approx(expected)
    assert found["dice"]["mean"] == pytest.approx((3 + expected) / 4)
    assert found["correlation"] == {
        "n": 3,
        "mean": pytest.approx(1, abs=1e-5),
        "p1": pytest.approx(1, abs=1e-5),
        "lowest": pytest.approx(1, abs=1e-5),
    }
    assert steps == [(n, 5) for n in range(1, 6)]


def test_nothing_compared_is_no_agreement(analyzer: Analyzer, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no film")
    found = agreement(analyzer, lambda path: pytest.fail("a film that failed was compared"), [broken])
    assert (found["failed"], found["same_class"], found["dice"]["mean"]) == (1, None, None)
