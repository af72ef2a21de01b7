"""ONNX files become callables. The one file that imports openvino; CUDA devices are in cuda.py."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from lungscope import cuda, quantization
from lungscope.errors import BundleError, look_up
from lungscope.hardware import processor
from lungscope.precision import Offered, choose

if TYPE_CHECKING:
    import openvino

Arrays = dict[str, NDArray[np.float32]]


class Network(Protocol):
    """A compiled graph: named arrays in, named f32 arrays out. Safe to call from several threads."""

    def __call__(self, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays: ...


@dataclass(frozen=True)
class Quantized:
    """A quantisation file of a graph. sha256: of the file, verified."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Weights:
    """One ONNX file of a bundle. network: the registry's name of its architecture. sha256: of the file, verified.

    int8: the graph's quantisation file, None where it stays in f32 in int8 too.
    """

    network: str
    path: Path
    sha256: str
    int8: Quantized | None = None


#: Operations that a processor's peak is measured with.
PROBES = ("matrix product", "convolution")


class Runtime:
    """OpenVINO on one device, or ONNX Runtime on a CUDA device.

    device: "auto" (a GPU if OpenVINO finds one, else the CPU) or a name out of `devices()`, in any case.
    precision: one of `precision.PRECISIONS`; `offered`, what a bundle offers, decides what "auto" is. CUDA devices
    compute in f32. streams: how many films are computed at once, each on its share of the cores, when as many threads
    call; None for one at a time on all cores, which answers soonest. threads: how many of the processor's cores to
    compute on, None for all. CUDA devices take what comes.
    Attributes: device, precision (the one chosen, never "auto"), and why it was chosen.
    Raises UsageError for a device or a precision that does not exist here, MissingExtraError for a CUDA device that
    only the extra [gpu] reaches, BundleError for int8 that is not offered.
    """

    def __init__(
        self,
        device: str = "auto",
        precision: str = "f32",
        *,
        streams: int | None = None,
        threads: int | None = None,
        offered: Offered | None = None,
    ) -> None:
        self._core = _openvino().Core()
        found = [name.lower() for name in self._core.available_devices]
        self._gpu: int | None = None
        if device.lower().split(":")[0] == "cuda":
            self._gpu = cuda.find(device.lower(), ["auto", *found])
            self.device = device.upper().removesuffix(":0")
            self.precision, self.why = choose(precision, self.device.lower(), ("FP32",), offered or Offered())
            return
        wanted = look_up(device.lower(), ["auto", *found], what="Device")
        if wanted == "auto":
            wanted = next((name for name in found if name.startswith("gpu")), "cpu")
        self.device = wanted.upper()
        capabilities = self._core.get_property(self.device, "OPTIMIZATION_CAPABILITIES")
        features = processor()["features"]
        self.precision, self.why = choose(precision, wanted, capabilities, offered or Offered(), features)
        self._config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"} if streams is None else {"NUM_STREAMS": streams}
        if self.device == "CPU":
            # Threads that are tied to cores wait there for whatever else runs on them.
            self._config["ENABLE_CPU_PINNING"] = False
            if threads is not None:
                self._config["INFERENCE_NUM_THREADS"] = threads
        # What int8 leaves out is computed in f32.
        self._config["INFERENCE_PRECISION_HINT"] = "f32" if self.precision == "int8" else self.precision

    def compile(
        self,
        path: Path,
        *,
        outputs: tuple[str, ...] = (),
        batch: int | None = None,
        cache_key: str | None = None,
        int8: Quantized | None = None,
    ) -> Network:
        """Compile an ONNX file with one input "image".

        outputs: names that the graph must have. batch: fix the batch size (faster), None to leave it free.
        cache_key: keep the compiled form in the user's cache under this key (the file's SHA-256); None keeps nothing.
        int8: the graph's quantisation, for this precision alone; without one it is computed in f32.
        Raises BundleError for a file that is not such a graph, or a quantisation that does not fit it.
        """
        if self._gpu is not None:
            session = cuda.Session(path, number=self._gpu, batch=batch, provider=cuda.PROVIDER)
            _check(path, session.inputs, session.outputs, outputs)
            return session
        quantized = int8 if self.precision == "int8" else None
        cached = None if cache_key is None else self._cached(cache_key, batch, quantized)
        if cached is not None and (network := self._load(cached)) is not None:
            _check(path, {"image"}, network.outputs, outputs)
            return network
        try:
            model = self._core.read_model(path)
            inputs = {port.get_any_name(): port for port in model.inputs}
            _check(path, inputs, {name for port in model.outputs for name in port.get_names()}, outputs)
            if batch is not None:
                shape = inputs["image"].get_partial_shape()
                shape[0] = batch
                model.reshape({"image": shape})
            if quantized is not None:
                quantization.fold(model)
                quantization.insert(model, quantization.load(quantized.path), quantized.path)
            compiled = self._core.compile_model(model, self.device, self._config)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise BundleError(f"OpenVINO can not compile {path} for {self.device}: {reason}") from error
        if cached is not None:
            _keep(compiled, cached)
        return _Compiled(compiled)

    @property
    def versions(self) -> dict[str, str]:
        """The library that computes, and its version."""
        return {"openvino": version()} if self._gpu is None else {"onnxruntime": cuda.version()}

    def operations(self, path: Path) -> int:
        """Floating-point operations of the convolutions and matrix products of an ONNX file for one film; a multiply
        and an add are two."""
        model = self._core.read_model(path)
        shape = model.inputs[0].get_partial_shape()
        shape[0] = 1
        model.reshape({"image": shape})
        total = 0
        for node in model.get_ordered_ops():
            kind = node.get_type_name()
            if kind not in ("Convolution", "GroupConvolution", "MatMul"):
                continue
            first, second = (list(node.input_value(port).get_shape()) for port in (0, 1))
            if kind == "MatMul":
                inner = first[-2 if node.get_attributes()["transpose_a"] else -1]
            else:
                inner = math.prod(second[2 if kind == "GroupConvolution" else 1 :])
            total += 2 * inner * math.prod(node.output(0).get_shape())
        return total

    @property
    def probes(self) -> tuple[str, ...]:
        """The `PROBES` that can be had here: they are OpenVINO's, so none of a CUDA device."""
        return PROBES if self._gpu is None else ()

    def probe(self, kind: str) -> tuple[Network, int, NDArray[np.float32]]:
        """One large operation out of `probes`, compiled in `precision`; how many operations that is, a multiply and an
        add being two; and an input."""
        openvino = _openvino()
        ops = openvino.opset13
        draw = np.random.default_rng(0).standard_normal
        if kind == "convolution":
            channels, side, field = 256, 56, 3
            image = draw((1, channels, side, side), dtype=np.float32)
            weights = draw((channels, channels, field, field), dtype=np.float32)
            port, values, kernel = self._operands(image, weights)
            node = ops.convolution(values, kernel, [1, 1], [1, 1], [1, 1], [1, 1])
            total = 2 * image.size * weights.size // channels
        else:
            side = 1536
            image, weights = draw((side, side), dtype=np.float32), draw((side, side), dtype=np.float32)
            port, values, kernel = self._operands(image, weights)
            node, total = ops.matmul(values, kernel, False, False), 2 * side**3
        port.output(0).get_tensor().set_names({"image"})
        node.output(0).get_tensor().set_names({"result"})
        model = openvino.Model([node], [port])
        return _Compiled(self._core.compile_model(model, self.device, self._config)), total, image

    def _operands(self, image: NDArray[np.float32], weights: NDArray[np.float32]) -> tuple[Any, Any, Any]:
        """A parameter of the image's shape, and what an operation is applied to: that and the weights, in int8 both
        rounded to it."""
        ops = _openvino().opset13
        port, kernel = ops.parameter(image.shape, np.float32, name="image"), ops.constant(weights)
        if self.precision != "int8":
            return port, port, kernel
        low, high = (ops.constant(np.float32(end)) for end in (-4, 4))
        return port, *(ops.fake_quantize(x, low, high, low, high, n) for x, n in ((port, 256), (kernel, 255)))

    def _cached(self, key: str, batch: int | None, quantized: Quantized | None) -> Path | None:
        """What the name of a compiled graph's file begins with, which tells what it was compiled by, for and how; None
        without a cache. Then comes the SHA-256 of its content.

        OpenVINO's own cache (CACHE_DIR) has to parse the ONNX file first, to know its key.
        """
        folder = _cache_folder(key)
        processor = str(self._core.get_property(self.device, "FULL_DEVICE_NAME"))
        ranges = None if quantized is None else quantized.sha256
        facts = json.dumps([version(), self.device, processor, self._config, batch, ranges], sort_keys=True)
        return None if folder is None else folder / hashlib.sha256(facts.encode()).hexdigest()[:16]

    def _load(self, start: Path) -> _Compiled | None:
        """The compiled graph in the file whose name begins with `start`; None where there is none, or none that this
        OpenVINO takes. It takes damaged ones, too, which compute something else: hence the SHA-256."""
        try:
            path = next(start.parent.glob(f"{start.name}-*.blob"), None)
            if path is None:
                return None
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if hashlib.sha256(mapped).hexdigest() != path.stem.removeprefix(f"{start.name}-"):
                return None
            data = np.frombuffer(mapped, np.uint8)
            tensor = _openvino().Tensor(data, shared_memory=True)
            model = self._core.import_model(tensor, self.device, self._config)
            if hasattr(mmap, "MADV_DONTNEED"):
                # Much of it has been copied into other layouts; what is used in place comes back from the file.
                mapped.madvise(mmap.MADV_DONTNEED)
            return _Compiled(model, data)
        except (OSError, RuntimeError, TypeError, ValueError):
            return None


