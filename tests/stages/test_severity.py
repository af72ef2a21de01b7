"""Zone scores against films whose involved pixels were counted by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from answers import classification, lungs

from lungscope.radiograph import Geometry
from lungscope.stages.classification import Classification
from lungscope.stages.localization import localize
from lungscope.stages.segmentation import Grades, Opacity
from lungscope.stages.severity import (
    Zone,
    contradiction,
    definition,
    disease,
    grade,
    opacity_levels,
    score_of,
    shown,
    zone_masks,
)

SIZE = 12


def sides() -> tuple[np.ndarray, np.ndarray]:
    """Two lungs of 9 rows and 4 columns: zones of 3 x 4 = 12 pixels."""
    right, left = np.zeros((SIZE, SIZE), np.bool_), np.zeros((SIZE, SIZE), np.bool_)
    right[1:10, 1:5] = True
    left[2:11, 7:11] = True
    return right, left


def ill(*spans: tuple[int, int, int, int]) -> Classification:
    """Strong evidence for disease in the spans (top, bottom, left, right), for Normal elsewhere."""
    cam = np.zeros((2, SIZE, SIZE), np.float32)
    cam[0] = -4
    for top, bottom, left, right in spans:
        cam[0, top:bottom, left:right] = 4
    return classification(cam)


def test_known_zones() -> None:
    # Right lung: A (rows 1-3) 1 of 12, B (4-6) 6, C (7-9) 12. Left: D (2-4) 0, E (5-7) 4 = 1/3, F (8-10) 8 = 2/3.
    answer = ill((1, 2, 1, 2), (4, 7, 1, 3), (7, 10, 1, 5), (5, 6, 7, 11), (8, 10, 7, 11))
    result = grade(answer, lungs(*sides()))
    scores = {name: zone and zone.score for name, zone in result.zones.items()}
    extents = {name: zone and round(zone.extent * 12) for name, zone in result.zones.items()}
    assert extents == {"A": 1, "B": 6, "C": 12, "D": 0, "E": 4, "F": 8}
    assert scores == {"A": 1, "B": 2, "C": 3, "D": 0, "E": 2, "F": 3}
    assert result.total == 11
    assert result.extent_percent == {"right": pytest.approx(100 * 19 / 36), "left": pytest.approx(100 * 12 / 36)}
    # Log-odds are +4 where ill and -4 elsewhere, over 31 ill and 41 other pixels.
    assert result.evidence == pytest.approx(4 * (31 - 41) / 72)
    zone = result.zones["B"]
    assert zone is not None
    assert zone.rows == (4, 7)
    assert zone.evidence == pytest.approx(0)
    assert result.to_json()["definition"] == definition(None)
    assert "involved where that exceeds 0.5" in definition(None) and "second map" not in definition(None)


def test_where_lungs_are_opaque_is_told_by_the_segmenter_if_it_can() -> None:
    """Two rows at the bases are opaque; the class's evidence, which says that all is ill, does not score."""
    opaque = np.zeros((SIZE, SIZE), np.float32)
    opaque[8:10, :] = 0.4
    found = replace(lungs(*sides()), opacity=Opacity(opaque, Geometry.letterbox((SIZE, SIZE), SIZE), limit=0.3))
    answer = ill((0, 12, 0, 12))
    result = grade(answer, found)
    extents = {name: zone and round(zone.extent * 12) for name, zone in result.zones.items()}
    # Rows 8 and 9: of the right lung's C (7-9), of the left lung's F (8-10).
    assert extents == {"A": 0, "B": 0, "C": 8, "D": 0, "E": 0, "F": 8}
    assert result.total == 6
    assert result.evidence == pytest.approx(4)
    assert result.to_json()["basis"] == "opacity"
    assert result.to_json()["definition"] == definition(0.3)
    assert "second map" in definition(0.3) and "involved where that exceeds 0.3" in definition(0.3)

    assert found.opacity is not None
    assert grade(answer, replace(found, opacity=replace(found.opacity, limit=0.5))).total == 0
    clear = grade(answer, replace(found, opacity=replace(found.opacity, map=opaque * 0)))
    assert clear.total == 0
    text = contradiction("COVID-19", 0.9, clear)
    assert text is not None
    assert "knows no class" in text
    assert contradiction("COVID-19", 0.9, result) is None
    text = contradiction("Normal", 0.9, result)
    assert text is not None
    assert "C (67 %), F (67 %)" in text


