"""Groups of films that are the same picture: what a split must never tear apart."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

#: Two films are near-duplicates when their thumbnails correlate above this. Pairs between 0.985 and 0.995 were nearly
#: all the same picture with another crop or marker when compared at a higher resolution.
NEAR_DUPLICATE = 0.985
THUMBNAIL = 32


def thumbnails(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """u8 [N, S, S] → f32 [N, 32*32], each row of mean 0 and norm 1 (a constant film's row is 0)."""
    rows = np.empty((len(images), THUMBNAIL * THUMBNAIL), np.float32)
    for i, image in enumerate(images):
        rows[i] = cv2.resize(image, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).ravel()
    rows -= rows.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)
    return unit


def near_duplicates(thumbs: NDArray[np.float32], threshold: float = NEAR_DUPLICATE) -> list[tuple[int, int, float]]:
    """All pairs (i < j, correlation) with a correlation above `threshold`."""
    pairs: list[tuple[int, int, float]] = []
    block = 1024
    for start in range(0, len(thumbs), block):
        correlation = thumbs[start : start + block] @ thumbs[start:].T
        for r, c in zip(*np.nonzero(correlation > threshold), strict=True):
            if r < c:
                pairs.append((start + int(r), start + int(c), float(correlation[r, c])))
    return pairs


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
