"""Where the objects go: the patient, the study and the film that they belong to, and the UIDs that they get."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from io import BytesIO
from typing import Any, Self
from uuid import NAMESPACE_OID, uuid5

from highdicom import UID, SOPClass
from pydicom import DataElement, Dataset, dcmread
from pydicom.charset import python_encoding
from pydicom.datadict import keyword_for_tag
from pydicom.dataelem import RawDataElement
from pydicom.filewriter import correct_ambiguous_vr
from pydicom.uid import JPEGBaseline8Bit, JPEGExtended12Bit, SecondaryCaptureImageStorage
from pydicom.valuerep import DT

from lungscope.errors import InputError, UnreadableFileError
from lungscope.report import DISCLAIMER, Report
from lungscope.stages.quality import Warning_

PRODUCT = "lungscope"
#: Each object is a series of its own; high numbers put it after what was acquired.
SERIES = {"film": 1, "lungs": 9001, "saliency": 9002, "overlay": 9003, "report": 9004}

#: Type 2 in the Patient and General Study modules (PS3.3 C.7.1.1, C.7.2.1): there, but perhaps empty.
TYPE_2 = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)
#: The value representations that Specific Character Set speaks of (PS3.5 6.1.2.2), and its terms for ASCII alone.
TEXT, ASCII = ("LO", "LT", "PN", "SH", "ST", "UC", "UT"), ("", "ISO_IR 6", "ISO 2022 IR 6")
#: Whether pixels were ever lossy stays with what is made of them (PS3.3 C.7.6.1.1.5).
LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
#: What Pillow calls JPEG inside a TIFF, by its newer and its older tag.
JPEG_IN_TIFF = ("jpeg", "tiff_jpeg")
#: By whom a Patient ID was given (PS3.3 Table 10-18): without it one ID may stand for patients of several places.
ISSUER = ("IssuerOfPatientID", "IssuerOfPatientIDQualifiersSequence")
#: All that is kept of a film's header where nothing but what an object must have is wanted, and what tells whose it is.
NEEDED = (
    *("SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"),
    *TYPE_2,
    *ISSUER,
    *("Modality", "PatientOrientation", "BurnedInAnnotation"),
    *LOSSY,
)
#: What a value of those is made of that could hold any word.
WORDS = {"PatientOrientation": "[ALRPHF]{1,3}", "LossyImageCompressionMethod": "ISO_[0-9_]+"}


@dataclass(frozen=True)
class Study:
    """One film's report, and what its objects need to know of the film's own file.

    header: the film's attributes without its pixels; patient and study are copied from here, as they are.
    texts: those of them that the character set speaks of, as their bytes, each with the data set that it is in; none
    where the objects are in another character set.
    film: what highdicom is shown as the film: the UIDs and the grid, as a Secondary Capture. A CR or DX image is no
    plane in space either, and a film may be of a kind that highdicom does not know. `finish` names the true SOP class.
    sop_class: that class. is_new: whether the film is not DICOM, and the study was made for it.
    moment: when the film was analysed, in the time zone that its file states, else in this machine's.
    """

    report: Report
    header: Dataset
    texts: list[tuple[Dataset, RawDataElement]]
    film: Dataset
    sop_class: str
    is_new: bool
    moment: datetime

    @classmethod
    def of(cls, report: Report, *, new_study: bool, film: bytes | None, needed_only: bool) -> Self:
        """Raises as `lungscope.writers.dicom.objects` does."""
        is_new = report.source.format != "DICOM"
        if is_new and not new_study:
            raise InputError(
                f"{report.source.path or 'The film'}: is no DICOM file ({report.source.format}), so there is no study "
                "that DICOM objects could belong to. Ask for a new one (--new-study), or leave dicom out of --write.",
                code="no-study",
            )
        header, texts = (Dataset(), []) if is_new else _read_header(report, film)
        if needed_only:
            for element in list(header):
                if element.keyword not in NEEDED or not _fits(element):
                    del header[element.tag]
        for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
            if keyword in header and header[keyword].VM > 1:
                raise InputError(
                    f"{report.source.path or 'The film'}: its {keyword} has {header[keyword].VM} values, so that no "
                    "object can refer to it; one is allowed. Send it again with its own.",
                    code="no-study",
                )
        digest = report.source.sha256
        meta = getattr(header, "file_meta", Dataset())
        sop_class = header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or SecondaryCaptureImageStorage
        header.SOPClassUID = SecondaryCaptureImageStorage
        header.SOPInstanceUID = (
            header.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID") or _uid(digest, "film")
        )
        header.SeriesInstanceUID = header.get("SeriesInstanceUID") or _uid(digest, "film", "series")
        header.StudyInstanceUID = header.get("StudyInstanceUID") or _uid(digest, "study")
        for keyword in TYPE_2:
            if keyword not in header:
                setattr(header, keyword, None)
        if is_new:
            header.PatientID = f"{PRODUCT}-{digest[:16]}"
        if _is_jpeg(report) and header.get("LossyImageCompression") != "01":
            header.LossyImageCompression, header.LossyImageCompressionMethod = "01", "ISO_10918_1"
        zone = _zone(header)
        if zone is None and "TimezoneOffsetFromUTC" in header:
            del header.TimezoneOffsetFromUTC
        if not _ascii(report):
            if altered := [] if needed_only else _altered(header, texts):
                report = _warned(report, altered)
            header.decode()
            header.SpecificCharacterSet, texts = "ISO_IR 192", []
        return cls(report, header, texts, _as_capture(header, report), sop_class, is_new, _moment(report, zone))

    def uid(self, *names: str) -> UID:
        """A UID for what `names` say, always the same for one film analysed with the same bundle in the same way."""
        run = self.report.run
        how = (run.versions["lungscope"], run.manifest, *sorted(run.weights.values()), run.device, run.precision)
        return _uid(self.film.SOPInstanceUID, self.report.source.sha256, *how, *names)

    @property
    def observer(self) -> UID:
        """The UID of this version of the program, which is who observed (TID 1004)."""
        return _uid("observer", self.report.run.versions["lungscope"])

    def head(self, kind: str, title: str) -> dict[str, Any]:
        """What highdicom's classes take of an object's series, instance and equipment."""
        run = self.report.run
        return {
            "series_instance_uid": self.uid(kind, "series"),
            "series_number": SERIES[kind],
            "sop_instance_uid": self.uid(kind),
            "instance_number": 1,
            "manufacturer": PRODUCT,
            "manufacturer_model_name": PRODUCT,
            "software_versions": [run.versions["lungscope"], f"{run.bundle} {run.bundle_version}"[:64]],
            # Type 1 in SEG (PS3.3 C.7.5.2), and software has none.
            "device_serial_number": run.versions["lungscope"],
            "series_description": f"{title} (research, not for diagnosis)",
            "content_date": self.moment.date(),
            "content_time": self.moment.time(),
        }

    def finish(self, dataset: SOPClass) -> SOPClass:
        """Copy patient and study, and set what highdicom leaves to chance or to the clock.

        Texts are copied as bytes: where they do not fit the film's character set, words made of them would be others.
        """
        dataset.copy_patient_and_study_information(self.header)
        for keyword in ("SpecificCharacterSet", "TimezoneOffsetFromUTC"):
            if keyword in self.header:
                dataset[keyword] = self.header[keyword]
        dataset.InstanceCreationDate = dataset.ContentDate
        dataset.InstanceCreationTime = dataset.ContentTime
        for item in dataset.ContributingEquipmentSequence:
            item.ContributionDateTime = DT(self.moment)
        if "Rows" in dataset:
            dataset.PatientOrientation = self.header.get("PatientOrientation") or None
            dataset.ImageComments = DISCLAIMER
            height, width = self.report.film.pixel_aspect
            ratio = Fraction(height / width).limit_denominator(1000)
            if 0 < ratio != 1:  # type 1C where no spacing stands beside the pixels (PS3.3 C.7.6.3)
                dataset.PixelAspectRatio = [ratio.numerator, ratio.denominator]
        for item in (*dataset.get("DimensionOrganizationSequence", ()), *dataset.get("DimensionIndexSequence", ())):
            item.DimensionOrganizationUID = self.uid(dataset.SOPInstanceUID, "dimensions")
        dataset.walk(self._name_film)
        # pydicom writes bytes as they are only into the encoding and character set that they came from, and what it
        # sees as such it writes without this.
        correct_ambiguous_vr(dataset, True)
        for owner, text in self.texts:  # at last: what is read becomes words
            copy = dataset if owner is self.header else owner
            if copy is owner or (text.tag in dataset and dataset.get_item(text.tag) is owner.get_item(text.tag)):
                copy[text.tag] = text
                copy.set_original_encoding(False, True, owner.original_character_set)
        return dataset

    def _name_film(self, dataset: Dataset, element: Any) -> None:
        if element.keyword == "ReferencedSOPInstanceUID" and element.value == self.film.SOPInstanceUID:
            dataset.ReferencedSOPClassUID = self.sop_class


def _read_header(report: Report, film: bytes | None) -> tuple[Dataset, list[tuple[Dataset, RawDataElement]]]:
    """`Study.header` and `Study.texts` of a DICOM film."""
    path = report.source.path
    name = str(path or "The film")
    if film is None and path is None:
        raise UnreadableFileError(f"{name}: was read from memory. Give its bytes again: patient and study are in them.")
    try:
        data = film if film is not None or path is None else path.read_bytes()
    except OSError as error:
        raise UnreadableFileError(
            f"{name}: can not be read again for its patient and study ({error.strerror}). Leave it in place until its "
            "results are written."
        ) from error
    if data is None or hashlib.sha256(data).hexdigest() != report.source.sha256:
        raise UnreadableFileError(f"{name}: is not the file that was analysed; it has changed. Analyse it again.")
    header = dcmread(BytesIO(data), force=True, stop_before_pixels=True)
    return header, _decoded(header)


def _decoded(dataset: Dataset) -> list[tuple[Dataset, RawDataElement]]:
    """Decode every element at every depth, and leave out what can not be. Returns the texts as their bytes, as elements
    of a file in explicit VR, each with the data set that it is in."""
    texts: list[tuple[Dataset, RawDataElement]] = []
    for tag in list(dataset.keys()):
        raw: DataElement | RawDataElement = dataset.get_item(tag)
        try:
            element = dataset[tag]
        except Exception:  # a value that its own VR can not hold; pydicom lets nearly every type escape
            del dataset[tag]
            continue
        if element.VR == "SQ":
            for item in element.value or ():
                texts += _decoded(item)
        elif isinstance(raw, RawDataElement) and raw.value and element.VR in TEXT:
            value = raw.value + b" " * (len(raw.value) % 2)
            texts.append((dataset, raw._replace(VR=element.VR, value=value, length=len(value))))
    return texts


def _altered(header: Dataset, texts: list[tuple[Dataset, RawDataElement]]) -> list[str]:
    """The keywords of what says whose film it is and does not fit the film's character set, so that words made of it
    may be others."""
    declared = header.get("SpecificCharacterSet") or ""
    terms = [declared] if isinstance(declared, str) else declared
    known = any(term in python_encoding and term not in ASCII for term in terms)
    found = []
    for owner, text in texts:
        keyword = keyword_for_tag(text.tag)
        if owner is header and keyword in (*TYPE_2, "StudyDescription"):
            fits = known or (text.value or b"").isascii()
            if not fits or "\ufffd" in str(header[text.tag].value):
                found.append(keyword)
    return found


def _warned(report: Report, altered: list[str]) -> Report:
    """The report with a warning that names what is `_altered`; it goes into the SR."""
    message = (
        f"{', '.join(altered)}: the film's value does not fit its Specific Character Set, and is altered in the DICOM "
        "objects, which are in UTF-8. Correct the character set in the film and analyse it again."
    )
    warnings = (*report.run.warnings, Warning_("character-set", message, "dicom"))
    return replace(report, run=replace(report.run, warnings=warnings))


def _fits(element: DataElement) -> bool:
    """Whether an element of `NEEDED` holds what `WORDS` has it hold."""
    if element.keyword not in WORDS:
        return True
    values = [element.value] if element.VM < 2 else element.value
    return all(re.fullmatch(WORDS[element.keyword], str(value).strip()) for value in values if value)


def _is_jpeg(report: Report) -> bool:
    """Whether the film's file is a JPEG that can not be lossless, whatever its header says."""
    tags = report.source.tags
    is_jpeg = report.source.format == "JPEG" or tags.get("Compression") in JPEG_IN_TIFF
    return is_jpeg or tags.get("TransferSyntaxUID") in (JPEGBaseline8Bit, JPEGExtended12Bit)


