"""NRRD and MetaImage files (.nrrd, .nhdr, .mha, .mhd) through SimpleITK, which keeps world positions in LPS+ mm.

SimpleITK says nothing where a file lacks its geometry (it assumes unit voxels at 0 0 0), and fills with zeros what is
missing of a compressed MetaImage. So the text header is read here first, and such files are refused.
Source: https://teem.sourceforge.net/nrrd/format.html and https://itk.org/Wiki/ITK/MetaIO/Documentation.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from medseg.errors import NotAVolume, OutputError, UnknownOrientation, UnreadableFile
from medseg.io.files import assumed_grid, placed_grid, reading, written_whole
from medseg.io.itk_data import check_size, data_files, text_header
from medseg.volume import Grid, Volume

if TYPE_CHECKING:
    from SimpleITK import ImageFileReader

ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
WRITTEN_ENDINGS = (".nrrd", ".mha")

LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Takes RAS+ to LPS+ world positions, and back."""

_ANATOMICAL = ("left-posterior-superior", "right-anterior-superior", "left-anterior-superior", "lps", "ras", "las")
_MATRIX = ("transformmatrix", "rotation", "orientation")
_OFFSET = ("offset", "position", "origin")
_SCALING = ("elementtointensityfunctionslope", "elementtointensityfunctionoffset")
_CHUNK = 2**16


def read(path: str | os.PathLike[str], *, assume_orientation: str | None = None) -> Volume:
    """Return the image of an NRRD or MetaImage file, one channel in its stored type, axes in stored order.

    `assume_orientation` serves files that do not say where their voxels lie.
    Raises UnreadableFile, NotAVolume or UnknownOrientation.
    """
    import SimpleITK

    path = Path(path)
    with reading(path):
        fields, start = text_header(path, nrrd=_is_nrrd(path))
        reader = _reader(path, fields)
        grid = _grid(reader, fields, assume_orientation)
        if not _is_nrrd(path):
            _check_voxels(path, fields, start, reader)
        try:
            return Volume(SimpleITK.GetArrayFromImage(reader.Execute()).T[None], grid)
        except RuntimeError as error:
            raise UnreadableFile(
                "The voxels could not be read: the file is cut short or damaged. Copy or export it again."
            ) from error


def read_grid(path: str | os.PathLike[str], *, assume_orientation: str | None = None) -> Grid:
    """Return where the voxels of an NRRD or MetaImage file lie, from its header alone; raises as `read` does."""
    path = Path(path)
    with reading(path):
        fields, _ = text_header(path, nrrd=_is_nrrd(path))
        return _grid(_reader(path, fields), fields, assume_orientation)


def write(volume: Volume, path: str | os.PathLike[str]) -> None:
    """Write one channel of whole numbers or floats, in its own type, compressed, as .nrrd or .mha.

    Raises OutputError for a sheared grid, which ITK images cannot hold, and where the file cannot be written.
    """
    import SimpleITK

    if not volume.grid.is_orthogonal:
        raise OutputError("NRRD and MHA files cannot hold a sheared grid. Write NIfTI.", path=path, reason="sheared")
    affine = LPS_FROM_RAS @ volume.grid.affine
    image = SimpleITK.GetImageFromArray(volume.array[0].T)
    image.SetSpacing(volume.grid.spacing_mm)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / volume.grid.spacing_mm).ravel().tolist())
    with written_whole(path) as beside:
        # SimpleITK keeps no cause; what the system says of the folder is asked for here.
        beside.touch()
        try:
            SimpleITK.WriteImage(image, str(beside), useCompression=True, imageIO=_image_io(beside), compressionLevel=1)
        except RuntimeError as error:
            raise OutputError("The file could not be written. Check the space left on its disk.", path=path) from error


def _reader(path: Path, fields: Mapping[str, str]) -> ImageFileReader:
    """Return a reader that has read the header of what is then known to be one 3-D scalar image."""
    import SimpleITK

    axes = fields.get("dimension" if _is_nrrd(path) else "ndims")
    if axes is None:
        raise UnreadableFile("The header gives no number of axes: it is damaged, or this is another kind of file.")
    files = data_files(path, fields, nrrd=_is_nrrd(path))  # before ITK may open them
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(_image_io(path))
    scalar = axes == "3" and not _kinds_of_axes(fields) - {"domain", "space", "none", "???"}
    if scalar:
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:
            raise UnreadableFile(
                "The header is damaged, or of a kind that ITK does not read. Export it again."
            ) from error
        scalar = reader.GetDimension() == 3 and reader.GetNumberOfComponents() == 1 and _bits(reader) > 0
    if not scalar:
        raise NotAVolume(
            "One 3-D image with one value in each voxel was expected; this file has other axes, or several values. "
            "Save the part to use as a 3-D image of its own."
        )
    if _is_nrrd(path):
        check_size(files, fields, _bytes(reader))
    if any(name in fields for name in _SCALING):
        raise NotAVolume("The header scales the voxels, which ITK ignores. Save the scaled values.", reason="scaling")
    return reader


