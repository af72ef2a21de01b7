"""The gate before the application: who may ask, from where, how much, how often."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from lungscope.errors import BusyError
from lungscope.pipeline import Analyzer
from lungscope.web.app import create_app
from lungscope.web.limits import CLIENTS, HEADERS, Limits, Rate


@pytest.fixture(scope="module")
def named(analyzer: Analyzer) -> TestClient:
    return TestClient(create_app(analyzer, hosts=["Films.example"]), base_url="http://localhost")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 404),
        ("127.0.0.1", 404),
        ("[::1]:8000", 404),
        ("192.168.0.7:80", 404),
        ("films.example", 404),
        ("FILMS.example:8443", 404),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("[::bad", 421),
        ("", 421),
    ],
)
def test_another_sites_name_is_not_answered_to(named: TestClient, host: str, status: int) -> None:
    assert named.get("/nowhere", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 405),
        ({"origin": "http://localhost"}, 405),
        ({"origin": "http://localhost", "sec-fetch-site": "same-origin"}, 405),
        ({"sec-fetch-site": "none"}, 405),
        ({"origin": "http://localhost:81"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_another_sites_page_can_not_send(named: TestClient, headers: dict[str, str], status: int) -> None:
    for method in ("POST", "DELETE"):
        assert named.request(method, "/healthz", headers=headers).status_code == status
    assert named.get("/nowhere", headers=headers).status_code == 404, "reading is kept apart by the browser"


def test_every_answer_is_dressed(named: TestClient) -> None:
    with named:
        answers = [
            named.get(path) for path in ("/", "/static/app.js", "/static/style.css", "/healthz", "/openapi.json", "/no")
        ]
        answers.append(named.get("/", headers={"host": "evil.example"}))
    for answer in answers:
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS, answer.url
        assert "access-control-allow-origin" not in answer.headers
    policy = HEADERS["Content-Security-Policy"]
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy and "default-src 'none'" in policy


def test_the_page_has_no_inline_code_and_no_outside(named: TestClient) -> None:
    page = named.get("/").text
    assert "style=" not in page and "<style" not in page and "onclick" not in page
    assert page.count("<script") == page.count('<script type="module" src="static/app.js"></script>') == 1
    for path in ("/", "/static/app.js", "/static/viewer.js", "/static/style.css"):
        text = named.get(path).text
        assert "innerHTML" not in text and "https://" not in text and "localStorage" not in text


def test_a_bucket_refills(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = Rate(3)
    for _ in range(3):
        rate.take("a", 0)
    with pytest.raises(BusyError) as busy:
        rate.take("a", 1)
    assert busy.value.retry_after == 19
    rate.take("b", 1)
    with pytest.raises(BusyError):
        rate.take("a", 19)
    rate.take("a", 20)
    for _ in range(3):
        rate.take("a", 1000)
    with pytest.raises(BusyError):
        rate.take("a", 1000)
    for _ in range(1000):
        Rate(0).take("a", 0)


def test_a_flood_of_clients_is_forgotten() -> None:
    rate = Rate(1)
    rate.take("first", 0)
    for number in range(CLIENTS):
        rate.take(str(number), 0)
    rate.take("first", 0)
    with pytest.raises(BusyError):
        rate.take(str(CLIENTS - 1), 0)


def test_open_requests_are_bounded(analyzer: Analyzer) -> None:
    client = TestClient(create_app(analyzer, limits=Limits(requests=0)), base_url="http://localhost")
    answer = client.get("/healthz")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["code"] == "busy"
