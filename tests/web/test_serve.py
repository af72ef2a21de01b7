"""The program as it is run: a flood with hostile films in it, uploads that end too early or never, its end."""

from __future__ import annotations

import json
import platform
import select
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import httpx
import numpy as np
import pytest
from serving import Serve, Server, ct_slice, encoded, png_header, serving

from films import draw
from lungscope.cli.analyze import demo_film
from lungscope.pipeline import Analyzer
from lungscope.readers import decode
from programs import program, python

UPLOAD_MB = 4
#: What may stay above the level before, in megabytes: heaps of threads that were not there before.
SLACK_MB = 60


def right_films(count: int) -> list[bytes]:
    """Films that differ in size and disease."""
    films = []
    for number in range(count):
        spots = [(0.3 + 0.01 * number, 0.28, 0.04 + 0.002 * number)]
        films.append(encoded(draw(900 + 20 * number, 800 + 20 * number, opacities=spots), (".png", ".jpg")[number % 2]))
    return films


def hostile() -> list[dict[str, Any]]:
    """Ten requests that must be refused, as arguments of httpx.post."""
    photo = np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)
    form = {"content-type": "multipart/form-data; boundary=x"}
    files = [
        ("bomb.png", png_header(60_000, 60_000), "image/png"),
        ("text.png", b"this is no image", "image/png"),
        ("../../../../etc/passwd", b"root:x:0:0", "application/octet-stream"),
        ("cut.dcm", demo_film().read_bytes()[:200_000], "application/dicom"),
        ("photo.png", cv2.imencode(".png", photo)[1].tobytes(), "image/png"),
        ("page.html", b"<html></html>", "text/html"),
        ("over.png", b"\x89PNG" + bytes((UPLOAD_MB + 1) * 2**20), "image/png"),
        ("empty.png", b"", "image/png"),
        ("slice.dcm", ct_slice(), "application/dicom"),
    ]
    return [*({"files": {"file": file}} for file in files), {"content": b"no form at all", "headers": form}]


