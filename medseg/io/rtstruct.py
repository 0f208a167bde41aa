"""DICOM RT Structure Sets, written for the series that labels belong to and read onto its grid.

Source: PS3.3 A.19, C.8.8.5 (structure set), C.8.8.6 (contours) and C.8.8.8 (observations).
"""

from __future__ import annotations

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.errors import GeometryError
from medseg.io.contours import Polygon, trace
from medseg.io.dicom_header import parsing
from medseg.io.dicom_references import (
    OTHER_FRAME,
    PATIENT_AND_STUDY,
    STUDY_CLASS,
    UTF8,
    Source,
    code_of,
    color_of,
    equipment,
    frame_of_reference_error,
    headers,
    instances,
    item,
    located,
    lps,
    named,
    now,
    other_frame_of_reference,
    read_object,
    referring,
    whole,
)
from medseg.io.dicom_series import Series
from medseg.io.dicom_slice import Slice
from medseg.io.files import written_whole
from medseg.io.regions import Found, Part, Regions, Wanted, labels_met, on_grid, regions_of, volume_of
from medseg.io.rt_contours import LEFT_OUT, Image, Slices, covered, image_of
from medseg.labels import PALETTE, Label
from medseg.volume import Volume

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset

DECIMALS = 4
"""Decimals of a coordinate in mm: off by at most 0.00005 mm, and 16 characters reach beyond a kilometre."""

TOLD = {
    "between": "lie between slices and are taken to the nearest",
    "cut": "reach beyond the edges of the slices and are cut there",
    "miscounted": "have another number of points than they state",
}
"""What is told of contours that are used."""

NO_VOXEL = {
    "undrawn": "without contours",
    "empty": "whose contours cover no voxel",
    "repeated": "with the number of another, so that it is unknown whose the contours are",
}
"""What is told of structures that come out empty."""


def save_rtstruct(
    labels: Volume,
    path: str | os.PathLike[str],
    *,
    source: Source,
    table: Sequence[Label] = (),
    algorithm: str | None = "medseg",
) -> Path | None:
    """Write labels as an RT Structure Set that refers to the slices of `source`; return its path, None without labels.

    Nothing found is a result and no error: then no file is written. `labels` is a label map, or one mask for each label
    of the table, which may overlap; it has the voxels of the source, in any order of axes. Closed contours run along
    the edges of voxels, so that they enclose the same voxels in every program; holes are joined to their outline. ROI
    numbers are the values of the labels. `algorithm` names what made them (None: unknown). Raises what `save_dicom_seg`
    raises.
    """
    series, grid = located(source)
    return write(regions_of(on_grid(labels, grid), table, series.heights), series.slices, path, algorithm=algorithm)


def write(
    regions: Regions, slices: Sequence[Slice], path: str | os.PathLike[str], *, algorithm: str | None = "medseg"
) -> Path | None:
    """Write regions, a frame for each of the slices, as `save_rtstruct` does; the slices may lie anywhere."""
    if not regions.labels:
        return None
    path = Path(path)
    sources = headers(slices)
    with referring(path, slices):
        data = _structure_set(regions.labels, sources, algorithm)
        contours = _contours(regions, slices, sources)
        data.ROIContourSequence = [
            item(ROIDisplayColor=[*color_of(label)], ReferencedROINumber=label.value, ContourSequence=contours[place])
            for place, label in enumerate(regions.labels)
        ]
        with written_whole(path) as beside:
            data.save_as(beside, enforce_file_format=True)
    return path


def load_rtstruct(path: str | os.PathLike[str], *, source: Source) -> tuple[Volume, tuple[Label, ...]]:
    """Return the structures of an RT Structure Set on the grid of `source`, and their table.

    A label map, or where structures overlap one mask for each label of the table. A voxel belongs to a structure if its
    center lies inside an odd number of its contours in that plane, so that one inside another is a hole. Values are the
    ROI numbers, or 1, 2, 3 ... in the order of the list where these are not positive and different. A warning says
    which contours are left out, cut, or lie between slices and go to the nearest, and which structures come out empty.
    A frame of reference of its own making is accepted with a warning where the object refers to the very slices.
    Raises UnreadableFile or InputError (`not_rtstruct`) for other files, GeometryError where the frame of reference is
    another (`frame_of_reference`) or all contours lie outside (`outside_source`).
    """
    series, grid = located(source)
    parts, found = read_parts(path, series)
    _report(found, Path(path))
    return volume_of(parts, grid, series.heights), tuple(label for label, _ in parts)


