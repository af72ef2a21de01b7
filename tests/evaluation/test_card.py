"""The model card says what the bundle's files say, and says so where they say nothing."""

from __future__ import annotations

import json
from pathlib import Path

from bundles import seal, write_bundle
from lungscope.bundle import Bundle
from lungscope.evaluation.card import model_card
from lungscope.report import DISCLAIMER


def test_a_bare_bundle_has_a_card_that_says_what_is_missing(tmp_path: Path) -> None:
    card = model_card(Bundle.load(write_bundle(tmp_path)))
    assert card.startswith("# Model card: tiny 0.1.0")
    assert DISCLAIMER in card and "Not measured" in card and "no data card" in card
    assert "COVID-19, Normal, Viral Pneumonia" in card
    assert "classifier" not in model_card(Bundle.load(write_bundle(tmp_path / "lungs", classifier=False)))


def test_checklists_of_the_authors_end_the_card(tmp_path: Path) -> None:
    root = write_bundle(tmp_path)
    (root / "REPORTING.md").write_text("## CLAIM\n| 44 | None. |\n")
    seal(root, json.loads((root / "manifest.json").read_text()))
    assert model_card(Bundle.load(root)).endswith("## CLAIM\n| 44 | None. |\n")


def test_the_data_card_is_part_of_it(tmp_path: Path) -> None:
    root = write_bundle(tmp_path)
    (root / "DATA_CARD.md").write_text("# Data\n\n| set | terms |\n|---|---|\n| A | CC BY 4.0 |\n")
    manifest = json.loads((root / "manifest.json").read_text())
    seal(root, manifest)
    card = model_card(Bundle.load(root))
    assert f"## Data\nLicence of the weights: {manifest['licence']}.\n\n| set | terms |" in card
    assert "| A | CC BY 4.0 |\n\n## " in card and "\n# Data" not in card


def test_the_card_says_which_views_are_mirrored(tmp_path: Path) -> None:
    root = write_bundle(tmp_path)
    manifest = json.loads((root / "manifest.json").read_text())
    assert "mirror image" not in model_card(Bundle.load(root))
    manifest["classifier"]["mirror"] = 1.5
    seal(root, manifest)
    assert "two largest logits are closer than 1.5, the mean of its answers" in model_card(Bundle.load(root))


def test_the_card_says_of_how_many_runs_weights_are_the_mean(tmp_path: Path) -> None:
    root = write_bundle(tmp_path)
    manifest = json.loads((root / "manifest.json").read_text())
    run = {"network": "a", "weights_sha256": "ab" * 32, "recipe": {"phases": [{"epochs": 2, "films": 9, "size": 64}]}}
    plain, mean = ({}, "| 2 × 9 films at 64² |"), ({"mean_of": [{}, {}, {}]}, "the mean of the weights of 3 runs;")
    for extra, says in (plain, mean):
        manifest["training"] = {"runs": [{**run, **extra}]}
        seal(root, manifest)
        assert says in model_card(Bundle.load(root))


def test_the_card_says_how_right_a_network_is_within_a_source(tmp_path: Path) -> None:
    root = write_bundle(tmp_path)
    source = {"films": 7, "failed": 1, "classes": {"Normal": 4, "COVID-19": 3}, "accuracy": 0.9, "interval": [0.8, 1.0]}
    row = {
        "store": "s", "input": "background", "films": 7, "accuracy": 0.9, "macro_f1": 0.9, "macro_auc": 0.9,
        "intervals": {"accuracy": [0.8, 1.0], "macro_f1": [0.8, 1.0]}, "sources": {"A": source, "": source},
    }  # fmt: skip
    (root / "controls.json").write_text(json.dumps({"stores": [row]}))
    seal(root, json.loads((root / "manifest.json").read_text()))
    card = model_card(Bundle.load(root))
    seen = "the background, lungs blacked out"
    assert f"| {seen} | s: A | 7 | 1 | Normal 4, COVID-19 3 | 0.9000 [0.8000, 1.0000] |" in card
    assert f"| {seen} | s: not known | 7 |" in card


def test_the_card_says_what_a_network_is_shown(tmp_path: Path) -> None:
    """Of the network itself, and of controls, where two of one input differ in how it is cut out."""
    root = write_bundle(tmp_path)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["classifier"]["view"]["aligned"] = True
    row = {
        "store": "s", "input": "background", "films": 7, "accuracy": 0.9, "macro_f1": 0.9, "macro_auc": 0.9,
        "intervals": {"accuracy": [0.8, 1.0], "macro_f1": [0.8, 1.0]},
    }  # fmt: skip
    view = {"input": "background", "crop": False, "margin": 0.06, "size": 192, "equalised": False, "aligned": False}
    cut = {**row, "view": {**view, "crop": True, "aligned": True}}
    (root / "controls.json").write_text(json.dumps({"stores": [{**row, "view": view}, cut]}))
    seal(root, manifest)
    card = model_card(Bundle.load(root))
    assert "the lungs alone, cut out close, in one pose) gives" in card
    assert "| the background, lungs blacked out | 7 |" in card
    assert "| the background, lungs blacked out, cut out close, in one pose | 7 |" in card


def test_the_card_says_what_grades_were_fitted_on(tmp_path: Path) -> None:
    root = write_bundle(tmp_path, opacity=True)
    manifest = json.loads((root / "manifest.json").read_text())
    assert "grades of zones" not in model_card(Bundle.load(root))
    manifest["segmenter"]["grades"] = [0.5, 1.25, 2.0]
    seal(root, manifest)
    card = model_card(Bundle.load(root))
    assert "Brixia scores; a zone scores 1, 2 and 3 from a grade of 0.5, 1.25, 2 on." in card
    assert "is derived from how opaque the lungs are: a place is involved above 0.1" in card
    fit = {"films": ["a", "b", "c"], "patients": 2, "healthy": {"train": 9, "val": 4}}
    run = {"network": "a", "weights_sha256": "ab" * 32, "severity": fit}
    manifest["training"] = {"runs": [run], "healthy": {"films": 4}}
    seal(root, manifest)
    card = model_card(Bundle.load(root))
    assert "scores of 3 films of 2 patients and to 9 healthy ones; a zone" in card
    assert "of 4 healthy validation films are clear" in card and "few films that radiologists scored" in card


def test_severity_on_films_that_may_have_been_trained_on_is_no_row_of_the_card(tmp_path: Path) -> None:
    root, score = write_bundle(tmp_path), {"spearman": 0.5, "interval": [0.4, 0.6]}
    rows = dict.fromkeys(("ours_senior", "ours_junior", "senior_junior"), score)
    both = {"global": rows, "zones": rows}
    metrics = {"hardware": {"cores": 2, "processor": "X", "precision": "f32"}, "commit": None, "split": {}}
    for severity, says, count in (
        ({"seen": None, "scored": None, "with_seen": both}, "trained on were not looked for", 0),
        ({"seen": ["a"], "scored": 3, **both, "with_seen": both}, "1 near-duplicates of films of these sets are", 2),
    ):
        (root / "metrics.json").write_text(json.dumps({**metrics, "severity": severity}))
        seal(root, json.loads((root / "manifest.json").read_text()))
        card = model_card(Bundle.load(root))
        assert says in card and card.count("0.50 [0.40, 0.60]") == count
