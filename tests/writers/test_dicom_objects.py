"""DICOM out: objects that a validator, dcmtk and highdicom read, with the film's mask, numbers, patient and study."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import highdicom as hd
import numpy as np
import pydicom.uid as uid
import pytest
from PIL import Image
from pydicom import Dataset, dcmread
from tests.corpus import as_integers, make_dicom, save_dicom

from bundles import write_bundle
from films import draw, radiograph, save
from lungscope.batch import run_films
from lungscope.cli.analyze import demo_film
from lungscope.errors import InputError, UnreadableFileError
from lungscope.pipeline import Analyzer
from lungscope.readers import decode
from lungscope.report import DISCLAIMER, Report
from lungscope.stages.classification import Conformal
from lungscope.writers import dicom
from lungscope.writers.folder import DEFAULT_FORMATS, write
from lungscope.writers.overlay import EVIDENCE_SCALE, render
from programs import program, python

PICTURE = draw(320, 288, opacities=[(0.6, 0.3, 0.12)])
PATIENT = {
    "PatientName": "Nobody^Nemo",
    "PatientID": "N1",
    "PatientBirthDate": "19400305",
    "PatientSex": "O",
    "StudyDate": "20200401",
    "StudyTime": "120000",
    "StudyID": "S1",
    "AccessionNumber": "A1",
    "StudyDescription": "Chest PA",
}
#: Everything that may be missing in a DX film that the reader takes.
SPARSE = dict.fromkeys(
    ("StudyInstanceUID", "SeriesInstanceUID", "PatientName", "BodyPartExamined", "ViewPosition", "ImagerPixelSpacing")
)
#: How each kind of film is made.
FILMS: dict[str, Callable[[Path], Path]] = {
    "DX": lambda folder: dx(folder, **PATIENT, FrameOfReferenceUID="1.2.3", PatientOrientation=["L", "F"]),
    "sparse DX": lambda folder: dx(folder, **SPARSE),
    "SC": lambda folder: dx(
        folder, SOPClassUID=uid.SecondaryCaptureImageStorage, Modality="OT", ConversionType="DF", BodyPartExamined=None
    ),
    "inverted DX": lambda folder: dx(
        folder, stored=4095 - as_integers(PICTURE, 12), PhotometricInterpretation="MONOCHROME1", PixelSpacing=[0.4, 0.2]
    ),
    "lossy DX": lambda folder: save_dicom(
        make_dicom(as_integers(PICTURE, 8), 8, LossyImageCompression="01", LossyImageCompressionRatio=[12]),
        folder / "scan.dcm",
        uid.JPEGBaseline8Bit,
    ),
    "DX of a shoulder": lambda folder: dx(folder, BodyPartExamined="SHOULDER", Laterality="R"),
    "DX of ribs": lambda folder: dx(folder, BodyPartExamined="RIB"),
    "multi-frame SC": lambda folder: save_dicom(
        make_dicom(
            as_integers(PICTURE, 8),
            8,
            SOPClassUID=uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
            Modality="OT",
            NumberOfFrames=1,
        ),
        folder / "scan.dcm",
    ),
    "PNG": lambda folder: save(folder / "film.png", PICTURE),
    "JPEG": lambda folder: picture(folder / "film.jpg", 255),
    "16-bit PNG": lambda folder: picture(folder / "film.png", 65535),
}


def dx(folder: Path, *, stored: np.ndarray | None = None, **elements: object) -> Path:
    return save_dicom(
        make_dicom(as_integers(PICTURE, 12) if stored is None else stored, **elements), folder / "scan.dcm"
    )


def picture(path: Path, white: int) -> Path:
    assert cv2.imwrite(str(path), np.rint(PICTURE * white).astype(np.uint8 if white == 255 else np.uint16))
    return path


def made(report: Report, **options: Any) -> dict[str, Dataset]:
    """The objects of a report, written and read back."""
    return {kind: dcmread(BytesIO(dicom.encode(dataset))) for kind, dataset in dicom.objects(report, **options).items()}


@pytest.fixture(scope="session")
def validator() -> str:
    if not shutil.which("dciodvfy") or not shutil.which("dsrdump"):
        pytest.skip("dciodvfy (dicom3tools) and dcmtk can not be installed here")
    return "dciodvfy"


def assert_valid(folder: Path, *kinds: str) -> None:
    """The objects in the folder are these; dciodvfy prints no Error line for any, and dcmtk reads them."""
    assert {path.name for path in folder.iterdir()} == {f"{kind}.dcm" for kind in kinds}
    for kind in kinds:
        for tool in ("dciodvfy", "dcmdump", *(["dsrdump"] if kind == "report" else [])):
            done = subprocess.run([tool, str(folder / f"{kind}.dcm")], capture_output=True, check=False)
            lines = (done.stdout + done.stderr).decode("utf-8", "replace").splitlines()
            assert [line for line in lines if line.startswith(("Error", "E: "))] == []
            assert tool == "dciodvfy" or done.returncode == 0


@pytest.mark.parametrize("kind", FILMS)
def test_objects_are_valid_and_hold_the_masks_and_numbers_of_the_report(
    kind: str, analyzer: Analyzer, validator: str, tmp_path: Path
) -> None:
    report = analyzer.analyze(FILMS[kind](tmp_path))
    write(report, tmp_path / "out", ["dicom"], new_study=True)
    film = [] if report.source.format == "DICOM" else ["film"]
    assert_valid(tmp_path / "out", *film, "lungs", "saliency", "overlay", "report")
    assert_same_masks(report, tmp_path / "out")
    assert_same_numbers(report, hd.sr.srread(tmp_path / "out" / "report.dcm"))
    np.testing.assert_array_equal(dcmread(tmp_path / "out" / "overlay.dcm").pixel_array, render(report))


def test_the_demo_film_comes_back_with_its_mask_and_numbers(validator: str, tmp_path: Path) -> None:
    pytest.importorskip("data_store", reason="the extra 'demo' (pydicom-data) is not installed")
    report = Analyzer(device="cpu").analyze(demo_film())
    write(report, tmp_path, ["dicom"])
    assert_valid(tmp_path, "lungs", "saliency", "overlay", "report")
    assert_same_masks(report, tmp_path)
    assert_same_numbers(report, hd.sr.srread(tmp_path / "report.dcm"))


def assert_same_masks(report: Report, folder: Path) -> None:
    """Segments, by the instance that they were made of, are on its pixel grid."""
    lungs = hd.seg.segread(folder / "lungs.dcm")
    film = lungs.SourceImageSequence[0].ReferencedSOPInstanceUID
    masks = lungs.get_pixels_by_source_instance([film])[0]
    assert [item.SegmentLabel for item in lungs.SegmentSequence] == ["Right lung", "Left lung"]
    np.testing.assert_array_equal(masks[..., 0], report.lungs.right)
    np.testing.assert_array_equal(masks[..., 1], report.lungs.left)
    assert report.saliency is not None
    saliency = hd.seg.segread(folder / "saliency.dcm")
    evidence = saliency.get_pixels_by_source_instance([film])[0, ..., 0] * EVIDENCE_SCALE
    capped = np.minimum(report.saliency.map, EVIDENCE_SCALE)
    np.testing.assert_allclose(evidence, capped, atol=EVIDENCE_SCALE / 255 / 2 + 1e-5)
    assert f"{report.saliency.peak_value:.6g}" in saliency.SegmentSequence[0].SegmentDescription


def assert_same_numbers(report: Report, document: Any) -> None:
    facts = report.to_json()
    (film,) = document.content.get_image_measurement_groups()
    found = numbers(film)
    probabilities = facts["classification"]["probabilities"]
    assert found["Severity score of both lungs, 0 to 18"] == (facts["severity"]["global"], "{score}")
    for label, probability in probabilities.items():
        assert found[f"Probability of {label}"] == (pytest.approx(100 * probability, rel=1e-5), "%")
    groups = {str(group.tracking_identifier): group for group in document.content.get_planar_roi_measurement_groups()}
    assert set(groups) == {"lungscope right lung", "lungscope left lung", "lungscope evidence"}
    for side, letters in (("right", "ABC"), ("left", "DEF")):
        found, lung = numbers(groups[f"lungscope {side} lung"]), facts["lungs"][side]
        area = (lung["area_px"], "{pixels}") if lung["area_cm2"] is None else (lung["area_cm2"], "cm2")
        assert found["Area"] == area
        assert found["Involved share of the lung"] == (facts["severity"]["extent_percent"][side], "%")
        for letter in letters:
            zone = facts["severity"]["zones"][letter]
            assert found[f"Severity score of lung zone {letter}, 0 to 3"] == (zone["score"], "{score}")
            assert found[f"Involved share of lung zone {letter}"] == (zone["extent_percent"], "%")
            assert found[f"Mean log-odds of disease in lung zone {letter}"] == (zone["evidence"], "1")
    peak = numbers(groups["lungscope evidence"])["Largest evidence for the class, logit units"]
    assert peak == (facts["saliency"]["peak"]["value"], "1")


def numbers(group: Any) -> dict[str, tuple[float, str]]:
    return {item.name.meaning: (item.value, item.unit.value) for item in group.get_measurements()}


def words(document: Dataset) -> str:
    """Every text and code meaning of an SR, one a line."""
    found: list[str] = []
    document.walk(
        lambda _, element: found.append(str(element.value)) if element.keyword in ("TextValue", "CodeMeaning") else None
    )
    return "\n".join(found)


def test_objects_belong_to_the_film_and_say_who_made_them(analyzer: Analyzer, tmp_path: Path) -> None:
    report = analyzer.analyze(FILMS["DX"](tmp_path))
    film = dcmread(tmp_path / "scan.dcm")
    objects = made(report)
    for dataset in objects.values():
        for keyword in ("StudyInstanceUID", *PATIENT):
            assert dataset[keyword].value == film[keyword].value
        assert "FrameOfReferenceUID" not in dataset, "a projection is no plane in space"
        assert "research, not for diagnosis" in dataset.SeriesDescription
        assert dataset.Manufacturer == "lungscope"
    for kind in ("lungs", "saliency", "overlay"):
        (source,) = objects[kind].SourceImageSequence
        assert (source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID) == (
            film.SOPClassUID,
            film.SOPInstanceUID,
        )
        assert objects[kind].ImageComments == DISCLAIMER
        assert objects[kind].PatientOrientation == film.PatientOrientation
    for kind in ("lungs", "saliency"):
        (series,) = objects[kind].ReferencedSeriesSequence
        assert series.SeriesInstanceUID == film.SeriesInstanceUID
        assert "PlanePositionSequence" not in objects[kind].PerFrameFunctionalGroupsSequence[0]
        parameters = objects[kind].SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters
        assert all(digest in parameters for digest in report.run.weights.values())
    evidence = objects["report"].CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    cited = {item.ReferencedSOPInstanceUID for series in evidence for item in series.ReferencedSOPSequence}
    assert cited == {film.SOPInstanceUID, objects["lungs"].SOPInstanceUID, objects["saliency"].SOPInstanceUID}
    text = words(objects["report"])
    assert DISCLAIMER in text and "Pixel spacing: ImagerPixelSpacing" in text
    assert all(f"sha256({name})={digest}" in text for name, digest in report.run.weights.items())
    assert len({dataset.SeriesInstanceUID for dataset in objects.values()}) == 4
    assert objects["overlay"].PhotometricInterpretation == "RGB"
    assert "burned in" in objects["overlay"].DerivationDescription


def test_uids_depend_on_film_and_bundle_and_not_on_the_day(analyzer: Analyzer, tmp_path: Path) -> None:
    path = FILMS["DX"](tmp_path)
    first = analyzer.analyze(path)
    objects = dicom.objects(first)
    again = [dicom.encode(dataset) for dataset in dicom.objects(first).values()]
    assert again == [dicom.encode(dataset) for dataset in objects.values()], "byte for byte"
    moved = analyzer.analyze(path.rename(tmp_path / "elsewhere.dcm"))
    later = replace(moved, run=replace(moved.run, created="2031-01-01T00:00:00+00:00"))
    assert uids(dicom.objects(later)) == uids(objects)
    for changed in ({"weights": {"segmenter.onnx": "0" * 64}}, {"manifest": "0" * 64}):
        other = replace(later, run=replace(later.run, **changed))
        assert not uids(dicom.objects(other)) & uids(objects)
    assert all(uid.UID(value).is_valid and value.startswith("2.25.") for value in uids(objects))


def uids(objects: dict[str, Dataset]) -> set[str]:
    return {str(dataset.SOPInstanceUID) for dataset in objects.values()}


def test_a_sparse_film_gets_what_every_object_needs(analyzer: Analyzer, tmp_path: Path) -> None:
    report = analyzer.analyze(FILMS["sparse DX"](tmp_path))
    objects = made(report)
    (study,) = {dataset.StudyInstanceUID for dataset in objects.values()}
    assert study.startswith("2.25.")
    assert study == made(report)["lungs"].StudyInstanceUID
    for dataset in objects.values():
        for keyword in ("PatientName", "PatientID", "PatientSex", "PatientBirthDate", "StudyDate", "AccessionNumber"):
            assert not dataset[keyword].value
    assert numbers(sr(objects).get_planar_roi_measurement_groups()[0])["Area"][1] == "{pixels}"


def sr(objects: dict[str, Dataset]) -> Any:
    return hd.sr.ComprehensiveSR.from_dataset(objects["report"]).content


@pytest.mark.parametrize(
    ("characters", "name"),
    [
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 192", "Yamada^Tarou=山田^太郎"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    ],
)
def test_names_survive_in_the_films_character_set(
    characters: str | list[str], name: str, analyzer: Analyzer, tmp_path: Path
) -> None:
    path = dx(tmp_path, SpecificCharacterSet=characters, PatientName=name)
    for dataset in made(analyzer.analyze(path)).values():
        assert (dataset.PatientName, dataset.SpecificCharacterSet) == (name, characters)


WRONG = {"PatientName": "Mü^ß", "PatientID": "Ü-12ß ", "StudyDescription": "Größe", "AccessionNumber": "Ä77 "}


def misdeclared(folder: Path, declared: str, syntax: str = uid.ExplicitVRLittleEndian) -> Path:
    """A film with texts in Latin 1, one in a sequence, whose header says that they are in another character set."""
    other = Dataset()
    other.PatientID, other.TypeOfPatientID = "Ö8", "TEXT"
    made = make_dicom(as_integers(PICTURE, 12), SpecificCharacterSet="ISO_IR 100", OtherPatientIDsSequence=[other])
    for keyword, value in WRONG.items():
        setattr(made, keyword, value)
    path = save_dicom(made, folder / "scan.dcm", syntax)
    data = path.read_bytes()
    assert data.count(b"ISO_IR 100") == 1
    path.write_bytes(data.replace(b"ISO_IR 100", declared.encode().ljust(10)))
    return path


def raw(data: bytes, keyword: str) -> Any:
    return dcmread(BytesIO(data)).get_item(keyword).value


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
@pytest.mark.parametrize("declared", ["ISO_IR 192", "", "ISO_IR 999", "GB18030", "ISO_IR 127", "ISO_IR 100"])
def test_who_it_is_stays_byte_for_byte_whatever_the_character_set(
    declared: str, syntax: str, analyzer: Analyzer, tmp_path: Path
) -> None:
    path = misdeclared(tmp_path, declared, syntax)
    for kind, dataset in dicom.objects(analyzer.analyze(path)).items():
        data = dicom.encode(dataset)
        for keyword, value in WRONG.items():
            assert raw(data, keyword).rstrip() == value.encode("latin-1").rstrip(), (kind, keyword)
            assert raw(data, keyword) == raw(path.read_bytes(), keyword)
        item = dcmread(BytesIO(data))
        assert (item.get("SpecificCharacterSet") or "") == declared
        assert item.OtherPatientIDsSequence[0].get_item("PatientID").value.rstrip() == b"\xd68"


@pytest.mark.parametrize(("declared", "named"), [("ISO_IR 192", True), ("", True), ("ISO_IR 100", False)])
def test_who_it_is_is_named_where_it_can_not_stay(declared: str, named: bool, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", labels=["Spot", "Normal", "Пневмония"], thresholds=None)
    report = Analyzer(bundle, device="cpu").analyze(misdeclared(tmp_path, declared))
    objects = made(report)
    assert {dataset.SpecificCharacterSet for dataset in objects.values()} == {"ISO_IR 192"}
    text = words(objects["report"])
    assert ("does not fit its Specific Character Set" in text) is named
    assert all((keyword in text) is named for keyword in WRONG)
    if not named:
        assert objects["report"].PatientID == WRONG["PatientID"].rstrip()


def test_classes_without_a_code_get_one_of_our_own_in_any_script(tmp_path: Path) -> None:
    labels = ["Spot\\s", "Normal", "Пневмония"]
    bundle = write_bundle(tmp_path / "bundle", labels=labels, thresholds=None)
    path = dx(tmp_path, SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Jörg", StudyDescription="Thorax à 2")
    report = Analyzer(bundle, device="cpu").analyze(path)
    assert report.classification is not None
    findings = []
    for label in (labels[0], labels[2]):
        objects = made(replace(report, classification=replace(report.classification, label=label)))
        finding = sr(objects).get_image_measurement_groups()[0].finding_type
        findings.append((finding.scheme_designator, finding.value, finding.meaning))
    digest = hashlib.sha256(labels[2].encode()).hexdigest()
    assert findings == [("99LUNGSCOPE", "Spot/s", "Spot/s"), ("99LUNGSCOPE", digest[:12], "Пневмония")]
    (scheme,) = objects["report"].CodingSchemeIdentificationSequence
    assert scheme.CodingSchemeDesignator == "99LUNGSCOPE"
    for dataset in objects.values():  # Latin 1 can not say Пневмония
        assert dataset.SpecificCharacterSet == "ISO_IR 192"
        assert (dataset.PatientName, dataset.StudyDescription) == ("Müller^Jörg", "Thorax à 2")


def test_what_abstains_finds_nothing(analyzer: Analyzer, tmp_path: Path) -> None:
    report = analyzer.analyze(dx(tmp_path))
    assert report.classification is not None and not report.classification.abstained
    for thresholds, members in (((0.0, 0.0, 0.0), report.classification.labels), ((1.0, 1.0, 1.0), ())):
        unsure = replace(report.classification, conformal=Conformal(0.9, thresholds))
        (group,) = sr(made(replace(report, classification=unsure))).get_image_measurement_groups()
        evaluations = [(item.name.value, item.value.meaning) for item in group.get_qualitative_evaluations()]
        assert group.finding_type is None
        assert "Certainty of Finding" not in numbers(group)
        assert ("answer", "Abstained") in evaluations
        held = [meaning for name, meaning in evaluations if name == "conformal-set"]
        assert len(held) == max(1, len(members))
        assert (held == ["No class is in the set"]) == (not members)
    (group,) = sr(made(report)).get_image_measurement_groups()
    assert group.finding_type is not None
    certainty = numbers(group)["Certainty of Finding"]
    assert certainty == (pytest.approx(100 * report.to_json()["classification"]["probability"], rel=1e-5), "%")


def test_warnings_are_in_the_report(analyzer: Analyzer, tmp_path: Path) -> None:
    report = analyzer.analyze(dx(tmp_path, PatientOrientation=["R", "F"]))
    assert "mirrored" in [warning.code for warning in report.run.warnings]
    document = made(report)["report"]
    text = words(document)
    assert all(warning.message in text for warning in report.run.warnings)
    (group,) = sr({"report": document}).get_image_measurement_groups()
    codes = [item.value.value for item in group.get_qualitative_evaluations() if item.name.value == "113010"]
    assert codes == [warning.code for warning in report.run.warnings]


def test_a_mirrored_film_has_its_sides_where_its_header_says(analyzer: Analyzer, tmp_path: Path) -> None:
    plain = made(analyzer.analyze(dx(tmp_path, PatientOrientation=["L", "F"])))["lungs"]
    mirrored = made(analyzer.analyze(dx(tmp_path, PatientOrientation=["R", "F"])))["lungs"]
    assert [segment.SegmentLabel for segment in mirrored.SegmentSequence] == ["Right lung", "Left lung"]
    assert mirrored.PatientOrientation == ["R", "F"]
    np.testing.assert_array_equal(mirrored.pixel_array, plain.pixel_array[::-1])


@pytest.mark.parametrize(
    ("elements", "ratio"),
    [
        ({"ImagerPixelSpacing": [0.2, 0.4]}, [1, 2]),
        ({"ImagerPixelSpacing": None, "PixelAspectRatio": [3, 2]}, [3, 2]),
        ({}, None),
    ],
)
def test_pixels_that_are_not_square_stay_so(
    elements: dict[str, object], ratio: list[int] | None, analyzer: Analyzer, validator: str, tmp_path: Path
) -> None:
    report = analyzer.analyze(dx(tmp_path, **elements))
    write(report, tmp_path / "out", ["dicom"])
    assert_valid(tmp_path / "out", "lungs", "saliency", "overlay", "report")
    for kind in ("lungs", "saliency", "overlay"):
        assert dcmread(tmp_path / "out" / f"{kind}.dcm").get("PixelAspectRatio") == ratio


def test_evidence_too_weak_to_be_stored_is_no_failure(analyzer: Analyzer, tmp_path: Path, validator: str) -> None:
    report = analyzer.analyze(dx(tmp_path))
    assert report.saliency is not None
    weak = np.minimum(report.saliency.map, np.float32(EVIDENCE_SCALE / 1000))
    faint = replace(report, saliency=replace(report.saliency, map=weak, peak_value=float(weak.max())))
    write(faint, tmp_path / "out", ["dicom"])
    assert_valid(tmp_path / "out", "lungs", "saliency", "overlay", "report")
    assert not dcmread(tmp_path / "out" / "saliency.dcm").pixel_array.any()


def test_a_uid_of_two_values_is_told(analyzer: Analyzer, tmp_path: Path) -> None:
    report = analyzer.analyze(dx(tmp_path, StudyInstanceUID=["1.2.3", "1.2.4"]))
    with pytest.raises(InputError, match="StudyInstanceUID has 2 values"):
        dicom.objects(report)


def test_jpeg_inside_a_tiff_is_lossy(analyzer: Analyzer, tmp_path: Path) -> None:
    picture = Image.fromarray(np.rint(PICTURE * 255).astype(np.uint8))
    for compression, lossy in (("jpeg", "01"), ("tiff_deflate", None)):
        path = tmp_path / f"{compression}.tif"
        picture.save(path, compression=compression)
        report = analyzer.analyze(path)
        item = dicom.objects(report, new_study=True)["film"]
        assert item.get("LossyImageCompression") == lossy


def test_a_bundle_that_only_segments_makes_lungs_overlay_and_report(tmp_path: Path, validator: str) -> None:
    bundle = write_bundle(tmp_path / "bundle", classifier=False)
    write(Analyzer(bundle, device="cpu").analyze(dx(tmp_path)), tmp_path / "out", ["dicom"])
    assert_valid(tmp_path / "out", "lungs", "overlay", "report")


def test_severity_made_of_opacity_says_so(tmp_path: Path, validator: str) -> None:
    bundle = write_bundle(tmp_path / "bundle", opacity=True)
    report = Analyzer(bundle, device="cpu").analyze(dx(tmp_path))
    assert report.severity is not None and report.severity.basis == "opacity"
    write(report, tmp_path / "out", ["dicom"])
    assert_valid(tmp_path / "out", "lungs", "saliency", "overlay", "report")
    document = dcmread(tmp_path / "out" / "report.dcm")
    assert any(report.severity.definition in str(element.value) for element in document.iterall() if element.VR == "UT")


def test_a_film_without_evidence_has_no_saliency(analyzer: Analyzer, tmp_path: Path) -> None:
    report = analyzer.analyze(dx(tmp_path))
    assert report.saliency is not None
    none = replace(report.saliency, map=np.zeros_like(report.saliency.map), peak=None, peak_value=0.0)
    assert list(dicom.objects(replace(report, saliency=none))) == ["lungs", "overlay", "report"]


def test_a_lung_that_was_not_found_has_no_segment(analyzer: Analyzer, validator: str, tmp_path: Path) -> None:
    report = analyzer.analyze(dx(tmp_path, stored=as_integers(draw(lungs=["left"]), 12)))
    write(report, tmp_path / "out", ["dicom"])
    assert_valid(tmp_path / "out", "lungs", "saliency", "overlay", "report")
    lungs = hd.seg.segread(tmp_path / "out" / "lungs.dcm")
    assert [item.SegmentLabel for item in lungs.SegmentSequence] == ["Left lung"]
    np.testing.assert_array_equal(lungs.pixel_array, report.lungs.left)


@pytest.mark.parametrize("told", [None, "00"])
def test_a_film_in_lossy_jpeg_stays_lossy_whatever_its_header_says(
    told: str | None, analyzer: Analyzer, tmp_path: Path
) -> None:
    film = make_dicom(as_integers(PICTURE, 8), 8, LossyImageCompression=told)
    objects = made(analyzer.analyze(save_dicom(film, tmp_path / "scan.dcm", uid.JPEGBaseline8Bit)))
    for kind in ("lungs", "saliency", "overlay"):
        assert objects[kind].LossyImageCompression == "01"
        assert objects[kind].LossyImageCompressionMethod == "ISO_10918_1"


@pytest.mark.parametrize(("kind", "white"), [("PNG", 255), ("16-bit PNG", 65535)])
def test_a_new_study_holds_the_film_itself(kind: str, white: int, analyzer: Analyzer, tmp_path: Path) -> None:
    path = FILMS[kind](tmp_path)
    report = analyzer.analyze(path)
    objects = made(report, new_study=True)
    film = objects["film"]
    np.testing.assert_array_equal(film.pixel_array, np.rint(PICTURE * white))
    assert film.SOPClassUID == uid.SecondaryCaptureImageStorage
    assert {dataset.StudyInstanceUID for dataset in objects.values()} == {film.StudyInstanceUID}
    assert {dataset.PatientID for dataset in objects.values()} == {f"lungscope-{report.source.sha256[:16]}"}
    assert objects["lungs"].SourceImageSequence[0].ReferencedSOPInstanceUID == film.SOPInstanceUID
    # Other weights add to the study; they do not bring the film again.
    other = replace(report, run=replace(report.run, weights={"segmenter.onnx": "0" * 64}))
    assert uids(made(other, new_study=True)) & uids(objects) == {film.SOPInstanceUID}


def test_a_film_that_is_not_dicom_needs_a_new_study(analyzer: Analyzer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--new-study") as caught:
        dicom.objects(analyzer.analyze(FILMS["PNG"](tmp_path)))
    assert caught.value.code == "no-study"


def test_a_film_that_is_gone_or_changed_is_told_as_such(analyzer: Analyzer, tmp_path: Path) -> None:
    path = dx(tmp_path)
    report = analyzer.analyze(path)
    path.write_bytes(path.read_bytes()[:-2] + b"\1\1")
    with pytest.raises(UnreadableFileError, match="has changed"):
        dicom.objects(report)
    path.unlink()
    with pytest.raises(UnreadableFileError, match="can not be read again"):
        dicom.objects(report)


def test_a_film_out_of_memory_is_given_again(analyzer: Analyzer, tmp_path: Path) -> None:
    path = FILMS["DX"](tmp_path)
    data = path.read_bytes()
    report = analyzer.analyze(decode(data, "upload"))
    with pytest.raises(UnreadableFileError, match="Give its bytes again"):
        dicom.objects(report)
    assert uids(dicom.objects(report, film=data)) == uids(dicom.objects(analyzer.analyze(path)))
    drawn = analyzer.analyze(radiograph(PICTURE))
    assert "film" in dicom.objects(drawn, new_study=True)


def test_a_value_that_can_not_be_read_is_left_out(analyzer: Analyzer, tmp_path: Path) -> None:
    path = dx(tmp_path, **PATIENT)
    broken = path.read_bytes().replace(b"\x10\x00\x40\x00CS\x02\x00O ", b"\x10\x00\x40\x00FD\x02\x00O ")
    assert broken != path.read_bytes()
    path.write_bytes(broken)
    objects = made(analyzer.analyze(path))
    assert all(not dataset.PatientSex and dataset.PatientID == "N1" for dataset in objects.values())


def test_times_are_in_the_zone_that_the_film_states(analyzer: Analyzer, tmp_path: Path) -> None:
    report = analyzer.analyze(dx(tmp_path, TimezoneOffsetFromUTC="-0430"))
    report = replace(report, run=replace(report.run, created="2026-01-01T02:00:00+00:00"))
    for dataset in made(report).values():
        assert (dataset.ContentDate, dataset.ContentTime) == ("20251231", "213000")
        assert dataset.TimezoneOffsetFromUTC == "-0430"


@pytest.mark.parametrize("offset", ["+2400", "+1401", "-1201", "-0000"])
def test_a_time_zone_that_there_is_not_is_left_out(offset: str, analyzer: Analyzer, tmp_path: Path) -> None:
    objects = made(analyzer.analyze(dx(tmp_path, TimezoneOffsetFromUTC=offset)))
    assert objects and not any("TimezoneOffsetFromUTC" in dataset for dataset in objects.values())


@pytest.mark.parametrize(("offset", "date", "time"), [("+1400", "20260101", "160000"), ("-1200", "20251231", "140000")])
def test_the_farthest_time_zones_are_kept(
    offset: str, date: str, time: str, analyzer: Analyzer, tmp_path: Path
) -> None:
    report = analyzer.analyze(dx(tmp_path, TimezoneOffsetFromUTC=offset))
    report = replace(report, run=replace(report.run, created="2026-01-01T02:00:00+00:00"))
    for dataset in made(report).values():
        assert (dataset.ContentDate, dataset.ContentTime, dataset.TimezoneOffsetFromUTC) == (date, time, offset)


def test_analyze_writes_dicom_where_it_is_asked_for(tiny: Path, tmp_path: Path) -> None:
    films = tmp_path / "films"
    films.mkdir()
    FILMS["DX"](films).rename(films / "a.dcm")
    save(films / "b.png", PICTURE)
    out = tmp_path / "out"
    done = program("analyze", films, "--out", out, "--model", tiny, "--write", "json,dicom")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (out / "a").iterdir()} == {
        "report.json", "lungs.dcm", "saliency.dcm", "overlay.dcm", "report.dcm",
    }  # fmt: skip
    assert {path.name for path in (out / "b").iterdir()} == {"report.json"}
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [("no-study" in row["warnings"]) for row in rows] == [False, True]
    assert "--new-study" in (out / "b" / "report.json").read_text()

    done = program("analyze", films, "--out", out, "--model", tiny, "--write", "dicom", "--json")
    assert done.returncode == 1
    rows = json.loads(done.stdout)["rows"]
    assert [row["status"] for row in rows] == ["done", "failed"]
    assert rows[1]["error"]["code"] == "no-study"
    assert not (out / "b").exists()

    done = program("analyze", films, "--out", out, "--model", tiny, "--write", "dicom", "--new-study")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (out / "b").iterdir()} == {
        "film.dcm", "lungs.dcm", "saliency.dcm", "overlay.dcm", "report.dcm",
    }  # fmt: skip


def test_a_film_that_lies_where_its_results_would_go_is_left_alone(analyzer: Analyzer, tmp_path: Path) -> None:
    (tmp_path / "film").mkdir()
    film = FILMS["DX"](tmp_path).rename(tmp_path / "film" / "film.dcm")
    before = film.read_bytes()
    run = run_films(analyzer, [film], tmp_path, ["dicom"])
    assert run["failed"] == 1
    (row,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert "Name another --out" in row["error"]["message"]
    assert film.read_bytes() == before


def test_dicom_files_of_an_earlier_run_do_not_stay(analyzer: Analyzer, tmp_path: Path) -> None:
    report = analyzer.analyze(FILMS["PNG"](tmp_path))
    write(report, tmp_path / "out", ["dicom"], new_study=True)
    assert (tmp_path / "out" / "film.dcm").exists()
    write(report, tmp_path / "out", DEFAULT_FORMATS)
    assert not list((tmp_path / "out").glob("*.dcm"))


def test_without_the_extra_nothing_runs_and_the_rest_works(tiny: Path, tmp_path: Path) -> None:
    film = save(tmp_path / "film.png", PICTURE)
    code = """
import sys
sys.modules["highdicom"] = None
sys.argv = ["lungscope", "analyze", {film!r}, "--out", {out!r}, "--model", {model!r}, *{more!r}]
from lungscope.cli.main import main
main()
"""
    values = {"film": str(film), "out": str(tmp_path / "out"), "model": str(tiny)}
    done = python(code.format(**values, more=["--write", "json,dicom"]))
    assert done.returncode == 3
    assert "pip install 'lungscope[dicom-out]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    done = python(code.format(**values, more=[]))
    assert done.returncode == 0, done.stderr
