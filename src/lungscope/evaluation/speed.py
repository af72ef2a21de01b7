"""How fast films are analysed on this machine, stage by stage, and how far that is from what its processor can do.

Everything is measured through the path that users run. What is compared is interleaved, film by film and process by
process, so that what else the machine does falls on all alike. Batches are measured of lungscope alone.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import cv2
import numpy as np
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian

from lungscope import runtime
from lungscope.batch import run_films
from lungscope.bundle import Bundle
from lungscope.errors import LungscopeError, UsageError
from lungscope.evaluation.plots import Box, Line, boxes, curves
from lungscope.hardware import cores, processor
from lungscope.pipeline import Analyzer
from lungscope.precision import CAPABILITIES, Offered
from lungscope.radiograph import Geometry, Pixels
from lungscope.readers import read
from lungscope.report import Report
from lungscope.stages.classification import lung_view
from lungscope.writers.folder import DEFAULT_FORMATS, write

#: Calls that are not counted: caches and thread pools are cold in them.
WARM_UP = 2
#: Seconds between two calls: threads of a contender that go on waiting actively would take cores from the next one.
REST = 0.1
PERCENTILES = (5, 25, 50, 75, 95)


@dataclass
class Timing:
    """Milliseconds of one thing, call by call."""

    calls: list[float] = field(default_factory=list)

    def time(self, work: Callable[[], Any]) -> Any:
        """Do `work`, and keep how long it took."""
        start = perf_counter()
        result = work()
        self.calls.append(1000 * (perf_counter() - start))
        return result

    @property
    def percentiles(self) -> tuple[float, float, float, float, float]:
        """The 5th, 25th, 50th, 75th and 95th percentile of the calls after the warm-up."""
        p5, p25, p50, p75, p95 = (float(p) for p in np.percentile(self.calls[WARM_UP:], PERCENTILES))
        return p5, p25, p50, p75, p95

    def to_json(self) -> dict[str, Any]:
        names = [f"p{p}" if p != 50 else "median" for p in PERCENTILES]
        return {"calls": len(self.calls) - WARM_UP, **dict(zip(names, self.percentiles, strict=True))}


def interleaved(contenders: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Call each of `contenders` in turn, `repeats` times after a warm-up, with a rest before each call."""
    timings = {name: Timing() for name in contenders}
    for _ in range(WARM_UP + repeats):
        for name, work in contenders.items():
            sleep(REST)
            timings[name].time(work)
    return timings


class WatchedAnalyzer(Analyzer):
    """An Analyzer that keeps how long each call of its segmenters and of its classifier took, in milliseconds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super().__init__(*args, **kwargs)

    def forget(self) -> None:
        """Keep nothing of the calls until now."""
        self.calls = {"segmenter": Timing(), "classifier": Timing()}

    def _compiled(self, engine: runtime.Runtime, weights: runtime.Weights, outputs: tuple[str, ...]) -> runtime.Network:
        network = super()._compiled(engine, weights, outputs)
        kind = "classifier" if "logits" in outputs else "segmenter"
        return lambda inputs: self.calls[kind].time(partial(network, inputs))


def single_films(
    analyzer: WatchedAnalyzer,
    films: Mapping[str, Path],
    repeats: int,
    baselines: Mapping[str, Callable[[Path], Any]],
    graphs: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """By film: latency of `analyzer` and of `baselines`, path in and result out, and the analyzer's stages; beside them
    what of two stages it takes to bring the film to the network's grid, and what it takes to write the result's files.

    networks: what of a film's latency the networks take, how often they are called (the classifier twice where a close
    call is shown as its mirror image, too), and how long these calls would take at the processor's peak in the
    precision in use (`networks`, whose `graphs` are given); None where that is not known, or the film was computed
    again in f32.
    """
    found = {}
    for name, film in films.items():
        stages: dict[str, Timing] = {}
        inside = Timing()
        contenders: dict[str, Callable[[], Any]] = {"lungscope": partial(_staged, analyzer, film, stages, inside)}
        contenders |= {baseline: partial(work, film) for baseline, work in baselines.items()}
        latency = interleaved(contenders, repeats)
        analyzer.forget()
        report = analyzer.analyze(film)
        calls = {kind: len(timing.calls) for kind, timing in analyzer.calls.items()}
        ideal = _ideal(analyzer.bundle, calls, graphs) if report.run.precision == analyzer.precision else None
        with tempfile.TemporaryDirectory() as folder:
            writers = {f"write {kind}": partial(write, report, Path(folder), [kind]) for kind in DEFAULT_FORMATS}
            stages |= interleaved(_preprocessing(analyzer.bundle, report) | writers, repeats)
        height, width = report.film.shape
        found[name] = {
            "height": height,
            "width": width,
            "latency_ms": {baseline: timing.to_json() for baseline, timing in latency.items()},
            "stages_ms": {stage: timing.to_json() for stage, timing in stages.items()},
            "networks": {
                "calls": calls,
                "ms": inside.to_json(),
                "ideal_ms": ideal,
                "of_ideal": None if ideal is None else inside.percentiles[2] / ideal,
            },
        }
    return found


def _ideal(bundle: Bundle, calls: Mapping[str, int], graphs: Mapping[str, Any]) -> float | None:
    """Milliseconds that a film's `calls` of the networks, each segmenter's one, take at the processor's peak."""
    names = [member.network for member in bundle.segmenter.members]
    if bundle.classifier is not None:
        names += [bundle.classifier.weights.network] * calls["classifier"]
    ideals = [graphs[name]["ideal_ms"] for name in names]
    return None if None in ideals else sum(ideals)


