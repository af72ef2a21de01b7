"""De-identification of the objects that leave: the Basic Application Level Confidentiality Profile (PS3.15 E), with the
Clean Structured Content and Clean Descriptors options (E.3.4, E.3.5) for what lungscope itself writes.

The profile's table of attributes comes from the package dicom-anonymizer, which generates it from the standard. It is
applied at every depth. A UID becomes one that depends on it and on a key alone, so that all objects of a study stay
together in every run, and no one without the key can tell which study it was.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import UUID

from dicomanonymizer.dicomfields_selector import dicom_anonymization_database_selector
from pydicom import DataElement, Dataset, Sequence, dcmread
from pydicom.sr.codedict import codes
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID

from lungscope.report import Report
from lungscope.writers.atomic import whole_file
from lungscope.writers.dicom import encode, objects
from lungscope.writers.dicom.study import ISSUER

#: The edition of PS3.15 Table E.1-1 that is applied.
EDITION = "2026c"
#: What the table's groups of attributes come to. Where the standard leaves a choice, the one that suits every IOD.
_ACTIONS = {
    "X_TAGS": "X", "Z_TAGS": "Z", "D_TAGS": "D", "U_TAGS": "U", "X_Z_TAGS": "Z", "Z_D_TAGS": "D", "X_D_TAGS": "D",
    "X_Z_D_TAGS": "D", "X_Z_U_STAR_TAGS": "K",
}  # fmt: skip
#: Kept, and cleaned in depth: what stands here is written by lungscope, out of no words of the film.
_OWN = ("ContentSequence", "SeriesDescription", "DerivationDescription", "ImageComments")
_DUMMIES = {"DA": "19000101", "TM": "000000", "DT": "19000101000000", "AS": "000Y", "DS": "0", "IS": "0"}
_TEXT = ("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT")
_STANDARD = "1.2.840.10008."


class Deidentifier:
    """Takes the patient out of objects. key: secret; the same one gives the same patients and studies again."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        table = dicom_anonymization_database_selector(f"dicomfields_{EDITION}")
        listed = [(tag, action) for name, action in _ACTIONS.items() for tag in table[name]]
        self._actions = {Tag(*tag): action for tag, action in listed if len(tag) == 2}
        self._actions |= {Tag(keyword): "K" for keyword in _OWN}
        #: Repeating groups: group, element, and a mask for each.
        self._repeating = [(tag, action) for tag, action in listed if len(tag) == 4]

    @classmethod
    def load(cls, path: Path) -> Deidentifier:
        """With the key in the file `path`, which is made where there is none."""
        if not path.exists():
            with whole_file(path, durable=True) as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(os.urandom(32))
        return cls(path.read_bytes())

    def objects(self, report: Report, *, film: bytes | None = None) -> dict[str, Dataset]:
        """A report's objects without the patient. The table does not list all that a patient or study may have, so
        nothing is taken of the film's header but what an object must have, and who issued the Patient ID. film: as for
        `writers.dicom.objects`."""
        return self.apply(objects(report, film=film, needed_only=True), report)

    def apply(self, objects: Mapping[str, Dataset], report: Report) -> dict[str, Dataset]:
        """Copies of a report's objects, made with `needed_only`, without the patient.

        The overlay shows the film, and with it any text in its pixels. It is left out unless the film says that there
        is none (Burned In Annotation NO, PS3.3 C.7.6.1).
        """
        clean = report.source.tags.get("BurnedInAnnotation") == "NO"
        return {kind: self._copy(item) for kind, item in objects.items() if clean or kind != "overlay"}

    def _copy(self, original: Dataset) -> Dataset:
        # Objects of a report share elements; read from its bytes, a copy shares none.
        dataset = dcmread(BytesIO(encode(original)))
        pseudonym = f"ANON-{self._digest(_patient(dataset))[:16]}"
        for keyword in ISSUER:  # the table does not list both
            dataset.pop(keyword, None)
        self._clean(dataset)
        self._clean(dataset.file_meta)
        dataset.PatientID = dataset.PatientName = pseudonym
        dataset.PatientIdentityRemoved = "YES"
        dataset.LongitudinalTemporalInformationModified = "REMOVED"
        dataset.DeidentificationMethod = f"lungscope, PS3.15 {EDITION} Table E.1-1"
        options = (
            codes.DCM.BasicApplicationConfidentialityProfile,
            codes.DCM.CleanDescriptorsOption,
            codes.DCM.CleanStructuredContentOption,
        )
        dataset.DeidentificationMethodCodeSequence = Sequence(map(_coded, options))
        return dataset

    def _clean(self, dataset: Dataset) -> None:
        for element in list(dataset):
            action = "X" if element.tag.is_private else self._action(element.tag)
            if action == "X":
                del dataset[element.tag]
            elif action == "Z":
                element.value = None
            elif action == "D":
                element.value = None if element.is_empty else _dummy(element.VR)
            elif action == "U":
                self._replace_uids(element)
            elif element.VR == "SQ":
                for item in element.value:
                    self._clean(item)

    def _action(self, tag: BaseTag) -> str:
        if action := self._actions.get(tag):
            return action
        for (group, element, group_mask, element_mask), action in self._repeating:
            if tag.group & group_mask == group & group_mask and tag.element & element_mask == element & element_mask:
                return action
        return "K"

    def _replace_uids(self, element: DataElement) -> None:
        values = [element.value] if element.VM < 2 else list(element.value)
        new = [value if not value or value.startswith(_STANDARD) else self.uid(value) for value in values]
        element.value = new if element.VM > 1 else new[0]

    def uid(self, original: str) -> UID:
        """What stands for the UID `original` in every object: a UUID under the root 2.25 (PS3.5 B.2)."""
        return UID(f"2.25.{UUID(hex=self._digest(original)[:32], version=5).int}")

    def _digest(self, value: str) -> str:
        return hmac.new(self._key, value.encode(), "sha256").hexdigest()


def _patient(dataset: Dataset) -> str:
    """Whose an object is: the Patient ID, with those who issued it where they are named (PS3.3 Table 10-18), as places
    may give one ID to several patients; the study's UID where there is no ID."""
    if not (patient := str(dataset.get("PatientID") or "")):
        return str(dataset.StudyInstanceUID)
    qualifiers = dataset.get("IssuerOfPatientIDQualifiersSequence")
    items = qualifiers if isinstance(qualifiers, Sequence) else ()
    named = [str(dataset.get("IssuerOfPatientID") or ""), *(str(item.get("UniversalEntityID") or "") for item in items)]
    return "\0".join((patient, *named)) if any(named) else patient


def _dummy(vr: str) -> str | None:
    """A value that says nothing; None, for an empty one, where the VR has none."""
    return _DUMMIES.get(vr, "REMOVED" if vr in _TEXT else None)


def _coded(code: Any) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item
