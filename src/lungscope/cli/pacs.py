"""`lungscope pacs`: a DICOM node that takes films and gives results back."""

from __future__ import annotations

import json
import logging
import signal
import ssl
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from lungscope.bundle import locate
from lungscope.cli.options import local
from lungscope.errors import UsageError
from lungscope.hardware import is_loopback
from lungscope.pacs.deidentify import Deidentifier
from lungscope.pacs.node import Address, Node
from lungscope.pacs.send import Tls, destination
from lungscope.pacs.spool import Spool
from lungscope.pipeline import Analyzer
from lungscope.report import DISCLAIMER

LOGGER = logging.getLogger("lungscope.pacs")
#: The secret behind the pseudonyms, in the spool folder.
KEY = "deidentify.key"

app = typer.Typer(add_completion=False)


@app.command()
def pacs(
    spool: Annotated[
        Path, typer.Option(help="Folder of the queue. Keep it: it holds what was received.", parser=local)
    ],
    send_to: Annotated[str, typer.Option(help="Where results go: AET@host:port, or https://…/dicom-web (STOW-RS).")],
    aet: Annotated[str, typer.Option(help="The AE title of this node.")] = "LUNGSCOPE",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 lets the system choose.")] = 11112,
    allow: Annotated[list[str] | None, typer.Option(help="AE title that may send films; repeat it for more.")] = None,
    quiet_seconds: Annotated[
        float, typer.Option(min=0.1, help="A study whose association stays open is complete after this time.")
    ] = 10,
    tls_cert: Annotated[Path | None, typer.Option(help="This node's certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    tls_ca: Annotated[Path | None, typer.Option(help="Certificates that others' certificates are signed by.")] = None,
    status_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port for /healthz and /metrics, on this machine only.")
    ] = 8104,
    deidentify: Annotated[
        bool, typer.Option("--deidentify", help="Take the patient out of results (PS3.15 E).")
    ] = False,
    model: Annotated[str | None, typer.Option(help="A bundle's folder, or the name of an embedded one.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, gpu, cuda, … (see `lungscope doctor`).")] = "auto",
    precision: Annotated[
        str, typer.Option(help="auto, f32, bf16, f16 or int8; auto: the fastest here whose gate was passed.")
    ] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what happens as JSON lines on standard output.")
    ] = False,
) -> None:
    """Take CR, DX and SC films by C-STORE, and send SEG, SC and SR back, by C-STORE or STOW-RS.

    A film that was acknowledged is on the disk, and its results are sent whatever happens to this process. Ctrl-C or
    SIGTERM: finish what is in hand, exit status 0. 2: usage. 3: nothing could run.

    Research software, not a medical device. Not for diagnosis.
    """
    given = [path for path in (tls_cert, tls_key, tls_ca) if path is not None]
    if len(given) not in (0, 3):
        raise UsageError("TLS needs all of --tls-cert, --tls-key and --tls-ca.")
    for title in (aet, *(allow or ())):
        check_title(title)
    if not allow and not is_loopback(host):
        raise UsageError(f"--host {host} lets other machines in. Say who may send films: --allow AET for each.")
    tls = Tls(given[0], given[1], given[2]) if given else None
    address = Address(
        host=host,
        port=port,
        status_port=status_port,
        aet=aet,
        allow=tuple(allow or ()),
        tls=None if tls is None else tls.context(ssl.Purpose.CLIENT_AUTH),
    )
    target = destination(send_to, aet=aet, tls=tls)
    analyzer = Analyzer(locate(model), device=device, precision=precision)
    queue = Spool(spool)
    try:
        node = Node(
            queue,
            analyzer,
            target,
            quiet_seconds=quiet_seconds,
            deidentifier=Deidentifier.load(spool / KEY) if deidentify else None,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: node.stop())
        log_to(as_json)

        def ready(port: int, status_port: int) -> None:
            LOGGER.info("%s answers on %s:%d; results go to %s", aet, host, port, target.name)
            LOGGER.info("http://127.0.0.1:%d/healthz and /metrics; %s", status_port, DISCLAIMER)

        node.run(address, ready=ready)
        LOGGER.info("stopped")
    finally:
        queue.close()


def check_title(title: str) -> None:
    """Raises UsageError for what is no AE title (PS3.5 6.2: 16 characters at most, no backslash, not only spaces)."""
    if not title.strip() or len(title) > 16 or "\\" in title or not (title.isascii() and title.isprintable()):
        raise UsageError(f"{title!r} is no AE title. It has 1 to 16 ASCII characters, no backslash.")


def log_to(as_json: bool) -> None:
    """Print what happens: lines on standard error, or JSON lines on standard output."""
    handler = logging.StreamHandler(sys.stdout if as_json else sys.stderr)
    handler.setFormatter(_JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": moment, "level": record.levelname.lower(), "message": record.getMessage()})
