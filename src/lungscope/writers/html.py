"""report.html: one film on one page, with nothing that is not inside it."""

from __future__ import annotations

import base64
from html import escape
from pathlib import PurePath
from typing import Any

import cv2
import numpy as np

from lungscope.radiograph import box
from lungscope.report import Report
from lungscope.stages.classification import Classification, view_name
from lungscope.stages.segmentation import Mask
from lungscope.stages.severity import ZONES, Severity, contradiction, shown
from lungscope.writers.overlay import (
    EVIDENCE_SCALE,
    RIGHT,
    Drawing,
    Scale,
    heat_colour,
    heat_layer,
    roomiest,
    side_letters,
    zone_letters,
    zone_lines,
)
from lungscope.writers.page import asset, bar, closing, facts, opening

#: The page's name in a film's folder.
PAGE = "report.html"
#: Longer side of the embedded heat map. The map comes from a few cells and is smooth; the browser draws it larger.
HEAT_SIDE = 500
JPEG_QUALITY = 88
#: Width of the severity figure in its own units.
_FIGURE = 360

_SLIDER = (
    '<label hidden>Opacity of the evidence <input type="range" id="opacity" min="0" max="100" step="5" value="100">'
    "<output>100 %</output></label>"
)


def page(report: Report, drawing: Drawing | None = None) -> str:
    """A report as a self-contained HTML page.

    Every text out of the file (its name, its DICOM attributes) is escaped. Nothing is loaded, and no script runs but
    the slider's own (`assets/film.js`).
    """
    document = report.to_json()
    name = PurePath(document["source"]["path"] or "film").name
    style, script = asset("base.css", "film.css"), asset("film.js")
    parts = [
        f"<header><h1>{escape(name)}</h1><p>{_subtitle(document)}</p></header>",
        f'<p class="disclaimer">{escape(document["disclaimer"])}</p>',
        _warnings(document["run"]["warnings"]),
        _contradiction(report),
        f'<div class="page">{_viewer(report, drawing or Drawing(report))}<div class="side">',
        _classes(report.classification),
        _severity(report, document["severity"]),
        f"</div></div>{_lungs(document)}{_facts(document)}",
    ]
    return opening(name, style, script) + "\n".join(filter(None, parts)) + closing(script)


def _subtitle(document: dict[str, Any]) -> str:
    image = document["image"]
    words = [f"{image['width']} × {image['height']} pixels", document["source"]["format"]]
    if image["spacing_mm"] is not None:
        words.append(
            f"{image['spacing_mm'][0]:g} × {image['spacing_mm'][1]:g} mm ({image['spacing_origin'] or 'spacing'})"
        )
    return escape(" · ".join([*words, document["run"]["created"]]))


