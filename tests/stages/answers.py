"""Classifications and lungs made by hand, on grids small enough to compute in the head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lungscope.radiograph import Geometry
from lungscope.stages.classification import Classification, ViewSpec, softmax
from lungscope.stages.segmentation import LungMask


def classification(
    cam: NDArray[np.float32],
    *,
    bias: Sequence[float] | None = None,
    labels: Sequence[str] = ("COVID-19", "Normal"),
    shape: tuple[int, int] | None = None,
) -> Classification:
    """A classification with this map [K, h, h] over a square film, by default of the map's own grid."""
    cam = np.asarray(cam, np.float32)
    offsets = np.zeros(len(cam), np.float32) if bias is None else np.asarray(bias, np.float32)
    logits = cam.mean(axis=(1, 2)) + offsets
    probabilities = softmax(logits)
    geometry = Geometry.letterbox(shape or (cam.shape[1], cam.shape[2]), cam.shape[1])
    return Classification(
        labels=tuple(labels),
        logits=logits,
        probabilities=probabilities,
        label=labels[int(probabilities.argmax())],
        cam=cam,
        bias=offsets,
        geometry=geometry,
        view=ViewSpec("lungs", False, 0.0, cam.shape[1]),
        temperature=1.0,
        conformal=None,
    )


def lungs(right: NDArray[np.bool_], left: NDArray[np.bool_]) -> LungMask:
    mask = right | left
    return LungMask(mask, mask.astype(np.float32), left, right, None, None, ())
