"""What `lungscope evaluate` writes and prints beside the scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from bundles import seal, write_bundle, write_classifier
from films import draw, save
from lungscope.cli import main as front
from lungscope.data.split import Row, Split, parts_digest
from lungscope.data.store import Store
from lungscope.evaluation.scoring import ZONES
from lungscope.statistics import number
from stores import SHAPE, write_store


@pytest.fixture
def data(tmp_path: Path) -> list[object]:
    """The options for a store and its split: all films of the test part but one."""
    store = write_store(tmp_path)
    rows = [Row("films", r.id, r.sha256, r.label, r.id, "val" if r.id == "broken" else "test") for r in store.records]
    Split(tuple(rows)).write(tmp_path / "split.csv", {})
    return ["--data", store.root, "--split", tmp_path / "split.csv"]


def bundle_of(root: Path, data: list[object], **parts: str) -> Path:
    """A bundle whose networks were trained on `data`, but for `parts`."""
    store, split = Store.open(Path(str(data[1]))), Split.read(Path(str(data[3])))
    run = {"stores": ["films"], "parts": parts_digest([(store, split)]) | parts}
    write_bundle(root)
    seal(root, json.loads((root / "manifest.json").read_text()) | {"training": {"runs": [run, run]}})
    return root


def evaluate(*arguments: object) -> Result:
    done = CliRunner().invoke(front.app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done


def in_json(*arguments: object) -> tuple[Any, str]:
    """The result, and what stood on standard error."""
    done = evaluate(*arguments, "--json")
    return json.loads(done.stdout), " ".join(done.stderr.split())


@pytest.mark.parametrize("what", ["segmenter", "classifier"])
def test_a_bundle_of_another_split_is_named(what: str, data: list[object], tmp_path: Path) -> None:
    same, other = bundle_of(tmp_path / "same", data), bundle_of(tmp_path / "other", data, test="0")
    told = "its segmenter and classifier trained with other val and test parts"
    found, stderr = in_json(what, *data, "--model", same)
    assert found["split_of_training"] == {"segmenter": True, "classifier": True} and told not in stderr
    found, stderr = in_json(what, *data, "--model", other)
    assert found["split_of_training"] == {"segmenter": False, "classifier": False} and told in stderr
    if what == "classifier":
        found, stderr = in_json(what, *data, "--model", same, "--control", other)
        assert found["controls"][0]["split_of_training"]["classifier"] is False and told in stderr


def test_severity_says_where_nothing_tells_what_was_trained_on(data: list[object], tiny: Path, tmp_path: Path) -> None:
    zones = [f"{reader}-{zone}" for reader in "SJ" for zone in (*ZONES, "Global")]
    lines = [",".join(["image", "patient", *zones])]
    for n in range(3):
        save(tmp_path / "severity" / "images" / f"{n}.png", draw(*SHAPE, opacities=((0.3 + 0.1 * n, 0.28, 0.1),)))
        lines.append(",".join([f"{n}.png", f"{n}", *map(str, [n] * len(zones))]))
    (tmp_path / "severity" / "brixia.csv").write_text("\n".join(lines))
    command = ("pipeline", "--severity", tmp_path / "severity", "--model", tiny)
    found, _ = in_json(*command)
    assert found["severity"]["seen"] is None and "global" not in found["severity"]
    shown = evaluate(*command).stdout
    assert "not checked: give --data and --split" in shown and "0 were seen" not in shown
    assert "global, all films" in shown and "with seen films" not in shown
    found, _ = in_json(*command, *data)
    assert found["severity"]["seen"] == [] and "global" in found["severity"]
    assert "0 were seen in training" in evaluate(*command, *data).stdout


def test_a_control_stands_beside_the_bundle_on_the_same_films(data: list[object], tiny: Path, tmp_path: Path) -> None:
    """The control's classifier knows nothing but the first class, COVID-19: of three films it is right on one."""
    write_bundle(tmp_path / "control")
    write_classifier(tmp_path / "control" / "classifier.onnx", slope=(0, 0, 0), offset=(9, 0, 0))
    seal(tmp_path / "control", json.loads((tmp_path / "control" / "manifest.json").read_text()))
    command = ("classifier", *data, "--model", tiny, "--control", tmp_path / "control")
    found, _ = in_json(*command)
    row, control = found["stores"][0], found["controls"][0]["stores"][0]
    less = control["accuracy_less_bundle"]["all"]
    assert control["accuracy"] == pytest.approx(1 / 3) and "accuracy_less_bundle" not in row
    assert (less["films"], less["difference"]) == (3, pytest.approx(1 / 3 - row["accuracy"]))
    shown = evaluate(*command).stdout
    assert "Accuracy, less the bundle's" in shown and f"{less['difference']:+.4f} [" in shown


def test_scores_are_whole_on_a_terminal_of_80_characters(data: list[object], tiny: Path) -> None:
    found, _ = in_json("classifier", *data, "--model", tiny)
    command = ["evaluate", "classifier", *map(str, data), "--model", str(tiny)]
    shown = CliRunner().invoke(front.app, command, env={"COLUMNS": "80"}).stdout
    row = found["stores"][0]
    assert "…" not in shown.split("Conformal")[0]
    assert all(number(row[name]) in shown for name in ("accuracy", "macro_f1", "macro_auc", "log_loss", "ece"))
