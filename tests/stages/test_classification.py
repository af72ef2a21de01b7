"""What a classifier is shown, and what is made of its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from answers import lungs

from bundles import BIAS, write_bundle
from films import draw, radiograph
from lungscope.bundle import Bundle
from lungscope.errors import LungscopeError
from lungscope.pipeline import Analyzer
from lungscope.radiograph import Pixels
from lungscope.stages.classification import Classifier, ViewSpec, equalised, lung_view, softmax


def test_views_hold_only_what_they_may_hold() -> None:
    film, mask = np.full((8, 8), 0.5, np.float32), np.zeros((8, 8), np.bool_)
    mask[2:6, 2:4] = True
    found = lungs(mask, np.zeros_like(mask))
    for what, inside, outside in (
        ("lungs", 0.5, 0.0),
        ("background", 0.0, 0.5),
        ("image", 0.5, 0.5),
        ("outline", 1.0, 0.0),
    ):
        view, _ = lung_view(film, found, ViewSpec(what, False, 0.0, 8))
        np.testing.assert_allclose(view, np.where(mask, np.float32(inside), np.float32(outside)))
    view, geometry = lung_view(film, found, ViewSpec("lungs", True, 0.0, 4))
    assert (geometry.top, geometry.left, geometry.side) == (2, 1, 4)
    np.testing.assert_allclose(view, [[0, 0.5, 0.5, 0]] * 4)
    _, wide = lung_view(film, found, ViewSpec("lungs", True, 0.25, 4))
    assert (wide.top, wide.left, wide.side) == (1, 0, 6), "a quarter of the longer side on each end"
    assert wide.affine is None
    assert lung_view(film, found, ViewSpec("lungs", True, 0.0, 4, aligned=True))[1].affine is not None


def test_equalised_views_have_the_same_greys_whatever_the_exposure() -> None:
    view = np.uint8([[0, 40, 40, 200], [0, 60, 80, 200]])
    found = equalised(view)
    # Six pixels are lit: 1 + 254 * (how many are darker + half of those that are equal) / 6.
    assert found.tolist() == [[0, 43, 43, 213], [0, 107, 149, 213]]
    other = np.uint8(np.where(view, np.rint(view**0.5 * 9), 0))
    assert other.max() < 200 and equalised(other).tolist() == found.tolist()
    assert not equalised(np.zeros((4, 4), np.uint8)).any()
    film, mask = draw(), np.zeros((240, 200), np.bool_)
    mask[60:180, 30:90] = True
    pair = lungs(mask, np.zeros_like(mask))
    spec = ViewSpec("lungs", True, 0.05, 64)
    plain, even = (
        lung_view(radiograph(film).pixels[:240, :200], pair, s)[0] for s in (spec, replace(spec, equalised=True))
    )
    assert (
        even.dtype == np.float32
        and even.tolist() == (equalised(np.uint8(np.rint(plain * 255))) / np.float32(255)).tolist()
    )


def test_softmax_by_hand_and_for_large_logits() -> None:
    np.testing.assert_allclose(softmax(np.log(np.array([1, 2, 5], np.float32))), [0.125, 0.25, 0.625], rtol=1e-6)
    np.testing.assert_allclose(softmax(np.array([1000, 1000], np.float32)), [0.5, 0.5])


def test_the_map_adds_up_to_the_logits(analyzer: Analyzer) -> None:
    answer = analyzer.analyze(radiograph(draw(opacities=[(0.6, 0.3, 0.1)]))).classification
    assert answer is not None
    np.testing.assert_allclose(answer.cam.mean(axis=(1, 2)) + np.asarray(BIAS), answer.logits, atol=1e-4)
    np.testing.assert_allclose(answer.probabilities, softmax(answer.logits))
    assert answer.label == answer.labels[int(answer.probabilities.argmax())]
    assert answer.to_json()["probability"] == float(answer.probabilities.max())


class Lopsided:
    """Two classes on a view of 2 x 2: the first one's map counts the right column three times."""

    def __init__(self) -> None:
        self.seen: list[Pixels] = []

    def __call__(self, inputs: Mapping[str, Pixels]) -> dict[str, Pixels]:
        image = inputs["image"]
        self.seen.append(image[0, 0].copy())
        cam = np.concatenate([image * np.float32([1, 3]), np.zeros_like(image)], axis=1)
        return {"logits": cam.mean((2, 3)) + np.float32([0, 1]), "cam": cam}


@pytest.mark.parametrize(("mirror", "mirrored"), [(0.0, False), (0.25, False), (0.26, True), (100.0, True)])
def test_a_close_view_is_shown_as_its_mirror_image_too(mirror: float, mirrored: bool, tmp_path: Path) -> None:
    bundle = Bundle.load(write_bundle(tmp_path))
    assert bundle.classifier is not None and bundle.classifier.mirror == 0
    view = ViewSpec("lungs", False, 0.0, 2)
    spec = replace(bundle.classifier, labels=("A", "B"), bias=(0.0, 1.0), view=view, conformal=None, mirror=mirror)
    spec = replace(spec, temperature=2.0)
    film, network = radiograph(np.float32([[0, 1], [0, 0]])), Lopsided()
    answer = Classifier(spec, network).classify(film, lungs(np.ones((2, 2), np.bool_), np.zeros((2, 2), np.bool_)))
    assert answer.mirrored is answer.to_json()["mirrored"] is mirrored
    assert len(network.seen) == 1 + mirrored
    # 3 / 4 against 1 as it is, 1 / 4 against 1 mirrored; both maps have their evidence where the film is bright.
    assert answer.logits.tolist() == ([0.5, 1] if mirrored else [0.75, 1])
    assert answer.cam[0].tolist() == [[0, 2 if mirrored else 3], [0, 0]]
    np.testing.assert_allclose(answer.cam.mean((1, 2)) + answer.bias, answer.logits)
    assert answer.lead == pytest.approx(0.5 if mirrored else 0.25)
    np.testing.assert_allclose(answer.probabilities, softmax(answer.logits / 2))
    if mirrored:
        assert network.seen[1].tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize(
    ("thresholds", "held", "abstained"),
    [
        ((1.0, 0.2, 1.0), ["Normal"], False),
        ((0.0, 0.2, 1.0), ["COVID-19", "Normal"], True),
        ((0.0, 1.0, 1.0), ["COVID-19"], True),
        ((1.0, 1.0, 1.0), [], True),
        (None, None, False),
    ],
)
def test_an_answer_is_the_leading_class_alone_in_its_set(
    tmp_path: Path, thresholds: tuple[float, ...] | None, held: list[str] | None, abstained: bool
) -> None:
    answer = Analyzer(write_bundle(tmp_path, thresholds=thresholds)).analyze(radiograph(draw())).classification
    assert answer is not None
    assert answer.label == "Normal", "also where it is no answer"
    assert (answer.to_json()["conformal_set"], answer.abstained) == (held, abstained)
    assert answer.to_json()["conformal_coverage"] == (None if thresholds is None else 0.9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_an_error(analyzer: Analyzer, bad: float) -> None:
    film = radiograph(draw())
    lungs = analyzer.analyze(film).lungs
    spec = analyzer.bundle.classifier
    assert spec is not None

    def network(inputs: object) -> dict[str, Pixels]:
        return {"logits": np.array([[0, bad, 0]], np.float32), "cam": np.zeros((1, 3, 2, 2), np.float32)}

    with pytest.raises(LungscopeError, match="not finite") as caught:
        Classifier(spec, network).classify(film, lungs)
    assert caught.value.code == "not-finite"