def _preprocessing(bundle: Bundle, report: Report) -> dict[str, Callable[[], Any]]:
    """What stands before a network inside its stage, by stage."""
    pixels = report.film.pixels
    geometry = Geometry.of_film(pixels, bundle.segmenter.size)
    work: dict[str, Callable[[], Any]] = {"segmentation, preprocess": partial(geometry.to_network, pixels)}
    if bundle.classifier is not None:
        work["classification, preprocess"] = partial(lung_view, pixels, report.lungs, bundle.classifier.view)
    return work


def _staged(analyzer: WatchedAnalyzer, film: Path, stages: dict[str, Timing], inside: Timing) -> None:
    analyzer.forget()
    for stage, milliseconds in analyzer.analyze(film).run.timings_ms.items():
        stages.setdefault(stage, Timing()).calls.append(milliseconds)
    inside.calls.append(sum(sum(timing.calls) for timing in analyzer.calls.values()))


def networks(
    bundle: Bundle,
    device: str,
    repeats: int,
    baselines: Mapping[str, Callable[[Path], Callable[[Pixels], Any]]],
    precision: str = "f32",
) -> dict[str, Any]:
    """By graph: what it computes, and how long that takes here, in `baselines` too (each makes a callable of a graph).

    peak_gflops: the processor's measured peaks, by precision that it computes natively, of a large matrix product and a
    large convolution in the same runtime. of_peak: the share that a graph reaches of the larger one in the precision
    that it is computed in. None of both on a CUDA device.
    """
    shipped = runtime.Runtime(device, precision, offered=bundle.offered)
    peaks = {}
    for name in CAPABILITIES if shipped.probes else ():
        with suppress(UsageError):  # not native here
            peaks[name] = _peaks(runtime.Runtime(device, name, offered=Offered(quantised=True)), repeats)
    peak = max(peaks[shipped.precision].values()) if peaks else None
    sizes = dict.fromkeys(bundle.segmenter.members, bundle.segmenter.size)
    if bundle.classifier is not None:
        sizes[bundle.classifier.weights] = bundle.classifier.view.size
    graphs = {}
    for weights, size in sizes.items():
        image = np.random.default_rng(0).random((1, 1, size, size), dtype=np.float32)
        compiled = shipped.compile(weights.path, batch=1, cache_key=weights.sha256, int8=weights.int8)
        contenders: dict[str, Callable[[], Any]] = {"lungscope": partial(compiled, {"image": image})}
        contenders |= {baseline: partial(make(weights.path), image) for baseline, make in baselines.items()}
        timings = interleaved(contenders, repeats)
        operations = shipped.operations(weights.path)
        ideal = None if peak is None else operations / peak / 1e6
        graphs[weights.network] = {
            "size": size,
            "gflop": operations / 1e9,
            "ms": {baseline: timing.to_json() for baseline, timing in timings.items()},
            "ideal_ms": ideal,
            "of_peak": None if ideal is None else ideal / timings["lungscope"].percentiles[2],
        }
    return {"precision": shipped.precision, "peak_gflops": peaks, "graphs": graphs}


def _peaks(engine: runtime.Runtime, repeats: int) -> dict[str, float]:
    """Operations of each probe a second, in 10^9, at the fastest."""
    peaks = {}
    for kind in engine.probes:
        network, operations, image = engine.probe(kind)
        timing = interleaved({kind: partial(network, {"image": image})}, repeats)[kind]
        peaks[kind] = operations / min(timing.calls) / 1e6
    return peaks


