"""Where results go: a DICOM node by C-STORE (PS3.4 B), or a DICOMweb server by STOW-RS (PS3.18 10.5).

Both can be asked whether they have an object: by C-FIND at the IMAGE level (PS3.4 C.6.2), by QIDO-RS (PS3.18 10.6).
That settles what became of an object whose answer was lost.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import requests
from dicomweb_client.api import DICOMwebClient
from pydicom import Dataset
from pydicom.uid import UID, ImplicitVRLittleEndian
from pynetdicom import AE

from lungscope.errors import DeliveryError, RefusedError, UsageError

#: Study Root Query/Retrieve Information Model – FIND (PS3.4 C.6.2).
QUERY = UID("1.2.840.10008.5.1.4.1.2.2.1")
#: Seconds to wait for a connection, and for the answer to an object.
CONNECT_TIMEOUT, ANSWER_TIMEOUT = 10, 120

#: Statuses of C-STORE that mean stored: success, and the warnings of PS3.4 B.2.3 (coerced, discarded, does not match).
STORED = (0x0000, 0xB000, 0xB006, 0xB007)
#: Out of Resources: the object may be taken later.
OUT_OF_RESOURCES = range(0xA700, 0xA800)
#: Answers of a STOW-RS server about the object itself; others are about the server, the way to it, or its set-up.
HTTP_REFUSED = (400, 409, 413, 415, 422)


class Link(Protocol):
    """An open connection to a destination."""

    def check(self, item: Dataset) -> None:
        """Raises RefusedError where the destination takes none of an object's kind, DeliveryError where the connection
        is broken. Nothing is sent."""

    def store(self, item: Dataset) -> None:
        """Send an object: it is stored when this returns. Raises RefusedError, or DeliveryError for another time."""

    def has(self, item: Dataset) -> bool:
        """Whether the destination says that it has an object; False where it does not say."""


class Destination(Protocol):
    """A place for results."""

    @property
    def name(self) -> str:
        """As it was configured."""

    def connect(self, items: Sequence[Dataset]) -> AbstractContextManager[Link]:
        """Connect in order to send `items`. Raises DeliveryError where that can not be done now."""


@dataclass(frozen=True)
class Tls:
    """Certificate and key of this node, and the authorities whose certificates it accepts: PEM files."""

    certificate: Path
    key: Path
    authorities: Path

    def context(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        """For connections where the other side is a client, or a server; either has to show a certificate.

        Raises UsageError for files that are none.
        """
        try:
            context = ssl.create_default_context(purpose, cafile=str(self.authorities))
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(
                f"The TLS files can not be used: {error}. --tls-cert, --tls-key and --tls-ca are PEM files."
            ) from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        context.sslsocket_class = _Handshake
        return context


class _Handshake(ssl.SSLSocket):
    """pynetdicom accepts one connection after the other: one that never shakes hands must not stop the rest."""

    def do_handshake(self, block: bool = False) -> None:
        before = self.gettimeout()
        self.settimeout(CONNECT_TIMEOUT)
        super().do_handshake(block)
        self.settimeout(before)


def destination(target: str, *, aet: str, tls: Tls | None = None) -> Destination:
    """What `target` names: AET@host:port, or the http(s) address of a DICOMweb service. aet: the title of this node.

    Raises UsageError for what is neither.
    """
    if re.match(r"https?://", target):
        return DicomWeb(target, tls)
    match = re.fullmatch(r"(?P<aet>[^@\\]{1,16})@\[?(?P<host>[^@\[\]]+?)\]?:(?P<port>[0-9]{1,5})", target)
    if not match or not 0 < int(match["port"]) < 65536 or not match["aet"].strip():
        raise UsageError(
            f"--send-to {target!r} names no destination. Give AET@host:port for C-STORE, or https://…/dicom-web for "
            "STOW-RS."
        )
    return DicomNode(match["aet"].strip(), match["host"], int(match["port"]), aet, tls)


class DicomNode:
    """Sends by C-STORE, one association for each delivery."""

    def __init__(self, aet: str, host: str, port: int, own_aet: str, tls: Tls | None) -> None:
        self.name = f"{aet}@{host}:{port}"
        self._aet, self._host, self._port, self._own_aet = aet, host, port, own_aet
        self._tls = None if tls is None else (tls.context(ssl.Purpose.SERVER_AUTH), host)

    @contextmanager
    def connect(self, items: Sequence[Dataset]) -> Iterator[Link]:
        ae = AE(self._own_aet)
        ae.connection_timeout = ae.acse_timeout = CONNECT_TIMEOUT
        ae.dimse_timeout = ae.network_timeout = ANSWER_TIMEOUT
        for sop_class, syntax in {(item.SOPClassUID, item.file_meta.TransferSyntaxUID) for item in items}:
            plain = [] if syntax.is_compressed or syntax == ImplicitVRLittleEndian else [ImplicitVRLittleEndian]
            ae.add_requested_context(sop_class, [syntax, *plain])
        ae.add_requested_context(QUERY)
        association = ae.associate(self._host, self._port, ae_title=self._aet, tls_args=self._tls)
        # pynetdicom ends an association in which nothing was accepted: then the objects are refused, one by one.
        if not association.is_established and not association.rejected_contexts:
            why = "did not accept an association" if association.is_rejected else "can not be reached"
            raise DeliveryError(f"{self.name} {why}. It is tried again.")
        try:
            yield _Association(self.name, association)
        finally:
            association.release()


class _Association:
    def __init__(self, name: str, association: Any) -> None:
        self._name, self._association = name, association

    def check(self, item: Dataset) -> None:
        if not self._accepts(item.SOPClassUID):
            raise RefusedError(f"{self._name} takes no {item.SOPClassUID.name}. Configure it to, or another one.")
        if not self._association.is_established:
            raise DeliveryError(f"{self._name} broke the association off. It is tried again.")

    def store(self, item: Dataset) -> None:
        self.check(item)
        answer = self._association.send_c_store(item)
        status = answer.get("Status")
        if status in STORED:
            return
        if status is None:
            raise DeliveryError(f"{self._name} did not answer for {item.SOPInstanceUID}. It is tried again.")
        message = f"{self._name} answered {status:04X} for {item.SOPInstanceUID}: {answer.get('ErrorComment', '–')}."
        raise DeliveryError(message) if status in OUT_OF_RESOURCES else RefusedError(message)

    def has(self, item: Dataset) -> bool:
        if not self._accepts(QUERY) or not self._association.is_established:
            return False
        query = Dataset()
        query.QueryRetrieveLevel = "IMAGE"
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            setattr(query, keyword, item.get(keyword))
        answers = list(self._association.send_c_find(query, QUERY))
        return any(found is not None and found.get("SOPInstanceUID") == item.SOPInstanceUID for _, found in answers)

    def _accepts(self, sop_class: str) -> bool:
        return any(context.abstract_syntax == sop_class for context in self._association.accepted_contexts)


class _Session(requests.Session):
    """Takes the authorities that it was given, whatever REQUESTS_CA_BUNDLE in the environment says. Media types of
    answers lose their parameters, with which dicomweb-client does not see what a server failed to store."""

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        response = super().send(request, **kwargs)
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind.endswith(("json", "xml")):
            response.headers["Content-Type"] = kind
        return response

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        own = self.verify if verify is None else verify
        return super().merge_environment_settings(url, proxies, stream, own, cert)


class DicomWeb:
    """Sends by STOW-RS. The user's .netrc may hold a name and password for the server."""

    def __init__(self, url: str, tls: Tls | None) -> None:
        self.name = url.rstrip("/")
        if tls is not None and not url.startswith("https:"):
            raise UsageError(f"--send-to {url!r} is not encrypted, and TLS was asked for. Name its https address.")
        session = _Session()
        if tls is not None:
            session.verify, session.cert = str(tls.authorities), (str(tls.certificate), str(tls.key))
        try:
            self._client = DICOMwebClient(self.name, session=session, timeout=(CONNECT_TIMEOUT, ANSWER_TIMEOUT))
        except ValueError as error:
            raise UsageError(f"--send-to {url!r} is no address of a DICOMweb service: {error}.") from error
        # It would send nothing the second time: an object in chunks is read once.
        self._client.set_http_retry_params(retry=False)

    @contextmanager
    def connect(self, items: Sequence[Dataset]) -> Iterator[Link]:
        yield self

    def check(self, item: Dataset) -> None:
        """A server says no more than by its answer to an object."""

    def store(self, item: Dataset) -> None:
        try:
            answer = self._client.store_instances([item], study_instance_uid=item.StudyInstanceUID)
        except requests.HTTPError as error:
            status = None if error.response is None else error.response.status_code
            message = f"{self.name} answered {status} for {item.SOPInstanceUID}."
            raise (RefusedError if status in HTTP_REFUSED else DeliveryError)(message) from error
        except requests.RequestException as error:
            raise DeliveryError(f"{self.name} can not be reached ({error}). It is tried again.") from error
        if failed := answer.get("FailedSOPSequence"):
            reason = failed[0].get("FailureReason", 0)
            message = f"{self.name} answered {reason:04X} for {item.SOPInstanceUID}."
            raise DeliveryError(message) if reason in OUT_OF_RESOURCES else RefusedError(message)

    def has(self, item: Dataset) -> bool:
        try:
            found = self._client.search_for_instances(
                study_instance_uid=item.StudyInstanceUID, search_filters={"SOPInstanceUID": item.SOPInstanceUID}
            )
        except requests.RequestException:
            return False
        return any(Dataset.from_json(instance).get("SOPInstanceUID") == item.SOPInstanceUID for instance in found)
