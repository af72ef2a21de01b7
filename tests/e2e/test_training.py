"""From films with labels to a measured bundle: the commands that docs/training.md lists, one after the other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("torch", reason="needs the extra [train]")

from films import draw, save
from lungscope.bundle import Bundle
from lungscope.cli import main as front
from lungscope.data.split import Row, Split
from lungscope.data.store import Store, write_records
from lungscope.errors import RecipeError
from lungscope.evaluation.calibration import fit_opaque
from lungscope.evaluation.scoring import healthy_lungs
from lungscope.pipeline import Analyzer
from lungscope.stages.classification import ViewSpec, view_name
from lungscope.statistics import with_interval
from lungscope.training import recipe as recipe_module
from lungscope.training.averaging import average
from lungscope.training.engine import Hardware
from nets import trained_segmenter
from programs import run

SIZE = 64
#: Folder of a class, and the opacities that its films show.
CLASSES = {"COVID": [(0.5, 0.28, 0.1)], "Normal": [], "Viral Pneumonia": [(0.35, 0.72, 0.1)]}
RECIPES = Path(recipe_module.__file__).parent / "recipes"
PARTS = ("train", "train", "train", "train", "val", "val", "test", "test")


@pytest.mark.slow
def test_from_films_to_a_measured_bundle(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, opacities in CLASSES.items():
        for n in range(len(PARTS)):
            film = draw(320, 288, opacities=opacities) + rng.normal(0, 0.03, (320, 288))
            save(tmp_path / "films" / name / "images" / f"{name}-{n}.png", film.clip(0, 1).astype(np.float32))
    run("data", "import", tmp_path / "films", tmp_path / "store", "--name", "drawn", "--size", SIZE)
    store, split = Store.open(tmp_path / "store"), tmp_path / "split.csv"
    # Drawn films resemble each other; the rule of groups has its own tests.
    rows = [Row("drawn", r.id, r.sha256, r.label, r.id, PARTS[int(Path(r.image).stem[-1])]) for r in store.records]
    Split(tuple(rows)).write(split, {})
    data = ("--data", store.root, "--split", split)

    segmenter, recipe = trained_segmenter(tmp_path / "segmenter", SIZE), tmp_path / "recipe.toml"
    # The shipped recipe, for twelve films.
    text = (RECIPES / "classifier-control.toml").read_text()
    recipe.write_text(text.replace("batch = 32", "batch = 4").replace("size = 96", "size = 64"))
    bundles = {}
    run("export", "--segmenter", segmenter, *data, "--no-metrics", "--out", tmp_path / "lungs")
    assert Bundle.load(tmp_path / "lungs").name == "lungs", "as its folder is called"
    for shown in ("lungs", "background"):
        folder = tmp_path / f"run-{shown}"
        trained = run(
            "train", "classifier", *data, "--model", tmp_path / "lungs", "--recipe", recipe, "--network", "resnet50",
            "--input", shown, *(("--no-crop", "--equalise") if shown == "lungs" else ()), "--out", folder,
            "--accelerator", "cpu",
        )  # fmt: skip
        assert 0 <= trained["metrics"]["val_accuracy"] <= 1
        facts = json.loads((folder / "weights.json").read_text())
        assert (facts["shown"], facts["labels"]) == (shown, ["COVID-19", "Normal", "Viral Pneumonia"])
        assert facts["lungs"] == {"pool": "mean", "threshold": 0.5, "size": SIZE}
        bundles[shown] = tmp_path / f"bundle-{shown}"
        manifest = run(
            "export", "--segmenter", segmenter, "--classifier", folder, *data, "--name", shown, "--out", bundles[shown]
        )
        view = manifest["classifier"]["view"]
        assert (view["input"], view["crop"], view["equalised"]) == (shown, False, shown == "lungs")
        assert manifest["training"]["classifier_saw_lungs_of_this_segmenter"] is True
    # The mean of a run and itself scores as that does, shown what it is shown; another input's has no part in it.
    lungs, background = (tmp_path / f"run-{shown}" for shown in bundles)
    mean = run(
        "train", "average", lungs, lungs, *data, "--model", tmp_path / "lungs", "--out", tmp_path / "mean",
        "--accelerator", "cpu",
    )  # fmt: skip
    alone = json.loads((lungs / "weights.json").read_text())["metrics"]
    assert mean["metrics"] == pytest.approx({name: alone[name] for name in mean["metrics"]}, abs=1e-4)
    opened = [(store, Split.read(split))]
    for runs, match in (((lungs, background), "these runs are of resnet50"), ((lungs, lungs), "name the bundle")):
        with pytest.raises(RecipeError, match=match):
            average(runs, opened, tmp_path / "none", hardware=Hardware("cpu"))
    assert len(list((store.root / "views").glob("*-views.npy"))) == 2, "each input is cut once"

    bundle = Bundle.load(bundles["lungs"])
    assert bundle.classifier is not None
    assert bundle.classifier.conformal is not None
    assert bundle.classifier.conformal.coverage == 0.95
    result = run("evaluate", "classifier", *data, "--model", bundles["lungs"], "--control", bundles["background"])
    row, control = result["stores"][0], result["controls"][0]["stores"][0]
    assert (row["input"], control["input"]) == ("lungs", "background")
    assert row["temperature"] == bundle.classifier.temperature
    assert np.sum(row["confusion"]) == row["films"] == 6
    low, high = row["class_intervals"]["Normal"]["specificity"]
    # Of six films all may be right, whose interval is undefined.
    assert (low, high) == (None, None) or 0 <= low <= row["classes"]["Normal"]["specificity"] <= high <= 1
    kept = json.loads((bundle.root / "metrics.json").read_text())
    assert kept["classifier"][0]["confusion"] == row["confusion"], "what the bundle says is what evaluation finds"
    assert kept["split_of_training"] == result["split_of_training"] == {"segmenter": None, "classifier": True}

    # The card states what was measured, and controls where they are handed over.
    card = (bundle.root / "MODEL_CARD.md").read_text(encoding="utf-8")
    accuracy = with_interval(row["accuracy"], row["intervals"]["accuracy"])
    assert f"| class from the lungs alone, grey levels equalised, drawn test: accuracy | 6 | {accuracy} |" in card
    assert "films at 64²" in card
    assert "## Controls" not in card and "no data card" in card
    (tmp_path / "controls.json").write_text(json.dumps(result))
    (tmp_path / "DATA_CARD.md").write_text("# Drawn films\n")
    hazy = trained_segmenter(tmp_path / "hazy", SIZE, "fpn-mobilenetv2-opacity")
    manifest = run(
        "export", "--segmenter", hazy, "--classifier", tmp_path / "run-lungs", *data, "--no-metrics",
        "--threshold", 0.4,
        "--controls", tmp_path / "controls.json", "--paper", tmp_path / "DATA_CARD.md", "--out", tmp_path / "carded",
    )  # fmt: skip
    healthy = healthy_lungs(Analyzer(tmp_path / "carded", precision="f32"), [(store, Split.read(split))])
    assert (healthy.films, len(healthy.levels), healthy.failed) == (2, 12, [])
    assert manifest["segmenter"]["threshold"] == 0.4
    assert manifest["segmenter"]["opaque"] == fit_opaque(healthy.levels)
    card = (tmp_path / "carded" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"involved above {fit_opaque(healthy.levels):g}, so that 90% of the zones of 2 healthy" in card
    assert "Not measured" in card and "no data card" not in card
    shown = with_interval(control["accuracy"], control["intervals"]["accuracy"])
    assert f"| {view_name(ViewSpec(**control['view']))} | 6 | {shown} |" in card
    assert "per_film" not in (tmp_path / "carded" / "controls.json").read_text()
    command = ("evaluate", "classifier", *data, "--model", tmp_path / "carded")
    done = CliRunner().invoke(front.app, [*map(str, command)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert done.output.count("recorded") >= 3, "both controls, and what that means"

    # Without labels there is nothing to calibrate on, and that is said.
    unlabelled = [replace(record, label="") for record in store.records]
    write_records(store.root / "records.csv", unlabelled)
    command = (
        "export", "--segmenter", segmenter, "--classifier", tmp_path / "run-lungs", *data, "--no-metrics", "--no-gates",
        "--out", tmp_path / "bare",
    )  # fmt: skip
    done = CliRunner().invoke(front.app, [*map(str, command)], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "no validation film has a label, which calibration needs" in done.output
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "no folder is left behind"
    bare = Bundle.load(tmp_path / "bare").classifier
    assert bare is not None and (bare.temperature, bare.conformal) == (1.0, None)