def test_where_the_segmenter_grades_that_scores_and_extent_stays_what_it_was() -> None:
    """Grades rise by rows: a zone's is the mean of its rows, the right lung's from 1, the left's from 2."""
    limits = (2.5, 5.0, 8.5)
    rising = np.repeat(np.arange(SIZE, dtype=np.float32)[:, None], SIZE, axis=1)
    geometry = Geometry.letterbox((SIZE, SIZE), SIZE)
    found = replace(lungs(*sides()), grades=Grades(rising, geometry, limits))
    opaque = replace(found, opacity=Opacity(rising * 0, geometry, limit=0.3))
    for result, basis in ((grade(ill((0, 12, 0, 12)), found), 1.0), (grade(ill(), opaque), 0.0)):
        grades = {name: zone and zone.grade for name, zone in result.zones.items()}
        assert grades == {"A": 2, "B": 5, "C": 8, "D": 3, "E": 6, "F": 9}
        scores = {name: zone and zone.score for name, zone in result.zones.items()}
        assert scores == {"A": 0, "B": 2, "C": 2, "D": 1, "E": 2, "F": 3}
        assert result.total == 10
        assert result.to_json()["basis"] == "grade"
        assert result.to_json()["zones"]["F"]["grade"] == 9
        assert {zone and zone.extent for zone in result.zones.values()} == {basis}
        assert result.definition == definition(result.opaque, limits)
    assert "below a grade of 2.5" in definition(0.3, limits) and "involved where that exceeds 0.3" in definition(0.3)
    assert "grade" not in definition(0.3) and "one third" not in definition(0.3, limits)

    text = contradiction("Normal", 0.9, result)
    assert text is not None
    assert "scores 2 or more: B (grade 5.000), C (grade 8.000), E (grade 6.000), F (grade 9.000)." in text
    clear = grade(ill((0, 12, 0, 12)), replace(found, grades=Grades(rising * 0, geometry, limits)))
    text = contradiction("COVID-19", 0.9, clear)
    assert text is not None
    assert "every zone scores 0" in text and "fitted to radiologists' scores" in text


def test_zones_are_the_thirds_of_each_lung() -> None:
    masks = zone_masks(lungs(*sides()))
    right, left = sides()
    assert list(masks) == list("ABCDEF")
    np.testing.assert_array_equal(sum(masks[letter].astype(int) for letter in "ABC"), right)
    np.testing.assert_array_equal(sum(masks[letter].astype(int) for letter in "DEF"), left)
    assert [int(mask.sum()) for mask in masks.values()] == [12] * 6
    assert masks["B"][4:7, 1:5].all() and masks["F"][8:11, 7:11].all()
    assert list(zone_masks(lungs(right, left & False))) == list("ABC")


def test_above_its_level_a_zone_scores_nothing() -> None:
    """As a limit, the level of a zone leaves less than 5 % of its pixels involved, and a lower one 5 % or more."""
    assert opacity_levels(lungs(*sides())) == []
    grown = [np.kron(side, np.ones((10, 10), np.bool_)) for side in sides()]
    side = 10 * SIZE
    opaque = np.random.default_rng(0).random((side, side), np.float32)
    found = replace(lungs(*grown), opacity=Opacity(opaque, Geometry.letterbox((side, side), side), limit=0.5))
    levels = opacity_levels(found)
    assert levels == pytest.approx([0.95] * 6, abs=0.02)
    assert found.opacity is not None
    answer = classification(ill().cam, shape=(side, side))
    for number, level in enumerate(levels):
        for limit, score in ((level, 0), (np.nextafter(np.float32(level), np.float32(0)), 1)):
            zones = grade(answer, replace(found, opacity=replace(found.opacity, limit=float(limit)))).zones
            zone = zones["ABCDEF"[number]]
            assert zone is not None and zone.score == score


