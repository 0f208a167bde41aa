"""NIfTI-1 and NIfTI-2 files: .nii, .nii.gz, and pairs of .hdr and .img, which are read only.

A NIfTI header can place its voxels twice. The *sform* is an affine in full; the *qform* is a rotation, a spacing and an
offset, so it cannot shear. Each has a code: 0 says that it is not there, others name the space that it leads to.
medseg uses the sform where its code is above 0, else the qform, and warns where other programs would choose or compute
another place. Where both codes are 0, the file states a spacing and no place.

Headers are taken as they are stored, without the repairs that nibabel makes when it opens an image.
Source: https://nifti.nimh.nih.gov/nifti-1 and, for what it leaves open, the reference implementation nifti1_io.c.
"""

from __future__ import annotations

import gzip
import itertools
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.quaternions import quat2mat
from numpy.typing import NDArray

from medseg.errors import NotAVolume, UnknownOrientation, UnreadableFile
from medseg.io.files import assumed_grid, placed_grid, reading, written_whole
from medseg.volume import Affine, Array, Grid, Volume

ENDINGS = (".nii", ".nii.gz", ".hdr", ".img")
WRITTEN_ENDINGS = (".nii", ".nii.gz")

GZIP_LEVEL = 1
"""Level 6 takes three times as long; it halves label maps, which are small anyway, and saves 2 to 7 % of a CT."""

LARGEST_GZIP_RATIO = 1032
"""Deflate cannot shrink more; a file that is too small for its header is refused before memory is taken for it."""

QFORM_ROUNDING = 2e-3
"""A float32 quaternion near half a turn misses its rotation by up to 1.3e-3: not more than this is no disagreement."""

