"""`lungscope pacs`: what it is told, what it refuses, how it ends."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from lungscope.cli import pacs
from lungscope.errors import UsageError
from lungscope.pacs.send import DicomNode, DicomWeb, destination
from lungscope.pacs.spool import Spool
from peers import Archive, Node, film, send, until
from programs import python


def refusal(*arguments: str) -> str:
    """What the command says of options that it does not take."""
    done = CliRunner().invoke(pacs.app, list(arguments))
    assert isinstance(done.exception, UsageError), done.output
    return str(done.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--send-to", "ARCHIVE"], "names no destination. Give AET@host:port"),
        (["--send-to", "ARCHIVE@host:99999"], "names no destination"),
        (["--send-to", "A\\B@host:104"], "names no destination"),
        (["--send-to", "https://"], "no address of a DICOMweb service"),
        (["--send-to", "A@b:104", "--aet", "SEVENTEEN LETTERS"], "is no AE title"),
        (["--send-to", "A@b:104", "--allow", " "], "is no AE title"),
        (["--send-to", "A@b:104", "--host", "0.0.0.0"], "Say who may send films: --allow AET"),
        (["--send-to", "A@b:104", "--tls-cert", "node.pem"], "needs all of --tls-cert, --tls-key and --tls-ca"),
    ],
)
def test_options_that_can_not_be(options: list[str], message: str, tmp_path: Path) -> None:
    assert message in refusal("--spool", str(tmp_path / "spool"), *options)
    assert not (tmp_path / "spool").exists()


def test_a_port_and_a_spool_that_are_taken(tiny: Path, tmp_path: Path) -> None:
    common = ["--send-to", "A@b:104", "--model", str(tiny), "--device", "cpu", "--spool", str(tmp_path / "spool")]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"Nothing can listen on 127.0.0.1:{port}" in refusal(*common, "--port", port, "--status-port", "0")
        assert "Give another --status-port" in refusal(*common, "--port", "0", "--status-port", port)
    spool = Spool(tmp_path / "spool")
    assert "in use by another process" in refusal(*common)
    spool.close()


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("ARCHIVE@10.0.0.7:104", "ARCHIVE@10.0.0.7:104"),
        ("MY PACS@pacs.example.org:11112", "MY PACS@pacs.example.org:11112"),
        ("ARCHIVE@[::1]:104", "ARCHIVE@::1:104"),
        ("https://pacs.example.org/dicom-web/", "https://pacs.example.org/dicom-web"),
    ],
)
def test_destinations(target: str, name: str) -> None:
    made = destination(target, aet="LUNGSCOPE")
    assert made.name == name
    assert isinstance(made, DicomWeb if target.startswith("http") else DicomNode)


@pytest.mark.parametrize(
    ("host", "here"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("pacs", False)]
)
def test_is_loopback(host: str, here: bool) -> None:
    assert pacs.is_loopback(host) is here


def test_ctrl_c_finishes_what_is_in_hand(tiny: Path, tmp_path: Path) -> None:
    archive = Archive()
    with Node(tmp_path / "spool", archive.target, tiny, "--deidentify") as node:
        assert httpx.get(f"{node.status}/healthz").json()["status"] == "ok"
        assert send(node.port, [film(1), film(2)]) == [0x0000, 0x0000]
        until(lambda: node.count("analysed"), "an analysis")
        assert node.stop(signal.SIGINT) == 0
        assert node.process.stderr is not None
        assert node.process.stderr.read() == ""
        assert node.said[-1] == "stopped"
    left = {path.parent.name for path in (tmp_path / "spool").glob("*/*")}
    assert left <= {"ready", "results", "sent"}, "nothing is left half done"
    archive.close()
    assert len(archive.arrived) % 3 == 0, "what was begun was sent whole"
    assert {re.sub("[0-9a-f]{16}", "…", item.PatientID) for item in archive.arrived} <= {"ANON-…"}


def test_the_extra_is_named_where_it_is_missing() -> None:
    done = python(
        "import sys\nsys.modules['pynetdicom'] = None\nsys.argv = ['lungscope', 'pacs', '--help']\n"
        "from lungscope.cli.main import main\nmain()\n"
    )
    assert done.returncode == 3
    assert "pip install 'lungscope[pacs]'" in done.stderr
    assert "Traceback" not in done.stderr