def read_parts(
    path: str | os.PathLike[str], source: Source, *, wanted: Wanted = lambda _: True
) -> tuple[list[Part], Found]:
    """Return the structures whose names are `wanted`, each with the flat indices into (slices, rows, columns).

    Beside them what `covered` counts, contours of numbers that no structure has ("unlisted"), structures that come out
    empty (NO_VOXEL), and those of another frame of reference ("frame").
    Raises what `load_rtstruct` raises, but for contours that lie outside.
    """
    path = Path(path)
    series, _ = located(source)
    with parsing(path):
        data = read_object(path, "RTSTRUCT", "StructureSetROISequence")
        return _parts(data, series, path, wanted)


def _structure_set(labels: Sequence[Label], sources: Sequence[Dataset], algorithm: str | None) -> Dataset:
    """Return the object without its contours."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage, generate_uid

    first, (date, time) = sources[0], now()
    frame = first.FrameOfReferenceUID
    instances = {one.SOPInstanceUID: one for one in sources}.values()
    series = item(SeriesInstanceUID=first.SeriesInstanceUID, ContourImageSequence=[_image(one) for one in instances])
    study = item(
        ReferencedSOPClassUID=STUDY_CLASS,
        ReferencedSOPInstanceUID=first.StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    data = item(
        SpecificCharacterSet=UTF8,
        SOPClassUID=RTStructureSetStorage,
        SOPInstanceUID=generate_uid(),
        InstanceCreationDate=date,
        InstanceCreationTime=time,
        **{name: first.get(name) for name in ("StudyInstanceUID", *PATIENT_AND_STUDY)},
        Modality="RTSTRUCT",
        SeriesInstanceUID=generate_uid(),
        SeriesNumber=901,
        SeriesDescription="Segmentation",
        OperatorsName="",
        **equipment(),
        FrameOfReferenceUID=frame,
        PositionReferenceIndicator=first.PositionReferenceIndicator,
        StructureSetLabel="SEGMENTATION",
        StructureSetDate=date,
        StructureSetTime=time,
        ReferencedFrameOfReferenceSequence=[item(FrameOfReferenceUID=frame, RTReferencedStudySequence=[study])],
        StructureSetROISequence=[
            item(
                ROINumber=label.value,
                ReferencedFrameOfReferenceUID=frame,
                ROIName=named(label.name),
                ROIGenerationAlgorithm="AUTOMATIC" if algorithm else "",
                **({"ROIGenerationDescription": named(algorithm)} if algorithm else {}),
            )
            for label in labels
        ],
        RTROIObservationsSequence=[_observation(number, label) for number, label in enumerate(labels, start=1)],
        ApprovalStatus="UNAPPROVED",
    )
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    # With explicit value representations a contour could have 64 kB at most.
    data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return data


def _observation(number: int, label: Label) -> Dataset:
    value, scheme, meaning = code_of(label)
    code = item(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)
    return item(
        ObservationNumber=number,
        ReferencedROINumber=label.value,
        RTROIIdentificationCodeSequence=[code],
        RTROIInterpretedType="",
        ROIInterpreter="",
    )


def _image(source: Dataset, frame: int | None = None) -> Dataset:
    """Return the reference to a file, or to one frame of an enhanced one, counted from 0."""
    image = item(ReferencedSOPClassUID=source.SOPClassUID, ReferencedSOPInstanceUID=source.SOPInstanceUID)
    if frame is not None and "NumberOfFrames" in source:
        image.ReferencedFrameNumber = frame + 1
    return image


def _contours(regions: Regions, slices: Sequence[Slice], sources: Sequence[Dataset]) -> dict[int, list[Dataset]]:
    """Return the contours of each label, by its place in the table."""
    contours: dict[int, list[Dataset]] = defaultdict(list)
    for frame, part, source in zip(regions.frames, slices, sources, strict=True):
        if part.plane is None:
            raise GeometryError("A slice of the source does not say where it lies.", reason="no_geometry")
        image = item(ContourImageSequence=[_image(source, part.frame)])["ContourImageSequence"]
        for place, polygon in _outlines(frame):
            contours[place].append(_contour(lps(polygon, part.plane), image))
    return contours


def _outlines(frame: NDArray[np.generic]) -> Iterator[tuple[int, Polygon]]:
    """Yield (place of the label, polygon) for what a frame shows, traced in the box around each label."""
    from scipy.ndimage import find_objects

    if frame.ndim == 3:
        boxes = [(find_objects(mask.astype(np.uint8)) or [None])[0] for mask in np.moveaxis(frame, -1, 0)]
    else:
        boxes = find_objects(frame)
    for place, box in enumerate(boxes):
        if box is not None:
            part = frame[box]
            mask = part == place + 1 if part.ndim == 2 else part[..., place] > 0
            rows, columns = box
            for polygon in trace(mask.T):
                yield place, polygon + np.array([columns.start, rows.start])


def _contour(points: NDArray[np.float64], image: DataElement) -> Dataset:
    """Return a contour on a slice; all contours of one slice share the element that names it."""
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    contour = item(ContourGeometricType="CLOSED_PLANAR", NumberOfContourPoints=len(points))
    contour[image.tag] = image
    # As the bytes of the file, since objects for millions of numbers would take minutes. Adding 0 makes 0 of -0.
    text = "\\".join(map(str, (np.round(points, DECIMALS) + 0.0).ravel().tolist())).encode()
    text += b" " * (len(text) % 2)
    tag = Tag("ContourData")
    contour[tag] = RawDataElement(tag, "DS", len(text), text, 0, True, True)
    contour.set_original_encoding(True, True, "iso8859")
    return contour


def _parts(data: Dataset, series: Series, path: Path, wanted: Wanted) -> tuple[list[Part], Found]:
    """Return each structure with the flat indices into (slices, rows, columns) it covers, and what was met."""
    found: Found = defaultdict(Counter)
    slices = Slices(located(series)[1], series.heights)
    named = replace(slices, numbers=_numbers(series))
    parts: list[Part] = []
    for label, roi, contours in _structures(data, found):
        if not wanted(label.name):
            found["repeated"].pop(label.value, None)
            continue
        images = partial(_images, data, roi, contours)
        of_its_own = other_frame_of_reference(_frame(data, roi), series, path, images)
        found["frame"][label.value] += of_its_own
        places = covered(contours, named if of_its_own else slices, label.value, found)
        if not places.size and not found["repeated"][label.value]:
            found["empty" if contours else "undrawn"][label.value] += 1
        parts.append((label, places))
    if found["elsewhere"].total():
        raise frame_of_reference_error(path)
    return parts, found


def _structures(data: Dataset, found: Found) -> Iterator[tuple[Label, Dataset, list[Dataset]]]:
    """Yield label, description and contours of each structure; contours that are nobody's are counted alone."""
    drawn: dict[int | None, list[Dataset]] = defaultdict(list)
    for one in data.get("ROIContourSequence") or []:
        drawn[whole(one, "ReferencedROINumber")].append(one)
    numbers = [whole(roi, "ROINumber") for roi in data.StructureSetROISequence]
    usable = all(number is not None and number > 0 for number in numbers) and len(set(numbers)) == len(numbers)
    for number in drawn.keys() - ({*numbers} - {None}):
        found["unlisted"][0] += len(_contours_of(drawn[number]))
    for place, (number, roi) in enumerate(zip(numbers, data.StructureSetROISequence, strict=True), start=1):
        items = [] if number is None else drawn[number]
        value = number if usable and number else place
        label = Label(value=value, name=str(roi.get("ROIName") or f"label {value}"), color=_color(items, value))
        contours = _contours_of(items)
        if numbers.count(number) > 1 and contours:
            found["repeated"][value] += 1
            contours = []
        yield label, roi, contours


