"""DICOM series: folders of CT, MR and PET slices or frames, ordered by their positions in the patient.

`find_series` reads headers only and gives a verdict on every series; `read` reads the pixels of one. Whatever cannot be
placed and scaled right is refused with its reason.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, SeriesRefused, UnreadableFile, UsageError
from medseg.io.dicom_geometry import Problem, order_along_normal, parallel, regular_stack, stack_affine, stack_problem
from medseg.io.dicom_lost import lost_slices
from medseg.io.dicom_passes import find_passes, may_be_passes
from medseg.io.dicom_pixels import Native, read_pixels
from medseg.io.dicom_slice import VARIANTS, Slice, read_headers
from medseg.io.files import reading
from medseg.io.listing import slice_files
from medseg.volume import Array, Grid, Volume

NO_SCANS = frozenset({"localizer", "not_an_image", "picture", "color"})
"""What may lie beside the series to read. A scan that is refused for another reason might be the one that was meant."""


MODALITIES = frozenset({"CT", "MR", "PT", "NM", "US", "XA", "RF", "CR", "DX", "MG"})
"""Modalities that say how an image was acquired (PS3.3 C.7.3.1.1.1); other words say nothing that could be wrong."""


@dataclass(frozen=True, eq=False)
class Series:
    """The slices of one SeriesInstanceUID, ordered along their normal, localizers left out.

    Either `grid` says where the voxels lie, or `refusal` says why the series cannot be read as it is. `regular_grid` is
    what slices with irregular steps can be interpolated onto, where that can be answered for. `thickness_mm` is NaN
    where the header does not state it.
    """

    study_uid: str
    uid: str
    number: str
    frame_of_reference_uid: str
    modality: str
    description: str
    contrast: bool
    thickness_mm: float
    slices: tuple[Slice, ...]
    grid: Grid | None
    refusal: SeriesRefused | None
    regular_grid: Grid | None = None

    @property
    def n_slices(self) -> int:
        """How many slices there are."""
        return len(self.slices)

    @property
    def verdict(self) -> str:
        """What becomes of the series: "accepted", "repaired" (interpolated onto `regular_grid`) or "refused"."""
        if self.grid is not None:
            return "accepted"
        return "refused" if self.regular_grid is None else "repaired"

    @property
    def heights(self) -> NDArray[np.float64]:
        """For each slice its k in what `read_series` gives: 0, 1, 2 ... but for slices with irregular steps."""
        if self.grid is not None or self.regular_grid is None:
            return np.arange(len(self.slices), dtype=np.float64)
        origins = np.array([part.plane[:3, 3] for part in self.slices if part.plane is not None])
        heights: NDArray[np.float64] = self.regular_grid.to_index(origins)[:, 2]
        return heights


def find_series(folder: str | os.PathLike[str]) -> list[Series]:
    """Return every DICOM series at or below `folder`, read from headers only, each with a verdict.

    Files of any name count; DICOMDIR and what certainly is no slice are passed over. Files with a blank
    SeriesInstanceUID count as one series per folder. The path of a file stands for that file alone.
    Raises UnreadableFile where the path is missing, a file is DICOM but its header is cut off, one that is not DICOM
    could be a slice, see `lost_slices`, or one that names no series could be a slice of one, see `nameless_slices`.
    """
    groups: dict[tuple[str, Path | None], list[Slice]] = {}
    others = []
    for path in files_below(Path(folder)):
        parts = read_headers(path)
        if not parts:
            others.append(path)
        for part in parts:
            groups.setdefault((part.series_uid, None if part.series_uid else path.parent), []).append(part)
    found = [part for slices in groups.values() for part in slices]
    for lost in (*lost_slices(others, [part.path for part in found]), *nameless_slices(found)):
        raise lost
    return [make_series(slices) for slices in groups.values()]


def nameless_slices(slices: Sequence[Slice]) -> list[UnreadableFile]:
    """Return an error for each slice without a SeriesInstanceUID that lies beside those of a series like it."""
    nameless = [part for part in slices if not part.series_uid and part.plane is not None]
    if not nameless:
        return []
    named: dict[Path, list[Slice]] = {}
    for part in slices:
        if part.series_uid and part.plane is not None:
            named.setdefault(part.path.parent, []).append(part)
    text = (
        "A slice does not state its SeriesInstanceUID and lies beside slices of a series that it may belong to. "
        "Export the series again, or move the slice elsewhere."
    )
    return [
        UnreadableFile(text, path=part.path, reason="missing_attribute")
        for part in nameless
        if any(_could_be_one(part, other) for other in named.get(part.path.parent, ()))
    ]


def _could_be_one(part: Slice, other: Slice) -> bool:
    if part.plane is None or other.plane is None or part.shape != other.shape:
        return False
    return part.is_localizer == other.is_localizer and parallel(part.plane, other.plane, part.shape)


def choose(
    folder: str | os.PathLike[str], series_uid: str | None = None, *, repaired: bool = False
) -> tuple[Series, Grid]:
    """Return the one scan at or below `folder`, or the series named, with its grid; its pixels stay unread.

    Of slices with irregular steps that is their regular grid where `repaired` is set; else they are refused.
    Raises what `read` raises for headers.
    """
    folder = Path(folder)
    found = find_series(folder)
    if not found:
        raise UnreadableFile(
            "There is no DICOM file here; pass the folder of a series.", path=folder, reason="no_dicom"
        )
    if series_uid is not None:
        found = [series for series in found if series.uid == series_uid]
        if not found:
            raise UsageError("No series here has the series_uid that was asked for.", path=folder)
    scans = [series for series in found if series.refusal is None or series.refusal.reason not in NO_SCANS] or found
    grids = [(series, series.grid or (series.regular_grid if repaired else None)) for series in scans]
    readable = [(series, grid) for series, grid in grids if grid is not None]
    if len(scans) > 1:
        raise SeriesRefused(
            f"Expected one series, found {len(scans)}, of which {len(readable)} can be read. "
            "Pass the folder of one, or its series_uid.",
            path=folder,
            reason="several_series",
        )
    if not readable:
        raise scans[0].refusal or SeriesRefused("The series has no grid.")
    return readable[0]


def read(folder: str | os.PathLike[str], *, series_uid: str | None = None, modality: str | None = None) -> Volume:
    """Return the one scan at or below `folder`, or the series named, as a Volume with one channel.

    i counts the columns of the image, j its rows, k the slices along their normal. Values are rescaled slice by slice:
    int16 or int32 where slopes and intercepts are whole numbers, else float32. Localizers, color pictures, segmentation
    objects and the like do not count. Raises SeriesRefused where the scan cannot be read right or there are several,
    UnreadableFile where files are missing or damaged, UsageError for an unknown `series_uid`, InputError (`modality`)
    where the series states another modality than `modality`.
    """
    series, grid = choose(folder, series_uid)
    require_modality(series.modality, modality)
    return Volume(_voxels(series.slices), grid)


def require_modality(stated: str, wanted: str | None) -> None:
    """Raise InputError (`modality`) where DICOM states one modality and another is wanted; None wants any."""
    if wanted is not None and stated in MODALITIES and stated != wanted:
        raise InputError(
            f"The series is {stated} and the model was made for {wanted}: its labels would mean nothing. Give it a "
            f"series of {wanted}, or insist (--anyway, anyway=True).",
            reason="modality",
        )


def read_series(series: Series) -> Volume:
    """Return the voxels of a series that was found before, as `read` does; its headers are not read again.

    Slices with irregular steps are interpolated linearly onto `regular_grid`, in the type of the slices.
    Raises the refusal of a series that has neither grid, and what `read` raises for pixels.
    """
    if series.grid is not None:
        return Volume(_voxels(series.slices), series.grid)
    if series.regular_grid is None:
        raise series.refusal or SeriesRefused("The series has no slices.")
    return Volume(_interpolated(_voxels(series.slices), series.heights, series.regular_grid), series.regular_grid)


def frame_of_reference(folder: str | os.PathLike[str], *, series_uid: str | None = None) -> str:
    """Return the FrameOfReferenceUID of the series that `read` would read; "" where the series states none.

    Two volumes share their world space only where both state the same one. Raises what `read` raises for headers.
    """
    return choose(folder, series_uid)[0].frame_of_reference_uid


def modality(folder: str | os.PathLike[str]) -> str:
    """Return the modality ("CT", "MR") of the series that `read` would read. Raises what `read` raises for headers."""
    return choose(folder, None)[0].modality


def files_below(path: Path) -> list[Path]:
    """Return the files at or below a path that may be DICOM, sorted. Raises UnreadableFile."""
    with reading(path):
        if path.is_file():
            return [path]
        return slice_files(path, _fail)


def _fail(error: OSError) -> None:
    raise error


def make_series(slices: Sequence[Slice]) -> Series:
    """Return slices, in any order, as one series with its verdict; localizers among other slices are left out."""
    slices = [part for part in slices if not part.is_localizer] or slices
    planes = np.array([part.plane for part in slices if part.plane is not None])
    if len(planes) == len(slices):
        order = order_along_normal(planes)
        slices, planes = [slices[n] for n in order], planes[order]
    first = slices[0]
    problem = _content_problem(slices) or _stack_problem(slices, planes)
    refusal = grid = regular_grid = None
    if problem is None:
        grid = Grid((*first.shape, len(slices)), stack_affine(planes, first.thickness_mm))
    else:
        hint = f" {_difference(slices)}" if problem.reason == "duplicate_positions" else ""
        refusal = SeriesRefused(f"{problem.text}{hint}", path=first.path.parent, reason=problem.reason)
        regular = regular_stack(planes, first.shape) if problem.reason == "irregular_spacing" else None
        if regular is not None and not may_be_passes(slices, planes):
            regular_grid = Grid((*first.shape, regular[1]), regular[0])
    return Series(
        study_uid=first.study_uid,
        uid=first.series_uid,
        number=first.series_number,
        frame_of_reference_uid=next(filter(None, (part.frame_of_reference_uid for part in slices)), ""),
        modality=next(filter(None, (part.modality for part in slices)), ""),
        description=first.description,
        contrast=any(part.contrast for part in slices),
        thickness_mm=first.thickness_mm,
        slices=tuple(slices),
        grid=grid,
        refusal=refusal,
        regular_grid=regular_grid,
    )


def _stack_problem(slices: Sequence[Slice], planes: NDArray[np.float64]) -> Problem | None:
    """Return why slices, ordered along their normal, are no stack: by where they lie, or since they are several."""
    first = slices[0]
    problem = stack_problem(planes, first.shape, first.thickness_mm)
    may_be_several = problem is None or problem.reason in {"irregular_spacing", "missing_slice"}
    passes = find_passes(slices, planes) if may_be_several else None
    if passes is None:
        return problem
    text = (
        f"The slices are {len(passes.parts)} passes over one region, each with equal steps, that differ in "
        f"{passes.element}, such as phases of a contrast agent. Pass the slices of one."
    )
    if not passes.are_certain:
        text = (
            f"The slices are numbered as one scan, and by {passes.element} they are {len(passes.parts)} passes over one"
            " region that interleave, so it is unknown which they are. Export each as a series of its own."
        )
    return Problem("interleaved", text)


def _content_problem(slices: Sequence[Slice]) -> Problem | None:
    """Return what forbids to read the slices apart from where they lie."""
    if slices[0].is_localizer:
        return Problem("localizer", "The series is a localizer, which only serves to plan a scan.")
    own = next((part.problem for part in slices if part.problem), None)
    if own:
        return own
    instances = [(part.sop_instance_uid, part.frame) for part in slices if part.sop_instance_uid]
    copies = len(instances) - len(set(instances))
    if copies:
        return Problem(
            "duplicate_instances",
            f"{copies} of {len(slices)} files repeat the SOPInstanceUID of another. Remove the copies.",
        )
    if len({part.frame_of_reference_uid for part in slices} - {""}) > 1:
        return Problem(
            "mixed_frame_of_reference", "The slices belong to several frames of reference. Pass those of one."
        )
    shapes = sorted({part.shape for part in slices})
    if len(shapes) > 1:
        sizes = ", ".join(f"{columns} x {rows}" for columns, rows in shapes)
        return Problem("mixed_matrix", f"The slices differ in columns x rows: {sizes}. Pass those of one size.")
    return _rescale_problem(slices)


def _rescale_problem(slices: Sequence[Slice]) -> Problem | None:
    unstated = sum(not part.is_rescaled for part in slices)
    if unstated in {0, len(slices)} or all((part.slope, part.intercept) == (1, 0) for part in slices):
        return None
    return Problem(
        "rescale",
        f"{unstated} of {len(slices)} slices do not state RescaleSlope and RescaleIntercept, which the others do, so "
        "it is unknown what their values mean. Export the original series.",
    )


def _difference(slices: Sequence[Slice]) -> str:
    columns = zip(*(part.variants for part in slices), strict=True)
    counts = {name: len(set(values)) for name, values in zip(VARIANTS, columns, strict=True)}
    varying = ", ".join(f"{name} ({count} values)" for name, count in counts.items() if count > 1)
    return f"They differ in {varying}: pass the slices of one." if varying else "No usual tag tells them apart."


def _voxels(slices: Sequence[Slice]) -> Array:
    """Return the rescaled voxels (1, columns, rows, slices); in memory k varies slowest, as NIfTI stores it."""
    stored = _stored(slices)
    dtype = _dtype(slices, stored)
    voxels = np.empty((len(slices), *stored[0].shape), dtype)
    for into, part, values in zip(voxels, slices, stored, strict=True):
        if dtype.kind == "f":
            into[...] = values.astype(np.float64) * part.slope + part.intercept
        else:
            # Whole numbers wrap around on the way: a result that fits comes out exact in any type.
            slope, intercept = np.array([int(part.slope), int(part.intercept)]).astype(dtype)
            whole = values.astype(dtype, copy=False)
            np.add(whole if slope == 1 else whole * slope, intercept, out=into)
    return voxels.transpose(2, 1, 0)[None]


def _stored(slices: Sequence[Slice]) -> list[Array]:
    """Return the stored values of the slices; a file with many of them is opened once."""
    frames: dict[tuple[Path, Native | None], list[int]] = {}
    for part in slices:
        frames.setdefault((part.path, part.native), []).append(part.frame)
    read = {
        path: dict(zip(wanted, read_pixels(path, wanted, native), strict=True))
        for (path, native), wanted in frames.items()
    }
    return [read[part.path][part.frame] for part in slices]


def _interpolated(voxels: Array, at: NDArray[np.float64], grid: Grid) -> Array:
    """Return voxels (1, I, J, K) of slices `at` these k at the slices of `grid`: linear, whole numbers stay whole."""
    result = np.empty((*voxels.shape[:3], grid.shape[2]), voxels.dtype, order="F")
    for k in range(grid.shape[2]):
        behind = int(np.clip(np.searchsorted(at, k), 1, len(at) - 1))
        share = min(1.0, max(0.0, (k - at[behind - 1]) / (at[behind] - at[behind - 1])))
        mixed = (1 - share) * voxels[..., behind - 1] + share * voxels[..., behind]
        result[..., k] = mixed if voxels.dtype.kind == "f" else np.rint(mixed)
    return result


def _dtype(slices: Sequence[Slice], stored: Sequence[Array]) -> np.dtype[np.generic]:
    """Return the smallest of int16, int32 and float32 that holds all rescaled values, the first two exactly."""
    whole = all(part.slope.is_integer() and part.intercept.is_integer() for part in slices)
    if whole and all(values.dtype.kind in "iu" for values in stored):
        ends = [
            int(end) * part.slope + part.intercept
            for part, values in zip(slices, stored, strict=True)
            for end in (values.min(), values.max())
        ]
        for dtype in (np.int16, np.int32):
            if np.iinfo(dtype).min <= min(ends) and max(ends) <= np.iinfo(dtype).max:
                return np.dtype(dtype)
    return np.dtype(np.float32)
