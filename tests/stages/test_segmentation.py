"""Pooling, cleaning and parting of masks against masks drawn by hand, and what is said of odd lungs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bundles import write_bundle
from films import LUNG, TISSUE, draw, radiograph
from lungscope.bundle import Bundle
from lungscope.errors import LungscopeError, QualityError
from lungscope.radiograph import Geometry, box
from lungscope.runtime import Network, Runtime
from lungscope.stages.segmentation import LungMask, Segmenter, pool, split


def boxes(*spans: tuple[int, int, int, int], shape: tuple[int, int] = (40, 60)) -> np.ndarray:
    mask = np.zeros(shape, np.bool_)
    for top, bottom, left, right in spans:
        mask[top:bottom, left:right] = True
    return mask


def segment(root: Path, pixels: np.ndarray, **film: object) -> LungMask:
    bundle = Bundle.load(root)
    networks = [Runtime("cpu").compile(member.path, batch=1) for member in bundle.segmenter.members]
    return Segmenter(bundle.segmenter, networks).segment(radiograph(pixels, **film))


RIGHT, LEFT = (5, 35, 5, 22), (5, 35, 38, 55)


def test_the_patients_right_is_on_the_images_left() -> None:
    right, left, merged = split(boxes(RIGHT, LEFT))
    np.testing.assert_array_equal(right, boxes(RIGHT))
    np.testing.assert_array_equal(left, boxes(LEFT))
    assert not merged


def test_a_film_that_says_that_it_is_mirrored_is_taken_at_its_word(tmp_path: Path) -> None:
    root = write_bundle(tmp_path / "bundle")
    pixels = draw(lungs=["right"])
    plain, mirrored = segment(root, pixels), segment(root, pixels, PatientOrientation="R\\F")
    assert plain.right.any() and not plain.left.any()
    np.testing.assert_array_equal(mirrored.left, plain.right)
    assert not mirrored.right.any()
    assert "patient's right lung" in next(w.message for w in mirrored.warnings if w.code == "lung-missing")
    for orientation in ("L\\F", "R\\F"):
        inverted = segment(root, np.maximum(draw(), 0.01), PatientOrientation=orientation)
        assert "polarity" not in [warning.code for warning in inverted.warnings]


@pytest.mark.parametrize("grey", [0, 1])
def test_a_frame_around_a_film_moves_nothing(tmp_path: Path, grey: int) -> None:
    root, film = write_bundle(tmp_path / "bundle"), draw()
    framed = np.pad(film, ((30, 90), (50, 10)), constant_values=grey)
    np.testing.assert_array_equal(segment(root, framed).mask[30:-90, 50:-10], segment(root, film).mask)


def test_specks_go_and_holes_are_filled() -> None:
    mask = boxes(RIGHT, LEFT, (1, 4, 28, 31))
    mask[10:14, 10:13] = False
    right, left, _ = split(mask)
    np.testing.assert_array_equal(right | left, boxes(RIGHT, LEFT))


def test_a_lung_in_two_pieces_keeps_both() -> None:
    upper, lower = (5, 15, 5, 20), (20, 35, 5, 20)
    right, left, merged = split(boxes(upper, lower, LEFT))
    np.testing.assert_array_equal(right, boxes(upper, lower))
    np.testing.assert_array_equal(left, boxes(LEFT))
    assert not merged


def test_lungs_grown_together_are_cut_at_the_thinnest_column() -> None:
    # The bridge of columns 22..37 is 6 rows high, but only 2 at column 27, left of the box's middle (30).
    mask = boxes(RIGHT, LEFT, (10, 16, 22, 38))
    mask[10:14, 27] = False
    right, left, merged = split(mask)
    assert merged
    columns_right, columns_left = np.flatnonzero(right.any(axis=0)), np.flatnonzero(left.any(axis=0))
    assert (columns_right.max(), columns_left.min()) == (26, 27)
    np.testing.assert_array_equal(right | left, mask)
    assert not (right & left).any()


def test_two_pieces_above_each_other_are_not_two_lungs() -> None:
    right, left, merged = split(boxes((2, 18, 5, 15), (22, 38, 6, 16)))
    assert right.any()
    assert not left.any()
    assert not merged


@pytest.mark.parametrize("before", [0, 400])
def test_a_frame_at_one_side_does_not_change_which_lung_is_there(tmp_path: Path, before: int) -> None:
    framed = np.pad(draw(lungs=["right"]), ((0, 0), (before, 0)))
    lungs = segment(write_bundle(tmp_path / "bundle"), framed)
    assert lungs.right.any() and not lungs.left.any()


@pytest.mark.parametrize(("span", "side"), [(RIGHT, 0), (LEFT, 1)])
def test_a_single_narrow_piece_is_one_lung(span: tuple[int, int, int, int], side: int) -> None:
    sides = split(boxes(span))[:2]
    np.testing.assert_array_equal(sides[side], boxes(span))
    assert not sides[1 - side].any()


def test_an_empty_mask_has_no_lungs() -> None:
    right, left, merged = split(np.zeros((40, 60), np.bool_))
    assert not right.any()
    assert not left.any()
    assert not merged


# Three members on a 2 x 2 grid; the source grid is the same, so the pooled values can be read off.
MAPS = [
    np.array([[0.9, 0.6], [0.2, 0.0]], np.float32),
    np.array([[0.8, 0.6], [0.1, 0.0]], np.float32),
    np.array([[0.1, 0.0], [0.6, 0.3]], np.float32),
]


@pytest.mark.parametrize(
    ("how", "pooled", "mask"),
    [
        ("mean", [[0.6, 0.4], [0.3, 0.1]], [[1, 0], [0, 0]]),
        ("union", [[0.9, 0.6], [0.6, 0.3]], [[1, 1], [1, 0]]),
        ("vote", [[2 / 3, 2 / 3], [1 / 3, 0]], [[1, 1], [0, 0]]),
    ],
)
def test_pooling_by_hand(how: str, pooled: list[list[float]], mask: list[list[int]]) -> None:
    probability, found = pool(MAPS, how, 0.5, Geometry.letterbox((2, 2), 2).to_source)
    np.testing.assert_allclose(probability, pooled, atol=1e-6)
    np.testing.assert_array_equal(found, np.array(mask, np.bool_))


def test_half_of_the_votes_is_not_a_majority() -> None:
    _, found = pool(MAPS[1:], "vote", 0.5, Geometry.letterbox((2, 2), 2).to_source)
    assert not found.any()


def test_union_is_taken_on_the_source_grid_and_mean_equals_the_mean_of_resampled_maps() -> None:
    rng = np.random.default_rng(1)
    maps = [rng.random((8, 8), dtype=np.float32) for _ in range(3)]
    geometry = Geometry.letterbox((31, 23), 8)
    resampled = [geometry.to_source(member) for member in maps]
    np.testing.assert_array_equal(pool(maps, "union", 0.5, geometry.to_source)[0], np.max(resampled, axis=0))
    mean = pool(maps, "mean", 0.5, geometry.to_source)[0]
    np.testing.assert_allclose(mean, np.mean(resampled, axis=0), atol=1e-6)


@pytest.mark.parametrize("shape", [(320, 288), (256, 400), (300, 300)])
def test_drawn_lungs_are_found_on_the_films_own_grid(tiny: Path, shape: tuple[int, int]) -> None:
    film = draw(*shape)
    lungs = segment(tiny, film, spacing_mm=(0.5, 0.4))
    truth = film == np.float32(LUNG)
    dice = 2 * np.count_nonzero(lungs.mask & truth) / (np.count_nonzero(lungs.mask) + np.count_nonzero(truth))
    assert lungs.mask.shape == lungs.probability.shape == shape
    assert dice > 0.9
    assert not (lungs.left & lungs.right).any()
    np.testing.assert_array_equal(lungs.left | lungs.right, lungs.mask)
    assert lungs.agreement is None
    assert lungs.warnings == ()
    document = lungs.to_json()
    pixels = int(lungs.left.sum())
    assert document["left"] == {"found": True, "area_px": pixels, "area_cm2": pytest.approx(pixels * 0.2 / 100)}


def test_disagreement_of_the_members_is_reported(tmp_path: Path) -> None:
    film = draw(opacities=[(0.5, 0.28, 0.2), (0.5, 0.72, 0.2)])
    lungs = segment(write_bundle(tmp_path, darks=(0.3, 0.6), pool="union"), film)
    assert lungs.agreement is not None
    assert lungs.agreement < 0.9
    assert "members-disagree" in {warning.code for warning in lungs.warnings}
    same = segment(write_bundle(tmp_path / "same", darks=(0.55, 0.55)), film)
    assert same.agreement == 1.0


def codes(lungs: LungMask) -> set[str]:
    assert {warning.stage for warning in lungs.warnings} <= {"segmentation"}
    return {warning.code for warning in lungs.warnings}


def test_a_missing_lung_is_reported(tiny: Path) -> None:
    lungs = segment(tiny, draw(lungs=["right"]))
    assert "lung-missing" in codes(lungs)
    assert lungs.to_json()["left"] == {"found": False, "area_px": 0, "area_cm2": None}


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize(
    ("spans", "code", "words"),
    [
        ([(60, 260, 30, 110), (120, 180, 190, 230)], "lung-asymmetry", "The left lung is only"),
        ([(120, 180, 40, 80), (60, 260, 180, 260)], "lung-asymmetry", "The right lung is only"),
        ([(130, 190, 50, 90), (130, 190, 190, 230)], "lung-area", "fill 5% of the film"),
        ([(60, 260, 30, 260)], "lungs-merged", "as one piece"),
        ([(60, 260, 30, 110), (60, 260, 180, 200), (60, 80, 180, 270), (150, 170, 180, 270), (240, 260, 180, 270)],
         "lung-shape", "The left lung's outline is ragged"),
        ([(0, 200, 0, 80), (0, 200, 180, 260)], "lung-cut-off", "top and left border"),
        ([(120, 320, 60, 140), (120, 320, 240, 320)], "lung-cut-off", "bottom and right border"),
    ],
)  # fmt: skip
def test_odd_lungs_are_reported(
    tiny: Path, spans: list[tuple[int, int, int, int]], code: str, words: str, times: int
) -> None:
    """Of a film that is `times` as large pixels are thinned out."""
    tissue = np.random.default_rng(0).uniform(TISSUE - 0.03, TISSUE + 0.03, (320, 320))  # no frame, which is even
    film = np.where(boxes(*spans, shape=(320, 320)), LUNG, tissue).astype(np.float32)
    (warning,) = segment(tiny, np.kron(film, np.ones((times, times), np.float32))).warnings
    assert (warning.stage, warning.code) == ("segmentation", code) and words in warning.message


def test_an_inverted_film_is_reported(tiny: Path, tmp_path: Path) -> None:
    takes_bright = write_bundle(tmp_path, darks=(0.45,), steep=-40)
    for orientation in ("L\\F", "R\\F"):
        assert "polarity" in codes(segment(takes_bright, 1 - draw(), PatientOrientation=orientation))
    assert "polarity" not in codes(segment(tiny, draw()))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_an_error(tiny: Path, bad: float) -> None:
    spec = Bundle.load(tiny).segmenter
    answer = np.zeros((1, 1, spec.size, spec.size), np.float32)
    answer[..., 0, 0] = bad
    with pytest.raises(LungscopeError, match="not finite") as caught:
        Segmenter(spec, [lambda inputs: {"probability": answer}]).segment(radiograph(draw()))
    assert caught.value.code == "not-finite"


def test_opacity_is_the_members_mean(tiny: Path) -> None:
    """And a member's number that is not finite is an error there, too."""
    spec = replace(Bundle.load(tiny).segmenter, opaque=0.25)
    spec = replace(spec, members=spec.members * 2)
    lungs = np.zeros((1, 1, spec.size, spec.size), np.float32)
    lungs[..., 16:48, 8:24] = lungs[..., 16:48, 40:56] = 1

    def member(opacity: float, sure: float = 1.0) -> Network:
        return lambda inputs: {"probability": sure * lungs, "opacity": np.full_like(lungs, opacity)}

    film = radiograph(draw())
    found = Segmenter(spec, [member(0.2), member(0.6)]).segment(film).opacity
    assert found is not None
    np.testing.assert_allclose(found.map, 0.4, rtol=1e-6)
    assert found.limit == 0.25
    assert found.geometry.source_shape == film.shape
    strict = replace(spec, threshold=0.6)
    assert Segmenter(strict, [member(0.2), member(0.2, 0.55)]).segment(film).agreement == 0
    with pytest.raises(LungscopeError, match="not finite"):
        Segmenter(spec, [member(0.2), member(np.nan)]).segment(film)


