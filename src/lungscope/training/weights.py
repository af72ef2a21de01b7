"""Trained weights as files: safetensors with a JSON of facts beside them, the ONNX files of a bundle read back, and the
packages that carry weights trained on ImageNet."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, numpy_helper
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lungscope.bundle import sha256_of
from lungscope.data.split import Split
from lungscope.data.store import Store
from lungscope.errors import RecipeError, look_up, needs
from lungscope.evaluation.provenance import same_parts
from lungscope.training.networks import IMAGENET, SEGMENTERS, load_resized
from lungscope.writers.atomic import whole_file, write_text

log = logging.getLogger(__name__)

#: Under which name an exported graph holds the network whose outputs it wraps.
PREFIX = "network."
#: What the names of a segmenter's encoder begin with, whatever its decoder (segmentation-models-pytorch), and what
#: comes between that and timm's own names where the encoder is one of timm's.
ENCODER = "encoder."
OF_TIMM = "model."
#: And the last layer of its decoder, one row a map.
MAPS = "segmentation_head."
#: And what grades, which is fitted to the encoder that it stands on and goes with no other.
GRADES = "grade_head."
#: What marks a tensor that is stored as f16 and cast back when the graph is loaded.
HALF = ".f16"


def save_weights(network: nn.Module, path: Path, facts: dict[str, Any]) -> None:
    """Write `path` (safetensors) and the JSON beside it; each appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(save({k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}))
    write_text(path.with_suffix(".json"), json.dumps(facts, indent=2) + "\n")


def refuse_filled(folder: Path) -> None:
    """Raises RecipeError for a folder that holds something, where a run is made that nothing resumes."""
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise RecipeError(f"{folder} is not empty. Name a new folder")


def facts_beside(path: Path) -> dict[str, Any]:
    """The facts of the run that weights are of: of the JSON beside a `.safetensors`, or of the manifest beside a
    bundle's `.onnx`; empty where there are none."""
    try:
        if path.suffix != ".onnx":
            found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        else:
            manifest = json.loads((path.parent / "manifest.json").read_text(encoding="utf-8"))
            graphs = [*manifest["segmenter"]["members"], *filter(None, [manifest.get("classifier")])]
            found = manifest["training"]["runs"][[graph["file"] for graph in graphs].index(path.name)]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def origin_of(path: Path) -> dict[str, Any] | None:
    """What a run that starts from weights has to say of them: their SHA-256, and of their own run what tells which
    films it saw. None for weights of ImageNet, which saw no film of ours."""
    if path.suffix == ".pth":
        return None
    known = facts_beside(path)
    kept = ("network", "stores", "parts", "parts_by_store", "pseudo_labels", "initial", "mean_of")
    return {"weights_sha256": sha256_of(path), **{name: known[name] for name in kept if name in known}}


def refuse_other_parts(path: Path, data: Sequence[tuple[Store, Split]]) -> None:
    """Raises RecipeError for weights of a run that had other val or test parts of these stores than `data` has."""
    if (origin := origin_of(path)) is not None and same_parts(origin, data) is False:
        raise RecipeError(
            f"{path} comes from a training with other val or test parts of these stores: it may have seen the films "
            "that this one is measured on. Use the splits that it was trained with, or weights trained with these"
        )


def imagenet_weights(network: str) -> Path:
    """The file of ImageNet's weights for a classifier, or for a segmenter's encoder, by its name.

    Raises RecipeError where there are none, MissingExtraError where the package is not installed.
    """
    encoder = SEGMENTERS[network][1] if network in SEGMENTERS else network
    row = IMAGENET[look_up(encoder, IMAGENET, what="network with ImageNet weights", error=RecipeError)]
    with needs(f"{network} from ImageNet's weights", "imagenet"):
        path = Path(str(resources.files(row.package) / row.file))
    log.info("starting from ImageNet's weights: %s, %s", row.source, row.licence)
    return path


