"""Grades fitted to a segmenter: from scored films to a bundle whose severity is made of them."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bundles import LABELS, write_bundle
from films import draw, save
from lungscope import Analyzer
from lungscope.bundle import Bundle, sha256_of
from lungscope.data.split import Row, Split
from lungscope.data.store import Store
from lungscope.errors import BundleError, DataError, RecipeError
from lungscope.evaluation.scoring import ZONES, score_severity
from lungscope.stages.severity import zone_masks
from lungscope.training.export import Trained, export_bundle
from lungscope.training.grades import (
    FOLDS,
    _agreement,
    _cross_validated,
    _features,
    _limits,
    _ridge,
    _Seen,
    _Zone,
    _zones,
    fit_grades,
)
from lungscope.training.networks import Graded, build_segmenter
from lungscope.training.recipe import load_recipe
from lungscope.training.segmenter import SegmenterTask
from lungscope.training.views import finder_facts, saw_lungs_of
from lungscope.training.weights import load_weights, save_weights
from nets import awake_classifier, trained_segmenter
from stores import SHAPE, write_store

SIZE = 64
PATIENTS = 14
#: Where an opacity lies that a zone's score is of, as shares of height and width.
PLACES = {
    "A": (0.28, 0.28),
    "B": (0.5, 0.28),
    "C": (0.72, 0.28),
    "D": (0.28, 0.72),
    "E": (0.5, 0.72),
    "F": (0.72, 0.72),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A segmenter that finds drawn lungs, and a classifier of random weights beside it."""
    folder = tmp_path_factory.mktemp("bundle")
    run = Trained.open(trained_segmenter(folder / "segmenter", SIZE))
    facts = {"network": "resnet50", "size": SIZE, "labels": list(LABELS), "shown": "lungs", "crop": True}
    facts |= {"margin": 0.05, "equalised": False, "aligned": False}
    save_weights(awake_classifier("resnet50", SIZE), folder / "classifier" / "weights.safetensors", facts)
    return export(run, folder)


