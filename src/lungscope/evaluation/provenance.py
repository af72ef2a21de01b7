"""What a result was measured with."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lungscope.bundle import Bundle, sha256_of
from lungscope.data.split import Split, parts_by_store, parts_digest
from lungscope.data.store import Store
from lungscope.hardware import cores, processor
from lungscope.pipeline import Analyzer


def facts(analyzer: Analyzer, split: list[Path]) -> dict[str, Any]:
    """What a result was measured with: bundle, weights, splits, commit, versions, hardware."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "bundle": analyzer.bundle.name,
        "bundle_version": analyzer.bundle.version,
        "weights": {weights.path.name: weights.sha256 for weights in analyzer.bundle.weights},
        "split": {name: sha256_of(path) for name, path in zip(_told_apart(split), split, strict=True)},
        "commit": commit(),
        "versions": analyzer.versions,
        "hardware": {**machine(), "device": analyzer.device, "precision": analyzer.precision},
    }


def _told_apart(paths: Sequence[Path]) -> list[str]:
    """Files by name, and by path where several have one name."""
    names = [path.name for path in paths]
    return [name if names.count(name) == 1 else path.as_posix() for name, path in zip(names, paths, strict=True)]


def split_of_training(bundle: Bundle, data: Sequence[tuple[Store, Split]]) -> dict[str, bool | None]:
    """By network, whether the val and test parts of `data` are those that it was trained with, of the stores that it
    was trained on and that `data` has by their names. None where that can not be told: `data` has none of them, or the
    bundle does not say. A bundle that says it of all its stores together, as those of before do, needs all that have
    such parts. Raises DataError where a film is not in its split."""
    runs, members = bundle.manifest.get("training", {}).get("runs", []), len(bundle.segmenter.members)
    networks = {"segmenter": runs[:members]} | ({} if bundle.classifier is None else {"classifier": runs[members:]})
    found = {}
    for network, own in networks.items():
        found[network] = _all([same_parts(run, data) for run in own] or [None])
    return found


def same_parts(run: dict[str, Any], data: Sequence[tuple[Store, Split]]) -> bool | None:
    """`split_of_training` of one run's facts: of it, of those that it is the mean of, and of that which it started
    from."""
    before = [*run.get("mean_of", ()), *filter(None, [run.get("initial")])]
    return _all([_own_parts(run, data), *(same_parts(other, data) for other in before)])


def _all(same: Sequence[bool | None]) -> bool | None:
    return False if False in same else None if None in same else True


def _own_parts(run: dict[str, Any], data: Sequence[tuple[Store, Split]]) -> bool | None:
    given = [(store, split) for store, split in data if store.name in run.get("stores", [])]
    if not given or "parts" not in run:
        return None
    if "parts_by_store" in run:
        known = run["parts_by_store"]
        return all(_same(parts, known[name]) for name, parts in parts_by_store(given).items())
    if _same(parts_digest(given), run["parts"]):
        return True
    # Stores of pseudo-labels are for training alone.
    missing = {*run["stores"]} - {store.name for store, _ in given} - {*run.get("pseudo_labels", {})}
    return None if missing else False


def _same(parts: dict[str, str], others: dict[str, str]) -> bool:
    return all(parts[part] == others[part] for part in ("val", "test"))


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
