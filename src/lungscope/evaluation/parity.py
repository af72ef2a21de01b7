"""Whether two ways to compute the same weights give the same results, film by film."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lungscope.evaluation.metrics import dice
from lungscope.evaluation.scoring import Progress
from lungscope.pipeline import Analyzer
from lungscope.radiograph import Pixels
from lungscope.report import Report
from lungscope.stages.segmentation import Mask
from lungscope.statistics import or_null

Reference = Callable[[Path], tuple[str, Mask, Pixels]]


def agreement(
    analyzer: Analyzer, reference: Reference, paths: Sequence[Path], progress: Progress | None = None
) -> dict[str, Any]:
    """How far `analyzer` and `reference` agree over films.

    reference: a film's class, lungs bool [H, W], and Grad-CAM's map f32 [H, W], of any scale, 0 outside the lungs.
    same_class: the share of films. dice: of the two masks, strict; two empty ones agree. correlation: Pearson's, of
    evidence above 0 with the reference's map, inside lungs that both found; undefined where either is constant.
    A film that `analyzer` can not analyse is left to neither: it counts under "failed" alone.
    """

    def compare(path: Path, report: Report) -> dict[str, Any]:
        label, mask, cam = reference(path)
        found = None if report.classification is None else report.classification.label
        both = mask & report.lungs.mask
        correlation = np.nan
        if report.saliency is not None and both.any():
            ours, theirs = np.maximum(report.saliency.map[both], 0), cam[both]
            if np.ptp(ours) and np.ptp(theirs):
                correlation = float(np.corrcoef(ours, theirs)[0, 1])
        return {
            "film": path.name,
            "label": found,
            "reference": label,
            "dice": float(dice(report.lungs.mask, mask, ignore_empty=False)[0]),
            "correlation": or_null(correlation),
        }

    rows = []
    for n, (path, result) in enumerate(zip(paths, analyzer.analyze_many(paths), strict=True), start=1):
        if isinstance(result, Report):
            rows.append(compare(path, result))
        if progress is not None:
            progress(n, len(paths))
    differ = [row for row in rows if row["label"] != row["reference"]]
    overlaps = [row["dice"] for row in rows]
    maps = [row["correlation"] for row in rows if row["correlation"] is not None]
    return {
        "films": len(rows),
        "failed": len(paths) - len(rows),
        "same_class": None if not rows else 1 - len(differ) / len(rows),
        "other_class": differ,
        "dice": _spread(overlaps),
        "correlation": _spread(maps),
    }


def _spread(values: Sequence[float]) -> dict[str, float | int | None]:
    if not values:
        return {"n": 0, "mean": None, "p1": None, "lowest": None}
    return {
        "n": len(values),
        "mean": float(np.mean(values)),
        "p1": float(np.percentile(values, 1)),
        "lowest": min(values),
    }
