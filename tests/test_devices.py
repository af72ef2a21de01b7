"""Whatever computes gives the numbers that OpenVINO gives on the processor; what can not compute says so.

The tests of parity run on every GPU that OpenVINO or ONNX Runtime finds here, and the code that drives CUDA runs on the
processor, too, where ONNX Runtime has the same interface.
"""

from __future__ import annotations

import ctypes.util
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bundles import SIZE, write_classifier, write_segmenter
from films import draw, save
from lungscope import cuda
from lungscope.bundle import Bundle
from lungscope.errors import BundleError, LungscopeError, MissingExtraError, UsageError
from lungscope.pipeline import Analyzer
from lungscope.runtime import Runtime, devices

#: Largest difference, as a share of the range of the values.
TOLERANCE = 1e-3
SIMULATED = "cuda-code-on-processor"
GPUS = [device.name for device in devices() if device.name != "cpu"] or [
    pytest.param("gpu", marks=pytest.mark.skip(reason="neither OpenVINO nor ONNX Runtime's CUDA finds a GPU here"))
]


def simulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ONNX Runtime's processor stand for a GPU."""
    pytest.importorskip("onnxruntime", reason="needs the extra [dev] or [gpu]")
    monkeypatch.setattr(cuda, "PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(cuda, "gpus", lambda: ["the processor", "the processor again"])


@pytest.fixture(params=[SIMULATED, *GPUS])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != SIMULATED:
        return str(request.param)
    simulate(monkeypatch)
    return "cuda"


def same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * float(np.ptp(expected)))


@pytest.mark.parametrize(("batch", "count"), [(None, 1), (None, 3), (1, 1)])
def test_graphs_give_the_processors_numbers(device: str, tmp_path: Path, batch: int | None, count: int) -> None:
    write_segmenter(tmp_path / "segmenter.onnx")
    write_classifier(tmp_path / "classifier.onnx")
    image = np.random.default_rng(0).random((count, 1, SIZE, SIZE), dtype=np.float32)
    for name, outputs in (("segmenter", ("probability",)), ("classifier", ("logits", "cam"))):
        found, expected = (
            Runtime(where).compile(tmp_path / f"{name}.onnx", outputs=outputs, batch=batch)({"image": image})
            for where in (device, "cpu")
        )
        assert set(found) == set(outputs)
        for output in outputs:
            same(found[output], expected[output])


def test_the_embedded_networks_give_the_processors_numbers(device: str) -> None:
    bundle = Bundle.load()
    assert bundle.classifier is not None
    sizes = dict.fromkeys(bundle.segmenter.members, bundle.segmenter.size)
    sizes[bundle.classifier.weights] = bundle.classifier.view.size
    for weights, size in sizes.items():
        image = draw(size, size).astype(np.float32)[None, None]
        found, expected = (Runtime(where).compile(weights.path, batch=1)({"image": image}) for where in (device, "cpu"))
        assert set(found) == set(expected)
        for output, values in expected.items():
            same(found[output], values)


def test_a_film_gets_the_same_report(device: str, tiny: Path, tmp_path: Path) -> None:
    film = save(tmp_path / "film.png", draw())
    analyzer = Analyzer(tiny, device=device)
    found, expected = analyzer.analyze(film), Analyzer(tiny, device="cpu").analyze(film)
    assert found.run.device == analyzer.device == device
    assert set(found.run.versions) & {"openvino", "onnxruntime"} == {
        "onnxruntime" if device.startswith("cuda") else "openvino"
    }
    assert np.count_nonzero(found.lungs.mask != expected.lungs.mask) <= 1e-4 * found.lungs.mask.size
    assert found.classification is not None and expected.classification is not None
    assert found.classification.label == expected.classification.label
    same(found.classification.cam, expected.classification.cam)


def test_threads_do_not_mix_their_films(device: str, tmp_path: Path) -> None:
    write_classifier(tmp_path / "c.onnx")
    network = Runtime(device, streams=2).compile(tmp_path / "c.onnx", batch=1)
    greys = [np.full((1, 1, SIZE, SIZE), grey, np.float32) for grey in np.linspace(0, 1, 16)]
    alone = [network({"image": image})["logits"] for image in greys]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: network({"image": image})["logits"], 20 * greys))
    np.testing.assert_allclose(together, 20 * alone, atol=1e-5)
    assert np.ptp(alone) > 1


def test_graphs_that_are_none_are_refused(device: str, tmp_path: Path) -> None:
    write_classifier(tmp_path / "c.onnx")
    with pytest.raises(BundleError, match=r"outputs \['cam', 'logits'\].*\['probability'\]"):
        Runtime(device).compile(tmp_path / "c.onnx", outputs=("probability",))
    (tmp_path / "broken.onnx").write_bytes(b"not an onnx file")
    with pytest.raises(BundleError, match=r"broken\.onnx"):
        Runtime(device).compile(tmp_path / "broken.onnx")


def test_cuda_devices_are_named_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch)
    assert cuda.devices() == {"cuda": "the processor", "cuda:1": "the processor again"}
    assert {"cpu", "cuda", "cuda:1"} <= {device.name for device in devices()}
    assert [Runtime(name).device for name in ("cuda", "CUDA:0", "cuda:1")] == ["CUDA", "CUDA", "CUDA:1"]
    with pytest.raises(UsageError, match=r"'cuda:2' does not exist\. Allowed: auto, cpu.*, cuda, cuda:1"):
        Runtime("cuda:2")
    assert Runtime("cuda", "auto").precision == "f32"
    with pytest.raises(UsageError, match="Precision 'bf16' is nothing that cuda computes natively"):
        Runtime("cuda", "bf16")


def test_without_a_gpu_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "gpus", list)
    assert cuda.devices() == {}
    with pytest.raises(UsageError, match=r"no NVIDIA GPU.*Allowed: auto, cpu.*lungscope\[gpu\]"):
        Runtime("cuda")


def test_an_onnx_runtime_without_cuda_has_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [dev]")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(cuda, "gpus", lambda: ["a GPU"])
    assert cuda.devices() == {}
    with pytest.raises(MissingExtraError, match=r"auto, cpu.*uninstall.*lungscope\[gpu\]"):
        Runtime("cuda")


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_nothing_falls_back_to_the_processor(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra [dev] or [gpu]")
    if cuda.gpus():
        pytest.skip("a GPU is here, on which CUDA starts and nothing has to fall back")
    write_classifier(tmp_path / "c.onnx")
    with pytest.raises(LungscopeError, match="CUDAExecutionProvider"):
        cuda.Session(tmp_path / "c.onnx")


def test_a_library_that_is_no_driver_shows_no_gpu() -> None:
    assert cuda.gpus("/no/such/library.so") == []
    if library := ctypes.util.find_library("m"):
        assert cuda.gpus(library) == []


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_gpus_are_read_from_the_driver(tmp_path: Path) -> None:
    (tmp_path / "driver.c").write_text(
        "#include <string.h>\n"
        "int cuInit(unsigned flags) { return 0; }\n"
        "int cuDeviceGetCount(int *count) { *count = 2; return 0; }\n"
        "int cuDeviceGet(int *device, int number) { *device = number + 5; return 0; }\n"
        'int cuDeviceGetName(char *name, int size, int device) { strcpy(name, device == 5 ? "A" : "B"); return 0; }\n'
    )
    library = tmp_path / "driver.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True)
    assert cuda.gpus(str(library)) == ["A", "B"]