class _Compiled:
    """One infer request a thread: OpenVINO's requests are not to be shared.

    data: the memory that the model's weights lie in, where OpenVINO does not own it.
    """

    #: The first call of a process goes alone: OpenVINO's bindings set up C++ statics in it and let go of the GIL while
    #: they do; a second thread that comes in between then holds the GIL and waits for the statics, for ever.
    _first = threading.Lock()
    _called = False

    def __init__(self, model: openvino.CompiledModel, data: NDArray[np.uint8] | None = None) -> None:
        self._data = data
        self._model = model
        self.outputs = {name for port in model.outputs for name in port.get_names()}
        self._local = threading.local()

    def __call__(self, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        request = getattr(self._local, "request", None)
        if request is None:
            request = self._local.request = self._model.create_infer_request()
        if _Compiled._called:
            return _infer(request, inputs)
        with _Compiled._first:
            answer = _infer(request, inputs)
            _Compiled._called = True
        return answer


def _check(path: Path, inputs: Iterable[str], outputs: Iterable[str], needed: tuple[str, ...]) -> None:
    if set(inputs) != {"image"} or not set(outputs).issuperset(needed):
        raise BundleError(
            f"{path} has inputs {sorted(inputs)} and outputs {sorted(outputs)}; lungscope needs input 'image' and "
            f"outputs {sorted(needed)}. Export it again with `lungscope export`."
        )


def _infer(request: openvino.InferRequest, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
    results = request.infer(dict(inputs), share_inputs=True)
    arrays = ((port, np.asarray(value, np.float32)) for port, value in results.items())
    # Where OpenVINO leaves a step out (adding a bias of 0), its output has that step's name and the one before's.
    return {name: array for port, array in arrays for name in port.get_names()}


@dataclass(frozen=True)
class Device:
    """name: what `--device` takes. description: the hardware's name. capabilities: number formats it computes in."""

    name: str
    description: str
    capabilities: tuple[str, ...]


def devices() -> list[Device]:
    """What networks can be computed on here."""
    core = _openvino().Core()
    found = [
        Device(
            name.lower(),
            str(core.get_property(name, "FULL_DEVICE_NAME")),
            tuple(core.get_property(name, "OPTIMIZATION_CAPABILITIES")),
        )
        for name in core.available_devices
    ]
    return found + [Device(name, description, ("FP32",)) for name, description in cuda.devices().items()]


def version() -> str:
    """OpenVINO's version."""
    return str(_openvino().__version__)


def _openvino() -> Any:
    """The module openvino, imported without its model converter: that is the larger part of the import's time, is not
    needed here, and loads a telemetry client. Others in this process get the converter when they call it."""
    converter = "openvino.tools.ovc"
    if "openvino" in sys.modules or converter in sys.modules:
        import openvino

        return openvino
    # An entry of None makes an import fail at once (Python's reference, 5.3.1); typeshed does not know of it.
    cast(dict[str, Any], sys.modules)[converter] = None
    try:
        import openvino
    finally:
        del sys.modules[converter]

    def convert_model(*arguments: Any, **options: Any) -> Any:
        from openvino.tools.ovc import convert_model

        return convert_model(*arguments, **options)

    openvino.convert_model = convert_model
    return openvino


def _keep(model: openvino.CompiledModel, start: Path) -> None:
    """Put a compiled graph into the cache, whole or not at all, in place of what was there; where that fails it is
    compiled again next time."""
    part = start.with_name(f".{start.name}.{os.getpid()}.{threading.get_ident()}.part")
    with suppress(OSError, RuntimeError):
        try:
            data = model.export_model().getbuffer()
            part.write_bytes(data)
            path = start.with_name(f"{start.name}-{hashlib.sha256(data).hexdigest()}.blob")
            part.replace(path)
            for other in start.parent.glob(f"{start.name}*.blob"):
                if other != path:
                    other.unlink(missing_ok=True)
        finally:
            part.unlink(missing_ok=True)


def _cache_folder(key: str) -> Path | None:
    """A writable folder in the user's cache (LUNGSCOPE_CACHE overrides where), or None if there is none.

    One folder for each hash of a weights file, so that nothing compiled from other weights can ever be taken for it.
    """
    if override := os.environ.get("LUNGSCOPE_CACHE"):
        base = Path(override)
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "lungscope"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches" / "lungscope"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lungscope"
    folder = base / "openvino" / key[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None
