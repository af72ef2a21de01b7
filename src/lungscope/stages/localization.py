"""Stage 4: which place in the lungs decided for the predicted class (paper, "Grad-CAM").

For a head of average pooling and one linear layer, Grad-CAM's map is the class activation map up to a positive constant
(Selvaraju et al. 2017, section 3.1); the network hands it over in logit units, and those are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np

from lungscope.radiograph import Pixels, by_rows
from lungscope.stages.classification import Classification
from lungscope.stages.segmentation import LungMask


@dataclass(frozen=True)
class Saliency:
    """Evidence for `label` on the source grid.

    map: f32 [H, W] >= 0, in logit units, 0 outside the lungs; never rescaled.
    peak: (row, column) of its largest value, None where no lung pixel has evidence. peak_value: that value.
    fraction_in_lungs: share of the evidence that lay in the lungs before it was masked, 0..1; None without evidence.
    """

    map: Pixels
    label: str
    peak: tuple[int, int] | None
    peak_value: float
    fraction_in_lungs: float | None

    def to_json(self) -> dict[str, Any]:
        peak = None if self.peak is None else {"row": self.peak[0], "col": self.peak[1], "value": self.peak_value}
        return {"label": self.label, "unit": "logit", "peak": peak, "fraction_in_lungs": self.fraction_in_lungs}


def localize(classification: Classification, lungs: LungMask) -> Saliency:
    """Bring the positive part of the predicted class's map to the source grid, and keep what lies in the lungs."""
    evidence = np.maximum(classification.cam[classification.index], 0)
    geometry = classification.geometry
    window, around, lung = geometry.to_window(evidence), geometry.inside, lungs.box
    kept = np.zeros(lungs.mask.shape, np.float32)
    shown, mask, inside = window[geometry.in_window(lung)], lungs.mask[lung].view(np.uint8), kept[lung]

    def keep(rows: slice) -> _Band:
        cv2.copyTo(shown[rows], mask[rows], inside[rows])
        _, largest, _, (column, row) = cv2.minMaxLoc(inside[rows])
        return _Band(rows.stop - rows.start, cv2.sumElems(inside[rows])[0], largest, (row, column))

    total = cv2.sumElems(window[geometry.in_window(around)])[0]
    bands = by_rows(keep, inside.shape)
    first = max(range(len(bands)), key=lambda number: bands[number].largest)
    value, (row, column) = bands[first].largest, bands[first].place
    above = sum(band.rows for band in bands[:first])
    return Saliency(
        map=kept,
        label=classification.label,
        peak=(lung[0].start + above + row, lung[1].start + column) if value > 0 else None,
        peak_value=value,
        fraction_in_lungs=sum(band.total for band in bands) / total if total > 0 else None,
    )


class _Band(NamedTuple):
    """Rows of a map: how many, the sum of their values, the largest one and where in the band it is."""

    rows: int
    total: float
    largest: float
    place: tuple[int, int]