def _as_capture(header: Dataset, report: Report) -> Dataset:
    film = Dataset()
    for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        setattr(film, keyword, header[keyword].value)
    for keyword in TYPE_2:
        setattr(film, keyword, None)
    film.Modality = header.get("Modality") or "OT"
    film.Rows, film.Columns = report.film.shape
    if header.get("LossyImageCompression") in ("00", "01"):
        for keyword in LOSSY:
            if header.get(keyword):
                film[keyword] = header[keyword]
    return film


def _uid(*names: str) -> UID:
    """A name-based UUID (RFC 9562, version 5) under the root 2.25 (PS3.5 B.2), which nobody has to register."""
    return UID.from_uuid(str(uuid5(NAMESPACE_OID, "\n".join((PRODUCT, *names)))))


def _ascii(report: Report) -> bool:
    """Whether every character set can hold what the objects say in words."""
    answer, severity, run = report.classification, report.severity, report.run
    words = [run.bundle, run.bundle_version, *(warning.message for warning in run.warnings)]
    words += [] if answer is None else answer.labels
    words += [] if severity is None else [severity.definition, severity.reason or ""]
    return all(word.isascii() for word in words)


def _zone(header: Dataset) -> timezone | None:
    """The time zone that a film states; None where it states none that there is (PS3.3 C.12.1.1.8)."""
    offset = re.fullmatch(r"([+-])(\d\d)([0-5]\d)", str(header.get("TimezoneOffsetFromUTC", "")))
    if offset is None or offset[0] == "-0000":
        return None
    sign, hours, minutes = offset.groups()
    shift = timedelta(hours=int(hours), minutes=int(minutes)) * (-1 if sign == "-" else 1)
    return timezone(shift) if timedelta(hours=-12) <= shift <= timedelta(hours=14) else None


def _moment(report: Report, zone: timezone | None) -> datetime:
    return datetime.fromisoformat(report.run.created).astimezone(zone).replace(tzinfo=None)
