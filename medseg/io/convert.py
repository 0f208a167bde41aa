"""From any file that medseg reads to any that it writes: volumes, and labels as DICOM objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medseg.errors import UsageError
from medseg.io import VOLUME_ENDINGS, AnyPath, load, save
from medseg.io.files import reading
from medseg.io.label_table import read_table, write_table
from medseg.labels import Label
from medseg.volume import Volume

DICOM_KINDS = ("seg", "labelmap", "rtstruct")
"""How labels can be written as a DICOM object: SEG of masks, SEG of one label map, RT Structure Set."""


def convert(
    path: AnyPath,
    target: AnyPath,
    *,
    source: AnyPath | None = None,
    kind: str | None = None,
    table: AnyPath | None = None,
    assume_orientation: str | None = None,
) -> list[Path]:
    """Write what `path` holds as the name of `target` says; return the files written, none if nothing is labelled.

    A name that ends in .dcm makes a DICOM object of labels, one of the DICOM_KINDS (by default "seg"), that refers to
    the series `source`; SEG and RT Structure Sets are read onto the grid of `source`. The names of labels come from the
    file `table`, or NAME.labels.json beside the labels, and are written there. Labels that overlap become one mask
    each, with the value in its name. Raises UsageError where `source` is missing or `kind` makes no sense, and what
    reading and writing raise.
    """
    path, target = Path(path), Path(target)
    to_object = target.name.lower().endswith(".dcm")
    if kind is not None and (kind not in DICOM_KINDS or not to_object):
        raise UsageError(f"A file that ends in .dcm is one of {', '.join(DICOM_KINDS)}; other files take no kind.")
    held = _object_kind(path)
    if source is None and (held or to_object):
        raise UsageError("A DICOM object of labels belongs to a series: give its folder as the source.")
    labels, names = _read(path, held, source, assume_orientation)
    if table is not None:
        names = read_table(table)
    if to_object:
        written = _write_object(labels, target, kind or "seg", source=source, table=names, algorithm=None)
        return [written] if written else []
    if not held:
        save(labels, target, source=source or (None if assume_orientation else path))
        return [target]
    return _write_volumes(labels, names, target, source)


def beside(path: Path) -> Path:
    """Return where the label table of a label file lies."""
    return path.with_name(f"{_stem(path)}.labels.json")


def _object_kind(path: Path) -> str | None:
    """Return "SEG" or "RTSTRUCT" for a file that is such an object, None for any other and for folders."""
    if not path.is_file():
        return None
    with reading(path), path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return None
    from pydicom import dcmread

    from medseg.io.dicom_slice import parsing

    with parsing(path):
        modality = str(dcmread(path, specific_tags=["Modality"], stop_before_pixels=True).get("Modality"))
    return modality if modality in {"SEG", "RTSTRUCT"} else None


def _read(path: Path, held: str | None, source: Any, assume: str | None) -> tuple[Volume, tuple[Label, ...]]:
    if held == "SEG":
        from medseg.io.dicom_seg import load_dicom_seg

        return load_dicom_seg(path, source=source)
    if held == "RTSTRUCT":
        from medseg.io.rtstruct import load_rtstruct

        return load_rtstruct(path, source=source)
    return load(path, assume_orientation=assume), read_table(beside(path)) if beside(path).is_file() else ()


def _write_object(labels: Volume, target: Path, kind: str, **options: Any) -> Path | None:
    if kind == "rtstruct":
        from medseg.io.rtstruct import save_rtstruct

        return save_rtstruct(labels, target, **options)
    from medseg.io.dicom_seg import save_dicom_seg

    return save_dicom_seg(labels, target, labelmap=kind == "labelmap", **options)


def _write_volumes(labels: Volume, names: Sequence[Label], target: Path, source: AnyPath | None) -> list[Path]:
    """Write a label map to `target`, or one mask for each label beside it, and the label table."""
    files = [target]
    if len(labels.array) > 1:
        ending = target.name[len(_stem(target)) :]
        files = [target.with_name(f"{_stem(target)}_{label.value}{ending}") for label in names]
    for channel, file in zip(labels.array, files, strict=True):
        save(labels.with_array(channel[None]), file, source=source)
    write_table(names, beside(target))
    return files


def _stem(path: Path) -> str:
    name = path.name
    return name[: -max((len(end) for end in VOLUME_ENDINGS if name.lower().endswith(end)), default=len(path.suffix))]
