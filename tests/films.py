"""Drawn films: two dark lungs in a bright chest, with opacities where a test wants them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from lungscope.radiograph import Pixels, Radiograph, Source

TISSUE, LUNG, OPACITY = 0.8, 0.15, 0.45


def draw(
    height: int = 320,
    width: int = 288,
    *,
    opacities: Sequence[tuple[float, float, float]] = (),
    lungs: Sequence[str] = ("right", "left"),
) -> Pixels:
    """A film f32 [height, width]. opacities: (row, column, radius) as shares of height, width and width."""
    film = np.full((height, width), TISSUE, np.float32)
    inside = np.zeros((height, width), np.uint8)
    for side, column in (("right", 0.28), ("left", 0.72)):
        if side in lungs:
            centre, axes = (round(column * width), round(0.5 * height)), (round(0.17 * width), round(0.34 * height))
            cv2.ellipse(inside, centre, axes, 0, 0, 360, 1, cv2.FILLED)
    film[inside == 1] = LUNG
    for row, column, radius in opacities:
        spot = np.zeros_like(inside)
        cv2.circle(spot, (round(column * width), round(row * height)), round(radius * width), 1, cv2.FILLED)
        film[(spot & inside) == 1] = OPACITY
    return film


def radiograph(
    pixels: Pixels, *, path: Path | None = None, spacing_mm: tuple[float, float] | None = None, **tags: str
) -> Radiograph:
    """A film as the reader would hand it over."""
    source = Source(path, hashlib.sha256(pixels.tobytes()).hexdigest(), "drawn", dict(tags))
    return Radiograph(pixels, source, spacing_mm, "PixelSpacing" if spacing_mm else None)


def save(path: Path, pixels: Pixels) -> Path:
    """Write a film as an 8-bit grey PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data: NDArray[np.uint8] = np.round(pixels * 255).astype(np.uint8)
    ok, encoded = cv2.imencode(".png", data)
    assert ok
    path.write_bytes(encoded.tobytes())
    return path
