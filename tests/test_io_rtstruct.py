"""RT Structure Sets, read back by us and by pydicom alone, and judged by dciodvfy and plastimatch."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import SOURCES, STUDY, TABLE, errors_of_dciodvfy, judge, some_labels, write_series, write_source

import medseg
from medseg.errors import GeometryError, InputError, OutputError, UnreadableFile
from medseg.io.dicom_references import item
from medseg.io.dicom_series import choose, find_series
from medseg.io.regions import regions_of
from medseg.io.rtstruct import load_rtstruct, read_parts, save_rtstruct, write
from medseg.volume import Grid, Volume

each_kind = pytest.mark.parametrize("kind", SOURCES)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "ct")


def written(source: Path, labels: Volume | None = None) -> tuple[Volume, Path]:
    labels = some_labels(choose(source)[1]) if labels is None else labels
    path = source.parent / "rt.dcm"
    assert save_rtstruct(labels, path, source=source, table=TABLE) == path
    return labels, path


@each_kind
def test_labels_come_back(tmp_path: Path, kind: str) -> None:
    source = write_source(tmp_path / "ct", kind)
    labels, path = written(source)
    back, table = load_rtstruct(path, source=source)
    np.testing.assert_array_equal(back.array, labels.array)
    assert back.grid.matches(labels.grid, 0)
    assert [(label.value, label.name, label.color) for label in table] == [
        (label.value, label.name, label.color) for label in TABLE[:3]
    ]


@each_kind
def test_contours_lie_on_the_slices_that_they_refer_to(tmp_path: Path, kind: str) -> None:
    """By pydicom alone: in the plane of their slice, at corners of its pixels, around as many as there are."""
    source = write_source(tmp_path / "ct", kind)
    labels, path = written(source)
    slices = {data.SOPInstanceUID: data for data in map(pydicom.dcmread, source.iterdir())}
    pixels = 0.0
    for structure in pydicom.dcmread(path).ROIContourSequence:
        for contour in structure.ContourSequence:
            (image,) = contour.ContourImageSequence
            data = slices[image.ReferencedSOPInstanceUID]
            assert image.ReferencedSOPClassUID == data.SOPClassUID
            points = np.array(contour.ContourData, float).reshape(-1, 3)
            assert len(points) == contour.NumberOfContourPoints
            offset = points - np.array(data.ImagePositionPatient, float)
            along_row, along_column = np.array(data.ImageOrientationPatient, float).reshape(2, 3)
            assert np.abs(offset @ np.cross(along_row, along_column)).max() < 1e-3
            x, y = offset @ along_row / data.PixelSpacing[1], offset @ along_column / data.PixelSpacing[0]
            assert np.abs(np.stack([x, y]) % 1 - 0.5).max() < 1e-3
            # The area of a polygon, by its corners. A hole is walked the other way round and counts negative.
            pixels += abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
    assert pixels == pytest.approx((labels.array > 0).sum(), abs=0.1)


def test_numbers_are_short_and_exact_and_a_long_contour_is_whole(tmp_path: Path) -> None:
    far = [-1234.56789, 987.654321, 1777.7]
    source = write_source(tmp_path / "ct", "oblique", shape=(150, 150), slices=[0], ImagePositionPatient=far)
    grid = choose(source)[1]
    comb = np.zeros((1, *grid.shape), np.uint8)
    comb[0, ::2] = comb[0, :, 0] = 1
    comb[0, 1::2, 1::2] = 1
    labels, path = written(source, Volume(comb, grid))
    data = pydicom.dcmread(path)
    assert data.file_meta.TransferSyntaxUID == pydicom.uid.ImplicitVRLittleEndian
    (contour,) = data.ROIContourSequence[0].ContourSequence
    numbers = contour.get_item("ContourData").value.decode().split("\\")
    assert sum(map(len, numbers)) > 2**16  # more than explicit value representations can hold
    assert max(map(len, numbers)) <= 16
    world = np.array(numbers, float).reshape(-1, 3) * (-1, -1, 1)
    index = grid.to_index(world)
    exact = grid.to_world(np.stack([*(np.round(index[:, :2].T + 0.5) - 0.5), np.zeros(len(index))], axis=1))
    assert np.linalg.norm(world - exact, axis=1).max() < 1e-4
    np.testing.assert_array_equal(load_rtstruct(path, source=source)[0].array, labels.array)


def test_structures(source: Path) -> None:
    data = pydicom.dcmread(written(source)[1])
    assert [str(data.get(name)) for name in ("PatientName", "PatientID", "StudyInstanceUID", "PatientSex")] == [
        STUDY[name] for name in ("PatientName", "PatientID", "StudyInstanceUID", "PatientSex")
    ]
    assert not {"PatientAge", "StudyDescription"} & {element.keyword for element in data}
    assert [(roi.ROINumber, roi.ROIName) for roi in data.StructureSetROISequence] == [
        (1, "Füße"), (2, "left kidney"), (5, "liver")
    ]  # fmt: skip
    assert [list(structure.ROIDisplayColor) for structure in data.ROIContourSequence][1] == [0, 255, 127]
    code = data.RTROIObservationsSequence[1].RTROIIdentificationCodeSequence[0]
    assert (code.CodeValue, code.CodingSchemeDesignator) == ("64033007", "SCT")
    referenced = data.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
    assert referenced.ReferencedSOPInstanceUID == STUDY["StudyInstanceUID"]
    (series,) = referenced.RTReferencedSeriesSequence
    assert len(series.ContourImageSequence) == 5


def test_nothing_found_is_no_error_and_no_file(source: Path) -> None:
    grid = choose(source)[1]
    empty = Volume(np.zeros((1, *grid.shape), np.uint8), grid)
    assert save_rtstruct(empty, source.parent / "rt.dcm", source=source, table=TABLE) is None
    assert not (source.parent / "rt.dcm").exists()


def test_structures_that_overlap_are_masks(source: Path) -> None:
    grid = choose(source)[1]
    masks = np.zeros((4, *grid.shape), np.uint8)
    masks[0, 2:6, 2:6], masks[1, 4:9, 3:8, :3], masks[2, 0, 0, 4] = 1, 1, 1
    back, table = load_rtstruct(written(source, Volume(masks, grid))[1], source=source)
    np.testing.assert_array_equal(back.array, masks[:3])
    assert [label.value for label in table] == [1, 2, 5]


def test_a_source_without_identifiers_cannot_be_referred_to(tmp_path: Path) -> None:
    source = write_source(tmp_path / "ct", SOPClassUID="")
    with pytest.raises(OutputError, match="does not state its SOPClassUID") as caught:
        save_rtstruct(some_labels(choose(source)[1]), tmp_path / "rt.dcm", source=source)
    assert caught.value.reason == "unreferable_source"


def test_slices_that_have_no_grid_can_be_written(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", [0, 1, 2, 5], shape=(11, 13), **STUDY)
    (series,) = find_series(tmp_path / "ct")
    labels = some_labels(Grid((13, 11, 4), np.eye(4)))
    write(regions_of(labels, TABLE), series.slices, tmp_path / "rt.dcm")
    structures = pydicom.dcmread(tmp_path / "rt.dcm").ROIContourSequence
    heights = {float(contour.ContourData[2]) for one in structures for contour in one.ContourSequence}
    assert heights == {7.0, 12.0, 19.5}


def edited(source: Path, edit: Callable[[Any], object]) -> Path:
    """Return a structure set in which `edit` changed the contours of the first structure, a box of 3 x 3 x 5 voxels."""
    grid = choose(source)[1]
    box = np.zeros((1, *grid.shape), np.uint8)
    box[0, 4:7, 5:8] = 1
    path = written(source, Volume(box, grid))[1]
    data = pydicom.dcmread(path)
    edit(data)
    data.save_as(path)
    return path


def contours_of(data: Any) -> Any:
    return data.ROIContourSequence[0].ContourSequence


def shifted(contour: Any, offset: tuple[float, float, float]) -> None:
    contour.ContourData = [*(np.array(contour.ContourData, float).reshape(-1, 3) + offset).ravel()]


def opened(data: Any) -> None:
    contours_of(data)[0].ContourGeometricType = "OPEN_PLANAR"
    contours_of(data)[1].ContourGeometricType = "POINT"
    contours_of(data)[1].ContourData = contours_of(data)[1].ContourData[:3]
    contours_of(data)[2].ContourData = contours_of(data)[2].ContourData[:6]


def tipped(data: Any) -> None:
    contours_of(data)[0].ContourData = [
        value + (n == 2) for n, value in enumerate(contours_of(data)[0].ContourData)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "told", "voxels"),
    [
        (opened, "Of 5 contours, 3 are open lines, points, .* and are left out", 2 * 9),
        (tipped, "Of 5 contours, 1 are not parallel to the slices", 4 * 9),
        (lambda data: shifted(contours_of(data)[4], (0, 0, 9)), "Of 5 contours, 1 lie outside the source", 4 * 9),
        # 0.4 of a step: the first contour goes to its own slice, which is the nearest.
        (lambda data: shifted(contours_of(data)[0], (0, 0, 1)), "1 lie between slices", 5 * 9),
        # 0.6 of a step, and a voxel to the left: it goes to the next slice, and joins what is there.
        (lambda data: shifted(contours_of(data)[0], (1.25, 0, 1.5)), "1 lie between slices", 4 * 9 + 3),
    ],
)
def test_contours_that_do_not_fit_are_reported(
    source: Path, edit: Callable[[Any], object], told: str, voxels: int
) -> None:
    path = edited(source, edit)
    with pytest.warns(UserWarning, match=told):
        labels, _ = load_rtstruct(path, source=source)
    assert (labels.array > 0).sum() == voxels


def with_a_hole(kind: str) -> Callable[[Any], None]:
    def edit(data: Any) -> None:
        for contour in list(contours_of(data)):
            hole = pydicom.Dataset()
            hole.update(contour)
            points = np.array(contour.ContourData, float).reshape(-1, 3)
            hole.ContourData = [*(points.mean(axis=0) + (points - points.mean(axis=0)) / 3).ravel()]
            contour.ContourGeometricType = hole.ContourGeometricType = kind
            contours_of(data).append(hole)

    return edit


@pytest.mark.parametrize("kind", ["CLOSED_PLANAR", "CLOSEDPLANAR_XOR"])
def test_a_contour_inside_another_is_a_hole(source: Path, kind: str) -> None:
    labels, _ = load_rtstruct(edited(source, with_a_hole(kind)), source=source)
    assert (labels.array > 0).sum() == 5 * 8
    assert not labels.array[0, 5, 6].any()


def twice(data: Any) -> None:
    """As some programs export: each contour a second time."""
    contours_of(data).extend(deepcopy([*contours_of(data)]))


def parted(data: Any) -> None:
    """Let two items hold the contours of one structure."""
    rest = deepcopy(data.ROIContourSequence[0])
    contours = [*contours_of(data)]
    data.ROIContourSequence[0].ContourSequence, rest.ContourSequence = contours[:2], contours[2:]
    data.ROIContourSequence.append(rest)


@pytest.mark.parametrize("edit", [twice, parted])
def test_no_contour_is_lost_where_they_are_repeated_or_parted(source: Path, edit: Callable[[Any], None]) -> None:
    labels, _ = load_rtstruct(edited(source, edit), source=source)
    assert (labels.array > 0).sum() == 45


def test_contours_halfway_between_slices_leave_none_empty(source: Path) -> None:
    def edit(data: Any) -> None:
        for contour in contours_of(data):
            shifted(contour, (0, 0, -1.25))

    with pytest.warns(UserWarning, match="5 lie between slices"):
        labels, _ = load_rtstruct(edited(source, edit), source=source)
    assert [int(count) for count in (labels.array[0] > 0).sum(axis=(0, 1))] == [9] * 5


def test_a_structure_set_without_structures_is_empty(source: Path) -> None:
    def edit(data: Any) -> None:
        data.StructureSetROISequence = data.ROIContourSequence = []

    labels, table = load_rtstruct(edited(source, edit), source=source)
    assert (labels.array.any(), table) == (False, ())


def test_structures_that_nobody_wants_may_lie_in_another_frame_of_reference(source: Path) -> None:
    def edit(data: Any) -> None:
        other = deepcopy(data.StructureSetROISequence[0])
        other.ROINumber, other.ROIName, other.ReferencedFrameOfReferenceUID = 99, "PET", "1.2.3"
        data.StructureSetROISequence.append(other)

    path = edited(source, edit)
    parts, _ = read_parts(path, source, wanted=lambda name: name != "PET")
    assert [len(places) for _, places in parts] == [45]
    with pytest.raises(GeometryError, match="another frame of reference"):
        read_parts(path, source, wanted=lambda name: name == "PET")


def moved_away(data: Any) -> None:
    for contour in contours_of(data):
        shifted(contour, (0, 0, 99))


def another_frame(data: Any) -> None:
    """As of contours on slices of another series."""
    own_frame(data)
    for place, contour in enumerate(contours_of(data)):
        contour.ContourImageSequence[0].ReferencedSOPInstanceUID = f"1.2.3.{place}"


def own_frame(data: Any) -> None:
    """As some programs write: a frame of reference of their own making."""
    data.FrameOfReferenceUID = data.ReferencedFrameOfReferenceSequence[0].FrameOfReferenceUID = "1.2.3"
    data.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = "1.2.3"


def own_frame_and_other_places(data: Any) -> None:
    """As of contours that were taken over to another scan, and still name the slices of the first."""
    own_frame(data)
    for contour in contours_of(data):
        shifted(contour, (0, 0, 2.5))


def own_frame_unnamed(data: Any) -> None:
    """Neither the contours nor what the object lists say on which slices they were drawn."""
    own_frame(data)
    for contour in contours_of(data):
        del contour.ContourImageSequence
    data.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence = []


def frame_of_the_object(data: Any) -> None:
    """The structure names no frame of reference, the object another one."""
    another_frame(data)
    data.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = ""


@pytest.mark.parametrize(
    ("edit", "reason", "match"),
    [
        (moved_away, "outside_source", "All contours lie outside"),
        (another_frame, "frame_of_reference", "another frame of reference"),
        (own_frame_and_other_places, "frame_of_reference", "not everything in it lies on a slice"),
        (own_frame_unnamed, "frame_of_reference", "another frame of reference"),
        (frame_of_the_object, "frame_of_reference", "another frame of reference"),
    ],
)
def test_structures_of_another_series_are_refused(
    source: Path, edit: Callable[[Any], object], reason: str, match: str
) -> None:
    with pytest.raises(GeometryError, match=match) as caught:
        load_rtstruct(edited(source, edit), source=source)
    assert caught.value.reason == reason


def test_another_object_is_refused(source: Path) -> None:
    with pytest.raises(InputError, match="Expected an RT Structure Set") as caught:
        load_rtstruct(next(source.iterdir()), source=source)
    assert caught.value.reason == "not_rtstruct"


def bare(data: Any) -> None:
    """Leave out what may be left out, and number the structure 0."""
    data.StructureSetROISequence[0].ROINumber = data.ROIContourSequence[0].ReferencedROINumber = 0
    data.StructureSetROISequence[0].ROIName = ""
    del data.ROIContourSequence[0].ROIDisplayColor


def test_structures_without_name_color_or_number_get_some(source: Path) -> None:
    labels, table = load_rtstruct(edited(source, bare), source=source)
    assert [(label.value, label.name) for label in table] == [(1, "label 1")]
    assert labels.array.sum() == 45


def test_a_structure_that_was_not_drawn_is_empty(source: Path) -> None:
    def edit(data: Any) -> None:
        del data.ROIContourSequence[0].ContourSequence

    with pytest.warns(UserWarning, match="Structures without contours: label 1"):
        labels, table = load_rtstruct(edited(source, edit), source=source)
    assert (labels.array.sum(), len(table)) == (0, 1)


@pytest.mark.parametrize("images", [True, False])
def test_a_frame_of_reference_of_its_own_is_accepted_for_the_very_slices(source: Path, images: bool) -> None:
    def edit(data: Any) -> None:
        own_frame(data)
        for contour in contours_of(data) if not images else ():
            del contour.ContourImageSequence

    with pytest.warns(UserWarning, match="another frame of reference .* refers to the very slices"):
        labels, _ = load_rtstruct(edited(source, edit), source=source)
    assert labels.array.sum() == 45


def test_a_frame_of_reference_that_is_listed_nowhere_is_accepted_for_the_very_slices(source: Path) -> None:
    def edit(data: Any) -> None:
        data.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = "1.2.3"
        for contour in contours_of(data):
            del contour.ContourImageSequence

    with pytest.warns(UserWarning, match="another frame of reference .* refers to the very slices"):
        labels, _ = load_rtstruct(edited(source, edit), source=source)
    assert labels.array.sum() == 45


def ring(low: float, high: float) -> Callable[[Any], None]:
    """Let a hole be drawn in the box of each slice, the outline at `low` and the hole at `high` steps above the slice.

    The box grows to 9 x 9 voxels, of which the hole takes 3 x 3.
    """

    def edit(data: Any) -> None:
        with_a_hole("CLOSED_PLANAR")(data)
        contours = contours_of(data)
        for place, contour in enumerate(contours):
            points = np.array(contour.ContourData, float).reshape(-1, 3)
            points = points.mean(axis=0) + (points - points.mean(axis=0)) * 3
            contour.ContourData = [
                *(points + np.array([0, 0, 2.5 * (low if place < len(contours) / 2 else high)])).ravel()
            ]

    return edit


@pytest.mark.parametrize("ends", [(0, 0), (0.0036, 0.0044), (0.049, -0.051), (0, 0.05), (-0.09, 0.09), (0.1, -0.1)])
@pytest.mark.parametrize("named", [True, False])
def test_a_hole_is_one_though_it_lies_beside_its_outline(source: Path, ends: tuple[float, float], named: bool) -> None:
    def edit(data: Any) -> None:
        ring(*ends)(data)
        for contour in () if named else contours_of(data):
            del contour.ContourImageSequence

    labels, _ = load_rtstruct(edited(source, edit), source=source)
    assert [*labels.array[0].sum(axis=(0, 1))] == [81 - 9] * 5


@pytest.mark.parametrize("ends", [(0.494, 0.506), (0.501, 0.499), (0.3, 0.36)])
def test_a_hole_between_slices_goes_where_its_outline_goes(source: Path, ends: tuple[float, float]) -> None:
    with pytest.warns(UserWarning, match="lie between slices"):
        labels, _ = load_rtstruct(edited(source, ring(*ends)), source=source)
    counts = [int(count) for count in labels.array[0].sum(axis=(0, 1))]
    assert counts == ([0, 72, 72, 72, 72] if ends[0] > 0.4 else [72] * 5)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("step", [0.05, 0.2, 0.25])
def test_the_slices_of_a_finer_series_add_up(source: Path, step: float, named: bool) -> None:
    """Contours of a cone, on slices that are finer than those of the source: the widest decides, none is a hole."""

    def edit(data: Any) -> None:
        contour, *_ = contours_of(data)
        points = np.array(contour.ContourData, float).reshape(-1, 3)
        cone = []
        for place in range(round(4 / step) + 1):
            part = deepcopy(contour)
            inner = points.mean(axis=0) + (points - points.mean(axis=0)) * (1 - 0.05 * place * step)
            part.ContourData = [*(inner + np.array([0, 0, 2.5 * place * step])).ravel()]
            part.ContourImageSequence[0].ReferencedSOPInstanceUID = f"1.2.{place}"
            if not named:
                del part.ContourImageSequence
            cone.append(part)
        data.ROIContourSequence[0].ContourSequence = cone

    with pytest.warns(UserWarning, match="lie between slices"):
        labels, _ = load_rtstruct(edited(source, edit), source=source)
    assert [int(count) for count in labels.array[0].sum(axis=(0, 1))] == [9] * 5


def test_oblique_rings_keep_their_holes_whatever_rounding_does(tmp_path: Path) -> None:
    """Contours 0.01 mm beside the slices of an oblique series, with two decimals: by area, 90 % to 110 % of a ring."""
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)[:, None]
    source = write_source(tmp_path / "ct", "oblique", shape=(30, 30), PixelSpacing=[1, 1], slices=range(12))
    series, grid = choose(source)
    labels = np.zeros((1, *grid.shape), np.uint8)
    labels[0, 0, 0] = 1
    path = written(source, Volume(labels, grid))[1]
    data = pydicom.dcmread(path)
    contours = []
    for part in series.slices:
        first = pydicom.dcmread(part.path)
        along_row, along_column = np.array(first.ImageOrientationPatient, float).reshape(2, 3)
        start = np.array(first.ImagePositionPatient, float) + 0.01 * np.cross(along_row, along_column)
        for radius in (12.3, 6.3):
            points = start + (15 + radius * np.cos(turn)) * along_row + (15 + radius * np.sin(turn)) * along_column
            contours.append(
                item(ContourGeometricType="CLOSED_PLANAR", ContourData=[*np.round(points, 2).ravel().tolist()])
            )
    data.ROIContourSequence[0].ContourSequence = contours
    data.save_as(path)
    counts = load_rtstruct(path, source=source)[0].array[0].sum(axis=(0, 1))
    area = np.pi * (12.3**2 - 6.3**2)
    assert ((counts > 0.9 * area) & (counts < 1.1 * area)).all(), counts


def copied(points: np.ndarray, how: str) -> np.ndarray:
    """Return the points of a contour as another program may write the same line."""
    return {
        "reversed": points[::-1],
        "from another point": np.roll(points, 1, axis=0),
        "closed": np.concatenate([points, points[:1]]),
        "with a point between": np.insert(points, 1, (points[0] + points[1]) / 2, axis=0),
        "rounded": np.round(points + 0.004, 2),
        "all of it": np.round(np.roll(np.concatenate([points, points[:1]])[::-1], 2, axis=0), 2),
        "a little beside": points + np.array([0, 0, 0.02]),
    }[how]


@pytest.mark.parametrize(
    "how",
    ["reversed", "from another point", "closed", "with a point between", "rounded", "all of it", "a little beside"],
)
@pytest.mark.parametrize("copies", [1, 2])
def test_copies_of_a_contour_count_once(source: Path, how: str, copies: int) -> None:
    def edit(data: Any) -> None:
        for contour in [*contours_of(data)] * copies:
            copy = deepcopy(contour)
            points = copied(np.array(contour.ContourData, float).reshape(-1, 3), how)
            copy.ContourData, copy.NumberOfContourPoints = [*points.ravel()], len(points)
            contours_of(data).insert(0, copy)

    labels, _ = load_rtstruct(edited(source, edit), source=source)
    assert labels.array.sum() == 45


def text_of(contour: Any, text: str) -> None:
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    text += " " * (len(text) % 2)
    contour[Tag("ContourData")] = RawDataElement(Tag("ContourData"), "DS", len(text), text.encode(), 0, True, True)


@pytest.mark.parametrize("text", ["1\\2\\3\\4", "a\\b\\c", "nan\\0\\0", "inf\\0\\0", "1,5\\2\\3", "", "1e300\\0\\0"])
def test_a_contour_that_cannot_be_read_costs_no_other(source: Path, text: str) -> None:
    labels, path = written(source)
    data = pydicom.dcmread(path)
    text_of(data.ROIContourSequence[1].ContourSequence[0], text)
    data.save_as(path)
    with pytest.warns(UserWarning, match=r"1 have coordinates that are missing .* are left out \(label 2\)"):
        back, _ = load_rtstruct(path, source=source)
    for value in (1, 5):
        np.testing.assert_array_equal(back.array == value, labels.array == value)
    assert 0 < (back.array == 2).sum() < (labels.array == 2).sum()


def unlisted(data: Any) -> None:
    extra = deepcopy(data.ROIContourSequence[0])
    extra.ReferencedROINumber = 9
    data.ROIContourSequence.append(extra)
    data.ROIContourSequence.append(deepcopy(extra))
    del data.ROIContourSequence[-1].ReferencedROINumber


def repeated(data: Any) -> None:
    other = deepcopy(data.StructureSetROISequence[0])
    other.ROIName = "another of this number"
    data.StructureSetROISequence.append(other)


def empty(data: Any) -> None:
    """A contour between the centers of voxels."""
    del contours_of(data)[1:]
    contour = contours_of(data)[0]
    points = np.array(contour.ContourData, float).reshape(-1, 3)
    contour.ContourData = [*(points.mean(axis=0) + (0.6, 0.3, 0) + (points - points.mean(axis=0)) / 20).ravel()]


def reaching(data: Any) -> None:
    for contour in contours_of(data):
        shifted(contour, (-1.25 * 5, 0, 0))


def beside(data: Any) -> None:
    shifted(contours_of(data)[0], (-99, 0, 0))


def miscounted(data: Any) -> None:
    contours_of(data)[0].NumberOfContourPoints = 7


@pytest.mark.parametrize(
    ("edit", "told", "voxels"),
    [
        (unlisted, "Contours of numbers that no structure has are left out: 10", 45),
        (repeated, "Structures with the number of another.* labels 1, 2", 0),
        (empty, "Structures whose contours cover no voxel: label 1", 0),
        (reaching, r"5 reach beyond the edges of the slices and are cut there \(label 1\)", 30),
        (beside, r"1 lie outside the source and are left out \(label 1\)", 36),
        (miscounted, "1 have another number of points than they state", 45),
    ],
)
def test_what_is_dropped_is_said(source: Path, edit: Callable[[Any], None], told: str, voxels: int) -> None:
    with pytest.warns(UserWarning, match=told):
        labels, _ = load_rtstruct(edited(source, edit), source=source)
    assert labels.array.sum() == voxels


@pytest.mark.parametrize("color", [[255, 0], [1, 2, 3, 4], None])
def test_odd_colors_and_numbers_cost_no_structure(source: Path, color: list[int] | None) -> None:
    def edit(data: Any) -> None:
        data.ROIContourSequence[0].ROIDisplayColor = color
        other = deepcopy(data.StructureSetROISequence[0])
        del other.ROINumber
        data.StructureSetROISequence.append(other)

    with pytest.warns(UserWarning, match="Structures without contours: label 2"):
        labels, table = load_rtstruct(edited(source, edit), source=source)
    assert (labels.array == 1).sum() == 45
    assert table[0].color == "#e6194b"


def test_numbers_that_no_structure_can_have_are_named(source: Path) -> None:
    grid = choose(source)[1]
    labels = Volume(np.full((1, *grid.shape), 2**31, np.uint32), grid)
    with pytest.raises(InputError, match="at most 2147483647, and the labels have 2147483648") as caught:
        save_rtstruct(labels, source.parent / "rt.dcm", source=source)
    assert caught.value.reason == "label_values"


def test_a_file_that_is_not_dicom_is_said_to_be_none(source: Path) -> None:
    (source.parent / "rt.dcm").write_bytes(b"hello" * 100)
    with pytest.raises(UnreadableFile, match="not DICOM"):
        load_rtstruct(source.parent / "rt.dcm", source=source)


def test_dciodvfy_finds_no_error(tmp_path: Path) -> None:
    for kind in ("axial", "oblique", "tilted"):
        source = write_source(tmp_path / kind, kind)
        assert errors_of_dciodvfy(written(source)[1]) == []


# Of exactly sagittal and coronal contours plastimatch drops points that differ from the one before in z alone.
@pytest.mark.parametrize("kind", ["axial", "reversed", "negated", "oblique"])
def test_plastimatch_rasterizes_the_same_voxels(tmp_path: Path, kind: str) -> None:
    source = write_source(tmp_path / "ct", kind)
    labels, path = written(source)
    assert_plastimatch_agrees(path, labels, source, tmp_path / "plastimatch")


def assert_plastimatch_agrees(path: Path, labels: Volume, source: Path, folder: Path) -> None:
    program = judge("plastimatch", "the Debian package plastimatch")
    command = [program, "convert", "--input", path, "--referenced-ct", source, "--output-prefix", folder]
    subprocess.run([*command, "--prefix-format", "nrrd"], check=True, capture_output=True)
    for label in TABLE[:3]:
        (file,) = folder.glob(f"{label.name.replace(' ', '?')}.nrrd")
        theirs = medseg.load(file).reoriented(labels.grid.orientation)
        assert theirs.grid.matches(labels.grid, 0.02)
        np.testing.assert_array_equal(theirs.array > 0, labels.array == label.value)