_CHUNK = 2**22
_SLAB = 32
_KINDS = {348: Nifti1Header, 540: Nifti2Header}
_MM_PER_UNIT = {1: 1000.0, 3: 0.001}
_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_OTHER_TYPES = {1: "bit", 32: "complex", 128: "rgb", 1536: "float128", 1792: "complex", 2048: "complex", 2304: "rgb"}
_GEOMETRY = (
    *("qform_code", "sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)


def read(path: str | os.PathLike[str], *, assume_orientation: str | None = None, channels: int = 1) -> Volume:
    """Return the image of a NIfTI file, in mm: one channel, or as many as asked for where its fourth axis has them.

    Integers keep their type unless the header scales them; scaled values are float32, or float64 where 32 bits are
    stored. Warns where other programs will read another place. `assume_orientation` serves files with both codes 0.
    Raises UnreadableFile, NotAVolume or UnknownOrientation.
    """
    path = Path(path)
    with reading(path):
        header = _header(path)
        (*shape, found), dtype = _shape(header, channels), _stored_type(header)
        grid = _grid(header, (shape[0], shape[1], shape[2]), assume_orientation)
        _warn_of_other_places(header, grid)
        return Volume(np.moveaxis(_scaled(_voxels(path, header, (*shape, found), dtype), header), -1, 0), grid)


def read_grid(path: str | os.PathLike[str], *, assume_orientation: str | None = None) -> Grid:
    """Return where the voxels of a NIfTI file lie, from its header alone; raises as `read` does.

    How many there are along a fourth axis makes no difference.
    """
    with reading(path):
        header = _header(Path(path))
        return _grid(header, _shape(header, int(header["dim"][4]))[:3], assume_orientation)


def frame_of_reference(path: str | os.PathLike[str]) -> str | None:
    """Return a name of the space that the affine in use leads to; files with one name can be laid over each other.

    Codes 1 (scanner), 2 (aligned to another image), 3 (Talairach) and 4 (MNI) each count as one space, though 1 and 2
    name no scan: that files belong together is what their user says by listing them. Other codes give None.
    """
    with reading(path):
        header = _header(Path(path))
    code = int(header["sform_code"] if header["sform_code"] > 0 else header["qform_code"])
    return f"NIfTI code {code}" if code in (1, 2, 3, 4) else None


def write(volume: Volume, path: str | os.PathLike[str], *, geometry_of: str | os.PathLike[str] | None = None) -> None:
    """Write one channel of whole numbers or floats, in its own type, as .nii or .nii.gz.

    With `geometry_of`, a NIfTI file on the same grid (which the caller has checked), the geometry is carried over bit
    for bit: qform, sform, codes, spacing, units, also version and byte order. Nothing else is, since descriptions and
    extensions can name a patient. Else sform and qform are both the grid, with code 1 (scanner); a sheared grid
    gets an sform alone and a warning. The bytes depend on nothing but the arguments.
    """
    shape = volume.grid.shape
    if geometry_of is None:
        header = _clean_header(volume.grid)
    else:
        with reading(geometry_of):
            header = _carried_header(_header(Path(geometry_of)))
    header.set_data_shape(shape)
    header.set_data_dtype(volume.array.dtype)
    header["vox_offset"] = header["sizeof_hdr"] + 4
    stored = volume.array.dtype.newbyteorder(header.endianness)
    with written_whole(path) as beside, _created(beside) as stream:
        stream.write(header.binaryblock + bytes(4))
        for start in range(0, shape[2], _SLAB):
            stream.write(volume.array[0, :, :, start : start + _SLAB].astype(stored).tobytes(order="F"))


def _header(path: Path) -> Nifti1Header:
    with _opened(_part(path, ".hdr")) as stream:
        block = stream.read(max(_KINDS))
    orders: tuple[Literal["little", "big"], ...] = ("little", "big")
    for order in orders:
        size = int.from_bytes(block[:4], order)
        if size in _KINDS and len(block) >= size:
            header = _KINDS[size](block[:size], endianness=order, check=False)
            if bytes(header["magic"])[:2] in (b"n+", b"ni"):
                return header
            raise UnknownOrientation(
                "This is an Analyze 7.5 image, which does not say which side is left. "
                "Convert it to NIfTI with a program that knows.",
                reason="analyze",
            )
    raise UnreadableFile("A NIfTI header was expected and something else came. Check what the file really is.")


def _shape(header: Nifti1Header, channels: int) -> tuple[int, int, int, int]:
    """Return the edges of an image and its channels: one, or as many as are expected."""
    count, *sizes = (int(n) for n in header["dim"])
    if not 1 <= count <= 7 or min(sizes[:count]) < 1:
        raise UnreadableFile("The header gives no sensible number of voxels: it is damaged. Export the file again.")
    shape = sizes[:count] + [1] * (7 - count)
    if count == 1:
        raise NotAVolume("A 3-D image was expected; this file holds one row of numbers.", reason="one_row")
    if count == 2:
        raise NotAVolume(
            "A 3-D image was expected; this file holds a flat one. Save a slice with a third axis, of length one, "
            "which says how thick it is.",
            reason="flat",
        )
    values = int(np.prod(shape[3:], dtype=object))
    if values > 1 and not values == shape[3] == channels:
        expected = "one value" if channels <= 1 else f"one value, or {channels} along a fourth axis,"
        raise NotAVolume(
            f"One 3-D image with {expected} in each voxel was expected; here are {values}, over time or as vectors. "
            "Save the one to use as a file of its own.",
            reason="several_frames" if shape[3] > 1 else "vectors",
        )
    return shape[0], shape[1], shape[2], values


def _stored_type(header: Nifti1Header) -> np.dtype[np.generic]:
    code = int(header["datatype"])
    if code in _OTHER_TYPES:
        kind = _OTHER_TYPES[code]
        raise NotAVolume(
            f"Voxels must be whole numbers or floats of up to 64 bits; here they are of type {kind}. "
            "Save what is to be used, such as the magnitude or one color, as an image of its own.",
            reason=kind,
        )
    if code not in _TYPES:
        raise UnreadableFile("The header names no known voxel type: it is damaged. Export the file again.")
    return np.dtype(_TYPES[code]).newbyteorder(header.endianness)


def _grid(header: Nifti1Header, shape: tuple[int, int, int], assume_orientation: str | None) -> Grid:
    if header["sform_code"] <= 0 and header["qform_code"] <= 0:
        return assumed_grid(shape, header["pixdim"][1:4].astype(np.float64) * _scale(header), assume_orientation)
    affine = _sform(header) if header["sform_code"] > 0 else _qform(header)
    return placed_grid(shape, affine)


def _scale(header: Nifti1Header) -> float:
    return _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)


def _sform(header: Nifti1Header) -> Affine:
    affine = np.eye(4)
    affine[:3] = header["srow_x"], header["srow_y"], header["srow_z"]
    affine[:3] *= _scale(header)
    return affine


def _qform(header: Nifti1Header) -> Affine:
    pixdim = header["pixdim"].astype(np.float64)
    if not (pixdim[1:4] > 0).all():
        raise UnknownOrientation("The file gives no positive spacing. Repair its header.", reason="bad_spacing")
    b, c, d = (float(header[f"quatern_{axis}"]) for axis in "bcd")
    # Near half a turn nibabel rounds otherwise than the reference implementation, which ITK follows, as is done here.
    rest = 1 - (b * b + c * c + d * d)
    rotation = quat2mat((rest**0.5 if rest > 1e-7 else 0.0, b, c, d)) if rest > -1e-3 else np.nan
    affine = np.eye(4)
    affine[:3, :3] = rotation * pixdim[1:4]
    affine[:3, 2] *= -1 if pixdim[0] < 0 else 1
    affine[:3, 3] = [float(header[f"qoffset_{axis}"]) for axis in "xyz"]
    affine[:3] *= _scale(header)
    return affine


def _warn_of_other_places(header: Nifti1Header, grid: Grid) -> None:
    if header["sform_code"] <= 0:
        return
    qform = header["qform_code"] > 0
    if not qform and not grid.is_orthogonal:
        warnings.warn(
            "The sform of this file is sheared and it has no qform: ITK programs cannot open it.", stacklevel=3
        )
        return
    other = _other_place(header, grid)
    if grid.is_orthogonal and _agree(grid.affine, other):
        return
    ends = np.array(list(itertools.product(*((0, n - 1) for n in grid.shape))))
    away = np.linalg.norm(grid.to_world(ends) - (ends @ other[:3, :3].T + other[:3, 3]), axis=1).max()
    far = f"up to {away:.3g} mm" if np.isfinite(away) else "an unknown distance"
    if grid.is_orthogonal:
        text = (
            f"The sform of this file and its {'qform' if qform else 'spacing'} place voxels {far} apart. "
            "The sform is used; other programs may use the other."
        )
    else:
        text = (
            "The sform of this file is sheared. It is used as it is, but ITK programs will read the qform, which "
            f"places voxels {far} elsewhere."
        )
    warnings.warn(text, stacklevel=3)


def _other_place(header: Nifti1Header, grid: Grid) -> Affine:
    """Return what others may use in place of the sform: the qform or, without one, the sform with pixdim's spacing."""
    try:
        if header["qform_code"] > 0:
            return _qform(header)
    except UnknownOrientation:
        return np.full((4, 4), np.nan)
    affine = grid.affine.copy()
    affine[:3, :3] *= header["pixdim"][1:4] * _scale(header) / np.asarray(grid.spacing_mm)
    return affine


def _agree(sform: Affine, other: Affine) -> bool:
    steps_mm = np.linalg.norm(sform[:3, :3], axis=0)
    allowed_mm = [*(QFORM_ROUNDING * steps_mm), 0.01]
    return bool((np.abs(sform - other)[:3] <= allowed_mm).all())


def _voxels(path: Path, header: Nifti1Header, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    data = _part(path, ".img")
    packed = _is_packed(data)
    offset = float(header["vox_offset"])
    size = dtype.itemsize * math.prod(shape)
    least = 0 if data.suffix.lower() == ".img" else int(header["sizeof_hdr"]) + 4
    room = data.stat().st_size * (LARGEST_GZIP_RATIO if packed else 1)
    if not least <= offset <= room - size:
        raise UnreadableFile("The file is shorter than its header says: it was cut. Copy or export it again.")
    voxels = np.empty(size, np.uint8)
    with _opened(data) as stream:
        stream.seek(int(offset))
        _fill(voxels, stream)
        # gzip compares its checksum at the end of the stream only.
        while packed and stream.read(_CHUNK):
            pass
    return voxels.view(dtype).reshape(shape, order="F").astype(dtype.newbyteorder("="), copy=False)


def _fill(voxels: NDArray[np.uint8], stream: IO[bytes]) -> None:
    for start in range(0, len(voxels), _CHUNK):
        part = voxels[start : start + _CHUNK]
        block = stream.read(len(part))
        if len(block) < len(part):
            raise EOFError
        part[:] = np.frombuffer(block, np.uint8)


def _scaled(voxels: Array, header: Nifti1Header) -> Array:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope) or (slope, intercept) == (1, 0):
        return voxels
    if not np.isfinite(intercept):
        raise UnreadableFile("The header scales values by an offset that is no number. Export the file again.")
    values: NDArray[np.floating] = voxels.astype(np.result_type(voxels.dtype, np.float32))
    values *= slope
    values += intercept
    return values


def _clean_header(grid: Grid) -> Nifti1Header:
    header = Nifti2Header() if max(grid.shape) > np.iinfo(np.int16).max else Nifti1Header()
    header.set_xyzt_units("mm")
    header.set_sform(grid.affine, code=1)
    if grid.is_orthogonal:
        header.set_qform(grid.affine, code=1)
    else:
        # A qform without the shear would be read in place of the sform: a refusal is better than a wrong place.
        header["pixdim"][1:4] = grid.spacing_mm
        warnings.warn("The grid is sheared, so the file has an sform alone: ITK programs cannot open it.", stacklevel=3)
    return header


def _carried_header(source: Nifti1Header) -> Nifti1Header:
    header = type(source)(endianness=source.endianness)
    header["pixdim"][:4] = source["pixdim"][:4]
    for field in _GEOMETRY:
        header[field] = source[field]
    return header


def _part(path: Path, suffix: str) -> Path:
    if path.suffix.lower() not in (".hdr", ".img") or path.suffix.lower() == suffix:
        return path
    return path.with_suffix(suffix.upper() if path.suffix.isupper() else suffix)


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if _is_packed(path) else path.open("rb")  # type: ignore[return-value]


@contextmanager
def _created(path: Path) -> Iterator[IO[bytes]]:
    with path.open("wb") as stream:
        if not _is_packed(path):
            yield stream
            return
        # Without a name and a time in the gzip header, equal volumes make equal files, and no file name is told.
        with gzip.GzipFile(filename="", mode="wb", compresslevel=GZIP_LEVEL, fileobj=stream, mtime=0) as packed:
            yield packed  # type: ignore[misc]
