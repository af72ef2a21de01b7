"""The report object: Comprehensive SR on TID 1500 "Measurement Report", with the numbers of report.json."""

from __future__ import annotations

from typing import Any

from highdicom import SOPClass
from highdicom.sr import (
    AlgorithmIdentification,
    ComprehensiveSR,
    DeviceObserverIdentifyingAttributes,
    FindingSite,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    PlanarROIMeasurementsAndQualitativeEvaluations,
    QualitativeEvaluation,
    ReferencedSegmentationFrame,
    RelationshipTypeValues,
    SourceImageForMeasurementGroup,
    SourceImageForSegmentation,
    TextContentItem,
    TrackingIdentifier,
)
from pydicom.sr.codedict import codes as dicom
from pydicom.sr.coding import Code

from lungscope.report import DISCLAIMER, SCHEMA_VERSION
from lungscope.stages.severity import ZONES
from lungscope.writers.dicom import codes
from lungscope.writers.dicom.images import sides
from lungscope.writers.dicom.study import PRODUCT, Study

Group = PlanarROIMeasurementsAndQualitativeEvaluations | MeasurementsAndQualitativeEvaluations


def document(study: Study, lungs: SOPClass, saliency: SOPClass | None) -> SOPClass:
    """The SR of a report. lungs, saliency: the SEG objects that its measurements refer to.

    It is complete, preliminary and unverified (PS3.3 C.17.2): nobody has looked at it.
    """
    facts = study.report.to_json()
    groups: list[Group] = [_film(study, facts)]
    groups += [_lung(study, facts, side, number, lungs) for number, side in enumerate(sides(study), start=1)]
    if saliency is not None:
        groups.append(_evidence(study, facts, saliency))
    content = MeasurementReport(
        observation_context=ObservationContext(
            observer_device_context=ObserverContext(
                observer_type=dicom.DCM.Device,
                observer_identifying_attributes=DeviceObserverIdentifyingAttributes(
                    uid=study.observer,
                    name=PRODUCT,
                    manufacturer_name=PRODUCT,
                    model_name=f"{study.report.run.bundle} {study.report.run.bundle_version}",
                ),
            )
        ),
        procedure_reported=codes.CHEST_FILM,
        imaging_measurements=groups,
    )
    return study.finish(
        ComprehensiveSR(
            evidence=[study.film, lungs, *([] if saliency is None else [saliency])],
            content=content,
            is_complete=True,
            is_final=False,
            is_verified=False,
            coding_schemes=[codes.scheme()],
            **study.head("report", "Report"),
        )
    )


def _film(study: Study, facts: dict[str, Any]) -> Group:
    """Class, severity of both lungs, and what to know before trusting any of it."""
    answer, severity, image = facts["classification"], facts["severity"] or {}, facts["image"]
    measurements = [
        *_number(codes.SEVERITY, severity.get("global"), codes.SCORE),
        *_number(codes.EVIDENCE_MEAN, severity.get("evidence"), codes.UNITLESS),
        *_number(codes.AGREEMENT, facts["lungs"]["agreement"], codes.UNITLESS),
    ]
    evaluations = [
        QualitativeEvaluation(codes.QUALITY, codes.own(warning["code"], warning["message"]))
        for warning in facts["run"]["warnings"]
    ]
    finding = None
    if answer is not None:
        finding = None if answer["abstained"] else codes.class_code(answer["label"])
        certainty = None if answer["abstained"] else answer["probability"]
        measurements += _share(codes.CERTAINTY, certainty)
        for label, probability in answer["probabilities"].items():
            measurements += _share(codes.probability(label), probability)
        measurements += _share(codes.COVERAGE, answer["conformal_coverage"])
        evaluations += [
            QualitativeEvaluation(codes.ANSWER, codes.ANSWERS[answer["abstained"]]),
            QualitativeEvaluation(codes.MOST_PROBABLE, codes.class_code(answer["label"])),
        ]
        if answer["conformal_set"] is not None:
            held = [codes.class_code(label) for label in answer["conformal_set"]] or [codes.EMPTY_SET]
            evaluations += [QualitativeEvaluation(codes.CONFORMAL, code) for code in held]
    group = MeasurementsAndQualitativeEvaluations(
        tracking_identifier=_tracking(study, "film"),
        finding_type=finding,
        finding_sites=[FindingSite(codes.LUNG)],
        algorithm_id=_algorithm(study),
        measurements=measurements,
        qualitative_evaluations=evaluations,
        source_images=[SourceImageForMeasurementGroup(study.sop_class, study.film.SOPInstanceUID)],
    )
    spacing = "unknown; areas are in pixels" if image["spacing_mm"] is None else image["spacing_origin"]
    comments = [
        DISCLAIMER,
        *(warning["message"] for warning in facts["run"]["warnings"]),
        *([severity["definition"]] if severity else []),
        *([severity["reason"]] if severity.get("reason") else []),
        f"Pixel spacing: {spacing}. Numbers are those of report.json, schema {SCHEMA_VERSION}.",
    ]
    for comment in comments:
        group[0].ContentSequence.append(TextContentItem(codes.COMMENT, comment, RelationshipTypeValues.CONTAINS))
    return group


