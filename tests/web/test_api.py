"""The API: a film in, every part out, and one form for everything that goes wrong."""

from __future__ import annotations

import errno
import io
import json
import re
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import anyio
import cv2
import numpy as np
import pydicom
import pytest
from httpx import Response
from serving import ct_slice, encoded, png_header
from starlette.testclient import TestClient

from bundles import write_bundle
from films import draw
from lungscope.cli.analyze import demo_film
from lungscope.errors import HTTP_STATUS, LungscopeError, status_of
from lungscope.pipeline import Analyzer
from lungscope.readers import decode
from lungscope.report import DISCLAIMER, Report
from lungscope.stages.severity import definition
from lungscope.web import jobs
from lungscope.web.app import create_app, plain_name
from lungscope.web.limits import HEADERS, Limits
from lungscope.web.parts import FILM_SIDE, PARTS, Result
from lungscope.writers import dicom
from lungscope.writers.overlay import EVIDENCE_SCALE

FILM = "/v1/analyses"


def send(client: TestClient, data: bytes, name: str = "film.png", kind: str = "image/png", **query: str) -> Response:
    return client.post(FILM, params={"wait": "true", **query}, files={"file": (name, data, kind)})


def part(client: TestClient, answer: Response, name: str) -> Response:
    return client.get(f"{FILM}/{answer.json()['id']}/{name}")


def picture(answer: Response) -> Any:
    assert answer.status_code == 200, answer.text
    return cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_UNCHANGED)


