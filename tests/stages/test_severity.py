"""Zone scores against films whose involved pixels were counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from answers import classification, lungs

from lungscope.stages.classification import Classification
from lungscope.stages.localization import localize
from lungscope.stages.severity import DEFINITION, disease, grade, score_of

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
    assert result.to_json()["definition"] == DEFINITION


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