def export(run: Trained, folder: Path) -> Bundle:
    films = np.random.default_rng(0).random((4, 1, SIZE, SIZE), np.float32)
    classifier = Trained.open(next(folder.glob("**/classifier")))
    return export_bundle([run], classifier, folder / "out", films=films, name="test", version="1.0.0")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Store, Split]]:
    """ "a" is a healthy film of the train part, "c" one of the val part."""
    store = write_store(tmp_path_factory.mktemp("store"))
    parts = {"a": "train", "b": "test", "c": "val", "broken": "train"}
    rows = tuple(Row("films", r.id, r.sha256, r.label, r.id, parts[r.id]) for r in store.records)
    return [(store, Split(rows))]


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films whose zones have spots of a size that goes with their score, each of a patient of its own."""
    folder = tmp_path_factory.mktemp("scores")
    draws = np.random.default_rng(0)
    rows = []
    for n in range(PATIENTS):
        given = {zone: int(draws.integers(0, 4)) for zone in ZONES}
        spots = [(*PLACES[zone], 0.05 * score) for zone, score in given.items() if score]
        film = np.clip(draw(*SHAPE, opacities=spots) + 0.01 * draws.standard_normal(SHAPE), 0, 1)
        save(folder / "images" / f"{n}.png", film.astype(np.float32))
        row = {f"{reader}-{zone}": score for reader in "SJ" for zone, score in given.items()}
        total = sum(given.values())
        rows.append({"image": f"{n}.png", "patient": f"p{n}", **row, "S-Global": total, "J-Global": total})
    with (folder / "brixia.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def run(
    bundle: Bundle, scores: Path, data: list[tuple[Store, Split]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return fit_grades(bundle, scores, data, tmp_path_factory.mktemp("run"))


def test_it_says_what_it_was_fitted_on_and_how_well_others_are_graded(run: Path, bundle: Bundle) -> None:
    facts = json.loads(run.with_suffix(".json").read_text())
    assert facts["network"] == "fpn-mobilenetv2-grade"
    assert len(set(facts["severity"]["films"])) == facts["severity"]["patients"] == PATIENTS
    assert "weights_sha256" not in facts, "it would be another file's"
    assert facts["severity"]["healthy"] == {"train": 1, "val": 1}
    assert facts["same_lungs"] == [bundle.segmenter.members[0].sha256]
    one, two, three = facts["grades"]
    assert 0 < one < two < three < 3
    assert facts["metrics"]["zones_spearman"] > 0.6
    assert facts["metrics"]["films_spearman"] > 0.6


def test_a_bundle_with_grades_scores_by_them_and_finds_the_same_lungs(
    run: Path, bundle: Bundle, scores: Path, data: list[tuple[Store, Split]], tmp_path: Path
) -> None:
    (tmp_path / "classifier").symlink_to(bundle.root.parent / "classifier")
    graded = export(Trained.open(run.parent), tmp_path)
    limits = graded.segmenter.grades
    assert limits == tuple(json.loads(run.with_suffix(".json").read_text())["grades"])
    film = scores / "images" / "3.png"
    before, after = (Analyzer(found, precision="f32").analyze(film) for found in (bundle, graded))
    np.testing.assert_allclose(before.lungs.probability, after.lungs.probability, atol=2e-2)
    assert after.severity is not None and after.severity.basis == "grade" and before.severity is not None
    assert before.severity.basis == "evidence"
    grades = after.lungs.grades
    assert grades is not None and limits is not None
    shown = grades.geometry.to_source(grades.map)
    for letter, mask in zone_masks(after.lungs).items():
        zone = after.severity.zones[letter]
        assert zone is not None and zone.grade is not None
        assert zone.grade == pytest.approx(float(shown[mask].mean()), abs=1e-3)
        assert zone.score == sum(zone.grade >= limit for limit in limits)

    found = score_severity(Analyzer(graded), scores, known=data)
    assert (found["fitted"], found["scored"], len(found["seen"])) == (PATIENTS, 0, PATIENTS)
    unchecked = score_severity(Analyzer(graded), scores)
    assert (unchecked["checked"], unchecked["scored"], len(unchecked["seen"])) == (False, 0, PATIENTS)
    manifest = graded.manifest["training"]["runs"][0]
    assert manifest["weights_sha256"] == sha256_of(run)
    assert found["with_seen"]["zones"]["ours_senior"]["spearman"] > 0.6
    assert score_severity(Analyzer(bundle), scores, known=data)["fitted"] == 0

    several = export_bundle(
        2 * Trained.of_bundle(graded), None, tmp_path / "several", films=np.zeros((1, 1, SIZE, SIZE), np.float32),
        name="test", version="1.0.1",
    )  # fmt: skip
    assert several.segmenter.grades is None, "an ensemble's grades have no limits of their own"
    again = export_bundle(
        Trained.of_bundle(graded), None, tmp_path / "again", films=np.zeros((1, 1, SIZE, SIZE), np.float32),
        name="test", version="1.0.1",
    )  # fmt: skip
    assert again.segmenter.grades == limits
    assert (
        again.manifest["training"]["runs"][0]["severity"]["films"]
        == Trained.open(run.parent).facts["severity"]["films"]
    )


def test_films_of_patients_who_were_fitted_on_are_told_from_those_of_others(
    run: Path, bundle: Bundle, scores: Path, tmp_path: Path
) -> None:
    """Five of the films were not fitted on: two of patients of whom others were, two of new ones, one of nobody knows
    whom, whose table has the film's own name in the patient's place."""
    facts = json.loads(run.with_suffix(".json").read_text())
    facts["severity"]["films"] = facts["severity"]["films"][: PATIENTS - 5]
    shutil.copy(run, tmp_path / "weights.safetensors")
    (tmp_path / "weights.json").write_text(json.dumps(facts))
    (tmp_path / "classifier").symlink_to(bundle.root.parent / "classifier")
    graded = export(Trained.open(tmp_path), tmp_path)
    shutil.copytree(scores, tmp_path / "scores")
    table = tmp_path / "scores" / "brixia.csv"
    patients = {PATIENTS - 5: f"{PATIENTS - 5}.jpg", PATIENTS - 4: "p0", PATIENTS - 3: "p1"}
    text = table.read_text()
    for number, patient in patients.items():
        text = text.replace(f"p{number},", f"{patient},")
    table.write_text(text)
    found = score_severity(Analyzer(graded), tmp_path / "scores")
    assert (found["fitted"], found["scored"], found["new_patients"]["scored"]) == (PATIENTS - 5, 5, 2)
    assert found["new_patients"]["zones"]["ours_senior"]["defined"] == 12


def test_a_classifier_of_before_saw_the_lungs_of_a_segmenter_with_grades(bundle: Bundle) -> None:
    facts = {"segmenter": {"segmenter.onnx": "ab" * 32}, "lungs": finder_facts(bundle)["lungs"]}
    assert not saw_lungs_of(facts, bundle)
    bundle.manifest["training"]["runs"][0]["same_lungs"] = ["cd" * 32, "ab" * 32]
    assert saw_lungs_of(facts, bundle)
    del bundle.manifest["training"]["runs"][0]["same_lungs"]
    assert saw_lungs_of({}, bundle), "runs of before do not say"
    assert not saw_lungs_of({**facts, "segmenter": {}}, bundle)


def test_what_a_grade_is_made_of_is_linear() -> None:
    """The features of a place, weighed, are the mean over it of the map."""
    torch.manual_seed(0)
    network = build_segmenter("fpn-mobilenetv2-grade").eval()
    assert isinstance(network, Graded)
    with torch.no_grad():
        for parameter in network.grade_head.parameters():
            parameter.normal_()
    image, place = torch.rand(1, 1, SIZE, SIZE), torch.rand(SIZE, SIZE)
    place /= place.sum()
    (features,) = _features(network, image, [place])
    weights = torch.cat([weight.flatten() for weight in network.grade_head.weights]).detach().numpy()
    with torch.no_grad():
        expected = float((network(image)[0, -1] * place).sum())
    assert float(features @ weights) + float(network.grade_head.bias) == pytest.approx(expected, abs=1e-4)


def test_a_mirrored_film_has_its_zones_mirrored() -> None:
    network = build_segmenter("fpn-mobilenetv2-grade").eval()
    assert isinstance(network, Graded)
    image, share = np.random.default_rng(0).random((2, SIZE, SIZE), np.float32)
    (zone,) = _zones(network, _Seen(image, {"A": share}), 0, "p", {"A": (1.0, 2.0)}, shown=("mirrored",))
    mirrored, place = (torch.from_numpy(grid[:, ::-1].copy()) for grid in (image, share))
    np.testing.assert_allclose(zone.features, next(_features(network, mirrored[None, None], [place])))
    assert (zone.scores, zone.plain) == ((1.0, 2.0), False)


@pytest.fixture
def zones() -> tuple[list[_Zone], list[_Zone]]:
    """One of each of 23 patients, as the film is and otherwise, scored by two readers, and nine healthy ones."""
    features = iter(np.random.default_rng(0).normal(size=(55, 5)))
    shown = [(n, plain) for n in range(23) for plain in (True, False)]
    ill = [_Zone(n, f"p{n:02}", next(features), (n % 4, (n + 1) % 4), plain) for n, plain in shown]
    return ill, [_Zone(n, f"h{n}", next(features), (0.0,), True) for n in range(9)]


def test_a_left_out_patient_teaches_nothing(zones: tuple[list[_Zone], list[_Zone]]) -> None:
    ill, clear = zones
    graded = _cross_validated(ill, clear)
    assert sorted(zone.film for zone, _ in graded) == list(range(23)) and all(zone.plain for zone, _ in graded)
    for zone, grade in graded:
        weights, bias = _ridge([other for other in ill if (other.film - zone.film) % FOLDS], clear)
        assert grade == pytest.approx(float(zone.features @ weights) + bias)


def test_grades_are_fitted_to_both_readers_and_compared_with_the_first(
    zones: tuple[list[_Zone], list[_Zone]],
) -> None:
    ill, clear = zones
    mean = [zone._replace(scores=(float(np.mean(zone.scores)),)) for zone in ill]
    np.testing.assert_allclose(_ridge(ill, clear)[0], _ridge(mean, clear)[0])
    assert _agreement([(zone, zone.scores[0]) for zone in ill])["zones_spearman"] == pytest.approx(1)


def test_as_many_zones_score_as_readers_scored_and_healthy_ones_do_not(zones: tuple[list[_Zone], list[_Zone]]) -> None:
    graded = [(zone, n / 46) for n, zone in enumerate(zones[0])]
    given = np.array([zone.scores for zone in zones[0]])
    one, two, three = (np.quantile(np.arange(46) / 46, np.mean(given < score)) for score in (1, 2, 3))
    assert _limits(graded, [0.0] * 10) == pytest.approx((one, two, three), abs=1e-3)
    assert _limits(graded, [0.4] * 10)[0] == 0.4 > one


def test_weights_with_and_without_grades_fit_each_other(run: Path, tmp_path: Path) -> None:
    plain, graded = build_segmenter("fpn-mobilenetv2"), build_segmenter("fpn-mobilenetv2-grade")
    load_weights(plain, run)
    save_weights(plain, tmp_path / "plain.safetensors", {})
    load_weights(graded, tmp_path / "plain.safetensors")
    own = graded.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in plain.state_dict().items())
    assert not own["grade_head.bias"].any(), "what no file says stays as it was"


def test_a_network_with_grades_is_not_trained() -> None:
    recipe = load_recipe("segmenter-student")
    with pytest.raises(RecipeError, match=r"`lungscope train severity`.* without '-grade'"):
        SegmenterTask(build_segmenter("fpn-mobilenetv2-grade"), recipe, recipe.phases[0], 0, ["a"])


def test_what_can_not_be_fitted_is_said(
    bundle: Bundle, scores: Path, data: list[tuple[Store, Split]], tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="2 segmenters"):
        fit_grades(Bundle.load(write_bundle(tmp_path / "two", darks=(0.5, 0.55))), scores, data, tmp_path / "run")
    with pytest.raises(DataError, match=rf"0 patients are left to fit on; {FOLDS} .* Without --leave-unseen"):
        fit_grades(bundle, scores, data, tmp_path / "run", leave_unseen=True)
    ((store, split),) = data
    rows = tuple(replace(row, part="train" if row.part == "val" else row.part) for row in split.rows)
    with pytest.raises(DataError, match="of 0 val films of the class Normal"):
        fit_grades(bundle, scores, [(store, Split(rows))], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "weights.safetensors").touch()
    with pytest.raises(RecipeError, match="is not empty"):
        fit_grades(bundle, scores, data, tmp_path / "run")
