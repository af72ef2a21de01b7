"""A bundle is written whole, gated, and loaded by the package as users load it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from bundles import seal, write_bundle
from films import draw, radiograph
from lungscope.bundle import Bundle
from lungscope.cli.export import _answering
from lungscope.errors import BundleError, DataError
from lungscope.pipeline import Analyzer
from lungscope.stages.classification import Conformal
from lungscope.training.export import (
    STORED_TOLERANCE,
    TOLERANCE,
    Trained,
    amend_bundle,
    export_bundle,
    export_graph,
    in_place_of,
    parity,
    store_as_f16,
    to_onnx,
)
from lungscope.training.networks import build_segmenter
from lungscope.training.views import lung_facts
from lungscope.training.weights import save_weights
from nets import SMALL, awake_classifier, trained_segmenter

LABELS = ["COVID-19", "Normal", "Viral Pneumonia"]
SIZE = 64


class Dark(nn.Module):
    """Calls lung what is dark, as a network of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 17, padding=8)
        with torch.no_grad():
            self.conv.weight.fill_(0)
            self.conv.weight[0, 0, 8, 8] = -40
            self.conv.bias.fill_(20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.sigmoid(self.conv(x))
        return output


def films(n: int = 4) -> np.ndarray:
    return np.random.default_rng(0).random((n, 1, SIZE, SIZE), np.float32)


def trained_classifier(folder: Path, name: str) -> Trained:
    facts = {
        "network": name,
        "size": SMALL[name],
        "labels": LABELS,
        "shown": "lungs",
        "crop": True,
        "margin": 0.05,
        "equalised": False,
        "aligned": False,
    }
    save_weights(awake_classifier(name, SMALL[name]), folder / "weights.safetensors", facts)
    return Trained.open(folder)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained.open(trained_segmenter(tmp_path_factory.mktemp("segmenter"), SIZE))


@pytest.fixture(scope="module", params=["resnet50", "coatnet0"])
def bundle(request: pytest.FixtureRequest, segmenter: Trained, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("export")
    classifier = trained_classifier(root / "run", request.param)
    return export_bundle(
        [segmenter], classifier, root / "bundle", films=films(), name="test", version="1.2.3",
        papers={"DATA_CARD.md": "# Data\n"},
    )  # fmt: skip


def test_a_bundle_says_what_it_is(bundle: Bundle) -> None:
    assert (bundle.name, bundle.version) == ("test", "1.2.3")
    assert set(bundle.files) == {"segmenter.onnx", "classifier.onnx", "DATA_CARD.md"}
    assert bundle.classifier is not None
    assert bundle.classifier.labels == tuple(LABELS)
    np.testing.assert_allclose(bundle.classifier.bias, np.linspace(-0.5, 0.8, 3), atol=1e-6)
    view = bundle.classifier.view
    assert (view.input, view.crop, view.margin, view.size) == ("lungs", True, 0.05, SIZE)
    assert [run["network"] for run in bundle.manifest["training"]["runs"]] == [
        "fpn-mobilenetv2", bundle.classifier.weights.network,
    ]  # fmt: skip
    assert sorted(path.name for path in bundle.root.parent.iterdir()) == ["bundle", "run"], "no scratch is left"


def test_parity_is_measured_and_kept(bundle: Bundle) -> None:
    parity = bundle.manifest["parity"]
    assert parity["films"] == 4
    for file, outputs in (("segmenter.onnx", ["probability"]), ("classifier.onnx", ["logits", "cam"])):
        for name in outputs:
            assert 0 <= parity[file][f"{name}_f32"] < 0.1
            assert parity[file][f"{name}_stored"] > 0, "f16 rounds something"


def test_a_segmenter_that_finds_opacity_is_a_bundle_that_does(tmp_path: Path) -> None:
    name = "linknet-efficientnetlite2-opacity"
    torch.manual_seed(0)
    save_weights(build_segmenter(name), tmp_path / "weights.safetensors", {"network": name, "size": SIZE})
    run = Trained.open(tmp_path)
    bundle = export_bundle([run], None, tmp_path / "bundle", films=films(), name="test", version="1.0.0")
    assert bundle.segmenter.opaque == 0.1
    assert amend_bundle(bundle, opaque=0.2).segmenter.opaque == 0.2
    assert set(bundle.manifest["parity"]["segmenter.onnx"]) == {
        f"{output}_{how}" for output in ("probability", "opacity") for how in ("f32", "stored")
    }
    again = export_bundle(
        Trained.of_bundle(Bundle.load(bundle.root)),
        None,
        tmp_path / "again",
        films=films(),
        name="test",
        version="1.0.1",
    )
    assert again.segmenter.opaque == 0.2


def test_weights_are_stored_in_half_the_bytes(bundle: Bundle) -> None:
    for weights in bundle.weights:
        tensors = onnx.load(weights.path).graph.initializer
        floats = [tensor for tensor in tensors if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)]
        halves = [tensor.data_type == TensorProto.FLOAT16 for tensor in floats]
        assert halves == [len(tensor.dims) > 1 for tensor in floats], "kernels and matrices, and no vectors"
        half, whole = (
            sum(np.prod(t.dims) for t, h in zip(floats, halves, strict=True) if h == is_half)
            for is_half in (True, False)
        )
        assert half > 50 * whole


def test_an_analyzer_runs_on_it(bundle: Bundle) -> None:
    report = Analyzer(bundle, device="cpu").analyze(radiograph(draw()))
    assert report.lungs.mask.any()
    assert report.classification is not None
    assert report.classification.probabilities.sum() == pytest.approx(1)
    mean = report.classification.cam.mean((1, 2)) + report.classification.bias
    np.testing.assert_allclose(mean, report.classification.logits, atol=2e-3 * np.ptp(report.classification.cam))


def test_networks_go_from_one_bundle_into_another(bundle: Bundle, segmenter: Trained, tmp_path: Path) -> None:
    classifier = Trained.classifier_of(bundle)
    taken = Trained.of_bundle(bundle)
    again = export_bundle(taken, classifier, tmp_path / "again", films=films(), name="again", version="2")
    assert again.classifier is not None and bundle.classifier is not None
    assert (again.classifier.labels, again.classifier.view) == (bundle.classifier.labels, bundle.classifier.view)
    assert again.manifest["training"]["runs"] == bundle.manifest["training"]["runs"]
    assert [w.sha256 for w in again.segmenter.members] == [w.sha256 for w in bundle.segmenter.members]
    old, new = (Analyzer(one, device="cpu").analyze(radiograph(draw())).classification for one in (bundle, again))
    assert old is not None and new is not None
    np.testing.assert_allclose(new.logits, old.logits, rtol=1e-5, atol=1e-5)
    alone = export_bundle([segmenter], None, tmp_path / "alone", films=films(), name="alone", version="1")
    with pytest.raises(BundleError, match="'alone' has no classifier"):
        Trained.classifier_of(alone)


def test_what_comes_from_a_bundle_answers_as_there_unless_told_otherwise(tmp_path: Path) -> None:
    root = write_bundle(tmp_path / "own", darks=(0.5, 0.6), pool="vote", threshold=0.4)
    document = json.loads((root / "manifest.json").read_text())
    document["classifier"]["mirror"] = 1.0
    seal(root, document)
    silent = {"pool": None, "threshold": None, "mirror": None}
    plain = {"pool": "mean", "threshold": 0.5, "mirror": 0.0}
    own = {"pool": "vote", "threshold": 0.4}
    assert _answering([root], root, silent) == {**own, "mirror": 1.0}
    assert _answering([root], None, silent) == _answering([root], tmp_path, silent) == {**own, "mirror": 0.0}
    assert _answering([tmp_path], root, silent) == {**plain, "mirror": 1.0}
    assert _answering([root, tmp_path], None, silent) == plain
    assert _answering([root], root, plain) == plain, "what is given counts, a mirror of 0 too"
    lungs = write_bundle(tmp_path / "lungs", classifier=False)
    assert _answering([lungs], lungs, {**silent, "threshold": 0.3}) == {**plain, "threshold": 0.3}


def test_a_bundle_says_whether_its_classifier_saw_lungs_found_so(segmenter: Trained, tmp_path: Path) -> None:
    def saw(threshold: float, **lungs: object) -> bool:
        own = replace(run, facts={**run.facts, **found_by, **lungs})
        bundle = export_bundle(
            [segmenter], own, tmp_path / "bundle", films=films(1), name="a", version="1", threshold=threshold
        )
        return bool(bundle.manifest["training"]["classifier_saw_lungs_of_this_segmenter"])

    run = trained_classifier(tmp_path / "run", "resnet50")
    alone = export_bundle([segmenter], None, tmp_path / "alone", films=films(1), name="a", version="1")
    found_by = {"segmenter": {member.path.name: member.sha256 for member in alone.segmenter.members}}
    assert saw(0.4), "a run of before does not say"
    assert saw(0.4, lungs=lung_facts("mean", 0.4, SIZE))
    assert not saw(0.5, lungs=lung_facts("mean", 0.4, SIZE))


def test_a_bundle_can_be_amended_and_a_tampered_one_is_refused(bundle: Bundle) -> None:
    sets = Conformal(0.9, (0.1, 0.6, 0.3))
    amended = amend_bundle(bundle, temperature=1.5, conformal=sets, files={"metrics.json": "{}\n"})
    assert amended.classifier is not None
    assert (amended.classifier.temperature, amended.classifier.conformal) == (1.5, sets)
    assert "metrics.json" in Bundle.load(bundle.root).files
    (bundle.root / "metrics.json").write_text('{"accuracy": 1}\n')
    with pytest.raises(BundleError, match="altered"):
        Bundle.load(bundle.root)
    amend_bundle(amended, files={"metrics.json": "{}\n"})


def test_a_segmenter_alone_is_a_bundle_and_replaces_one(segmenter: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for version in ("1", "2"):
        bundle = export_bundle([segmenter], None, out, films=films(), name="test", version=version)
    assert (bundle.version, bundle.classifier) == ("2", None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(BundleError, match="no classifier"):
        amend_bundle(bundle, temperature=2.0)


def test_an_export_that_fails_leaves_the_bundle_that_was_there(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out")
    before = Bundle.load(out).manifest
    with pytest.raises(DataError, match="no films"), in_place_of(out) as folder:
        shutil.copytree(out, folder)
        (folder / "manifest.json").unlink()
        raise DataError("no films")
    assert Bundle.load(out).manifest == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_is_no_bundle_is_not_replaced(segmenter: Trained, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(BundleError, match="is no bundle"):
        export_bundle([segmenter], None, tmp_path, films=films(), name="test", version="1")
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_a_run_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="finished training run"):
        Trained.open(tmp_path)


@pytest.mark.parametrize("where", ["weight", "bias"])
def test_weights_that_are_not_numbers_are_refused(tmp_path: Path, where: str) -> None:
    graph = Dark()
    with torch.no_grad():
        getattr(graph.conv, where).view(-1)[0] = float("nan")
    with pytest.raises(BundleError):
        export_graph(graph, tmp_path / "x.onnx", films(), ["probability"])


def test_weights_too_large_for_f16_are_refused(tmp_path: Path) -> None:
    graph = Dark()
    with torch.no_grad():
        graph.conv.weight[0, 0, 0, 0] = 1e6
    to_onnx(graph, SIZE, tmp_path / "x.onnx", ["probability"])
    with pytest.raises(BundleError, match="too large for f16"):
        store_as_f16(tmp_path / "x.onnx")


def test_weights_that_f16_would_change_are_stored_as_they_are(tmp_path: Path) -> None:
    """A difference of two large weights is lost in f16."""
    graph = Dark()
    with torch.no_grad():
        graph.conv.weight.fill_(0)
        graph.conv.weight[0, 0, 8, 8] = 2048.9
        graph.conv.weight[0, 0, 8, 7] = -2048.1
        graph.conv.bias.fill_(0)
    flat = np.full((2, 1, SIZE, SIZE), 0.9, np.float32)
    to_onnx(graph, SIZE, tmp_path / "half.onnx", ["probability"])
    store_as_f16(tmp_path / "half.onnx")
    assert parity(graph, tmp_path / "half.onnx", flat, ["probability"])["probability"] > STORED_TOLERANCE
    differences = export_graph(graph, tmp_path / "x.onnx", flat, ["probability"])
    assert differences["probability_stored"] == differences["probability_f32"] <= TOLERANCE
    kinds = {tensor.data_type for tensor in onnx.load(tmp_path / "x.onnx").graph.initializer}
    assert TensorProto.FLOAT16 not in kinds


def test_a_sound_graph_passes(tmp_path: Path) -> None:
    differences = export_graph(Dark(), tmp_path / "x.onnx", films(), ["probability"])
    assert differences["probability_f32"] <= TOLERANCE
    assert json.dumps(differences)


def test_an_ensemble_of_networks_trained_at_two_sizes_is_asked_for_one(segmenter: Trained, tmp_path: Path) -> None:
    wider = Trained(segmenter.weights, {**segmenter.facts, "size": 2 * SIZE})
    with pytest.raises(BundleError, match=f"sides of {SIZE}, {2 * SIZE}. Say which with --segmenter-size"):
        export_bundle([segmenter, wider], None, tmp_path / "out", films=films(), name="test", version="1")
    assert not (tmp_path / "out").exists()
