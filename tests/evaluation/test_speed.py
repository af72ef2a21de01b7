"""The runtime benchmark: operations counted right, nothing counted that was not asked for, and one file with it all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bundles import CELLS, LABELS, SIZE, write_classifier
from films import draw, save
from lungscope.errors import LungscopeError
from lungscope.evaluation import speed
from lungscope.pipeline import Analyzer
from lungscope.precision import Offered
from lungscope.readers import read
from lungscope.runtime import PROBES, Runtime
from programs import program


def test_operations_are_counted(tmp_path: Path) -> None:
    write_classifier(tmp_path / "c.onnx")
    # A 1 x 1 convolution from one channel to one a class: a multiply and an add for each of its outputs.
    assert Runtime("cpu").operations(tmp_path / "c.onnx") == 2 * len(LABELS) * CELLS**2
    assert SIZE % CELLS == 0


@pytest.mark.parametrize("kind", PROBES)
def test_a_probe_computes_what_it_counts(kind: str) -> None:
    network, operations, image = Runtime("cpu").probe(kind)
    (result,) = network({"image": image}).values()
    outputs, inner = (result.size, 256 * 9) if kind == "convolution" else (result.size, image.shape[1])
    assert operations == 2 * outputs * inner
    assert np.ptp(result) > 1


@pytest.mark.parametrize("kind", PROBES)
def test_a_probe_in_int8_is_rounded_and_else_the_same(kind: str) -> None:
    exact, operations, image = Runtime("cpu").probe(kind)
    rounded, same_operations, same_image = Runtime("cpu", "int8", offered=Offered(quantised=True)).probe(kind)
    assert operations == same_operations and np.array_equal(image, same_image)
    one, other = (network({"image": image})["result"] for network in (exact, rounded))
    assert 1e-3 < np.abs(one - other).max() / np.abs(one).max() < 0.1


def test_the_warm_up_does_not_count() -> None:
    calls: list[str] = []
    timings = speed.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 5)
    assert "".join(calls) == "ab" * (speed.WARM_UP + 5)
    slow = speed.Timing([1e6] * speed.WARM_UP + [1.0, 2.0, 3.0])
    assert (slow.to_json()["median"], slow.to_json()["calls"]) == (2.0, 3)
    assert timings["a"].to_json()["calls"] == 5


def test_a_batch_has_its_rate_and_memory(analyzer: Analyzer, tmp_path: Path) -> None:
    films = [save(tmp_path / name, draw()) for name in ("film.png", "film.jpg")]
    found = speed.batch(analyzer, films, 5, ["csv"])
    assert (found["films"], found["failed"], len(found["memory_mib"])) == (5, 0, 5)
    assert found["films_per_second"] > 0
    if sys.platform == "linux":
        assert min(found["memory_mib"]) > 20


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no getrusage")
def test_a_process_has_its_own_memory() -> None:
    ballast = np.ones(2**26, np.uint8)
    nap = {name: ["-S", "-c", f"import time; time.sleep({seconds})"] for name, seconds in (("nap", 0.2), ("none", 0))}
    both = speed.processes(nap, 2, {})
    found = both["nap"]
    assert found["starts"] == both["none"]["starts"] == 2
    assert both["none"]["fastest_s"] < 0.2
    assert 0.2 <= found["fastest_s"] <= found["median_s"] <= found["slowest_s"]
    assert 2 < found["peak_mib"] < ballast.nbytes / 2**20, "not that of this process"


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(LungscopeError, match=r"broken: the process ended with status 3: no film"):
        speed.processes({"broken": ["-c", "import sys; print('no film', file=sys.stderr); sys.exit(3)"]}, 1, {})


def test_the_demo_film_is_the_same_at_every_size(tmp_path: Path) -> None:
    pytest.importorskip("data_store", reason="the extra 'demo' (pydicom-data) is not installed")
    from lungscope.cli.analyze import demo_film

    films = {name: read(path).pixels for name, path in speed.demo_films(demo_film(), tmp_path).items()}
    assert [pixels.shape[0] for pixels in films.values()] == [2048, 2048, 256]
    np.testing.assert_allclose(films["DICOM 2048²"], films["PNG 2048²"], atol=0.003)


def test_the_command_measures_and_draws(tiny: Path, tmp_path: Path) -> None:
    film = save(tmp_path / "film.png", draw())
    arguments = [
        "--film",
        film,
        "--model",
        tiny,
        "--repeats",
        "2",
        "--films",
        "3",
        "--alone",
        "--out",
        tmp_path / "out",
    ]
    done = program("benchmark", "runtime", *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "runtime.json").read_text())
    assert set(result["single_films"]["film.png"]["latency_ms"]) == {"lungscope"}
    before = {"segmentation, preprocess", "classification, preprocess"}
    stages = {"read", "quality", "segmentation", "classification", "localization", "severity"}
    writers = {"write json", "write png", "write html"}
    assert set(result["single_films"]["film.png"]["stages_ms"]) == stages | writers | before
    inside = result["single_films"]["film.png"]["networks"]
    assert inside["calls"] == {"segmenter": 1, "classifier": 1}
    assert 0 < inside["ms"]["median"] < result["single_films"]["film.png"]["latency_ms"]["lungscope"]["median"]
    assert inside["of_ideal"] == pytest.approx(inside["ms"]["median"] / inside["ideal_ms"], rel=1e-3)
    ideal = sum(graph["ideal_ms"] for graph in result["networks"]["graphs"].values())
    assert inside["ideal_ms"] == pytest.approx(ideal, rel=1e-3)
    starts = {name: start["starts"] for name, start in result["processes"].items()}
    assert starts == {"lungscope analyze, film.png, first start": 1, "lungscope analyze, film.png": 3}
    assert "whole process, lungscope analyze, film.png, n = 3: " in done.stdout
    assert "film.png: lungscope" in done.stdout
    for plot in ("latency.svg", "memory.svg"):
        assert (tmp_path / "out" / plot).read_text().startswith("<svg")


def test_a_long_batch_is_measured(tiny: Path, tmp_path: Path) -> None:
    film, broken = save(tmp_path / "film.png", draw()), tmp_path / "broken.png"
    broken.write_bytes(b"no film")
    arguments = ["--film", film, "--film", broken, "--films", "5", "--write", "parquet", "--model", tiny]
    done = program("benchmark", "batch", *arguments, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (run,) = json.loads((tmp_path / "out" / "batch.json").read_text())["batches"].values()
    assert (run["films"], run["failed"], run["formats"]) == (5, 2, ["parquet"])
    assert run["most_memory_mib"] == max(run["memory_mib"])
    assert "batch of 5 (film.png, broken.png, parquet)" in done.stdout
    assert (tmp_path / "out" / "memory.svg").read_text().startswith("<svg")
