"""Scores of a small real bundle over films on disk: files in, numbers out, and nothing skipped in silence."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from bundles import write_bundle
from films import LUNG, draw, save
from lungscope.data.split import Row, Split
from lungscope.data.store import Store
from lungscope.errors import DataError
from lungscope.evaluation import metrics, scoring
from lungscope.evaluation.calibration import softmax
from lungscope.evaluation.scoring import (
    ZONES,
    Predictions,
    analyze_each,
    healthy_lungs,
    on_grid,
    predict,
    score_classifier,
    score_lesions,
    score_predictions,
    score_segmenter,
    score_severity,
    truth_in,
)
from lungscope.pipeline import Analyzer
from lungscope.radiograph import Geometry
from lungscope.report import Failure
from lungscope.stages.classification import Conformal
from stores import OPACITIES, SHAPE, write_store


@pytest.fixture
def store(tmp_path: Path) -> tuple[Store, Split]:
    """Four films with their true lungs, one of which is not an image at all; two belong to one group."""
    found = write_store(tmp_path)
    rows = (Row("films", r.id, r.sha256, r.label, "ac" if r.id in "ac" else r.id, "test") for r in found.records)
    return found, Split(tuple(rows))


def table(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def intervals(scores: Any, inside: bool = False) -> list[tuple[float | None, ...]]:
    """All intervals in nested scores."""
    if not isinstance(scores, dict):
        return [tuple(scores)] if inside else []
    return [ends for name, value in scores.items() for ends in intervals(value, inside or "interval" in name)]


# Masks and grids -----------------------------------------------------------------------------------------------------


def test_a_mask_is_brought_to_another_grid_over_the_same_film() -> None:
    mask = np.zeros((8, 8), bool)
    mask[2:6, 4:] = True
    assert on_grid(mask, (8, 8)) is mask
    assert np.array_equal(on_grid(mask, (16, 16)), np.kron(mask, np.ones((2, 2), bool)))
    assert np.array_equal(on_grid(mask, (4, 4)), mask[::2, ::2])


def test_an_oblong_mask_stays_in_place() -> None:
    mask = np.zeros((6, 4), bool)
    mask[1:3, :2] = True
    assert np.array_equal(on_grid(mask, (12, 8)), np.kron(mask, np.ones((2, 2), bool)))
    assert np.array_equal(on_grid(mask.T, (8, 12)), np.kron(mask.T, np.ones((2, 2), bool)))


def test_a_mask_of_another_film_is_refused() -> None:
    with pytest.raises(DataError, match="6x4 does not lie on a film of 12x9"):
        on_grid(np.zeros((6, 4), bool), (12, 9))


def test_a_mask_file_is_cut_in_the_middle_of_its_range(tmp_path: Path) -> None:
    grey = np.tile(np.float32([0, 1]), (64, 32))
    grey[:2, :8] = np.tile(np.float32([127 / 255, 128 / 255]), (2, 4))
    assert np.array_equal(truth_in(save(tmp_path / "m.png", grey)), grey > 0.5)
    zeros_and_ones = tmp_path / "labels.png"
    assert cv2.imwrite(str(zeros_and_ones), (grey > 0.5).astype(np.uint8))
    assert np.array_equal(truth_in(zeros_and_ones), grey > 0.5)
    with pytest.raises(DataError, match=r"absent\.png: the mask is not there"):
        truth_in(tmp_path / "absent.png")


def test_a_mask_may_lie_on_a_slightly_rounded_grid() -> None:
    assert on_grid(np.ones((498, 512), bool), (2919, 3000)).all()


def test_every_film_is_reported_in_order(analyzer: Analyzer, store: tuple[Store, Split]) -> None:
    films, _ = store
    seen: list[tuple[int, int]] = []
    results = analyze_each(
        analyzer, [films.path_of(r) for r in films.records], lambda i, report: i, lambda *step: seen.append(step)
    )
    assert results[:3] == [0, 1, 2]
    assert isinstance(results[3], Failure)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


# Segmenter and classifier --------------------------------------------------------------------------------------------


def test_a_failed_film_counts_as_no_lungs(analyzer: Analyzer, store: tuple[Store, Split]) -> None:
    result = score_segmenter(analyzer, *store, "test")
    rows = {row["id"]: row for row in result["per_film"]}
    assert (result["films"], result["failed"]) == (4, 1)
    json.dumps(result, allow_nan=False)
    assert rows["broken"]["dice"] == 0 and rows["broken"]["failure"]
    good = [rows[name]["dice"] for name in "abc"]
    assert min(good) > 0.85
    assert rows["a"]["iou"] == pytest.approx(rows["a"]["dice"] / (2 - rows["a"]["dice"]))
    assert result["scores"]["dice"]["mean"] == pytest.approx(sum(good) / 4)
    assert result["scores"]["dice"]["minimum"] == 0
    low, high = result["scores"]["dice"]["interval"]
    assert low < result["scores"]["dice"]["mean"] < high
    assert [row["id"] for row in result["worst"]] == ["broken"]


def test_a_part_without_masks_is_refused(analyzer: Analyzer, store: tuple[Store, Split]) -> None:
    with pytest.raises(DataError, match="no film of part 'val' has a lung mask"):
        score_segmenter(analyzer, *store, "val")


def test_a_failed_film_counts_as_a_wrong_class(analyzer: Analyzer, store: tuple[Store, Split]) -> None:
    found = predict(analyzer, *store, "test")
    assert found.ids == ["a", "b", "c"] and found.groups == ["ac", "b", "ac"]
    assert [row["id"] for row in found.failed] == ["broken"]
    result = score_classifier(analyzer, *store, "test")
    called = {row["id"]: row["predicted"] for row in result["per_film"]}
    right = sum(called[name] == ("COVID-19" if name == "b" else "Normal") for name in "abc")
    assert result["accuracy"] == pytest.approx(right / 3)
    assert result["accuracy_all"] == pytest.approx(right / 4)
    assert result["films"] == 3 and result["input"] == "lungs"
    # The tiny bundle's thresholds are a half, so that no set holds two classes.
    sets, truth = result["conformal"], {row["id"]: row["label"] for row in result["per_film"]}
    assert (sets["nominal"], sets["sizes"]["1"]) == (0.9, 3)
    assert sets["coverage"] == pytest.approx(sum(called[i] == truth[i] for i in "abc") / 3)
    assert {label: row["films"] for label, row in sets["classes"].items()} == {
        "COVID-19": 1, "Normal": 2, "Viral Pneumonia": 0,
    }  # fmt: skip
    assert sets["classes"]["Viral Pneumonia"]["coverage"] is None
    assert (sets["answered"], sets["accuracy_answered"]) == (1, result["accuracy"])
    json.dumps(result, allow_nan=False)


def test_scores_are_of_calibrated_probabilities(store: tuple[Store, Split], tmp_path: Path) -> None:
    analyzer = Analyzer(write_bundle(tmp_path / "bundle", temperature=2.0))
    found, result = predict(analyzer, *store, "test"), score_classifier(analyzer, *store, "test")
    assert result["log_loss"] == pytest.approx(metrics.log_loss(found.truth, softmax(found.logits, 2.0)))


def test_accuracy_stands_for_each_source(analyzer: Analyzer, store: tuple[Store, Split]) -> None:
    films, split = store
    assert score_classifier(analyzer, films, split, "test")["sources"] == {}
    of = {"a": "A", "b": "A", "broken": "A"}
    known = replace(films, records=tuple(replace(r, source=of.get(r.id, "")) for r in films.records))
    result = score_classifier(analyzer, known, split, "test")
    right = {row["id"]: row["predicted"] == row["label"] for row in result["per_film"]}
    assert result["sources"]["A"]["classes"] == {"COVID-19": 1, "Normal": 1}
    assert result["sources"]["A"]["accuracy"] == (right["a"] + right["b"]) / 2
    assert result["sources"]["A"]["failed"] == 1 and result["sources"][""]["failed"] == 0
    assert (result["sources"][""]["films"], result["sources"][""]["accuracy"]) == (1, right["c"])
    lost = replace(films, records=tuple(replace(r, source="B" * (r.id == "broken")) for r in films.records))
    row = score_classifier(analyzer, lost, split, "test")["sources"]["B"]
    assert row == {"films": 0, "failed": 1, "classes": {}, "accuracy": None, "interval": [None, None]}


def test_a_label_that_the_bundle_does_not_know_is_refused(analyzer: Analyzer, store: tuple[Store, Split]) -> None:
    films, split = store
    records = tuple(type(r)(**{**vars(r), "label": "Fracture"}) for r in films.records)
    other = Store(films.root, films.name, films.origin, films.size, records, films.images, films.masks)
    with pytest.raises(DataError, match="Fracture"):
        predict(analyzer, other, split, "test")


def test_a_part_of_which_no_film_could_be_analysed_is_refused(analyzer: Analyzer, store: tuple[Store, Split]) -> None:
    films, split = store
    for record in films.records:
        films.path_of(record).write_text("not an image")
    with pytest.raises(DataError, match=r"none of 4 films.*could be analysed"):
        score_classifier(analyzer, films, split, "test")


# Lesions and severity ------------------------------------------------------------------------------------------------


@pytest.fixture
def lesions(tmp_path: Path) -> Path:
    root = tmp_path / "lesions"
    rows: list[dict[str, object]] = []
    lungs = draw(*SHAPE) == np.float32(LUNG)
    for name, opacities in (("healthy", ()), ("ill", OPACITIES), ("broken", OPACITIES)):
        film = draw(*SHAPE, opacities=opacities)
        save(root / "images" / f"{name}.png", film)
        save(root / "lungs" / f"{name}.png", lungs.astype(np.float32))
        if opacities:
            save(root / "consolidation" / f"{name}.png", ((film != LUNG) & lungs).astype(np.float32))
        rows.append({"image": f"{name}.png", "patient": name})
    (root / "images" / "broken.png").write_text("not an image")
    table(root / "index.csv", rows)
    return root


def test_lesions_are_looked_for_inside_the_found_lungs(analyzer: Analyzer, lesions: Path) -> None:
    result = score_lesions(analyzer, lesions)
    films = {row["id"]: row for row in result["per_film"]}
    assert (result["films"], result["failed"]) == (3, 1)
    json.dumps(result, allow_nan=False)
    assert films["healthy.png"]["coverage"] is None, "no disease is drawn"
    assert films["ill.png"]["coverage"] > 0.8
    assert films["ill.png"]["precision"] > 0.9
    assert 0 < films["ill.png"]["disease_share"] < 0.5
    assert films["broken.png"]["coverage"] == 0
    assert result["scores"]["coverage"]["defined"] == 2
    assert result["scores"]["coverage"]["mean"] == pytest.approx(films["ill.png"]["coverage"] / 2)
    assert "saliency_on_disease" in result["scores"]
    assert "opacity_on_disease" not in result["scores"]


def test_opacity_is_looked_for_on_drawn_disease(lesions: Path, tmp_path: Path) -> None:
    """The map is the film's own grey: three times as bright on the drawn opacities as on the rest of the lungs but for
    their borders, where soft tissue is averaged in."""
    analyzer = Analyzer(write_bundle(tmp_path / "bundle", opacity=True))
    film = next(row for row in score_lesions(analyzer, lesions)["per_film"] if row["id"] == "ill.png")
    assert 1.3 * film["disease_share"] < film["opacity_on_disease"] < 3 * film["disease_share"]
    assert film["opacity_above_chance"] == pytest.approx(film["opacity_on_disease"] - film["disease_share"])


def test_a_film_without_drawn_lungs_is_named(analyzer: Analyzer, lesions: Path) -> None:
    (lesions / "lungs" / "ill.png").unlink()
    with pytest.raises(DataError, match=r"ill\.png has no drawn lungs"):
        score_lesions(analyzer, lesions)


@pytest.mark.parametrize("part", ["val", "test"])
def test_healthy_lungs_are_the_normal_films_of_the_val_part(
    part: str, store: tuple[Store, Split], tmp_path: Path
) -> None:
    """ "a" and "c"; "broken" is counted, and of another part no film is."""
    found, split = store
    rows = tuple(replace(row, part=part) for row in split.rows)
    analyzer = Analyzer(write_bundle(tmp_path / "bundle", opacity=True))
    healthy = healthy_lungs(analyzer, [(found, Split(rows))])
    assert (healthy.films, len(healthy.levels)) == ((2, 12) if part == "val" else (0, 0))
    assert [why.split(":")[0] for why in healthy.failed] == (["broken"] if part == "val" else [])


def test_severity_is_compared_with_two_readers(analyzer: Analyzer, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = []
    for n, radius in enumerate((0.0, 0.06, 0.1, 0.13)):
        save(tmp_path / "images" / f"{n}.png", draw(*SHAPE, opacities=((0.5, 0.28, radius),) if n else ()))
        scores = {f"{reader}-{zone}": n if zone in "AB" else 0 for reader in "SJ" for zone in ZONES}
        scores |= {"S-Global": 2 * n, "J-Global": 2 * n}
        rows.append({"image": f"{n}.png", "patient": "" if n else "p0", **scores})
    rows.append({**rows[0], "image": "missing.png"})
    table(tmp_path / "brixia.csv", rows)
    result = score_severity(analyzer, tmp_path)
    assert result["films"] == 5
    assert [row["id"] for row in result["failed"]] == ["missing.png"]
    assert result["with_seen"]["global"]["senior_junior"]["spearman"] == pytest.approx(1)
    assert result["with_seen"]["global"]["ours_senior"]["spearman"] > 0.7
    assert (result["seen"], result["scored"]) == (None, None), "nothing says what was trained on"
    assert "global" not in result and "zones" not in result
    pairs = result["with_seen"]
    assert [pairs[what]["senior_junior"]["defined"] for what in ("global", "zones")] == [4, 24]
    assert pairs["global"]["ours_senior"]["defined"] == 4
    json.dumps(result, allow_nan=False)

    blank = [{**row, "S-A": ""} for row in rows]
    table(tmp_path / "brixia.csv", blank)
    with pytest.raises(DataError, match=r"brixia\.csv: S-A of 0\.png is ''; a zone's score is 0 to 3"):
        score_severity(analyzer, tmp_path)


@pytest.mark.parametrize(("part", "rim"), [("train", 0), ("val", 0), ("test", 0), ("train", 14), ("train", -13)])
def test_films_that_were_trained_on_do_not_count_for_severity(
    analyzer: Analyzer, store: tuple[Store, Split], tmp_path: Path, part: str, rim: int
) -> None:
    """rim: pixels that the film trained on has more on each edge, or less."""
    films, split = store
    folder = tmp_path / "severity"
    rows: list[dict[str, object]] = []
    for n, radius in enumerate((0.06, 0.1, 0.13, 0.15)):
        film = draw(*((320, 320) if rim else SHAPE), opacities=((0.3 + 0.1 * n, 0.28, radius),))
        save(folder / "images" / f"{n}.png", film)
        if n == 2:
            other = np.pad(film, rim) if rim >= 0 else film[-rim:rim, -rim:rim]
            grid = Geometry.letterbox(other.shape, 256).to_network(other)
            images = np.zeros((len(films.records), 256, 256), np.uint8)
            images[1] = np.rint(grid * 255)
            np.save(films.root / "images.npy", images)
        rows.append({"image": f"{n}.png", "patient": ""} | {f"{r}-{z}": n for r in "SJ" for z in (*ZONES, "Global")})
    table(folder / "brixia.csv", rows)
    known = Split(tuple(replace(row, part=part) for row in split.rows))
    result = score_severity(analyzer, folder, known=[(Store.open(films.root), known)])
    assert result["seen"] == ([] if part == "test" else ["2.png"])
    assert result["scored"] == 4 - len(result["seen"])
    assert set(result["with_seen"]) == {"global", "zones"}


def test_a_folder_without_its_table_is_refused(analyzer: Analyzer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"index\.csv"):
        score_lesions(analyzer, tmp_path)
    table(tmp_path / "brixia.csv", [{"image": "a.png", "patient": "p"}])
    with pytest.raises(DataError, match=r"columns J-A.* are missing"):
        score_severity(analyzer, tmp_path)


def test_readers_are_told_apart_and_films_without_a_score_are_not_counted() -> None:
    def ours(score: int) -> dict[str, Any]:
        return {"global": score, "zones": {zone: {"score": score} for zone in ZONES}}

    lost = {"global": None, "zones": {**ours(1)["zones"], "A": None}}
    readers = [{f"{r}-{zone}": f"{s}" for r, s in (("S", n), ("J", 3 - n)) for zone in ZONES} for n in range(4)]
    rows = [{"image": f"{n}", "patient": "one", **scores} for n, scores in enumerate(readers)]
    found = scoring._agreement(list(zip(rows, (ours(0), lost, ours(3), ours(2)), strict=True)))
    assert [found[what]["ours_senior"]["defined"] for what in ("global", "zones")] == [3, 23]
    assert [found[what]["senior_junior"]["defined"] for what in ("global", "zones")] == [4, 24]
    for pairs in found.values():
        assert pairs["ours_senior"]["spearman"] == -pairs["ours_junior"]["spearman"] > 0
    assert set(intervals(found)) == {(None, None)}, "all are of one patient"


def predictions(logits: np.ndarray, truth: np.ndarray, groups: list[str] | None = None) -> Predictions:
    ids = [f"{n}" for n in range(len(truth))]
    return Predictions(("a", "b", "c"), ids, groups or ids, ["here"] * len(truth), truth, logits, [])


def test_a_macro_score_is_over_all_classes_in_every_resample() -> None:
    """One film of the third class, which a third of the resamples lack: their means over two classes would be higher,
    and of the others all have one AUC."""
    truth = np.array([0] * 50 + [1] * 49 + [2])
    logits = 5 * np.eye(3)[truth]
    logits[-1] = [1, 0, -9]
    found = score_predictions(predictions(logits, truth), 1.0)
    assert found["macro_f1"] == pytest.approx(2 / 3, abs=0.01)
    assert found["intervals"]["macro_f1"][1] < 0.7
    assert (found["macro_auc"], found["intervals"]["macro_auc"]) == (pytest.approx(2 / 3), [None, None])


def test_an_error_of_calibration_that_is_chance_begins_at_zero() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (60, 3))
    truth = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    assert score_predictions(predictions(logits, truth), 1.0)["intervals"]["ece"][0] == 0


@pytest.mark.parametrize("groups", [["one"] * 60, None])
def test_no_score_of_one_group_has_an_interval(groups: list[str] | None) -> None:
    """Its films are one draw: nothing tells how another group would score."""
    truth = np.arange(60) % 3
    logits = 2 * np.eye(3)[truth] + np.random.default_rng(0).normal(0, 1.5, (60, 3))
    found = intervals(score_predictions(predictions(logits, truth, groups), 1.0, Conformal(0.9, (0.5,) * 3)))
    assert {None in ends for ends in found} == {groups is not None}


def test_nor_have_masks_of_one_group_or_lesions_of_one_patient(
    analyzer: Analyzer, store: tuple[Store, Split], lesions: Path
) -> None:
    films, split = store
    one = Split(tuple(replace(row, group="one") for row in split.rows))
    assert set(intervals(score_segmenter(analyzer, films, one, "test")["scores"])) == {(None, None)}
    table(lesions / "index.csv", [{"image": f"{name}.png", "patient": "p"} for name in ("healthy", "ill", "broken")])
    assert set(intervals(score_lesions(analyzer, lesions)["scores"])) == {(None, None)}
