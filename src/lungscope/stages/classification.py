"""Stage 3: which class the segmented lungs belong to (paper, "Classification")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lungscope.radiograph import Geometry, Pixels


@dataclass(frozen=True)
class ViewSpec:
    """What a classifier is shown: the lungs alone, the whole film, or the film with the lungs blacked out.

    crop: show the square around the lungs, widened by `margin` of its side on each end, and not the whole film.
    size: side of the network's grid.
    """

    input: Literal["lungs", "image", "background"]
    crop: bool
    margin: float
    size: int


def lung_view(pixels: Pixels, mask: NDArray[np.bool_], spec: ViewSpec) -> tuple[Pixels, Geometry]:
    """Cut a classifier's input f32 [size, size] in 0..1 out of a film [H, W] and its lungs [H, W].

    Pixels are blacked out on the film's own grid, before resampling, so that no trace of them is averaged in.
    """
    geometry = (
        Geometry.around(mask, spec.size, spec.margin) if spec.crop else Geometry.letterbox(mask.shape, spec.size)
    )
    if spec.input == "lungs":
        pixels = np.where(mask, pixels, np.float32(0))
    elif spec.input == "background":
        pixels = np.where(mask, np.float32(0), pixels)
    return geometry.to_network(pixels), geometry