def refused(answer: Response, status: int, code: str) -> str:
    """Assert that `answer` is an error in the one form, and return its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"code", "message"}
    assert body["error"]["code"] == code, body
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    return str(body["error"]["message"])


def settle(client: TestClient) -> None:
    """Until no film is worked on, nor written anywhere."""
    deadline = time.monotonic() + 20
    while client.get("/healthz").json()["waiting"] and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.fixture(scope="module")
def done(client: TestClient, film: bytes) -> Response:
    answer = send(client, film)
    assert answer.status_code == 200, answer.text
    return answer


def test_the_answer_is_what_the_library_says(done: Response, analyzer: Analyzer, film: bytes) -> None:
    body = done.json()
    assert (body["status"], body["stage"], body["error"], body["name"]) == ("done", None, None, "film.png")
    expected = analyzer.analyze(decode(film, "film.png", path=Path("film.png"))).to_json()
    for changing in (body["report"]["run"], expected["run"]):
        del changing["timings_ms"], changing["created"]
    assert body["report"] == expected
    assert Report.from_json(body["report"]).to_json() == body["report"]
    assert body["report"]["disclaimer"] == DISCLAIMER


def test_queued_first_then_done(client: TestClient, film: bytes) -> None:
    answer = client.post(FILM, files={"file": ("film.png", film)})
    assert answer.status_code == 202
    assert answer.json()["report"] is None
    path = f"{FILM}/{answer.json()['id']}"
    events = client.get(f"{path}/events")
    assert events.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in events.text.strip().split("\n\n")]
    steps = [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]
    stages = ["read", "quality", "segmentation", "classification", "localization", "severity"]
    assert [step["stage"] for _, step in steps] == [None, *stages, None]
    assert [name for name, _ in steps] == ["progress"] * 7 + ["done"]
    assert client.get(path).json()["status"] == "done"


@pytest.mark.parametrize("path", [FILM, f"{FILM}/demo"])
def test_a_location_is_right_in_a_proxys_subfolder(client: TestClient, film: bytes, path: str) -> None:
    answer = client.post(path, files={"file": ("film.png", film)})
    folder = "https://films.example:8443/lungs"
    assert urljoin(folder + path, answer.headers["location"]) == f"{folder}{FILM}/{answer.json()['id']}"


def test_parts_hold_what_the_report_holds(client: TestClient, done: Response, analyzer: Analyzer, film: bytes) -> None:
    report = analyzer.analyze(decode(film, "film.png", path=Path("film.png")))
    assert report.saliency is not None and report.severity is not None
    np.testing.assert_array_equal(picture(part(client, done, "lungs.png")), report.lungs.mask * np.uint8(255))
    np.testing.assert_array_equal(
        np.load(io.BytesIO(part(client, done, "saliency.npy").content), allow_pickle=False), report.saliency.map
    )
    np.testing.assert_array_equal(
        picture(part(client, done, "film.png")), np.rint(report.film.pixels * 255).astype(np.uint8)
    )
    heat = picture(part(client, done, "saliency.png"))
    assert heat.shape == (*report.film.shape, 4)
    expected = 255 * 0.8 * np.sqrt(report.saliency.map.clip(0, EVIDENCE_SCALE) / EVIDENCE_SCALE)
    np.testing.assert_allclose(heat[..., 3], expected, atol=0.51)
    assert part(client, done, "report.json").json() == done.json()["report"]
    page = part(client, done, "report.html")
    assert DISCLAIMER in page.text
    assert page.headers["content-disposition"] == "attachment; filename*=utf-8''film-report.html"
    assert picture(part(client, done, "overlay.png")).ndim == 3


def test_layers_are_the_lungs_and_zones(client: TestClient, done: Response, analyzer: Analyzer, film: bytes) -> None:
    report = analyzer.analyze(decode(film, "film.png"))
    assert report.severity is not None and report.saliency is not None and report.saliency.peak is not None
    layers = part(client, done, "layers.json").json()
    assert (layers["height"], layers["width"]) == report.film.shape
    row, column = report.saliency.peak
    assert layers["peak"] == [column + 0.5, row + 0.5]

    def filled(rings: list[Any]) -> Any:
        canvas = np.zeros(report.film.shape, np.uint8)
        cv2.fillPoly(canvas, [np.round(np.array(ring) - 0.5).astype(np.int32) for ring in rings], 1)
        return canvas.astype(bool)

    for side, mask in (("right", report.lungs.right), ("left", report.lungs.left)):
        assert np.count_nonzero(filled(layers["lungs"][side]) ^ mask) < 0.02 * np.count_nonzero(mask)
    assert [zone["letter"] for zone in layers["zones"]] == list("ABCDEF")
    assert layers["contradicts"], "the class is Normal, and zone C scores 3"
    for entry in layers["zones"]:
        zone = report.severity.zones[entry["letter"]]
        assert zone is not None and entry["score"] == zone.score
        inside = filled(entry["outline"])
        rows = np.flatnonzero(inside.any(axis=1))
        assert (rows[0], rows[-1] + 1) == zone.rows
        x, y = entry["label"]
        assert inside[int(y), int(x)]


def test_a_large_film_is_shrunk_to_be_shown_and_only_then(client: TestClient) -> None:
    answer = send(client, encoded(draw(2600, 2000)))
    assert picture(part(client, answer, "film.png")).shape == (FILM_SIDE, round(2000 * FILM_SIDE / 2600))
    assert picture(part(client, answer, "lungs.png")).shape == (2600, 2000)
    assert part(client, answer, "layers.json").json()["width"] == 2000


def test_dicom_objects_stand_in_the_films_own_study(client: TestClient) -> None:
    answer = client.post(f"{FILM}/demo", params={"wait": "true"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["name"] == "RG1_UNCR.dcm"
    film = pydicom.dcmread(demo_film(), stop_before_pixels=True)
    for name, modality in {"lungs.dcm": "SEG", "report.dcm": "SR"}.items():
        made = part(client, answer, name)
        assert made.status_code == 200, (name, made.text)
        dataset = pydicom.dcmread(io.BytesIO(made.content))
        assert dataset.Modality == modality
        assert (dataset.StudyInstanceUID, dataset.PatientID) == (film.StudyInstanceUID, film.PatientID)
    assert "DICOM already" in refused(part(client, answer, "film.dcm"), 404, "not-found")


def test_dicom_objects_of_a_picture_stand_in_a_new_study(client: TestClient, done: Response) -> None:
    studies = set()
    for name in ("film.dcm", "lungs.dcm"):
        made = part(client, done, name)
        assert made.status_code == 200, made.text
        studies.add(pydicom.dcmread(io.BytesIO(made.content)).StudyInstanceUID)
    assert len(studies) == 1


def test_a_bundle_that_only_segments(tmp_path: Path, film: bytes) -> None:
    analyzer = Analyzer(write_bundle(tmp_path / "lungs", classifier=False), device="cpu")
    with TestClient(create_app(analyzer), base_url="http://localhost") as client:
        answer = send(client, film)
        assert answer.json()["report"]["classification"] is None
        layers = part(client, answer, "layers.json").json()
        assert layers["zones"] == [] and layers["lungs"]["left"] and layers["peak"] is None
        for name in ("saliency.npy", "saliency.png"):
            assert "only finds lungs" in refused(part(client, answer, name), 404, "not-found")
        (model,) = client.get("/v1/models").json()["models"]
        assert (model["classifier"], model["labels"]) == (None, None)
        refused(client.post(f"{FILM}/demo"), 501, "missing-extra")


def test_a_bundle_whose_severity_is_made_of_opacity(tmp_path: Path, film: bytes) -> None:
    analyzer = Analyzer(write_bundle(tmp_path / "opaque", opacity=True), device="cpu")
    with TestClient(create_app(analyzer), base_url="http://localhost") as client:
        answer = send(client, film)
        severity = answer.json()["report"]["severity"]
        assert (severity["basis"], severity["definition"]) == ("opacity", definition(0.1))
        assert {zone["letter"] for zone in part(client, answer, "layers.json").json()["zones"]} == set("ABCDEF")


def test_models_and_health(client: TestClient, analyzer: Analyzer) -> None:
    (model,) = client.get("/v1/models").json()["models"]
    assert model["name"] == "tiny"
    assert model["weights"] == {weights.path.name: weights.sha256 for weights in analyzer.bundle.weights}
    health = client.get("/healthz").json()
    assert (health["status"], health["demo"], health["upload_bytes"]) == ("ok", True, Limits().upload_bytes)
    assert health["kept_seconds"] == Limits().kept_seconds


def test_metrics_count_and_name_nobody(client: TestClient, done: Response) -> None:
    text = client.get("/metrics").text
    assert 'lungscope_analyses_total{outcome="done"}' in text
    assert 'lungscope_stage_seconds_count{stage="segmentation"}' in text
    assert 'lungscope_http_requests_total{method="POST",route="/v1/analyses",status="200"}' in text
    assert done.json()["id"] not in text and "film" not in text.replace("lungscope_films", "")


def test_films_that_can_not_be_used(client: TestClient, film: bytes) -> None:
    colour = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    photo = cv2.imencode(".png", colour)[1].tobytes()
    broken = [
        (b"", "unreadable", "is empty"),
        (b"this is no image", "unreadable", "is not an image"),
        (film[:300], "unreadable", "cut short"),
        (png_header(60000, 60000), "unsupported", "promises more than the 40,000,000"),
        (png_header(7000, 6000), "unsupported", "at most 40,000,000"),
        (photo, "unsupported", "colour"),
        (ct_slice(), "unsupported", "modality CT"),
        (demo_film().read_bytes()[:100_000], "unreadable", "cut short"),
        (encoded(np.full((300, 300), 0.5, np.float32)), "quality", "blank"),
        (encoded(np.tile(np.linspace(0.65, 0.95, 300, dtype=np.float32), (300, 1))), "quality", "No lungs"),
    ]
    for data, code, reason in broken:
        message = refused(send(client, data, "one film.png"), 422, code)
        assert message.startswith("one film.png: ") or "one film.png" in message
        assert reason in message


def test_a_film_that_failed_says_so_wherever_it_is_asked_for(client: TestClient) -> None:
    sent = client.post(FILM, files={"file": ("text.png", b"text")}).json()
    events = client.get(f"{FILM}/{sent['id']}/events").text
    assert events.strip().split("\n\n")[-1].startswith("event: failed")
    body = client.get(f"{FILM}/{sent['id']}").json()
    assert (body["status"], body["error"]["code"]) == ("failed", "unreadable")
    refused(client.get(f"{FILM}/{sent['id']}/film.png"), 422, "unreadable")


def test_a_result_that_the_disk_has_no_room_for_failed(
    client: TestClient, film: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(report: Report, folder: Path) -> Report:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jobs, "park", full)
    before = client.get("/metrics").text
    assert "failed (OSError)" in refused(send(client, film), 500, "internal")
    sent = client.post(FILM, files={"file": ("film.png", film)}).json()
    events = client.get(f"{FILM}/{sent['id']}/events").text
    assert [name for name in jobs.FINISHED if f"event: {name}" in events] == ["failed"]
    refused(client.get(f"{FILM}/{sent['id']}/report.json"), 500, "internal")
    outcome = 'lungscope_analyses_total{outcome="done"}'
    assert [line for line in before.splitlines() if line.startswith(outcome)] == [
        line for line in client.get("/metrics").text.splitlines() if line.startswith(outcome)
    ]


def test_a_result_that_is_told_stays_whatever_fails_after_it(
    client: TestClient, film: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(jobs.Jobs, "_make_room", broken)
    answer = send(client, film)
    assert answer.status_code == 200
    settle(client)
    assert client.get(f"{FILM}/{answer.json()['id']}").json() == answer.json()
    assert part(client, answer, "lungs.png").status_code == 200


def test_one_step_is_the_last(tmp_path: Path) -> None:
    job = jobs.Job("key", "film.png", tmp_path)

    async def told() -> list[str]:
        return [step["status"] async for step in job.events() if step is not None]

    for status in ("running", "done", "deleted"):
        job.note(status)
    assert anyio.run(told) == ["queued", "running", "done"]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../../../etc/passwd", "passwd"),
        ("C:\\films\\one.png", "one.png"),
        ("..", "film"),
        ("a\x00b\nc.png", "abc.png"),
        ("", "film"),
        ("ü" * 200 + ".png", "ü" * 116 + ".png"),
    ],
)
def test_names_lose_their_path(name: str, kept: str) -> None:
    assert plain_name(name) == kept


def test_a_path_in_a_name_reaches_nothing(client: TestClient, film: bytes) -> None:
    answer = send(client, film, "../../etc/cron.d/film.png")
    assert answer.json()["name"] == answer.json()["report"]["source"]["path"] == "film.png"


def test_requests_that_are_none(client: TestClient, film: bytes, done: Response) -> None:
    key = done.json()["id"]
    refused(client.post(FILM), 415, "media-type")
    refused(client.post(FILM, content=film, headers={"content-type": "image/png"}), 415, "media-type")
    refused(client.post(FILM, data={"file": "text"}), 415, "media-type")
    refused(send(client, b"<html>", "a.html", "text/html"), 415, "media-type")
    form = {"content-type": "multipart/form-data; boundary=x"}
    refused(client.post(FILM, content=b"no form", headers=form), 400, "request")
    refused(client.post(FILM, content=b"", headers={"content-type": "multipart/form-data"}), 400, "request")
    refused(client.post(FILM, files={"other": ("a.png", film)}), 400, "request")
    refused(client.post(FILM, files=[("file", ("a", film)), ("file", ("b", film))]), 400, "request")
    refused(client.post(FILM, params={"wait": "perhaps"}, files={"file": ("a", film)}), 400, "request")
    refused(client.get("/nowhere"), 404, "not-found")
    refused(client.get(f"{FILM}/{'A' * 22}"), 404, "not-found")
    refused(client.get(f"{FILM}/short"), 404, "not-found")
    assert "film.png, lungs.png" in refused(client.get(f"{FILM}/{key}/lungs.bmp"), 404, "not-found")
    refused(client.get(f"{FILM}/{key}/..%2f..%2fetc%2fpasswd"), 404, "not-found")
    refused(client.get("/static/..%2fapp.py"), 404, "not-found")
    assert refused(client.put(FILM), 405, "method") and client.put(FILM).headers["allow"] == "POST"
    assert "sha256" in done.text


def test_an_upload_is_cut_off_at_the_limit(analyzer: Analyzer, film: bytes) -> None:
    limits = Limits(upload_bytes=len(film) + 10)
    with TestClient(create_app(analyzer, limits=limits), base_url="http://localhost") as client:
        assert send(client, film).status_code == 200
        assert f"{limits.upload_bytes:,}" in refused(send(client, film + b" " * 11), 413, "too-large")
        refused(send(client, film + b" " * 2**20), 413, "too-large")


def test_an_upload_has_to_arrive_in_time(analyzer: Analyzer) -> None:
    app = create_app(analyzer, limits=Limits(upload_seconds=0.05))
    told: list[Any] = []

    async def receive() -> dict[str, Any]:
        await anyio.sleep(60)
        raise AssertionError("nobody stopped waiting")

    async def send(message: Any) -> None:
        told.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=x")]
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": FILM, "root_path": ""}
    scope |= {"raw_path": FILM.encode(), "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1)}
    with TestClient(app, base_url="http://localhost") as client:
        assert client.portal is not None
        client.portal.call(app, scope, receive, send)
        assert told[0]["status"] == 408
        assert json.loads(told[1]["body"])["error"]["code"] == "slow-upload"
        assert client.get("/healthz").json()["waiting"] == 0, "its place is free again"


def test_a_film_is_gone_when_it_is_deleted(client: TestClient, film: bytes) -> None:
    key = send(client, film).json()["id"]
    assert client.delete(f"{FILM}/{key}").status_code == 204
    assert "30 minutes" in refused(client.get(f"{FILM}/{key}"), 404, "not-found")
    refused(client.get(f"{FILM}/{key}/film.png"), 404, "not-found")
    refused(client.delete(f"{FILM}/{key}"), 404, "not-found")


def test_all_that_are_listed_go(client: TestClient, film: bytes) -> None:
    kept, *gone = (send(client, film).json()["id"] for _ in range(3))
    answer = client.request("DELETE", FILM, json=[gone[0], "no such film", gone[1], gone[1]])
    assert (answer.status_code, answer.content) == (204, b"")
    assert [client.get(f"{FILM}/{key}").status_code for key in (kept, *gone)] == [200, 404, 404]
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
        answer = client.request("DELETE", FILM, content=body)
        assert answer.status_code == status
        assert code is None or answer.json()["error"]["code"] == code
    foreign = client.request("DELETE", FILM, json=[kept], headers={"origin": "http://evil.example"})
    assert foreign.status_code == 403
    assert client.get(f"{FILM}/{kept}").status_code == 200


def test_results_go_with_time_and_for_newer_ones(
    analyzer: Analyzer, film: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "SWEEP", 0.05)
    limits = Limits(kept_seconds=0.4)
    with TestClient(create_app(analyzer, limits=limits), base_url="http://localhost") as client:
        key = send(client, film).json()["id"]
        for _ in range(8):
            assert client.get(f"{FILM}/{key}").status_code == 200, "what is asked for stays"
            time.sleep(0.1)
        time.sleep(0.7)
        refused(client.get(f"{FILM}/{key}"), 404, "not-found")
    with TestClient(create_app(analyzer, limits=Limits(kept_bytes=4 * 2**20)), base_url="http://localhost") as client:
        keys = [send(client, film).json()["id"] for _ in range(4)]
        deadline = time.monotonic() + 10
        while "lungscope_results_kept 3.0" not in client.get("/metrics").text and time.monotonic() < deadline:
            time.sleep(0.05)
        refused(client.get(f"{FILM}/{keys[0]}"), 404, "not-found")
        assert client.get(f"{FILM}/{keys[-1]}").status_code == 200


@pytest.mark.parametrize(
    ("name", "stem"), [("a.b.png", "a.b"), ("胸部正面" * 25 + ".png", "胸部正面" * 16 + "胸部")], ids=["short", "long"]
)
def test_keep_writes_every_part_and_nothing_else_stays(
    analyzer: Analyzer, film: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stem: str
) -> None:
    kept, objects, calls = tmp_path / "kept", dicom.objects, []
    monkeypatch.setattr(dicom, "objects", lambda *args, **options: calls.append(1) or objects(*args, **options))
    with TestClient(create_app(analyzer, keep=kept), base_url="http://localhost") as client:
        key = send(client, film, name).json()["id"]
    assert len(calls) == 1, "five DICOM parts are made at once"
    (folder,) = kept.iterdir()
    assert folder.name == f"{stem}-{key[:8]}"
    assert {path.name for path in folder.iterdir()} == set(PARTS)
    assert json.loads((folder / "report.json").read_text())["source"]["path"] == name


def test_keep_goes_on_after_a_part_that_fails(
    analyzer: Analyzer, film: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(result: Result) -> bytes:
        raise TypeError("two values where one is allowed")

    monkeypatch.setitem(PARTS, "film.png", replace(PARTS["film.png"], make=broken))
    kept = tmp_path / "kept"
    with TestClient(create_app(analyzer, keep=kept), base_url="http://localhost") as client:
        send(client, film)
    (folder,) = kept.iterdir()
    assert {path.name for path in folder.iterdir()} == set(PARTS) - {"film.png"}
    assert f"{folder / 'film.png'} was not written" in caplog.text and "two values" in caplog.text


def test_what_is_done_is_kept_when_the_server_stops(
    analyzer: Analyzer, film: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = tmp_path / "kept"
    with TestClient(create_app(analyzer, keep=kept, workers=1), base_url="http://localhost") as client:
        keys = [client.post(FILM, files={"file": ("film.png", film)}).json()["id"] for _ in range(4)]
        assert "event: done" in client.get(f"{FILM}/{keys[-1]}/events").text
    folders = {folder.name: {path.name for path in folder.iterdir()} for folder in kept.iterdir()}
    assert folders == {f"film-{key[:8]}": set(PARTS) for key in keys}
    assert not caplog.records


@pytest.mark.parametrize("moment", ["analysis", "first part", "last part"])
def test_what_is_deleted_before_it_is_written_is_not_kept(
    analyzer: Analyzer,
    film: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    moment: str,
) -> None:
    """A film is deleted while it is analysed, or while its parts are written."""
    reached, goes_on = threading.Event(), threading.Event()

    def stop() -> None:
        reached.set()
        assert goes_on.wait(20)

    name = list(PARTS)[0 if moment == "first part" else -1]
    make, analyze = PARTS[name].make, analyzer.analyze

    def slow_part(result: Result) -> bytes:
        data = make(result)
        stop()
        return data

    def slow_analysis(*arguments: Any, **options: Any) -> Report:
        report = analyze(*arguments, **options)
        stop()
        return report

    if moment == "analysis":
        monkeypatch.setattr(analyzer, "analyze", slow_analysis)
    else:
        monkeypatch.setitem(PARTS, name, replace(PARTS[name], make=slow_part))
    kept = tmp_path / "kept"
    with TestClient(create_app(analyzer, keep=kept), base_url="http://localhost") as client:
        key = client.post(FILM, files={"file": ("film.png", film)}).json()["id"]
        assert reached.wait(20)
        assert client.delete(f"{FILM}/{key}").status_code == 204
        goes_on.set()
        settle(client)
        assert not kept.exists() or not list(kept.iterdir())
        assert "lungscope_results_kept 0.0" in client.get("/metrics").text
    assert not caplog.records


def test_what_goes_with_time_while_it_is_written_is_kept(
    analyzer: Analyzer, film: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "SWEEP", 0.02)
    name, gone = next(iter(PARTS)), threading.Event()
    make = PARTS[name].make

    def slow_part(result: Result) -> bytes:
        assert gone.wait(20)
        return make(result)

    monkeypatch.setitem(PARTS, name, replace(PARTS[name], make=slow_part))
    kept, limits = tmp_path / "kept", Limits(kept_seconds=0.05)
    with TestClient(create_app(analyzer, keep=kept, limits=limits), base_url="http://localhost") as client:
        send(client, film)
        deadline = time.monotonic() + 20
        while "lungscope_results_kept 0.0" not in client.get("/metrics").text and time.monotonic() < deadline:
            time.sleep(0.02)
        gone.set()
    (folder,) = kept.iterdir()
    assert {path.name for path in folder.iterdir()} == set(PARTS)


def test_a_full_queue_and_a_fast_client_are_told_to_wait(analyzer: Analyzer, film: bytes) -> None:
    with TestClient(create_app(analyzer, limits=Limits(per_minute=2)), base_url="http://localhost") as client:
        answers = [send(client, film) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        refused(answers[-1], 429, "busy")
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 30
        assert client.get("/healthz").status_code == 200, "asking is not counted"
    with TestClient(create_app(analyzer, limits=Limits(waiting=0)), base_url="http://localhost") as client:
        assert refused(send(client, film), 429, "busy").startswith("0 films are waiting")


def test_answers_that_nobody_reads_hold_no_memory(
    analyzer: Analyzer, film: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, clients = 2**24, 4
    long = replace(PARTS["saliency.npy"], make=lambda result: bytes(size))
    monkeypatch.setitem(PARTS, "saliency.npy", long)
    limits = Limits(unread_bytes=clients * size)
    with TestClient(create_app(analyzer, limits=limits), base_url="http://localhost") as client:
        path = f"{FILM}/{send(client, film).json()['id']}/saliency.npy"

        async def stall() -> tuple[list[int], int, list[int]]:
            """Statuses of one answer more than there is room for; bytes in use while nobody reads; bytes read later."""
            statuses: list[int] = []
            got: list[int] = []
            read = anyio.Event()

            async def tell(message: Any) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])
                elif len(message["body"]) > 1000:
                    got.append(len(message["body"]))
                    await read.wait()

            async with anyio.create_task_group() as group:
                scope = {
                    "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "path": path,
                    "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http", "state": {},
                    "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1), "server": ("localhost", 80),
                }  # fmt: skip
                for number in range(clients):
                    group.start_soon(client.app, dict(scope), anyio.sleep_forever, tell)
                    while len(got) <= number:
                        await anyio.sleep(0.01)
                held = tracemalloc.get_traced_memory()[0]
                await client.app(dict(scope), anyio.sleep_forever, tell)
                read.set()
            return statuses, held, got

        tracemalloc.start()
        try:
            assert client.portal is not None
            statuses, held, got = client.portal.call(stall)
        finally:
            tracemalloc.stop()
        assert statuses == [200] * clients + [429]
        assert held < size / 2
        assert sum(got) == clients * size
        assert client.get(path).content == bytes(size), "there is room again"


def test_openapi_names_every_part_and_every_error(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    paths = document["paths"]
    assert {"/v1/analyses", "/v1/analyses/{key}/{part}", "/v1/models", "/healthz", "/metrics"} <= set(paths)
    asked = paths["/v1/analyses/{key}/{part}"]["get"]["parameters"]
    assert asked[1]["schema"]["enum"] == list(PARTS)
    assert "HTTPValidationError" not in json.dumps(document), "errors have one form"
    for path, method in ((FILM, "post"), (f"{FILM}/demo", "post"), (f"{FILM}/{{key}}/{{part}}", "get")):
        assert {"422", "500", "503"} <= set(paths[path][method]["responses"]), "what an analysis may end with"
    schemas = document["components"]["schemas"]
    assert all("example" in schemas[name] for name in ("Analysis", "ErrorBody", "Health"))


def test_every_error_has_the_status_that_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "web.md").read_text()
    rows = re.findall(r"^\| (\d{3}) \| (.+?) \|", page, re.MULTILINE)
    documented = {code: int(status) for status, codes in rows for code in re.findall(r"`(.+?)`", codes)}
    kinds: list[type[LungscopeError]] = [LungscopeError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    statuses = {kind.code: status_of(kind.__new__(kind), HTTP_STATUS) for kind in kinds}
    assert {code: statuses.get(code, documented[code]) for code in documented} == documented
    assert set(documented.values()) == {*HTTP_STATUS.values(), 405}
