"""A film after the reader, and the one object that maps between its grid and a network's grid."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]
#: Rows and columns of a film.
Box = tuple[slice, slice]
#: (a, b, c, d, e, f): takes (x, y) to (a x + b y + c, d x + e y + f).
Affine = tuple[float, float, float, float, float, float]

#: Patient Orientation of two directions.
_DIRECTIONS = re.compile(r"([ALRPHF]{1,3})\\([ALRPHF]{1,3})")
#: Pixels of a window from which it is shrunk row by row.
_LARGE = 2**20
#: Degrees by which a film is turned at most, so that both lungs stand level. Where they lie further apart it is not for
#: how the patient stood.
_MOST_TILT = 20.0
#: How bright the black of a frame may be, and how dark its white, for what JPEG leaves beside an edge; how far from a
#: grey what is of it may be; and what share of a line may be otherwise, for a side marker.
_BLACK, _EVEN, _MARKED = 10 / 255, 2 / 255, 0.02
#: How many rows of a shrunk film are computed together: so few that their part of the film stays in a core's cache.
_TOGETHER = 4
#: And of a grown map.
_BAND = 64
#: Multiplications up to which OpenBLAS computes a product on one thread, whatever the processor.
_ALONE = 2**18


@dataclass(frozen=True)
class Source:
    """Where a film came from.

    `tags` keeps what the reader found worth keeping (DICOM keywords, or the raster format and mode), as text.
    """

    path: Path | None
    sha256: str
    format: str
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Radiograph:
    """One frontal chest film.

    pixels: f32 [H, W], 0..1, bright = dense (bone is bright, air is dark), rows from head to feet.
    spacing_mm: (row, column) distance of pixel centres in mm, or None where the file does not say.
    spacing_origin: the DICOM attribute that `spacing_mm` came from (PS3.3 10.7.1.3), or None.
    """

    pixels: Pixels
    source: Source
    spacing_mm: tuple[float, float] | None = None
    spacing_origin: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        height, width = self.pixels.shape
        return height, width

    @property
    def orientation(self) -> tuple[str, str]:
        """Whereto its rows and its columns run, in the patient (Patient Orientation, PS3.3 C.7.6.1.1.1); empty where
        that is not said, or not in the standard's letters."""
        found = _DIRECTIONS.fullmatch(self.source.tags.get("PatientOrientation", "").upper())
        return (found[1], found[2]) if found else ("", "")

    @property
    def pixel_aspect(self) -> tuple[float, float]:
        """Height and width of a pixel, in mm where its spacing is known, else as Pixel Aspect Ratio has them (PS3.3
        C.7.6.3.1.7); 1 and 1 where nothing says."""
        if self.spacing_mm is not None:
            return self.spacing_mm
        ratio = re.fullmatch(r"([1-9][0-9]*)\\([1-9][0-9]*)", self.source.tags.get("PixelAspectRatio", ""))
        return (float(ratio[1]), float(ratio[2])) if ratio else (1.0, 1.0)

    @property
    def mirrored(self) -> bool:
        """Whether the file says that its rows run towards the patient's right: then the patient's right is on the
        image's right, else on its left."""
        return self.orientation[0].startswith("R")


def box(mask: NDArray[np.bool_]) -> Box:
    """The rows and columns of the smallest box that holds all set pixels of `mask` [H, W]; both empty without any."""
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    return slice(top, top + height), slice(left, left + width)


