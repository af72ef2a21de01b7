"""The evidence map against maps computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from answers import classification, lungs

from lungscope.stages.localization import localize

NOTHING = np.zeros((4, 4), np.bool_)


def left_half() -> np.ndarray:
    mask = NOTHING.copy()
    mask[:, :2] = True
    return mask


def test_only_positive_evidence_of_the_predicted_class_inside_the_lungs_is_kept() -> None:
    cam = np.zeros((2, 4, 4), np.float32)
    cam[0, 1, 1], cam[0, 2, 0], cam[0, 0, 0] = 6.0, 2.0, -3.0
    cam[0, 1, 3] = 8.0  # outside the lungs, and the largest
    cam[1] = -5.0
    result = localize(classification(cam), lungs(left_half(), NOTHING))
    expected = np.zeros((4, 4), np.float32)
    expected[1, 1], expected[2, 0] = 6.0, 2.0
    np.testing.assert_array_equal(result.map, expected)
    assert result.label == "COVID-19"
    assert result.peak == (1, 1)
    assert result.peak_value == 6.0
    assert result.fraction_in_lungs == pytest.approx(8 / 16)


def test_the_unit_is_kept_whatever_the_size_of_the_evidence() -> None:
    cam = np.zeros((2, 4, 4), np.float32)
    cam[0, 1, 1] = 0.01
    cam[1] = -1
    assert localize(classification(cam), lungs(left_half(), NOTHING)).map.max() == np.float32(0.01)


def test_the_map_is_resampled_to_the_source_grid() -> None:
    cam = np.stack([np.full((2, 2), 3.0), np.zeros((2, 2))]).astype(np.float32)
    mask = np.ones((8, 8), np.bool_)
    result = localize(classification(cam, shape=(8, 8)), lungs(mask, mask & False))
    np.testing.assert_allclose(result.map, np.full((8, 8), 3.0))
    assert result.fraction_in_lungs == pytest.approx(1.0)


@pytest.mark.parametrize("column", [None, 3])
def test_without_evidence_in_the_lungs_there_is_no_peak(column: int | None) -> None:
    cam = np.zeros((2, 4, 4), np.float32)
    cam[1] = -2.0
    if column is not None:
        cam[0, 1, column] = 4.0
    result = localize(classification(cam), lungs(left_half(), NOTHING))
    assert result.peak is None
    assert not result.map.any()
    assert result.fraction_in_lungs == (None if column is None else 0.0)
    assert result.to_json()["peak"] is None


@pytest.mark.parametrize("side", [1400, 1320])
def test_a_film_of_many_bands_is_summed_up_as_a_whole(side: int) -> None:
    cam = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
    cam[0, 1, 2] = cam[0, 6, 5] = 9.0  # two places with the largest value: the upper one counts
    right = np.zeros((side, side), np.bool_)
    right[100:1300, 60:600] = True
    result = localize(classification(cam, shape=(side, side)), lungs(right, right[:, ::-1]))
    assert result.peak == np.unravel_index(result.map.argmax(), result.map.shape)
    assert result.peak_value == result.map.max()
    everywhere = np.ones((side, side), np.bool_)
    whole = localize(classification(cam, shape=(side, side)), lungs(everywhere, everywhere & False)).map
    assert result.fraction_in_lungs == pytest.approx(result.map.sum() / whole.sum(), rel=1e-4)
