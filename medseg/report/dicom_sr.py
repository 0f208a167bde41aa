"""Measurements as a DICOM structured report: TID 1500, "Measurement Report" (PS3.16)."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import InputError
from medseg.io.dicom_header import parsing
from medseg.io.dicom_references import (
    UTF8,
    Source,
    code_of,
    equipment,
    headers,
    located,
    named,
    read_object,
    referring,
)
from medseg.io.files import written_whole
from medseg.labels import Label, complete
from medseg.report.measurements import Measurement

if TYPE_CHECKING:
    from highdicom.sr import CodedConcept
    from pydicom import Dataset


def save_dicom_sr(
    measurements: Sequence[Measurement],
    path: str | os.PathLike[str],
    *,
    source: Source,
    table: Sequence[Label] = (),
    segmentation: str | os.PathLike[str] | None = None,
) -> Path:
    """Write what `measure` gave as a DICOM SR (Comprehensive SR, TID 1500) and return its path.

    Each structure gets its volume in ml and, if an image was measured, mean, standard deviation, minimum and maximum,
    in Hounsfield units for CT and without units else; one that was not found is stated as absent. `table` gives the
    codes of the labels, as in the SEG. `segmentation` is the SEG of the same labels, whose segments the report then
    refers to (TID 1411), else the structures stand alone (TID 1501).
    Raises OutputError (`unreferable_source`) where the source lacks identifiers, InputError where `segmentation` is
    another object (`not_seg`) or has other labels (`other_labels`), and what reading raises.
    """
    from highdicom.sr import ComprehensiveSR
    from pydicom.uid import generate_uid

    path = Path(path)
    series, _ = located(source)
    sources = headers(series.slices)
    segments, numbers = (None, {}) if segmentation is None else _segments(Path(segmentation), measurements)
    rows = measurements or [Measurement(value=1, name="any label", voxels=0, volume_ml=0.0, centroid_mm=None)]
    labels = {label.value: label for label in complete(table, [row.value for row in rows])}
    with referring(path, series.slices):
        shared = [(_shared(row, labels[row.value], series.modality), numbers.get(row.value)) for row in rows]
        groups = [_group(content, sources, segments, number) for content, number in shared]
        own = equipment()
        report = ComprehensiveSR(
            evidence=[*{one.SOPInstanceUID: one for one in sources}.values(), *([segments] if segments else [])],
            content=_content(groups),
            series_instance_uid=generate_uid(),
            series_number=902,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer=own["Manufacturer"],
            is_complete=True,
            series_description="Measurements",
            manufacturer_model_name=own["ManufacturerModelName"],
            software_versions=own["SoftwareVersions"],
            specific_character_set=UTF8,
        )
        with written_whole(path) as beside:
            report.save_as(beside, enforce_file_format=True)
    return path


def _content(groups: Sequence[Any]) -> Dataset:
    from highdicom.sr import (
        DeviceObserverIdentifyingAttributes,
        MeasurementReport,
        ObservationContext,
        ObserverContext,
    )
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    own = equipment()
    device = DeviceObserverIdentifyingAttributes(
        uid=generate_uid(entropy_srcs=[*own.values()]),
        name=own["Manufacturer"],
        manufacturer_name=own["Manufacturer"],
        model_name=own["ManufacturerModelName"],
    )
    context = ObservationContext(observer_device_context=ObserverContext(codes.DCM.Device, device))
    content: Dataset = MeasurementReport(
        observation_context=context,
        procedure_reported=codes.SCT.ImagingProcedure,
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )[0]
    return content


def _shared(row: Measurement, label: Label, modality: str) -> dict[str, Any]:
    """Return what the measurement group of a structure holds, whether it refers to a segment or not."""
    from highdicom.sr import CodedConcept, QualitativeEvaluation, TrackingIdentifier
    from pydicom.sr.codedict import codes

    presence = CodedConcept("705057003", "SCT", "Presence")
    return {
        "tracking_identifier": TrackingIdentifier(identifier=named(row.name)),
        "finding_type": CodedConcept(*code_of(label)),
        "measurements": _numbers(row, modality),
        "qualitative_evaluations": [
            QualitativeEvaluation(presence, codes.SCT.Present if row.voxels else codes.SCT.Absent)
        ],
    }


def _group(shared: dict[str, Any], sources: Sequence[Dataset], segments: Dataset | None, number: int | None) -> Any:
    """Return the measurement group of one structure, which refers to the segment of this number, if there is one."""
    from highdicom.sr import (
        MeasurementsAndQualitativeEvaluations,
        ReferencedSegment,
        SourceSeriesForSegmentation,
        VolumetricROIMeasurementsAndQualitativeEvaluations,
    )

    if segments is None or number is None:
        return MeasurementsAndQualitativeEvaluations(**shared)
    segment = ReferencedSegment(
        segments.SOPClassUID,
        segments.SOPInstanceUID,
        number,
        source_series=SourceSeriesForSegmentation(sources[0].SeriesInstanceUID),
    )
    return VolumetricROIMeasurementsAndQualitativeEvaluations(**shared, referenced_segment=segment)


def _numbers(row: Measurement, modality: str) -> list[Any]:
    from highdicom.sr import CodedConcept, Measurement
    from pydicom.sr.codedict import codes

    milliliter = CodedConcept("ml", "UCUM", "milliliter")
    name, unit = _intensity(modality)
    statistics = {
        codes.SCT.Mean: row.intensity_mean,
        codes.SCT.StandardDeviation: row.intensity_std,
        codes.SCT.Minimum: row.intensity_min,
        codes.SCT.Maximum: row.intensity_max,
    }
    return [
        Measurement(codes.SCT.Volume, row.volume_ml, milliliter),
        *(
            Measurement(name, value, unit, derivation=derivation)
            for derivation, value in statistics.items()
            if value is not None
        ),
    ]


def _intensity(modality: str) -> tuple[CodedConcept, CodedConcept]:
    """Return what the voxels of a modality measure, and in what unit."""
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    if modality == "CT":
        return codes.DCM.AttenuationCoefficient, codes.UCUM.HounsfieldUnit
    if modality == "MR":
        return codes.DCM.MRSignalIntensity, codes.UCUM.NoUnits
    return CodedConcept("intensity", "99MEDSEG", "Voxel intensity"), codes.UCUM.NoUnits


def _segments(path: Path, measurements: Sequence[Measurement]) -> tuple[Dataset, dict[int, int]]:
    """Return the header of a SEG, and the number of its segment for the value of every structure that was found.

    They are told by their names, of which spaces at the end do not count (VR LO); those of one name by their order.
    """
    with parsing(path):
        data = read_object(path, "SEG", "SegmentSequence", pixels=False)
        numbers: dict[str, list[int]] = defaultdict(list)
        for item in data.SegmentSequence:
            numbers[str(item.SegmentLabel or "").rstrip()].append(int(item.SegmentNumber))
    found = {}
    for row in measurements:
        name = named(row.name).rstrip()
        if row.voxels and not numbers[name]:
            raise InputError(
                "The SEG does not have the labels that were measured. Pass the one written of the same labels.",
                path=path,
                reason="other_labels",
            )
        if row.voxels:
            found[row.value] = numbers[name].pop(0)
    return data, found