def _warnings(warnings: list[dict[str, str]]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li><b>{escape(item['stage'])}:</b> {escape(item['message'])}</li>" for item in warnings)
    return f'<section class="warnings"><h2>Check before you rely on this</h2><ul>{items}</ul></section>'


def _contradiction(report: Report) -> str:
    answer, severity = report.classification, report.severity
    if answer is None or severity is None:
        return ""
    text = contradiction(answer.label, float(answer.probabilities[answer.index]), severity)
    if text is None:
        return ""
    return f'<section class="warnings"><h2>Class and severity contradict each other</h2><p>{escape(text)}</p></section>'


def _viewer(report: Report, drawing: Drawing) -> str:
    """The film with its layers, and what switches them."""
    scale = drawing.scale
    switches = [_switch("lungs", "Lungs")]
    pictures = [_image(_jpeg(drawing), scale, 'class="film"')]
    layers = [_outlines(report, drawing)]
    legend = [f'<span><i class="{side}"></i>patient\'s {side} lung</span>' for side in ZONES]
    seen = ["The film with the lungs outlined"]
    if report.severity is not None and any(report.severity.zones.values()):
        seen.append("the borders and scores of the lung zones")
        switches.append(_switch("zones", "Zones"))
        layers.append(_zones(report, scale))
        legend.append('<span class="zones">A to F: lung zones, score 0 to 3</span>')
    saliency = report.saliency
    if saliency is not None:
        seen.append(f"the evidence for {saliency.label} as a heat map")
        switches += [_switch("evidence", "Evidence"), _SLIDER]
        pictures.append(_image(_heat(drawing), scale, 'id="heat" class="evidence"'))
        legend.append(
            f'<span class="evidence">evidence for {escape(saliency.label)}: 0 {_ramp()} {EVIDENCE_SCALE:g} logit units '
            "and more</span>"
        )
        if saliency.peak is not None:
            mark = f'<svg class="mark" viewBox="-22 -22 44 44" aria-hidden="true">{_peak(0, 0)}</svg>'
            layers.append(f'<g class="evidence">{_peak(*scale.at(*saliency.peak))}</g>')
            legend.append(f'<span class="evidence">{mark} peak, {saliency.peak_value:.1f} logit units</span>')
    return (
        '<section class="viewer" aria-label="Film">'
        f'<svg viewBox="0 0 {scale.width} {scale.height}" role="img" aria-label="{escape(", ".join(seen))}">'
        f"{''.join(pictures)}{''.join(layers)}</svg>"
        f'<fieldset class="layers"><legend>Layers</legend>{"".join(switches)}</fieldset>'
        f'<div class="legend">{"".join(legend)}</div></section>'
    )


def _switch(layer: str, name: str) -> str:
    return f'<label><input type="checkbox" id="{layer}" checked>{name}</label>'


def _image(uri: str, scale: Scale, attributes: str) -> str:
    return (
        f'<image {attributes} width="{scale.width}" height="{scale.height}" preserveAspectRatio="none" href="{uri}"/>'
    )


def _jpeg(drawing: Drawing) -> str:
    """The film as it is seen, 8 bit, shrunk to the drawn size where it is larger, as a data URI."""
    pixels = drawing.report.film.pixels
    grey = drawing.grey if drawing.scale.factor < 1 else np.clip(pixels, 0, 1) * 255
    return _uri("jpeg", np.rint(grey).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])


def _heat(drawing: Drawing) -> str:
    """The evidence in the colours of overlay.png, clear where there is none, as a data URI."""
    assert drawing.report.saliency is not None and drawing.evidence is not None
    evidence = drawing.evidence if drawing.scale.factor < 1 else drawing.report.saliency.map
    layer = cv2.cvtColor(heat_layer(evidence, HEAT_SIDE), cv2.COLOR_RGBA2BGRA)
    # Mostly clear and smooth: unfiltered, it packs ten times as fast as by OpenCV's choice of filters, and no larger.
    options = [cv2.IMWRITE_PNG_COMPRESSION, 3, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    return _uri("png", np.asarray(layer, np.uint8), options)


def _uri(kind: str, picture: np.typing.NDArray[np.uint8], options: list[int]) -> str:
    ok, data = cv2.imencode(f".{kind}", picture, options)
    if not ok:
        raise RuntimeError(f"OpenCV could not encode a {kind.upper()}")
    return f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode('ascii')}"


def _outlines(report: Report, drawing: Drawing) -> str:
    pieces = [
        f'<path class="outline {side}" d="{"".join(map(_closed, contours))}"/>'
        for side, contours in drawing.outlines.items()
        if contours
    ]
    for letter, _, x, y in side_letters(report, drawing.scale):
        side = "right" if letter == "R" else "left"
        pieces.append(f'<text class="letter {side}" text-anchor="middle" x="{x}" y="{max(y - 12, 34)}">{letter}</text>')
    return f'<g class="lungs">{"".join(pieces)}</g>'


def _zones(report: Report, scale: Scale) -> str:
    pieces = []
    for colour, start, stop, y in zone_lines(report, scale):
        side = "right" if colour == RIGHT else "left"
        pieces.append(f'<line class="{side}" x1="{start}" x2="{stop}" y1="{y}" y2="{y}"/>')
    for letter, score, _, before, x, y in zone_letters(report, scale):
        side, anchor = "right" if letter in ZONES["right"] else "left", "end" if before else "start"
        pieces.append(f'<text class="{side}" text-anchor="{anchor}" x="{x}" y="{y + 8}">{letter} {score}</text>')
    return f'<g class="zones">{"".join(pieces)}</g>'