def test_no_lungs_is_an_error_that_names_the_file(tiny: Path) -> None:
    film = radiograph(np.full((256, 256), TISSUE, np.float32), path=Path("blank.png"))
    bundle = Bundle.load(tiny)
    segmenter = Segmenter(bundle.segmenter, [Runtime("cpu").compile(bundle.segmenter.members[0].path)])
    with pytest.raises(QualityError, match=r"No lungs found in blank\.png"):
        segmenter.segment(film)
    with pytest.raises(QualityError, match="No lungs found in the image"):
        segmenter.segment(replace(film, source=replace(film.source, path=None)))


@pytest.mark.parametrize("sides", ["right", "left", "right left", ""])
def test_the_box_of_the_lungs_is_that_of_their_mask(sides: str) -> None:
    masks = {"right": np.zeros((40, 50), np.bool_), "left": np.zeros((40, 50), np.bool_)}
    if "right" in sides:
        masks["right"][10:30, 5:15] = True
    if "left" in sides:
        masks["left"][12:35, 20:45] = True
    mask = masks["right"] | masks["left"]
    found = LungMask(mask, mask.astype(np.float32), masks["left"], masks["right"], None, None, ())
    assert found.box == box(mask)
    assert found.boxes == {side: box(lung) for side, lung in masks.items()}
