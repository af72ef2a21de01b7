"""The order of the stages, and nothing else."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

import cv2
import numpy as np

from lungscope import __version__, runtime
from lungscope.bundle import Bundle
from lungscope.errors import LungscopeError
from lungscope.hardware import keep_freed_memory
from lungscope.radiograph import Radiograph
from lungscope.readers import read
from lungscope.report import Failure, Report, RunInfo
from lungscope.stages.classification import Classifier
from lungscope.stages.localization import localize
from lungscope.stages.quality import inspect
from lungscope.stages.segmentation import LungMask, Segmenter
from lungscope.stages.severity import grade


class Analyzer:
    """A weights bundle made ready on a device. Safe to use from several threads.

    bundle: a loaded one, the folder of one, or None for the embedded default. device, precision, streams, threads: see
    `runtime.Runtime`. find_lungs: asked in place of the bundle's segmenter, whose networks are then not loaded.
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
        find_lungs: Callable[[Radiograph], LungMask] | None = None,
    ) -> None:
        keep_freed_memory()
        with ThreadPoolExecutor() as pool:
            pool.submit(runtime.version)  # imports OpenVINO while the bundle is verified
            self.bundle = (
                bundle if isinstance(bundle, Bundle) else Bundle.load(None if bundle is None else Path(bundle))
            )
            offered = self.bundle.offered
            self._runtime = runtime.Runtime(device, precision, streams=streams, threads=threads, offered=offered)
            spec = self.bundle.classifier
            classifier = None if spec is None else pool.submit(self._compile, spec.weights, "logits", "cam")
            if find_lungs is None:
                members = pool.map(lambda member: self._compile(member, "probability"), self.bundle.segmenter.members)
                find_lungs = Segmenter(self.bundle.segmenter, list(members)).segment
            self.find_lungs = find_lungs
            self._classifier = None if spec is None or classifier is None else Classifier(spec, classifier.result())
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
        """The arithmetic in use; what was chosen, where "auto" was asked for."""
        return self._runtime.precision

    @property
    def precision_why(self) -> str:
        """Why it is in use, in words."""
        return self._runtime.why

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
        with clock.stage("segmentation"):
            lungs = self.find_lungs(film)
        classification = saliency = severity = None
        if self._classifier is not None:
            with clock.stage("classification"):
                classification = self._classifier.classify(film, lungs)
            with clock.stage("localization"):
                saliency = localize(classification, lungs)
            with clock.stage("severity"):
                severity = grade(classification, lungs)
        run = RunInfo(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=self.versions,
            bundle=self.bundle.name,
            bundle_version=self.bundle.version,
            weights={weights.path.name: weights.sha256 for weights in self.bundle.weights},
            device=self.device,
            precision=self.precision,
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

    def _compile(self, weights: runtime.Weights, *outputs: str) -> runtime.Network:
        return self._runtime.compile(
            weights.path, outputs=outputs, batch=1, cache_key=weights.sha256, int8=weights.int8
        )


def failure(item: Radiograph | Path | str, error: Exception) -> Failure:
    """The Failure that `error` is for `item`; an error out of the tree in errors.py is "internal", with its type."""
    path = item.source.path or Path("-") if isinstance(item, Radiograph) else Path(item)
    if isinstance(error, LungscopeError):
        return Failure(path, error.code, str(error))
    return Failure(path, "internal", f"{type(error).__name__}: {error}")


class _Clock:
    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.milliseconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self._progress is not None:
            self._progress(name)
        start = perf_counter()
        yield
        self.milliseconds[name] = round(1000 * (perf_counter() - start), 2)