def load_weights(network: nn.Module, path: Path, *, encoder_only: bool = False) -> None:
    """Load weights into `network`, resizing what depends on the input size.

    path: `.safetensors` of a run; `.onnx` of a bundle, where parameters that the exported graph does not use stay as
    they are; or `.pth` of `imagenet_weights`, where the last layer and a segmenter's decoder do. encoder_only: take a
    segmenter's encoder alone, into a segmenter with another decoder or a classifier with the same layers; what else the
    network has stays as it is. Weights of a segmenter that finds lungs alone fit one that finds
    opacity, too, whose second map stays as it is, and so do weights with and without grades. Raises RecipeError for a
    file of another network, encoder or number of classes.
    """
    if path.suffix == ".pth":
        network.load_state_dict({**network.state_dict(), **_imagenet_state(path, network)})
        return
    onnx_file = path.suffix == ".onnx"
    state = _state_in(path) if onnx_file else load_file(path)
    if encoder_only:
        state = {name: tensor for name, tensor in state.items() if name.startswith(ENCODER)}
        if not state:
            raise RecipeError(f"{path} holds no encoder. Give the weights of a segmenter")
        if not any(name.startswith(ENCODER) for name in network.state_dict()):
            state = {name.removeprefix(ENCODER).removeprefix(OF_TIMM): tensor for name, tensor in state.items()}
    if onnx_file or encoder_only:
        state = {**network.state_dict(), **state}
    own = network.state_dict()
    state = {name: tensor for name, tensor in state.items() if name in own or not name.startswith(GRADES)}
    state |= {name: tensor for name, tensor in own.items() if name.startswith(GRADES) and name not in state}
    for name, tensor in state.items():
        if name.startswith(MAPS) and name in own and len(tensor) == 1 < len(own[name]):
            state[name] = torch.cat([tensor.to(own[name].dtype), own[name][1:]])
    try:
        load_resized(network, state)
    except RuntimeError as error:
        raise RecipeError(f"{path} does not fit this network: {_first_lines(error)}") from error


def _imagenet_state(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """Weights in the order of `network`'s own, a segmenter's encoder's, without the 1000 classes.

    The first kernel is summed over the three colours, which in a grey film are equal. ImageNet's inputs lie in -1..1
    and ours in 0..1: what that shifts and scales behind the first kernel, its batch norm takes out again.
    """
    own = network.state_dict()
    # The last two are the weight and bias of the classes; an encoder may end before them.
    names = [name for name in own if name.startswith(ENCODER)] or list(own)[:-2]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise RecipeError(f"{path} can not be read as tensors alone. Give .safetensors or .onnx") from error
    values = state.values() if isinstance(state, dict) else ()
    tensors = [value for value in values if isinstance(value, Tensor)][:-2]
    if len(tensors) < len(names):
        raise RecipeError(f"{path} holds {len(tensors)} tensors; this network has {len(names)}")
    found = dict(zip(names, tensors, strict=False))
    found[names[0]] = found[names[0]].sum(1, keepdim=True)
    if wrong := [name for name, tensor in found.items() if tensor.shape != own[name].shape]:
        raise RecipeError(f"{path} does not hold the weights of this network: {', '.join(wrong[:3])} differ in shape")
    return found


def _state_in(path: Path) -> dict[str, Tensor]:
    """Parameters and batch-norm statistics of a graph that `export` wrote, by the network's own names, as f32."""
    model = onnx.load(path)
    floats = [t for t in model.graph.initializer if t.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)]
    if not floats or not all(tensor.name.startswith(PREFIX) for tensor in floats if len(tensor.dims) > 1):
        raise RecipeError(
            f"{path} does not hold its weights under their own names, so training can not go on from it. Export the "
            "run again with `lungscope export`, or start from its .safetensors"
        )
    state = {
        tensor.name.removeprefix(PREFIX).removesuffix(HALF): torch.tensor(numpy_helper.to_array(tensor)).float()
        for tensor in floats
    }
    # Equal tensors are written once; the others' names are aliases.
    for node in model.graph.node:
        source = node.input[0].removeprefix(PREFIX) if node.op_type == "Identity" else ""
        if source in state and node.output[0].startswith(PREFIX):
            state[node.output[0].removeprefix(PREFIX)] = state[source].clone()
    return state


def _first_lines(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])
