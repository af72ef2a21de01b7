"""`lungscope models` and `lungscope doctor` on a real small bundle, whole and broken."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bundles import BIAS, seal, write_bundle, write_classifier
from lungscope.cli import main as front
from lungscope.errors import BundleError
from lungscope.hardware import processor
from lungscope.precision import NEEDED


def run(*arguments: str | Path) -> tuple[int, Any]:
    done = CliRunner().invoke(front.app, [*map(str, arguments), "--json"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, json.loads(done.stdout)


def test_show_prints_the_manifest(tiny: Path) -> None:
    status, document = run("models", "show", tiny)
    assert status == 0
    assert document == json.loads((tiny / "manifest.json").read_text())


def test_show_prints_the_card_of_a_bundle_that_has_one(tmp_path: Path) -> None:
    root = write_bundle(tmp_path)
    (root / "MODEL_CARD.md").write_text("# Model card\n\n| a | b |\n", encoding="utf-8")
    seal(root, json.loads((root / "manifest.json").read_text()))
    done = CliRunner().invoke(front.app, ["models", "show", str(root)])
    assert (done.exit_code, done.stdout) == (0, "# Model card\n\n| a | b |\n")


def test_verify_names_every_file(tiny: Path) -> None:
    status, document = run("models", "verify", tiny)
    assert status == 0
    assert set(document["files"]) == {"segmenter.onnx", "classifier.onnx", "LICENCE"}
    text = CliRunner().invoke(front.app, ["models", "verify", str(tiny)]).stdout
    assert "tiny 0.1.0 is whole: 3 files." in text


def test_verify_refuses_an_altered_bundle(tmp_path: Path) -> None:
    root = write_bundle(tmp_path)
    (root / "LICENCE").write_text("other")
    with pytest.raises(BundleError, match="altered"):
        run("models", "verify", root)


def test_list_shows_whole_and_broken_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(tmp_path / "good")
    (write_bundle(tmp_path / "bad") / "LICENCE").unlink()
    monkeypatch.setattr("lungscope.bundle.EMBEDDED", tmp_path)
    status, rows = run("models", "list")
    assert status == 0
    assert [row["name"] for row in rows] == ["bad", "tiny"]
    assert "LICENCE" in rows[0]["error"]
    assert rows[1]["classifier"] == "cells"
    text = CliRunner().invoke(front.app, ["models", "list"], env={"COLUMNS": "200"}).stdout
    assert "broken" in text
    assert "threshold-0.55" in text


def test_doctor_finds_a_working_installation(tiny: Path) -> None:
    status, report = run("doctor", "--model", tiny)
    assert status == report["status"] == 0
    assert report["problem"] is None
    assert report["packages"]["openvino"]
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(report["extras"]) == set(project["optional-dependencies"])
    assert "cpu" in {device["name"] for device in report["devices"]}
    assert [row["file"] for row in report["self_test"]] == ["segmenter.onnx", "classifier.onnx"]
    assert all(row["run_ms"] > 0 for row in report["self_test"])
    text = CliRunner().invoke(front.app, ["doctor", "--model", str(tiny)], env={"COLUMNS": "200"}).stdout
    assert "Everything that analysing needs works." in text
    fast = {*NEEDED["int8"]} & {*processor()["features"]}
    why = f"int8: {'the bundle has no quantisation' if fast else 'this processor has no amx_int8'}"
    assert report["precision"]["auto"] == "f32" and why in report["precision"]["why"]
    assert f"auto is f32 ({why}" in text


def test_doctor_says_what_is_wrong(tmp_path: Path) -> None:
    status, report = run("doctor", "--model", tmp_path)
    assert status == 3
    assert "No weights bundle" in report["problem"]
    assert report["devices"]


def test_doctor_finds_a_map_that_does_not_add_up(tmp_path: Path) -> None:
    root = write_bundle(tmp_path)
    write_classifier(root / "classifier.onnx", bias=[value + 1 for value in BIAS])
    seal(root, json.loads((root / "manifest.json").read_text()))
    status, report = run("doctor", "--model", root)
    assert status == 3
    assert "mean plus bias differs" in report["problem"]


def test_doctor_refuses_a_device_that_is_not_there(tiny: Path) -> None:
    status, report = run("doctor", "--model", tiny, "--device", "tpu")
    assert status == 2
    assert "Device 'tpu' does not exist" in report["problem"]
