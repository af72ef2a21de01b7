"""Fixtures that more than one test module uses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bundles import write_bundle
from lungscope.pipeline import Analyzer


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled graphs of test bundles stay out of the user's cache."""
    before = os.environ.get("LUNGSCOPE_CACHE")
    os.environ["LUNGSCOPE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["LUNGSCOPE_CACHE"]
    else:
        os.environ["LUNGSCOPE_CACHE"] = before


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small valid bundle."""
    return write_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def analyzer(tiny: Path) -> Analyzer:
    return Analyzer(tiny, device="cpu")
