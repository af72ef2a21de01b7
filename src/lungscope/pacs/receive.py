"""Films come in: C-ECHO and C-STORE as a service class provider (PS3.4 A and B)."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from threading import Lock
from time import monotonic, sleep
from typing import Any
from uuid import NAMESPACE_OID, uuid5

from pydicom import dcmread, uid
from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pynetdicom import AE, evt
from pynetdicom.transport import ThreadedAssociationServer

from lungscope.errors import UsageError
from lungscope.pacs.spool import Spool
from lungscope.pacs.status import Metrics
from lungscope.readers.dicom import DECODERS, SOP_CLASSES

LOGGER = logging.getLogger(__name__)

#: The SOP class of C-ECHO (PS3.4 A.4).
VERIFICATION = uid.UID("1.2.840.10008.1.1")
#: In which films are taken. Not JPEG Extended: it is used for 12 bits, which are not read, and an archive that can not
#: send it sends the film in another one.
TRANSFER_SYNTAXES = [syntax for syntax in DECODERS if syntax != uid.JPEGExtended12Bit]
#: Who writes the films' files (PS3.10 7.1). A film is known by its bytes, so these never change, whatever is installed:
#: neither may name a version.
IMPLEMENTATION, IMPLEMENTATION_NAME = uid.UID(f"2.25.{uuid5(NAMESPACE_OID, 'lungscope pacs').int}"), "LUNGSCOPE"
#: Statuses of C-STORE (PS3.4 B.2.3).
SUCCESS, OUT_OF_RESOURCES, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xC000
#: Associations at a time.
ASSOCIATIONS = 32
#: Seconds that associations get to end by themselves when the node stops.
PATIENCE = 10.0


@dataclass
class _Arriving:
    """Films of a study that came over one association. last: when the last of them came."""

    last: float
    keys: set[str]


class Receiver:
    """Answers on a port, and puts films into `spool` before it says that they were received.

    aet: the title by which this node has to be called. allow: titles that may call; none lets every one. quiet_seconds:
    a study whose association stays open is complete after that time without a film. wake: called when films are ready.
    """

    def __init__(
        self,
        spool: Spool,
        metrics: Metrics,
        *,
        aet: str,
        allow: Sequence[str],
        quiet_seconds: float,
        wake: Callable[[], None],
    ) -> None:
        self._spool, self._metrics, self._quiet, self._wake = spool, metrics, quiet_seconds, wake
        #: By association and Study Instance UID.
        self._arriving: dict[tuple[Any, str], _Arriving] = {}
        self._lock = Lock()
        self._ae = AE(aet)
        self._ae.require_called_aet = True
        self._ae.require_calling_aet = list(allow)
        self._ae.maximum_associations = ASSOCIATIONS
        self._ae.add_supported_context(VERIFICATION)
        for sop_class in SOP_CLASSES:
            self._ae.add_supported_context(sop_class, TRANSFER_SYNTAXES)
        self._server: ThreadedAssociationServer | None = None

    def start(self, host: str, port: int, context: ssl.SSLContext | None) -> int:
        """Answer from now on; returns the port, chosen by the system for 0. Raises UsageError where it is taken."""
        handlers: list[Any] = [
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_RELEASED, self._closed),
            (evt.EVT_ABORTED, self._closed),
            (evt.EVT_CONN_CLOSE, self._closed),
        ]
        try:
            server = self._ae.start_server((host, port), block=False, ssl_context=context, evt_handlers=handlers)
        except OSError as error:
            raise UsageError(f"Nothing can listen on {host}:{port}: {error.strerror}. Give another --port.") from error
        assert server is not None  # it is None where start_server blocks
        self._server = server
        return int(server.server_address[1])

    def stop(self) -> None:
        """Take no more associations, let those that are open end, and cut off those that do not."""
        if self._server is None:
            return
        self._server.shutdown()
        deadline = monotonic() + PATIENCE
        while self._ae.active_associations and monotonic() < deadline:
            sleep(0.05)
        self._ae.shutdown()

    def release_quiet(self) -> None:
        """Let studies that were quiet for long enough be analysed."""
        with self._lock:
            due = [study for study, films in self._arriving.items() if monotonic() - films.last >= self._quiet]
        self._release(due)

    def _store(self, event: Any) -> int:
        """Answer a C-STORE request; the film is on the disk when this says so."""
        instance = str(event.request.AffectedSOPInstanceUID)
        try:
            data = _file(event)
            # With the header of pynetdicom's own version, as the spool may know the film.
            key, is_new = self._spool.receive(instance, data, or_as=event.encoded_dataset)
        except OSError as error:
            LOGGER.error("%s was not taken: %s", instance, error)
            return OUT_OF_RESOURCES
        except ValueError as error:
            LOGGER.warning("A film was not taken: %s", error)
            return CANNOT_UNDERSTAND
        (self._metrics.received if is_new else self._metrics.repeated).inc()
        LOGGER.info("%s %s", "received" if is_new else "received again", instance)
        study = event.assoc, _study(data, event.context.transfer_syntax)
        with self._lock:
            films = self._arriving.setdefault(study, _Arriving(0.0, set()))
            films.last = monotonic()
            films.keys.add(key)
        return SUCCESS

    def _closed(self, event: Any) -> None:
        with self._lock:
            due = [study for study in self._arriving if study[0] is event.assoc]
        self._release(due)

    def _release(self, due: Sequence[tuple[Any, str]]) -> None:
        for study in due:
            with self._lock:
                films = self._arriving.get(study, _Arriving(0.0, set()))
                keys = set(films.keys)
            try:
                for key in keys:
                    self._spool.release(key)
            except OSError as error:  # it is quiet by the next look
                LOGGER.error("%s: %s", study[1], error)
                continue
            with self._lock:
                films.keys -= keys
                if not films.keys:
                    self._arriving.pop(study, None)
        if due:
            self._wake()


def _file(event: Any) -> bytes:
    """The film of a C-STORE request as a DICOM file (PS3.10): its data set as it came, behind a header that depends on
    the request alone. pynetdicom's names its version, with which the film would be another one.

    Raises ValueError where the request has no data set, or names no SOP class.
    """
    request = event.request
    if request.DataSet is None or not request.AffectedSOPClassUID:
        raise ValueError(f"{request.AffectedSOPInstanceUID}: a request without a data set or a SOP class")
    meta = FileMetaDataset()
    meta.FileMetaInformationGroupLength = 0  # counted when it is written
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = request.AffectedSOPClassUID
    meta.MediaStorageSOPInstanceUID = request.AffectedSOPInstanceUID
    meta.TransferSyntaxUID = event.context.transfer_syntax
    meta.ImplementationClassUID, meta.ImplementationVersionName = IMPLEMENTATION, IMPLEMENTATION_NAME
    with DicomBytesIO() as file:
        file.write(bytes(128) + b"DICM")
        write_file_meta_info(file, meta, enforce_standard=False)
        file.write(request.DataSet.getvalue())
        data: bytes = file.getvalue()
    return data


def _study(data: bytes, syntax: str) -> str:
    """The Study Instance UID of a film; "" where it can not be read, or only by inflating all of it (PS3.5 A.5)."""
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        return ""
    try:
        return str(dcmread(BytesIO(data), stop_before_pixels=True, specific_tags=["StudyInstanceUID"]).StudyInstanceUID)
    except Exception:  # pydicom lets nearly every type escape from a broken data set; its analysis will say so
        return ""