def _bits(reader: ImageFileReader) -> int:
    """Return the bits of a voxel; 0 for voxels that are no single number."""
    import SimpleITK

    match = re.match(
        r"(\d+)-bit (un)?(signed integer|float)", SimpleITK.GetPixelIDValueAsString(reader.GetPixelIDValue())
    )
    return int(match[1]) if match else 0


def _bytes(reader: ImageFileReader) -> int:
    return int(math.prod(reader.GetSize())) * _bits(reader) // 8


def _kinds_of_axes(fields: Mapping[str, str]) -> set[str]:
    # An NRRD axis without a direction in space is none of space, whatever its kind says.
    return {"list"} if "none" in fields.get("space directions", "") else set(fields.get("kinds", "").lower().split())


def _grid(reader: ImageFileReader, fields: Mapping[str, str], assume_orientation: str | None) -> Grid:
    units = re.findall('"([^"]*)"', fields.get("space units", "") + fields.get("units", ""))
    units.append(fields.get("distanceunits", ""))  # of MetaImages, where ITK does not look at it
    if not set(units) <= {"mm", "", "?"}:
        raise UnknownOrientation("The file measures space in another unit than mm. Convert it.", reason="units")
    spaced, placed = _stated(fields)
    spacing = np.asarray(reader.GetSpacing() if spaced else [np.nan] * 3)
    if not placed:
        return assumed_grid(reader.GetSize(), spacing, assume_orientation)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) * spacing
    affine[:3, 3] = reader.GetOrigin()
    return placed_grid(reader.GetSize(), LPS_FROM_RAS @ affine)


def _stated(fields: Mapping[str, str]) -> tuple[bool, bool]:
    """Return whether the header gives the spacing, and whether it gives the full place in the patient."""
    if "dimension" in fields:
        directions = "space directions" in fields
        anatomical = fields.get("space", "").lower() in _ANATOMICAL
        return directions or "spacings" in fields, directions and anatomical and "space origin" in fields
    spaced = "elementspacing" in fields
    return spaced, spaced and any(name in fields for name in _MATRIX) and any(name in fields for name in _OFFSET)


def _check_voxels(path: Path, fields: Mapping[str, str], start: int, reader: ImageFileReader) -> None:
    """Raise where a MetaImage lacks voxels: ITK would say so on the terminal only, or give zeros or noise for them."""
    name = fields.get("elementdatafile", "")
    if name in ("", "LIST") or {"%", "\0"} & set(name) or not _is_true(fields, "binarydata"):
        raise UnreadableFile("The voxels must be binary and in one file. Save the image as .mha anew.", reason="layout")
    (data,) = data_files(path, fields, nrrd=False)
    local, expected = data == path, _bytes(reader)
    with data.open("rb") as stream:
        stream.seek(start if local else 0)
        found = rest = data.stat().st_size - stream.tell()
        if _is_true(fields, "compresseddata"):
            found, used = _inflated(stream)
            # ITK starts at a wrong byte where this is not given for voxels in the same file.
            stated = fields.get("compresseddatasize", "0" if local else str(rest))
            if not stated.isdecimal() or not used <= int(stated) <= rest:
                raise EOFError
    if found < expected:
        raise EOFError


def _inflated(stream: IO[bytes]) -> tuple[int, int]:
    """Return how many bytes the compressed stream holds, and how many it takes."""
    size, used, inflate = 0, 0, zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    while not inflate.eof:
        block = stream.read(_CHUNK)
        if not block:
            raise EOFError
        size += len(inflate.decompress(block))
        used += len(block)
    return size, used - len(inflate.unused_data)


def _is_true(fields: Mapping[str, str], name: str) -> bool:
    return fields.get(name, "").lower() in ("true", "t", "1")


def _is_nrrd(path: Path) -> bool:
    return path.suffix.lower() in (".nrrd", ".nhdr")


def _image_io(path: Path) -> str:
    return "NrrdImageIO" if _is_nrrd(path) else "MetaImageIO"
