"""NIfTI files made byte by byte, and what SimpleITK makes of files: help for the tests of medseg.io."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from nibabel.nifti1 import Nifti1Header

from medseg.volume import Grid

SHAPE = (4, 5, 6)
VOXELS = np.arange(120, dtype=np.int16).reshape(SHAPE)
AFFINE = np.array([[0, -2.0, 0, 10], [1.5, 0, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]])
SHEARED = AFFINE @ np.array([[1, 0, 0, 0], [0, 1, 0.3, 0], [0, 0, 1, 0], [0, 0, 0, 1]])

# Byte ranges of what places the voxels, from the tables of the standard: pixdim[0:4], xyzt_units, qform_code to srow_z.
GEOMETRY_BYTES = {348: [(76, 92), (123, 124), (252, 328)], 540: [(104, 136), (500, 504), (344, 496)]}


def make_nifti(
    path: Path, voxels: np.ndarray = VOXELS, kind: Any = Nifti1Header, order: str = "<", **fields: Any
) -> Path:
    """Write a NIfTI file byte by byte: sform and qform are AFFINE with code 1 in mm, unless `fields` say otherwise."""
    header = kind(endianness=order)
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(voxels.dtype)
    header.set_qform(AFFINE, 1)
    header.set_sform(AFFINE, 1)
    header["xyzt_units"] = 2
    header["vox_offset"] = header["sizeof_hdr"] + 4
    for name, value in fields.items():
        header[name] = value
    stored = voxels.astype(voxels.dtype.newbyteorder(order)).tobytes(order="F")
    content = header.binaryblock + bytes(4) + stored
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def sform(affine: np.ndarray, code: int = 1) -> dict[str, Any]:
    return {"srow_x": affine[0], "srow_y": affine[1], "srow_z": affine[2], "sform_code": code}


def set_dims(*dims: int) -> dict[str, Any]:
    return {"dim": [len(dims), *dims, *[1] * (7 - len(dims))]}


def itk_corners(path: Path) -> np.ndarray:
    """Return the world positions of five corner voxels in RAS+ mm, as SimpleITK has them."""
    image = SimpleITK.ReadImage(str(path))
    last = [n - 1 for n in image.GetSize()]
    ends = [(0, 0, 0), (0, last[1], 0), (last[0], 0, 0), (last[0], 0, last[2]), tuple(last)]
    return np.array([image.TransformIndexToPhysicalPoint(end) for end in ends]) * (-1, -1, 1)


def grid_corners(grid: Grid) -> np.ndarray:
    """Return the same positions as the grid has them."""
    i, j, k = (n - 1 for n in grid.shape)
    return grid.to_world([(0, 0, 0), (0, j, 0), (i, 0, 0), (i, 0, k), (i, j, k)])


def geometry_bytes(path: Path) -> list[bytes]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    size = min(struct.unpack("<i", content[:4]) + struct.unpack(">i", content[:4]), key=abs)
    return [content[a:b] for a, b in GEOMETRY_BYTES[size]]
