"""Coded concepts: SNOMED CT (SCT), DICOM (DCM) and UCUM where they have one, else this project's own scheme."""

from __future__ import annotations

import hashlib

from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

SCHEME = "99LUNGSCOPE"


def scheme() -> CodingSchemeIdentificationItem:
    return CodingSchemeIdentificationItem(designator=SCHEME, name="Private codes of lungscope, see its docs/dicom.md")


def own(value: str, meaning: str) -> Code:
    """A concept of this project's own scheme."""
    return Code(value, SCHEME, title(meaning))


def title(text: str) -> str:
    """`text` as a Code Meaning or a label may be: at most 64 characters, no backslash (PS3.5 6.2, LO)."""
    return text.replace("\\", "/")[:64]


LUNG = codes.SCT.Lung
SIDES = {"right": codes.SCT.Right, "left": codes.SCT.Left}
#: The site of each third of a lung, from the top.
THIRDS = (codes.SCT.UpperZoneOfLung, codes.SCT.MiddleZoneOfLung, codes.SCT.LowerZoneOfLung)

ANATOMY = codes.SCT.AnatomicalStructure
SPATIAL = codes.SCT.SpatialAndRelationalConcept
CLASS_ACTIVATION = codes.DCM.GradientWeightedClassActivation
CHEST_FILM = Code("399208008", "SCT", "Plain chest X-ray")
AREA = codes.SCT.Area
CERTAINTY = codes.DCM.CertaintyOfFinding
QUALITY = codes.DCM.QualityIssue
COMMENT = codes.DCM.Comment
AI = codes.DCM.ArtificialIntelligence
SEGMENTATION_DERIVATION = codes.DCM.Segmentation
SOURCE_IMAGE = codes.DCM.SourceImageForImageProcessingOperation

SQUARE_CENTIMETRE = Code("cm2", "UCUM", "square centimeter")
PIXELS = Code("{pixels}", "UCUM", "pixels")
PERCENT = Code("%", "UCUM", "percent")
SCORE = Code("{score}", "UCUM", "score")
UNITLESS = Code("1", "UCUM", "no units")

#: Classes that have a code; a bundle may name others.
CLASSES = {
    "COVID-19": Code("840539006", "SCT", "COVID-19"),
    "Normal": codes.SCT.Normal,
    "Viral Pneumonia": Code("75570004", "SCT", "Viral pneumonia"),
    "Lung Opacity": codes.DCM.Opacity,
}

EXTENT = own("extent", "Involved share of the lung")
EVIDENCE_FOR = own("evidence-for", "Class that the evidence speaks for")
EVIDENCE_PEAK = own("evidence-peak", "Largest evidence for the class, logit units")
EVIDENCE_INSIDE = own("evidence-inside", "Share of the evidence that lies in the lungs")
EVIDENCE_MEAN = own("evidence-mean", "Mean log-odds of disease in the lungs")
SEVERITY = own("severity", "Severity score of both lungs, 0 to 18")
AGREEMENT = own("agreement", "Agreement of the segmentation networks, mean Dice")
COVERAGE = own("coverage", "Coverage of the conformal set, for each class")
CONFORMAL = own("conformal-set", "Class in the conformal set")
EMPTY_SET = own("none", "No class is in the set")
MOST_PROBABLE = own("most-probable", "Most probable class")
ANSWER = own("answer", "Answer of the classifier")
ANSWERS = {True: own("abstained", "Abstained"), False: own("answered", "Answered")}


def class_code(label: str) -> Code:
    """The concept of a class; for a label that has none, one of the project's own scheme, named by the label."""
    return CLASSES.get(label) or own(_value(label), label)


def probability(label: str) -> Code:
    return own(f"p:{_value(label)}", f"Probability of {label}")


def zone_score(letter: str) -> Code:
    return own(f"zone-{letter}", f"Severity score of lung zone {letter}, 0 to 3")


def zone_grade(letter: str) -> Code:
    return own(f"zone-{letter}-grade", f"Grade of lung zone {letter}, on the scale of its score")


def zone_extent(letter: str) -> Code:
    return own(f"zone-{letter}-extent", f"Involved share of lung zone {letter}")


def zone_evidence(letter: str) -> Code:
    return own(f"zone-{letter}-mean", f"Mean log-odds of disease in lung zone {letter}")


def _value(label: str) -> str:
    """A label as a Code Value: itself in ASCII, else its digest, as lengths are counted in bytes by some readers."""
    return label.replace("\\", "/") if label.isascii() else hashlib.sha256(label.encode()).hexdigest()[:12]