def _contours_of(items: Sequence[Dataset]) -> list[Dataset]:
    return [contour for one in items for contour in one.get("ContourSequence") or []]


def _color(items: Sequence[Dataset], value: int) -> str:
    """Return the first color that a structure states, one of the palette where it states none or none to show."""
    for one in items:
        try:
            red, green, blue = (min(max(int(part), 0), 255) for part in one.get("ROIDisplayColor") or ())
        except (ValueError, TypeError):
            continue
        return "#" + bytes([red, green, blue]).hex()
    return PALETTE[(value - 1) % len(PALETTE)]


def _numbers(series: Series) -> dict[Image, int]:
    """Return the numbers of slices by what names them; of several frames in a file only what says which is meant."""
    images = [(part.sop_instance_uid, part.frame + 1) for part in series.slices]
    numbers: dict[Image, int] = {image: number for number, image in enumerate(images)}
    if len({uid for uid, _ in images}) == len(images):
        numbers |= {(uid, 0): number for number, (uid, _) in enumerate(images)}
    return numbers


def _frame(data: Dataset, roi: Dataset) -> str:
    """Return the frame of reference of a structure: its own, else the only one of its object, else ""."""
    own = [str(one.get("FrameOfReferenceUID") or "") for one in data.get("ReferencedFrameOfReferenceSequence") or []]
    stated = [str(roi.get("ReferencedFrameOfReferenceUID") or ""), *(own if len(own) == 1 else [])]
    return next(filter(None, [*stated, str(data.get("FrameOfReferenceUID") or "")]), "")


