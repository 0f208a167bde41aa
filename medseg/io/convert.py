"""From any file that medseg reads to any that it writes: volumes, and labels as DICOM objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medseg.errors import UsageError
from medseg.io import AnyPath, check_output, save
from medseg.io.files import check_place
from medseg.io.label_table import write_table
from medseg.io.structures import beside, load_labels, object_kind, stem
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
    each, with the value in its name. Raises UsageError where `source` is missing, `kind` makes no sense, or an input
    would be replaced, and what reading and writing raise.
    """
    path, target = Path(path), Path(target)
    to_object = target.name.lower().endswith(".dcm")
    if kind is not None and (kind not in DICOM_KINDS or not to_object):
        raise UsageError(
            f"A file that ends in .dcm is one of {', '.join(DICOM_KINDS)} (medseg report writes SR); other files take "
            "no kind."
        )
    inputs = [one for one in (path, source, table) if one is not None]
    if to_object:
        check_place(target, inputs)
    else:
        check_output(target, inputs)
    held = object_kind(path)
    if source is None and to_object:
        raise UsageError("A DICOM object of labels belongs to a series: give its folder as the source.")
    labels, names = load_labels(path, source=source, table=table, assume_orientation=assume_orientation)
    if to_object:
        written = _write_object(labels, target, kind or "seg", source=source, table=names, algorithm=None)
        return [written] if written else []
    if not held:
        save(labels, target, source=source or (None if assume_orientation else path))
        if names and beside(target) != beside(path):
            write_table(names, beside(target))
        return [target]
    return _write_volumes(labels, names, target, source)


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
        ending = target.name[len(stem(target)) :]
        files = [target.with_name(f"{stem(target)}_{label.value}{ending}") for label in names]
    for channel, file in zip(labels.array, files, strict=True):
        save(labels.with_array(channel[None]), file, source=source)
    write_table(names, beside(target))
    return files
