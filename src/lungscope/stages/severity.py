"""Stage 5: how much of each lung zone is involved, scored 0 to 3 over six zones.

The zones are those of the Brixia score (Borghesi and Maroldi 2020): A, B, C are the patient's right lung from the top,
D, E, F the left. What is scored here is extent alone, by `DEFINITION`; it is not Brixia, whose grades also say what
kind of opacity is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import cv2
import numpy as np

from lungscope.radiograph import Pixels, box
from lungscope.stages.classification import Classification, softmax
from lungscope.stages.segmentation import LungMask, Mask

NORMAL = "Normal"
ZONES = {"right": "ABC", "left": "DEF"}
#: Score by the involved share of a zone: 0 below the first limit, 1 below the second, 2 below the third, else 3.
LIMITS = (0.05, 1 / 3, 2 / 3)
INVOLVED = 0.5
#: From this score on a zone contradicts a film that is called normal.
HIGH = 2

DEFINITION = (
    "Each lung is parted into an upper, middle and lower third by the rows of its own bounding box: A, B, C right "
    "lung, D, E, F left lung. At each cell of the classifier's grid the local class evidence is the class "
    "activation map plus the class's bias (its mean over all cells is the class's logit); the local disease "
    "probability is 1 - softmax(evidence)[Normal], resampled bilinearly to the film. A lung pixel is involved "
    "where that exceeds 0.5. A zone scores 0 if less than 5 % of its lung pixels are involved, 1 below one third, "
    "2 below two thirds, 3 from there on. Global is the sum, 0 to 18. Extent is the involved share of a lung. "
    "Evidence is the mean log-odds of disease. A lung that was not found has no scores, and then there is no "
    "global score."
)


@dataclass(frozen=True)
class Zone:
    """score: 0..3. extent: involved share of `pixels`, 0..1. evidence: mean log-odds of disease. rows: start, stop."""

    score: int
    pixels: int
    extent: float
    evidence: float
    rows: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "score": self.score,
            "extent_percent": 100 * self.extent,
            "evidence": self.evidence,
            "rows": list(self.rows),
        }


@dataclass(frozen=True)
class Severity:
    """Scores of one film. What could not be scored is None, and `reason` says why.

    zones: by letter A..F. extent: involved share 0..1 by "left" and "right". evidence: mean log-odds of disease.
    """

    zones: dict[str, Zone | None]
    total: int | None
    extent: dict[str, float | None]
    evidence: float | None
    reason: str | None
    definition: str = DEFINITION

    @property
    def extent_percent(self) -> dict[str, float | None]:
        """Involved share of each lung in percent, by "left" and "right"."""
        return {side: None if share is None else 100 * share for side, share in self.extent.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "zones": {name: None if zone is None else zone.to_json() for name, zone in self.zones.items()},
            "global": self.total,
            "extent_percent": self.extent_percent,
            "evidence": self.evidence,
            "reason": self.reason,
            "definition": self.definition,
        }


def grade(classification: Classification, lungs: LungMask) -> Severity:
    """Score the six zones by `DEFINITION`."""
    if NORMAL not in classification.labels:
        names = ", ".join(classification.labels)
        return _none(f"The classifier has no class {NORMAL!r} to measure disease against (it has {names}).")
    log_odds, probability = disease(classification)
    geometry = classification.geometry
    # One large map at a time.
    involved = geometry.to_window(probability) > INVOLVED
    evidence = geometry.to_window(log_odds)
    zones: dict[str, Zone | None] = {}
    for side, lung in (("right", lungs.right), ("left", lungs.left)):
        part = box(lung)  # which the classifier's window holds
        there = geometry.in_window(part)
        thirds = _thirds(lung[part], involved[there], evidence[there], part[0].start)
        zones |= dict(zip(ZONES[side], thirds, strict=True))
    missing = [name for name, zone in zones.items() if zone is None]
    return Severity(
        zones=zones,
        total=None if missing else sum(zone.score for zone in zones.values() if zone),
        extent={side: _mean((zones[name] for name in names), "extent") for side, names in ZONES.items()},
        evidence=_mean(zones.values(), "evidence"),
        reason=f"No lung was found in zone {', '.join(missing)}." if missing else None,
    )


def disease(classification: Classification) -> tuple[Pixels, Pixels]:
    """Local log-odds and probability of any disease, f32 [h, w] each, on the classifier's cells."""
    local = classification.cam + classification.bias[:, None, None]
    normal = classification.labels.index(NORMAL)
    others = np.delete(local, normal, axis=0)
    log_odds = np.logaddexp.reduce(others, axis=0) - local[normal]
    return np.asarray(log_odds, np.float32), 1 - softmax(local)[normal]


