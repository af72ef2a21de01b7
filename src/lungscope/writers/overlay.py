"""overlay.png: the film, its lungs, and the evidence for the predicted class, with the scale it is drawn to."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lungscope.radiograph import Pixels, box
from lungscope.report import DISCLAIMER, Report
from lungscope.stages.localization import Saliency
from lungscope.stages.segmentation import Mask
from lungscope.stages.severity import ZONES

Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]

#: The heat map's fixed scale in logit units, the same for every film; stronger evidence takes the last colour.
EVIDENCE_SCALE = 10.0
#: Longer side of the drawn film.
LONG_SIDE = 1000
PANEL = 250
MINIMUM_HEIGHT = 640

RIGHT: Colour = (76, 201, 240)
LEFT: Colour = (140, 240, 150)
INK: Colour = (236, 238, 242)
DIM: Colour = (160, 166, 176)
PAPER: Colour = (17, 19, 24)
_HEAT = np.array([(120, 28, 109), (207, 68, 70), (251, 155, 6), (252, 255, 164)], np.float32)
_HEAT_STEPS = 2**16 - 1


@dataclass(frozen=True)
class Scale:
    """From the film's grid to the picture's."""

    factor: float
    height: int
    width: int

    @classmethod
    def of(cls, shape: tuple[int, int]) -> Scale:
        factor = LONG_SIDE / max(shape)
        return cls(factor, max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor)))

    def draw(self, grid: Pixels) -> Pixels:
        how = cv2.INTER_AREA if self.factor < 1 else cv2.INTER_CUBIC
        return np.asarray(cv2.resize(grid, (self.width, self.height), interpolation=how), np.float32)

    def at(self, row: float, column: float) -> tuple[int, int]:
        """(x, y) of a source pixel's centre."""
        return round((column + 0.5) * self.factor), round((row + 0.5) * self.factor)


class Drawing:
    """What overlay.png and report.html both show of a report, made once for both."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.scale = Scale.of(report.film.shape)

    @cached_property
    def grey(self) -> Pixels:
        """The film on the picture's grid, f32 [h, w] in 0..255."""
        return np.asarray(np.clip(self.scale.draw(self.report.film.pixels), 0, 1) * 255, np.float32)

    @cached_property
    def evidence(self) -> Pixels | None:
        """The saliency's map on the picture's grid, f32 [h, w]; None without one."""
        saliency = self.report.saliency
        return None if saliency is None else self.scale.draw(saliency.map)

    @cached_property
    def outlines(self) -> dict[str, list[NDArray[np.int32]]]:
        """By side, the outlines of the lung on the picture's grid."""
        lungs = self.report.lungs
        return {side: outline(lung, self.scale) for side, lung in (("right", lungs.right), ("left", lungs.left))}


def render(report: Report, drawing: Drawing | None = None) -> Picture:
    """Draw a report: RGB u8 [h, w, 3], the film's longer side `LONG_SIDE`, the scale and the legend at its right."""
    drawing = drawing or Drawing(report)
    scale = drawing.scale
    drawn = np.repeat(np.rint(drawing.grey).astype(np.uint8)[:, :, None], 3, axis=2)
    if drawing.evidence is not None:
        _heat(drawn, drawing.grey, drawing.evidence)
    for side, colour in (("right", RIGHT), ("left", LEFT)):
        cv2.polylines(drawn, drawing.outlines[side], True, colour, 2, cv2.LINE_AA)
    _zones(drawn, report, scale)
    if report.saliency is not None and report.saliency.peak is not None:
        _peak(drawn, scale.at(*report.saliency.peak))

    height = max(scale.height, MINIMUM_HEIGHT)
    top = (height - scale.height) // 2
    canvas = np.full((height, scale.width + PANEL, 3), PAPER, np.uint8)
    canvas[top : top + scale.height, : scale.width] = drawn
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    _letters(draw, report, scale, top)
    _panel(image, draw, report, scale.width)
    return np.asarray(image)


def png(picture: Picture) -> bytes:
    """RGB u8 [h, w, 3] as PNG."""
    # Both faster and smaller than what OpenCV does unasked.
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
    ok, data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)
    if not ok:
        raise RuntimeError("OpenCV could not encode a PNG")
    return data.tobytes()


def heat_colour(evidence: Pixels) -> tuple[NDArray[np.float32], Pixels]:
    """Colour f32 [..., 3] in 0..255 and opacity f32 [...] in 0..0.8 of evidence in logit units; 0 is clear."""
    *colour, opacity = _heat_channels(evidence)
    return np.stack(colour, axis=-1), opacity


def _heat_channels(evidence: Pixels) -> list[Pixels]:
    """Red, green, blue and opacity of evidence, each of its shape."""
    share = np.clip(evidence * np.float32(_HEAT_STEPS / EVIDENCE_SCALE), 0, _HEAT_STEPS)
    step = np.rint(share).astype(np.uint16)
    return [np.asarray(cv2.LUT(step, channel), np.float32).reshape(step.shape) for channel in _heat_table()]


