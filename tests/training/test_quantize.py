"""A quantisation file computes what NNCF's own model does, fits its graph or is refused, and is gated end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from torch import nn

from bundles import SIZE, seal, write_bundle, write_classifier
from films import draw, save
from lungscope import quantization
from lungscope.bundle import Bundle, sha256_of
from lungscope.data.split import Row, Split
from lungscope.data.store import Store
from lungscope.errors import BundleError, UsageError
from lungscope.hardware import processor
from lungscope.pipeline import Analyzer
from lungscope.precision import CAPABILITIES, NEEDED, Offered
from lungscope.quantization import Quantization, Quantizer
from lungscope.runtime import Quantized, Runtime
from lungscope.training.export import SegmenterGraph, store_as_f16, to_onnx
from lungscope.training.quantize import quantize_graph
from programs import run


class Small(nn.Module):
    """What the shipped networks are made of: convolutions with batch-norm, a depthwise one, x · sigmoid(x), a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.SiLU(),
            nn.Conv2d(8, 1, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layers(x)
        return output


class Dark(nn.Module):
    """Calls lung what is dark."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 5, padding=2)
        with torch.no_grad():
            self.conv.weight.fill_(-1.7)
            self.conv.bias.fill_(21)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.conv(x))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = Small()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight.data, module.running_var):
                assert value is not None
                value.uniform_(0.5, 1.5)
            for value in (module.bias.data, module.running_mean):
                assert value is not None
                value.normal_(0, 0.2)
    path = tmp_path_factory.mktemp("graph") / "small.onnx"
    to_onnx(SegmenterGraph(network), SIZE, path, ["probability"])
    store_as_f16(path)
    return path


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).random((12, 1, SIZE, SIZE), np.float32)


def answers(model: openvino.Model, images: np.ndarray) -> np.ndarray:
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.concatenate([compiled({"image": image[None]})[0] for image in images])


def test_folding_changes_nothing_but_rounding(graph: Path, images: np.ndarray) -> None:
    model = quantization.read(graph)
    kinds = [node.get_type_name() for node in model.get_ordered_ops()]
    assert "BatchNormInference" not in kinds and "Sigmoid" in kinds and kinds.count("Swish") == 2
    expected = Runtime("cpu").compile(graph)({"image": images})["probability"]
    np.testing.assert_allclose(answers(model, images), expected, atol=1e-5)


def test_what_is_put_back_computes_what_nncf_made(
    graph: Path, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    difference = quantization.difference

    def keep(folded: Any, quantised: Any) -> Quantization:
        made.append(quantised)
        return difference(folded, quantised)

    monkeypatch.setattr(quantization, "difference", keep)
    found = quantize_graph(graph, images)
    assert len(found.quantizers) >= 6, "three kernels, and what each is applied to"
    assert found.biases, "biases are corrected"
    path = tmp_path / "small.int8.npz"
    quantization.save(found, path)
    runtime = Runtime("cpu", "int8", offered=quantised())
    int8 = Quantized(path, sha256_of(path))
    ours = np.concatenate(
        [runtime.compile(graph, batch=1, int8=int8)({"image": image[None]})["probability"] for image in images]
    )
    theirs = answers(made[0], images)
    exact = Runtime("cpu").compile(graph)({"image": images})["probability"]
    changed = float(np.abs(theirs - exact).max())
    assert changed > 1e-3, "int8 shows"
    np.testing.assert_allclose(ours, theirs, atol=changed / 50)
    # The same once more out of the cache, whose key knows the ranges.
    for _ in range(2):
        cached = runtime.compile(graph, batch=1, cache_key="c" * 64, int8=int8)({"image": images[:1]})["probability"]
        np.testing.assert_array_equal(cached, ours[:1])
    f32 = Runtime("cpu").compile(graph, batch=1, cache_key="c" * 64, int8=int8)({"image": images[:1]})["probability"]
    np.testing.assert_allclose(f32, exact[:1], atol=1e-5)


def test_a_transposed_convolution_is_found_again(images: np.ndarray, tmp_path: Path) -> None:
    """OpenVINO gives the name that it has in the ONNX file to the sum with its bias."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 1, 1),
    )
    path = tmp_path / "up.onnx"
    to_onnx(SegmenterGraph(nn.Sequential(*layers)), SIZE, path, ["probability"])
    found = quantize_graph(path, images)
    model = quantization.read(path)
    quantization.insert(model, found, path)
    transposed = next(n for n in model.get_ordered_ops() if n.get_type_name() == "ConvolutionBackpropData")
    assert transposed.input_value(1).get_node().get_type_name() == "FakeQuantize"
    assert transposed.get_friendly_name() in {name for quantizer in found.quantizers for name, _ in quantizer.feeds}


