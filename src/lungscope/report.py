"""What comes out for one film, and its JSON form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungscope.errors import DataError
from lungscope.radiograph import Radiograph, Source
from lungscope.stages.classification import Classification
from lungscope.stages.localization import Saliency
from lungscope.stages.quality import InputCheck, Warning_
from lungscope.stages.segmentation import LungMask
from lungscope.stages.severity import Severity

SCHEMA_VERSION = "2"
DISCLAIMER = "Research software, not a medical device. Not for diagnosis."

SECTIONS = (
    "schema_version",
    "disclaimer",
    "source",
    "image",
    "quality",
    "lungs",
    "classification",
    "saliency",
    "severity",
    "run",
)


@dataclass(frozen=True)
class RunInfo:
    """How a report was made.

    versions: of lungscope and what it computes with. manifest: `Bundle.sha256` of its bundle.
    weights: SHA-256 by file name. timings_ms: by stage.
    """

    created: str
    versions: dict[str, str]
    bundle: str
    bundle_version: str
    manifest: str
    weights: dict[str, str]
    device: str
    precision: str
    timings_ms: dict[str, float]
    warnings: tuple[Warning_, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "created": self.created,
            "versions": self.versions,
            "bundle": {
                "name": self.bundle,
                "version": self.bundle_version,
                "manifest": self.manifest,
                "weights": self.weights,
            },
            "device": self.device,
            "precision": self.precision,
            "timings_ms": self.timings_ms,
            "warnings": [asdict(warning) for warning in self.warnings],
        }


@dataclass(frozen=True)
class Report:
    """Everything about one film. classification, saliency and severity are None where the bundle only segments."""

    film: Radiograph
    quality: InputCheck
    lungs: LungMask
    classification: Classification | None
    saliency: Saliency | None
    severity: Severity | None
    run: RunInfo

    @property
    def source(self) -> Source:
        return self.film.source

    def to_json(self) -> dict[str, Any]:
        """The content of report.json: `SECTIONS` in order, every number finite (what is undefined is null)."""
        height, width = self.film.shape
        document = {
            "schema_version": SCHEMA_VERSION,
            "disclaimer": DISCLAIMER,
            "source": {
                "path": None if self.source.path is None else str(self.source.path),
                "sha256": self.source.sha256,
                "format": self.source.format,
                "tags": self.source.tags,
            },
            "image": {
                "height": height,
                "width": width,
                "spacing_mm": self.film.spacing_mm,
                "spacing_origin": self.film.spacing_origin,
            },
            "quality": self.quality.to_json(),
            "lungs": self.lungs.to_json(),
            "classification": None if self.classification is None else self.classification.to_json(),
            "saliency": None if self.saliency is None else self.saliency.to_json(),
            "severity": None if self.severity is None else self.severity.to_json(),
            "run": self.run.to_json(),
        }
        return {name: plain(value) for name, value in document.items()}

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Summary:
        """Read report.json back. Raises DataError for another schema or a missing section."""
        return Summary.from_json(document)


@dataclass(frozen=True)
class Summary:
    """A report read back from JSON: the same sections and numbers, without the arrays."""

    source: dict[str, Any]
    image: dict[str, Any]
    quality: dict[str, Any]
    lungs: dict[str, Any]
    classification: dict[str, Any] | None
    saliency: dict[str, Any] | None
    severity: dict[str, Any] | None
    run: dict[str, Any]

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Summary:
        """Raises DataError for another schema or a missing section."""
        schema = document.get("schema_version")
        if schema != SCHEMA_VERSION:
            raise DataError(
                f"This report has schema_version {schema!r}; this lungscope reads {SCHEMA_VERSION!r}. "
                "Update lungscope, or analyse the film again."
            )
        if missing := [name for name in SECTIONS if name not in document]:
            raise DataError(f"This is not a whole report: {', '.join(missing)} missing. Analyse the film again.")
        return cls(**{name: document[name] for name in SECTIONS[2:]})

    def to_json(self) -> dict[str, Any]:
        head = {"schema_version": SCHEMA_VERSION, "disclaimer": DISCLAIMER}
        return head | {name: getattr(self, name) for name in SECTIONS[2:]}


@dataclass(frozen=True)
class Failure:
    """A film that could not be analysed. code: of the error (errors.py), or "internal" for one that nobody foresaw."""

    path: Path
    code: str
    message: str

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "error": {"code": self.code, "message": self.message}}


def plain(value: Any) -> Any:
    """Turn `value` into what JSON can hold: NaN and infinity become null, other floats keep six significant digits."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
