"""The edge where files become Volumes and Volumes become files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medseg.errors import GeometryError, OutputError, UnreadableFile, UsageError
from medseg.io import itk, nifti
from medseg.io.files import check_place, check_regular, reading
from medseg.volume import Array, Grid, Volume

AnyPath = str | os.PathLike[str]

VOLUME_ENDINGS = (*nifti.WRITTEN_ENDINGS, *itk.WRITTEN_ENDINGS)
"""How the names of volumes end that can be read and written."""


def load(
    path: AnyPath | Sequence[AnyPath],
    *,
    assume_orientation: str | None = None,
    channels: int = 1,
    modalities: Sequence[str | None] = (),
) -> Volume:
    """Return the image that `path` holds: a NIfTI, NRRD or MetaImage file, or a folder with one DICOM series.

    Several paths give one volume with their images as channels, on the grid of the first. The others are resampled
    onto it (cubic; outside air in a CT, else the least value, with a warning) where their files share its frame of
    reference; without one, the grids must match.
    `assume_orientation` says where the stored axes point ("RAS": i to the right, j to the front, k to the head) in
    files that do not say so themselves; such an image is centered at 0 0 0. It changes nothing for other files.
    One NIfTI file may hold several `channels` along its fourth axis, where that many are expected; else a fourth axis
    is time, and refused. `modalities` ("CT", "MR", "PT" or None) says what the DICOM series of each path must be.
    Raises UnreadableFile, NotAVolume, UnknownOrientation or SeriesRefused, GeometryError for unrelated channels,
    InputError (`modality`) for a series of another modality, and UsageError for what is no path.
    """
    if isinstance(path, str | os.PathLike):
        return _load_one(Path(path), assume_orientation, channels, next(iter(modalities), None))
    paths = _paths(path)
    wanted = [*modalities, *[None] * len(paths)]
    volumes = [_load_one(one, assume_orientation, 1, kind) for one, kind in zip(paths, wanted, strict=False)]
    grid = volumes[0].grid
    arrays = [
        volume.array if volume.grid.matches(grid) else _onto(grid, volume, paths[0], its_path)
        for volume, its_path in zip(volumes, paths, strict=True)
    ]
    return Volume(np.concatenate(arrays), grid)


def save(volume: Volume, path: AnyPath, *, source: AnyPath | None = None) -> None:
    """Write labels or a one-channel image as .nii.gz, .nii, .nrrd or .mha; the file is whole or not there.

    Whole numbers are stored in the smallest type that holds them, floats in 32 bits unless they have 64. `source` is
    the file or series that the volume was made from: the grids are compared, and from one NIfTI file to another the
    geometry fields of the header are carried bit for bit. Without it the header says what the grid says.
    Raises OutputError, and GeometryError where volume and source lie on different grids.
    """
    path = Path(path)
    _check_ending(path)
    if len(volume.array) != 1:
        raise OutputError(
            f"A file holds one channel and this volume has {len(volume.array)}. Save each channel on its own.",
            path=path,
            reason="several_channels",
        )
    if source is not None:
        _check_source(volume.grid, Path(source))
    stored = volume.with_array(_compact(volume.array))
    if path.name.lower().endswith(itk.WRITTEN_ENDINGS):
        itk.write(stored, path)
    else:
        from_nifti = source is not None and _format(Path(source)) == "nifti"
        nifti.write(stored, path, geometry_of=source if from_nifti else None)


def check_output(path: AnyPath, inputs: Iterable[AnyPath]) -> None:
    """Check before the work that `save` can write a file of this name, and that it replaces none of the inputs.

    Raises OutputError for another ending, and what `check_place` raises.
    """
    _check_ending(Path(path))
    check_place(path, inputs)


def _check_ending(path: Path) -> None:
    if not path.name.lower().endswith(VOLUME_ENDINGS):
        raise OutputError("The name of an output ends in .nii.gz, .nii, .nrrd or .mha.", path=path, reason="format")


def _format(path: Path) -> Literal["dicom", "itk", "nifti"]:
    with reading(path):
        if path.is_dir():
            return "dicom"
        check_regular(path)
    if path.name.lower().endswith(nifti.ENDINGS):
        return "nifti"
    if path.name.lower().endswith(itk.ENDINGS):
        return "itk"
    raise UnreadableFile(
        "This kind of file is not known. Expected .nii, .nii.gz, .hdr with .img, .nrrd, .nhdr, .mha or .mhd, or the "
        "folder of a DICOM series.",
        path=path,
        reason="format",
    )


def _paths(paths: Any) -> list[Path]:
    """Return the paths of a list of them. Raises UsageError for anything else."""
    if not isinstance(paths, Sequence) or not all(isinstance(one, str | os.PathLike) for one in paths):
        raise UsageError(
            f"A path or a list of paths is expected, and {type(paths).__name__} came. Voxels in memory become a volume "
            "by medseg.Volume(array, medseg.Grid(shape, affine)): array (channels, I, J, K), affine to RAS+ mm."
        )
    if not paths:
        raise UsageError("At least one image is needed, and the list of them is empty.")
    return [Path(one) for one in paths]


def _load_one(path: Path, assume_orientation: str | None, channels: int = 1, modality: str | None = None) -> Volume:
    kind = _format(path)
    if kind == "nifti":
        return nifti.read(path, assume_orientation=assume_orientation, channels=channels)
    if kind == "itk":
        return itk.read(path, assume_orientation=assume_orientation)
    from medseg.io import dicom_series

    try:
        return dicom_series.read(path, modality=modality)
    except UnreadableFile as error:
        if error.reason != "no_dicom" or not any(one.name.lower().endswith(VOLUME_ENDINGS) for one in path.iterdir()):
            raise
        text = "The folder holds volumes and no DICOM series: give the path of one volume."
        raise UnreadableFile(text, path=path, reason="no_dicom") from error


def _onto(grid: Grid, volume: Volume, first: Path, path: Path) -> Array:
    """Return the voxels of a channel sampled onto `grid`, where the files say that both lie in one space."""
    if _frame_of_reference(first) is None or _frame_of_reference(first) != _frame_of_reference(path):
        raise GeometryError(
            "A channel lies on another grid than the first, and the files do not say that they share a frame of "
            "reference. Register it to the first, or resample it onto its grid.",
            path=path,
            reason="frame_of_reference",
        )
    from medseg.process.channels import onto_first

    with reading(path):
        return onto_first(volume, grid, modality=_modality(path))


def _modality(path: Path) -> str | None:
    if _format(path) != "dicom":
        return None
    from medseg.io import dicom_series

    return dicom_series.modality(path)


def _frame_of_reference(path: Path) -> str | None:
    kind = _format(path)
    if kind == "nifti":
        return nifti.frame_of_reference(path)
    if kind == "itk":
        return None
    from medseg.io import dicom_series

    return dicom_series.frame_of_reference(path) or None


def read_grid(path: AnyPath) -> Grid:
    """Return where the voxels of a NIfTI, NRRD or MetaImage file lie, from its header. Raises what `load` raises."""
    path = Path(path)
    kind = _format(path)
    if kind == "dicom":
        raise UnreadableFile("A file is expected, and this is a folder.", path=path, reason="format")
    return nifti.read_grid(path) if kind == "nifti" else itk.read_grid(path)


def _check_source(grid: Grid, source: Path) -> None:
    kind = _format(source)
    # A source that states no orientation was loaded with an assumed one, which is the volume's own.
    if kind == "nifti":
        grids = [nifti.read_grid(source, assume_orientation=grid.orientation)]
    elif kind == "itk":
        grids = [itk.read_grid(source, assume_orientation=grid.orientation)]
    else:
        from medseg.io import dicom_series

        found = [series.grid or series.regular_grid for series in dicom_series.find_series(source)]
        grids = [grid for grid in found if grid is not None]
    if not any(grid.matches(one) for one in grids):
        raise GeometryError(
            f"The volume, {grid.shape} voxels, lies on another grid than the source that it is to be saved for. "
            "Resample it onto the grid of the source, or save it without a source.",
            path=source,
            reason="source_grid",
        )


def _compact(array: Array) -> Array:
    """Return the values in the type to store: the smallest for whole numbers, of those that all programs read."""
    if array.dtype.kind == "f":
        return array.astype(np.float32 if array.dtype.itemsize <= 4 else np.float64, copy=False)
    low, high = int(array.min()), int(array.max())
    types = (np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)
    fitting = next(one for one in types if np.iinfo(one).min <= low and high <= np.iinfo(one).max)
    return array.astype(fitting, copy=False)
