"""The API against requests made from its own description: nothing that a client sends may break it.

docs/web.md has the command for thousands of them.
"""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import Serve

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
#: Requests made up for each operation.
CASES = 25


@pytest.fixture(scope="module")
def address(serve: Serve, tiny: Path) -> str:
    return serve("--model", tiny, "--rate", "0", "--max-upload", "1").url


@pytest.mark.parametrize("of_a_film", [False, True])
def test_made_up_requests_break_nothing(address: str, film: bytes, of_a_film: bool) -> None:
    """of_a_film: ask about a film that is there, and not about made-up ones."""
    schema = schemathesis.openapi.from_url(f"{address}openapi.json")
    sent = httpx.post(f"{address}v1/analyses?wait=true", files={"file": ("a.png", film)}, timeout=60).json()
    asked = 0

    def ask(case: schemathesis.Case) -> None:
        nonlocal asked
        if of_a_film:
            case.path_parameters["key"] = sent["id"]
        case.call_and_validate(checks=CHECKS)
        asked += 1

    for result in schema.get_all_operations():
        operation = result.ok()
        if of_a_film and (operation.method.upper() != "GET" or "{key}" not in operation.path):
            continue
        few = settings(
            max_examples=CASES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        few(given(operation.as_strategy())(ask))()
    assert asked > CASES