@cache
def _heat_table() -> NDArray[np.float32]:
    """Red, green, blue and opacity of each of the steps that `EVIDENCE_SCALE` is parted into, f32 [4, steps]."""
    share = np.linspace(0, 1, _HEAT_STEPS + 1)
    stops = np.linspace(0, 1, len(_HEAT))
    return np.stack(
        [*(np.interp(share, stops, channel) for channel in _HEAT.T), 0.8 * np.sqrt(share)], dtype=np.float32
    )


def heat_layer(evidence: Pixels, side: int) -> Picture:
    """Evidence in logit units [H, W] as a picture to lay over the film: RGBA u8, longer side at most `side`, clear
    where there is none."""
    colour, opacity = heat_colour(np.maximum(shrunk(evidence, side), 0))
    return np.rint(np.dstack([colour * (opacity > 0)[..., None], 255 * opacity])).astype(np.uint8)


def shrunk(grid: Pixels, side: int) -> Pixels:
    """`grid` f32 [H, W], resampled to a longer side of `side` where it is larger."""
    height, width = grid.shape
    if max(height, width) <= side:
        return grid
    factor = side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(cv2.resize(grid, size, interpolation=cv2.INTER_AREA), np.float32)


def roomiest(mask: Mask) -> tuple[int, int]:
    """(column, row) of the pixel that is farthest from the mask's edge: where a label fits best."""
    rows, columns = part = box(mask)
    padded = np.pad(mask[part].view(np.uint8), 1)
    _, _, _, (column, row) = cv2.minMaxLoc(cv2.distanceTransform(padded, cv2.DIST_L2, 3))
    return columns.start + column - 1, rows.start + row - 1


def _heat(picture: Picture, grey: Pixels, evidence: Pixels) -> None:
    """Lay evidence [h, w] over a picture u8 [h, w, 3] of `grey` f32 [h, w] in 0..255."""
    part = box(evidence > 0)
    if evidence[part].size == 0:
        return
    ground = grey[part]
    *colour, opacity = _heat_channels(evidence[part])
    picture[part] = cv2.merge([cv2.convertScaleAbs(ground + opacity * (channel - ground)) for channel in colour])


