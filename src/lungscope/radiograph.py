"""A film after the reader, and the one object that maps between its grid and a network's grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from lungscope.hardware import cores

Pixels = NDArray[np.float32]
#: Rows and columns of a film.
Box = tuple[slice, slice]
#: (a, b, c, d, e, f): takes (x, y) to (a x + b y + c, d x + e y + f).
Affine = tuple[float, float, float, float, float, float]
Result = TypeVar("Result")

#: Pixels from which work on two cores is done sooner than on one, in spite of starting threads for it.
_LARGE = 2**20
#: Degrees by which a film is turned at most, so that both lungs stand level. Where they lie further apart it is not for
#: how the patient stood.
_MOST_TILT = 20.0
#: How many rows of a shrunk film are computed together: so few that their part of the film stays in a core's cache.
_TOGETHER = 4


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
    where the window is the field of view.
    """

    source_shape: tuple[int, int]
    top: int
    left: int
    side: int
    size: int
    affine: Affine | None = None

    @classmethod
    def letterbox(cls, shape: tuple[int, int], size: int) -> Geometry:
        """The smallest centred square that holds the whole film."""
        height, width = shape
        side = max(height, width)
        return cls((height, width), (height - side) // 2, (width - side) // 2, side, size)

    @classmethod
    def around(cls, mask: NDArray[np.bool_], size: int, margin: float) -> Geometry:
        """The square around the bounding box of `mask` (bool [H, W], not empty), widened by `margin` of its longer side
        on each end."""
        rows, columns = box(mask)
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if height == 0:
            raise ValueError("Geometry.around needs a mask with at least one pixel set")
        side = max(1, round(max(height, width) * (1 + 2 * margin)))
        top, left = rows.start - (side - height) // 2, columns.start - (side - width) // 2
        return cls((mask.shape[0], mask.shape[1]), top, left, side, size)

    @classmethod
    def along(cls, right: NDArray[np.bool_], left: NDArray[np.bool_], size: int, margin: float) -> Geometry:
        """The patient's right and left lung (bool [H, W], not both empty) brought to one pose: turned so that their
        middles stand level, and stretched so that they fill the field of view, but for `margin` of width and height on
        each end. With one lung nothing is turned."""
        mask = right | left
        outlines, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        if not outlines:
            raise ValueError("Geometry.along needs masks with at least one pixel set")
        tilt = 0.0
        if right.any() and left.any():
            (x, y), (other_x, other_y) = map(_middle, (right, left))
            tilt = math.radians(np.clip(math.degrees(math.atan2(other_y - y, other_x - x)), -_MOST_TILT, _MOST_TILT))
        turn = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
        # Outlines run through the middles of pixels, which reach half a pixel further.
        level = (np.concatenate(outlines)[:, 0] + 0.5) @ turn
        low, high = level.min(axis=0) - 0.5, level.max(axis=0) + 0.5
        extent = (high - low) * (1 + 2 * margin)
        axes = turn * extent
        corner = turn @ (low + high) / 2 - axes.sum(axis=1) / 2
        corners = corner + np.array([(0, 0), (1, 0), (0, 1), (1, 1)]) @ axes.T
        start, stop = np.floor(corners.min(axis=0)).astype(int), np.ceil(corners.max(axis=0)).astype(int)
        side = int((stop - start).max())
        (a, b), (d, e) = (axes / side).tolist()
        c, f = ((corner - start) / side).tolist()
        return cls((mask.shape[0], mask.shape[1]), int(start[1]), int(start[0]), side, size, (a, b, c, d, e, f))

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
            along[begin:end, columns] = np.maximum(share / step, 0).astype(np.float32) @ part
        return np.asarray(cv2.resize(along, (self.size, self.size), interpolation=cv2.INTER_AREA), np.float32)

    @property
    def inside(self) -> Box:
        """The rows and columns of the film that lie in the window."""
        height, width = self.source_shape
        rows = slice(max(self.top, 0), min(self.top + self.side, height))
        return rows, slice(max(self.left, 0), min(self.left + self.side, width))

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
        if grid.shape[0] > self.side or self.affine is not None:
            return np.asarray(self.to_window(grid)[np.ix_(rows - self.top, columns - self.left)], np.float32)
        grid = np.asarray(grid, np.float32)

        def between(places: NDArray[np.integer], start: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Pixels]:
            last = grid.shape[0] - 1
            exact = np.clip((places - start + 0.5) * (grid.shape[0] / self.side) - 0.5, 0, last)
            low = np.floor(exact).astype(np.intp)
            return low, np.minimum(low + 1, last), (exact - low).astype(np.float32)

        low, high, share = between(rows, self.top)
        along = grid[low] + share[:, None] * (grid[high] - grid[low])
        low, high, share = between(columns, self.left)
        before = along[:, low]
        return np.asarray(before + share * (along[:, high] - before), np.float32)

    def to_source(self, grid: Pixels) -> Pixels:
        """Resample a map over the network's field of view, [h, w] with h = w of any size, to f32 [H, W]; 0 outside
        the window."""
        part = self.to_window(grid)[self.in_window(self.inside)]
        if part.shape == self.source_shape:
            return np.ascontiguousarray(part)
        out = np.zeros(self.source_shape, np.float32)
        out[self.inside] = part
        return out


def by_rows(work: Callable[[slice], Result], shape: tuple[int, ...]) -> list[Result]:
    """What `work` makes of bands of rows of a large grid of `shape` (H, W), from the top, one a core, computed side by
    side; of a small one, all rows."""
    count = cores() if shape[0] * shape[1] >= _LARGE else 1
    edges = [shape[0] * number // count for number in range(count + 1)]
    bands = [slice(*edge) for edge in pairwise(edges)]
    if count == 1:
        return [work(bands[0])]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, bands))


def in_bands(work: Callable[[Pixels], Result], grid: Pixels) -> list[Result]:
    """`by_rows` of `grid` [H, W], where `work` is given the rows themselves."""
    return by_rows(lambda band: work(grid[band]), grid.shape)


def _middle(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """x and y of the centre of gravity of a mask that is not empty."""
    moments = cv2.moments(mask.view(np.uint8), binaryImage=True)
    return moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]


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
