"""Stage 1: can this film be analysed at all, and what should its reader know about it?

Refused is what no later stage could answer for; everything else that is odd becomes a warning. The limits on grey
values were set so that none fires on 318 clinical films of six collections (spread of grey values at least 0.29, at
most 0.39 of a film black and 0.22 white).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lungscope.errors import QualityError, UnsupportedImageError
from lungscope.radiograph import Pixels, Radiograph

#: Short side in pixels. Below the first a rib is narrower than a pixel; the second is what the training films have.
MIN_SIDE, GOOD_SIDE = 64, 224
#: Long side over short side.
MAX_ASPECT, GOOD_ASPECT = 3.0, 1.6
#: Distance of the 1st and 99th percentile. 1/16 is what is left of 12 bits in a 16-bit file that was never scaled.
MIN_SPREAD, GOOD_SPREAD = 1 / 16, 0.25
#: Share of black, of white, and of black and white pixels together.
MAX_EMPTY, GOOD_EMPTY, GOOD_CLIPPED, MAX_BOTH = 0.95, 0.6, 0.3, 0.95
#: A picture that is black and white alone has more white than this; a film in a black frame has not.
MASK_WHITE = 0.05

#: Grey levels that are counted, and how wide the black and the white end are.
LEVELS, EDGE = 4096, 0.02

#: Values of DICOM View Position (PS3.3 C.8.1.2 and C.8.11.5) that are no frontal view.
SIDE_VIEWS = frozenset(
    {"LL", "RL", "LLO", "RLO", "LAO", "RAO", "LPO", "RPO", "LAT", "LATERAL", "LEFT LATERAL", "RIGHT LATERAL"}
)
#: Codes of View Code Sequence (PS3.16 CID 4010, SNOMED CT and its older SRT) that are none either: lateral, left and
#: right lateral, sagittal; oblique, left and right oblique, left and right anterior and posterior oblique, frontal,
#: antero-posterior and postero-anterior oblique, lateral oblique; axial.
SIDE_CODES = frozenset(
    (
        "399067008", "399173006", "399198007", "30730003", "399182000", "399184004", "399236003", "399135007",
        "399356000", "399006002", "399038007", "399160007", "399312000", "399059000", "260427002", "399061009",
        "R-102CD", "R-10236", "R-10232", "G-A145", "R-102C1", "R-10238", "R-10234", "R-10220",
        "R-40985", "R-10212", "R-10210", "R-10204", "R-10208", "R-10216", "R-40783", "R-10241",
    )
)  # fmt: skip
#: SOP class of Digital X-Ray images for processing (PS3.4 B.5).
FOR_PROCESSING = "1.2.840.10008.5.1.4.1.1.1.1.1"
CHEST_PARTS = ("CHEST", "THORAX", "LUNG", "RIB", "HEART", "STERNUM", "CLAVICLE", "TSPINE", "ABDOMENCHEST", "WHOLEBODY")


@dataclass(frozen=True)
class Warning_:
    """Something that does not stop the analysis but weakens it. `code` is stable; `stage` is who noticed."""

    code: str
    message: str
    stage: str


@dataclass(frozen=True)
class InputCheck:
    """What the film is like before any network has seen it.

    view: DICOM View Position ("PA", "AP", …), or None where the file does not say.
    spread: distance of the 1st and 99th percentile of the grey values, 0..1.
    empty, clipped: share of pixels at the black and at the white end, 0..1.
    """

    view: str | None
    spread: float
    empty: float
    clipped: float
    warnings: tuple[Warning_, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The check as a JSON-ready dict; shares rounded to four digits."""
        return {
            "view": self.view,
            "spread": round(self.spread, 4),
            "empty": round(self.empty, 4),
            "clipped": round(self.clipped, 4),
            "warnings": [asdict(warning) for warning in self.warnings],
        }


def inspect(film: Radiograph) -> InputCheck:
    """Check size, grey values and DICOM view of a film.

    Raises QualityError where nothing usable is in it (too small, a strip, blank, a mask, no contrast) and
    UnsupportedImageError for a view that is not frontal.
    """
    found: list[Warning_] = []

    def warn(code: str, message: str) -> None:
        found.append(Warning_(code=code, message=message, stage="quality"))

    name = str(film.source.path) if film.source.path else "film"
    _check_shape(film, name, warn)
    view = _check_tags(film, name, warn)
    spread, empty, clipped = _check_greys(film.pixels, name, warn)
    _check_pixels(film, warn)
    return InputCheck(view, spread, empty, clipped, tuple(found))


def _check_shape(film: Radiograph, name: str, warn: Callable[[str, str], None]) -> None:
    height, width = film.shape
    short, long = sorted(film.shape)
    if short < MIN_SIDE:
        raise QualityError(
            f"{name}: has {width} x {height} pixels; the short side needs at least {MIN_SIDE}. Give the original film, "
            "not its thumbnail."
        )
    if short < GOOD_SIDE:
        warn("small", f"Only {width} x {height} pixels; the networks want a short side of {GOOD_SIDE} or more.")
    if long > MAX_ASPECT * short:
        raise QualityError(
            f"{name}: has {width} x {height} pixels, a strip; a side may be at most {MAX_ASPECT:g} times the other. "
            "Give a whole chest film."
        )
    if long > GOOD_ASPECT * short:
        warn("odd-aspect", f"{width} x {height} pixels is odd for a chest film. It may be cut, or hold two films.")