def outline(mask: Mask, scale: Scale) -> list[NDArray[np.int32]]:
    """Outlines of a lung on the picture's grid; a coarse mask is smoothed so that its steps are not drawn."""
    soft = cv2.resize(mask.astype(np.float32), (scale.width, scale.height), interpolation=cv2.INTER_LINEAR)
    soft = cv2.GaussianBlur(soft, (0, 0), max(1.0, scale.factor * 0.7))
    contours, _ = cv2.findContours((soft >= 0.5).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [np.asarray(contour, np.int32) for contour in contours]


def zone_lines(report: Report, scale: Scale) -> Iterator[tuple[Colour, int, int, int]]:
    """Where zones of a lung meet: (its colour, first x, last x, y) on the picture's grid."""
    if report.severity is None:
        return
    for letters, lung, colour in (("BC", report.lungs.right, RIGHT), ("EF", report.lungs.left, LEFT)):
        for letter in letters:
            zone = report.severity.zones[letter]
            if zone is None:
                continue
            columns = np.flatnonzero(lung[zone.rows[0]])
            if columns.size:
                (start, y), (stop, _) = scale.at(zone.rows[0] - 0.5, columns[0]), scale.at(0, columns[-1])
                yield colour, start, stop, y


def _zones(picture: Picture, report: Report, scale: Scale) -> None:
    """Dashed lines between the zones of each lung."""
    for colour, start, stop, y in zone_lines(report, scale):
        for x in range(start, stop, 14):
            cv2.line(picture, (x, y), (min(x + 7, stop), y), colour, 1, cv2.LINE_AA)


def _peak(picture: Picture, at: tuple[int, int]) -> None:
    for colour, width in (((0, 0, 0), 4), ((255, 255, 255), 2)):
        cv2.circle(picture, at, 13, colour, width, cv2.LINE_AA)
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            start, stop = (at[0] + 8 * dx, at[1] + 8 * dy), (at[0] + 20 * dx, at[1] + 20 * dy)
            cv2.line(picture, start, stop, colour, width, cv2.LINE_AA)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def side_letters(report: Report, scale: Scale) -> Iterator[tuple[str, Colour, int, int]]:
    """(R or L, its lung's colour, x, y of the lung's apex) on the picture's grid, for each lung that was found."""
    for side, lung, colour in (("R", report.lungs.right, RIGHT), ("L", report.lungs.left, LEFT)):
        rows = np.flatnonzero(lung.any(axis=1))
        if rows.size:
            columns = np.flatnonzero(lung[rows[0] : rows[0] + max(1, rows.size // 10)].any(axis=0))
            yield side, colour, *scale.at(rows[0], columns.mean())


def zone_letters(report: Report, scale: Scale) -> Iterator[tuple[str, int, Colour, bool, int, int]]:
    """(letter, score, colour, is it left of its zone?, x, y) of each scored zone, at its outer edge and inside the
    picture."""
    for letter, zone in report.severity.zones.items() if report.severity else ():
        if zone is None:
            continue
        right = letter in ZONES["right"]
        columns = np.flatnonzero((report.lungs.right if right else report.lungs.left)[slice(*zone.rows)].any(axis=0))
        before = right != report.film.mirrored
        x, y = scale.at(sum(zone.rows) / 2, columns[0] if before else columns[-1])
        x = max(x - 8, 46) if before else min(x + 8, scale.width - 46)
        yield letter, zone.score, RIGHT if right else LEFT, before, x, y


def _letters(draw: ImageDraw.ImageDraw, report: Report, scale: Scale, top: int) -> None:
    """R and L over the lungs, and each zone's letter and score at its outer edge."""
    for side, colour, x, y in side_letters(report, scale):
        at = (x, max(top + y - 10, 30))
        draw.text(at, side, colour, _font(26), anchor="mb", stroke_width=3, stroke_fill=(0, 0, 0))
    for letter, score, colour, before, x, y in zone_letters(report, scale):
        anchor = "rm" if before else "lm"
        text = f"{letter}  {score}"
        draw.text((x, top + y), text, colour, _font(20), anchor=anchor, stroke_width=3, stroke_fill=(0, 0, 0))


def _panel(image: Image.Image, draw: ImageDraw.ImageDraw, report: Report, left: int) -> None:
    x, y = left + 24, 26
    answer = report.classification
    if answer is not None and report.saliency is not None:
        title = "No answer" if answer.abstained else answer.label
        for line in textwrap.wrap(title, 15):
            draw.text((x, y), line, INK, _font(26))
            y += 32
        share = f"{answer.probabilities[answer.index]:.1%}".replace("%", " %")
        note = f"{share} probability" if not answer.abstained else f"{answer.label} leads with {share}"
        for line in textwrap.wrap(note, 26):
            draw.text((x, y + 2), line, DIM, _font(16))
            y += 21
        y = _colour_bar(image, draw, report.saliency, x, y + 26)
    entries = [("patient's right lung", RIGHT), ("patient's left lung", LEFT)]
    for text, colour in entries:
        draw.line((x, y + 9, x + 22, y + 9), colour, 3)
        draw.text((x + 34, y + 9), text, INK, _font(15), anchor="lm")
        y += 27
    if report.saliency is not None and report.saliency.peak is not None:
        draw.ellipse((x + 4, y + 2, x + 18, y + 16), outline=(255, 255, 255), width=2)
        draw.text((x + 34, y + 9), f"peak, {report.saliency.peak_value:.1f} logit", INK, _font(15), anchor="lm")
        y += 27
    if report.severity is not None and report.severity.total is not None:
        draw.text((x, y + 9), "A  2", DIM, _font(15), anchor="lm")
        draw.text((x + 34, y + 9), "zone and its score, 0 to 3", INK, _font(15), anchor="lm")
        draw.text((x, y + 38), f"severity {report.severity.total} of 18", INK, _font(18), anchor="lm")
    lines = textwrap.wrap(DISCLAIMER, 29)
    for number, line in enumerate(lines):
        draw.text((x, image.height - 20 * (len(lines) - number) - 12), line, DIM, _font(14))


def _colour_bar(image: Image.Image, draw: ImageDraw.ImageDraw, saliency: Saliency, x: int, y: int) -> int:
    """Draw the scale as it looks over dark lung; returns the row after it."""
    for line in textwrap.wrap(f"evidence for {saliency.label}, logit units", 25):
        draw.text((x, y), line, INK, _font(15))
        y += 20
    y += 10
    width, height = 24, 220
    evidence = np.linspace(EVIDENCE_SCALE, 0, height, dtype=np.float32)
    ground = np.full((height, width), 45, np.float32)
    bar = np.full((height, width, 3), 45, np.uint8)
    _heat(bar, ground, np.repeat(evidence[:, None], width, axis=1))
    image.paste(Image.fromarray(bar), (x, y))
    draw.rectangle((x - 1, y - 1, x + width, y + height), outline=DIM)
    for step in range(6):
        value = EVIDENCE_SCALE * step / 5
        row = y + height - 1 - round((height - 1) * step / 5)
        draw.line((x + width, row, x + width + 6, row), DIM)
        draw.text(
            (x + width + 12, row), f"{value:g} and more" if step == 5 else f"{value:g}", INK, _font(15), anchor="lm"
        )
    return y + height + 28
