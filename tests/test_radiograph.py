"""Resampling against OpenCV's on the whole grid, and boxes against NumPy."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from lungscope import radiograph
from lungscope.radiograph import Geometry, box, in_bands

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(("side", "size"), [(1120, 224), (2048, 224), (1978, 160), (1301, 224), (1025, 1024)])
def test_a_large_film_is_shrunk_as_opencv_does_on_any_number_of_cores(side: int, size: int) -> None:
    film = RANDOM.random((side, side), dtype=np.float32)
    before, found = cv2.getNumThreads(), []
    try:
        for threads in (1, 2, 7):
            cv2.setNumThreads(threads)
            found.append(Geometry.letterbox(film.shape, size).to_network(film))
    finally:
        cv2.setNumThreads(before)
    np.testing.assert_array_equal(found[1:], found[:1] * 2)
    np.testing.assert_allclose(found[0], cv2.resize(film, (size, size), interpolation=cv2.INTER_AREA), atol=1e-6)
    if not side % size:
        cells = film.reshape(size, side // size, size, side // size).mean(axis=(1, 3), dtype=np.float64)
        np.testing.assert_allclose(found[0], cells, atol=1e-6)


@pytest.mark.parametrize("place", [(-40, 30, 1300), (100, -70, 1100), (-1300, 20, 1500), (1390, 0, 1200)])
def test_a_large_window_beyond_the_film_holds_black_there(place: tuple[int, int, int]) -> None:
    film = RANDOM.random((1400, 1250), np.float32)
    top, left, side = place
    whole = np.zeros((4200, 3750), np.float32)
    whole[1400:2800, 1250:2500] = film
    window = whole[1400 + top :, 1250 + left :][:side, :side]
    expected = cv2.resize(window, (96, 96), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(Geometry(film.shape, *place, 96).to_network(film), expected, atol=1e-6)


def test_bands_hold_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radiograph, "cores", lambda: 6)
    film = RANDOM.random((1200, 1000), dtype=np.float32)
    bands = in_bands(lambda band: band, film)
    assert len(bands) == 6
    np.testing.assert_array_equal(np.concatenate(bands), film)
    assert len(in_bands(lambda band: band, film[:10])) == 1, "a small film is not worth a thread"


def test_what_is_masked_leaves_no_trace() -> None:
    film = RANDOM.random((90, 70), dtype=np.float32)
    mask = RANDOM.random(film.shape) < 0.5
    geometry = Geometry.around(mask, 16, 0.2)
    assert geometry.top < 0, "the window reaches beyond the film"
    np.testing.assert_array_equal(geometry.masked(film, mask), geometry.to_network(film * mask))


@pytest.mark.parametrize(("shape", "cells"), [((90, 70), 6), ((64, 64), 64), ((301, 480), 224), ((60, 52), 224)])
def test_a_map_at_some_places_is_the_whole_map_there(shape: tuple[int, int], cells: int) -> None:
    geometry = Geometry.letterbox(shape, 32)
    grid = RANDOM.random((cells, cells), dtype=np.float32)
    rows, columns = np.arange(3, shape[0], 4), np.arange(0, shape[1], 3)
    found = geometry.at(grid, rows, columns)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, geometry.to_source(grid)[np.ix_(rows, columns)], atol=1e-5)


@pytest.mark.parametrize("pixels", [(), ((3, 5),), ((0, 1), (6, 2)), ((2, 0), (2, 8))])
def test_a_box_holds_what_is_set_and_no_more(pixels: tuple[tuple[int, int], ...]) -> None:
    mask = np.zeros((7, 9), np.bool_)
    for at in pixels:
        mask[at] = True
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    found = box(mask)
    assert mask[found].sum() == mask.sum()
    if pixels:
        assert found == (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))


@pytest.mark.parametrize("place", [(-40, 30, 1300), (100, -70, 1100)])
def test_a_large_film_is_blacked_out_as_a_whole(place: tuple[int, int, int]) -> None:
    film, mask = RANDOM.random((1400, 1250), np.float32), RANDOM.random((1400, 1250)) < 0.5
    geometry = Geometry((1400, 1250), *place, 96)
    expected = geometry.to_network(np.where(mask, film, np.float32(0)))
    np.testing.assert_array_equal(geometry.masked(film, mask), expected)
