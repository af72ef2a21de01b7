"""The order of the stages, and which films are computed twice."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import perf_counter

import cv2
import numpy as np

from lungscope import __version__, runtime
from lungscope.bundle import Bundle
from lungscope.errors import LungscopeError, QualityError
from lungscope.hardware import give_back_memory, keep_freed_memory
from lungscope.radiograph import Radiograph
from lungscope.readers import read
from lungscope.report import Failure, Report, RunInfo
from lungscope.stages.classification import Classification, Classifier
from lungscope.stages.localization import localize
from lungscope.stages.quality import inspect
from lungscope.stages.segmentation import LungMask, Segmenter
from lungscope.stages.severity import grade

FindLungs = Callable[[Radiograph], LungMask]


@dataclass(frozen=True)
class _Networks:
    """What finds the lungs and what classifies them, in one precision."""

    find_lungs: FindLungs
    classifier: Classifier | None

    def examine(self, film: Radiograph, clock: _Clock) -> tuple[LungMask, Classification | None]:
        with clock.stage("segmentation"):
            lungs = self.find_lungs(film)
        if self.classifier is None:
            return lungs, None
        with clock.stage("classification"):
            return lungs, self.classifier.classify(film, lungs)


class Analyzer:
    """A weights bundle made ready on a device. Safe to use from several threads.

    bundle: a loaded one, the folder of one, or None for the embedded default. device, precision, streams, threads: see
    `runtime.Runtime`. find_lungs: asked in place of the bundle's segmenter, whose networks are then not loaded.
    margin: logits; a film whose two largest are closer than this is computed again in f32, and so is one without lungs
    before it is refused, since rounding could have decided both. None is the margin that the bundle's gate for this
    precision was measured with; 0 computes nothing twice. In f32, and without a classifier, nothing is.
    Raises BundleError or UsageError when they can not be used.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        streams: int | None = None,
        threads: int | None = None,
        find_lungs: FindLungs | None = None,
        margin: float | None = None,
    ) -> None:
        keep_freed_memory()
        self._given = find_lungs
        self._exact: _Networks | None = None
        # One thread runs the networks that compute again: an infer request, and its memory, is one thread's.
        self._again = ThreadPoolExecutor(1)
        with ThreadPoolExecutor() as pool:
            pool.submit(runtime.version)  # imports OpenVINO while the bundle is verified
            self.bundle = (
                bundle if isinstance(bundle, Bundle) else Bundle.load(None if bundle is None else Path(bundle))
            )
            self._make = partial(runtime.Runtime, device, streams=streams, threads=threads, offered=self.bundle.offered)
            self._runtime = self._make(precision=precision)
            self._networks = self._load(self._runtime, pool)
        if self.precision == "f32" or self.bundle.classifier is None:
            margin = 0.0
        self.margin = self.bundle.offered.margin(self.precision) if margin is None else margin
        self.versions = {
            "lungscope": __version__,
            **self._runtime.versions,
            "numpy": np.__version__,
            "opencv": cv2.__version__,
            "python": platform.python_version(),
        }

    @property
    def device(self) -> str:
        """The device in use, in lower case."""
        return self._runtime.device.lower()

    @property
    def precision(self) -> str:
        """The arithmetic in use; what was chosen, where "auto" was asked for. A report has its own: f32 where the film
        was computed again."""
        return self._runtime.precision

    @property
    def precision_why(self) -> str:
        """Why it is in use, in words."""
        return self._runtime.why

    @property
    def find_lungs(self) -> FindLungs:
        """Stage 2 alone, in the precision in use. Raises QualityError for a film without lungs."""
        return self._networks.find_lungs

    def load_all(self) -> None:
        """Load what else is only loaded when a film needs it: the networks in f32, where some are computed again."""
        if self.margin:
            self._in_f32()

    def release(self) -> None:
        """Let go of what `load_all` loads, and of its memory; a film that needs it loads it again."""
        if self.margin:
            self._again.submit(self._forget).result()

    def analyze(self, film: Radiograph | Path | str, *, progress: Callable[[str], None] | None = None) -> Report:
        """Analyse one film, given as a path or already read. Raises InputError for one that can not be used.

        progress: called with each stage's name as it begins: "read" (for a path), "quality", "segmentation",
        "classification", "localization", "severity".
        """
        clock = _Clock(progress)
        if not isinstance(film, Radiograph):
            with clock.stage("read"):
                film = read(Path(film))
        with clock.stage("quality"):
            quality = inspect(film)
        lungs, classification, precision = self._examine(film, clock)
        saliency = severity = None
        if classification is not None:
            with clock.stage("localization"):
                saliency = localize(classification, lungs)
            with clock.stage("severity"):
                severity = grade(classification, lungs)
        run = RunInfo(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=self.versions,
            bundle=self.bundle.name,
            bundle_version=self.bundle.version,
            manifest=self.bundle.sha256,
            weights={weights.path.name: weights.sha256 for weights in self.bundle.weights},
            device=self.device,
            precision=precision,
            timings_ms=clock.milliseconds,
            warnings=(*quality.warnings, *lungs.warnings),
        )
        return Report(film, quality, lungs, classification, saliency, severity, run)

    def analyze_many(self, inputs: Iterable[Radiograph | Path | str]) -> Iterator[Report | Failure]:
        """Analyse films one by one, in order. What goes wrong with one becomes its Failure; the others go on."""
        for item in inputs:
            result: Report | Failure
            try:
                result = self.analyze(item)
            except ImportError:  # a broken installation, not a broken film
                raise
            except Exception as error:
                result = failure(item, error)
            yield result

    def _examine(self, film: Radiograph, clock: _Clock) -> tuple[LungMask, Classification | None, str]:
        """Lungs and class, and in which precision they were computed."""
        if not self.margin:
            return *self._networks.examine(film, clock), self.precision
        with suppress(QualityError):
            lungs, classification = self._networks.examine(film, clock)
            if classification is None or classification.lead >= self.margin:
                return lungs, classification, self.precision
        return *self._in_f32().examine(film, clock), "f32"

    def _in_f32(self) -> _Networks:
        return self._again.submit(self._load_exact).result()

    def _load_exact(self) -> _Networks:
        if self._exact is None:
            self.bundle.verify()  # its files may have been replaced since
            with ThreadPoolExecutor(1) as pool:  # a file at a time: while it is read its weights are there twice
                self._exact = self._load(self._make(precision="f32", streams=None), pool, self._alone)
        return self._exact

    def _alone(self, network: runtime.Network) -> runtime.Network:
        return lambda inputs: self._again.submit(network, inputs).result()

    def _forget(self) -> None:
        self._exact = None
        give_back_memory()

    def _load(
        self,
        engine: runtime.Runtime,
        pool: ThreadPoolExecutor,
        made: Callable[[runtime.Network], runtime.Network] = lambda network: network,
    ) -> _Networks:
        """The bundle's networks, compiled in `pool`; `made` of each."""

        def compiled(weights: runtime.Weights, *outputs: str) -> runtime.Network:
            return made(self._compiled(engine, weights, outputs))

        spec, find_lungs = self.bundle.classifier, self._given
        network = None if spec is None else pool.submit(compiled, spec.weights, "logits", "cam")
        if find_lungs is None:
            segmenter = self.bundle.segmenter
            further = {"opacity": segmenter.opaque, "grade": segmenter.grades}
            maps = ("probability", *(name for name, limits in further.items() if limits is not None))
            members = pool.map(lambda member: compiled(member, *maps), segmenter.members)
            find_lungs = Segmenter(segmenter, list(members)).segment
        return _Networks(find_lungs, None if spec is None or network is None else Classifier(spec, network.result()))

    def _compiled(self, engine: runtime.Runtime, weights: runtime.Weights, outputs: tuple[str, ...]) -> runtime.Network:
        return engine.compile(weights.path, outputs=outputs, batch=1, cache_key=weights.sha256, int8=weights.int8)


def failure(item: Radiograph | Path | str, error: Exception) -> Failure:
    """The Failure that `error` is for `item`; an error out of the tree in errors.py has its own code, one of the system
    is "os" or "memory", any other "internal", with its type."""
    path = item.source.path or Path("-") if isinstance(item, Radiograph) else Path(item)
    if isinstance(error, LungscopeError):
        return Failure(path, error.code, str(error))
    code = "os" if isinstance(error, OSError) else "memory" if isinstance(error, MemoryError) else "internal"
    return Failure(path, code, f"{type(error).__name__}: {error}")


class _Clock:
    """Time by stage, summed over the times that it ran; `progress` hears of each stage once."""

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.milliseconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        before = self.milliseconds.get(name)
        if self._progress is not None and before is None:
            self._progress(name)
        start = perf_counter()
        try:
            yield
        finally:
            self.milliseconds[name] = round((before or 0.0) + 1000 * (perf_counter() - start), 2)