def quantised() -> Any:
    return Offered(quantised=True)


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    ranges = np.float32([[[-1]], [[-2]]])
    per_film = Quantizer((("a", 0), ("b", 1)), 256, np.float32(-0.5), np.float32(3))
    per_channel = Quantizer((("c", 1),), 255, ranges, -ranges)
    before = Quantization((per_film, per_channel), {("d", 1): np.float32([[1, 2]])})
    quantization.save(before, tmp_path / "q.npz")
    after = quantization.load(tmp_path / "q.npz")
    assert [q.feeds for q in after.quantizers] == [q.feeds for q in before.quantizers]
    for old, new in zip(before.quantizers, after.quantizers, strict=True):
        assert (old.levels, old.low.tolist(), old.high.tolist()) == (new.levels, new.low.tolist(), new.high.tolist())
    assert after.biases[("d", 1)].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (Quantizer((("nowhere", 0),), 256, np.float32(0), np.float32(1)), "there is no input 0 of 'nowhere'"),
        (Quantizer((("cam", 7),), 256, np.float32(0), np.float32(1)), "there is no input 7 of 'cam'"),
        (Quantizer((("cam", 0), ("/mean", 0)), 256, np.float32(0), np.float32(1)), "have different sources"),
        (Quantizer((("cam", 0),), 256, np.zeros((5, 5), np.float32), np.ones((5, 5), np.float32)), "'cam' takes"),
    ],
)
def test_a_quantisation_that_does_not_fit_is_refused(tmp_path: Path, found: Quantizer, why: str) -> None:
    write_classifier(tmp_path / "c.onnx")
    path = tmp_path / "c.int8.npz"
    quantization.save(Quantization((found,), {}), path)
    runtime = Runtime("cpu", "int8", offered=quantised())
    with pytest.raises(BundleError, match=rf"c\.int8\.npz does not fit its graph: .*{why}.*lungscope quantize"):
        runtime.compile(tmp_path / "c.onnx", batch=1, int8=Quantized(path, "0" * 64))


def test_a_bias_that_does_not_fit_is_refused(graph: Path, tmp_path: Path) -> None:
    model = quantization.read(graph)
    name = next(n.get_friendly_name() for n in model.get_ordered_ops() if n.get_type_name() == "Add")
    with pytest.raises(BundleError, match=r"is no constant of shape \[3\]"):
        quantization.insert(model, Quantization((), {(name, 1): np.zeros(3, np.float32)}), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.pop("range0"),
        lambda a: a.update(range0=np.zeros(2)),
        lambda a: a.update(range0=np.float32([1, np.nan])),
        lambda a: a.update(range0=np.float32([1, 0])),
        lambda a: a.update(range0=np.float32([1, 1])),
        lambda a: a.update(index=np.array("{")),
        lambda a: a.update(index=np.array('{"quantizers": [{"feeds": [], "levels": 256}], "biases": []}')),
        lambda a: a.update(index=np.array('{"quantizers": [{"feeds": [["a", 0]], "levels": 1}], "biases": []}')),
        lambda a: a.update(index=np.array('{"quantizers": [{"feeds": [["a", -1]], "levels": 9}], "biases": []}')),
        lambda a: a.update(index=np.array([{}], object)),
    ],
)
def test_a_file_that_says_nonsense_is_refused(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "q.npz"
    quantization.save(Quantization((Quantizer((("a", 0),), 256, np.float32(0), np.float32(1)),), {}), path)
    arrays = dict(np.load(path))
    change(arrays)
    np.savez(path, **arrays)
    with pytest.raises(BundleError, match=r"q\.npz is no quantisation file"):
        quantization.load(path)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"not an archive"])
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "q.npz").write_bytes(data)
    with pytest.raises(BundleError, match="is no quantisation file"):
        quantization.load(tmp_path / "q.npz")