def test_a_grade_is_shown_on_its_scores_side_of_each_limit() -> None:
    limits = (0.794, 1.216, 1.888)
    for value in (-0.04, 0.7936, 0.7944, 1.2151, 1.2477, 1.8557, 1.8881):
        zone = Zone(score_of(value, limits), 10, 0.0, 0.0, (0, 1), value)
        assert score_of(float(shown(zone).removeprefix("grade ")), limits) == zone.score


def test_a_large_film_is_scored_as_a_small_one() -> None:
    """Pixels are thinned out: shares stay."""
    times = 150
    answer = ill((4, 7, 1, 3), (7, 10, 1, 5), (8, 10, 7, 11))
    large = classification(answer.cam, shape=(SIZE * times, SIZE * times))
    grown = [np.kron(side, np.ones((times, times), np.bool_)) for side in sides()]
    small, found = grade(answer, lungs(*sides())), grade(large, lungs(*grown))
    for letter, zone in found.zones.items():
        other = small.zones[letter]
        assert zone is not None
        assert other is not None
        # Between two cells of the map a large film has a slope, a small one a step.
        assert zone.extent == pytest.approx(other.extent, abs=0.05)
        assert zone.rows == tuple(row * times for row in other.rows)
        assert zone.pixels == pytest.approx(other.pixels * times**2, rel=0.01)


@pytest.mark.parametrize(
    ("extent", "score"),
    [(0, 0), (0.0499, 0), (0.05, 1), (0.333, 1), (1 / 3, 2), (0.666, 2), (2 / 3, 3), (1, 3)],
)
def test_limits(extent: float, score: int) -> None:
    assert score_of(extent) == score


def test_disease_is_all_that_is_not_normal_and_the_bias_counts() -> None:
    cam = np.zeros((3, 1, 1), np.float32)
    answer = classification(cam, bias=np.log([1, 2, 5]), labels=("COVID-19", "Normal", "Viral Pneumonia"))
    log_odds, probability = disease(answer)
    assert probability[0, 0] == pytest.approx(6 / 8)
    assert log_odds[0, 0] == pytest.approx(np.log(6 / 2))


def test_evidence_outside_the_lungs_does_not_count() -> None:
    result = grade(ill((0, 12, 5, 7), (0, 1, 0, 12), (11, 12, 0, 12)), lungs(*sides()))
    assert result.total == 0


def test_a_zone_is_its_lung_pixels_and_a_lung_is_all_of_its_pixels() -> None:
    """The right lung's zones have 6, 9 and 12 pixels. A is ill, and so is what lies beside A and B in its box."""
    right, left = sides()
    right[1:4, 3:] = right[4:7, 4:] = False
    grades = np.where(right | left, np.float32(1), np.float32(9))
    found = replace(lungs(right, left), grades=Grades(grades, Geometry.letterbox((SIZE, SIZE), SIZE), (2, 3, 4)))
    result = grade(ill((1, 4, 1, 5), (4, 7, 4, 5)), found)
    zones = {name: zone and (zone.extent, zone.evidence, zone.grade) for name, zone in result.zones.items()}
    assert zones == {"A": (1, 4, 1)} | dict.fromkeys("BCDEF", (0, -4, 1))
    assert result.extent == {"right": pytest.approx(6 / 27), "left": 0}
    assert result.evidence == pytest.approx(4 * (6 - 57) / 63)


def test_a_missing_lung_has_no_scores_and_there_is_no_global_one() -> None:
    right, left = sides()
    result = grade(ill((1, 10, 1, 5)), lungs(right, left & False))
    assert [zone and zone.score for zone in result.zones.values()] == [3, 3, 3, None, None, None]
    assert result.total is None
    assert result.extent_percent == {"right": 100.0, "left": None}
    assert result.reason == "No lung was found in zone D, E, F."
    assert result.to_json()["zones"]["F"] is None


def test_without_a_normal_class_nothing_is_scored() -> None:
    cam = np.zeros((2, SIZE, SIZE), np.float32)
    result = grade(classification(cam, labels=("A", "B")), lungs(*sides()))
    assert result.total is None
    assert set(result.zones.values()) == {None}
    assert result.reason is not None
    assert "no class 'Normal'" in result.reason


def test_a_normal_film_has_evidence_but_no_severity() -> None:
    answer = ill()
    assert localize(answer, lungs(*sides())).label == "Normal"
    assert grade(answer, lungs(*sides())).total == 0
