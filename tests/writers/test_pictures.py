"""overlay.png: one fixed scale, nothing drawn where there is no evidence."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from films import draw, radiograph
from lungscope.pipeline import Analyzer
from lungscope.report import Report
from lungscope.writers.overlay import (
    EVIDENCE_SCALE,
    LEFT,
    LONG_SIDE,
    PANEL,
    RIGHT,
    Scale,
    heat_colour,
    png,
    render,
    side_letters,
    zone_letters,
    zone_lines,
)


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


@pytest.mark.parametrize("orientation", ["L\\F", "R\\F"])
def test_letters_lines_and_outlines_are_at_their_own_lungs(analyzer: Analyzer, orientation: str) -> None:
    report = analyzer.analyze(radiograph(draw(), PatientOrientation=orientation))
    scale = Scale.of(report.film.shape)
    middle = scale.width / 2
    on_left = {RIGHT: not report.film.mirrored, LEFT: report.film.mirrored}
    letters = {letter: (colour, {x < middle}) for letter, colour, x, _ in side_letters(report, scale)}
    for letter, _, colour, before, x, _ in zone_letters(report, scale):
        letters[letter] = (colour, {before, x < middle})
    own = {RIGHT: "RABC", LEFT: "LDEF"}
    assert letters == {letter: (colour, {on_left[colour]}) for colour in own for letter in own[colour]}
    lines = [(colour, {start < middle, stop < middle}) for colour, start, stop, _ in zone_lines(report, scale)]
    assert lines == [(colour, {on_left[colour]}) for colour in (RIGHT, RIGHT, LEFT, LEFT)]
    picture = render(report)[:, :-PANEL]
    for colour in own:
        assert {*(np.nonzero((picture == colour).all(axis=-1))[1] < middle)} == {on_left[colour]}


def test_the_peak_is_marked_where_it_is(report: Report) -> None:
    saliency = report.saliency
    assert saliency is not None and saliency.peak is not None
    without = replace(report, saliency=replace(saliency, peak=None))
    rows, columns = np.nonzero((render(report) != render(without))[:, :-PANEL].any(axis=-1))
    assert (columns.mean(), rows.mean()) == pytest.approx(Scale.of(report.film.shape).at(*saliency.peak), abs=1)