def _images(data: Dataset, roi: Dataset, contours: Sequence[Dataset]) -> set[str]:
    """Return the SOPInstanceUIDs that a structure was drawn on: as its contours say, else as its frame of reference.

    Where the object lists none of the frames of reference of its structures, all that it lists counts.
    """
    drawn = {uid for contour in contours if (uid := image_of(contour)[0])}
    if drawn:
        return drawn
    frames = data.get("ReferencedFrameOfReferenceSequence") or []
    listed = {str(one.get("FrameOfReferenceUID") or "") for one in frames}
    if listed.isdisjoint(_frame(data, one) for one in data.StructureSetROISequence):
        return instances(frames)
    return instances(one for one in frames if str(one.get("FrameOfReferenceUID") or "") == _frame(data, roi))


def _report(found: Found, path: Path) -> None:
    counts = {kind: found[kind].total() for kind in [*found]}
    total = sum(counts.get(kind, 0) for kind in ("used", "between", *LEFT_OUT))
    if counts.get("outside") == total > 0:
        raise GeometryError(
            "All contours lie outside the source. Pass the series that they were drawn on.",
            path=path,
            reason="outside_source",
        )
    if counts.get("frame"):
        warnings.warn(OTHER_FRAME, stacklevel=3)
    if told := told_of(found):
        warnings.warn(told, stacklevel=3)


def told_of(found: Found) -> str:
    """Return what has to be said of the contours of a structure set, "" for nothing."""
    counts = {kind: found[kind].total() for kind in [*found]}
    total = sum(counts.get(kind, 0) for kind in ("used", "between", *LEFT_OUT))
    told = {kind: f"{why} and are left out" for kind, why in LEFT_OUT.items()} | TOLD
    odd = [f"{counts[kind]} {why} ({labels_met(found[kind])})" for kind, why in told.items() if counts.get(kind)]
    sentences = [f"Of {total} contours, {'; '.join(odd)}."] if odd else []
    if counts.get("unlisted"):
        sentences.append(f"Contours of numbers that no structure has are left out: {counts['unlisted']}.")
    sentences += [f"Structures {why}: {labels_met(found[kind])}." for kind, why in NO_VOXEL.items() if counts.get(kind)]
    return " ".join(sentences)