def _peak(x: int, y: int) -> str:
    rays = "".join(
        f"M{x + 8 * dx} {y + 8 * dy}L{x + 20 * dx} {y + 20 * dy}" for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1))
    )
    circle = f"M{x - 13} {y}a13 13 0 1 0 26 0a13 13 0 1 0 -26 0"
    return "".join(f'<path class="peak {which}" d="{circle}{rays}"/>' for which in ("under", "over"))


def _ramp() -> str:
    """The heat map's scale, as it looks over dark lung."""
    stops = np.linspace(0, EVIDENCE_SCALE, 11, dtype=np.float32)
    colours, opacities = heat_colour(stops)
    marks = "".join(
        f'<stop offset="{number / 10:g}" stop-color="rgb({r:.0f} {g:.0f} {b:.0f})" stop-opacity="{opacity:.2f}"/>'
        for number, ((r, g, b), opacity) in enumerate(zip(colours.tolist(), opacities.tolist(), strict=True))
    )
    return (
        '<svg class="ramp" aria-hidden="true"><linearGradient id="ramp">'
        f'{marks}</linearGradient><rect width="100%" height="100%" fill="url(#ramp)"/></svg>'
    )


def _classes(answer: Classification | None) -> str:
    if answer is None:
        return "<section><h2>Class</h2><p>This bundle only finds lungs.</p></section>"
    held = answer.conformal_set
    thresholds = [None] * len(answer.labels) if answer.conformal is None else answer.conformal.thresholds
    rows = ""
    for label, share, threshold in zip(answer.labels, answer.probabilities.tolist(), thresholds, strict=True):
        chip = '<span class="chip">in set</span>' if held is not None and label in held else "<span></span>"
        rows += (
            f'<li class="class{" best" if label == answer.label else ""}"><span>{escape(label)}</span>'
            f'{bar(share, threshold)}<span class="number">{100 * share:.1f} %</span>{chip}</li>'
        )
    note = ""
    if answer.conformal is not None and held is not None:
        coverage = f"{100 * answer.conformal.coverage:g} %"
        note = (
            f'<p class="note">Not ruled out at {coverage} coverage: <b>{escape(" or ".join(held) or "no class")}</b>. '
            "A class is in this conformal set where its probability reaches the line in its bar. The lines are set so "
            f"that {coverage} of each class's films, of the kind that they were set on, have their class in their set. "
            "There is an answer only where the most probable class is the set alone.</p>"
        )
    return (
        f'<section><h2>Class</h2><p class="answer">{escape("No answer" if answer.abstained else answer.label)}</p>'
        f'<ul class="classes">{rows}</ul>{note}'
        f'<p class="note">Calibrated probabilities: softmax at temperature {answer.temperature:g}. The network saw '
        f"{view_name(answer.view)}. It knows no other classes than these: a film of anything else is put among "
        "them too.</p></section>"
    )


def _severity(report: Report, severity: dict[str, Any] | None) -> str:
    if severity is None or report.severity is None:
        return ""
    total = severity["global"]
    head = f"{total} of 18" if total is not None else "No global score"
    reason = f"<p>{escape(severity['reason'])}</p>" if severity["reason"] else ""
    extent = ", ".join(
        f"{side} lung {share:.0f} %" for side, share in severity["extent_percent"].items() if share is not None
    )
    note = f'<p class="note">Involved: {escape(extent)}.</p>' if extent else ""
    return (
        f'<section><h2>Severity</h2><p class="answer">{head}</p>{reason}{_figure(report)}{note}'
        f'<details class="note"><summary>How it is defined</summary>{escape(severity["definition"])}</details>'
        "</section>"
    )


def _scores(severity: Severity) -> str:
    """The severity figure in words."""
    zones = "; ".join(
        f"{letter} {zone.score}, {shown(zone)}{' involved' if zone.grade is None else ''}"
        for letter, zone in severity.zones.items()
        if zone
    )
    return f"Severity by lung zone, 0 to 3: {zones}"


