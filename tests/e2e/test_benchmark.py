"""A small grid for real: cells trained, measured and rendered, cut off and gone on with, merged and refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("torch", reason="needs the extra [train]")

from films import draw, save
from lungscope.bundle import Bundle
from lungscope.cli import main as front
from lungscope.data.split import Row, Split
from lungscope.data.store import Store
from lungscope.pipeline import Analyzer
from lungscope.readers import read
from lungscope.training.benchmark import KnownLungs
from nets import trained_segmenter
from programs import environment

SIZE = 64
CLASSES = {"COVID": [(0.5, 0.28, 0.1)], "Normal": [], "Viral Pneumonia": [(0.35, 0.72, 0.1)]}
PARTS = ("train", "train", "train", "train", "val", "val", "test", "test")

SEGMENTER = """
kind = "segmenter"
reason = "For tests."
network = "fpn-mobilenetv2"
phases = [{ size = 64, epochs = 2, lr = 3e-3 }]
batch = 4
optimizer = "adamw"
weight_decay = 0.0
loss = "bce"
schedule = { name = "one-cycle" }
best = { monitor = "val_dice", mode = "max" }
batch_norm_batches = 2
"""
CLASSIFIER = """
kind = "classifier"
reason = "For tests."
network = "resnet50"
phases = [{ size = 64, epochs = 1, lr = 1e-3 }]
batch = 4
optimizer = "adamw"
weight_decay = 0.0
loss = "cross-entropy"
schedule = { name = "one-cycle" }
best = { monitor = "val_loss", mode = "min" }
"""
BUDGET = """
reason = "For tests."
[segmentation]
recipe = "{folder}/segmenter.toml"
seeds = [0]
ensemble = ["linknet-mobilenetv2", "unet-mobilenetv2"]
pools = ["union"]
[classification]
recipe = "{folder}/classifier.toml"
seeds = [0]
inputs = ["lungs", "background"]
[[classification.variants]]
name = "cropped"
reason = "cut out, nothing blacked out"
networks = ["resnet50"]
input = "image"
crop = true
equalised = true
aligned = true
"""

#: The command, but the process gets SIGKILL in its training step of that number.
SCRIPT = """
import os, signal, sys
from lungscope.cli.main import main
from lungscope.training.segmenter import SegmenterTask

step, done, last = SegmenterTask.training_step, 0, int(sys.argv.pop(1))

def counted(self, batch, index):
    global done
    if done == last:
        os.kill(os.getpid(), signal.SIGKILL)
    done += 1
    return step(self, batch, index)

SegmenterTask.training_step = counted
main()
"""


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of 24 drawn films with masks and labels, its split, and a budget."""
    root, rng = tmp_path_factory.mktemp("benchmark"), np.random.default_rng(0)
    for name, opacities in CLASSES.items():
        for n in range(len(PARTS)):
            film = draw(160, 144, opacities=opacities) + rng.normal(0, 0.03, (160, 144))
            save(root / "films" / name / "images" / f"{name}-{n}.png", film.clip(0, 1).astype(np.float32))
            save(root / "films" / name / "masks" / f"{name}-{n}.png", (draw(160, 144) < 0.5).astype(np.float32))
    call("data", "import", root / "films", root / "store", "--name", "drawn", "--size", SIZE)
    records = Store.open(root / "store").records
    # Drawn films resemble each other; the rule of groups has its own tests.
    rows = [Row("drawn", r.id, r.sha256, r.label, r.id, PARTS[int(Path(r.image).stem[-1])]) for r in records]
    Split(tuple(rows)).write(root / "split.csv", {})
    (root / "segmenter.toml").write_text(SEGMENTER)
    (root / "classifier.toml").write_text(CLASSIFIER)
    (root / "tiny.toml").write_text(BUDGET.format(folder=root))
    return root


