"""The program's front: light, lazy, and without tracebacks."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lungscope
from lungscope.cli import main as front
from lungscope.errors import MissingExtraError
from programs import program, python

#: What must not be loaded by anything that is not training.
HEAVY = ["torch", "torchvision", "timm", "lightning", "segmentation_models_pytorch", "monai", "torchmetrics", "nncf"]


def loaded_by(code: str) -> set[str]:
    """Top-level modules in `sys.modules` after `code`."""
    done = python(f"import sys\n{code}\nprint('\\n'.join({{name.partition('.')[0] for name in sys.modules}}))")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def run_front(*arguments: str) -> str:
    return (
        f"sys.argv = ['lungscope', *{list(arguments)!r}]\n"
        "from lungscope.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
    )


def test_import_loads_nothing_heavy() -> None:
    loaded = loaded_by("import lungscope; lungscope.__version__; dir(lungscope)")
    assert not loaded & {*HEAVY, "numpy", "cv2", "openvino", "pydicom", "PIL", "typer"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["analyze", "--help"], ["models", "--help"]])
def test_help_loads_no_torch(arguments: list[str]) -> None:
    loaded = loaded_by(run_front(*arguments))
    assert not loaded & set(HEAVY)
    if arguments[0].startswith("--"):
        assert not loaded & {"numpy", "cv2", "openvino"}


def test_the_check_above_can_fail() -> None:
    assert "json" in loaded_by("import json")
    if importlib.util.find_spec("torch") is not None:
        assert "torch" in loaded_by("import torch")


def test_public_names() -> None:
    assert lungscope.__version__ == "0.1.0"
    assert {"read", "Analyzer", "Report"} <= set(dir(lungscope))
    assert lungscope.Analyzer.__name__ == "Analyzer"
    with pytest.raises(AttributeError, match=r"no attribute 'Analyser'; it has Analyzer, Report"):
        _ = lungscope.Analyser


@pytest.mark.parametrize("name", front.COMMANDS)
def test_help_of_every_command_is_known_without_loading_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "load", lambda name: pytest.fail(f"{name} was loaded"))
    done = CliRunner().invoke(front.app, ["--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert front.COMMANDS[name].help in done.output


@pytest.mark.parametrize("name", front.COMMANDS)
def test_every_command_has_a_module_with_an_app(name: str) -> None:
    entry = front.COMMANDS[name]
    if entry.extra is not None:
        pytest.importorskip("torch", reason=f"`lungscope {name}` needs the extra {entry.extra!r}")
    done = CliRunner().invoke(front.app, [name, "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "Usage: " in done.output


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "needs_absent.py"
    module.write_text("import absent_package_of_an_extra")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(front.COMMANDS, "absent", front.Entry("needs_absent", "…", extra="train"))
    with pytest.raises(MissingExtraError, match=r"pip install 'lungscope\[train\]'"):
        front.load("absent")
    monkeypatch.setitem(front.COMMANDS, "absent", front.Entry("needs_absent", "…"))
    with pytest.raises(ModuleNotFoundError):
        front.load("absent")


def test_an_error_is_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["lungscope", "models", "verify", str(tmp_path), "--json"])
    with pytest.raises(SystemExit) as stop:
        front.main()
    assert stop.value.code == 3
    output = capsys.readouterr()
    assert output.err.startswith("lungscope: No weights bundle at ")
    assert json.loads(output.out)["error"]["code"] == "bundle"


def test_usage_errors_are_status_two() -> None:
    done = program("anlyze")
    assert done.returncode == 2
    assert "Did you mean 'analyze'?" in done.stderr
    assert program("analyze").returncode == 2
    assert program("analyze", "--no-such-option").returncode == 2
    assert "Traceback" not in done.stderr
