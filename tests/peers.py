"""What a PACS node talks to: films, a sender, an archive that counts, Orthanc; and the node's own process."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, Self

import httpx
import numpy as np
from pydicom import Dataset, uid
from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind as FIND

from corpus import as_integers, make_dicom
from films import draw
from programs import environment

ORTHANC = shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
DICOM_WEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
#: A status of `Archive`: the object is stored, but the connection breaks before the answer.
LOST = -1
#: What the small bundle gives for a film, in this order.
KINDS = ["lungs", "saliency", "overlay", "report"]
PATIENCE = 120.0


def film(number: int = 0, **elements: object) -> Dataset:
    """A small CR film that the small bundle analyses, different from those of other numbers."""
    pixels = draw(160, 144, opacities=[(0.5, 0.28, 0.05)])
    pixels[0, :8] = [(number >> bit) & 1 for bit in range(8)]
    defaults: dict[str, object] = {
        "SOPClassUID": uid.ComputedRadiographyImageStorage,
        "SOPInstanceUID": f"1.2.826.0.1.3680043.8.498.7.{number}",
        "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.8.1",
        "SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.9.1",
        "Modality": "CR",
        "PatientID": "P1",
    }
    return make_dicom(as_integers(pixels, 12).astype(np.uint16), **(defaults | elements))


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for `condition`."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def association(port: int, *, calling: str = "SENDER", called: str = "LUNGSCOPE", tls: Any = None) -> Iterator[Any]:
    """An association with the node; not established where the node refused it."""
    ae = AE(calling)
    ae.acse_timeout = ae.dimse_timeout = 30
    ae.connection_timeout = 10
    ae.add_requested_context("1.2.840.10008.1.1")
    for sop_class in (uid.ComputedRadiographyImageStorage, uid.DigitalXRayImageStorageForPresentation):
        for syntax in (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian):
            ae.add_requested_context(sop_class, syntax)
    ae.add_requested_context(uid.CTImageStorage)
    ae.add_requested_context(uid.ComputedRadiographyImageStorage, uid.MPEG2MPML)
    link = ae.associate("127.0.0.1", port, ae_title=called, tls_args=None if tls is None else (tls, "localhost"))
    try:
        yield link
    finally:
        if link.is_established:
            link.release()


def send(port: int, films: Sequence[Dataset], **options: Any) -> list[int | None]:
    """Send films over one association; the answered statuses, None where no answer came."""
    with association(port, **options) as link:
        assert link.is_established
        return [link.send_c_store(item).get("Status") if link.is_established else None for item in films]


class Archive:
    """Takes every object and counts it. statuses: what is answered next, success where nothing is left in it.

    With `answers_queries` it can be asked by C-FIND what it has; `takes` limits the SOP classes; with `breaks_off` it
    aborts the association instead of an answer that is no success.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        answers_queries: bool = True,
        takes: Sequence[str] = (),
        breaks_off: bool = False,
        tls: Any = None,
    ) -> None:
        self.arrived: list[Dataset] = []
        self._breaks_off = breaks_off
        self.statuses: list[int] = []
        ae = AE("ARCHIVE")
        for sop_class in takes or [str(context.abstract_syntax) for context in AllStoragePresentationContexts]:
            ae.add_supported_context(sop_class, [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
        if answers_queries:
            ae.add_supported_context(FIND)
        handlers = [(evt.EVT_C_STORE, self._store), (evt.EVT_C_FIND, self._find)]
        self._server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers, ssl_context=tls)
        self.port = self._server.server_address[1]
        self.target = f"ARCHIVE@127.0.0.1:{self.port}"

    @property
    def modalities(self) -> list[str]:
        return [item.Modality for item in self.arrived]

    def close(self) -> None:
        self._server.shutdown()

    def _store(self, event: Any) -> int:
        status = self.statuses.pop(0) if self.statuses else 0x0000
        if status in (0x0000, LOST):
            self.arrived.append(event.dataset)
        if status == LOST or (status and self._breaks_off):
            event.assoc.abort()
        return status

    def _find(self, event: Any) -> Iterator[tuple[int, Dataset | None]]:
        wanted = event.identifier.SOPInstanceUID
        if any(item.SOPInstanceUID == wanted for item in self.arrived):
            found = Dataset()
            found.QueryRetrieveLevel, found.SOPInstanceUID = "IMAGE", wanted
            yield 0xFF00, found
        yield 0x0000, None


class Node:
    """`lungscope pacs` in a process of its own. films: with the last of so many films received it is killed."""

    def __init__(
        self, spool: Path, target: str, bundle: Path, *options: str, port: int = 0, films: int | None = None
    ) -> None:
        self._films = films
        arguments = [
            "pacs", "--spool", str(spool), "--send-to", target, "--model", str(bundle), "--device", "cpu", "--json",
            "--port", str(port), "--status-port", "0", *options,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lungscope.cli.main", *arguments],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.said: list[str] = []
        Thread(target=self._listen, daemon=True).start()
        until(lambda: len(self.said) >= 2 or self.process.poll() is not None, "the node to answer")
        assert self.process.poll() is None, self.process.communicate()[1]
        self.port = int(self._number(r"answers on \S+:(\d+);"))
        self.status = "http://127.0.0.1:" + self._number(r":(\d+)/healthz")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def count(self, word: str) -> int:
        """How many messages begin with `word`."""
        return sum(message.split()[0] == word for message in list(self.said))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask the node to stop; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def metric(self, name: str) -> float:
        """A line of /metrics; 0 where there is none."""
        text = httpx.get(f"{self.status}/metrics").text
        found = re.search(rf"^lungscope_pacs_{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(json.loads(line)["message"])
            if self.count("received") == self._films:
                self.process.kill()

    def _number(self, pattern: str) -> str:
        found = re.search(pattern, "\n".join(self.said))
        assert found, self.said
        return found[1]


class Orthanc:
    """A real archive on free ports of this machine, with DICOMweb; its storage lies in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.dicom_port, http_port = free_port(), free_port()
        # Called for every object that arrives, also for one that is there already.
        script = folder / "count.lua"
        script.write_text(
            "function ReceivedInstanceFilter(dicom, origin, info)\n"
            '  print("ARRIVED " .. dicom.SOPInstanceUID .. " " .. origin.RequestOrigin)\n'
            "  return true\n"
            "end\n"
        )
        configuration = {
            "StorageDirectory": str(folder / "storage"), "IndexDirectory": str(folder / "storage"),
            "HttpPort": http_port, "DicomPort": self.dicom_port, "DicomAet": "ORTHANC", "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False, "DicomCheckCalledAet": True,
            "SaveJobs": False, "LuaScripts": [str(script)], "Plugins": [str(DICOM_WEB)], "DicomWeb": {"Enable": True},
        }  # fmt: skip
        (folder / "orthanc.json").write_text(json.dumps(configuration))
        self._log = folder / "orthanc.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen([str(ORTHANC), str(folder / "orthanc.json")], stdout=log, stderr=log)
        self.target = f"ORTHANC@127.0.0.1:{self.dicom_port}"
        self.dicom_web = f"http://127.0.0.1:{http_port}/dicom-web"
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{http_port}", timeout=PATIENCE)
        until(self._answers, f"Orthanc: {self._log.read_text()}")

    def close(self) -> None:
        self._http.close()
        self.process.terminate()
        self.process.wait(PATIENCE)

    def get(self, path: str) -> Any:
        return self._http.get(path).raise_for_status().json()

    def post(self, path: str, content: Any) -> Any:
        return self._http.post(path, json=content).raise_for_status().json()

    def upload(self, data: bytes) -> str:
        """Put a film into the archive; Orthanc's name for it."""
        return str(self._http.post("/instances", content=data).raise_for_status().json()["ID"])

    def knows(self, port: int) -> None:
        """Tell Orthanc where the node is."""
        node = {"AET": "LUNGSCOPE", "Host": "127.0.0.1", "Port": port}
        self._http.put("/modalities/lungscope", json=node).raise_for_status()

    def push(self, films: Sequence[str]) -> None:
        """Send films to the node by C-STORE."""
        self.post("/modalities/lungscope/store", list(films))

    def file(self, instance: str) -> bytes:
        return self._http.get(f"/instances/{instance}/file").raise_for_status().content

    def arrivals(self, how: str) -> list[str]:
        """The SOP Instance UID of each object that came in by "DicomProtocol", "RestApi" or "Plugins", each time."""
        return re.findall(rf"ARRIVED (\S+) {how}", self._log.read_text())

    def _answers(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()
        try:
            return self._http.get("/system").is_success
        except httpx.TransportError:
            return False
