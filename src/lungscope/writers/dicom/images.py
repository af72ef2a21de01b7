"""The image objects: lungs and saliency as SEG, the overlay and a film that was no DICOM as Secondary Capture.

Masks and maps are on the film's stored pixel grid: the DICOM reader turns and flips nothing.
"""

from __future__ import annotations

import numpy as np
from highdicom import AlgorithmIdentificationSequence, SOPClass
from highdicom.color import CIELabColor
from highdicom.sc import SCImage
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from highdicom.sr import CodedConcept
from numpy.typing import NDArray
from pydicom import Dataset

from lungscope.report import DISCLAIMER
from lungscope.stages.localization import Saliency
from lungscope.writers.dicom import codes
from lungscope.writers.dicom.study import LOSSY, PRODUCT, Study
from lungscope.writers.overlay import EVIDENCE_SCALE, LEFT, RIGHT, render

#: A fractional SEG stores 0..255; 255 stands for this much evidence and more. The scale is that of the overlay.
LEVELS = 255


def sides(study: Study) -> list[str]:
    """The lungs that were found; segment 1 of the SEG is the first."""
    lungs = study.report.lungs
    return [side for side, mask in (("right", lungs.right), ("left", lungs.left)) if mask.any()]


def lungs(study: Study) -> SOPClass:
    """Binary SEG (PS3.3 A.51): a segment for each lung that was found."""
    labels = np.zeros(study.report.film.shape, np.uint8)
    descriptions = []
    for number, side in enumerate(sides(study), start=1):
        labels[getattr(study.report.lungs, side)] = number
        description = SegmentDescription(
            segment_number=number,
            segment_label=f"{side.capitalize()} lung",
            segmented_property_category=codes.ANATOMY,
            segmented_property_type=codes.LUNG,
            algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=_algorithm(study),
            tracking_id=f"{PRODUCT} {side} lung",
            tracking_uid=study.uid("lungs", side),
            display_color=CIELabColor.from_rgb(*(RIGHT if side == "right" else LEFT)),
        )
        # PS3.3 C.8.20.4: laterality modifies the type.
        kind = description.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [CodedConcept.from_code(codes.SIDES[side])]
        descriptions.append(description)
    return study.finish(
        Segmentation(
            source_images=[study.film],
            pixel_array=labels,
            segmentation_type=SegmentationTypeValues.BINARY,
            segment_descriptions=descriptions,
            content_label="LUNGS",
            content_description=DISCLAIMER,
            **study.head("lungs", "Lungs"),
        )
    )


def saliency(study: Study, evidence: Saliency) -> SOPClass:
    """Fractional SEG: the evidence for the predicted class in logit units, 255 for `EVIDENCE_SCALE` and more."""
    shares = np.minimum(evidence.map / np.float32(EVIDENCE_SCALE), np.float32(1))
    description = SegmentDescription(
        segment_number=1,
        segment_label=codes.title(f"Evidence for {evidence.label}"),
        segmented_property_category=codes.SPATIAL,
        segmented_property_type=codes.CLASS_ACTIVATION,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=_algorithm(study),
        tracking_id=f"{PRODUCT} evidence",
        tracking_uid=study.uid("saliency", "segment"),
        display_color=CIELabColor.from_rgb(251, 155, 6),
    )
    description.SegmentDescription = (
        f"Grad-CAM evidence for {evidence.label} inside the lungs, in logit units; it is neither a probability nor an "
        f"occupancy. Evidence = stored value / {LEVELS} x {EVIDENCE_SCALE:g}; {LEVELS} stands for {EVIDENCE_SCALE:g} "
        f"and more. The largest evidence in this film is {evidence.peak_value:.6g}. {DISCLAIMER}"
    )
    return study.finish(
        Segmentation(
            source_images=[study.film],
            pixel_array=shares,
            segmentation_type=SegmentationTypeValues.FRACTIONAL,
            max_fractional_value=LEVELS,
            omit_empty_frames=False,  # evidence may be less than a level everywhere
            segment_descriptions=[description],
            content_label="EVIDENCE",
            content_description=DISCLAIMER,
            **study.head("saliency", "Evidence"),
        )
    )


def overlay(study: Study) -> SOPClass:
    """Secondary Capture, RGB: the picture of overlay.png, drawn on a grid of its own."""
    image = _capture(study, render(study.report), "RGB", "overlay", "Overlay")
    image.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    image.DerivationDescription = (
        f"The film resampled, with lung outlines, heat map, zones and legend of {PRODUCT} burned in. {DISCLAIMER}"
    )
    image.DerivationCodeSequence = [CodedConcept.from_code(codes.SEGMENTATION_DERIVATION)]
    source = Dataset()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = study.film.SOPClassUID, study.film.SOPInstanceUID
    source.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(codes.SOURCE_IMAGE)]
    source.SpatialLocationsPreserved = "NO"
    image.SourceImageSequence = [source]
    _keep_lossy(image, study)
    # Whether the film's own pixels name the patient is for its file to say; nothing that is drawn here does.
    if study.header.get("BurnedInAnnotation") in ("YES", "NO"):
        image.BurnedInAnnotation = study.header.BurnedInAnnotation
    return study.finish(image)


def film(study: Study) -> SOPClass:
    """Secondary Capture, grey: a film that came as PNG, JPEG, TIFF or BMP, as the reader turned it, in its own bits."""
    pixels = study.report.film.pixels
    if int(study.report.source.tags.get("BitsPerSample", "8")) > 8:
        image = _capture(study, np.rint(pixels * 65535.0).astype(np.uint16), "MONOCHROME2", "film", "Film")
    else:
        image = _capture(study, np.rint(pixels * 255.0).astype(np.uint8), "MONOCHROME2", "film", "Film")
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = study.film.SOPInstanceUID
    image.SeriesInstanceUID = study.film.SeriesInstanceUID
    _keep_lossy(image, study)
    return study.finish(image)


def _capture(study: Study, pixels: NDArray[np.uint8] | NDArray[np.uint16], kind: str, name: str, title: str) -> SCImage:
    image = SCImage(
        pixel_array=pixels,
        photometric_interpretation=kind,
        bits_allocated=8 * pixels.itemsize,
        coordinate_system="PATIENT",
        # highdicom wants one; `finish` puts the film's own in its place.
        patient_orientation=("L", "F"),
        study_instance_uid=study.film.StudyInstanceUID,
        **study.head(name, title),
    )
    image.BodyPartExamined = study.header.get("BodyPartExamined") or "CHEST"
    if image.BodyPartExamined != "CHEST":  # type 2C where the part may be one of a pair (PS3.3 C.7.3.1)
        image.add_new("Laterality", "CS", study.header.get("Laterality"))
    image.ConversionType = "WSD"
    image.DateOfSecondaryCapture, image.TimeOfSecondaryCapture = image.ContentDate, image.ContentTime
    return image


def _keep_lossy(image: SOPClass, study: Study) -> None:
    for keyword in LOSSY:
        if keyword in study.film:
            image[keyword] = study.film[keyword]


def _algorithm(study: Study) -> AlgorithmIdentificationSequence:
    run = study.report.run
    return AlgorithmIdentificationSequence(
        name=PRODUCT,
        family=codes.AI,
        version=run.versions["lungscope"],
        parameters={"bundle": f"{run.bundle} {run.bundle_version}"}
        | {f"{name} sha256": digest for name, digest in run.weights.items()},
    )
