"""Objects of labels, DICOM SEG or RT Structure Set, whichever a file is: what is in it, and what it covers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medseg.errors import UsageError
from medseg.io import VOLUME_ENDINGS, AnyPath, load
from medseg.io.dicom_file import begins_as_dicom, read_data
from medseg.io.dicom_header import parsing
from medseg.io.files import reading
from medseg.io.label_table import read_table
from medseg.labels import Label, complete
from medseg.volume import Volume

if TYPE_CHECKING:
    from pydicom import Dataset

    from medseg.io.dicom_references import Source
    from medseg.io.regions import Found, Part, Wanted

Kind = Literal["SEG", "RTSTRUCT"]

CONTENT: dict[Kind, tuple[str, str]] = {
    "SEG": ("SegmentSequence", "SegmentLabel"),
    "RTSTRUCT": ("StructureSetROISequence", "ROIName"),
}
"""What lists the structures of an object, and what names each."""


@dataclass(frozen=True)
class StructureFile:
    """An object of labels: its structures by name, and the series that it was drawn on, as far as it says so."""

    path: Path
    kind: Kind
    names: tuple[str, ...]
    series_uids: frozenset[str]
    frame_of_reference_uid: str

    def parts(self, source: Source, wanted: Wanted) -> tuple[list[Part], Found]:
        """Return the structures whose names are wanted on the slices of `source`, and what was met there.

        Raises what `load_rtstruct` and `load_dicom_seg` raise, but for contours that lie outside.
        """
        if self.kind == "SEG":
            from medseg.io import dicom_seg

            return dicom_seg.read_parts(self.path, source, wanted=wanted)
        from medseg.io import rtstruct

        return rtstruct.read_parts(self.path, source, wanted=wanted)


def object_kind(path: Path) -> Kind | None:
    """Return which object of labels a file is; None for any other file and for folders."""
    with reading(path):
        if not path.is_file():
            return None
        with path.open("rb") as file:
            if not begins_as_dicom(file):
                return None
    with parsing(path):
        modality = str(read_data(path, ["Modality"]).get("Modality"))
    return next((kind for kind in CONTENT if kind == modality), None)


def describe_structures(path: str | os.PathLike[str]) -> StructureFile | None:
    """Return what an object of labels holds, from its headers; None for any other file. Raises UnreadableFile."""
    path = Path(path)
    kind = object_kind(path)
    if kind is None:
        return None
    sequence, name = CONTENT[kind]
    references = ("ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence", "FrameOfReferenceUID")
    with parsing(path):
        tags = [sequence, *references, "SpecificCharacterSet", "SegmentationType", "PixelPaddingValue"]
        data = read_data(path, tags)
        structures = data.get(sequence) or []
        if kind == "SEG":
            from medseg.io.seg_frames import background

            structures = [one for one in structures if one.get("SegmentNumber") not in background(data)]
        frames = data.get("ReferencedFrameOfReferenceSequence") or []
        frame = data.get("FrameOfReferenceUID") or next((one.get("FrameOfReferenceUID") for one in frames), "")
        return StructureFile(
            path=path,
            kind=kind,
            names=tuple(str(one.get(name) or "") for one in structures),
            series_uids=frozenset(_series_uids(data)),
            frame_of_reference_uid=str(frame or ""),
        )


def load_labels(
    path: AnyPath,
    *,
    source: AnyPath | None = None,
    table: AnyPath | None = None,
    assume_orientation: str | None = None,
) -> tuple[Volume, tuple[Label, ...]]:
    """Return the labels in a volume, or those of an object of labels on the grid of `source`, and their table.

    The table of a volume is in NAME.labels.json beside it; without that file it is empty. The file `table` names the
    values otherwise: of masks that overlap it names those that are there, whatever its order.
    Raises UsageError for an object without its source, and what reading raises.
    """
    path = Path(path)
    given = None if table is None else read_table(table)
    labels, own = _loaded(path, source, assume_orientation)
    if given is None or len(labels.array) == 1:
        return labels, own if given is None else given
    by_value = {label.value: label for label in complete(given, [label.value for label in own])}
    return labels, tuple(by_value[label.value] for label in own)


def _loaded(path: Path, source: AnyPath | None, assume_orientation: str | None) -> tuple[Volume, tuple[Label, ...]]:
    kind = object_kind(path)
    if kind is None:
        names = read_table(beside(path)) if beside(path).is_file() else ()
        return load(path, assume_orientation=assume_orientation), names
    if source is None:
        raise UsageError("A DICOM object of labels belongs to a series: give its folder as the source.")
    if kind == "SEG":
        from medseg.io.dicom_seg import load_dicom_seg

        return load_dicom_seg(path, source=source)
    from medseg.io.rtstruct import load_rtstruct

    return load_rtstruct(path, source=source)


def beside(path: Path) -> Path:
    """Return where the label table of a label file lies."""
    return path.with_name(f"{stem(path)}.labels.json")


def stem(path: Path) -> str:
    """Return the name of a volume or an object without its ending."""
    name = path.name
    return name[: -max((len(end) for end in VOLUME_ENDINGS if name.lower().endswith(end)), default=len(path.suffix))]


def _series_uids(data: Dataset) -> set[str]:
    """Return the series that an object refers to (PS3.3 C.8.20.2 by C.12.1.1.12; C.8.8.5)."""
    found: list[Any] = [*(data.get("ReferencedSeriesSequence") or [])]
    for frame in data.get("ReferencedFrameOfReferenceSequence") or []:
        for study in frame.get("RTReferencedStudySequence") or []:
            found += study.get("RTReferencedSeriesSequence") or []
    return {str(one.SeriesInstanceUID) for one in found if one.get("SeriesInstanceUID")}
