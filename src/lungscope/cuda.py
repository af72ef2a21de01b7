"""NVIDIA GPUs: the one file of inference that imports onnxruntime. Nothing here falls back to the processor."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungscope.errors import BundleError, LungscopeError, MissingExtraError, UsageError, look_up

PROVIDER = "CUDAExecutionProvider"
#: The driver's library, which comes with the driver and never with a package.
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def gpus(library: str = DRIVER) -> list[str]:
    """Names of the NVIDIA GPUs that the driver shows to this process, in the order of their CUDA numbers; empty where
    there is no driver."""
    try:
        driver = ctypes.CDLL(library)
        begin, count_of, device_of, name_of = (
            driver[name] for name in ("cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName")
        )
    except (OSError, AttributeError):
        return []
    count, device, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if begin(0) or count_of(ctypes.byref(count)):
        return []
    found = []
    for number in range(count.value):
        failed = device_of(ctypes.byref(device), number) or name_of(name, len(name), device)
        found.append("an NVIDIA GPU without a name" if failed else name.value.decode())
    return found


def devices() -> dict[str, str]:
    """GPUs that networks can run on: their names for `--device` ("cuda", "cuda:1", …) and the hardware's. Empty without
    a GPU, and without an ONNX Runtime that is made for one."""
    found = gpus()
    return dict(zip(_names(len(found)), found, strict=True)) if found and _has_provider() else {}


def find(device: str, others: Sequence[str]) -> int:
    """The CUDA number of the GPU called `device`, "cuda" or "cuda:N".

    others: devices that there are besides, for the message. Raises UsageError where there is no such GPU, and
    MissingExtraError where ONNX Runtime is not there or has no CUDA.
    """
    names = _names(len(gpus()))
    if not names:
        raise UsageError(
            f"Device {device!r} does not exist: no NVIDIA GPU with a driver is here. Allowed: {', '.join(others)}. "
            "Where there is one: pip install 'lungscope[gpu]'."
        )
    wanted = look_up("cuda" if device == "cuda:0" else device, [*others, *names], what="Device")
    if not _has_provider():
        there = "" if find_spec("onnxruntime") is None else "; its onnxruntime has no CUDA: pip uninstall it first"
        raise MissingExtraError(f"Device {device!r} (this installation has {', '.join(others)}{there})", "gpu")
    return names.index(wanted)


class Session:
    """An ONNX file compiled by ONNX Runtime: named arrays in, named f32 arrays out. Safe to call from several threads.

    number: the GPU's CUDA number. batch: the batch size where it is fixed. provider: ONNX Runtime's name of what
    computes. All is f32; TF32, which rounds factors to 10 bits, is off. Raises BundleError for a file that can not be
    compiled, LungscopeError where `provider` can not be used here.
    """

    def __init__(self, path: Path, *, number: int = 0, batch: int | None = None, provider: str = PROVIDER) -> None:
        onnxruntime = _onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; that shapes are computed on the processor is a warning
        options.use_deterministic_compute = True
        if batch is not None:
            options.add_free_dimension_override_by_name("N", batch)
        # The heuristic gives the same kernels each time; the default takes those that were fastest just then.
        settings = {"device_id": number, "use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC"}
        providers = [(provider, settings if provider == PROVIDER else {})]
        complaint = _load_libraries() if provider == PROVIDER else ""
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=providers, enable_fallback=0)
        except Exception as error:  # ONNX Runtime's own errors have no base but this
            reason = str(error).strip().splitlines()[-1]
            raise BundleError(f"ONNX Runtime can not compile {path} for {provider}: {reason}") from error
        if provider not in self._session.get_providers():
            raise LungscopeError(
                f"ONNX Runtime {onnxruntime.__version__} could not start {provider}, whose reason is above. "
                f"{complaint}Install CUDA's libraries, too: pip install --force-reinstall 'lungscope[gpu]'."
            )
        self.inputs = [port.name for port in self._session.get_inputs()]
        self.outputs = [port.name for port in self._session.get_outputs()]

    def __call__(self, inputs: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        results = self._session.run(self.outputs, dict(inputs))
        return {name: np.asarray(value, np.float32) for name, value in zip(self.outputs, results, strict=True)}


def version() -> str:
    """ONNX Runtime's version."""
    return str(_onnxruntime().__version__)


def _names(count: int) -> list[str]:
    return ["cuda" if number == 0 else f"cuda:{number}" for number in range(count)]


def _has_provider() -> bool:
    try:
        return PROVIDER in _onnxruntime().get_available_providers()
    except ModuleNotFoundError:
        return False


@functools.cache
def _load_libraries() -> str:
    """Load CUDA's libraries out of the packages that hold them; returns what ONNX Runtime prints where some are
    missing."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        _onnxruntime().preload_dlls()
    return "".join(f"{line.rstrip('.')}. " for line in printed.getvalue().splitlines())


def _onnxruntime() -> Any:
    import onnxruntime

    return onnxruntime
