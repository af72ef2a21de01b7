"""Groups of films that are the same picture: what a split must never tear apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from lungscope.radiograph import without_frame

#: Two films are near-duplicates when their thumbnails correlate above this. Pairs between 0.985 and 0.995 were nearly
#: all the same picture with another crop or marker when compared at a higher resolution.
NEAR_DUPLICATE = 0.985
THUMBNAIL = 32

#: What is cut off each edge of one of two films, as a share of its side: a rim of a few per cent, or a closer crop,
#: alone brings the same picture down to 0.92.
CROPS = (0.02, 0.04, 0.06, 0.08)


#: Where frames and padding are more than the rest of this share of a film, it is not compared with them left on: they
#: are alike on different films.
MOSTLY_FILM = 0.8


def thumbnails(images: NDArray[np.uint8], crop: float = 0.0, *, framed: bool = False) -> NDArray[np.float32]:
    """u8 [N, H, W] → f32 [N, 32*32], each row of mean 0 and norm 1 (a constant film's row is 0), of what is left
    without padding and frames; framed: with them, and 0 where they are too much (`MOSTLY_FILM`). crop: see `CROPS`."""
    rows = np.zeros((len(images), THUMBNAIL * THUMBNAIL), np.float32)
    for i, image in enumerate(images):
        part = without_frame(image / np.float32(255))
        film = image if part is None else image[part]
        if framed:
            if film.size < MOSTLY_FILM * image.size:
                continue
            film = image
        y, x = (round(crop * side) for side in film.shape)
        inside = film[y : film.shape[0] - y, x : film.shape[1] - x]
        rows[i] = cv2.resize(inside, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).ravel()
    rows -= rows.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)
    return unit


def near_duplicates(images: Sequence[NDArray[np.uint8]]) -> list[tuple[int, int, float]]:
    """All pairs (i < j, correlation) of near-duplicates among the films of all `images`, each u8 [N, H, W], counted
    through: whole beside whole, with frames and without, and whole beside each of the other's `CROPS`; the largest
    correlation of these."""
    whole, framed = (np.concatenate([thumbnails(films, framed=on) for films in images]) for on in (False, True))
    cropped = (np.concatenate([thumbnails(films, crop) for films in images]) for crop in CROPS)
    best: dict[tuple[int, int], float] = {}
    for one, other in ((framed, framed), (whole, whole), *((whole, crop) for crop in cropped)):
        for i, j, r in pairs_above(NEAR_DUPLICATE, one, other):
            if i != j:
                pair = min(i, j), max(i, j)
                best[pair] = max(r, best.get(pair, r))
    return [(i, j, r) for (i, j), r in sorted(best.items())]


def pairs_above(
    threshold: float, thumbs: NDArray[np.float32], others: NDArray[np.float32]
) -> Iterator[tuple[int, int, float]]:
    """All (row of `thumbs`, row of `others`, correlation) with a correlation above `threshold`."""
    block = 1024
    for start in range(0, len(thumbs), block):
        correlation = thumbs[start : start + block] @ others.T
        for r, c in zip(*np.nonzero(correlation > threshold), strict=True):
            yield start + int(r), int(c), float(correlation[r, c])


def groups(n: int, pairs: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Connected components of `pairs` over 0..n-1: for each film the lowest index in its group."""
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in pairs:
        a, b = root(i), root(j)
        parent[max(a, b)] = min(a, b)
    return np.array([root(i) for i in range(n)], np.int64)
