"""Stage 4: which place in the lungs decided for the predicted class (paper, "Grad-CAM").

For a head of average pooling and one linear layer, Grad-CAM's map is the class activation map up to a positive constant
(Selvaraju et al. 2017, section 3.1); the network hands it over in logit units, and those are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from lungscope.radiograph import Pixels
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
    mask, columns = lungs.mask.view(np.uint8), lungs.box[1]
    kept = np.zeros(mask.shape, np.float32)
    peak, largest, total = None, 0.0, 0.0
    for rows, band in classification.geometry.bands(evidence, lungs.box):
        inside = kept[rows, columns]
        cv2.copyTo(band, mask[rows, columns], inside)
        total += cv2.sumElems(inside)[0]
        _, value, _, (column, row) = cv2.minMaxLoc(inside)
        if value > largest:
            peak, largest = (rows.start + row, columns.start + column), value
    everywhere = classification.geometry.total(evidence)
    return Saliency(
        map=kept,
        label=classification.label,
        peak=peak,
        peak_value=largest,
        fraction_in_lungs=min(1.0, total / everywhere) if everywhere > 0 else None,
    )
