"""What a result was measured with."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lungscope.bundle import sha256_of
from lungscope.hardware import cores, processor
from lungscope.pipeline import Analyzer


def facts(analyzer: Analyzer, split: list[Path]) -> dict[str, Any]:
    """What a result was measured with: bundle, weights, splits, commit, versions, hardware."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "bundle": analyzer.bundle.name,
        "bundle_version": analyzer.bundle.version,
        "weights": {weights.path.name: weights.sha256 for weights in analyzer.bundle.weights},
        "split": {path.name: sha256_of(path) for path in split},
        "commit": commit(),
        "versions": analyzer.versions,
        "hardware": {**machine(), "device": analyzer.device, "precision": analyzer.precision},
    }


def machine() -> dict[str, Any]:
    """The processor, how many cores of it this process has, and which of the features that matter for speed."""
    found = processor()
    return {"processor": found["name"], "cores": cores(), "features": found["features"]}


def commit() -> str | None:
    """The commit of the checkout that this file belongs to, "-dirty" where files differ from it; for an installed
    package, or without git, what LUNGSCOPE_COMMIT says; else None."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        same = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False).returncode == 0
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LUNGSCOPE_COMMIT") or None
    return head.stdout.strip() + ("" if same else "-dirty")
