"""The node beside a real archive, Orthanc, over real ports."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, dcmread

from bundles import write_bundle
from lungscope.cli.analyze import demo_film
from lungscope.pacs.send import destination
from lungscope.pipeline import Analyzer
from lungscope.writers.dicom import encode
from peers import KINDS, ORTHANC, PATIENCE, Node, Orthanc, film, free_port, until

pytestmark = pytest.mark.skipif(ORTHANC is None, reason="Orthanc is not installed (Debian: orthanc, orthanc-dicomweb)")


@pytest.fixture
def orthanc(tmp_path: Path) -> Iterator[Orthanc]:
    archive = Orthanc(tmp_path / "orthanc")
    yield archive
    archive.close()


def series(orthanc: Orthanc) -> dict[str, list[Dataset]]:
    """The objects of the only study, by modality."""
    (study,) = orthanc.get("/studies")
    found: dict[str, list[Dataset]] = {}
    for instance in orthanc.get(f"/studies/{study}/instances"):
        item = dcmread(BytesIO(orthanc.file(instance["ID"])))
        found.setdefault(item.Modality, []).append(item)
    return found


@pytest.mark.parametrize("way", ["C-STORE", "STOW-RS"])
def test_results_come_back_into_the_study(way: str, orthanc: Orthanc, tiny: Path, tmp_path: Path) -> None:
    original = dcmread(demo_film())
    target = orthanc.target if way == "C-STORE" else orthanc.dicom_web
    with Node(tmp_path / "spool", target, tiny, "--allow", "ORTHANC") as node:
        orthanc.knows(node.port)
        orthanc.push([orthanc.upload(demo_film().read_bytes())])
        until(lambda: node.count("sent"), "results")
        assert node.stop() == 0
    found = series(orthanc)
    assert {modality: len(items) for modality, items in found.items()} == {"CR": 1, "SEG": 2, "OT": 1, "SR": 1}
    results = [item for modality, items in found.items() if modality != "CR" for item in items]
    for item in results:
        assert (item.StudyInstanceUID, item.PatientID) == (original.StudyInstanceUID, original.PatientID)
    (lungs,) = [item for item in found["SEG"] if item.SegmentationType == "BINARY"]
    report = Analyzer(tiny, device="cpu").analyze(demo_film())
    assert np.array_equal(lungs.pixel_array.max(axis=0).astype(bool), report.lungs.mask)
    assert Counter(orthanc.arrivals("DicomProtocol" if way == "C-STORE" else "Plugins")) == {
        item.SOPInstanceUID: 1 for item in results
    }
    with destination(target, aet="LUNGSCOPE").connect(results) as link:
        assert all(link.has(item) for item in results)
        results[0].SOPInstanceUID = "1.2.3"
        assert not link.has(results[0])


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_study(orthanc: Orthanc, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "lungs only", classifier=False)
    films = [orthanc.upload(encode(film(number))) for number in range(20)]
    port = free_port()
    orthanc.knows(port)
    with Node(tmp_path / "spool", orthanc.target, bundle, port=port, films=10) as node:
        job = orthanc.post("/modalities/lungscope/store", {"Resources": films, "Synchronous": False})["ID"]
        node.process.wait(PATIENCE)
    assert node.process.returncode == -signal.SIGKILL
    assert 10 <= len(list((tmp_path / "spool" / "incoming").glob("*.dcm"))) < 20
    until(lambda: orthanc.get(f"/jobs/{job}")["State"] == "Failure", "the sender to notice")
    with Node(tmp_path / "spool", orthanc.target, bundle, port=port) as node:
        orthanc.post(f"/jobs/{job}/resubmit", {})
        until(lambda: node.metric('results_sent_total{kind="report"}') == 20, "all results")
        until(lambda: orthanc.get(f"/jobs/{job}")["State"] == "Success", "the sender to be done")
        assert node.stop() == 0
    arrived = Counter(orthanc.arrivals("DicomProtocol"))
    assert len(arrived) == 20 * 3
    assert set(arrived.values()) == {1}
    found = series(orthanc)
    assert {modality: len(items) for modality, items in found.items()} == {"CR": 20, "SEG": 20, "OT": 20, "SR": 20}
    about = [item.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence for item in found["SR"]]
    named = {one.ReferencedSOPInstanceUID for item in about for one in item[0].ReferencedSOPSequence}
    assert named == {item.SOPInstanceUID for item in found["CR"]}
    assert not list((tmp_path / "spool" / "failed").iterdir())


@pytest.mark.slow
def test_kills_while_results_are_sent(orthanc: Orthanc, tiny: Path, tmp_path: Path) -> None:
    films = [orthanc.upload(encode(film(number))) for number in range(3)]
    with Node(tmp_path / "spool", orthanc.target, tiny) as node:
        orthanc.knows(node.port)
        orthanc.push(films)
        until(lambda: node.count("analysed"), "an analysis")
        node.kill()
    for delay in (0.03, 0.1):
        with Node(tmp_path / "spool", orthanc.target, tiny) as node:
            time.sleep(delay)
            node.kill()
    with Node(tmp_path / "spool", orthanc.target, tiny) as node:
        until(lambda: len(list((tmp_path / "spool" / "sent").iterdir())) == 3, "all results")
        assert node.stop() == 0
    arrived = Counter(orthanc.arrivals("DicomProtocol"))
    assert len(arrived) == 3 * len(KINDS)
    assert set(arrived.values()) == {1}
