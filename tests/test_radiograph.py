"""Resampling against OpenCV's on the whole grid, and boxes against NumPy."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from lungscope.radiograph import Geometry, box

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


@pytest.mark.parametrize("frame", [(0, 0, 0, 0), (40, 40, 40, 40), (90, 0, 0, 0), (0, 31, 0, 8), (7, 0, 60, 1)])
@pytest.mark.parametrize(("grey", "noise"), [(0, 0.03), (1, -0.03), (0.5, 0.006), (0.25, -0.006)])
def test_a_frame_changes_nothing(frame: tuple[int, int, int, int], grey: float, noise: float) -> None:
    film = 0.1 + 0.8 * RANDOM.random((150, 120), dtype=np.float32)
    film[40:60] = grey  # inside the film that is no frame
    above, below, before, behind = frame
    framed = np.pad(film, ((above, below), (before, behind)), constant_values=np.float32(grey))
    framed += np.float32(noise) * (framed == grey) * (RANDOM.random(framed.shape) < 0.5)
    framed[3:5, 3:5] = 0.7  # a marker
    film = framed[above : above + 150, before : before + 120]
    plain, found = Geometry.of_film(film, 32), Geometry.of_film(framed, 32)
    assert (found.top - above, found.left - before, found.side) == (plain.top, plain.left, plain.side)
    assert plain == Geometry.letterbox(film.shape, 32)
    np.testing.assert_array_equal(found.to_network(framed), plain.to_network(film))
    inside = found.to_source(np.ones((4, 4), np.float32))
    assert inside[above : above + 150, before : before + 120].min() == 1 and inside.sum() == film.size


def test_an_even_body_is_no_frame() -> None:
    film = np.full((150, 120), 0.5, np.float32)
    film[50:100, 30:90] = RANDOM.random((50, 60))
    assert Geometry.of_film(film, 32) == Geometry.letterbox(film.shape, 32)
    black = Geometry.of_film(np.pad(film, 20), 32)
    assert black.part == (slice(20, 170), slice(20, 140)), "what is even in a black frame stays"


def test_dark_edges_and_edges_of_which_a_tenth_is_lit_are_no_frame() -> None:
    film = 0.06 + 0.1 * RANDOM.random((150, 120), dtype=np.float32)
    film[20:] *= 5
    assert Geometry.of_film(film, 32) == Geometry.letterbox(film.shape, 32)
    film[:9] = 0
    film[:9, ::10] = 0.7
    assert Geometry.of_film(film, 32) == Geometry.letterbox(film.shape, 32)


def test_a_frame_may_lie_in_another() -> None:
    film = 0.1 + 0.8 * RANDOM.random((150, 120), dtype=np.float32)
    framed = np.pad(np.pad(film, 20, constant_values=1), ((30, 10), (0, 40)))
    np.testing.assert_array_equal(
        Geometry.of_film(framed, 32).to_network(framed), Geometry.of_film(film, 32).to_network(film)
    )


@pytest.mark.parametrize("film", [np.zeros((90, 70), np.float32), np.repeat(np.eye(2, dtype=np.float32)[:1], 80, 0)])
def test_a_film_that_is_all_frame_is_shown_as_it_is(film: np.ndarray) -> None:
    wide = np.repeat(film, 40, axis=1)
    assert Geometry.of_film(wide, 32) == Geometry.letterbox((len(wide), wide.shape[1]), 32)


def test_what_is_masked_leaves_no_trace() -> None:
    film = RANDOM.random((90, 70), dtype=np.float32)
    mask = RANDOM.random(film.shape) < 0.5
    geometry = Geometry.around((90, 70), box(mask), 16, 0.2)
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


@pytest.mark.parametrize("cells", [6, 150, 400])
@pytest.mark.parametrize("turn", [None, 9.0])
def test_a_map_in_bands_and_its_sum_are_those_of_the_whole_map(cells: int, turn: float | None) -> None:
    if turn is None:
        geometry = Geometry((310, 290), -20, 15, 330, 32)
    else:
        geometry = Geometry.along(*lungs(turn, 50, 55, (150, 160))[1:], 64, 0.6)
        assert geometry.top < 0, "the window reaches beyond the film"
    grid = RANDOM.random((cells, cells), dtype=np.float32)
    whole, (height, width) = geometry.to_source(grid), geometry.source_shape
    assert geometry.total(grid) == pytest.approx(whole.sum(dtype=np.float64), rel=1e-5)
    left = geometry.inside[1].start
    for part in (geometry.inside, (slice(31, 250), slice(left + 7, 280)), (slice(0, 0), slice(0, 0))):
        bands = list(geometry.bands(grid, part))
        assert [row for rows, _ in bands for row in range(rows.start, rows.stop)] == list(range(height))[part[0]]
        assert all(band.shape[1] == len(range(width)[part[1]]) and band.dtype == np.float32 for _, band in bands)
        found = [band for _, band in bands if band.size]
        if found:
            np.testing.assert_allclose(np.concatenate(found), whole[part], atol=1e-5)


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


def lungs(turn: float, wide: float, high: float, at: tuple[float, float], side: int = 300) -> tuple[np.ndarray, ...]:
    """A film of one upright pair of lungs and what is in them, turned by degrees, stretched and moved: film f32, right
    lung and left lung bool, all [side, side]."""
    rows, columns = np.mgrid[:side, :side] + 0.5
    angle = np.deg2rad(turn)
    x, y = columns - at[1], rows - at[0]
    u = (np.cos(angle) * x + np.sin(angle) * y) / wide
    v = (np.cos(angle) * y - np.sin(angle) * x) / high
    right, left = (((u - middle) / 0.8) ** 2 + v**2 / 2 < 1 for middle in (-1, 1))
    film = 0.5 + 0.2 * np.sin(4 * u) + 0.2 * np.cos(3 * v)
    return film.astype(np.float32), right, left


@pytest.mark.parametrize(("turn", "wide", "high", "at"), [(12, 45, 60, (160, 140)), (-9, 60, 42, (140, 155))])
def test_lungs_in_any_pose_are_brought_to_one(turn: float, wide: float, high: float, at: tuple[float, float]) -> None:
    film, right, left = lungs(0, 50, 50, (150, 150))
    plain = Geometry.along(right, left, 96, 0.1)
    expected = plain.masked(film, right | left)
    other, *sides = lungs(turn, wide, high, at)
    geometry = Geometry.along(*sides, 96, 0.1)
    found = geometry.masked(other, sides[0] | sides[1])
    assert np.abs(found - expected).mean() < 0.01
    shares = [g.to_network(one | two) for g, one, two in ((plain, right, left), (geometry, *sides))]
    assert np.abs(shares[0] - shares[1]).mean() < 0.01
    for share in shares:
        rows, columns = box(share > 0.5)
        for part in (rows, columns):
            assert part.start == pytest.approx(8, abs=1) and part.stop == pytest.approx(88, abs=1)


def test_an_aligned_view_is_exact_where_nothing_is_turned_or_stretched() -> None:
    film = np.random.default_rng(0).random((70, 90), np.float32)
    lung = np.zeros(film.shape, np.bool_)
    lung[10:50, 20:60] = True
    assert (Geometry.along(lung, 0 * lung > 0, 40, 0.0).to_network(film) == film[10:50, 20:60]).all()


@pytest.mark.parametrize("turn", [15, -15])
def test_what_an_aligned_view_says_lies_where_it_was_seen(turn: float) -> None:
    film, right, left = lungs(turn, 50, 55, (150, 160))
    mask = right | left
    geometry = Geometry.along(right, left, 128, 0.05)
    back = geometry.to_source(geometry.to_network(film))
    assert np.abs(back - film)[mask].max() < 0.03
    whole = geometry.to_window(np.ones((4, 4), np.float32))
    rows, columns = np.arange(geometry.top, geometry.top + geometry.side), np.arange(geometry.left, geometry.left + 9)
    assert set(np.unique(whole)) == {0, 1}, "corners of the window are not in the field of view"
    assert (geometry.at(np.ones((4, 4), np.float32), rows, columns) == whole[:, :9]).all()
    assert geometry.to_source(np.ones((4, 4), np.float32))[mask].min() == 1


def test_lungs_are_aligned_alike_whichever_comes_first() -> None:
    _, right, left = lungs(12, 50, 55, (150, 160))
    assert Geometry.along(right, left, 64, 0.1) == Geometry.along(left, right, 64, 0.1)


def test_one_lung_alone_is_not_turned() -> None:
    _, right, left = lungs(15, 50, 55, (150, 160))
    for one, other in ((right, 0 * left), (0 * right, left)):
        affine = Geometry.along(one > 0, other > 0, 64, 0.0).affine
        assert affine is not None and affine[1] == affine[3] == 0
    with pytest.raises(ValueError, match="at least one pixel"):
        Geometry.along(right & False, left & False, 64, 0.0)


def test_lungs_that_are_far_from_level_are_turned_by_twenty_degrees_at_most() -> None:
    right, left = np.zeros((2, 200, 200), np.bool_)
    right[20:60, 20:60] = left[140:180, 90:130] = True
    affine = Geometry.along(right, left, 64, 0.0).affine
    assert affine is not None
    assert np.rad2deg(np.arctan2(affine[3], affine[0])) == pytest.approx(20)
