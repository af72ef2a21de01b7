"""Stage 5: how ill each lung zone is, scored 0 to 3 over six zones.

The zones are those of the Brixia score (Borghesi and Maroldi 2020): A, B, C are the patient's right lung from the top,
D, E, F the left. Where the segmenter has a map of grades, fitted to radiologists' Brixia scores, that scores; else the
share of the zone that is involved does. `definition` says so in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lungscope.radiograph import Pixels
from lungscope.stages.classification import Classification, softmax
from lungscope.stages.segmentation import Grades, LungMask, Mask, Opacity

Basis = Literal["evidence", "opacity", "grade"]
Limits = tuple[float, float, float]

NORMAL = "Normal"
ZONES = {"right": "ABC", "left": "DEF"}
#: Score by the involved share of a zone: 0 below the first limit, 1 below the second, 2 below the third, else 3.
LIMITS: Limits = (0.05, 1 / 3, 2 / 3)
#: Above which local probability of disease a place is involved. Above which opacity is the bundle's to say, since that
#: depends on what the segmenter was trained on.
INVOLVED = 0.5
#: A film of twice this shorter side, in pixels, or more is thinned out to it, about, where pixels are counted.
_COUNTED = 512
#: From this score on a zone contradicts a film that is called normal.
HIGH = 2

_ZONES = (
    "Each lung is parted into an upper, middle and lower third by the rows of its own bounding box: A, B, C right "
    "lung, D, E, F left lung. "
)
_EVIDENCE = (
    "At each cell of the classifier's grid the local class evidence is the class activation map plus the class's bias "
    "(its mean over all cells is the class's logit); the local disease probability is 1 - softmax(evidence)[Normal], "
    "resampled bilinearly to the film. "
)
_SCORES = (
    "A zone scores 0 if less than 5 % of its lung pixels are involved, 1 below one third, "
    "2 below two thirds, 3 from there on. "
)
_REST = (
    "Global is the sum, 0 to 18. Extent is the involved share of a lung. "
    "Evidence is the mean log-odds of disease. A lung that was not found has no scores, and then there is no "
    "global score."
)


def definition(opaque: float | None, limits: Limits | None = None) -> str:
    """What scores and extents mean, in words. opaque: the opacity above which a place is involved; where that is None,
    evidence tells. limits: from which grade on a zone scores 1, 2 and 3; where that is None, its extent scores."""
    scores = _SCORES if limits is None else _graded(limits)
    if opaque is None:
        return f"{_ZONES}{_EVIDENCE}A lung pixel is involved where that exceeds {INVOLVED}. {scores}{_REST}"
    return (
        f"{_ZONES}The segmenter's second map says how much of each place something hides that air would show, 0 to 1; "
        "it was learnt from opacities painted on clear lungs, and knows no class. A lung pixel is involved where that "
        f"exceeds {opaque:g}. {_EVIDENCE}{scores}{_REST}"
    )


def _graded(limits: Limits) -> str:
    one, two, three = (f"{limit:g}" for limit in limits)
    return (
        "The segmenter's last map says how ill each place of the lung looks: a weighted sum of what its encoder sees "
        "there, fitted to radiologists' Brixia scores of zones, 0 to 3. A zone's grade is the mean over its lung "
        f"pixels; it scores 0 below a grade of {one}, 1 below {two}, 2 below {three}, 3 from there on. What it scores "
        "need not lie where pixels are involved: a zone can score high with few of them, and low with many. "
    )


@dataclass(frozen=True)
class Zone:
    """score: 0..3. pixels: of the lung, about. extent: involved share of them, 0..1. evidence: mean log-odds of
    disease. rows: start, stop. grade: mean of the map of grades; None where there is no such map."""

    score: int
    pixels: int
    extent: float
    evidence: float
    rows: tuple[int, int]
    grade: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "score": self.score,
            "grade": self.grade,
            "extent_percent": 100 * self.extent,
            "evidence": self.evidence,
            "rows": list(self.rows),
        }


@dataclass(frozen=True)
class Severity:
    """Scores of one film. What could not be scored is None, and `reason` says why.

    zones: by letter A..F. extent: involved share 0..1 by "left" and "right". evidence: mean log-odds of disease.
    opaque: the segmenter's opacity above which a place is involved, 0..1; None where the class's evidence tells.
    limits: from which grade on a zone scores 1, 2 and 3; None where its extent scores.
    """

    zones: dict[str, Zone | None]
    total: int | None
    extent: dict[str, float | None]
    evidence: float | None
    reason: str | None
    opaque: float | None = None
    limits: Limits | None = None

    @property
    def basis(self) -> Basis:
        """What scores: the segmenter's grades; where it has no such map, the extent of its opacity; where it has none
        of that either, the extent of the class's evidence."""
        return "grade" if self.limits is not None else "evidence" if self.opaque is None else "opacity"

    @property
    def definition(self) -> str:
        """What the scores mean, in words."""
        return definition(self.opaque, self.limits)

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
            "basis": self.basis,
            "definition": self.definition,
        }