def _check_pixels(film: Radiograph, warn: Callable[[str, str], None]) -> None:
    rows, columns = film.pixel_aspect
    unit = " mm" if film.spacing_mm else ""
    if max(rows, columns) > 1.01 * min(rows, columns):
        warn("pixels-not-square", f"Pixels are {rows:g} x {columns:g}{unit}. Lungs look stretched to the networks.")


def _check_tags(film: Radiograph, name: str, warn: Callable[[str, str], None]) -> str | None:
    tags = film.source.tags
    view, code = tags.get("ViewPosition", "").upper(), tags.get("ViewCode", "")
    meaning = tags.get("ViewCodeMeaning", "").lower()
    sideways = code in SIDE_CODES or (("lateral" in meaning or "oblique" in meaning) and "decubitus" not in meaning)
    if view in SIDE_VIEWS or (not view and sideways):
        said = f"View Position {view!r}" if view else f"View Code {meaning or code!r}"
        raise UnsupportedImageError(f"{name}: is not a frontal view ({said}). Give the PA or AP film of the study.")
    part = tags.get("BodyPartExamined", "").upper()
    if part and not any(chest in part.replace(" ", "").replace("_", "") for chest in CHEST_PARTS):
        warn("not-chest", "The file's Body Part Examined is not the chest.")
    if tags.get("PresentationIntentType", "").upper() == "FOR PROCESSING" or tags.get("SOPClassUID") == FOR_PROCESSING:
        warn("for-processing", "Raw detector data (FOR PROCESSING). The networks know films FOR PRESENTATION.")
    if tags.get("PhotometricInterpretation") == "MONOCHROME1" and tags.get("PresentationLUTShape", "") == "IDENTITY":
        warn("polarity", "MONOCHROME1 and Presentation LUT Shape IDENTITY contradict each other; read as MONOCHROME1.")
    if tags.get("PhotometricInterpretation") == "MONOCHROME2" and tags.get("PresentationLUTShape", "") == "INVERSE":
        warn("polarity", "MONOCHROME2 and Presentation LUT Shape INVERSE contradict each other; read as inverse.")
    if "UnusedBits" in tags:
        warn(
            "unused-bits",
            f"Pixels have bits set above the {tags.get('BitsStored')} that are stored, and the header tells of no "
            "overlay there. They were left out. If the header is wrong about Bits Stored, the picture is, too.",
        )
    rows, columns = film.orientation
    if tags.get("PatientOrientation", "").strip("\\ ") and not rows:
        warn(
            "orientation-unknown",
            "Patient Orientation is not two directions in the standard's letters. The lung on the image's left is "
            "called the right one.",
        )
    if film.mirrored:
        warn(
            "mirrored",
            "Patient Orientation says that the patient's left is on the image's left. It is taken at its word: the "
            "lung on the image's left is called the left one.",
        )
    if columns.startswith("H"):
        warn(
            "upside-down",
            "Patient Orientation says that the image's rows run from the feet to the head. This is not corrected: "
            "upper and lower zones are swapped.",
        )
    if rows.startswith(("A", "P")):
        warn("maybe-lateral", f"Patient Orientation {rows}/{columns} is that of a lateral film.")
    elif rows.startswith(("H", "F")):
        warn("rotated", f"Patient Orientation {rows}/{columns} says that the film lies on its side.")
    return view or None


def _histogram(pixels: Pixels) -> NDArray[np.float32]:
    """How many pixels [H, W] in 0..1 are nearest to each of `LEVELS` levels, f32 [LEVELS]."""
    # OpenCV counts whole numbers twice as fast as fractions, and rounds as it scales.
    levels = cv2.addWeighted(pixels, LEVELS - 1, pixels, 0, 0, dtype=cv2.CV_16U)
    return np.asarray(cv2.calcHist([levels], [0], None, [LEVELS], [0, LEVELS]), np.float32).ravel()


def _check_greys(pixels: Pixels, name: str, warn: Callable[[str, str], None]) -> tuple[float, float, float]:
    counts = _histogram(pixels).astype(np.float64)
    share = np.cumsum(counts) / pixels.size
    low, high = (int(np.searchsorted(share, quantile)) for quantile in (0.01, 0.99))
    spread = (high - low) / (LEVELS - 1)
    edge = round(LEVELS * EDGE)
    empty, clipped = float(share[edge - 1]), float(1 - share[-edge - 1])
    if np.count_nonzero(counts) == 1:
        raise QualityError(f"{name}: is blank: every pixel is {pixels[0, 0]:.2f} (0 black, 1 white). Export it again.")
    if empty > MAX_EMPTY:
        raise QualityError(f"{name}: {empty:.0%} of it is black; at most {MAX_EMPTY:.0%} may be. Export it again.")
    if empty + clipped > MAX_BOTH and clipped > MASK_WHITE:
        raise QualityError(
            f"{name}: {empty + clipped:.0%} of it is black or white, with hardly a grey between; a mask or a drawing, "
            "not a film. Give the film itself."
        )
    if spread < MIN_SPREAD:
        raise QualityError(
            f"{name}: its grey values use {spread:.1%} of the range of the file; at least {MIN_SPREAD:.1%} are needed. "
            "If 12-bit values were saved in a 16-bit file, scale them to its range; else export it with its window."
        )
    if spread < GOOD_SPREAD:
        warn("low-contrast", f"Grey values use only {spread:.0%} of the range; films use {GOOD_SPREAD:.0%} or more.")
    if empty > GOOD_EMPTY:
        warn("mostly-empty", f"{empty:.0%} of the frame is black. The chest may be small in it, or its window narrow.")
    if clipped > GOOD_CLIPPED:
        warn("clipped", f"{clipped:.0%} of the frame is at the white end: opacities there can not be told apart.")
    return spread, empty, clipped
