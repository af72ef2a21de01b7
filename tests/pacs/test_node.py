"""The node between a sender and an archive, over real sockets."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pkgutil
import resource
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from itertools import count, product
from pathlib import Path
from threading import Thread
from typing import Any

import cv2
import httpx
import pytest
from pydicom import Dataset, dcmread, uid
from pynetdicom import AE, dsutils

from bundles import write_bundle
from lungscope.errors import DeliveryError, RefusedError, UsageError
from lungscope.pacs import node as node_module
from lungscope.pacs import send as send_module
from lungscope.pacs.node import Address, Node
from lungscope.pacs.send import DicomWeb, Tls, destination
from lungscope.pacs.spool import STAGES, Spool
from lungscope.pipeline import Analyzer
from lungscope.readers.dicom import DECODERS, SOP_CLASSES
from lungscope.writers.dicom import encode
from peers import LOST, Archive, association, film, free_port, send, until
from peers import Node as Program

#: What comes back for a film from a bundle that only segments.
KINDS, MODALITIES = ["lungs", "overlay", "report"], ["SEG", "OT", "SR"]


@dataclass
class Running:
    port: int
    status: str
    spool: Path

    def files(self, stage: str) -> list[str]:
        return sorted(path.name for path in (self.spool / stage).iterdir() if not path.name.startswith("."))

    def settled(self, **counts: int) -> None:
        """Wait until there is so much in the stages named, and nothing in the others (but reasons in failed/)."""

        def reached() -> bool:
            found = {stage: len(self.files(stage)) for stage in STAGES}
            found["failed"] -= len(list((self.spool / "failed").glob("*.json")))
            return found == dict.fromkeys(STAGES, 0) | counts

        until(reached, f"{counts}")

    def reason(self) -> dict[str, str]:
        """The error of the only dead letter."""
        (path,) = (self.spool / "failed").glob("*.json")
        error: dict[str, str] = json.loads(path.read_text())["error"]
        return error


@pytest.fixture
def archive() -> Iterator[Archive]:
    made = Archive()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(node_module, "LOOK", 0.05)
    monkeypatch.setattr(node_module, "TRIES", 4)
    monkeypatch.setattr(node_module, "REFUSALS", 4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "lungs", classifier=False)


@pytest.fixture(scope="module")
def analyzer(bundle: Path) -> Analyzer:
    return Analyzer(bundle, device="cpu")


@pytest.fixture
def run(analyzer: Analyzer, tmp_path: Path) -> Callable[..., Any]:
    @contextmanager
    def started(
        target: str, *, allow: tuple[str, ...] = (), quiet_seconds: float = 60, tls: Tls | None = None
    ) -> Iterator[Running]:
        spool = Spool(tmp_path / "spool")
        there = destination(target, aet="LUNGSCOPE", tls=tls)
        node = Node(spool, analyzer, there, quiet_seconds=quiet_seconds)
        context = None if tls is None else tls.context(ssl.Purpose.CLIENT_AUTH)
        ports: list[int] = []
        address = Address(host="127.0.0.1", port=0, status_port=0, aet="LUNGSCOPE", allow=allow, tls=context)
        thread = Thread(target=node.run, args=(address,), kwargs={"ready": lambda *found: ports.extend(found)})
        thread.start()
        try:
            until(lambda: ports, "the node")
            yield Running(ports[0], f"http://127.0.0.1:{ports[1]}", spool.root)
        finally:
            node.stop()
            thread.join(30)
            spool.close()
        assert not thread.is_alive()

    return started


def test_results_of_a_film(run: Callable[..., Any], archive: Archive) -> None:
    with run(archive.target) as node:
        with association(node.port) as link:
            assert link.send_c_echo().Status == 0x0000
            assert link.send_c_store(film()).Status == 0x0000
            assert len(node.files("incoming")) == 1, "what was acknowledged is on the disk"
            time.sleep(0.2)
            assert not archive.arrived, "the study is still arriving"
        node.settled(sent=1)
        assert archive.modalities == MODALITIES
        assert {item.StudyInstanceUID for item in archive.arrived} == {film().StudyInstanceUID}
        journal = json.loads((node.spool / "sent" / node.files("sent")[0]).read_text())
        assert list(journal["objects"]) == KINDS
        assert list(journal["objects"].values()) == [item.SOPInstanceUID for item in archive.arrived]
        assert journal["destination"] == archive.target


def test_a_quiet_study_is_complete(run: Callable[..., Any], archive: Archive) -> None:
    with run(archive.target, quiet_seconds=0.2) as node, association(node.port) as link:
        assert link.send_c_store(film()).Status == 0x0000
        until(lambda: len(archive.arrived) == 3, "results")
        assert link.is_established


def test_a_film_that_comes_again_is_not_analysed_again(run: Callable[..., Any], archive: Archive) -> None:
    with run(archive.target) as node:
        for _ in range(2):
            assert send(node.port, [film(1), film(1)]) == [0x0000, 0x0000]
            node.settled(sent=1)
        assert send(node.port, [film(1, PatientID="P2")]) == [0x0000], "a corrected film is another"
        node.settled(sent=2)
    assert archive.modalities == 2 * MODALITIES
    assert len({item.SOPInstanceUID for item in archive.arrived}) == 6


def test_a_film_is_the_same_one_with_another_pynetdicom(
    run: Callable[..., Any], archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run(archive.target) as node:
        send(node.port, [film(1)])
        node.settled(sent=1)
        monkeypatch.setitem(dsutils.create_file_meta.__kwdefaults__, "implementation_version", "PYNETDICOM_999")
        send(node.port, [film(1)])
        until(lambda: "films_repeated_total 1.0" in httpx.get(f"{node.status}/metrics").text, "the film")
        node.settled(sent=1)
    assert archive.modalities == MODALITIES


def test_a_film_that_the_spool_has_with_pynetdicoms_header_is_known(
    run: Callable[..., Any], archive: Archive, tmp_path: Path
) -> None:
    with BytesIO() as file:
        file.write(bytes(128) + b"DICM")
        meta = dsutils.create_file_meta(
            sop_class_uid=film(1).SOPClassUID, sop_instance_uid=film(1).SOPInstanceUID,
            transfer_syntax=uid.ExplicitVRLittleEndian,
        )  # fmt: skip
        file.write(dsutils.encode_file_meta(meta))
        file.write(dsutils.encode(film(1), is_implicit_vr=False, is_little_endian=True) or b"")
        data = file.getvalue()
    spool = Spool(tmp_path / "spool")
    key, _ = spool.receive(film(1).SOPInstanceUID, data)
    spool.close()
    with run(archive.target) as node:
        node.settled(sent=1)
        send(node.port, [film(1)])
        until(lambda: "films_repeated_total 1.0" in httpx.get(f"{node.status}/metrics").text, "the film")
        node.settled(sent=1)
        assert node.files("sent") == [f"{key}.json"]
    assert archive.modalities == MODALITIES


def test_a_film_is_stored_as_it_came(run: Callable[..., Any], archive: Archive) -> None:
    with run(archive.target) as node, association(node.port) as link:
        assert link.send_c_store(film(1)).Status == 0x0000
        (path,) = (node.spool / "incoming").iterdir()
        stored = dcmread(path)
        assert stored == film(1)
        assert stored.file_meta.TransferSyntaxUID == uid.ExplicitVRLittleEndian
        assert stored.file_meta.MediaStorageSOPInstanceUID == film(1).SOPInstanceUID
        assert stored.file_meta.MediaStorageSOPClassUID == film(1).SOPClassUID
        assert stored.file_meta.ImplementationVersionName == "LUNGSCOPE"
        assert stored.file_meta.ImplementationClassUID.is_valid
        header = path.read_bytes()[: 132 + 12 + stored.file_meta.FileMetaInformationGroupLength]
    # Another header makes every film another one, answered again where it comes again.
    assert hashlib.sha256(header).hexdigest()[:16] == "7b2b36e4385ad92f"


def test_who_may_send_and_what(run: Callable[..., Any], archive: Archive) -> None:
    with run(archive.target, allow=("CR1", "CR2")) as node:
        for calling, called, accepted in (
            ("CR1", "LUNGSCOPE", True), ("CR2", "LUNGSCOPE", True), ("CR3", "LUNGSCOPE", False), ("CR1", "OTHER", False)
        ):  # fmt: skip
            with association(node.port, calling=calling, called=called) as link:
                assert link.is_established is accepted, (calling, called)
                assert link.is_rejected is not accepted
        with association(node.port, calling="CR1") as link:
            refused = {(context.abstract_syntax, context.transfer_syntax[0]) for context in link.rejected_contexts}
            assert len(link.accepted_contexts) == 5
        assert refused == {
            (uid.CTImageStorage, uid.ImplicitVRLittleEndian),
            (uid.ComputedRadiographyImageStorage, uid.MPEG2MPML),
        }


def test_every_transfer_syntax_that_is_read_is_taken(run: Callable[..., Any], archive: Archive) -> None:
    ae = AE("SENDER")
    for sop_class, syntax in product(SOP_CLASSES, DECODERS):
        ae.add_requested_context(sop_class, syntax)
    compressed = film()
    compressed.compress(uid.RLELossless)
    with run(archive.target) as node:
        link = ae.associate("127.0.0.1", node.port, ae_title="LUNGSCOPE")
        assert len(link.accepted_contexts) == 4 * (len(DECODERS) - 1)
        assert {str(context.transfer_syntax[0]) for context in link.rejected_contexts} == {uid.JPEGExtended12Bit}
        assert link.send_c_store(compressed).Status == 0x0000
        link.release()
        node.settled(sent=1)
    assert archive.modalities == MODALITIES


def broken(number: int) -> Dataset:
    made = film(number)
    made.PixelData = made.PixelData[:100]
    return made


@pytest.mark.parametrize(
    ("item", "code"),
    [
        (film(1, Modality="CT"), "unsupported"),
        (broken(2), "unreadable"),
        (film(3, Rows=None), "unreadable"),
    ],
)
def test_a_film_without_results_has_a_reason(
    run: Callable[..., Any], archive: Archive, item: Dataset, code: str
) -> None:
    with run(archive.target) as node:
        assert send(node.port, [item, film(9)]) == [0x0000, 0x0000]
        node.settled(failed=1, sent=1)
        (name,) = [name for name in node.files("failed") if name.endswith(".dcm")]
        assert name.startswith(item.SOPInstanceUID)
        assert node.reason()["code"] == code
        text = httpx.get(f"{node.status}/metrics").text
        assert f'lungscope_pacs_films_failed_total{{code="{code}"}} 1.0' in text
        assert 'lungscope_pacs_queue_films{stage="failed"} 1.0' in text
    assert archive.modalities == MODALITIES


def test_an_archive_that_is_away_gets_its_results_later(run: Callable[..., Any]) -> None:
    port = free_port()
    with run(f"ARCHIVE@127.0.0.1:{port}") as node:
        assert send(node.port, [film(1), film(2)]) == [0x0000, 0x0000]
        node.settled(results=2)
        time.sleep(0.3)
        assert httpx.get(f"{node.status}/healthz").json()["queue"]["results"] == 2
        archive = Archive(port=port)
        node.settled(sent=2)
        archive.close()
    assert archive.modalities == 2 * MODALITIES


def test_an_archive_that_is_full_gets_its_results_later(run: Callable[..., Any], archive: Archive) -> None:
    archive.statuses = [0x0000, 0xA700, 0xA701]
    with run(archive.target) as node:
        send(node.port, [film()])
        node.settled(sent=1)
    assert archive.modalities == MODALITIES


class Picky:
    """A destination that breaks down over the objects of one patient, and takes all others."""

    name = "picky"

    def __init__(self) -> None:
        self.taken: list[str] = []

    @contextmanager
    def connect(self, items: Sequence[Dataset]) -> Iterator[Picky]:
        yield self

    def check(self, item: Dataset) -> None:
        pass

    def store(self, item: Dataset) -> None:
        if item.PatientID == "P0":
            raise DeliveryError("500")
        self.taken.append(item.PatientID)

    def has(self, item: Dataset) -> bool:
        return False


def test_a_delivery_that_breaks_the_destination_holds_up_no_other(
    run: Callable[..., Any], archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    picky = Picky()
    monkeypatch.setitem(globals(), "destination", lambda *arguments, **options: picky)
    with run("picky") as node:
        for number in range(3):
            send(node.port, [film(number, PatientID=f"P{number}", StudyInstanceUID=f"1.2.3.{number}")])
        node.settled(results=1, sent=2)
        assert picky.taken == ["P1"] * len(KINDS) + ["P2"] * len(KINDS)


def test_deliveries_that_break_the_destination_hold_up_no_other_however_many(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    picky = Picky()
    monkeypatch.setitem(globals(), "destination", lambda *arguments, **options: picky)
    bad = 2 * node_module.FIRST_ONES
    with run("picky") as node:
        send(node.port, [film(number, PatientID="P0") for number in range(bad)])
        node.settled(results=bad)
        send(node.port, [film(bad, PatientID="P1")])
        node.settled(results=bad, sent=1)
    assert picky.taken == ["P1"] * len(KINDS)


def test_a_destination_that_is_away_is_asked_by_a_few_at_a_time(
    analyzer: Analyzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "FIRST_PAUSE", 60)
    spool, picky, tried = Spool(tmp_path / "spool"), Picky(), []
    for number in range(4):
        key, _ = spool.receive(f"1.2.{number}", b"a film")
        spool.release(key)
        waits = spool.take()
        assert waits is not None
        spool.keep(waits, {"lungs": encode(film(number, PatientID="P0"))}, {})
    node = Node(spool, analyzer, picky)
    monkeypatch.setattr(picky, "connect", lambda items: tried.append(items[0].SOPInstanceUID) or Picky().connect(items))
    for round_ in (3, 4):
        with pytest.raises(DeliveryError):
            node._deliver_due()
        assert tried == [film(number).SOPInstanceUID for number in range(round_)]
    assert not node._deliver_due(), "all of them wait"
    spool.close()


@pytest.mark.parametrize("times", [1, 2, 4])
def test_a_disk_that_fails_at_any_step(
    analyzer: Analyzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """times: steps in a row that fail, the one that puts the film back among them."""
    films = [(item.SOPInstanceUID, encode(item)) for item in (film(1), broken(2))]
    steps, failing = count(), range(0)

    def once_in_a_while(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            if failing and next(steps) in failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*arguments, **options)

        return step

    monkeypatch.setattr(os, "fsync", lambda handle: None)  # nothing loses what it wrote here, and the walks are long
    for name in ("fsync", "replace", "unlink", "mkdir"):
        monkeypatch.setattr(os, name, once_in_a_while(getattr(os, name)))
    for first in count():
        spool, picky = Spool(tmp_path / str(first)), Picky()
        node = Node(spool, analyzer, picky)
        keys = [spool.receive(*item)[0] for item in films]
        for key in keys:
            spool.release(key)
        steps, tries = count(), 0
        while True:
            tries, failing, found = tries + 1, range(first, first + times), True
            with suppress(OSError):
                found = node._analyse_next()
            failing = range(0)
            assert tries < 10, first
            assert not any(spool.receive(*item)[1] for item in films), "a film that comes again was not lost"
            while node._deliver_due():
                pass
            if not found:
                break
        assert picky.taken == ["P1"] * len(KINDS), first
        names = {str(path.relative_to(spool.root)) for path in spool.root.rglob("*.*") if path.is_file()}
        assert names == {f"sent/{keys[0]}.json", f"failed/{keys[1]}.json", f"failed/{keys[1]}.dcm"}, first
        spool.close()
        if next(steps) <= first:
            break
    assert first > 20, "every step on the way is a step that may fail"


def test_a_film_that_can_not_be_read_now_is_read_later(
    run: Callable[..., Any], archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes, reads = Path.read_bytes, count()
    faults = {0: errno.EMFILE, 2: errno.ESTALE}  # the second when its header is read for the objects

    def read(path: Path) -> bytes:
        if path.parent.name == "analysing" and (number := faults.get(next(reads))):
            raise OSError(number, os.strerror(number))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    with run(archive.target) as node:
        send(node.port, [film()])
        node.settled(sent=1)
        assert 'lungscope_pacs_pauses_total{code="os"} 2.0' in httpx.get(f"{node.status}/metrics").text
    assert archive.modalities == MODALITIES


def no_memory() -> cv2.error:
    error = cv2.error("Insufficient memory")
    error.code, error.err = cv2.Error.StsNoMem, "Failed to allocate 1600000000 bytes"
    return error


@pytest.mark.parametrize(
    ("where", "uid_of", "error", "code"),
    [
        ("lungscope.readers.dicom.grey_scale", lambda item: item.SOPInstanceUID, MemoryError(), "memory"),
        ("lungscope.readers.dicom.grey_scale", lambda item: item.SOPInstanceUID, no_memory(), "memory"),
        ("lungscope.pipeline.inspect", lambda item: item.source.tags["SOPInstanceUID"], no_memory(), "memory"),
        ("pathlib.Path.read_bytes", lambda path: path.name.partition("-")[0], OSError(errno.EIO, "No"), "os"),
    ],
)
def test_a_film_that_is_too_much_for_the_machine_holds_up_no_other(
    run: Callable[..., Any],
    archive: Archive,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    uid_of: Callable[[Any], str],
    error: Exception,
    code: str,
) -> None:
    whole = pkgutil.resolve_name(where.replace(".Path", ":Path"))

    def fails(item: Any) -> Any:
        if uid_of(item) == film(1).SOPInstanceUID:
            raise error
        return whole(item)

    monkeypatch.setattr(where, fails)
    with run(archive.target) as node:
        assert send(node.port, [film(1), film(2)]) == [0x0000, 0x0000]
        node.settled(failed=1, sent=1)
        assert node.reason()["code"] == code
        assert f'lungscope_pacs_pauses_total{{code="{code}"}} 3.0' in httpx.get(f"{node.status}/metrics").text
        monkeypatch.setattr(where, whole)
        (put_away,) = (node.spool / "failed").glob("*.dcm")
        put_away.rename(node.spool / "ready" / put_away.name)
        until(lambda: len(node.files("sent")) == 2, "results")
    assert archive.modalities == 2 * MODALITIES


def test_results_that_can_not_be_held_in_memory_now_are_sent_later(
    run: Callable[..., Any], archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = count()

    def read(path: Path) -> Dataset:
        if next(reads) < 2 * node_module.REFUSALS:
            raise MemoryError
        return dcmread(path)

    monkeypatch.setattr(node_module, "dcmread", read)
    monkeypatch.setattr(node_module, "LONGEST_PAUSE", 0.1)
    with run(archive.target) as node:
        send(node.port, [film()])
        node.settled(sent=1)
    assert archive.modalities == MODALITIES


def test_no_authority_but_the_one_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/elsewhere.pem")
    tls = Tls(Path("cert.pem"), Path("key.pem"), Path("ca.pem"))
    there = DicomWeb("https://127.0.0.1/dicom-web", tls)
    settings = there._client._session.merge_environment_settings("https://127.0.0.1/", {}, None, None, None)
    assert settings["verify"] == "ca.pem"
    with pytest.raises(UsageError, match="is not encrypted"):
        destination("http://127.0.0.1/dicom-web", aet="LUNGSCOPE", tls=tls)


@pytest.mark.parametrize("kind", ["application/dicom+json", "application/dicom+json; charset=utf-8"])
def test_what_a_web_server_says_that_it_did_not_store_is_not_sent(kind: str) -> None:
    failed = Dataset()
    failed.ReferencedSOPClassUID, failed.ReferencedSOPInstanceUID = film().SOPClassUID, film().SOPInstanceUID
    failed.FailureReason = 0x0110
    answer = Dataset()
    answer.FailedSOPSequence = [failed]

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(answer.to_json().encode())
            self.close_connection = True

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.handle_request).start()
        with pytest.raises(RefusedError, match="answered 0110"):
            DicomWeb(f"http://127.0.0.1:{server.server_port}", None).store(film())


def test_what_is_refused_again_and_again_is_put_away(run: Callable[..., Any], archive: Archive) -> None:
    archive.statuses = [0xC123] * len(KINDS) * node_module.REFUSALS
    with run(archive.target) as node:
        send(node.port, [film(1)])
        node.settled(failed=1)
        send(node.port, [film(2)])
        node.settled(failed=1, sent=1)
        assert node.reason()["code"] == "refused"
        assert "C123" in node.reason()["message"]
        (folder,) = [path for path in (node.spool / "failed").iterdir() if path.is_dir()]
        folder.rename(node.spool / "results" / folder.name)
        node.settled(sent=2)
    assert archive.modalities == 2 * MODALITIES


def test_results_that_are_spoilt_on_the_disk_stop_no_others(run: Callable[..., Any]) -> None:
    port = free_port()
    with run(f"ARCHIVE@127.0.0.1:{port}") as node:
        send(node.port, [film(1), film(2)])
        node.settled(results=2)
        (report, _) = sorted((node.spool / "results").glob("*/*-report.dcm"))
        report.write_bytes(b"nothing")
        archive = Archive(port=port)
        node.settled(sent=1, failed=1)
        archive.close()
        assert node.reason()["code"] == "internal"
    assert archive.modalities == MODALITIES


def test_an_archive_without_a_sop_class_is_named(run: Callable[..., Any]) -> None:
    archive = Archive(takes=[uid.SegmentationStorage, uid.SecondaryCaptureImageStorage])
    with run(archive.target) as node:
        send(node.port, [film()])
        node.settled(failed=1)
        assert "takes no Comprehensive SR Storage" in node.reason()["message"]
    archive.close()
    assert archive.modalities == ["SEG", "OT"], "what it took it has once"


@pytest.mark.parametrize("answers_queries", [True, False])
def test_an_archive_without_a_sop_class_gets_the_other_objects(
    run: Callable[..., Any], answers_queries: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Without queries nothing at all is accepted once the other objects are there."""
    takes = [uid.SecondaryCaptureImageStorage, uid.ComprehensiveSRStorage, uid.ComputedRadiographyImageStorage]
    archive = Archive(takes=takes, answers_queries=answers_queries)
    with run(archive.target) as node:
        send(node.port, [film(1)])
        node.settled(failed=1)
        assert archive.modalities == ["OT", "SR"], "each once"
        assert "lungs (" in caplog.text and "takes no Segmentation Storage" in caplog.text
        assert "takes no Segmentation Storage" in node.reason()["message"]
        text = httpx.get(f"{node.status}/metrics").text
        assert 'lungscope_pacs_results_refused_total{kind="lungs"} 1.0' in text
        assert 'results_refused_total{kind="report"}' not in text
        (folder,) = [path for path in (node.spool / "failed").iterdir() if path.is_dir()]
        names = ["1-lungs.dcm", "2-overlay.sent", "3-report.sent", "film.json"]
        assert sorted(path.name for path in folder.iterdir()) == names, "what was not sent is not marked"
        note = json.loads((node.spool / "failed" / f"{folder.name}.json").read_text())
        assert (note["sent"], note["not_sent"]) == (["overlay", "report"], ["lungs"])
        archive.close()
        whole = Archive(port=archive.port)
        folder.rename(node.spool / "results" / folder.name)
        node.settled(sent=1)
        whole.close()
    assert whole.modalities == ["SEG"], "what was missing, and nothing twice"


