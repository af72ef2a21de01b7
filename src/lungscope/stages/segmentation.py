"""Stage 2: where the lungs are (paper, "Segmentation"), pooled over an ensemble, and whether that is plausible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from lungscope.errors import LungscopeError, QualityError
from lungscope.radiograph import Box, Geometry, Pixels, Radiograph, box
from lungscope.runtime import Network, Weights
from lungscope.stages.quality import Warning_

Mask = NDArray[np.bool_]
Pool = Literal["mean", "union", "vote"]
POOLS: tuple[Pool, ...] = get_args(Pool)

#: Less of the film than this is not a pair of lungs.
MINIMUM_SHARE = 0.01
#: A piece smaller than this share of the largest is a speck.
SPECK = 0.1
#: One lung is narrower than this (width / height of its box); both lungs grown together are wider. Single lungs reach
#: 0.76 and pairs start at 0.60 in the masks of three public sets; the pair is looked for first.
PAIR_ASPECT = 0.7
#: Plausible share of the film, smaller / larger lung, and area / convex hull: what those masks hold, with room.
PLAUSIBLE_SHARE = (0.08, 0.62)
PLAUSIBLE_RATIO = 0.35
PLAUSIBLE_SOLIDITY = 0.6
#: Lungs that lie on more than this share of a border are cut off by it.
CUT_OFF = 0.05
#: A film of twice this shorter side, in pixels, or more is thinned out to it, about, where plausibility is looked at.
_CHECKED = 256
#: Members whose masks overlap less than this (mean pairwise Dice) disagree.
AGREEMENT = 0.9


@dataclass(frozen=True)
class SegmenterSpec:
    """members: the ensemble's files. pool: how their maps become one. threshold: of the pooled map. size: network grid.
    opaque: above which opacity a place of the lungs is involved, 0..1, where each member also has a map of how opaque
    they are; None where not every one has. grades: from which grade on a zone scores 1, 2 and 3, where each member also
    has a map of grades; None where not every one has.

    mean averages the probabilities, union takes the largest ("maximise the segmented area" in the paper), both against
    `threshold`; vote counts members at or above `threshold` and asks for more than half of them.
    """

    members: tuple[Weights, ...]
    pool: Pool
    threshold: float
    size: int
    opaque: float | None = None
    grades: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Opacity:
    """How much of each place of the lungs something hides that air would show, 0..1: f32 [S, S] over the field of view
    of `geometry`. It says nothing outside the lungs. limit: above it a place is involved, 0..1."""

    map: Pixels
    geometry: Geometry
    limit: float


@dataclass(frozen=True)
class Grades:
    """How ill each place of the lungs looks, on the scale of radiologists' scores of a zone, 0 to 3, and beyond: f32
    [S, S] over the field of view of `geometry`. A zone's grade is its mean. It says nothing outside the lungs. limits:
    from which grade on a zone scores 1, 2 and 3."""

    map: Pixels
    geometry: Geometry
    limits: tuple[float, float, float]


@dataclass(frozen=True)
class LungMask:
    """The lungs of one film, all on its own grid [H, W].

    mask: bool, `left | right`. left, right: bool, the patient's: right is on the image's left, but where the film is
    `mirrored`.
    probability: f32 0..1, the pooled map before thresholding (for "vote": the share of members in favour).
    agreement: mean pairwise Dice of the members' masks on the network's grid, 0..1; None with one member.
    opacity, grades: the mean of the members' maps; None where the bundle has none.
    """

    mask: Mask
    probability: Pixels
    left: Mask
    right: Mask
    spacing_mm: tuple[float, float] | None
    agreement: float | None
    warnings: tuple[Warning_, ...]
    opacity: Opacity | None = None
    grades: Grades | None = None

    @cached_property
    def boxes(self) -> dict[str, Box]:
        """The box of the "right" and of the "left" lung; empty where it was not found."""
        return {"right": box(self.right), "left": box(self.left)}

    @cached_property
    def box(self) -> Box:
        """The box of both lungs; empty without any."""
        found = [part for part in self.boxes.values() if part[0].stop] or [(slice(0, 0), slice(0, 0))]
        rows, columns = ([part[axis] for part in found] for axis in (0, 1))
        return (
            slice(min(part.start for part in rows), max(part.stop for part in rows)),
            slice(min(part.start for part in columns), max(part.stop for part in columns)),
        )

    def to_json(self) -> dict[str, Any]:
        def side(mask: Mask) -> dict[str, Any]:
            pixels = int(np.count_nonzero(mask))
            area = None if self.spacing_mm is None else pixels * self.spacing_mm[0] * self.spacing_mm[1] / 100
            return {"found": pixels > 0, "area_px": pixels, "area_cm2": area}

        return {
            "left": side(self.left),
            "right": side(self.right),
            "share_of_film": float(np.count_nonzero(self.mask) / self.mask.size),
            "agreement": self.agreement,
        }


class Segmenter:
    """An ensemble of compiled networks. Safe to call from several threads."""

    def __init__(self, spec: SegmenterSpec, networks: Sequence[Network]) -> None:
        self._spec = spec
        self._networks = tuple(networks)

    def segment(self, film: Radiograph) -> LungMask:
        """Find the lungs. Raises QualityError if there are none, LungscopeError if a network answers with NaN or
        infinity."""
        geometry = Geometry.of_film(film.pixels, self._spec.size)
        image = geometry.to_network(film.pixels)[None, None]
        answers = [network({"image": image}) for network in self._networks]
        maps = [answer["probability"][0, 0] for answer in answers]
        limit, limits = self._spec.opaque, self._spec.grades
        hidden = [] if limit is None else [answer["opacity"][0, 0] for answer in answers]
        graded = [] if limits is None else [answer["grade"][0, 0] for answer in answers]
        if not all(np.isfinite(member).all() for member in (*maps, *hidden, *graded)):
            raise LungscopeError(
                "A segmentation network answered with numbers that are not finite. Try --device cpu; "
                "`lungscope doctor` tests the installation.",
                code="not-finite",
            )
        probability, mask = pool(maps, self._spec.pool, self._spec.threshold, geometry.to_source)
        right, left, merged = split(mask, geometry.middle)
        mask = right | left
        if np.count_nonzero(mask) < MINIMUM_SHARE * mask.size:
            raise QualityError(
                f"No lungs found in {film.source.path or 'the image'}: less than {MINIMUM_SHARE:.0%} of it looks like "
                "lung. Give a frontal chest radiograph, upright, with air dark."
            )
        agreement = _agreement([member >= self._spec.threshold for member in maps])
        if film.mirrored:
            right, left = left, right
        warnings = _implausible(film, right, left, merged=merged, agreement=agreement)
        opacity = None if limit is None else Opacity(np.mean(hidden, axis=0, dtype=np.float32), geometry, limit)
        grades = None if limits is None else Grades(np.mean(graded, axis=0, dtype=np.float32), geometry, limits)
        return LungMask(mask, probability, left, right, film.spacing_mm, agreement, tuple(warnings), opacity, grades)


def pool(
    maps: Sequence[Pixels], how: Pool, threshold: float, to_source: Callable[[Pixels], Pixels]
) -> tuple[Pixels, Mask]:
    """Pool members' maps, f32 [S, S] 0..1 each, on the source grid.

    Returns the pooled map, f32 [H, W] 0..1, and the mask that it is thresholded to, bool [H, W].
    """
    if how == "mean" or len(maps) == 1:
        # Resampling is linear: the mean of the resampled maps is the resampled mean.
        mean = to_source(np.mean(maps, axis=0, dtype=np.float32))
        return mean, mean >= threshold
    sources = [to_source(member) for member in maps]
    if how == "union":
        largest: Pixels = np.maximum.reduce(sources)
        return largest, largest >= threshold
    votes: Pixels = np.sum([member >= threshold for member in sources], axis=0, dtype=np.float32)
    return votes / np.float32(len(maps)), votes > len(maps) / 2


@dataclass(frozen=True)
class _Piece:
    contour: NDArray[np.int32]
    area: float
    left: int
    width: int
    height: int

    @property
    def right(self) -> int:
        return self.left + self.width

    @property
    def middle(self) -> float:
        return self.left + self.width / 2

    def beside(self, other: _Piece) -> bool:
        overlap = min(self.right, other.right) - max(self.left, other.left)
        return overlap < min(self.width, other.width) / 2


def split(mask: Mask, middle: float | None = None) -> tuple[Mask, Mask, bool]:
    """Clean a raw mask [H, W] and part it into (patient's right, patient's left, were they grown together?), where the
    film is not mirrored: the lung on the image's left comes first.

    Holes are filled, and pieces below `SPECK` of the largest are dropped. The two largest pieces that stand side by
    side are the lungs; other pieces go with the nearer one. Where no piece stands beside the largest and that is too
    wide for one lung, it is both: it is cut along the column with the least mask in the middle third of its box. Else
    one lung is missing, and the film's middle tells which: `middle`, a column's edge; None: of the whole grid.
    """
    shape = mask.shape
    pieces = _pieces(mask)
    if not pieces:
        return np.zeros(shape, np.bool_), np.zeros(shape, np.bool_), False
    largest = pieces[0]
    partner = next((piece for piece in pieces[1:] if piece.beside(largest)), None)
    merged = partner is None and largest.width >= PAIR_ASPECT * largest.height
    cut: float
    if merged:
        whole = _fill([largest], shape)
        cut = _thinnest_column(whole, largest)
    elif partner is not None:
        cut = (largest.middle + partner.middle) / 2
    else:
        cut = shape[1] / 2 if middle is None else middle
    others = pieces[1:] if merged else pieces
    right = _fill([piece for piece in others if piece.middle < cut], shape)
    left = _fill([piece for piece in others if piece.middle >= cut], shape)
    if merged:
        column = int(cut)
        right[:, :column] |= whole[:, :column]
        left[:, column:] |= whole[:, column:]
    return right, left, merged


def _pieces(mask: Mask) -> list[_Piece]:
    """The outer outlines of the connected pieces (8 neighbours), largest enclosed area first, without specks."""
    contours, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    pieces = []
    for contour in contours:
        x, _, width, height = cv2.boundingRect(contour)
        pieces.append(_Piece(np.asarray(contour, np.int32), cv2.contourArea(contour), x, width, height))
    pieces.sort(key=lambda piece: (-piece.area, piece.left))
    return [piece for piece in pieces if piece.area >= SPECK * pieces[0].area]


def _fill(pieces: Sequence[_Piece], shape: tuple[int, ...]) -> Mask:
    canvas = np.zeros(shape, np.uint8)
    cv2.drawContours(canvas, [piece.contour for piece in pieces], -1, 1, cv2.FILLED)
    return canvas.view(np.bool_)


def _thinnest_column(mask: Mask, piece: _Piece) -> int:
    start, stop = piece.left + piece.width // 3, piece.right - piece.width // 3
    counts = np.count_nonzero(mask[:, start:stop], axis=0)
    least = start + np.flatnonzero(counts == counts.min())
    return int(least[np.argmin(np.abs(least - piece.middle))])


def dice(a: Mask, b: Mask) -> float:
    """Overlap of two masks, 2|A∩B| / (|A|+|B|), 0..1; two empty ones overlap by 1."""
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return 1.0 if total == 0 else float(2 * np.count_nonzero(a & b) / total)


def _agreement(masks: Sequence[Mask]) -> float | None:
    return float(np.mean([dice(a, b) for a, b in combinations(masks, 2)])) if len(masks) > 1 else None


def _implausible(film: Radiograph, right: Mask, left: Mask, *, merged: bool, agreement: float | None) -> list[Warning_]:
    """What is odd about these lungs. The checks look at every n-th pixel of a large film."""
    found: list[Warning_] = []

    def warn(code: str, message: str) -> None:
        found.append(Warning_(code=code, message=message, stage="segmentation"))

    step = max(1, min(film.shape) // _CHECKED)
    pixels = np.ascontiguousarray(film.pixels[::step, ::step])
    right, left = (np.ascontiguousarray(lung[::step, ::step]) for lung in (right, left))
    mask = right | left
    areas = {"right": np.count_nonzero(right), "left": np.count_nonzero(left)}
    for side, area in areas.items():
        if area == 0:
            warn("lung-missing", f"The patient's {side} lung was not found; its zones are not scored.")
    share = np.count_nonzero(mask) / mask.size
    if not PLAUSIBLE_SHARE[0] <= share <= PLAUSIBLE_SHARE[1]:
        warn(
            "lung-area",
            f"The lungs fill {share:.0%} of the film; {PLAUSIBLE_SHARE[0]:.0%} to {PLAUSIBLE_SHARE[1]:.0%} is usual. "
            "Check that this is one frontal chest film.",
        )
    if 0 < min(areas.values()) < PLAUSIBLE_RATIO * max(areas.values()):
        side = min(areas, key=lambda name: areas[name])
        ratio = min(areas.values()) / max(areas.values())
        warn(
            "lung-asymmetry",
            f"The {side} lung is only {ratio:.0%} of the other's area: part of it may be "
            "missing (opaque, collapsed or removed lung, or a wrong outline).",
        )
    borders = {"top": mask[0], "bottom": mask[-1], "left": mask[:, 0], "right": mask[:, -1]}
    cut = [name for name, line in borders.items() if np.count_nonzero(line) > CUT_OFF * line.size]
    if cut:
        warn("lung-cut-off", f"The lungs reach the film's {' and '.join(cut)} border: parts of them may lie outside.")
    if merged:
        warn("lungs-merged", "Both lungs were found as one piece; they were parted along its thinnest column.")
    if agreement is not None and agreement < AGREEMENT:
        warn(
            "members-disagree",
            f"The segmentation networks agree only to a Dice of {agreement:.2f} (usual: above {AGREEMENT}). "
            "Check the outline.",
        )
    # Columns with one lung before them and the other after them: spine, heart and great vessels.
    before, after = (left, right) if film.mirrored else (right, left)
    between = np.maximum.accumulate(before, axis=1) & np.maximum.accumulate(after[:, ::-1], axis=1)[:, ::-1] & ~mask
    if between.any() and _brightness(pixels, mask) > _brightness(pixels, between):
        warn(
            "polarity",
            "The lungs are brighter than what lies between them: the film looks inverted. Air must be dark; check its "
            "photometric interpretation.",
        )
    for side, lung in (("right", right), ("left", left)):
        solidity = _solidity(lung)
        if solidity < PLAUSIBLE_SOLIDITY:
            warn(
                "lung-shape",
                f"The {side} lung's outline is ragged (area / convex hull {solidity:.2f}). Check the outline.",
            )
    return found


def _solidity(lung: Mask) -> float:
    """Area over the area of the convex hull; 1 for an empty mask."""
    if not lung.any():
        return 1.0
    outlines, _ = cv2.findContours(lung.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    hull = cv2.contourArea(cv2.convexHull(np.concatenate(outlines)))
    return 1.0 if hull == 0 else sum(map(cv2.contourArea, outlines)) / hull


def _brightness(pixels: Pixels, mask: Mask) -> float:
    return cv2.mean(pixels, mask.view(np.uint8))[0]
