"""Weights as files: whole or not there, and readable again from a bundle."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file
from torch import nn

from lungscope.bundle import EMBEDDED, sha256_of
from lungscope.data.split import Split, parts_by_store, parts_digest
from lungscope.data.store import Store
from lungscope.errors import MissingExtraError, RecipeError
from lungscope.training.export import ClassifierGraph, SegmenterGraph, store_as_f16, to_onnx
from lungscope.training.networks import IMAGENET, build_classifier, build_segmenter
from lungscope.training.weights import imagenet_weights, load_weights, origin_of, refuse_other_parts, save_weights

SIZE = 64


def used(network: nn.Module) -> nn.Module:
    """Give every batch-norm layer statistics of its own, as training does."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


def test_weights_appear_whole_with_their_facts(tmp_path: Path) -> None:
    network = nn.Conv2d(1, 1, 3).to(memory_format=torch.channels_last)
    save_weights(network, tmp_path / "deep" / "weights.safetensors", {"epoch": 3})
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["weights.json", "weights.safetensors"]
    assert torch.equal(load_file(tmp_path / "deep" / "weights.safetensors")["weight"], network.weight)


@pytest.mark.parametrize("name", ["fpn-efficientnetb2", "coatnet0", "resnet50"])
def test_training_can_go_on_from_a_bundle(tmp_path: Path, name: str) -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return build_segmenter(name) if "-" in name else build_classifier(name, classes=3, size=SIZE)

    trained, path = used(build(0)), tmp_path / "graph.onnx"
    graph = SegmenterGraph(trained) if "-" in name else ClassifierGraph(trained, name)
    to_onnx(graph, SIZE, path, ["probability"] if "-" in name else ["logits", "cam"])
    store_as_f16(path)
    again = build(1)
    load_weights(again, path)
    image = torch.rand(2, 1, SIZE, SIZE)
    with torch.no_grad():
        expected, found = trained(image), again.eval()(image)
    # Kernels were rounded to f16.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_weights(build_classifier("coatnet0", classes=2, size=SIZE), tmp_path / "two.safetensors", {})
    network = build_classifier("coatnet0", classes=3, size=SIZE)
    with pytest.raises(RecipeError, match=r"two\.safetensors does not fit this network: .*head\.fc\.weight"):
        load_weights(network, tmp_path / "two.safetensors")


def test_an_encoder_goes_into_another_decoder(tmp_path: Path) -> None:
    trained = used(build_segmenter("fpn-mobilenetv2"))
    save_weights(trained, tmp_path / "fpn.safetensors", {})
    to_onnx(SegmenterGraph(trained), SIZE, tmp_path / "fpn.onnx", ["probability"])
    for path in (tmp_path / "fpn.safetensors", tmp_path / "fpn.onnx"):
        network = build_segmenter("unet-mobilenetv2")
        decoder = {name: tensor.clone() for name, tensor in network.decoder.state_dict().items()}
        load_weights(network, path, encoder_only=True)
        torch.testing.assert_close(network.encoder.state_dict(), trained.encoder.state_dict())
        torch.testing.assert_close(network.decoder.state_dict(), decoder, rtol=0, atol=0)
    with pytest.raises(RecipeError, match=r"fpn\.safetensors does not fit this network"):
        load_weights(build_segmenter("unet-efficientnetb2"), tmp_path / "fpn.safetensors", encoder_only=True)
    save_weights(build_classifier("resnet50", classes=3, size=SIZE), tmp_path / "class.safetensors", {})
    with pytest.raises(RecipeError, match="holds no encoder"):
        load_weights(build_segmenter("unet-mobilenetv2"), tmp_path / "class.safetensors", encoder_only=True)


def test_weights_know_the_run_that_they_are_of(tmp_path: Path) -> None:
    root = EMBEDDED / "default"
    runs = json.loads((root / "manifest.json").read_text())["training"]["runs"]
    for file, run in zip(("segmenter.onnx", "classifier.onnx"), runs, strict=True):
        origin = origin_of(root / file)
        assert origin is not None and origin["parts"] == run["parts"] and origin["stores"] == run["stores"]
        assert origin["weights_sha256"] == sha256_of(root / file)
    alone = tmp_path / "weights.safetensors"
    alone.write_bytes(b"weights")
    assert origin_of(alone) == {"weights_sha256": sha256_of(alone)}
    for beside in ("{", "[]", '{"stores": ["a"]}'):
        alone.with_suffix(".json").write_text(beside)
        assert origin_of(alone) == {"weights_sha256": sha256_of(alone), **({"stores": ["a"]} if "a" in beside else {})}
    assert origin_of(tmp_path / "imagenet.pth") is None


def test_weights_that_may_have_seen_the_test_films_are_refused_with_any_of_their_stores(
    drawn: tuple[Store, Split], tmp_path: Path
) -> None:
    (store, split), path = drawn, tmp_path / "weights.safetensors"
    other = replace(store, name="other"), Split(tuple(replace(row, store="other") for row in split.rows))
    path.touch()
    facts = {"stores": ["drawn", "other"], "parts": parts_digest([drawn, other])}
    path.with_suffix(".json").write_text(json.dumps({**facts, "parts_by_store": parts_by_store([drawn, other])}))
    swapped = {"train": "test", "test": "train"}
    moved = Split(tuple(replace(row, part=swapped.get(row.part, row.part)) for row in split.rows))
    for data in ([drawn], [other], [drawn, other]):
        refuse_other_parts(path, data)
    for data in ([(store, moved)], [(store, moved), other]):
        with pytest.raises(RecipeError, match="other val or test parts of these stores"):
            refuse_other_parts(path, data)