@dataclass(frozen=True)
class Geometry:
    """A square window on the source grid, and the square network grid that it is resampled to.

    The window may reach beyond the film; what lies outside is 0. All resampling in lungscope happens here: shrinking
    averages over the area that a pixel covers, growing is bilinear, both with pixel centres at half-integers.

    source_shape: (H, W) of the film. top, left, side: the window, in source pixels. size: side of the network grid.
    affine: where in the window a place of the network's field of view lies, both from 0 at the top left to 1; None
    where the window is the field of view. part: what of the film counts, the rest being 0; None for all of it.
    """

    source_shape: tuple[int, int]
    top: int
    left: int
    side: int
    size: int
    affine: Affine | None = None
    part: Box | None = None

    @classmethod
    def letterbox(cls, shape: tuple[int, int], size: int) -> Geometry:
        """The smallest centred square that holds the whole film."""
        height, width = shape
        side = max(height, width)
        return cls((height, width), (height - side) // 2, (width - side) // 2, side, size)

    @classmethod
    def of_film(cls, pixels: Pixels, size: int) -> Geometry:
        """`letterbox` of what of a film, f32 [H, W] in 0..1, is left without the frames that a collimator or a
        program may have put around it (`without_frame`)."""
        whole = cls.letterbox((pixels.shape[0], pixels.shape[1]), size)
        part = without_frame(pixels)
        if part is None:
            return whole
        rows, columns = part
        inner = cls.letterbox((rows.stop - rows.start, columns.stop - columns.start), size)
        top, left = inner.top + rows.start, inner.left + columns.start
        return replace(inner, source_shape=whole.source_shape, top=top, left=left, part=part)

    @classmethod
    def around(cls, shape: tuple[int, int], part: Box, size: int, margin: float) -> Geometry:
        """The square around a part, not empty, of a film of `shape` [H, W], widened by `margin` of its longer side on
        each end."""
        rows, columns = part
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if height == 0:
            raise ValueError("Geometry.around needs a part with at least one pixel")
        side = max(1, round(max(height, width) * (1 + 2 * margin)))
        top, left = rows.start - (side - height) // 2, columns.start - (side - width) // 2
        return cls(shape, top, left, side, size)

    @classmethod
    def along(cls, one: NDArray[np.bool_], other: NDArray[np.bool_], size: int, margin: float) -> Geometry:
        """Two lungs (bool [H, W], not both empty) brought to one pose: turned so that their middles stand level, and
        stretched so that they fill the field of view, but for `margin` of width and height on each end. With one lung
        nothing is turned."""
        outlines: list[NDArray[np.generic]] = []
        middles: list[NDArray[np.float64]] = []
        for lung in (one, other):
            rows, columns = box(lung)
            if rows.stop:
                part, corner = lung[rows, columns], np.array([columns.start, rows.start])
                found, _ = cv2.findContours(part.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
                outlines.extend(outline[:, 0] + corner for outline in found)
                middles.append(_middle(part) + corner)
        if not outlines:
            raise ValueError("Geometry.along needs masks with at least one pixel set")
        tilt = 0.0
        if len(middles) == 2:
            (x, y), (other_x, other_y) = sorted(map(tuple, middles))
            tilt = math.radians(np.clip(math.degrees(math.atan2(other_y - y, other_x - x)), -_MOST_TILT, _MOST_TILT))
        turn = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
        # Outlines run through the middles of pixels, which reach half a pixel further.
        level = (np.concatenate(outlines) + 0.5) @ turn
        low, high = level.min(axis=0) - 0.5, level.max(axis=0) + 0.5
        extent = (high - low) * (1 + 2 * margin)
        axes = turn * extent
        corner = turn @ (low + high) / 2 - axes.sum(axis=1) / 2
        corners = corner + np.array([(0, 0), (1, 0), (0, 1), (1, 1)]) @ axes.T
        start, stop = np.floor(corners.min(axis=0)).astype(int), np.ceil(corners.max(axis=0)).astype(int)
        side = int((stop - start).max())
        (a, b), (d, e) = (axes / side).tolist()
        c, f = ((corner - start) / side).tolist()
        return cls((one.shape[0], one.shape[1]), int(start[1]), int(start[0]), side, size, (a, b, c, d, e, f))

    def to_network(self, grid: NDArray[np.generic]) -> Pixels:
        """Resample a source-grid array [H, W] to f32 [size, size]. A bool mask becomes the share of each cell that is
        set."""
        if self.affine is not None:
            return self._turned(self.affine, lambda window: window.to_network(grid))
        if grid.shape != self.source_shape:
            raise ValueError(f"expected an array of the source grid {self.source_shape}, got {grid.shape}")
        part = np.asarray(grid[self.inside], np.float32)
        if self._large:
            return self._average(part, None)
        if part.shape == (self.side, self.side):
            return _resample(part, self.size)
        window = np.zeros((self.side, self.side), np.float32)
        window[self.in_window(self.inside)] = part
        return _resample(window, self.size)

    def masked(self, film: Pixels, mask: NDArray[np.bool_]) -> Pixels:
        """Resample a film [H, W] whose pixels outside `mask` [H, W] are blacked out to f32 [size, size]."""
        if self.affine is not None:
            return self._turned(self.affine, lambda window: window.masked(film, mask))
        film, shown = film[self.inside], mask[self.inside].view(np.uint8)
        if self._large:
            return self._average(film, shown)
        window = np.zeros((self.side, self.side), np.float32)
        cv2.copyTo(film, shown, window[self.in_window(self.inside)])
        return _resample(window, self.size)

    def _turned(self, affine: Affine, shown: Callable[[Geometry], Pixels]) -> Pixels:
        """What the field of view shows, f32 [size, size], of what `shown` makes of the whole window, which is given to
        it with a grid so fine that nothing is shrunk any more on the way from it to the network's."""
        a, b, _, d, e, _ = affine
        window = replace(self, size=round(self.size / max(math.hypot(a, d), math.hypot(b, e))), affine=None)
        return _warp(shown(window), affine, self.size, cv2.INTER_LINEAR, cv2.BORDER_CONSTANT)

    @property
    def _large(self) -> bool:
        return self.side**2 >= _LARGE and self.side >= 2 * self.size

    def _average(self, film: Pixels, shown: NDArray[np.uint8] | None) -> Pixels:
        """What OpenCV's INTER_AREA makes of a large window, in half its time, and without ever holding it whole: each
        row of the result is a product of weights and some rows of the film. film, shown: what is `inside`."""
        step = self.side / self.size
        rows, columns = self.in_window(self.inside)
        along = np.zeros((self.size, self.side), np.float32)
        black = np.empty((math.ceil(_TOGETHER * step) + 1, film.shape[1]), np.float32)
        for begin in range(0, self.size, _TOGETHER):
            end = min(begin + _TOGETHER, self.size)
            start = max(math.floor(begin * step), rows.start)
            stop = min(math.ceil(end * step), rows.stop)
            if start >= stop:
                continue
            part = film[start - rows.start : stop - rows.start]
            if shown is not None:
                lit = black[: stop - start]
                lit.fill(0)
                cv2.copyTo(part, shown[start - rows.start : stop - rows.start], lit)
                part = lit
            here, there = np.arange(start, stop), np.arange(begin, end)[:, None]
            share = np.minimum(here + 1, (there + 1) * step) - np.maximum(here, there * step)
            along[begin:end, columns] = _product(np.maximum(share / step, 0).astype(np.float32), part)
        return np.asarray(cv2.resize(along, (self.size, self.size), interpolation=cv2.INTER_AREA), np.float32)

    @property
    def middle(self) -> float:
        """The column, counted in edges from the film's left, that halves what is left without a frame."""
        columns = slice(0, self.source_shape[1]) if self.part is None else self.part[1]
        return (columns.start + columns.stop) / 2

    @property
    def inside(self) -> Box:
        """The rows and columns of the film that count and lie in the window."""
        height, width = self.source_shape
        rows, columns = self.part or (slice(0, height), slice(0, width))
        return (
            slice(max(self.top, rows.start), min(self.top + self.side, rows.stop)),
            slice(max(self.left, columns.start), min(self.left + self.side, columns.stop)),
        )

    def to_window(self, grid: Pixels) -> Pixels:
        """Resample a map over the network's field of view, [h, w] with h = w of any size, to the window, f32
        [side, side]; 0 where the window is not in the field of view."""
        grid = np.ascontiguousarray(grid, np.float32)
        if self.affine is None:
            return _resample(grid, self.side)
        back = _inverse(self.affine)
        seen = _warp(np.ones_like(grid), back, self.side, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT)
        return seen * _warp(grid, back, self.side, cv2.INTER_LINEAR, cv2.BORDER_REPLICATE)

    def in_window(self, part: Box) -> Box:
        """Where rows and columns of the film, which must be `inside`, lie in the window."""
        rows, columns = part
        return (
            slice(rows.start - self.top, rows.stop - self.top),
            slice(columns.start - self.left, columns.stop - self.left),
        )

    def at(self, grid: Pixels, rows: NDArray[np.integer], columns: NDArray[np.integer]) -> Pixels:
        """A map over the network's field of view, [h, w] with h = w of any size, at the crossings of rows and columns
        of the film, which must be `inside`: f32 [len(rows), len(columns)], as `to_window` has it there."""
        if not self._grows(grid):
            return np.asarray(self.to_window(grid)[np.ix_(rows - self.top, columns - self.left)], np.float32)
        low, high, share = self._between(rows - self.top, len(grid))
        along = grid[low] + share[:, None] * (grid[high] - grid[low])
        low, high, share = self._between(columns - self.left, len(grid))
        before = along[:, low]
        return np.asarray(before + share * (along[:, high] - before), np.float32)

    def bands(self, grid: Pixels, part: Box) -> Iterator[tuple[slice, Pixels]]:
        """`at` all rows and columns of `part`, some rows after the others, so that they stay in a core's cache: which
        rows of the film, and f32 [rows, columns]."""
        rows, columns = part
        if not self._grows(grid):
            yield rows, self.to_window(grid)[self.in_window(part)]
            return
        down = self._counts(np.arange(rows.start, rows.stop) - self.top, len(grid))
        along = _product(grid, self._counts(np.arange(columns.start, columns.stop) - self.left, len(grid)).T)
        for start in range(0, len(down), _BAND):
            band = _product(down[start : start + _BAND], along)
            yield slice(rows.start + start, rows.start + start + len(band)), band

    def total(self, grid: Pixels) -> float:
        """The sum of `at` all rows and columns that are `inside`."""
        if not self._grows(grid):
            return cv2.sumElems(self.to_window(grid)[self.in_window(self.inside)])[0]
        down, along = (
            self._counts(np.arange(part.start, part.stop), len(grid)).sum(axis=0, dtype=np.float64)
            for part in self.in_window(self.inside)
        )
        return float(down @ grid @ along)

    def _grows(self, grid: Pixels) -> bool:
        """Whether a map comes to the window by growing alone."""
        return self.affine is None and len(grid) <= self.side

    def _between(self, places: NDArray[np.integer], cells: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Pixels]:
        """Which two of `cells` in a row places of the window lie between, in pixels from its edge, and how far on the
        way from the one to the other, 0..1."""
        exact = np.clip((places + 0.5) * (cells / self.side) - 0.5, 0, cells - 1)
        low = np.floor(exact).astype(np.intp)
        return low, np.minimum(low + 1, cells - 1), (exact - low).astype(np.float32)

    def _counts(self, places: NDArray[np.integer], cells: int) -> Pixels:
        """How much each of `cells` counts at `places`, as `_between` has it: f32 [len(places), cells]."""
        low, high, share = self._between(places, cells)
        counts, each = np.zeros((len(places), cells), np.float32), np.arange(len(places))
        counts[each, low] = 1 - share
        counts[each, high] += share
        return counts

    def to_source(self, grid: Pixels) -> Pixels:
        """Resample a map over the network's field of view, [h, w] with h = w of any size, to f32 [H, W]; 0 outside
        the window."""
        part = self.to_window(grid)[self.in_window(self.inside)]
        if part.shape == self.source_shape:
            return np.ascontiguousarray(part)
        out = np.zeros(self.source_shape, np.float32)
        out[self.inside] = part
        return out


def without_frame(pixels: Pixels) -> Box | None:
    """What of a film, f32 [H, W] in 0..1, is left without rows and columns at its edges that are black, white, or of
    one grey, but for `_MARKED` of them; None where there are none, or nothing else."""
    height, width = pixels.shape
    top, bottom, left, right, before = 0, height, 0, width, (0, 0, 0, 0)
    while before != (top, bottom, left, right):  # a frame may lie in another
        before = top, bottom, left, right
        lines = pixels[top:bottom, left:right]
        if (above := _frame(lines)) == len(lines):
            return None
        top, bottom = top + above, bottom - _frame(lines[::-1])
        lines = pixels[top:bottom, left:right].T
        if (above := _frame(lines)) == len(lines):
            return None
        left, right = left + above, right - _frame(lines[::-1])
    return None if before == (0, height, 0, width) else (slice(top, bottom), slice(left, right))


def _frame(lines: Pixels) -> int:
    """How many lines of pixels [N, L] are black, white or of one grey before the first one that is not. Grey ones count
    where an edge ends them, which more than half of that line is past: a body may be even, too."""
    sure = 0
    for number, line in enumerate(lines):
        most = _MARKED * len(line)
        if np.count_nonzero(line > _BLACK) <= most or np.count_nonzero(line < 1 - _BLACK) <= most:
            sure = number + 1
        elif _unlike(line, line) > most:
            edge = number > sure and _unlike(line, lines[number - 1]) > len(line) / 2
            return number if edge else sure
    return len(lines)


def _unlike(line: Pixels, other: Pixels) -> int:
    """How many pixels of a line are not of the grey that another one is of."""
    return int(np.count_nonzero(np.abs(line - np.median(other)) > _EVEN))


def _product(one: Pixels, other: Pixels) -> Pixels:
    """The matrix product, in parts so small that BLAS leaves them to this thread. Threads of its own would keep their
    cores for some 50 ms more, waiting for the next product, while the networks want them."""
    found = np.empty((len(one), other.shape[1]), np.float32)
    width = max(1, _ALONE // max(1, one.size))
    for start in range(0, found.shape[1], width):
        found[:, start : start + width] = one @ other[:, start : start + width]
    return found


def _middle(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """x and y of the centre of gravity of a mask that is not empty, in pixels from the middle of the first one."""
    sums = [cv2.reduce(mask.view(np.uint8), axis, cv2.REDUCE_SUM, dtype=cv2.CV_32S).ravel() for axis in (0, 1)]
    return np.array([np.average(np.arange(len(each)), weights=each) for each in sums])


def _inverse(affine: Affine) -> Affine:
    """What takes every place back."""
    a, b, c, d, e, f = affine
    area = a * e - b * d
    a, b, d, e = e / area, -b / area, -d / area, a / area
    return a, b, -(a * c + b * f), d, e, -(d * c + e * f)


def _warp(grid: Pixels, affine: Affine, size: int, how: int, beyond: int) -> Pixels:
    """f32 [size, size] that at each place, from 0 at the top left to 1, has what `grid`, [h, h], has where `affine`
    takes it."""
    a, b, c, d, e, f = affine
    side, scale = grid.shape[0], grid.shape[0] / size
    places = [
        [a * scale, b * scale, (a + b) * scale / 2 + c * side - 0.5],
        [d * scale, e * scale, (d + e) * scale / 2 + f * side - 0.5],
    ]
    flags = how | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(grid, np.array(places), (size, size), flags=flags, borderMode=beyond), np.float32)


def _resample(grid: Pixels, size: int) -> Pixels:
    side = grid.shape[0]
    if side == size:
        return np.array(grid, order="C")
    if side < size:
        return np.asarray(cv2.resize(grid, (size, size), interpolation=cv2.INTER_LINEAR), np.float32)
    return np.asarray(cv2.resize(grid, (size, size), interpolation=cv2.INTER_AREA), np.float32)
