"""Near-duplicates and their groups, against slow references."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lungscope.data.duplicates import (
    CROPS,
    NEAR_DUPLICATE,
    THUMBNAIL,
    groups,
    near_duplicates,
    pairs_above,
    thumbnails,
)

Draw = Callable[..., np.ndarray]


def textured(draw: Draw, seed: int) -> np.ndarray:
    """A film u8 [256, 256] with as much detail as its thumbnail can hold."""
    fine = cv2.resize(np.random.default_rng(seed).integers(0, 255, (20, 20), np.uint8), (256, 256))
    return (0.5 * draw(seed, 256, 256) + 0.5 * fine).astype(np.uint8)


def test_thumbnails_are_standardised(draw: Draw) -> None:
    rows = thumbnails(np.stack([draw(1, 64, 64), draw(2, 64, 64), np.full((64, 64), 7, np.uint8)]))
    assert rows.shape == (3, THUMBNAIL**2)
    np.testing.assert_allclose(rows.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 1, 0], atol=1e-5)


def test_the_same_picture_in_other_clothes_is_found_and_others_are_not(draw: Draw) -> None:
    film = draw(1, 256, 256)
    darker = (film * 0.7 + 10).astype(np.uint8)
    blurred = cv2.GaussianBlur(film, (0, 0), 2)
    marked = film.copy()
    marked[5:20, 5:40] = 255
    others = [draw(seed, 256, 256) for seed in range(2, 30)]
    pairs = near_duplicates([np.stack([film, darker, blurred, marked]), np.stack(others)])
    assert {(i, j) for i, j, _ in pairs} == set(itertools.combinations(range(4), 2))
    assert all(NEAR_DUPLICATE < r <= 1.00001 for *_, r in pairs)


def test_constant_films_are_nobodys_duplicates() -> None:
    assert near_duplicates([np.zeros((3, 64, 64), np.uint8)]) == []


@pytest.mark.parametrize("crop", CROPS)
def test_a_rim_and_a_closer_crop_are_found(draw: Draw, crop: float) -> None:
    film, m = textured(draw, 1), round(crop * 256)
    rim = cv2.resize(film, (256 - 2 * m, 256 - 2 * m), interpolation=cv2.INTER_AREA)
    rim = cv2.copyMakeBorder(rim, m, m, m, m, cv2.BORDER_CONSTANT, value=255)
    closer = cv2.resize(film[m : 256 - m, m : 256 - m], (256, 256), interpolation=cv2.INTER_LINEAR)
    others = np.stack([textured(draw, seed) for seed in range(2, 30)])
    for other in (rim, closer):
        for films in ([np.stack([film, other]), others], [np.stack([other, film]), others]):
            ((i, j, r),) = near_duplicates(films)
            assert (i, j) == (0, 1) and NEAR_DUPLICATE < r <= 1.00001
    if crop > 0.03:
        whole = thumbnails(np.stack([film, rim, closer]), framed=True)
        assert (whole[0] @ whole[1:].T < NEAR_DUPLICATE).all(), "the whole frames do not tell"


@pytest.mark.parametrize("frame", [20, 40, 60])
def test_frames_and_padding_make_no_duplicates_and_hide_none(draw: Draw, frame: int) -> None:
    def framed(film: np.ndarray) -> np.ndarray:
        small = cv2.resize(film, (256 - 2 * frame, 256), interpolation=cv2.INTER_AREA)
        return cv2.copyMakeBorder(small, 0, 0, frame, frame, cv2.BORDER_CONSTANT, value=0)

    films = [textured(draw, seed) for seed in range(30)]
    assert near_duplicates([np.stack([framed(film) for film in films])]) == []
    assert [(i, j) for i, j, _ in near_duplicates([np.stack([films[0], *map(framed, films)])])] == [(0, 1)]


def test_a_frame_that_is_one_for_the_one_alone_hides_nothing(draw: Draw) -> None:
    film = textured(draw, 1)
    dark, grey = film.copy(), film.copy()
    dark[240:], grey[240:] = 8, 14
    ((i, j, _),) = near_duplicates([np.stack([dark, grey]), np.stack([textured(draw, seed) for seed in range(2, 20)])])
    assert (i, j) == (0, 1)


def test_pairs_equal_a_slow_search_over_block_borders() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(40, 16))
    rows = (base[rng.integers(0, 40, 2100)] + rng.normal(0, 0.1, (2100, 16))).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    fast = {(i, j) for i, j, _ in pairs_above(0.99, rows, rows[::-1])}
    full = rows @ rows[::-1].T
    slow = {(int(i), int(j)) for i, j in zip(*np.nonzero(full > 0.99), strict=True)}
    near_the_threshold = np.abs(full - 0.99) < 1e-6
    assert all(near_the_threshold[i, j] for i, j in fast ^ slow)
    assert len(slow) > 100


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=20))
def test_groups_are_the_connected_components(n: int, edges: list[tuple[int, int]]) -> None:
    pairs = [(a % n, b % n) for a, b in edges]
    reached = [{i} for i in range(n)]
    for _ in range(n):
        for a, b in pairs:
            union = reached[a] | reached[b]
            for member in union:
                reached[member] = reached[member] | union
    assert groups(n, pairs).tolist() == [min(r) for r in reached]