def batch(analyzer: Analyzer, films: Sequence[Path], count: int, formats: Sequence[str]) -> dict[str, Any]:
    """Films per second of `count` files whose content is that of `films` in turn, and the process's memory on the way
    in MiB."""
    memory: list[float | None] = []
    with tempfile.TemporaryDirectory() as folder:
        contents = [Path(folder) / f"{number}{film.suffix}" for number, film in enumerate(films)]
        for film, content in zip(films, contents, strict=True):
            content.write_bytes(film.read_bytes())
        batch = Path(folder) / "in"
        batch.mkdir()
        paths = []
        for number, content in zip(range(count), itertools.cycle(contents), strict=False):
            paths.append(batch / f"{number:06}{content.suffix}")
            paths[-1].hardlink_to(content)
        run = run_films(
            analyzer,
            paths,
            Path(folder) / "out",
            formats,
            progress=lambda: memory.append(resident_mib()),
        )
    return {
        "films": count,
        "failed": run["failed"],
        "formats": list(formats),
        "films_per_second": run["films_per_second"],
        "memory_mib": memory[:: max(1, count // 200)],
        "most_memory_mib": max((value for value in memory if value is not None), default=None),
    }


def in_a_loop(work: Callable[[Path], Any], film: Path, count: int) -> float:
    """Films per second of `work`, called `count` times, one after the other, after a warm-up; nothing is written."""
    for _ in range(WARM_UP):
        work(film)
    start = perf_counter()
    for _ in range(count):
        work(film)
    return count / (perf_counter() - start)


def resident_mib() -> float | None:
    """Memory that this process holds, in MiB; None where the system does not say (Linux does)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


#: Runs a command and prints its seconds and peak MiB. A process inherits the peak of the one that starts it (Linux,
#: getrusage), so that a small one has to.
_LAUNCH = """
import json, subprocess, sys, time
start = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
seconds, peak = time.perf_counter() - start, None
try:
    import resource
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
except ImportError:
    pass
print(json.dumps([seconds, peak]))
sys.exit(status)
"""


def processes(
    commands: Mapping[str, Sequence[str]], repeats: int, environment: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Wall time and peak memory of whole Python processes, by name of the command, which take `repeats` turns."""
    launch = [sys.executable, "-S", "-c", _LAUNCH, sys.executable]
    found: dict[str, list[tuple[float, float | None]]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, arguments in commands.items():
            run = subprocess.run([*launch, *arguments], env={**os.environ, **environment}, capture_output=True)
            if run.returncode:
                why = run.stderr.decode(errors="replace").strip()[-1000:]
                raise LungscopeError(f"{name}: the process ended with status {run.returncode}: {why}")
            seconds, peak = json.loads(run.stdout)
            found[name].append((seconds, peak))
    return {
        name: {
            "starts": repeats,
            "median_s": float(np.median([seconds for seconds, _ in runs])),
            "fastest_s": min(seconds for seconds, _ in runs),
            "slowest_s": max(seconds for seconds, _ in runs),
            "peak_mib": max((peak for _, peak in runs if peak is not None), default=None),
        }
        for name, runs in found.items()
    }


def cold_starts(
    films: Mapping[str, Path], analyzer: Analyzer, repeats: int, baselines: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """`lungscope analyze` of one film as a process of its own, files written, as `analyzer` computes: of the first of
    `films` with an empty cache of compiled graphs ("first start"), and then of each with a full one, in turn with
    `baselines`, by name what Python is to run."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"LUNGSCOPE_CACHE": str(Path(folder) / "cache")}
        options = ["--model", str(analyzer.bundle.root), "--device", analyzer.device, "--precision", analyzer.precision]
        options += ["--out", str(Path(folder) / "out"), "--json"]
        commands = {
            f"lungscope analyze, {name}": ["-m", "lungscope.cli.main", "analyze", str(film), *options]
            for name, film in films.items()
        }
        first, command = next(iter(commands.items()))
        found = processes({f"{first}, first start": command}, 1, environment)
        return found | processes({**commands, **baselines}, repeats, environment)


def demo_films(film: Path, folder: Path) -> dict[str, Path]:
    """A DICOM film as 12-bit DICOM of 2048², and as 8-bit PNG of 2048² and of 256², in `folder`."""
    found = {"DICOM 2048²": folder / "2048.dcm", "PNG 2048²": folder / "2048.png", "PNG 256²": folder / "256.png"}
    pixels = read(film).pixels
    large = np.clip(cv2.resize(pixels, (2048, 2048), interpolation=cv2.INTER_LINEAR), 0, 1)
    small = np.clip(cv2.resize(pixels, (256, 256), interpolation=cv2.INTER_AREA), 0, 1)
    for name, grid in (("PNG 2048²", large), ("PNG 256²", small)):
        cv2.imwrite(str(found[name]), np.rint(255 * grid).astype(np.uint8))
    dataset = dcmread(film)
    for keyword in ("WindowCenter", "WindowWidth", "VOILUTSequence", "ModalityLUTSequence", "PixelPaddingValue"):
        if keyword in dataset:
            delattr(dataset, keyword)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.Rows = dataset.Columns = 2048
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
    dataset.PixelData = np.rint(4095 * large).astype("<u2").tobytes()
    dataset.save_as(found["DICOM 2048²"])
    return found


def machine() -> dict[str, Any]:
    """What the numbers were measured on; `load` is that of the last minute, before anything was measured."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {**processor(), "load": load, "cores": cores()}


def latency_plot(result: Mapping[str, Any]) -> str:
    """Single films, as SVG: a box for each contender and film."""
    rows = [
        Box(f"{baseline}, {film}", baseline, tuple(timing[name] for name in ("p5", "p25", "median", "p75", "p95")))
        for film, measured in result["single_films"].items()
        for baseline, timing in measured["latency_ms"].items()
    ]
    return boxes("One film, from its file to its result", rows, "milliseconds")


def memory_plot(result: Mapping[str, Any]) -> str:
    """Memory over the films of each batch, as SVG."""
    lines = []
    for name, run in result["batches"].items():
        step = run["films"] / max(1, len(run["memory_mib"]))
        points = tuple((n * step, value) for n, value in enumerate(run["memory_mib"]) if value is not None)
        if points:
            lines.append(Line(name, name, points))
    return curves("Memory over a batch", lines, "films", "MiB")


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A result in words."""
    machine = result["machine"]
    yield f"{machine['name']}, {machine['cores']} cores, load {machine['load']}"
    for precision, peaks in result["networks"]["peak_gflops"].items():
        yield f"peak in {precision}: " + ", ".join(f"{kind} {peak:.0f} GFLOP/s" for kind, peak in peaks.items())
    computed_in = result["networks"]["precision"]
    for name, graph in result["networks"]["graphs"].items():
        times = ", ".join(f"{baseline} {timing['median']:.1f} ms" for baseline, timing in graph["ms"].items())
        share = "" if graph["of_peak"] is None else f"; {graph['of_peak']:.0%} of the peak in {computed_in}"
        yield f"{name} at {graph['size']}², {graph['gflop']:.1f} GFLOP: {times}{share}"
    for name, film in result["single_films"].items():
        yield f"{name}: " + ", ".join(
            f"{baseline} {timing['median']:.0f} ms [{timing['p5']:.0f}, {timing['p95']:.0f}]"
            for baseline, timing in film["latency_ms"].items()
        )
        stages = ", ".join(f"{stage} {timing['median']:.1f}" for stage, timing in film["stages_ms"].items())
        yield f"  stages in ms: {stages}"
        inside = film["networks"]
        share = "" if inside["of_ideal"] is None else f", {inside['of_ideal']:.1f} times their time at the peak"
        called = sum(inside["calls"].values())
        yield f"  of lungscope's time in networks, called {called} times: {inside['ms']['median']:.1f} ms{share}"
    yield from batch_lines(result)
    for name, start in result["processes"].items():
        memory = "" if start["peak_mib"] is None else f", at most {start['peak_mib']:.0f} MiB"
        spread = f"{start['median_s']:.2f} s [{start['fastest_s']:.2f}, {start['slowest_s']:.2f}]"
        yield f"whole process, {name}, n = {start['starts']}: {spread}{memory}"


def batch_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The batches of a result in words."""
    for name, run in result["batches"].items():
        peak = run["most_memory_mib"]
        memory = "" if peak is None else f", at most {peak:.0f} MiB after a film"
        beside = (f"; {baseline} in a loop {rate:.1f}" for baseline, rate in run.get("beside", {}).items())
        yield f"batch of {run['films']} ({name}): {run['films_per_second']:.1f} films/s{memory}{''.join(beside)}"
