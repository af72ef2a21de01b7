"""report.html: the film in layers, its numbers as in the report, and closed to what is in a file."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html import escape
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from bundles import write_bundle
from films import draw, radiograph
from lungscope.pipeline import Analyzer
from lungscope.report import DISCLAIMER, Report
from lungscope.stages.classification import Conformal
from lungscope.stages.quality import Warning_
from lungscope.stages.severity import contradicts
from lungscope.writers.html import _FIGURE, HEAT_SIDE, page
from lungscope.writers.overlay import EVIDENCE_SCALE, LONG_SIDE, Scale, heat_colour
from markup import EVIL, Tags


@pytest.fixture(scope="module")
def report(analyzer: Analyzer) -> Report:
    return analyzer.analyze(radiograph(draw(opacities=[(0.6, 0.3, 0.12)])))


def test_nothing_out_of_a_file_becomes_markup(report: Report) -> None:
    source = replace(report.source, path=Path(f"/d/{EVIL}.dcm".replace("</", "<\\")), format=EVIL)
    source = replace(source, tags={EVIL: EVIL, "PatientComments": EVIL})
    answer, saliency = report.classification, report.saliency
    assert answer is not None
    assert saliency is not None
    odd = replace(
        report,
        film=replace(report.film, source=source, spacing_mm=(1, 1), spacing_origin=EVIL),
        classification=replace(answer, labels=(EVIL, *answer.labels[1:]), label=EVIL),
        saliency=replace(saliency, label=EVIL),
        run=replace(report.run, bundle=EVIL, device=EVIL, warnings=(Warning_(EVIL, EVIL, EVIL),)),
    )
    text = page(odd)
    tags, clean = Tags(text), Tags(page(report))
    assert len(tags.all("script")) == len(clean.all("script")) == 1
    assert tags.all("img") == []
    assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]
    assert "&lt;script&gt;" in text


def test_the_page_needs_nothing_from_outside_and_runs_its_own_script_alone(report: Report) -> None:
    text = page(report)
    tags = Tags(text)
    assert not {"link", "iframe", "object", "img", "a"} & {tag for tag, _ in tags.found}
    addresses = [value for _, attributes in tags.found for name, value in attributes.items() if name in ("src", "href")]
    assert len(addresses) == 2
    assert all(address is not None and address.startswith("data:image/") for address in addresses)
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    assert not [attributes for _, attributes in tags.found if "style" in attributes]
    policy = next(str(meta["content"]) for meta in tags.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy
    for name in ("script", "style"):
        (inside,) = re.findall(f"<{name}>(.*?)</{name}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy


def pictures(report: Report) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The film and the heat map (BGRA) that the page holds."""
    addresses = re.findall(r'href="data:image/(jpeg|png);base64,([^"]+)"', page(report))
    assert [kind for kind, _ in addresses] == ["jpeg", "png"]
    film, heat = (
        cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_UNCHANGED) for _, data in addresses
    )
    return np.asarray(film, np.uint8), np.asarray(heat, np.uint8)


def test_the_layers_are_the_film_and_the_evidence_at_its_fixed_scale(report: Report) -> None:
    film, heat = pictures(report)
    assert film.shape == report.film.shape
    assert np.abs(film - report.film.pixels * 255).mean() < 1
    saliency = report.saliency
    assert saliency is not None
    assert heat.shape == (*saliency.map.shape, 4), "a film below the limit is not enlarged"
    colour, opacity = heat_colour(saliency.map)
    np.testing.assert_array_equal(heat[..., 3], np.rint(255 * opacity))
    np.testing.assert_array_equal(heat[..., 3] > 0, saliency.map > 0)
    seen = heat[..., 3] > 0
    np.testing.assert_allclose(heat[..., 2::-1][seen], colour[seen], atol=0.5)
    stronger = replace(report, saliency=replace(saliency, map=np.where(report.lungs.mask, 2 * EVIDENCE_SCALE, 0)))
    assert pictures(stronger)[1][..., 3].max() == round(255 * 0.8), "never stretched to the film's own range"


def test_a_large_film_is_shrunk_and_its_page_stays_small(analyzer: Analyzer) -> None:
    pixels = draw(2000, 1500, opacities=[(0.6, 0.3, 0.12)])
    pixels = np.clip(pixels + np.random.default_rng(0).normal(0, 0.02, pixels.shape), 0, 1).astype(np.float32)
    report = analyzer.analyze(radiograph(pixels))
    film, heat = pictures(report)
    assert (film.shape, heat.shape) == ((LONG_SIDE, 750), (HEAT_SIDE, 375, 4))
    assert len(page(report)) < 600_000


def test_outlines_and_peak_are_where_the_report_has_them(report: Report) -> None:
    text, factor = page(report), LONG_SIDE / max(report.film.shape)
    for side, lung in (("right", report.lungs.right), ("left", report.lungs.left)):
        (path,) = re.findall(rf'<path class="outline {side}" d="M([^"]+)Z"', text)
        points = np.array([point.split(" ") for point in path.split("L")], float)
        rows, columns = np.nonzero(lung)
        want = np.array([[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]]) * factor
        np.testing.assert_allclose([points.min(axis=0), points.max(axis=0)], want, atol=2 * factor)
    assert report.saliency is not None and report.saliency.peak is not None
    x, y = Scale.of(report.film.shape).at(*report.saliency.peak)
    assert f"M{x - 13} {y}a13 13" in text