def score_of(extent: float) -> int:
    """Score 0..3 of an involved share 0..1."""
    return sum(extent >= limit for limit in LIMITS)


def contradicts(label: str, scores: Iterable[int | None]) -> bool:
    """Whether a film's most probable class and its zones' scores say different things.

    They do where the class is `NORMAL` and a zone scores `HIGH` or more, and where it is a disease and every zone that
    is scored has 0: the class follows from the mean of the map, a score from the share of places where disease leads.
    """
    known = [score for score in scores if score is not None]
    return bool(known) and (max(known) >= HIGH if label == NORMAL else max(known) == 0)


def contradiction(label: str, probability: float, zones: Mapping[str, Zone | None]) -> str | None:
    """In words how a film's most probable class, of `probability` 0..1, and its zones say different things, and how
    that can be; None where they do not."""
    known = {letter: zone for letter, zone in zones.items() if zone is not None}
    if not contradicts(label, [zone.score for zone in known.values()]):
        return None
    found = f"The film's most probable class is {label} ({100 * probability:.1f} %), yet"
    if label == NORMAL:
        high = [f"{letter} ({100 * zone.extent:.0f} %)" for letter, zone in known.items() if zone.score >= HIGH]
        found += f" at least a third of the lung counts as involved in zone {', '.join(high)}."
        why = "A finding in one place can be outvoted by the rest."
    else:
        found += " in no zone does as much as 5 % of the lung count as involved."
        why = "Evidence in few places, or outside the lungs, can decide the class alone."
    rule = (
        "Both come from the same map of the same classifier: the class from its mean over the whole view, a zone's "
        "score from its involved share, the lung pixels where, at that place, the probability of any disease is above "
        "0.5."
    )
    return f"{found} {rule} {why} Neither is confirmed by the other: look at the film."


def _thirds(lung: Mask, involved: Mask, evidence: Pixels, above: int) -> list[Zone | None]:
    """The zones of a lung, all three arrays on its bounding box, whose first row is row `above` of the film."""
    edges = [lung.shape[0] * third // 3 for third in range(4)]
    return [_zone(lung, involved, evidence, start, stop, above) for start, stop in pairwise(edges)]


def _zone(lung: Mask, involved: Mask, evidence: Pixels, start: int, stop: int, above: int) -> Zone | None:
    part = lung[start:stop]
    pixels = int(np.count_nonzero(part))
    if pixels == 0:
        return None
    extent = np.count_nonzero(part & involved[start:stop]) / pixels
    # Three times as fast as OpenCV's mean under a mask.
    log_odds = cv2.sumElems(cv2.copyTo(evidence[start:stop], part.view(np.uint8)))[0] / pixels
    return Zone(score_of(extent), pixels, extent, log_odds, (above + start, above + stop))


def _mean(zones: Iterable[Zone | None], fact: Literal["extent", "evidence"]) -> float | None:
    """The mean of a fact over the pixels of those zones that there are."""
    known = [(getattr(zone, fact), zone.pixels) for zone in zones if zone is not None]
    return sum(value * pixels for value, pixels in known) / sum(pixels for _, pixels in known) if known else None


def _none(reason: str) -> Severity:
    empty: dict[str, Zone | None] = dict.fromkeys("ABCDEF")
    return Severity(empty, None, {"right": None, "left": None}, None, reason)
