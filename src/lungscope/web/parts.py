"""The parts of a result, each made when it is asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from lungscope.errors import NotFoundError
from lungscope.report import Report
from lungscope.stages.localization import Saliency
from lungscope.stages.segmentation import Mask
from lungscope.stages.severity import ZONES, contradiction
from lungscope.web.jobs import Job
from lungscope.writers import dicom
from lungscope.writers.atomic import whole_file
from lungscope.writers.folder import encode_mask, folder_names
from lungscope.writers.html import page
from lungscope.writers.json import dumps
from lungscope.writers.overlay import EVIDENCE_SCALE, heat_layer, png, render, roomiest, shrunk

#: Longer side of film.png at most, and of saliency.png: a map of the classifier's few cells has no finer detail.
FILM_SIDE, HEAT_SIDE = 2048, 512
#: How far an outline in layers.json may be from the mask's, as a share of the film's longer side.
OUTLINE_TOLERANCE = 0.0005

#: Bytes of a film's stem in its folder's name: file systems take 255 for all of it, and some letters are four.
STEM_BYTES = 200

#: zlib's fastest level: a film is encoded to be sent once.
_FAST = [cv2.IMWRITE_PNG_COMPRESSION, 1]

#: Why a DICOM object is not there.
ABSENT = {"film": "the film is DICOM already.", "saliency": "there is no evidence to be shown."}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """A finished job, for as long as parts are made of it."""

    job: Job
    report: Report

    @cached_property
    def objects(self) -> dict[str, Dataset]:
        """Its DICOM objects, which refer to each other: all are made where one is asked for."""
        film = None
        if self.report.source.format == "DICOM":
            try:
                film = self.job.upload.read_bytes()
            except FileNotFoundError:
                raise NotFoundError(f"{self.job.name} was removed.") from None
        return dicom.objects(self.report, new_study=film is None, film=film)


@dataclass(frozen=True)
class Part:
    """media: its media type. about: what it holds. make: makes it of a result. save: whether it is offered as a file to
    save, and never shown inside lungscope's own origin."""

    media: str
    about: str
    make: Callable[[Result], bytes]
    save: bool = False


def film_png(report: Report) -> bytes:
    """The film as an 8-bit grey PNG on its own grid, or shrunk to a longer side of `FILM_SIDE`."""
    return _png(cv2.convertScaleAbs(shrunk(report.film.pixels, FILM_SIDE), alpha=255))


def saliency_png(saliency: Saliency) -> bytes:
    """The evidence in `writers.overlay`'s colours as an RGBA PNG, longer side at most `HEAT_SIDE`; clear where none."""
    return _png(cv2.cvtColor(heat_layer(saliency.map, HEAT_SIDE), cv2.COLOR_RGBA2BGRA))


def layers(report: Report) -> dict[str, Any]:
    """What is drawn over a film, as outlines: lists of rings of [x, y] in source pixels, (0, 0) the film's corner.

    zones have the score 0..3, the grade or null, the share involved in percent, and the place where a label fits best.
    contradicts: how they say another thing than the class, in words; None where they do not.
    """
    height, width = report.film.shape
    tolerance = OUTLINE_TOLERANCE * max(height, width)
    sides = {"right": report.lungs.right, "left": report.lungs.left}
    known = {} if report.severity is None else report.severity.zones
    zones = []
    for side, letters in ZONES.items():
        for letter in letters:
            zone = known.get(letter)
            if zone is None:
                continue
            start, stop = zone.rows
            part = sides[side][start:stop]
            column, row = roomiest(part)
            zones.append(
                {
                    "letter": letter,
                    "side": side,
                    "score": zone.score,
                    "grade": zone.grade,
                    "extent_percent": 100 * zone.extent,
                    "outline": rings(part, row=start, tolerance=tolerance),
                    "label": [column + 0.5, start + row + 0.5],
                }
            )
    answer, saliency = report.classification, report.saliency
    peak = None if saliency is None or saliency.peak is None else [saliency.peak[1] + 0.5, saliency.peak[0] + 0.5]
    return {
        "width": width,
        "height": height,
        "lungs": {side: rings(mask, row=0, tolerance=tolerance) for side, mask in sides.items()},
        "zones": zones,
        "contradicts": None
        if answer is None or report.severity is None
        else contradiction(answer.label, float(answer.probabilities[answer.index]), report.severity),
        "peak": peak,
        "evidence_scale": EVIDENCE_SCALE,
    }