def grade(classification: Classification, lungs: LungMask) -> Severity:
    """Score the six zones as `definition` says. A large film's pixels are counted on every n-th row and column."""
    opaque = None if lungs.opacity is None else lungs.opacity.limit
    limits = None if lungs.grades is None else lungs.grades.limits
    if NORMAL not in classification.labels:
        names = ", ".join(classification.labels)
        reason = f"The classifier has no class {NORMAL!r} to measure disease against (it has {names})."
        return _none(reason, opaque, limits)
    log_odds, probability = disease(classification)
    zones: dict[str, Zone | None] = {}
    step = _step(lungs)
    for side in _sides(lungs):
        evidence = classification.geometry.at(log_odds, side.down, side.across)
        if lungs.opacity is None:
            involved = classification.geometry.at(probability, side.down, side.across) > INVOLVED
        else:
            involved = _shown(lungs.opacity, side) > lungs.opacity.limit
        grades = None if lungs.grades is None else _shown(lungs.grades, side)
        for letter, span, here in side.thirds:
            inside = side.inside[here]
            if not inside.any():
                zones[letter] = None
                continue
            mean = None if grades is None else float(grades[here][inside].mean(dtype=np.float64))
            zones[letter] = _zone(involved[here][inside], evidence[here][inside], span, step, mean, limits)
    missing = [name for name, zone in zones.items() if zone is None]
    return Severity(
        zones=zones,
        total=None if missing else sum(zone.score for zone in zones.values() if zone),
        extent={side: _mean((zones[name] for name in names), "extent") for side, names in ZONES.items()},
        evidence=_mean(zones.values(), "evidence"),
        reason=f"No lung was found in zone {', '.join(missing)}." if missing else None,
        opaque=opaque,
        limits=limits,
    )


def zone_masks(lungs: LungMask) -> dict[str, Mask]:
    """The lung pixels of each zone that was found, bool [H, W] by letter."""
    masks = {}
    for side, lung in (("right", lungs.right), ("left", lungs.left)):
        for letter, span in zip(ZONES[side], _thirds(lungs.boxes[side][0]), strict=True):
            zone = np.zeros_like(lung)
            zone[slice(*span)] = lung[slice(*span)]
            if zone.any():
                masks[letter] = zone
    return masks


def opacity_levels(lungs: LungMask) -> list[float]:
    """For each zone that was found, the least limit of opacity, 0..1, at which it is clear: less than `LIMITS[0]` of
    its pixels exceed it. Nothing where there is no map of opacity."""
    if lungs.opacity is None:
        return []
    levels = []
    for side in _sides(lungs):
        opacity = _shown(lungs.opacity, side)
        for _, _, here in side.thirds:
            if (inside := side.inside[here]).any():
                levels.append(float(np.quantile(opacity[here][inside], 1 - LIMITS[0], method="higher")))
    return levels


def disease(classification: Classification) -> tuple[Pixels, Pixels]:
    """Local log-odds and probability of any disease, f32 [h, w] each, on the classifier's cells."""
    local = classification.cam + classification.bias[:, None, None]
    normal = classification.labels.index(NORMAL)
    others = np.delete(local, normal, axis=0)
    log_odds = np.logaddexp.reduce(others, axis=0) - local[normal]
    return np.asarray(log_odds, np.float32), 1 - softmax(local)[normal]


def score_of(value: float, limits: Limits = LIMITS) -> int:
    """Score 0..3 of an involved share 0..1; with other `limits`, of what they are limits of."""
    return sum(value >= limit for limit in limits)


def contradicts(label: str, scores: Iterable[int | None]) -> bool:
    """Whether a film's most probable class and its zones' scores say different things.

    They do where the class is `NORMAL` and a zone scores `HIGH` or more, and where it is a disease and every zone that
    is scored has 0.
    """
    known = [score for score in scores if score is not None]
    return bool(known) and (max(known) >= HIGH if label == NORMAL else max(known) == 0)


