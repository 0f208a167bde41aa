"""NIfTI files: what is carried from a source bit for bit, and what a clean header says."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from conftest import make_grid, rotation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nifti_files import AFFINE, SHAPE, SHEARED, VOXELS, geometry_bytes, grid_corners, itk_corners, make_nifti, sform

from medseg.io import nifti, save
from medseg.volume import Grid, Volume

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

transforms = st.fixed_dictionaries(
    {
        **{f"quatern_{axis}": st.floats(-0.5, 0.5, width=32) for axis in "bcd"},
        **{f"qoffset_{axis}": st.floats(-1e3, 1e3, width=32) for axis in "xyz"},
        "qform_code": st.integers(0, 5),
        "sform_code": st.integers(-1, 5),
        "xyzt_units": st.integers(0, 63),
        "pixdim": st.tuples(
            st.sampled_from([-1, 1, 0, 5, np.nan]), *[st.floats(0.125, 20, width=16)] * 3, *[st.floats(width=16)] * 4
        ),
    }
)
directions = st.lists(st.floats(-3, 3, width=32), min_size=12, max_size=12).map(lambda rows: np.reshape(rows, (3, 4)))


@pytest.mark.filterwarnings("ignore:The sform of this file")
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@settings(few)
@given(
    fields=transforms,
    rows=directions,
    kind=st.sampled_from([Nifti1Header, Nifti2Header]),
    order=st.sampled_from("<>"),
    word=st.sampled_from(["RAS", "PIL"]),
)
def test_the_geometry_of_the_source_is_carried_bit_for_bit(
    tmp_path: Path, name: str, fields: dict[str, Any], rows: np.ndarray, kind: Any, order: str, word: str
) -> None:
    fields |= sform(rows + 10 * np.eye(3, 4), fields["sform_code"])
    source = make_nifti(tmp_path / f"source_{name}", VOXELS, kind, order, **fields)
    labels = nifti.read(source, assume_orientation=word)
    save(labels.with_array((labels.array > 50).astype(np.int64)), tmp_path / name, source=source)
    assert geometry_bytes(tmp_path / name) == geometry_bytes(source)
    written = nib.load(tmp_path / name)
    assert type(written.header) is kind
    assert written.header.endianness == order
    np.testing.assert_array_equal(written.dataobj, VOXELS > 50)
    np.testing.assert_array_equal(nifti.read(tmp_path / name, assume_orientation=word).grid.affine, labels.grid.affine)


def test_nothing_else_of_the_source_is_carried(tmp_path: Path) -> None:
    texts = {"descrip": b"DOE^JOHN", "aux_file": b"DOE^JOHN", "db_name": b"DOE^JOHN", "intent_name": b"DOE^JOHN"}
    image = nib.Nifti1Image(VOXELS, AFFINE)
    for field, value in texts.items():
        image.header[field] = value
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JOHN"))
    nib.save(image, tmp_path / "source.nii")
    assert (tmp_path / "source.nii").read_bytes().count(b"DOE^JOHN") == 5
    save(nifti.read(tmp_path / "source.nii"), tmp_path / "a.nii", source=tmp_path / "source.nii")
    assert b"DOE^JOHN" not in (tmp_path / "a.nii").read_bytes()


@few
@given(turn=st.tuples(*[st.floats(-180, 180)] * 3), origin=st.tuples(*[st.floats(-900, 900)] * 3), left=st.booleans())
def test_itk_finds_the_world_positions_of_a_clean_file(
    tmp_path: Path, turn: tuple[float, float, float], origin: tuple[float, ...], left: bool
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotation(turn) @ np.diag([-0.7 if left else 0.7, 1.1, 5])
    affine[:3, 3] = origin
    grid = Grid((200, 150, 2), affine)
    save(Volume(np.zeros((1, *grid.shape), np.uint8), grid), tmp_path / "a.nii")
    assert np.abs(itk_corners(tmp_path / "a.nii") - grid_corners(grid)).max() < 1e-3
    assert nifti.read(tmp_path / "a.nii").grid.matches(grid)


def test_a_clean_header_says_scanner_and_mm(tmp_path: Path) -> None:
    grid = make_grid("oblique")
    save(Volume(np.ones((1, *grid.shape)), grid), tmp_path / "a.nii")
    header = nib.load(tmp_path / "a.nii").header
    assert (header["qform_code"], header["sform_code"], header["xyzt_units"]) == (1, 1, 2)
    np.testing.assert_allclose(header.get_qform(), grid.affine, atol=1e-5)
    np.testing.assert_allclose(header.get_zooms(), (0.9, 1.1, 2.5), rtol=1e-6)
    # Bytes 112 to 120 are scl_slope and scl_inter.
    assert struct.unpack("<2f", (tmp_path / "a.nii").read_bytes()[112:120]) == (1, 0)


def test_a_sheared_grid_gets_an_sform_alone_which_itk_refuses(tmp_path: Path) -> None:
    grid = Grid(SHAPE, SHEARED)
    with pytest.warns(UserWarning, match="grid is sheared, so the file has an sform alone"):
        save(Volume(VOXELS[None], grid), tmp_path / "a.nii")
    with pytest.raises(RuntimeError, match="orthonormal"):
        SimpleITK.ReadImage(str(tmp_path / "a.nii"))
    with pytest.warns(UserWarning, match="sheared and it has no qform"):
        assert nifti.read(tmp_path / "a.nii").grid.matches(grid)


def test_equal_volumes_make_equal_files_that_tell_no_name(tmp_path: Path) -> None:
    volume = Volume(VOXELS[None], Grid(SHAPE, AFFINE))
    contents = []
    for name in ("DOE_JOHN.nii.gz", "b.nii.gz"):
        save(volume, tmp_path / name)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    # Bytes 4 to 8 of a gzip file are its time; byte 3 says whether a name follows.
    assert contents[0][3:8] == bytes(5)


def test_an_axis_of_more_than_32767_voxels_makes_nifti_2(tmp_path: Path) -> None:
    volume = Volume(np.arange(32768 * 2, dtype=np.uint16).reshape(1, 32768, 1, 2), Grid((32768, 1, 2), AFFINE))
    save(volume, tmp_path / "a.nii.gz")
    assert type(nib.load(tmp_path / "a.nii.gz")) is nib.Nifti2Image
    np.testing.assert_array_equal(nifti.read(tmp_path / "a.nii.gz").array, volume.array)


def test_slabs_join(tmp_path: Path) -> None:
    voxels = np.arange(2 * 3 * 70, dtype=np.int16).reshape(2, 3, 70)
    save(Volume(voxels[None], Grid(voxels.shape, AFFINE)), tmp_path / "a.nii")
    np.testing.assert_array_equal(nib.load(tmp_path / "a.nii").dataobj, voxels)
