"""Run the program as users do, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

import lungscope
from lungscope.cli import main as front

SRC = str(Path(lungscope.__file__).parents[1])


def environment() -> dict[str, str]:
    path = os.pathsep.join([SRC, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "NO_COLOR": "1"}


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run a piece of Python in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=600, check=False
    )


def program(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `lungscope` with these arguments in a fresh process."""
    return subprocess.run(
        [sys.executable, "-m", "lungscope.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
        check=False,
    )


def run(*arguments: object) -> Any:
    """What `lungscope` with these arguments and --json prints, in this process."""
    done = CliRunner().invoke(front.app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)