def test_an_archive_that_breaks_off_over_an_object_gets_the_others(run: Callable[..., Any]) -> None:
    archive = Archive(breaks_off=True)
    archive.statuses = [0xC123, 0x0000, 0x0000, 0xC123]
    with run(archive.target) as node:
        send(node.port, [film()])
        node.settled(sent=1)
    archive.close()
    assert archive.modalities == ["OT", "SR", "SEG"]


def test_an_archive_without_a_sop_class_and_a_kill(bundle: Path, tmp_path: Path) -> None:
    archive = Archive(takes=[uid.SecondaryCaptureImageStorage, uid.ComprehensiveSRStorage])
    spool = tmp_path / "spool"
    with Program(spool, archive.target, bundle) as node:
        assert send(node.port, [film()]) == [0x0000]
        until(lambda: len(archive.arrived) == 2, "what the archive takes")
        node.kill()
    with Program(spool, archive.target, bundle) as node:
        until(lambda: any("lungs" in message for message in node.said), "another try")
        assert node.stop() == 0
    archive.close()
    assert archive.modalities == ["OT", "SR"], "nothing twice"
    assert [path.suffix for path in sorted(spool.glob("results/*/*-*"))] == [".dcm", ".sent", ".sent"]


@pytest.mark.parametrize(("answers_queries", "times"), [(True, 1), (False, 2)])
def test_a_lost_answer(run: Callable[..., Any], answers_queries: bool, times: int) -> None:
    archive = Archive(answers_queries=answers_queries)
    archive.statuses = [0x0000, LOST]
    with run(archive.target) as node:
        send(node.port, [film()])
        node.settled(sent=1)
    archive.close()
    lost = archive.arrived[1].SOPInstanceUID
    assert [item.SOPInstanceUID for item in archive.arrived].count(lost) == times
    assert len({item.SOPInstanceUID for item in archive.arrived}) == 3