@pytest.mark.parametrize(("name", "last"), [("efficientnetlite0", "blocks"), ("inceptionresnetv2", "block8")])
def test_a_segmenters_encoder_goes_into_a_classifier(tmp_path: Path, name: str, last: str) -> None:
    side = 96
    trained = used(build_segmenter(f"linknet-{name}"))
    save_weights(trained, tmp_path / "lungs.safetensors", {})
    to_onnx(SegmenterGraph(trained), side, tmp_path / "lungs.onnx", ["probability"])
    encoder = trained.get_submodule("encoder")
    encoder = encoder.get_submodule("model") if hasattr(encoder, "model") else encoder
    for path in (tmp_path / "lungs.safetensors", tmp_path / "lungs.onnx"):
        network = build_classifier(name, classes=3, size=side)
        head = {key: tensor.clone() for key, tensor in network.state_dict().items() if "classif" in key}
        load_weights(network, path, encoder_only=True)
        torch.testing.assert_close({key: network.state_dict()[key] for key in head}, head, rtol=0, atol=0)
        torch.testing.assert_close(
            network.get_submodule(last).state_dict(), encoder.get_submodule(last).state_dict(), rtol=0, atol=0
        )
    other = build_classifier("resnet50", classes=3, size=side)
    with pytest.raises(RecipeError, match=r"lungs\.safetensors does not fit this network"):
        load_weights(other, tmp_path / "lungs.safetensors", encoder_only=True)


def test_a_graph_with_folded_weights_is_refused(tmp_path: Path) -> None:
    kernel = numpy_helper.from_array(np.zeros((1, 1, 1, 1), np.float32), "onnx::Conv_7")
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 4, 4]) for name in ("image", "y")]
    node = helper.make_node("Conv", ["image", "onnx::Conv_7"], ["y"])
    onnx.save(helper.make_model(helper.make_graph([node], "g", ports[:1], ports[1:], [kernel])), tmp_path / "g.onnx")
    with pytest.raises(RecipeError, match=r"g\.onnx does not hold its weights under their own names"):
        load_weights(nn.Conv2d(1, 1, 1), tmp_path / "g.onnx")


def blocks(state: dict[str, torch.Tensor], kernel: str) -> list[torch.Tensor]:
    """The kernels of one kind, block after block."""
    return [tensor for name, tensor in state.items() if "blocks." in name and name.endswith(f"{kernel}.weight")]


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenets_weights_go_where_they_belong(name: str) -> None:
    theirs = torch.load(imagenet_weights(name), weights_only=True)
    torch.manual_seed(0)
    network = build_classifier(name, classes=3, size=SIZE)
    head = network.get_submodule("classifier").weight.clone()
    load_weights(network, imagenet_weights(name))
    ours = network.state_dict()
    torch.testing.assert_close(ours["conv_stem.weight"], theirs["_conv_stem.weight"].sum(1, keepdim=True))
    for mine, other in (("conv_dw", "_depthwise_conv"), ("conv_pwl", "_project_conv")):
        found, expected = blocks(ours, mine), blocks(theirs, other)
        # The first block has no expansion, and timm calls its projection by another name.
        for a, b in zip(found, expected[-len(found) :], strict=True):
            assert torch.equal(a, b)
    for mine, other in (("conv_head.weight", "_conv_head.weight"), ("bn2.running_var", "_bn1.running_var")):
        assert torch.equal(ours[mine], theirs[other])
    assert torch.equal(network.get_submodule("classifier").weight, head)

    segmenter = build_segmenter(f"linknet-{name}")
    decoder = {key: tensor.clone() for key, tensor in segmenter.decoder.state_dict().items()}
    load_weights(segmenter, imagenet_weights(f"linknet-{name}"))
    for a, b in zip(blocks(segmenter.state_dict(), "conv_dw"), blocks(ours, "conv_dw"), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(segmenter.decoder.state_dict(), decoder, rtol=0, atol=0)


def test_imagenets_weights_of_another_network_are_refused() -> None:
    with pytest.raises(RecipeError, match="coatnet0"):
        imagenet_weights("coatnet0")
    network = build_classifier("efficientnetlite0", classes=3, size=SIZE)
    with pytest.raises(RecipeError, match="does not hold the weights of this network"):
        load_weights(network, imagenet_weights("efficientnetlite2"))
    with pytest.raises(RecipeError, match=r"holds [0-9]+ tensors"):
        load_weights(build_classifier("resnet50", classes=3, size=SIZE), imagenet_weights("efficientnetlite0"))


@pytest.mark.parametrize("content", [b"no tensors", pickle.dumps({"run": Path}), None])
def test_a_pth_file_of_something_else_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "mine.pth"
    if content is None:
        torch.save(["a", "b"], path)
    else:
        path.write_bytes(content)
    network = build_classifier("efficientnetlite0", classes=3, size=SIZE)
    with pytest.raises(RecipeError, match=r"mine\.pth (can not be read as tensors alone|holds 0 tensors)"):
        load_weights(network, path)


def test_a_missing_package_of_weights_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMAGENET, "efficientnetlite0", replace(IMAGENET["efficientnetlite0"], package="not_there"))
    with pytest.raises(MissingExtraError, match=r"linknet-efficientnetlite0.*lungscope\[imagenet\]"):
        imagenet_weights("linknet-efficientnetlite0")