def rings(mask: Mask, *, row: int, tolerance: float) -> list[list[list[float]]]:
    """Outlines of a mask bool [H, W] whose first row is `row` of the film, through the centres of its edge pixels."""
    contours, _ = cv2.findContours(_bytes(mask), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    simple = (cv2.approxPolyDP(contour, tolerance, True)[:, 0] for contour in contours)
    return [(ring + np.array([0.5, row + 0.5])).tolist() for ring in simple if len(ring) > 2]


def _bytes(mask: Mask) -> NDArray[np.uint8]:
    return np.ascontiguousarray(mask).view(np.uint8)


def _png(picture: NDArray[Any]) -> bytes:
    ok, data = cv2.imencode(".png", picture, _FAST)
    if not ok:
        raise RuntimeError("OpenCV could not encode a PNG")
    return bytes(data)


def _saliency(result: Result) -> Saliency:
    if result.report.saliency is None:
        raise NotFoundError(f"{result.job.name} has no evidence map: this bundle only finds lungs.")
    return result.report.saliency


def _npy(result: Result) -> bytes:
    file = BytesIO()
    np.save(file, _saliency(result).map, allow_pickle=False)
    return file.getvalue()


def _html(result: Result) -> bytes:
    return page(result.report).encode("utf-8", "replace")


def _dicom(kind: str) -> Callable[[Result], bytes]:
    def make(result: Result) -> bytes:
        if kind not in result.objects:
            raise NotFoundError(f"{result.job.name} has no DICOM object {kind!r}: {ABSENT[kind]}")
        return dicom.encode(result.objects[kind])

    return make


def write_all(job: Job, report: Report, root: Path) -> Path:
    """Write every part that there is into a folder of its own in `root`, and return the folder. A part that fails is
    logged; the others follow, unless a client deletes the film meanwhile.

    Raises OSError where there can be no folder.
    """
    stem = folder_names([Path(job.name)])[0].encode()[:STEM_BYTES].decode(errors="ignore")
    folder = root / f"{stem}-{job.key[:8]}"
    folder.mkdir(parents=True)
    result = Result(job, report)
    for name, part in PARTS.items():
        if job.unwanted:
            break
        try:
            data = part.make(result)
            with whole_file(folder / name) as file:
                file.write(data)
        except NotFoundError as error:
            _log.info("%s was not written: %s", name, error)
        except Exception:
            _log.exception("%s was not written", folder / name)
    return folder


_DICOM = "application/dicom"

PARTS: dict[str, Part] = {
    "report.json": Part(
        "application/json",
        "Every number: the content of `Report.to_json`.",
        lambda result: dumps(result.report.to_json()).encode("ascii"),
    ),
    "film.png": Part(
        "image/png",
        f"The film, 8 bits, its own grid or a longer side of {FILM_SIDE}.",
        lambda result: film_png(result.report),
    ),
    "lungs.png": Part(
        "image/png",
        "The lungs, 0 or 255, the film's grid.",
        lambda result: encode_mask(result.report.lungs.mask),
    ),
    "overlay.png": Part(
        "image/png",
        "The film with lungs, evidence and zones drawn in, and their scale.",
        lambda result: png(render(result.report)),
    ),
    "saliency.png": Part(
        "image/png",
        "The evidence as a heat map, clear where there is none, to lay over the film.",
        lambda result: saliency_png(_saliency(result)),
    ),
    "saliency.npy": Part(
        "application/octet-stream",
        "The evidence in logit units, f32, the film's grid, NumPy's format.",
        _npy,
        save=True,
    ),
    "layers.json": Part(
        "application/json",
        "Outlines of lungs and zones in the film's pixels, to draw over it.",
        lambda result: dumps(layers(result.report), indent=None).encode("ascii"),
    ),
    "report.html": Part("text/html; charset=utf-8", "The report as one self-contained page.", _html, save=True),
    "film.dcm": Part(_DICOM, "A film that came as a picture, as DICOM Secondary Capture.", _dicom("film"), save=True),
    "lungs.dcm": Part(_DICOM, "The lungs as DICOM SEG.", _dicom("lungs"), save=True),
    "saliency.dcm": Part(_DICOM, "The evidence as fractional DICOM SEG.", _dicom("saliency"), save=True),
    "overlay.dcm": Part(_DICOM, "overlay.png as DICOM Secondary Capture.", _dicom("overlay"), save=True),
    "report.dcm": Part(_DICOM, "Every number as DICOM Comprehensive SR (TID 1500).", _dicom("report"), save=True),
}
