"""overlay.png: one fixed scale, nothing drawn where there is no evidence; report.html: closed to what is in a file."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from films import draw, radiograph
from lungscope.pipeline import Analyzer
from lungscope.report import DISCLAIMER, Report
from lungscope.stages.classification import Conformal
from lungscope.stages.quality import Warning_
from lungscope.writers.html import page
from lungscope.writers.overlay import EVIDENCE_SCALE, LONG_SIDE, PANEL, heat_colour, png, render


@pytest.fixture(scope="module")
def report(analyzer: Analyzer) -> Report:
    return analyzer.analyze(radiograph(draw(opacities=[(0.6, 0.3, 0.12)])))


def test_no_evidence_is_clear_and_the_scale_is_fixed() -> None:
    evidence = np.array([0, EVIDENCE_SCALE / 2, EVIDENCE_SCALE, 10 * EVIDENCE_SCALE], np.float32)
    colour, opacity = heat_colour(evidence)
    assert opacity[0] == 0
    assert 0 < opacity[1] < opacity[2] == opacity[3]
    np.testing.assert_array_equal(colour[2], colour[3])


@pytest.mark.parametrize("shape", [(320, 288), (200, 500), (1400, 700)])
def test_the_picture_has_the_films_shape_and_a_panel(analyzer: Analyzer, shape: tuple[int, int]) -> None:
    picture = render(analyzer.analyze(radiograph(draw(*shape))))
    assert picture.dtype == np.uint8
    assert picture.shape[1] - PANEL == round(shape[1] * LONG_SIDE / max(shape))
    decoded = cv2.imdecode(np.frombuffer(png(picture), np.uint8), cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(decoded, picture)


def test_the_film_is_untouched_where_there_are_no_lungs(report: Report) -> None:
    picture = render(report)
    film = picture[:, :-PANEL]
    np.testing.assert_array_equal(film[:60, :60], np.full((60, 60, 3), round(255 * 0.8), np.uint8))


def test_evidence_colours_the_lungs_and_more_evidence_more(report: Report) -> None:
    assert report.saliency is not None

    def tint(factor: float) -> float:
        assert report.saliency is not None
        evidence = np.where(report.lungs.mask, np.float32(factor), np.float32(0))
        film = render(replace(report, saliency=replace(report.saliency, map=evidence, peak=None)))[:, :-PANEL]
        return float(np.abs(film[..., 0].astype(int) - film[..., 2]).mean())

    assert tint(0) < tint(1) < tint(5)
    assert tint(EVIDENCE_SCALE) == pytest.approx(tint(2 * EVIDENCE_SCALE), rel=1e-3)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


@pytest.fixture(scope="module")
def evil_page(report: Report) -> str:
    source = replace(report.source, path=Path(f"/d/{EVIL}.dcm".replace("</", "<\\")), format=EVIL)
    source = replace(source, tags={EVIL: EVIL, "PatientComments": EVIL})
    answer = report.classification
    assert answer is not None
    answer = replace(answer, labels=(EVIL, *answer.labels[1:]), label=EVIL)
    assert report.saliency is not None
    odd = replace(
        report,
        film=replace(report.film, source=source, spacing_mm=(1, 1), spacing_origin=EVIL),
        classification=answer,
        saliency=replace(report.saliency, label=EVIL),
        run=replace(report.run, bundle=EVIL, device=EVIL, warnings=(Warning_(EVIL, EVIL, EVIL),)),
    )
    return page(odd, png(render(odd)))


def test_nothing_out_of_a_file_becomes_markup(evil_page: str) -> None:
    tags = Tags()
    tags.feed(evil_page)
    assert "script" not in {tag for tag, _ in tags.found}
    images = [attributes for tag, attributes in tags.found if tag == "img"]
    assert len(images) == 1
    assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]
    assert "&lt;script&gt;" in evil_page


def test_the_page_needs_nothing_from_outside(report: Report) -> None:
    overlay = png(render(report))
    text = page(report, overlay)
    tags = Tags()
    tags.feed(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags.found}
    addresses = [value for _, attributes in tags.found for name, value in attributes.items() if name in ("src", "href")]
    assert len(addresses) == 1
    assert addresses[0] == "data:image/png;base64," + base64.b64encode(overlay).decode()
    assert not re.search(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in text


def test_the_page_says_the_important_things_in_order(report: Report) -> None:
    warned = replace(report, run=replace(report.run, warnings=(Warning_("odd", "Film looks odd.", "quality"),)))
    text = page(warned, b"")
    places = [text.index(part) for part in (DISCLAIMER, "Film looks odd.", "<h2>Class", "<h2>Severity", "How this was")]
    assert places == sorted(places)
    for letter in "ABCDEF":
        assert f">{letter} · " in text
    for media in ("prefers-color-scheme: dark", "@page { size: A4", "@media print"):
        assert media in text
    assert "Check before" not in page(report, b"")


def test_the_page_says_which_classes_are_not_ruled_out(report: Report) -> None:
    def shown(*thresholds: float) -> str:
        answer = replace(report.classification, conformal=Conformal(0.95, thresholds))
        return page(replace(report, classification=answer), b"")

    answer = report.classification
    assert answer is not None
    assert "Not ruled out at 95% coverage: COVID-19 or Normal. " in shown(0, 0, 1) and "No answer" in shown(0, 0, 1)
    assert "coverage: no class. " in shown(1, 1, 1) and "No answer" in shown(1, 1, 1)
    alone = shown(*(0.0 if label == answer.label else 1.0 for label in answer.labels))
    assert f"coverage: {answer.label}. " in alone and "No answer" not in alone


def test_a_page_without_a_class_or_with_one_lung(analyzer: Analyzer, report: Report) -> None:
    bare = replace(report, classification=None, saliency=None, severity=None)
    assert "only finds lungs" in page(bare, png(render(bare)))
    one = analyzer.analyze(radiograph(draw(lungs=["left"])))
    text = page(one, png(render(one)))
    assert "No lung was found in zone A, B, C." in text
    assert "No global score" in text
