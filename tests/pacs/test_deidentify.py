"""What leaves with --deidentify: nothing of the patient, and objects that still belong together."""

from __future__ import annotations

import hashlib
import hmac
import re
import shutil
import subprocess
from io import BytesIO
from pathlib import Path

import pytest
from dicomanonymizer.dicomfields_selector import dicom_anonymization_database_selector
from pydicom import Dataset, dcmread
from pydicom._dicom_dict import DicomDictionary
from pydicom.datadict import dictionary_VR, keyword_for_tag

from films import draw, radiograph
from lungscope.pacs.deidentify import Deidentifier
from lungscope.pipeline import Analyzer
from lungscope.report import DISCLAIMER
from lungscope.writers.dicom import encode, objects
from peers import film

#: Values that must not be found again, by VR.
SECRETS = {
    "DA": "19871203", "TM": "101112", "DT": "19871203101112", "AS": "077Y", "UI": "1.2.826.0.1.3680043.8.498.4711",
    **dict.fromkeys(("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT"), "SECRET"),
}  # fmt: skip


def revealing() -> Dataset:
    """A film with a secret in every attribute of the profile's table that can hold one."""
    table = dicom_anonymization_database_selector("dicomfields_2026c")["ALL_TAGS"]
    elements: dict[str, object] = {}
    for tag in (tuple(tag) for tag in table if len(tag) == 2):
        number = (tag[0] << 16) + tag[1]
        if tag[0] > 2 and (keyword := keyword_for_tag(number)) and (vr := dictionary_VR(number)) in SECRETS:
            elements[keyword] = SECRETS[vr]
    made = film(1, **(elements | {"BurnedInAnnotation": "NO"}))
    block = made.private_block(0x0011, "SECRET", create=True)
    block.add_new(1, "LO", "SECRET")
    return made


