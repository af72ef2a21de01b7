"""report.html: one film on one page, with nothing that is not inside it."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from pathlib import PurePath
from typing import Any

import cv2
import numpy as np

from lungscope.report import Report
from lungscope.stages.classification import INPUT_NAMES
from lungscope.stages.segmentation import Mask

#: Width of the severity figure in its own units.
_FIGURE = 360

_STYLE = """
:root { color-scheme: light dark;
  --paper: #fff; --card: #f5f6f8; --ink: #1a1d23; --dim: #5d6673; --line: #dde1e7; --bar: #2f6fde; --rest: #aab4c3;
  --warn: #8a5a00; --warn-paper: #fff5dd; --s0: #dfe5ec; --s1: #f8d27a; --s2: #ee8b4a; --s3: #c43a31; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14161b; --card: #1d2027; --ink: #e8eaee; --dim: #9aa3b0; --line: #31363f; --bar: #6ea0ff; --rest: #566072;
  --warn: #ffd479; --warn-paper: #352b14; --s0: #39414d; --s1: #b78a2c; --s2: #cf6a2e; --s3: #d6473c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 28px 20px 40px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 12px; }
header p { color: var(--dim); margin: 4px 0 16px; overflow-wrap: anywhere; }
.disclaimer { border: 1px solid var(--line); border-left: 4px solid var(--bar); padding: 8px 14px;
  margin: 0 0 16px; font-weight: 600; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px;
  margin: 0 0 16px; }
.warnings { background: var(--warn-paper); border-color: var(--warn); }
.warnings h2, .warnings .stage { color: var(--warn); }
.warnings ul { margin: 0; padding-left: 20px; }
.overlay { padding: 0; overflow: hidden; background: #111318; }
.overlay img { display: block; width: 100%; height: auto; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; margin: 0 0 16px; }
.two section { margin: 0; }
.answer { font-size: 22px; font-weight: 650; margin: 0 0 10px; overflow-wrap: anywhere; }
.class { display: grid; grid-template-columns: minmax(90px, 34%) 1fr 58px;
  gap: 10px; align-items: center; margin: 7px 0; }
.class span:first-child { overflow-wrap: anywhere; }
.track { background: var(--line); border-radius: 4px; height: 12px; }
.track i { display: block; height: 100%; border-radius: 4px; background: var(--rest); }
.best .track i { background: var(--bar); }
.best { font-weight: 650; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.note { color: var(--dim); font-size: 13px; margin: 12px 0 0; }
svg { display: block; width: 100%; max-height: 380px; }
svg text { font: 600 15px system-ui, sans-serif; fill: var(--ink); text-anchor: middle; }
svg .small { font-weight: 400; font-size: 11px; }
svg .on { fill: #1a1d23; } svg .s2.on, svg .s3.on { fill: #fff; }
path { stroke: var(--paper); stroke-width: 2; stroke-linejoin: round; }
path.s0 { fill: var(--s0); } path.s1 { fill: var(--s1); } path.s2 { fill: var(--s2); } path.s3 { fill: var(--s3); }
path.none { fill: none; stroke: var(--dim); stroke-dasharray: 4 4; }
@media (prefers-color-scheme: dark) { svg .s0.on { fill: #e8eaee; } svg .s1.on { fill: #fff; } }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--dim); width: 34%; }
code { font-size: 12.5px; }
@media screen and (max-width: 760px) { .two { grid-template-columns: 1fr; } }
@page { size: A4; margin: 12mm; }
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --dim: #444; --line: #bbb; --bar: #2f6fde; --rest: #aab4c3;
    --warn: #6b4500; --warn-paper: #fff; --s0: #dfe5ec; --s1: #f8d27a; --s2: #ee8b4a; --s3: #c43a31; }
  body { font-size: 11px; } h1 { font-size: 18px; } h2, .note { font-size: 11px; } .answer { font-size: 15px; }
  code { font-size: 9px; } main { padding: 0; max-width: none; }
  section { break-inside: avoid; margin-bottom: 8px; padding: 10px 12px; } .overlay { padding: 0; }
  .overlay img { max-height: 105mm; width: auto; margin: 0 auto; }
  .two { gap: 8px; margin-bottom: 8px; } svg { max-height: 52mm; } svg .s0.on, svg .s1.on { fill: #1a1d23; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def page(report: Report, overlay: bytes) -> str:
    """A report as a self-contained HTML page. overlay: the PNG to embed.

    Every text out of the file (its name, its DICOM attributes) is escaped; the page forbids scripts and the network.
    """
    document = report.to_json()
    name = PurePath(document["source"]["path"] or "film").name
    parts = [
        f"<header><h1>{escape(name)}</h1><p>{_subtitle(document)}</p></header>",
        f'<p class="disclaimer">{escape(document["disclaimer"])}</p>',
        _warnings(document["run"]["warnings"]),
        f'<section class="overlay"><img alt="{escape(_description(document))}" '
        f'src="data:image/png;base64,{base64.b64encode(overlay).decode("ascii")}"></section>',
        f'<div class="two">{_classes(document["classification"])}{_severity(report, document["severity"])}</div>',
        _lungs(document),
        _facts(document),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(name)} · lungscope</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _subtitle(document: dict[str, Any]) -> str:
    image = document["image"]
    facts = [f"{image['width']} × {image['height']} pixels", document["source"]["format"]]
    if image["spacing_mm"] is not None:
        facts.append(
            f"{image['spacing_mm'][0]:g} × {image['spacing_mm'][1]:g} mm ({image['spacing_origin'] or 'spacing'})"
        )
    return escape(" · ".join([*facts, document["run"]["created"]]))


def _description(document: dict[str, Any]) -> str:
    text = "The film with both lungs outlined"
    if document["saliency"] is not None:
        text += f" and the evidence for {document['saliency']['label']} as a heat map"
    return text


def _warnings(warnings: list[dict[str, str]]) -> str:
    if not warnings:
        return ""
    items = "".join(
        f'<li><span class="stage">{escape(item["stage"])}:</span> {escape(item["message"])}</li>' for item in warnings
    )
    return f'<section class="warnings" role="alert"><h2>Check before you rely on this</h2><ul>{items}</ul></section>'


def _classes(answer: dict[str, Any] | None) -> str:
    if answer is None:
        return "<section><h2>Class</h2><p>This bundle only finds lungs.</p></section>"
    head, note = "No answer" if answer["abstained"] else answer["label"], ""
    if answer["conformal_set"] is not None:
        held = " or ".join(answer["conformal_set"]) or "no class"
        note = f"Not ruled out at {answer['conformal_coverage']:.0%} coverage: {held}. "
    bars = "".join(
        f'<div class="class{" best" if label == answer["label"] else ""}"><span>{escape(label)}</span>'
        f'<span class="track"><i style="width:{100 * share:.2f}%"></i></span>'
        f'<span class="number">{100 * share:.1f} %</span></div>'
        for label, share in answer["probabilities"].items()
    )
    note += f"Softmax at temperature {answer['temperature']:g}; the network saw {INPUT_NAMES[answer['input']]}."
    return (
        f'<section><h2>Class</h2><p class="answer">{escape(head)}</p>{bars}<p class="note">{escape(note)}</p></section>'
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


def _figure(report: Report) -> str:
    """The lungs of this film, each zone in the colour of its score."""
    assert report.severity is not None
    rows, columns = (np.flatnonzero(report.lungs.mask.any(axis=axis)) for axis in (1, 0))
    if rows.size == 0 or not any(report.severity.zones.values()):
        return ""
    factor = _FIGURE / (columns[-1] - columns[0] + 1)
    height = round(factor * (rows[-1] - rows[0] + 1))
    shapes, texts = [], []
    for letter, zone in report.severity.zones.items():
        if zone is None:
            continue
        start, stop = zone.rows
        lung = (report.lungs.right if letter in "ABC" else report.lungs.left)[start:stop]
        outline = _path(lung, factor, start - int(rows[0]), -int(columns[0]))
        shapes.append(f'<path class="s{zone.score}" d="{outline}"/>')
        column, row = _roomiest(lung)
        x, y = factor * (column - columns[0]), factor * (start + row - rows[0])
        texts.append(
            f'<text class="on s{zone.score}" x="{x:.0f}" y="{y - 1:.0f}">{letter} · {zone.score}</text>'
            f'<text class="on small s{zone.score}" x="{x:.0f}" y="{y + 13:.0f}">{100 * zone.extent:.0f} %</text>'
        )
    return (
        f'<svg viewBox="-6 -22 {_FIGURE + 12} {height + 28}" role="img" aria-label="Severity by lung zone">'
        f'<text class="small" x="{_FIGURE * 0.2:.0f}" y="-8">patient\'s right</text>'
        f'<text class="small" x="{_FIGURE * 0.8:.0f}" y="-8">patient\'s left</text>'
        f"{''.join(shapes)}{''.join(texts)}</svg>"
    )


def _roomiest(mask: Mask) -> tuple[int, int]:
    """(column, row) of the pixel that is farthest from the mask's edge: where a label fits best."""
    padded = np.pad(mask.astype(np.uint8), 1)
    _, _, _, (column, row) = cv2.minMaxLoc(cv2.distanceTransform(padded, cv2.DIST_L2, 3))
    return column - 1, row - 1


def _path(mask: Mask, factor: float, row: int, column: int) -> str:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    pieces = []
    for contour in contours:
        points = cv2.approxPolyDP(contour, 0.6 / factor, True)[:, 0] + np.array([column, row])
        pieces.append("M" + "L".join(f"{x * factor:.1f} {y * factor:.1f}" for x, y in points) + "Z")
    return "".join(pieces)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><th>{escape(key)}</th><td>{value}</td></tr>" for key, value in rows) + "</table>"


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
    return f"<section><h2>Lungs and evidence</h2>{_table(rows)}</section>"


def _facts(document: dict[str, Any]) -> str:
    run, source = document["run"], document["source"]
    rows = [
        ("File", escape(str(source["path"]))),
        ("SHA-256", f"<code>{escape(source['sha256'])}</code>"),
        *((key, escape(str(value))) for key, value in source["tags"].items()),
        ("Bundle", escape(f"{run['bundle']['name']} {run['bundle']['version']}")),
        *((name, f"<code>{escape(digest)}</code>") for name, digest in run["bundle"]["weights"].items()),
        ("Device, precision", escape(f"{run['device']}, {run['precision']}")),
        ("Versions", escape(", ".join(f"{name} {version}" for name, version in run["versions"].items()))),
        ("Time by stage", escape(", ".join(f"{stage} {ms:.0f} ms" for stage, ms in run["timings_ms"].items()))),
    ]
    return f"<section><h2>How this was made</h2>{_table(rows)}</section>"
