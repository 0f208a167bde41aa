"""Measurements as DICOM SR, read back by highdicom, by dcmqi and by the outside judge dciodvfy."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pydicom
import pytest
from dicom_files import STUDY, errors_of_dciodvfy, judge, some_labels, write_source

import medseg
from medseg.errors import InputError, OutputError, UnreadableFile
from medseg.io.dicom_seg import save_dicom_seg
from medseg.labels import Label, SnomedCode, make_labels
from medseg.report.dicom_sr import save_dicom_sr
from medseg.report.measurements import Measurement, measure

TABLE = (
    Label(value=1, name="Füße", color="#ff0000"),
    Label(value=5, name="left kidney", color="#00ff7f", snomed=SnomedCode(value="64033007", meaning="Kidney")),
    Label(value=7, name="not there", color="#ffffff"),
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "ct")


def measured(source: Path) -> tuple[list[Measurement], Path]:
    image = medseg.load(source)
    labels = some_labels(image.grid, (1, 5))
    path = source.parent / "seg.dcm"
    save_dicom_seg(labels, path, source=source, table=TABLE)
    return measure(labels, TABLE, image), path


def groups_of(path: Path) -> dict[str, Any]:
    """Return the measurement groups of a report by tracking identifier."""
    from highdicom.sr import srread

    content = srread(path).content
    groups = [
        *content.get_image_measurement_groups(),
        *content.get_volumetric_roi_measurement_groups(),
    ]
    return {group.tracking_identifier: group for group in groups}


def numbers_of(group: Any) -> dict[tuple[str, str | None], tuple[float, str]]:
    return {
        (one.name.meaning, one.derivation and one.derivation.meaning): (one.value, one.unit.value)
        for one in group.get_measurements()
    }


@pytest.mark.parametrize("names", [("lesion", "lesion"), ("lesion ", "other"), ("a" * 63 + " b", "other"), (" ", "")])
def test_every_structure_refers_to_its_own_segment_whatever_its_name(source: Path, names: tuple[str, str]) -> None:
    """One name twice, and names that end with a space, of their own or where they are cut off."""
    labels = some_labels(medseg.load(source).grid, (1, 5))
    table, seg, path = make_labels(zip((1, 5), names, strict=True)), source.parent / "seg.dcm", source.parent / "sr.dcm"
    save_dicom_seg(labels, seg, source=source, table=table)
    save_dicom_sr(measure(labels, table), path, source=source, table=table, segmentation=seg)
    numbers: list[int] = []
    pydicom.dcmread(path).walk(
        lambda _, element: numbers.append(element.value) if element.keyword == "ReferencedSegmentNumber" else None
    )
    assert numbers == [1, 2]


@pytest.mark.parametrize(
    ("modality", "name", "unit"),
    [
        ("CT", "Attenuation Coefficient", "[hnsf'U]"),
        ("MR", "MR signal intensity", "1"),
        ("PT", "Voxel intensity", "1"),
    ],
)
def test_numbers_come_back(tmp_path: Path, modality: str, name: str, unit: str) -> None:
    rows, seg = measured(source := write_source(tmp_path / "scan", Modality=modality))
    path = save_dicom_sr(rows, tmp_path / "sr.dcm", source=source, table=TABLE, segmentation=seg)
    groups = groups_of(path)
    assert list(groups) == ["not there", "Füße", "left kidney"]
    for row in rows[:2]:
        numbers = numbers_of(groups[row.name])
        assert numbers.pop(("Volume", None)) == (pytest.approx(row.volume_ml), "ml")
        assert numbers == {
            (name, "Mean"): (pytest.approx(row.intensity_mean), unit),
            (name, "Standard Deviation"): (pytest.approx(row.intensity_std), unit),
            (name, "Minimum"): (row.intensity_min, unit),
            (name, "Maximum"): (row.intensity_max, unit),
        }


def test_structures_refer_to_their_segments(source: Path) -> None:
    rows, seg = measured(source)
    path = save_dicom_sr(rows, source.parent / "sr.dcm", source=source, table=TABLE, segmentation=seg)
    group = groups_of(path)["left kidney"]
    segment = group.referenced_segment
    assert segment.referenced_sop_instance_uid == pydicom.dcmread(seg).SOPInstanceUID
    assert list(segment.referenced_segment_numbers) == [2]
    assert (group.finding_type.value, group.finding_type.scheme_designator) == ("64033007", "SCT")


def test_what_is_not_found_is_absent(source: Path) -> None:
    rows, seg = measured(source)
    path = save_dicom_sr(rows, source.parent / "sr.dcm", source=source, table=TABLE, segmentation=seg)
    groups = groups_of(path)
    assert numbers_of(groups["not there"]) == {("Volume", None): (0.0, "ml")}
    presence = {name: group.get_qualitative_evaluations()[0].value.meaning for name, group in groups.items()}
    assert presence == {"Füße": "Present", "left kidney": "Present", "not there": "Absent"}


def test_a_report_needs_no_seg_and_no_finding(source: Path) -> None:
    rows, _ = measured(source)
    assert set(groups_of(save_dicom_sr(rows, source.parent / "1.dcm", source=source))) == {row.name for row in rows}
    nothing = groups_of(save_dicom_sr([], source.parent / "2.dcm", source=source))
    assert nothing["any label"].get_qualitative_evaluations()[0].value.meaning == "Absent"


def test_only_what_the_standard_requires_is_copied(source: Path) -> None:
    data = pydicom.dcmread(save_dicom_sr(measured(source)[0], source.parent / "sr.dcm", source=source))
    assert [str(data.PatientName), data.PatientID] == [STUDY["PatientName"], STUDY["PatientID"]]
    assert not {"PatientAge", "StudyDescription"} & {element.keyword for element in data}


def test_the_seg_of_other_labels_is_refused(source: Path) -> None:
    rows, seg = measured(source)
    other = [Measurement(1, "spleen", 3, 0.1, None)]
    with pytest.raises(InputError, match="does not have the labels that were measured") as caught:
        save_dicom_sr([*rows, *other], source.parent / "sr.dcm", source=source, segmentation=seg)
    assert caught.value.reason == "other_labels"


def test_what_is_not_a_seg_is_refused(source: Path) -> None:
    rows, _ = measured(source)
    (source.parent / "no.dcm").write_bytes(b"hello" * 100)
    with pytest.raises(UnreadableFile, match="not DICOM"):
        save_dicom_sr(rows, source.parent / "sr.dcm", source=source, segmentation=source.parent / "no.dcm")
    with pytest.raises(InputError, match="Expected a DICOM SEG"):
        save_dicom_sr(rows, source.parent / "sr.dcm", source=source, segmentation=next(source.iterdir()))


def test_a_source_without_identifiers_cannot_be_referred_to(tmp_path: Path) -> None:
    source = write_source(tmp_path / "ct", StudyInstanceUID=None)
    with pytest.raises(OutputError, match="does not state its StudyInstanceUID"):
        save_dicom_sr([], tmp_path / "sr.dcm", source=source)


def test_dciodvfy_finds_no_error(source: Path) -> None:
    rows, seg = measured(source)
    for place, segmentation in enumerate((None, seg)):
        path = save_dicom_sr(
            rows, source.parent / f"{place}.dcm", source=source, table=TABLE, segmentation=segmentation
        )
        assert errors_of_dciodvfy(path) == []


def test_dcmqi_reads_it(source: Path) -> None:
    rows, seg = measured(source)
    path = save_dicom_sr(rows, source.parent / "sr.dcm", source=source, table=TABLE, segmentation=seg)
    out = source.parent / "sr.json"
    program = judge("tid1500reader", "the Python package dcmqi")
    subprocess.run([program, "--inputDICOM", path, "--outputMetadata", out], check=True, capture_output=True)
    groups = json.loads(out.read_text(encoding="utf-8"))["Measurements"]
    volumes = {
        group["TrackingIdentifier"]: float(group["measurementItems"][0]["value"]) for group in groups
    }  # fmt: skip
    for row in rows[:2]:
        assert volumes[row.name] == pytest.approx(row.volume_ml)


def test_labels_without_a_table_are_numbered(source: Path) -> None:
    image = medseg.load(source)
    rows = measure(some_labels(image.grid, (3,)), make_labels([]))
    assert list(groups_of(save_dicom_sr(rows, source.parent / "sr.dcm", source=source))) == ["label 3"]