@pytest.mark.slow
def test_a_flood_with_hostile_films_in_it(serve: Serve, tiny: Path, analyzer: Analyzer) -> None:
    server = serve("--model", tiny, "--max-upload", str(UPLOAD_MB), "--rate", "0")
    films = right_films(40)
    expected = [analyzer.analyze(decode(film, "film")).to_json()["classification"] for film in films]
    requests: list[dict[str, Any]] = [
        {"files": {"file": (f"film {number}.png", film)}} for number, film in enumerate(films)
    ]
    for number, request in enumerate(hostile()):
        requests.insert(5 * number, request)
    with httpx.Client(base_url=server.url, timeout=120, limits=httpx.Limits(max_connections=60)) as client:

        def send(request: dict[str, Any]) -> httpx.Response:
            return client.post("v1/analyses", params={"wait": "true"}, **request)

        def flood() -> list[httpx.Response]:
            with ThreadPoolExecutor(len(requests)) as pool:
                answers = list(pool.map(send, requests))
            for answer in answers:
                if answer.status_code == 200:
                    assert client.delete(f"v1/analyses/{answer.json()['id']}").status_code == 204
            return answers

        flood()  # heaps, threads and caches that stay
        before = server.memory()
        slowest = 0.0
        stop = threading.Event()

        def watch() -> None:
            nonlocal slowest
            with httpx.Client(base_url=server.url, timeout=30) as other:
                while not stop.is_set():
                    start = time.perf_counter()
                    assert other.get("healthz").json()["status"] == "ok"
                    slowest = max(slowest, time.perf_counter() - start)
                    time.sleep(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            answers = flood()
        finally:
            stop.set()
            watcher.join()
        assert Counter(answer.status_code // 100 for answer in answers) == {2: 40, 4: 10}
        for request, answer in zip(requests, answers, strict=True):
            if answer.status_code != 200:
                assert set(answer.json()["error"]) == {"code", "message"}
                assert not request.get("files", {"file": ("",)})["file"][0].startswith("film ")
                continue
            number = int(answer.json()["name"].removeprefix("film ").removesuffix(".png"))
            assert answer.json()["report"]["classification"] == expected[number]
        assert slowest < 2
        assert client.get("healthz").json()["waiting"] == 0
        deadline = time.monotonic() + 10
        while server.memory() > before + SLACK_MB and time.monotonic() < deadline:
            time.sleep(0.2)
        assert server.memory() < before + SLACK_MB


FAULTS = """
import resource, uvicorn
from lungscope.cli.serve import app

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(b"1") * 2**23 for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

uvicorn.Server.run = lambda self, sockets: print(faults(), faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to give memory back")
def test_freed_arrays_go_back_to_the_system(tiny: Path) -> None:
    done = python(f"{FAULTS}app(['--model', {str(tiny)!r}, '--port', '0'])")
    assert done.returncode == 0, done.stderr
    assert min(map(int, done.stdout.splitlines()[-1].split())) > 1000, "pages that went come back cleared"


def test_many_results_can_be_open(tiny: Path) -> None:
    few = "import resource as r; most = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (256, most))"
    shown = "import uvicorn; uvicorn.Server.run = lambda *_, **__: print(r.getrlimit(r.RLIMIT_NOFILE)[0] == most)"
    done = python(
        f"{few}\n{shown}\nfrom lungscope.cli.serve import app\napp(['--model', {str(tiny)!r}, '--port', '0'])"
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "True", done


def test_an_endless_upload_is_cut_off(serve: Serve, tiny: Path) -> None:
    server = serve("--model", tiny, "--max-upload", "1")
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        while True:
            sent += 2**16
            yield bytes(2**16)

    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/analyses HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        )
        connection.settimeout(0.01)
        answer = b""
        for piece in endless():
            connection.settimeout(20)
            connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
            connection.settimeout(0.001)
            try:
                answer = connection.recv(2**16)
                break
            except TimeoutError:
                assert sent < 64 * 2**20, "nobody stopped it"
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_client_that_goes_away_frees_its_place(serve: Serve, tiny: Path, film: bytes) -> None:
    server = serve("--model", tiny, "--queue", "1")
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(
            b"POST /v1/analyses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
            b'Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\nContent-Disposition: form-data; name="file"'
        )
        for _ in range(200):
            if httpx.get(f"{server.url}healthz").json()["waiting"] == 1:
                break
            time.sleep(0.02)
        busy = httpx.post(f"{server.url}v1/analyses", files={"file": ("a.png", film)})
        assert (busy.status_code, busy.json()["error"]["code"]) == (429, "busy")
    for _ in range(200):
        if httpx.get(f"{server.url}healthz").json()["waiting"] == 0:
            break
        time.sleep(0.02)
    answer = httpx.post(f"{server.url}v1/analyses?wait=true", files={"file": ("a.png", film)}, timeout=60)
    assert answer.status_code == 200
    assert 'status="500"' not in httpx.get(f"{server.url}metrics").text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_it_is_stopped(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, film: bytes, number: signal.Signals
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with serving("--model", tiny) as server:
        answer = httpx.post(f"{server.url}v1/analyses?wait=true", files={"file": ("a.png", film)}, timeout=60)
        assert answer.status_code == 200
        (folder,) = tmp_path.glob("lungscope-serve-*")
        assert folder.stat().st_mode & 0o077 == 0, "nobody else can look into it"
        assert list(folder.rglob("*.npy"))
        with httpx.stream("GET", f"{server.url}v1/analyses/{answer.json()['id']}/events") as events:
            assert "event: done" in events.read().decode()
        server.process.send_signal(number)
        assert server.process.wait(timeout=20) == 0
        assert server.process.stderr is not None and server.process.stderr.read() == ""
    assert list(tmp_path.glob("lungscope-serve-*")) == []


def limited(**limits: float) -> tuple[str, str]:
    """The program with these numbers of its own changed."""
    return "-c", f"from lungscope.cli import serve; vars(serve).update({limits}); serve.app()"


def connections(server: Server, count: int) -> Iterator[socket.socket]:
    address = urlsplit(server.url)
    return (socket.create_connection((address.hostname, address.port), timeout=20) for _ in range(count))


def test_connections_that_ask_for_nothing_are_closed(tiny: Path) -> None:
    head = b"POST /v1/analyses HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    with serving("--model", tiny, program=limited(IDLE=0.5)) as server:
        silent, late, again, slow = connections(server, 4)
        with silent, late, again, slow:
            late.sendall(head)
            again.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            slow.sendall(head + b"Content-Length: 9\r\n\r\n")
            assert again.recv(12) == b"HTTP/1.1 200"
            again.sendall(head)
            assert silent.recv(1) == late.recv(1) == b""
            assert again.makefile("rb").read().endswith(b"}"), "closed behind its answer"
            time.sleep(1)
            slow.sendall(b"--x--\r\n\r\n")
            assert slow.recv(12) == b"HTTP/1.1 400", "an upload has its own time"


def test_idle_connections_make_room_for_others(tiny: Path) -> None:
    with serving("--model", tiny, program=limited(CONNECTIONS=4)) as server, ExitStack() as stack:
        idle = [stack.enter_context(connection) for connection in connections(server, 8)]
        assert httpx.get(f"{server.url}healthz").status_code == 200
        assert len(select.select(idle, [], [], 0)[0]) >= 4


ENDLESS = """
import os, signal, time
from lungscope.cli.serve import app
from lungscope.pipeline import Analyzer
from lungscope.web import jobs

def endless(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

Analyzer.analyze, jobs.PATIENCE = endless, 0.2
app()
"""


def test_a_film_without_end_does_not_keep_it_from_ending(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, film: bytes
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with serving("--model", tiny, program=("-c", ENDLESS)) as server:
        httpx.post(f"{server.url}v1/analyses", files={"file": ("a.png", film)})
        assert server.process.wait(timeout=20) == 0
        assert server.process.stderr is not None and "1 films were given up" in server.process.stderr.read()
    assert list(tmp_path.glob("lungscope-serve-*")) == []


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--model", "/no/such/bundle"], 3, "No bundle '/no/such/bundle'"),
        (["--keep", "/dev/null/folder"], 2, "--keep /dev/null/folder can not be a folder"),
        (["--host", "203.0.113.1"], 2, "Can not listen on 203.0.113.1"),
    ],
)
def test_what_can_not_run(tiny: Path, arguments: list[str], status: int, message: str) -> None:
    done = program("serve", *([] if "--model" in arguments else ["--model", tiny]), *arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = program("serve", "--model", tiny, "--port", str(taken.getsockname()[1]), "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == "usage"
