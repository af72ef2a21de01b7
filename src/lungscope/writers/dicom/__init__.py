"""DICOM objects out of a report: SEG, Secondary Capture and Comprehensive SR, in the film's own study.

    film      Secondary Capture of a film that came as PNG, JPEG, …; only in a study of its own
    lungs     SEG, binary: the lungs on the film's pixel grid
    saliency  SEG, fractional: the evidence for the predicted class; only where there is some
    overlay   Secondary Capture, RGB: what overlay.png shows, for viewers that show nothing else
    report    Comprehensive SR, TID 1500: areas, class, severity and evidence as in report.json, coded

A report always gives the same objects, byte for byte. Their UIDs depend on the film, on the weights and on how they
were computed, so that a film that is analysed twice is stored once.
"""

from __future__ import annotations

from io import BytesIO

from pydicom import Dataset

from lungscope.errors import MissingExtraError
from lungscope.report import Report

try:
    from lungscope.writers.dicom import images, measurements
    from lungscope.writers.dicom.study import Study
except ModuleNotFoundError as error:
    if (error.name or "").startswith("lungscope"):
        raise
    raise MissingExtraError("Writing DICOM objects", "dicom-out") from error


def objects(
    report: Report, *, new_study: bool = False, film: bytes | None = None, needed_only: bool = False
) -> dict[str, Dataset]:
    """The DICOM objects of a report, by kind (see above); each refers only to those before it.

    new_study: give a film that is not DICOM a study of its own, with the film in it; says nothing of DICOM films.
    film: the bytes of the film's file, for a DICOM film that was not read from a path; else the file is read again.
    Texts of the film's header are in the objects as bytes; pydicom makes words of one that is read here, and
    writes those. needed_only: take nothing of the film's header but what an object must have (`study.NEEDED`).

    Raises InputError (code "no-study") for a film that is not DICOM without `new_study`, or one whose UIDs have several
    values; UnreadableFileError where the film's file is gone or is not what was analysed.
    """
    study = Study.of(report, new_study=new_study, film=film, needed_only=needed_only)
    made: dict[str, Dataset] = {}
    if study.is_new:
        made["film"] = images.film(study)
    lungs = made["lungs"] = images.lungs(study)
    saliency = None
    if report.saliency is not None and report.saliency.peak is not None:
        saliency = made["saliency"] = images.saliency(study, report.saliency)
    made["overlay"] = images.overlay(study)
    made["report"] = measurements.document(study, lungs, saliency)
    return made


def encode(dataset: Dataset) -> bytes:
    """An object as a DICOM file (PS3.10)."""
    with BytesIO() as file:
        dataset.save_as(file, enforce_file_format=True)
        return file.getvalue()