@pytest.mark.slow
def test_from_a_bundle_to_its_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CAPABILITIES, "f16", "that no processor has")
    rng = np.random.default_rng(0)
    names = ("COVID", "Normal")
    parts = ("train", "train", "val", "val")
    for name in names:
        for n in range(len(parts)):
            film = draw(320, 288) + rng.normal(0, 0.03, (320, 288))
            save(tmp_path / "films" / name / "images" / f"{name}-{n}.png", film.clip(0, 1).astype(np.float32))
            drawn = (draw(320, 288) < 0.5).astype(np.float32)
            save(tmp_path / "films" / name / "masks" / f"{name}-{n}.png", drawn)
    run("data", "import", tmp_path / "films", tmp_path / "store", "--name", "drawn", "--size", SIZE)
    store, split = Store.open(tmp_path / "store"), tmp_path / "split.csv"
    rows = [Row("drawn", r.id, r.sha256, r.label, r.id, parts[int(Path(r.image).stem[-1])]) for r in store.records]
    Split(tuple(rows)).write(split, {})
    root = write_bundle(tmp_path / "bundle")
    to_onnx(Dark().eval(), SIZE, root / "segmenter.onnx", ["probability"])
    seal(root, json.loads((root / "manifest.json").read_text()))
    bundle = Bundle.load(root)
    before = Analyzer(bundle)
    fast = bool({*NEEDED["int8"]} & {*processor()["features"]})
    why = "the bundle has no quantisation" if fast else "this processor has no amx_int8"
    assert before.precision == "f32" and f"int8: {why}" in before.precision_why
    with pytest.raises(BundleError, match="needs a quantisation"):
        Analyzer(bundle, precision="int8")

    data = ("--data", store.root, "--split", split)
    section = run("quantize", bundle.root, *data, "--films", 4)
    assert section["int8"] == {"segmenter.onnx": "segmenter.int8.npz", "classifier.onnx": "classifier.int8.npz"}
    gate = section["gates"]["int8"]
    assert gate["films"] == gate["dice"]["films"] == gate["accuracy"]["films"] == 4
    assert gate["measured"]["weights"].keys() == {*section["int8"], *section["int8"].values()}
    assert gate["passed"], "so simple networks lose nothing"
    # How fast a graph of three operations is tells nothing, and `auto` would ask.
    document = json.loads((bundle.root / "manifest.json").read_text())
    document["precision"]["gates"]["int8"]["speed"] = gate["speed"] = 2.0
    (bundle.root / "manifest.json").write_text(json.dumps(document))
    loaded = Bundle.load(bundle.root)
    assert loaded.offered.quantised and loaded.offered.gates["int8"].passed
    assert Analyzer(loaded).precision == ("int8" if fast else "f32")
    with pytest.raises(UsageError, match="Device 'nonsense' does not exist"):
        run("quantize", bundle.root, *data, "--films", 4, "--device", "nonsense")
    assert json.loads((bundle.root / "manifest.json").read_text()) == document, "nothing was changed"
    asked = Analyzer(loaded, precision="int8")
    film = store.path_of(store.records[0])
    assert asked.analyze(film).run.precision == "int8"
    exact = Analyzer(loaded, precision="f32").analyze(film)
    assert not np.array_equal(exact.lungs.probability, asked.analyze(film).lungs.probability)

    done = run("analyze", film, "--model", bundle.root, "--out", tmp_path / "out", "--precision", "int8")
    assert (done["precision"], done["precision_why"]) == ("int8", "asked for")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["precision"] == "int8"
    done = run("analyze", film, "--model", bundle.root, "--out", tmp_path / "out", "--precision", "f32", "--resume")
    assert (done["precision"], done["kept"]) == ("f32", 0), "made in another precision, so made again"
    if fast:
        assert "its gate was passed on 4 films" in run("doctor", "--model", bundle.root)["precision"]["why"]

    # Measured again, on fewer films: what was measured elsewhere stays, and so do the files.
    digests = loaded.files
    document = json.loads((bundle.root / "manifest.json").read_text())
    elsewhere = json.loads(json.dumps(gate))
    for file in section["int8"].values():
        del elsewhere["measured"]["weights"][file]
    document["precision"]["gates"]["f16"] = elsewhere
    (bundle.root / "manifest.json").write_text(json.dumps(document))
    again = run("quantize", bundle.root, *data, "--keep", "--limit", 2)
    assert again["gates"]["f16"] == elsewhere and again["gates"]["int8"]["films"] == 2
    assert Bundle.load(bundle.root).files == digests

    # Gates of other weights are no gates.
    shutil.copy(bundle.root / "segmenter.int8.npz", bundle.root / "classifier.int8.npz")
    document["files"]["classifier.int8.npz"] = sha256_of(bundle.root / "classifier.int8.npz")
    (bundle.root / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"measured with another 'classifier\.int8\.npz'"):
        Bundle.load(bundle.root)