def contradiction(label: str, probability: float, severity: Severity) -> str | None:
    """In words how a film's most probable class, of `probability` 0..1, and its zones say different things, and how
    that can be; None where they do not."""
    known = {letter: zone for letter, zone in severity.zones.items() if zone is not None}
    if not contradicts(label, [zone.score for zone in known.values()]):
        return None
    found = f"The film's most probable class is {label} ({100 * probability:.1f} %), yet"
    if label == NORMAL:
        high = ", ".join(f"{letter} ({shown(zone)})" for letter, zone in known.items() if zone.score >= HIGH)
        found += (
            f" a zone scores {HIGH} or more: {high}."
            if severity.basis == "grade"
            else f" at least a third of the lung counts as involved in zone {high}."
        )
        why = (
            "A finding in one place can be outvoted by the rest."
            if severity.basis == "evidence"
            else "A disease that is no class here, a foreign body or soft tissue before the lungs can hide air, too."
            if severity.basis == "opacity"
            else "A disease that is no class here, a foreign body or soft tissue before the lungs can look ill, too."
        )
    else:
        found += (
            " every zone scores 0."
            if severity.basis == "grade"
            else " in no zone does as much as 5 % of the lung count as involved."
        )
        why = (
            "Evidence in few places, or outside the lungs, can decide the class alone."
            if severity.basis == "evidence"
            else "Faint opacities can be missed, and what a class is told by need not be an opacity."
        )
    return f"{found} {_RULES[severity.basis]} {why} Neither is confirmed by the other: look at the film."


def shown(zone: Zone) -> str:
    """What a zone's score is made of, in words: its grade, or the involved share where it has none. A grade is cut to
    the three decimals that limits have, so that it stands on its score's side of each."""
    return f"{100 * zone.extent:.0f} %" if zone.grade is None else f"grade {math.floor(1000 * zone.grade) / 1000:.3f}"


#: Where class and scores come from, by basis.
_RULES: dict[Basis, str] = {
    "evidence": "Both come from the same map of the same classifier: the class from its mean over the whole view, a "
    "zone's score from its involved share, the lung pixels where, at that place, the probability of any disease is "
    f"above {INVOLVED}.",
    "opacity": "The class is the classifier's; a zone's score is the share of its lung pixels where the segmenter, "
    "which knows no class, finds air hidden.",
    "grade": "The class is the classifier's; a zone's score is how ill it looks to the segmenter, which knows no class "
    "and was fitted to radiologists' scores.",
}


class _Side(NamedTuple):
    """One lung as it is counted: on some rows `down` and columns `across` of the film, in its box.

    inside: bool [len(down), len(across)], which of these pixels are lung. thirds: each zone's letter, its rows of the
    film (start, stop), and which of `down` they are.
    """

    down: NDArray[np.int_]
    across: NDArray[np.int_]
    inside: Mask
    thirds: list[tuple[str, tuple[int, int], slice]]


def _step(lungs: LungMask) -> int:
    """Every how many rows and columns of a film are counted."""
    return max(1, int(min(lungs.mask.shape)) // _COUNTED)


def _sides(lungs: LungMask) -> Iterator[_Side]:
    """The right lung, then the left."""
    step = _step(lungs)
    for side, lung in (("right", lungs.right), ("left", lungs.left)):
        rows, columns = lungs.boxes[side]
        down, across = np.arange(rows.start, rows.stop, step), np.arange(columns.start, columns.stop, step)
        thirds = [
            (letter, span, slice(*np.searchsorted(down, span)))
            for letter, span in zip(ZONES[side], _thirds(rows), strict=True)
        ]
        yield _Side(down, across, lung[rows.start : rows.stop : step, columns.start : columns.stop : step], thirds)


def _thirds(rows: slice) -> list[tuple[int, int]]:
    """The rows (start, stop) of the upper, middle and lower third of a lung whose box has `rows`."""
    return list(pairwise(rows.start + (rows.stop - rows.start) * third // 3 for third in range(4)))


def _shown(found: Opacity | Grades, side: _Side) -> Pixels:
    return found.geometry.at(found.map, side.down, side.across)


def _zone(
    involved: NDArray[np.bool_],
    evidence: Pixels,
    rows: tuple[int, int],
    step: int,
    grade: float | None,
    limits: Limits | None,
) -> Zone:
    """A zone from what is found at every `step`-th row and column of its lung."""
    extent = float(involved.mean())
    score = score_of(extent) if grade is None or limits is None else score_of(grade, limits)
    return Zone(score, involved.size * step**2, extent, float(evidence.mean(dtype=np.float64)), rows, grade)


def _mean(zones: Iterable[Zone | None], fact: Literal["extent", "evidence"]) -> float | None:
    """The mean of a fact over the pixels of those zones that there are."""
    known = [(getattr(zone, fact), zone.pixels) for zone in zones if zone is not None]
    return sum(value * pixels for value, pixels in known) / sum(pixels for _, pixels in known) if known else None


def _none(reason: str, opaque: float | None, limits: Limits | None) -> Severity:
    empty: dict[str, Zone | None] = dict.fromkeys("ABCDEF")
    return Severity(empty, None, {"right": None, "left": None}, None, reason, opaque, limits)