def call(*arguments: object) -> Any:
    done = CliRunner().invoke(front.app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def options(films: Path, out: Path, *only: str) -> list[str]:
    chosen = [word for name in only for word in ("--only", name)]
    return [
        *("--budget", str(films / "tiny.toml"), "--data", str(films / "store"), "--split", str(films / "split.csv")),
        *("--accelerator", "cpu", "--work", str(out / "work"), "--out", str(out), *chosen),
    ]


def scores(path: Path) -> Any:
    cell = json.loads(path.read_text())
    return [{name: row["mean"] for name, row in store["scores"].items()} for store in cell["stores"]]


@pytest.mark.slow
def test_a_grid_killed_and_gone_on_with(films: Path, tmp_path: Path) -> None:
    members = ("linknet-mobilenetv2-seed0", "unet-mobilenetv2-seed0")
    command = [sys.executable, "-c", SCRIPT, "7", "benchmark", "segmentation"]
    command += options(films, tmp_path, *members, "ensemble")
    # Three steps an epoch, two epochs a cell: the eighth step is in the second cell's first epoch.
    killed = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=600, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    results = tmp_path / "segmentation"
    first = results / f"{members[0]}.json"
    assert [path.name for path in results.iterdir()] == [first.name]
    before = (first.read_bytes(), first.stat().st_mtime_ns)
    assert call("benchmark", "segmentation", *options(films, tmp_path, *members, "ensemble"))["failed"] == {}
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before, "a finished cell is left alone"
    cells = {path.stem: json.loads(path.read_text()) for path in results.iterdir()}
    assert set(cells) == {*members, "ensemble-union-seed0"}
    pooled = cells["ensemble-union-seed0"]
    assert pooled["parameters"] == sum(cells[name]["parameters"] for name in members)
    recall = {name: cell["stores"][0]["scores"]["coverage"]["mean"] for name, cell in cells.items()}
    assert recall.pop("ensemble-union-seed0") >= max(recall.values()) - 1e-6, "a union finds what any member finds"

    # Again with the same seed, in another place.
    again = call("benchmark", "segmentation", *options(films, tmp_path / "again", members[0]))
    assert again["failed"] == {}
    mine, theirs = (scores(root / "segmentation" / first.name) for root in (tmp_path, tmp_path / "again"))
    # The tolerance that docs/training.md states.
    assert mine[0] == pytest.approx(theirs[0], abs=5e-3, nan_ok=True)

    # Cells of one grid are merged by copying; of another budget they are refused.
    merged = tmp_path / "merged"
    shutil.copytree(results, merged / "segmentation")
    call("benchmark", "segmentation", "--render", "--out", merged)
    pages = list(tmp_path.glob("segmentation*.*"))
    assert len(pages) == 6
    for path in pages:
        assert (merged / path.name).read_bytes() == path.read_bytes(), path.name
    foreign = json.loads((merged / "segmentation" / first.name).read_text())
    foreign["budget"]["sha256"] = "0" * 64
    (merged / "segmentation" / first.name).write_text(json.dumps(foreign))
    refused = CliRunner().invoke(front.app, ["benchmark", "segmentation", "--render", "--out", str(merged)])
    assert refused.exit_code != 0 and "differ in budget" in str(refused.exception)


@pytest.mark.slow
def test_classifiers_on_what_they_are_shown(films: Path, tmp_path: Path) -> None:
    segmenter = trained_segmenter(tmp_path / "segmenter", SIZE)
    data = ("--data", films / "store", "--split", films / "split.csv")
    named = ("--name", "lungs", "--threshold", 0.4)
    call("export", "--segmenter", segmenter, *data, *named, "--no-metrics", "--out", tmp_path / "lungs")
    cells = ("resnet50-lungs-seed0", "resnet50-cropped-seed0")
    command = ("benchmark", "classification", *options(films, tmp_path, *cells), "--model", tmp_path / "lungs")
    assert call(*command)["failed"] == {}
    cell = json.loads((tmp_path / "classification" / "resnet50-lungs-seed0.json").read_text())
    assert cell["test"]["films"] == 6 and cell["val"]["films"] == 6
    assert cell["test"]["uncalibrated"]["ece"] >= 0 and cell["test"]["temperature"] > 0
    manifest = json.loads((tmp_path / "work/classification/resnet50-cropped-seed0/bundle/manifest.json").read_text())
    assert manifest["segmenter"]["threshold"] == 0.4
    assert manifest["training"]["classifier_saw_lungs_of_this_segmenter"] is True
    view = manifest["classifier"]["view"]
    assert (view["input"], view["crop"], view["equalised"], view["aligned"]) == ("image", True, True, True)
    # Lungs are found once and known from then on, with nothing changed by that.
    bundle, store = Bundle.load(tmp_path / "lungs"), Store.open(films / "store")
    known, film = KnownLungs(bundle), read(store.path_of(store.records[0]))
    fresh = Analyzer(bundle, precision="f32").find_lungs(film)
    for found in (known(film), known(film)):
        for name in ("mask", "left", "right"):
            assert np.array_equal(getattr(found, name), getattr(fresh, name)), name
        assert (found.warnings, found.spacing_mm) == (fresh.warnings, fresh.spacing_mm)
    page = (tmp_path / "classification.md").read_text(encoding="utf-8")
    assert "Table 4" in page and "cropped: cut out, nothing blacked out" in page


@pytest.mark.slow
def test_networks_are_timed_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"segmentation": ("fpn-mobilenetv2",), "classification": ("resnet50",)}
    monkeypatch.setattr("lungscope.training.latency.NETWORKS", few)
    found = call("benchmark", "latency", "--out", tmp_path, "--repeats", 3, "--device", "cpu")
    assert found == json.loads((tmp_path / "latency.json").read_text())
    assert {kind: tuple(rows) for kind, rows in found["ms"].items()} == few
    for row in (found["ms"]["segmentation"]["fpn-mobilenetv2"], found["ms"]["classification"]["resnet50"]):
        assert row["calls"] == 3 and 0 < row["p5"] <= row["median"] <= row["p95"]
    assert found["sizes"] == {"segmentation": 96, "classification": 96} and found["precision"] == "f32"


def test_an_ensemble_without_its_members_says_what_is_missing(films: Path, tmp_path: Path) -> None:
    command = ["benchmark", "segmentation", *options(films, tmp_path, "ensemble")]
    done = CliRunner().invoke(front.app, [*command, "--json"])
    assert done.exit_code == 1
    failed = json.loads(done.stdout)["failed"]
    assert "linknet-mobilenetv2-seed0, unet-mobilenetv2-seed0 first" in failed["ensemble-union-seed0"]


def test_an_unknown_cell_names_those_that_there_are(films: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(front.app, ["benchmark", "segmentation", *options(films, tmp_path, "unet-resnet18")])
    assert "no such cell" in str(done.exception) and "unet-vgg16-seed0" in str(done.exception)
