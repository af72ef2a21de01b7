"""Many films are deleted by one request."""

from __future__ import annotations

import json

from starlette.testclient import TestClient

FILMS = "/v1/analyses"


def test_all_that_are_listed_go(client: TestClient, film: bytes) -> None:
    def sent() -> str:
        answer = client.post(FILMS, params={"wait": "true"}, files={"file": ("film.png", film, "image/png")})
        return str(answer.json()["id"])

    kept, *gone = (sent() for _ in range(3))
    answer = client.request("DELETE", FILMS, json=[gone[0], "no such film", gone[1], gone[1]])
    assert (answer.status_code, answer.content) == (204, b"")
    assert [client.get(f"{FILMS}/{key}").status_code for key in (kept, *gone)] == [200, 404, 404]
    most = json.dumps([gone[0]] * 2500)
    for body, status, code in (
        (most, 204, None),
        (most + " " * 2**16, 413, "too-large"),
        ("{}", 400, "request"),
        ("[1]", 400, "request"),
        ("[" * 10_000, 400, "request"),
        (b"\xff", 400, "request"),
        ("", 400, "request"),
    ):
        answer = client.request("DELETE", FILMS, content=body)
        assert answer.status_code == status
        assert code is None or answer.json()["error"]["code"] == code
    foreign = client.request("DELETE", FILMS, json=[kept], headers={"origin": "http://evil.example"})
    assert foreign.status_code == 403
    assert client.get(f"{FILMS}/{kept}").status_code == 200