def _lung(study: Study, facts: dict[str, Any], side: str, number: int, lungs: SOPClass) -> Group:
    """Area, extent and the zones of one lung, beside its segment."""
    lung, severity = facts["lungs"][side], facts["severity"]
    laterality = codes.SIDES[side]
    measurements = _number(codes.AREA, lung["area_cm2"], codes.SQUARE_CENTIMETRE) or _number(
        codes.AREA, lung["area_px"], codes.PIXELS
    )
    if severity is not None:
        measurements += _number(codes.EXTENT, severity["extent_percent"][side], codes.PERCENT)
        for letter, site in zip(ZONES[side], codes.THIRDS, strict=True):
            if (zone := severity["zones"][letter]) is not None:
                at = FindingSite(site, laterality=laterality)
                measurements += [
                    *_number(codes.zone_score(letter), zone["score"], codes.SCORE, at),
                    *_number(codes.zone_grade(letter), zone["grade"], codes.UNITLESS, at),
                    *_number(codes.zone_extent(letter), zone["extent_percent"], codes.PERCENT, at),
                    *_number(codes.zone_evidence(letter), zone["evidence"], codes.UNITLESS, at),
                ]
    return PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=_tracking(study, f"{side} lung", lungs.SegmentSequence[number - 1].TrackingUID),
        referenced_segment=_segment(study, lungs, number),
        finding_category=codes.ANATOMY,
        finding_type=codes.LUNG,
        finding_sites=[FindingSite(codes.LUNG, laterality=laterality)],
        algorithm_id=_algorithm(study),
        measurements=measurements,
    )


def _evidence(study: Study, facts: dict[str, Any], saliency: SOPClass) -> Group:
    """The largest evidence for the predicted class, beside its map."""
    found = facts["saliency"]
    return PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=_tracking(study, "evidence", saliency.SegmentSequence[0].TrackingUID),
        referenced_segment=_segment(study, saliency, 1),
        finding_category=codes.SPATIAL,
        finding_type=codes.CLASS_ACTIVATION,
        finding_sites=[FindingSite(codes.LUNG)],
        algorithm_id=_algorithm(study),
        measurements=[
            *_number(codes.EVIDENCE_PEAK, found["peak"]["value"], codes.UNITLESS),
            *_share(codes.EVIDENCE_INSIDE, found["fraction_in_lungs"]),
        ],
        qualitative_evaluations=[QualitativeEvaluation(codes.EVIDENCE_FOR, codes.class_code(found["label"]))],
    )


def _number(name: Code, value: float | None, unit: Code, site: FindingSite | None = None) -> list[Measurement]:
    """A measurement, or none where the number is not defined."""
    if value is None:
        return []
    measurement = Measurement(name, value, unit, finding_sites=None if site is None else [site])
    if isinstance(value, int):  # highdicom writes 4 as 4.0
        measurement[0].MeasuredValueSequence[0].NumericValue = str(value)
    return [measurement]


def _share(name: Code, share: float | None) -> list[Measurement]:
    """A share 0..1 in percent, with the six digits of report.json."""
    return _number(name, None if share is None else float(f"{100 * share:.6g}"), codes.PERCENT)


def _segment(study: Study, segmentation: SOPClass, number: int) -> ReferencedSegmentationFrame:
    reference = ReferencedSegmentationFrame(
        sop_class_uid=segmentation.SOPClassUID,
        sop_instance_uid=segmentation.SOPInstanceUID,
        frame_number=number,
        segment_number=number,
        source_image=SourceImageForSegmentation(study.sop_class, study.film.SOPInstanceUID),
    )
    # A frame is named by its number or by its segment, never by both (PS3.3 Table 10-3).
    del reference[0].ReferencedSOPSequence[0].ReferencedSegmentNumber
    return reference


def _tracking(study: Study, name: str, uid: str | None = None) -> TrackingIdentifier:
    return TrackingIdentifier(uid=uid or study.uid("tracking", name), identifier=f"{PRODUCT} {name}")


def _algorithm(study: Study) -> AlgorithmIdentification:
    """TID 4019, with the SHA-256 of every file of weights."""
    run = study.report.run
    return AlgorithmIdentification(
        name=PRODUCT,
        version=run.versions["lungscope"],
        manufacturer=PRODUCT,
        family=codes.AI,
        parameters=[
            f"bundle={run.bundle} {run.bundle_version}",
            *(f"sha256({name})={digest}" for name, digest in run.weights.items()),
            f"device={run.device}, precision={run.precision}",
        ],
    )
