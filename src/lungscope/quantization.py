"""int8: where a graph is quantised and over which ranges, as a small file beside it, and putting that into the graph.

The file holds no weights. It lists the FakeQuantize operations (OpenVINO's opset 1) that NNCF put into the graph, and
the biases that it corrected. Put there again, the runtime finds the int8 kernels, and computes what NNCF made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from lungscope.errors import BundleError

if TYPE_CHECKING:
    import openvino

#: What a quantisation file's name ends in, after the graph's.
SUFFIX = ".int8.npz"
MAKE = "Make it again: lungscope quantize BUNDLE --data STORE --split SPLIT; or ask for --precision f32"


@dataclass(frozen=True)
class Quantizer:
    """One FakeQuantize operation.

    feeds: the inputs that it stands before, as (operation's name, input's number); they share one source. levels: how
    many values it rounds to. low, high: f32, the range's ends, of one shape that broadcasts to the source's: one value,
    or one for each channel.
    """

    feeds: tuple[tuple[str, int], ...]
    levels: int
    low: NDArray[np.float32]
    high: NDArray[np.float32]


@dataclass(frozen=True)
class Quantization:
    """How a folded graph is quantised. biases: f32, constants that take the place of what an input has."""

    quantizers: tuple[Quantizer, ...]
    biases: Mapping[tuple[str, int], NDArray[np.float32]]


def read(path: Path) -> openvino.Model:
    """An ONNX file with one input "image" as a folded model of one film."""
    import openvino

    model = openvino.Core().read_model(path)
    shape = model.inputs[0].get_partial_shape()
    shape[0] = 1
    model.reshape({"image": shape})
    fold(model)
    return model


def fold(model: openvino.Model) -> None:
    """Fold constants, and batch-norm layers into their convolutions, and find x · sigmoid(x), in place.

    The runtime does the same when it compiles. It has to be done before quantising, so that ranges are those of what
    is computed; done here, every operation keeps the name that it has in the ONNX file, whatever OpenVINO's version.
    """
    from openvino import opset13 as ops
    from openvino.passes import ConstantFolding, Manager

    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)
    for node in model.get_ordered_ops():
        new = None
        if node.get_type_name() == "BatchNormInference":
            new = _folded(node, ops)
        elif node.get_type_name() == "ConvolutionBackpropData":
            _name_by_sum(node)
        elif node.get_type_name() == "Multiply":
            first, second = node.input_value(0), node.input_value(1)
            for x, gate in ((first, second), (second, first)):
                sigmoid = gate.get_node()
                if sigmoid.get_type_name() == "Sigmoid" and sigmoid.input_value(0) == x:
                    new = ops.swish(x)
        if new is not None:
            new.set_friendly_name(node.get_friendly_name())
            for target in node.output(0).get_target_inputs():
                target.replace_source_output(new.output(0))


def _name_by_sum(node: Any) -> None:
    """Name a transposed convolution after the sum with its bias, which has the name of both in the ONNX file; its own
    is a number that no other reading gives again."""
    targets = [target.get_node() for target in node.output(0).get_target_inputs()]
    if len(targets) == 1 and targets[0].get_type_name() == "Add":
        node.set_friendly_name(f"{targets[0].get_friendly_name()}/WithoutBiases")


def _folded(node: Any, ops: Any) -> Any:
    """A convolution and its batch-norm layer as a convolution and a bias; None where they are not that."""
    conv, *parameters = (node.input_value(port).get_node() for port in range(5))
    kind = conv.get_type_name()
    kernel = conv.input_value(1).get_node() if kind in ("Convolution", "GroupConvolution") else None
    constant = kernel is not None and all(n.get_type_name() == "Constant" for n in (kernel, *parameters))
    if kernel is None or not constant or len(conv.output(0).get_target_inputs()) != 1:
        return None
    gamma, beta, mean, variance = (parameter.get_data().astype(np.float64) for parameter in parameters)
    scale = gamma / np.sqrt(variance + node.get_attributes()["epsilon"])
    weights = kernel.get_data()
    outputs = 2 if kind == "GroupConvolution" else 1  # axes of a kernel that count its output channels
    scaled = weights * scale.reshape(weights.shape[:outputs] + (1,) * (weights.ndim - outputs))
    conv.input(1).replace_source_output(ops.constant(scaled.astype(np.float32)).output(0))
    bias = (beta - mean * scale).reshape(1, -1, *[1] * (len(conv.output(0).get_partial_shape()) - 2))
    return ops.add(conv, ops.constant(bias.astype(np.float32)))


def difference(folded: openvino.Model, quantised: openvino.Model) -> Quantization:
    """What NNCF changed of a folded model. Raises BundleError for a change that a file can not hold."""
    found = []
    biases: dict[tuple[str, int], NDArray[np.float32]] = {}
    before = {node.get_friendly_name(): node for node in folded.get_ordered_ops()}
    for node in quantised.get_ordered_ops():
        name = node.get_friendly_name()
        if node.get_type_name() == "FakeQuantize":
            targets = node.output(0).get_target_inputs()
            low, high, *outputs = (node.input_value(port).get_node().get_data() for port in range(1, 5))
            feeds = sorted((target.get_node().get_friendly_name(), target.get_index()) for target in targets)
            same = np.array_equal(low, outputs[0]) and np.array_equal(high, outputs[1])
            if not same or not all(feed in before for feed, _ in feeds):
                raise BundleError(f"{name}: a quantisation that can not be put into a file.")
            found.append(Quantizer(tuple(feeds), node.get_attributes()["levels"], low, high))
        elif name in before and node.get_type_name() != "Constant":
            for port in range(node.get_input_size()):
                old, new = (_constant(n, port) for n in (before[name], node))
                if old is not None and new is not None and not np.array_equal(old, new):
                    biases[name, port] = new
    return Quantization(tuple(found), biases)


def _constant(node: Any, port: int) -> Any:
    source = node.input_value(port).get_node()
    return source.get_data() if source.get_type_name() == "Constant" else None


def insert(model: openvino.Model, quantization: Quantization, path: Path) -> None:
    """Put a quantisation into a folded model, in place. path: where it comes from, for messages.

    Raises BundleError where it does not fit: an input that is not there, or of another shape.
    """
    from openvino import opset13 as ops

    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    taken = set()

    def fail(why: str) -> NoReturn:
        raise BundleError(f"{path} does not fit its graph: {why}. {MAKE}")

    def find(name: str, port: int) -> Any:
        if name not in nodes or port >= nodes[name].get_input_size() or (name, port) in taken:
            fail(f"there is no input {port} of {name!r} to change")
        taken.add((name, port))
        return nodes[name].input(port)

    for (name, port), bias in quantization.biases.items():
        target = find(name, port)
        old = _constant(nodes[name], port)
        if old is None or old.shape != bias.shape:
            fail(f"input {port} of {name!r} is no constant of shape {list(bias.shape)}")
        target.replace_source_output(ops.constant(bias).output(0))
    for quantizer in quantization.quantizers:
        inputs = [find(name, port) for name, port in quantizer.feeds]
        source = inputs[0].get_source_output()
        if any(other.get_source_output() != source for other in inputs):
            fail(f"{quantizer.feeds} have different sources")
        low, high = ops.constant(quantizer.low), ops.constant(quantizer.high)
        try:
            node = ops.fake_quantize(source, low, high, low, high, quantizer.levels)
            fits = node.get_output_partial_shape(0) == source.get_partial_shape()
        except RuntimeError:
            fits = False
        if not fits:
            fail(f"{quantizer.feeds[0][0]!r} takes {source.get_partial_shape()}, not {list(quantizer.low.shape)}")
        for target in inputs:
            target.replace_source_output(node.output(0))


def save(quantization: Quantization, path: Path) -> None:
    """Write a NumPy archive: an index in JSON, and by place in it the ranges, f32 [2, ...], and the biases, f32."""
    index = {
        "quantizers": [{"feeds": quantizer.feeds, "levels": quantizer.levels} for quantizer in quantization.quantizers],
        "biases": list(quantization.biases),
    }
    arrays = {f"range{n}": np.stack([q.low, q.high]) for n, q in enumerate(quantization.quantizers)}
    arrays |= {f"bias{n}": bias for n, bias in enumerate(quantization.biases.values())}
    with path.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, index=np.array(json.dumps(index)), **arrays)


def load(path: Path) -> Quantization:
    """Read a quantisation. Raises BundleError for a file that is none."""

    def feed(entry: Any) -> tuple[str, int]:
        name, port = entry
        if not isinstance(name, str) or not isinstance(port, int) or port < 0:
            raise ValueError(f"{entry} names no input")
        return name, port

    try:
        with np.load(path, allow_pickle=False) as archive:
            index = json.loads(str(archive["index"]))
            quantizers = []
            for n, entry in enumerate(index["quantizers"]):
                low, high = _finite(archive[f"range{n}"])
                feeds, levels = tuple(map(feed, entry["feeds"])), entry["levels"]
                if not feeds or levels not in range(2, 257) or not (low < high).all():
                    raise ValueError(f"{entry} is no quantizer")
                quantizers.append(Quantizer(feeds, levels, np.asarray(low), np.asarray(high)))
            biases = {feed(entry): _finite(archive[f"bias{n}"]) for n, entry in enumerate(index["biases"])}
            return Quantization(tuple(quantizers), biases)
    except (OSError, BadZipFile, EOFError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is no quantisation file: {error}. {MAKE}") from error


def _finite(array: NDArray[Any]) -> NDArray[np.float32]:
    if array.dtype != np.float32 or not np.isfinite(array).all():
        raise ValueError("an array is not of finite f32")
    return array