@pytest.fixture(scope="module")
def left(analyzer: Analyzer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return deidentified(analyzer, tmp_path_factory.mktemp("film"), revealing())


def deidentified(analyzer: Analyzer, folder: Path, item: Dataset) -> dict[str, bytes]:
    path = folder / "film.dcm"
    path.write_bytes(encode(item))
    report = analyzer.analyze(path)
    return {kind: encode(made) for kind, made in Deidentifier(b"key").objects(report).items()}


def test_nothing_of_the_patient_is_left(left: dict[str, bytes]) -> None:
    assert list(left) == ["lungs", "saliency", "overlay", "report"]
    for kind, data in left.items():
        text = data.replace(b"REMOVED", b"")
        digest = hashlib.sha256(encode(revealing())).hexdigest()
        for secret in {*SECRETS.values(), "Nobody", "film.dcm", digest}:
            assert secret.encode() not in text, (kind, secret)
        item = dcmread(BytesIO(data))
        dates = {element.value for element in item.iterall() if element.VR in ("DA", "DT")}
        assert dates <= {"", "19000101", "19000101000000"}, "not even when it was analysed"
        assert not any(element.tag.is_private for element in item.iterall())


def test_nothing_of_what_the_standards_table_does_not_list_is_left(analyzer: Analyzer, tmp_path: Path) -> None:
    """A secret in every attribute of the dictionary that can hold one, but those that say what the pixels are."""
    elements: dict[str, object] = {}
    for number, (vr, _, _, retired, keyword) in DicomDictionary.items():
        if 0x0008 <= number >> 16 <= 0x0040 and number >> 16 not in (0x0028, 0x0018) and not retired and keyword:
            if vr in ("LO", "LT", "SH", "ST", "UC", "UT", "PN", "CS"):
                elements[keyword] = "SECRET"
            elif vr == "SQ":
                item = Dataset()
                item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "SECRET", "SECRET", "SECRET"
                item.LocalNamespaceEntityID = "SECRET"
                elements[keyword] = [item]
    kept = {"Modality": "CR", "BurnedInAnnotation": "NO", "SpecificCharacterSet": "ISO_IR 100", "ViewPosition": "PA"}
    elements = {key: value for key, value in elements.items() if key != "ViewCodeSequence"} | kept
    elements |= {"LossyImageCompression": "01", "LossyImageCompressionMethod": "SECRET"}
    left = deidentified(analyzer, tmp_path, film(1, **elements))
    assert len(left) == 4
    for kind, data in left.items():
        left_over = [element.keyword for element in dcmread(BytesIO(data)).iterall() if element.value == "SECRET"]
        assert not left_over and b"SECRET" not in data, kind


def test_the_secrets_were_there(analyzer: Analyzer, tmp_path: Path) -> None:
    path = tmp_path / "film.dcm"
    path.write_bytes(encode(revealing()))
    data = encode(objects(analyzer.analyze(path))["report"])
    assert b"SECRET" in data
    assert b"19871203" in data
    assert SECRETS["UI"].encode() in data


def test_it_is_said_what_was_done(left: dict[str, bytes]) -> None:
    for data in left.values():
        item = dcmread(BytesIO(data))
        assert item.PatientIdentityRemoved == "YES"
        done = [code.CodeValue for code in item.DeidentificationMethodCodeSequence]
        assert done == ["113100", "113105", "113104"]
        assert "not for diagnosis" in item.SeriesDescription
    assert DISCLAIMER.encode() in left["report"]


def test_objects_belong_together(left: dict[str, bytes]) -> None:
    items = {kind: dcmread(BytesIO(data)) for kind, data in left.items()}
    assert len({item.StudyInstanceUID for item in items.values()}) == 1
    assert len({item.PatientID for item in items.values()}) == 1
    assert re.fullmatch(r"ANON-[0-9a-f]{16}", items["report"].PatientID)
    for item in items.values():
        assert item.file_meta.MediaStorageSOPInstanceUID == item.SOPInstanceUID
    (evidence,) = items["report"].CurrentRequestedProcedureEvidenceSequence
    assert evidence.StudyInstanceUID == items["report"].StudyInstanceUID
    named = {
        one.ReferencedSOPInstanceUID
        for series in evidence.ReferencedSeriesSequence
        for one in series.ReferencedSOPSequence
    }
    source = items["lungs"].ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID
    assert named == {items["lungs"].SOPInstanceUID, items["saliency"].SOPInstanceUID, source}


def test_a_patient_is_the_same_one_each_time_and_another_with_another_key(analyzer: Analyzer) -> None:
    report = analyzer.analyze(radiograph(draw()))

    def who(item: Dataset, key: bytes = b"key") -> tuple[str, str]:
        made = Deidentifier(key).apply({"report": item}, report)["report"]
        return made.PatientID, made.StudyInstanceUID

    first = who(film(1))
    assert who(film(2)) == first
    other_study = who(film(3, StudyInstanceUID="1.2.3.4"))
    assert other_study[0] == first[0]
    assert other_study[1] != first[1]
    assert who(film(4, PatientID="P2"))[0] != first[0]
    assert not set(who(film(1), b"another")) & set(first)
    nameless = {who(film(5, PatientID="", StudyInstanceUID=f"1.2.3.{number}"))[0] for number in range(2)}
    assert len(nameless) == 2, "patients without an ID are not taken for one"


def issued(issuer: str | None = None, universal: str | None = None) -> Dataset:
    made = film(1, IssuerOfPatientID=issuer)
    if universal is not None:
        qualifier = Dataset()
        qualifier.UniversalEntityID, qualifier.UniversalEntityIDType = universal, "DNS"
        made.IssuerOfPatientIDQualifiersSequence = [qualifier]
    return made


def test_one_id_of_two_hospitals_is_two_patients(analyzer: Analyzer, tmp_path: Path) -> None:
    films = {
        "none": issued(), "empty": issued(""), "A": issued("HOSPITAL-A"), "B": issued("HOSPITAL-B"),
        "dns": issued(None, "a.example"), "A dns": issued("HOSPITAL-A", "a.example"),
    }  # fmt: skip
    found: dict[str, set[str]] = {}
    for name, item in films.items():
        left = deidentified(analyzer, tmp_path, item)
        found[name] = {dcmread(BytesIO(data)).PatientID for data in left.values()}
        for data in left.values():
            assert not any(secret in data for secret in (b"HOSPITAL", b"a.example"))
            assert not {"IssuerOfPatientID", "IssuerOfPatientIDQualifiersSequence"} & set(dcmread(BytesIO(data)).dir())
    alone = {f"ANON-{hmac.new(b'key', b'P1', 'sha256').hexdigest()[:16]}"}
    assert found["none"] == found["empty"] == alone, "without an issuer it is made of the ID alone"
    assert all(len(names) == 1 for names in found.values()), "the objects of a film have one patient"
    assert len(set.union(*found.values())) == 5


@pytest.mark.parametrize("burned_in", [None, "YES"])
def test_text_in_the_pixels_does_not_leave(analyzer: Analyzer, tmp_path: Path, burned_in: str | None) -> None:
    left = deidentified(analyzer, tmp_path, film(1, BurnedInAnnotation=burned_in))
    assert list(left) == ["lungs", "saliency", "report"]


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed (Debian: dicom3tools)")
def test_objects_keep_to_the_standard(analyzer: Analyzer, tmp_path: Path) -> None:
    for kind, data in deidentified(analyzer, tmp_path, film(1, BurnedInAnnotation="NO")).items():
        path = tmp_path / f"{kind}.dcm"
        path.write_bytes(data)
        said = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False).stderr
        assert not [line for line in said.splitlines() if line.startswith("Error")], said


def test_the_key_is_made_once_and_for_the_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    first = Deidentifier.load(path).uid("1.2.3")
    assert Deidentifier.load(path).uid("1.2.3") == first
    assert len(path.read_bytes()) == 32
    assert path.stat().st_mode & 0o777 == 0o600
