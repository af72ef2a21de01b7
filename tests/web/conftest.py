"""The application in this process, and the program in one of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from serving import Serve, encoded, serving
from starlette.testclient import TestClient

from films import draw
from lungscope.cli.analyze import demo_film
from lungscope.pipeline import Analyzer
from lungscope.web.app import create_app


@pytest.fixture(scope="session")
def film() -> bytes:
    """A film that the tiny bundle finds disease in."""
    return encoded(draw(opacities=[(0.7, 0.28, 0.12)]))


@pytest.fixture(scope="module")
def client(analyzer: Analyzer) -> Iterator[TestClient]:
    with TestClient(create_app(analyzer, demo=demo_film()), base_url="http://localhost") as client:
        yield client


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """Start servers that end with the module."""
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(serving(*arguments))