def test_status(run: Callable[..., Any], archive: Archive) -> None:
    with run(archive.target) as node:
        send(node.port, [film()])
        node.settled(sent=1)
        health = httpx.get(f"{node.status}/healthz")
        assert health.status_code == 200
        assert health.json()["works"] == {"analysis": True, "delivery": True}
        text = httpx.get(f"{node.status}/metrics").text
        for line in (
            "films_received_total 1.0", "films_analysed_total 1.0", 'results_sent_total{kind="report"} 1.0',
            "analysis_seconds_count 1.0", "delivery_seconds_count 1.0", 'queue_films{stage="ready"} 0.0',
        ):  # fmt: skip
            assert f"lungscope_pacs_{line}\n" in text, line
        assert httpx.get(f"{node.status}/x").status_code == 404


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """An authority and a certificate of it for localhost and 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(command: str) -> None:
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)

    openssl("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=Authority")
    openssl("req -newkey rsa:2048 -nodes -keyout node.key -out node.csr -subj /CN=node")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    openssl("x509 -req -in node.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out node.pem -days 2 -extfile names")
    return Tls(folder / "node.pem", folder / "node.key", folder / "ca.pem")


def test_tls_both_ways(run: Callable[..., Any], certificates: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(send_module, "CONNECT_TIMEOUT", 0.5)
    archive = Archive(tls=certificates.context(ssl.Purpose.CLIENT_AUTH))
    anonymous = ssl.create_default_context(cafile=str(certificates.authorities))
    patient = ssl.create_default_context(cafile=str(certificates.authorities))  # longer than the node is with the first
    patient.load_cert_chain(certificates.certificate, certificates.key)
    with run(archive.target, tls=certificates) as node:
        with socket.create_connection(("127.0.0.1", node.port)):  # it never shakes hands
            statuses = send(node.port, [film()], tls=patient)
        assert statuses == [0x0000]
        for tls in (None, anonymous):
            with association(node.port, tls=tls) as link:
                assert not link.is_established, "without a certificate"
        node.settled(sent=1)
    archive.close()
    assert archive.modalities == MODALITIES


def test_tls_files_that_are_none(certificates: Tls, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="TLS files can not be used"):
        Tls(certificates.certificate, tmp_path / "absent", certificates.authorities).context(ssl.Purpose.CLIENT_AUTH)
    with pytest.raises(UsageError, match="TLS files can not be used"):
        Tls(certificates.key, certificates.key, certificates.authorities).context(ssl.Purpose.CLIENT_AUTH)


def test_a_full_disk_takes_nothing_and_says_so(archive: Archive, bundle: Path, tmp_path: Path) -> None:
    with Program(tmp_path / "spool", archive.target, bundle) as node:
        _, hard = before = resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE, (1000, hard))
        assert send(node.port, [film()]) == [0xA700]
        assert not list((tmp_path / "spool" / "incoming").iterdir())
        resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE, before)
        assert send(node.port, [film()]) == [0x0000]
        until(lambda: node.count("sent"), "results")
        assert node.stop() == 0
        assert node.said[-1] == "stopped"
    assert archive.modalities == MODALITIES