@pytest.mark.parametrize(("orientation", "sides"), [("L\\F", ["right", "left"]), ("R\\F", ["left", "right"])])
def test_each_lung_is_on_its_side_of_the_figure(analyzer: Analyzer, orientation: str, sides: list[str]) -> None:
    text = page(analyzer.analyze(radiograph(draw(), PatientOrientation=orientation)))
    assert re.findall(r"patient's (\w+)</text>", text) == sides
    zones = re.findall(r'<path class="s\d" d="M([\d.-]+)', text)
    assert [sides[float(x) > _FIGURE / 2] for x in zones] == ["right"] * 3 + ["left"] * 3
    assert re.findall(r'class="letter (\w+)"[^>]*>(\w)<', text) == [("right", "R"), ("left", "L")]


def test_the_page_says_the_important_things_in_order(report: Report) -> None:
    warned = replace(report, run=replace(report.run, warnings=(Warning_("odd", "Film looks odd.", "quality"),)))
    text = page(warned)
    parts = (DISCLAIMER, "Film looks odd.", 'class="viewer"', "<h2>Class</h2>", "<h2>Severity", "How this was")
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    severity = report.severity
    assert severity is not None
    for letter, zone in severity.zones.items():
        assert zone is not None
        assert f">{letter} · {zone.score}</text>" in text, "the figure"
        assert f">{letter} {zone.score}</text>" in text, "the layer"
    for media in ("prefers-color-scheme: dark", "@page { size: A4", "@media print"):
        assert media in text
    assert "Check before" not in page(report)


def test_a_close_call_is_named(report: Report) -> None:
    answer = report.classification
    assert answer is not None and "Close call" not in page(report)
    mirrored = replace(report, classification=replace(answer, mirrored=True))
    assert "the mirror image was classified, too" in page(mirrored)


def test_the_page_says_which_classes_are_not_ruled_out(report: Report) -> None:
    answer = report.classification
    assert answer is not None

    def shown(*thresholds: float) -> str:
        return page(replace(report, classification=replace(answer, conformal=Conformal(0.95, thresholds))))

    assert "Not ruled out at 95 % coverage: <b>COVID-19 or Normal</b>." in shown(0, 0, 1)
    assert "No answer" in shown(0, 0, 1)
    assert shown(0, 0, 1).count(">in set<") == 2
    assert "coverage: <b>no class</b>." in shown(1, 1, 1)
    alone = shown(*(0.0 if label == answer.label else 1.0 for label in answer.labels))
    assert f"coverage: <b>{answer.label}</b>." in alone
    assert "No answer" not in alone
    assert '<line x1="25.00%" x2="25.00%"' in shown(0.25, 0.5, 0.5)
    without = page(replace(report, classification=replace(answer, conformal=None)))
    assert "Not ruled out" not in without
    for label, share in zip(answer.labels, answer.probabilities, strict=True):
        assert f"<span>{label}</span>" in without
        assert f">{100 * share:.1f} %</span>" in without


@pytest.mark.parametrize(
    ("label", "scores", "odd"),
    [
        ("Normal", [0, 0, 1, 0, 0, 1], False),
        ("Normal", [0, 0, 2, 0, 0, 0], True),
        ("Normal", [None, None, None, 0, 0, 3], True),
        ("COVID-19", [0, 0, 0, 0, 0, 1], False),
        ("COVID-19", [0, 0, 0, 0, 0, 0], True),
        ("COVID-19", [None, None, None, 0, 0, 0], True),
        ("COVID-19", [None] * 6, False),
        ("Normal", [], False),
    ],
)
def test_when_class_and_severity_contradict(label: str, scores: list[int | None], odd: bool) -> None:
    assert contradicts(label, scores) is odd


def test_a_page_that_contradicts_itself_says_so(report: Report) -> None:
    severity, answer = report.severity, report.classification
    assert severity is not None
    assert answer is not None
    zones = {
        letter: zone and replace(zone, score=3 if letter in "BF" else 0, extent=0.7 if letter in "BF" else 0.0)
        for letter, zone in severity.zones.items()
    }
    clear = {letter: zone and replace(zone, score=0, extent=0.0) for letter, zone in zones.items()}

    def shown(label: str, zones: dict[str, object]) -> str:
        changed = replace(answer, label=label)
        return page(replace(report, classification=changed, severity=replace(severity, zones=zones)))

    normal = shown("Normal", zones)
    assert "contradict each other" in normal
    assert "at least a third of the lung counts as involved in zone B (70 %), F (70 %)." in normal
    assert "contradict each other" not in shown("COVID-19", zones)
    assert "in no zone does as much as 5 % of the lung count as involved" in shown("COVID-19", clear)
    assert "contradict each other" not in shown("Normal", clear)


def test_the_page_says_what_severity_is_made_of(report: Report, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", opacity=True)
    other = Analyzer(bundle, device="cpu").analyze(report.film)
    assert report.severity is not None and other.severity is not None
    assert (report.severity.basis, other.severity.basis) == ("evidence", "opacity")
    for shown, not_shown in ((report.severity, other.severity), (other.severity, report.severity)):
        text = page(report if shown is report.severity else other)
        assert escape(shown.definition) in text
        assert escape(not_shown.definition) not in text


def test_a_page_without_a_class_or_with_one_lung(analyzer: Analyzer, report: Report) -> None:
    bare = page(replace(report, classification=None, saliency=None, severity=None))
    assert "only finds lungs" in bare
    assert [item.get("id") for item in Tags(bare).all("input")] == ["lungs"]
    one = page(analyzer.analyze(radiograph(draw(lungs=["left"]))))
    assert "No lung was found in zone A, B, C." in one
    assert "No global score" in one
    assert 'class="outline left"' in one
    assert 'class="outline right"' not in one
