"""ONNX files become callables with checked names, on threads, with a cache that never mixes weights up."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bundles import BIAS, CELLS, OFFSET, SIZE, SLOPE, write_classifier, write_segmenter
from lungscope.errors import BundleError, UsageError
from lungscope.runtime import Runtime, devices
from programs import environment, python


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "c.onnx"
    write_classifier(path)
    return path


def expected(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cam and logits of the hand-written classifier, in numpy."""
    side = SIZE // CELLS
    cells = image.reshape(len(image), 1, CELLS, side, CELLS, side).mean(axis=(3, 5))
    cam = np.reshape(SLOPE, (1, -1, 1, 1)) * cells + np.reshape(OFFSET, (1, -1, 1, 1))
    return cam, cam.mean(axis=(2, 3)) + np.asarray(BIAS)


@pytest.mark.parametrize(("batch", "count"), [(None, 1), (None, 3), (1, 1)])
def test_a_graph_computes_what_it_says(graph: Path, batch: int | None, count: int) -> None:
    network = Runtime("cpu").compile(graph, outputs=("logits", "cam"), batch=batch)
    image = np.random.default_rng(0).random((count, 1, SIZE, SIZE), dtype=np.float32)
    result = network({"image": image})
    cam, logits = expected(image)
    np.testing.assert_allclose(result["cam"], cam, atol=1e-4)
    np.testing.assert_allclose(result["logits"], logits, atol=1e-4)


@pytest.mark.parametrize("batch", [None, 1])
def test_a_step_that_does_nothing_keeps_its_name(tmp_path: Path, batch: int | None) -> None:
    write_classifier(tmp_path / "c.onnx", bias=(0.0,) * len(BIAS))
    image = np.random.default_rng(0).random((1, 1, SIZE, SIZE), dtype=np.float32)
    for _ in range(2):  # compiled, and out of the cache
        network = Runtime("cpu").compile(tmp_path / "c.onnx", outputs=("logits", "cam"), batch=batch, cache_key="zero")
        result = network({"image": image})
        np.testing.assert_allclose(result["logits"], result["cam"].mean((2, 3)), atol=1e-4)


def test_results_are_not_overwritten_by_the_next_call(graph: Path) -> None:
    network = Runtime("cpu").compile(graph, batch=1)
    first = network({"image": np.zeros((1, 1, SIZE, SIZE), np.float32)})["logits"]
    kept = first.copy()
    network({"image": np.ones((1, 1, SIZE, SIZE), np.float32)})
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("streams", [None, 2])
def test_threads_do_not_mix_their_films(graph: Path, streams: int | None) -> None:
    network = Runtime("cpu", streams=streams).compile(graph, batch=1)

    def error(grey: float) -> float:
        image = np.full((1, 1, SIZE, SIZE), grey, np.float32)
        return max(float(np.abs(network({"image": image})["logits"] - expected(image)[1]).max()) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(error, np.linspace(0, 1, 16))) < 1e-4


def test_other_weights_under_the_same_path_are_not_taken_from_the_cache(graph: Path) -> None:
    image = np.ones((1, 1, SIZE, SIZE), np.float32)
    runtime = Runtime("cpu")
    before = runtime.compile(graph, batch=1, cache_key="a" * 64)({"image": image})["logits"]
    again = runtime.compile(graph, batch=1, cache_key="a" * 64)({"image": image})["logits"]
    write_classifier(graph, bias=(5.0, 5.0, 5.0))
    after = runtime.compile(graph, batch=1, cache_key="b" * 64)({"image": image})["logits"]
    np.testing.assert_array_equal(before, again)
    np.testing.assert_allclose(after - before, 5 - np.asarray([BIAS]), atol=1e-4)


@pytest.mark.parametrize("streams", [None, 2])
def test_a_second_start_needs_no_onnx_file(graph: Path, streams: int | None, tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((1, 1, SIZE, SIZE), dtype=np.float32)
    key = hashlib.sha256(str(tmp_path).encode()).hexdigest()
    before = Runtime("cpu", streams=streams).compile(graph, batch=1, cache_key=key)({"image": image})
    graph.unlink()
    network = Runtime("cpu", streams=streams).compile(graph, batch=1, cache_key=key)
    gc.collect()
    after = network({"image": image})
    assert before.keys() == after.keys() == {"logits", "cam"}
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


def half(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def zeroed(whole: bytes) -> bytes:
    """Damaged in the middle, which OpenVINO takes."""
    start = len(whole) // 4
    return whole[:start] + bytes(64) + whole[start + 64 :]


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"not what it was", half, zeroed])
def test_a_broken_cache_is_made_anew(graph: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    image = np.ones((1, 1, SIZE, SIZE), np.float32)
    key = hashlib.sha256(str(tmp_path).encode()).hexdigest()
    first = Runtime("cpu").compile(graph, batch=1, cache_key=key)({"image": image})["logits"]
    folder = Path(os.environ["LUNGSCOPE_CACHE"]) / "openvino" / key[:16]
    (blob,) = folder.iterdir()
    whole = blob.read_bytes()
    blob.unlink()
    blob.write_bytes(damage(whole))
    again = Runtime("cpu").compile(graph, batch=1, cache_key=key)({"image": image})["logits"]
    np.testing.assert_array_equal(again, first)
    (blob,) = folder.iterdir()
    assert hashlib.sha256(blob.read_bytes()).hexdigest() in blob.name, "and is whole from then on"


def test_the_converter_is_there_for_others() -> None:
    done = python(
        "import sys, lungscope.runtime; lungscope.runtime.version(); import openvino\n"
        "assert 'openvino.tools.ovc' not in sys.modules and 'openvino_telemetry' not in sys.modules\n"
        "try:\n    openvino.convert_model('/no/such/file.onnx')\n"
        "except Exception as error:\n    assert 'file.onnx' in str(error), error\n"
        "assert 'openvino.tools.ovc' in sys.modules\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_graph_with_other_names_is_refused(graph: Path) -> None:
    with pytest.raises(BundleError, match=r"outputs \['cam', 'logits'\].*needs input 'image'.*\['probability'\]"):
        Runtime("cpu").compile(graph, outputs=("probability",))


@pytest.mark.parametrize("data", [b"", b"not an onnx file", b"\x08\x08"])
def test_a_broken_graph_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"broken\.onnx"):
        Runtime("cpu").compile(path)


def test_devices_and_precisions_are_checked() -> None:
    assert "cpu" in {device.name for device in devices()}
    with pytest.raises(UsageError, match=r"Device 'tpu' does not exist\. Allowed: auto, cpu"):
        Runtime("tpu")
    with pytest.raises(UsageError, match=r"Precision 'f23'.*Did you mean 'f32'"):
        Runtime("cpu", "f23")
    assert Runtime("CPU").device == "CPU"


def test_the_first_calls_of_a_process_may_come_from_several_threads_at_once(tmp_path: Path) -> None:
    """A process that hangs is killed. Without a guard about two of five do."""
    write_segmenter(tmp_path / "segmenter.onnx")
    code = f"""
import sys, threading
from pathlib import Path
import numpy as np
from lungscope.runtime import Runtime
sys.setswitchinterval(1e-6)
network = Runtime("cpu").compile(Path({str(tmp_path / "segmenter.onnx")!r}), batch=1)
barrier = threading.Barrier(8)
def call():
    barrier.wait()
    network({{"image": np.zeros((1, 1, {SIZE}, {SIZE}), np.float32)}})
threads = [threading.Thread(target=call) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    for _ in range(5):
        subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60, check=True)
