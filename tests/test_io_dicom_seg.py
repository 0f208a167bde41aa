"""DICOM SEG, read back by us, by highdicom and by pydicom alone, and judged by dciodvfy and dcmqi."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from conftest import make_grid
from dicom_files import (
    SOURCES,
    STUDY,
    TABLE,
    TILTED,
    errors_of_dciodvfy,
    judge,
    some_labels,
    write_series,
    write_source,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydicom.encaps import encapsulate
from pydicom.sr.codedict import codes
from pydicom.uid import MPEG2MPML, RLELossless

import medseg
from medseg.errors import GeometryError, InputError, OutputError, SeriesRefused, UnreadableFile, UsageError
from medseg.io.dicom_references import code_of
from medseg.io.dicom_seg import load_dicom_seg, read_parts, save_dicom_seg, write
from medseg.io.dicom_series import choose, find_series
from medseg.io.regions import Regions, regions_of, slice_numbers, volume_of
from medseg.io.structures import describe_structures
from medseg.labels import Label, make_labels
from medseg.volume import Grid, Volume

each_kind = pytest.mark.parametrize("kind", SOURCES)
each_encoding = pytest.mark.parametrize("labelmap", [False, True], ids=["binary", "labelmap"])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "ct")


def written(source: Path, *, values: tuple[int, ...] = (1, 2, 5), **options: Any) -> tuple[Volume, Path]:
    labels = some_labels(choose(source)[1], values)
    path = source.parent / "seg.dcm"
    assert save_dicom_seg(labels, path, source=source, table=TABLE, **options) == path
    return labels, path


def renumbered(labels: Volume) -> np.ndarray:
    """Return labels 1, 2, 5 as the segments 1, 2, 3."""
    return np.searchsorted([0, 1, 2, 5], labels.array)


@each_kind
@each_encoding
def test_labels_come_back(tmp_path: Path, kind: str, labelmap: bool) -> None:
    source = write_source(tmp_path / "ct", kind)
    labels, path = written(source, labelmap=labelmap)
    back, table = load_dicom_seg(path, source=source)
    np.testing.assert_array_equal(back.array, labels.array if labelmap else renumbered(labels))
    assert back.grid.matches(labels.grid, 0)
    assert [label.value for label in table] == ([1, 2, 5] if labelmap else [1, 2, 3])
    assert [(label.name, label.snomed) for label in table] == [(label.name, label.snomed) for label in TABLE[:3]]
    for label, original in zip(table, TABLE, strict=False):
        difference = np.subtract(*(list(bytes.fromhex(one.color[1:])) for one in (label, original)))
        assert np.abs(difference).max() <= 1  # CIELab is stored in 16 bits


@each_kind
@each_encoding
def test_every_voxel_is_where_the_frames_say(tmp_path: Path, kind: str, labelmap: bool) -> None:
    """By pydicom alone, from the header of each frame to world positions, and there to the labels."""
    source = write_source(tmp_path / "ct", kind)
    labels, path = written(source, labelmap=labelmap)
    data = pydicom.dcmread(path)
    shared = data.SharedFunctionalGroupsSequence[0]
    directions = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    spacing = np.array(shared.PixelMeasuresSequence[0].PixelSpacing, float)
    frames = data.pixel_array.reshape(-1, data.Rows, data.Columns)
    found = np.zeros_like(labels.array)
    for frame, groups in zip(frames, data.PerFrameFunctionalGroupsSequence, strict=True):
        row, column = np.nonzero(frame)
        assert row.size  # empty frames are left out
        position = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        lps = position + np.outer(column * spacing[1], directions[0]) + np.outer(row * spacing[0], directions[1])
        index = labels.grid.to_index(lps * (-1, -1, 1))
        nearest = np.round(index).astype(int)
        assert np.abs(index - nearest).max() < 1e-6
        segment = frame[row, column]
        if not labelmap:
            segment = np.array([1, 2, 5])[groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber - 1]
        found[0][tuple(nearest.T)] = segment
    np.testing.assert_array_equal(found, labels.array)


def test_values_that_a_label_map_cannot_hold_are_named(source: Path) -> None:
    labels = some_labels(choose(source)[1], (1, 2, 7))
    labels = labels.with_array(labels.array.astype(np.uint32) * 10_000)
    path = source.parent / "seg.dcm"
    with pytest.raises(InputError, match="values up to 65535, and the labels have 70000") as caught:
        save_dicom_seg(labels, path, source=source, labelmap=True)
    assert (caught.value.reason, caught.value.path) == ("label_values", path)
    assert save_dicom_seg(labels, path, source=source) == path


@each_encoding
def test_highdicom_reads_it(source: Path, labelmap: bool) -> None:
    from highdicom.seg import segread

    labels, path = written(source, labelmap=labelmap)
    seg = segread(path)
    assert {uid for *_, uid in seg.get_source_image_uids()} == {
        part.sop_instance_uid for part in choose(source)[0].slices
    }
    volume = seg.get_volume(combine_segments=True, allow_missing_positions=True)
    inside = np.argwhere(volume.array)
    world = (inside @ volume.affine[:3, :3].T + volume.affine[:3, 3]) * (-1, -1, 1)
    found = np.zeros_like(labels.array[0])
    found[tuple(np.round(labels.grid.to_index(world)).astype(int).T)] = volume.array[tuple(inside.T)]
    np.testing.assert_array_equal(found, labels.array[0] if labelmap else renumbered(labels)[0])


def test_only_what_the_standard_requires_is_copied(source: Path) -> None:
    _, path = written(source)
    data = pydicom.dcmread(path)
    copied = ("PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID", "AccessionNumber", "StudyDate")
    assert [str(data.get(name)) for name in copied] == [STUDY[name] for name in copied]
    assert str(data.PatientName).encode("utf8") in path.read_bytes()
    assert not {"PatientAge", "StudyDescription", "InstitutionName"} & {element.keyword for element in data}
    series = choose(source)[0]
    reference = data.ReferencedSeriesSequence[0]
    assert reference.SeriesInstanceUID == series.uid
    assert data.FrameOfReferenceUID == series.frame_of_reference_uid
    assert data.SeriesInstanceUID != series.uid


def test_codes(source: Path) -> None:
    data = pydicom.dcmread(written(source)[1])
    own, snomed, other = (item.SegmentedPropertyTypeCodeSequence[0] for item in data.SegmentSequence)
    assert (snomed.CodeValue, snomed.CodingSchemeDesignator, snomed.CodeMeaning) == ("64033007", "SCT", "Kidney")
    assert (own.CodingSchemeDesignator, own.CodeMeaning) == ("99MEDSEG", "Füße")
    assert own.CodeValue != other.CodeValue
    assert len(own.CodeValue) == 16
    assert code_of(Label(value=9, name="LIVER", color="#000000"))[0] == other.CodeValue


@each_encoding
def test_known_names_carry_their_code_and_their_side(source: Path, labelmap: bool) -> None:
    table = make_labels([(1, "kidney_left"), (2, "kidney_right"), (5, "liver")])
    labels, path = some_labels(choose(source)[1], (1, 2, 5)), source.parent / "seg.dcm"
    save_dicom_seg(labels, path, source=source, table=table, labelmap=labelmap)
    kinds = [item.SegmentedPropertyTypeCodeSequence[0] for item in pydicom.dcmread(path).SegmentSequence][-3:]
    assert [(kind.CodeValue, kind.CodeMeaning) for kind in kinds[1:]] == [("64033007", "Kidney"), ("10200004", "Liver")]
    sides = [[one.CodeValue for one in kind.get("SegmentedPropertyTypeModifierCodeSequence", [])] for kind in kinds]
    assert sides == [[codes.SCT.Left.value], [codes.SCT.Right.value], []]
    assert [label.snomed for label in load_dicom_seg(path, source=source)[1]] == [label.snomed for label in table]
    if not labelmap:  # which dciodvfy does not know
        assert not errors_of_dciodvfy(path)


@each_encoding
def test_nothing_found_is_no_error_and_no_file(source: Path, labelmap: bool) -> None:
    grid = choose(source)[1]
    path = source.parent / "seg.dcm"
    empty = Volume(np.zeros((1, *grid.shape), np.uint8), grid)
    assert save_dicom_seg(empty, path, source=source, table=TABLE, labelmap=labelmap) is None
    assert save_dicom_seg(Volume(np.zeros((4, *grid.shape)), grid), path, source=source, table=TABLE) is None
    assert not path.exists()


def overlapping(grid: Grid) -> Volume:
    masks = np.zeros((4, *grid.shape), np.uint8)
    masks[0, 2:6, 2:6], masks[1, 4:9, 3:8, :3], masks[2, 0, 0, 4] = 1, 1, 1
    return Volume(masks, grid)


def test_regions_that_overlap_are_masks(source: Path) -> None:
    labels = overlapping(choose(source)[1])
    path = source.parent / "seg.dcm"
    save_dicom_seg(labels, path, source=source, table=TABLE)
    back, table = load_dicom_seg(path, source=source)
    np.testing.assert_array_equal(back.array, labels.array[:3])
    assert [label.name for label in table] == ["Füße", "left kidney", "liver"]
    assert pydicom.dcmread(path).SegmentsOverlap == "YES"
    with pytest.warns(UserWarning, match="overlap, which a label map cannot hold"):
        save_dicom_seg(labels, path, source=source, table=TABLE, labelmap=True)
    assert pydicom.dcmread(path).SegmentationType == "BINARY"


@each_encoding
def test_masks_that_do_not_overlap_are_a_label_map(source: Path, labelmap: bool) -> None:
    grid = choose(source)[1]
    labels = some_labels(grid)
    masks = labels.with_array(np.stack([labels.array[0] == label.value for label in TABLE]))
    path = source.parent / "seg.dcm"
    save_dicom_seg(masks, path, source=source, table=TABLE, labelmap=labelmap)
    back, _ = load_dicom_seg(path, source=source)
    np.testing.assert_array_equal(back.array, labels.array if labelmap else renumbered(labels))


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "PIR", "SAL"])
def test_labels_may_have_their_axes_in_any_order(source: Path, orientation: str) -> None:
    labels = some_labels(choose(source)[1])
    path = source.parent / "seg.dcm"
    save_dicom_seg(labels.reoriented(orientation), path, source=source, labelmap=True)
    np.testing.assert_array_equal(load_dicom_seg(path, source=source)[0].array, labels.array)


def test_slices_that_have_no_grid_can_be_written(tmp_path: Path) -> None:
    # Steps of 2.5, 2.5 and 7.5 mm have no affine; each slice has its own position all the same.
    write_series(tmp_path / "ct", [0, 1, 2, 5], shape=(11, 13), **STUDY)
    (series,) = find_series(tmp_path / "ct")
    assert series.grid is None
    labels = some_labels(make_grid("RAS", (13, 11, 4)))
    write(regions_of(labels, TABLE), series.slices, tmp_path / "seg.dcm")
    heights = {
        float(groups.PlanePositionSequence[0].ImagePositionPatient[2])
        for groups in pydicom.dcmread(tmp_path / "seg.dcm").PerFrameFunctionalGroupsSequence
    }
    assert heights == {7.0, 12.0, 19.5}
    with pytest.raises(SeriesRefused):
        save_dicom_seg(labels, tmp_path / "seg.dcm", source=series)


@pytest.mark.parametrize("form", ["binary", "labelmap", "rtstruct"])
def test_irregular_steps_take_and_give_the_labels_of_the_nearest_slice(tmp_path: Path, form: str) -> None:
    # Slices at 0, 2.5, 5, 8.5, 11 and 13.5 mm: interpolated at 0, 2.7, 5.4, 8.1, 10.8 and 13.5 mm.
    source = tmp_path / "ct"
    write_series(source, [0, 1, 2, 3.4, 4.4, 5.4], shape=(11, 13), **STUDY)
    (series,) = find_series(source)
    assert series.verdict == "repaired"
    assert series.regular_grid is not None
    heights = [float(part.plane[2, 3]) for part in series.slices if part.plane is not None]
    assert heights == pytest.approx([7, 9.5, 12, 15.5, 18, 20.5])
    assert series.regular_grid.spacing_mm[2] == pytest.approx(2.7)
    labels = some_labels(series.regular_grid, (1, 2, 3))
    path = tmp_path / "object.dcm"
    if form == "rtstruct":
        medseg.save_rtstruct(labels, path, source=source)
        back, _ = medseg.load_rtstruct(path, source=source)
    else:
        save_dicom_seg(labels, path, source=source, labelmap=form == "labelmap")
        back, _ = load_dicom_seg(path, source=source)
        places = {
            float(groups.PlanePositionSequence[0].ImagePositionPatient[2])
            for groups in pydicom.dcmread(path).PerFrameFunctionalGroupsSequence
        }
        assert places == {7, 12, 15.5, 18, 20.5}  # on the slices that were scanned; one is empty
    assert back.grid.matches(series.regular_grid)
    np.testing.assert_array_equal(back.array, labels.array)


def test_frames_across_irregular_slices_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", [0, 1, 2, 3.4, 4.4, 5.4], shape=(11, 13), **STUDY)
    coronal = write_source(tmp_path / "coronal", "coronal")
    save_dicom_seg(some_labels(choose(coronal)[1]), tmp_path / "seg.dcm", source=coronal)
    with pytest.raises(GeometryError) as caught:
        load_dicom_seg(tmp_path / "seg.dcm", source=tmp_path / "ct")
    assert caught.value.reason == "source_grid"


@given(st.lists(st.floats(0.1, 5), min_size=1, max_size=9), st.floats(-20, 60, allow_subnormal=False))
def test_numbers_of_slices_are_the_inverse_of_their_heights(steps: list[float], k: float) -> None:
    heights = np.cumsum([0, *steps])
    np.testing.assert_allclose(slice_numbers(heights, heights), np.arange(len(heights)), atol=1e-9)
    number = slice_numbers(np.array([k]), heights)[0]
    assert (number < 0) == (k < 0)
    assert (number > len(steps)) == (k > heights[-1]) or abs(k - heights[-1]) < 1e-9


def test_a_bug_of_ours_is_no_fault_of_the_source(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("ours")

    monkeypatch.setattr("medseg.io.dicom_seg._segmentation", broken)
    monkeypatch.setattr("medseg.io.dicom_references.PACKAGE", str(Path(__file__).parent))
    with pytest.raises(ValueError, match="ours"):
        written(source)


@pytest.mark.parametrize("name", ["SOPClassUID", "StudyInstanceUID", "FrameOfReferenceUID"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_source_without_identifiers_cannot_be_referred_to(tmp_path: Path, name: str, value: str | None) -> None:
    source = write_source(tmp_path / "ct", **{name: value})
    with pytest.raises(OutputError, match=f"does not state its {name}.*NIfTI") as caught:
        save_dicom_seg(some_labels(choose(source)[1]), tmp_path / "seg.dcm", source=source)
    assert caught.value.reason == "unreferable_source"
    assert not (tmp_path / "seg.dcm").exists()


def test_a_source_of_an_unknown_class_cannot_be_referred_to(tmp_path: Path) -> None:
    source = write_source(tmp_path / "ct", SOPClassUID="1.2.3.4")
    with pytest.raises(OutputError, match="break the DICOM standard") as caught:
        save_dicom_seg(some_labels(choose(source)[1]), tmp_path / "seg.dcm", source=source)
    assert caught.value.reason == "unreferable_source"


def test_headers_that_break_the_standard_go_on_blank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(UserWarning):
        source = write_source(
            tmp_path / "ct", PatientBirthDate="21.3.1955", PatientSex="male", StudyTime="noon", StudyID=None,
            PatientID="PID " * 30, SliceThickness=None,
        )  # fmt: skip
    caplog.clear()
    path = written(source)[1]
    data = pydicom.dcmread(path)
    assert [data.PatientBirthDate, data.PatientSex, data.StudyTime, data.StudyID] == ["", "", "", ""]
    assert data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness == 2.5
    assert not caplog.text


def test_labels_on_another_grid_are_refused(source: Path) -> None:
    grid = choose(source)[1]
    moved = Grid(grid.shape, grid.affine + np.eye(4, k=3) * 0.5)
    with pytest.raises(GeometryError, match="another grid than their source") as caught:
        save_dicom_seg(some_labels(moved), source.parent / "seg.dcm", source=source)
    assert caught.value.reason == "source_grid"


def test_what_is_no_label_is_refused(source: Path) -> None:
    labels = some_labels(choose(source)[1])
    path = source.parent / "seg.dcm"
    with pytest.raises(InputError, match="whole numbers from 0"):
        save_dicom_seg(labels.with_array(labels.array + 0.5), path, source=source)
    with pytest.raises(InputError, match="mask of one label"):
        save_dicom_seg(labels.with_array(labels.array.repeat(4, axis=0)), path, source=source, table=TABLE)
    with pytest.raises(UsageError, match="2 masks need a table of as many labels"):
        save_dicom_seg(labels.with_array(labels.array[[0, 0]]), path, source=source, table=TABLE)


def test_another_object_is_refused(source: Path) -> None:
    with pytest.raises(InputError, match="Expected a DICOM SEG") as caught:
        load_dicom_seg(next(source.iterdir()), source=source)
    assert caught.value.reason == "not_seg"
    with pytest.raises(UsageError, match="threshold"):
        load_dicom_seg(next(source.iterdir()), source=source, threshold=0)


def changed(path: Path, **fields: Any) -> Path:
    data = pydicom.dcmread(path)
    for name, value in fields.items():
        setattr(data, name, value)
    data.save_as(path)
    return path


@pytest.mark.parametrize("names_slices", ["ReferencedSeriesSequence", "DerivationImageSequence"])
def test_a_frame_of_reference_that_differs_is_accepted_for_the_very_slices(source: Path, names_slices: str) -> None:
    labels, path = written(source)
    data = pydicom.dcmread(path)
    if names_slices == "DerivationImageSequence":
        del data.ReferencedSeriesSequence
    data.FrameOfReferenceUID = "1.2.3"
    data.save_as(path)
    with pytest.warns(UserWarning, match="another frame of reference .* refers to the very slices"):
        back, _ = load_dicom_seg(path, source=source)
    np.testing.assert_array_equal(back.array, renumbered(labels))


def test_a_frame_of_reference_that_differs_is_refused(source: Path) -> None:
    path = changed(written(source)[1], FrameOfReferenceUID="1.2.3")
    data = pydicom.dcmread(path)
    data.ReferencedSeriesSequence[0].ReferencedInstanceSequence[2].ReferencedSOPInstanceUID = "1.2.3.4"
    data.save_as(path)
    with pytest.raises(GeometryError, match="another frame of reference") as caught:
        load_dicom_seg(path, source=source)
    assert (caught.value.reason, caught.value.path) == ("frame_of_reference", path)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"PixelSpacing": [0.7, 1.25]}, "source_grid"),
        ({"step_mm": TILTED}, "source_grid"),
        ({"slices": range(3)}, "outside_source"),
        ({"shape": (8, 13)}, "outside_source"),
    ],
)
def test_a_seg_of_other_voxels_is_refused(tmp_path: Path, tags: dict[str, Any], reason: str) -> None:
    path = written(write_source(tmp_path / "ct"))[1]
    other = write_source(tmp_path / "other", **tags)
    with pytest.raises(GeometryError) as caught:
        load_dicom_seg(path, source=other)
    assert caught.value.reason == reason


def test_a_frame_without_a_place_is_refused(source: Path) -> None:
    path = written(source)[1]
    data = pydicom.dcmread(path)
    del data.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence
    data.save_as(path)
    with pytest.raises(GeometryError, match="does not say where it lies"):
        load_dicom_seg(path, source=source)


def test_frames_along_other_axes_of_the_source(tmp_path: Path) -> None:
    """A sagittal SEG of an axial series with cubic voxels: written for a series of the same voxels, cut another way."""
    cubic: dict[str, Any] = {"PixelSpacing": [2.5, 2.5], "shape": (6, 7)}
    axial = write_source(tmp_path / "axial", slices=range(5), **cubic)
    # Rows run along y, columns along z, slices along x, all from the same first voxel.
    sagittal = write_source(
        tmp_path / "sagittal", slices=range(7), PixelSpacing=[2.5, 2.5], shape=(5, 6),
        orientation=[0, 1, 0, 0, 0, 1],
    )  # fmt: skip
    labels = some_labels(choose(axial)[1])
    save_dicom_seg(labels, tmp_path / "seg.dcm", source=sagittal, labelmap=True)
    np.testing.assert_array_equal(load_dicom_seg(tmp_path / "seg.dcm", source=axial)[0].array, labels.array)


def test_fractions_count_from_the_threshold(source: Path) -> None:
    from highdicom.seg import Segmentation

    from medseg.io.dicom_references import headers
    from medseg.io.dicom_seg import _description

    series, grid = choose(source)
    fractions = np.random.default_rng(5).random((grid.shape[2], grid.shape[1], grid.shape[0], 1))
    seg = Segmentation(
        headers(series.slices), fractions, "FRACTIONAL", [_description(1, TABLE[0], "medseg")], "1.2.3", 1, "1.2.3.4",
        1, "medseg", "medseg", "1", "1",
    )  # fmt: skip
    seg.save_as(source.parent / "seg.dcm")
    stored = np.round(fractions[..., 0] * 255).transpose(2, 1, 0)
    for threshold in (0.2, 0.5, 1.0):
        back, _ = load_dicom_seg(source.parent / "seg.dcm", source=source, threshold=threshold)
        np.testing.assert_array_equal(back.array[0], stored >= threshold * 255)


def renumber(data: Any, described: dict[int, int], shown: dict[int, int]) -> None:
    """Change the numbers of the segments of a BINARY SEG, of those that are described and of those in frames."""
    for one in data.SegmentSequence:
        one.SegmentNumber = described.get(one.SegmentNumber, one.SegmentNumber)
    for frame in data.PerFrameFunctionalGroupsSequence:
        segment = frame.SegmentIdentificationSequence[0]
        segment.ReferencedSegmentNumber = shown.get(segment.ReferencedSegmentNumber, segment.ReferencedSegmentNumber)


FROM_ZERO = {1: 0, 2: 1, 3: 2}


def test_segments_that_are_numbered_from_zero_are_all_there(source: Path) -> None:
    labels, path = written(source)
    data = pydicom.dcmread(path)
    renumber(data, FROM_ZERO, FROM_ZERO)
    data.save_as(path)
    with pytest.warns(UserWarning, match="numbered from 1 in the order of the segments"):
        back, table = load_dicom_seg(path, source=source)
    np.testing.assert_array_equal(back.array, renumbered(labels))
    assert [label.name for label in table] == [label.name for label in TABLE[:3]]
    described = describe_structures(path)
    assert described is not None
    assert described.names == tuple(label.name for label in TABLE[:3])


def test_a_label_map_whose_padding_is_the_background_may_have_a_segment_zero(source: Path) -> None:
    """Values 0, 1 and 2 are structures, and 5 is what is none."""
    labels, path = written(source, values=(1, 2, 5), labelmap=True)
    data = pydicom.dcmread(path)
    data.decompress()
    data.PixelData = np.array([5, 0, 1, 0, 0, 2], np.uint8)[np.frombuffer(data.PixelData, np.uint8)].tobytes()
    data.PixelPaddingValue = 5
    data.SegmentSequence = [one for one in data.SegmentSequence if one.SegmentNumber > 0]
    for number, one in enumerate(data.SegmentSequence):
        one.SegmentNumber = number
    data.save_as(path)
    with pytest.warns(UserWarning, match="numbered from 1 in the order of the segments"):
        back, _ = load_dicom_seg(path, source=source)
    np.testing.assert_array_equal(back.array, renumbered(labels))
    data.PixelPaddingValue = 0
    data.save_as(path)
    with pytest.warns(UserWarning, match="with the number of the background are left out: 1.*nobody|nobody.*: 1"):
        back, table = load_dicom_seg(path, source=source)
    assert [label.name for label in table] == [label.name for label in TABLE[1:3]]


@pytest.mark.parametrize(
    ("described", "shown", "told"),
    [
        ({}, {3: 9}, "Frames of segments that nobody describes are left out: 4.*cover no voxel: label 3"),
        ({3: 9}, {}, "nobody describes are left out: 4.*cover no voxel: label 9"),
        ({2: 4}, {2: 4, 3: 5}, "nobody describes are left out: 4.*cover no voxel: label 3"),
    ],
)
def test_frames_and_segments_without_one_another_are_said(
    source: Path, described: dict[int, int], shown: dict[int, int], told: str
) -> None:
    _, path = written(source)
    data = pydicom.dcmread(path)
    renumber(data, described, shown)
    data.save_as(path)
    with pytest.warns(UserWarning, match=told):
        load_dicom_seg(path, source=source)


def test_values_of_a_label_map_that_nobody_describes_are_said(source: Path) -> None:
    _, path = written(source, labelmap=True)
    data = pydicom.dcmread(path)
    data.SegmentSequence = [one for one in data.SegmentSequence if one.SegmentNumber != 2]
    data.save_as(path)
    with pytest.warns(UserWarning, match="Frames of segments that nobody describes are left out: 4"):
        _, table = load_dicom_seg(path, source=source)
    assert [label.value for label in table] == [1, 5]


@pytest.mark.parametrize(
    ("described", "shown"),
    [({2: 1}, {}), ({2: None}, {}), ({}, {2: None}), (FROM_ZERO, {}), ({}, FROM_ZERO)],
    ids=["twice", "missing", "missing in a frame", "described from 0", "shown from 0"],
)
def test_segments_that_cannot_be_told_apart_are_refused(
    source: Path, described: dict[int, Any], shown: dict[int, Any]
) -> None:
    _, path = written(source)
    data = pydicom.dcmread(path)
    renumber(data, described, shown)
    data.save_as(path)
    with pytest.raises(InputError, match=r"unknown whose the frames are|which segment it shows") as caught:
        load_dicom_seg(path, source=source)
    assert caught.value.reason == "segment_numbers"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("", "SegmentationType"),
        ("SURFACE", "SegmentationType"),
        ("FRACTIONAL", "MaximumFractionalValue"),
        ("BINARY", "PerFrameFunctionalGroupsSequence"),
        ("BINARY", "PixelData"),
    ],
)
def test_what_a_seg_lacks_is_named(source: Path, kind: str, name: str) -> None:
    _, path = written(source)
    data = pydicom.dcmread(path)
    data.SegmentationType = kind
    if kind == "BINARY":
        delattr(data, name)
    data.save_as(path)
    with pytest.raises(InputError, match=f"does not state its {name}"):
        load_dicom_seg(path, source=source)


@pytest.mark.parametrize("change", [-1, 1])
def test_frames_that_are_not_all_described_are_refused(source: Path, change: int) -> None:
    path = written(source)[1]
    path = changed(path, NumberOfFrames=pydicom.dcmread(path).NumberOfFrames + change)
    with pytest.raises(InputError, match="states 1[13] frames and describes 12"):
        load_dicom_seg(path, source=source)


def test_pixels_of_frames_that_nobody_describes_are_refused(source: Path) -> None:
    path = written(source)[1]
    data = pydicom.dcmread(path)
    data.NumberOfFrames -= 1
    del data.PerFrameFunctionalGroupsSequence[-1]
    data.save_as(path)
    with pytest.raises(InputError, match="describes 11 frames and has pixels of more") as caught:
        load_dicom_seg(path, source=source)
    assert caught.value.reason == "not_seg"


def test_segments_that_nobody_wants_may_lie_outside(tmp_path: Path) -> None:
    labels, path = written(write_source(tmp_path / "ct"))
    other = write_source(tmp_path / "other", slices=range(4))
    data = pydicom.dcmread(path)
    for frame in data.PerFrameFunctionalGroupsSequence:
        if float(frame.PlanePositionSequence[0].ImagePositionPatient[2]) > 15:  # the last slice
            frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber = 3
    data.save_as(path)
    parts, _ = read_parts(path, other, wanted=lambda name: name != "liver")
    assert [len(places) for _, places in parts] == [(labels.array[..., :4] == value).sum() for value in (1, 2)]
    with pytest.raises(GeometryError, match="lies outside"):
        load_dicom_seg(path, source=other)


def test_odd_colors_and_codes_cost_no_segment(source: Path) -> None:
    labels, path = written(source)
    data = pydicom.dcmread(path)
    first, second, _ = data.SegmentSequence
    first.RecommendedDisplayCIELabValue = [1, 2]
    second.SegmentedPropertyTypeCodeSequence.append(second.SegmentedPropertyTypeCodeSequence[0])
    data.save_as(path)
    back, table = load_dicom_seg(path, source=source)
    np.testing.assert_array_equal(back.array, renumbered(labels))
    assert (table[0].color, table[1].snomed) == ("#e6194b", TABLE[1].snomed)


def run_lengths(data: bytes) -> bytes:
    """Return one frame in RLE, of literal runs alone (PS3.5 G.3)."""
    runs = b"".join(bytes([len(part) - 1]) + part for part in (data[n : n + 128] for n in range(0, len(data), 128)))
    return struct.pack("<16I", 1, 64, *[0] * 14) + runs + b"\x80" * (len(runs) % 2)


def compressed(path: Path, encode: Callable[[np.ndarray], bytes], syntax: str = RLELossless) -> None:
    data = pydicom.dcmread(path)
    frames = data.pixel_array
    data.PixelData = encapsulate([encode(frame) for frame in frames])
    data["PixelData"].VR = "OB"
    data.file_meta.TransferSyntaxUID = syntax
    data.save_as(path)


@pytest.mark.parametrize("share_bytes", [True, False])
def test_run_lengths_of_single_bits_are_decoded(source: Path, share_bytes: bool) -> None:
    """Eight pixels in a byte, or a byte for each pixel: both are written, and 11 x 13 pixels are no whole bytes."""
    labels, path = written(source)

    def encode(frame: np.ndarray) -> bytes:
        return run_lengths(
            np.packbits(frame, axis=None, bitorder="little").tobytes() if share_bytes else frame.tobytes()
        )

    compressed(path, encode)
    back, _ = load_dicom_seg(path, source=source)
    np.testing.assert_array_equal(back.array, renumbered(labels))


@pytest.mark.parametrize(
    ("syntax", "reason", "told"),
    [
        (MPEG2MPML, "compressed_unknown", r"MPEG2 .* no package that medseg can use decodes that"),
        (RLELossless, "undecodable", r"No installed decoder can decode the pixels \(RLE"),
    ],
)
def test_frames_that_nothing_decodes_are_not_called_damaged(source: Path, syntax: str, reason: str, told: str) -> None:
    _, path = written(source)
    compressed(path, lambda _: run_lengths(b"short"), syntax)
    with pytest.raises(InputError, match=told) as caught:
        load_dicom_seg(path, source=source)
    assert caught.value.reason == reason


def test_a_file_that_is_not_dicom_is_said_to_be_none(source: Path) -> None:
    (source.parent / "seg.dcm").write_bytes(b"hello" * 100)
    with pytest.raises(UnreadableFile, match="not DICOM"):
        load_dicom_seg(source.parent / "seg.dcm", source=source)


def test_more_labels_than_segments_can_be_are_named(source: Path) -> None:
    series, grid = choose(source)
    table = tuple(Label(value=value, name="a", color="#000000") for value in range(1, 65537))
    with pytest.raises(InputError, match="up to 65535 segments, and there are 65536") as caught:
        write(Regions(table, np.zeros((grid.shape[2], 1, 1))), series.slices, source.parent / "seg.dcm")
    assert caught.value.reason == "label_values"


@given(arrays(np.uint8, (3, 2, 4, 2), elements=st.integers(0, 1)))
def test_masks_survive_regions(masks: np.ndarray) -> None:
    """Any masks, overlapping or not, to frames and back."""
    grid = Grid((2, 4, 2), np.eye(4))
    table = make_labels([(1, "a"), (2, "b"), (3, "c")])
    regions = regions_of(Volume(masks, grid), table)
    parts = []
    for place, label in enumerate(regions.labels):
        own = regions.frames[..., place] if regions.frames.ndim == 4 else regions.frames == place + 1
        parts.append((label, np.flatnonzero(own)))
    back = volume_of(parts, grid)
    for channel, label in enumerate(table):
        if label not in regions.labels:
            assert not masks[channel].any()
        elif len(back.array) == 1:
            np.testing.assert_array_equal(back.array[0] == label.value, masks[channel])
        else:
            np.testing.assert_array_equal(back.array[regions.labels.index(label)], masks[channel])


def test_values_without_a_name_get_one() -> None:
    labels = Volume(np.array([0, 3, 70000, 3], np.int32).reshape(1, 2, 2, 1), Grid((2, 2, 1), np.eye(4)))
    regions: Regions = regions_of(labels, TABLE)
    assert [label.name for label in regions.labels] == ["label 3", "label 70000"]
    assert regions.frames.max() == 2


def test_dciodvfy_finds_no_error(tmp_path: Path) -> None:
    for kind in ("axial", "oblique", "tilted"):
        source = write_source(tmp_path / kind, kind)
        assert errors_of_dciodvfy(written(source)[1]) == []


@each_encoding
@pytest.mark.parametrize("kind", ["axial", "negated", "sagittal", "oblique"])
def test_dcmqi_reads_it(tmp_path: Path, kind: str, labelmap: bool) -> None:
    source = write_source(tmp_path / "ct", kind)
    labels, path = written(source, labelmap=labelmap)
    assert_dcmqi_agrees(path, labels if labelmap else labels.with_array(renumbered(labels)), tmp_path / "dcmqi")


def assert_dcmqi_agrees(path: Path, labels: Volume, folder: Path) -> None:
    """Check that dcmqi puts every voxel where the labels have it; it leaves empty slices at the ends out."""
    folder.mkdir()
    subprocess.run(
        [judge("segimage2itkimage", "the Python package dcmqi"), "--inputDICOM", path, "--outputDirectory", folder],
        check=True, capture_output=True,
    )  # fmt: skip
    found = np.zeros_like(labels.array[0])
    for file in sorted(folder.glob("*.nrrd")):
        part = medseg.load(file)
        inside = np.argwhere(part.array[0])
        index = labels.grid.to_index(part.grid.to_world(inside))
        nearest = np.round(index).astype(int)
        assert np.abs(labels.grid.to_world(nearest) - labels.grid.to_world(index)).max() < 1e-3
        found[tuple(nearest.T)] = part.array[0][tuple(inside.T)]
    np.testing.assert_array_equal(found, labels.array[0])