def _figure(report: Report) -> str:
    """The lungs of this film, each zone in the colour of its score."""
    assert report.severity is not None
    rows, columns = report.lungs.box
    if rows.stop == 0 or not any(report.severity.zones.values()):
        return ""
    factor = _FIGURE / (columns.stop - columns.start)
    height = round(factor * (rows.stop - rows.start))
    shapes, texts = [], []
    for letter, zone in report.severity.zones.items():
        if zone is None:
            continue
        lung = (report.lungs.right if letter in "ABC" else report.lungs.left)[slice(*zone.rows)]
        part = box(lung)
        row, column = zone.rows[0] + part[0].start - rows.start, part[1].start - columns.start
        shapes.append(f'<path class="s{zone.score}" d="{_path(lung[part], factor, row, column)}"/>')
        x, y = roomiest(lung[part])
        x, y = factor * (column + x), factor * (row + y)
        texts.append(
            f'<text class="s{zone.score}" x="{x:.0f}" y="{y - 1:.0f}">{letter} · {zone.score}</text>'
            f'<text class="small s{zone.score}" x="{x:.0f}" y="{y + 13:.0f}">{shown(zone)}</text>'
        )
    sides = ("left", "right") if report.film.mirrored else ("right", "left")
    return (
        f'<svg class="figure" viewBox="-6 -22 {_FIGURE + 12} {height + 28}" role="img" '
        f'aria-label="{_scores(report.severity)}">'
        f'<text class="small" x="{_FIGURE * 0.2:.0f}" y="-8">patient\'s {sides[0]}</text>'
        f'<text class="small" x="{_FIGURE * 0.8:.0f}" y="-8">patient\'s {sides[1]}</text>'
        f"{''.join(shapes)}{''.join(texts)}</svg>"
    )


def _path(mask: Mask, factor: float, row: int, column: int) -> str:
    contours, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    pieces = []
    for contour in contours:
        points = cv2.approxPolyDP(contour, 0.6 / factor, True)[:, 0] + np.array([column, row])
        pieces.append("M" + "L".join(f"{x * factor:.1f} {y * factor:.1f}" for x, y in points) + "Z")
    return "".join(pieces)


def _closed(contour: np.typing.NDArray[np.int32]) -> str:
    points = cv2.approxPolyDP(contour, 0.7, True)[:, 0]
    return "M" + "L".join(f"{x} {y}" for x, y in points.tolist()) + "Z"


def _lungs(document: dict[str, Any]) -> str:
    lungs, saliency = document["lungs"], document["saliency"]
    rows = []
    for side in ("right", "left"):
        entry = lungs[side]
        area = f"{entry['area_px']:,} pixels" if entry["found"] else "not found"
        if entry["found"] and entry["area_cm2"] is not None:
            area = f"{entry['area_cm2']:.0f} cm² ({area})"
        rows.append((f"Patient's {side} lung", escape(area)))
    if lungs["agreement"] is not None:
        rows.append(("Agreement of the networks", f"Dice {lungs['agreement']:.3f}"))
    if saliency is not None:
        share, peak = saliency["fraction_in_lungs"], saliency["peak"]
        rows.append(("Evidence inside the lungs", "none found" if share is None else f"{100 * share:.0f} %"))
        if peak is not None:
            rows.append(("Peak", f"row {peak['row']}, column {peak['col']}: {peak['value']:.2f} logit units"))
    return f"<section><h2>Lungs and evidence</h2>{facts(rows)}</section>"


def _facts(document: dict[str, Any]) -> str:
    run, source = document["run"], document["source"]
    rows = [
        ("File", escape(str(source["path"]))),
        ("SHA-256", f"<code>{escape(source['sha256'])}</code>"),
        *((key, escape(str(value))) for key, value in source["tags"].items()),
        ("Bundle", escape(f"{run['bundle']['name']} {run['bundle']['version']}")),
        *((name, f"<code>{escape(digest)}</code>") for name, digest in run["bundle"]["weights"].items()),
        ("Device, precision", escape(f"{run['device']}, {run['precision']}")),
        *(
            [("Close call", "the mirror image was classified, too; the mean of both answers counts")]
            if (document["classification"] or {}).get("mirrored")
            else []
        ),
        ("Versions", escape(", ".join(f"{name} {version}" for name, version in run["versions"].items()))),
        ("Time by stage", escape(", ".join(f"{stage} {ms:.0f} ms" for stage, ms in run["timings_ms"].items()))),
    ]
    return f"<section><h2>How this was made</h2>{facts(rows)}</section>"
