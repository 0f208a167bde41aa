"""NIfTI files: what is read of a header, what is refused, and what is carried to a label file bit for bit."""

from __future__ import annotations

import gzip
import logging
import struct
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import rotation
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nifti_files import AFFINE, SHAPE, SHEARED, VOXELS, grid_corners, itk_corners, make_nifti, set_dims, sform

from medseg.errors import MedsegError, NotAVolume, UnknownOrientation, UnreadableFile
from medseg.io import nifti

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# What is read


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [Nifti1Header, Nifti2Header])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_every_version_byte_order_and_type_is_read(
    tmp_path: Path, name: str, kind: Any, order: str, dtype: str
) -> None:
    volume = nifti.read(make_nifti(tmp_path / name, VOXELS.astype(dtype), kind, order))
    assert volume.array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(volume.array[0], VOXELS)
    assert volume.array.flags.writeable
    np.testing.assert_array_equal(volume.grid.affine, AFFINE)


def test_a_pair_of_header_and_image_is_read_by_either_name(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Pair(VOXELS, AFFINE), tmp_path / "a.hdr")
    for name in ("a.hdr", "a.img"):
        volume = nifti.read(tmp_path / name)
        np.testing.assert_array_equal(volume.array[0], VOXELS)
        np.testing.assert_array_equal(volume.grid.affine, AFFINE)


@pytest.mark.parametrize(
    ("stored", "slope", "intercept", "dtype", "expected"),
    [
        ("i2", 0, 5, "i2", [0, 1, 2]),
        ("i2", np.nan, np.nan, "i2", [0, 1, 2]),
        ("i2", 1, 0, "i2", [0, 1, 2]),
        ("u2", 1, -1024, "f4", [-1024, -1023, -1022]),
        ("u1", 0.5, 3, "f4", [3, 3.5, 4]),
        ("f4", -2, 0, "f4", [0, -2, -4]),
        ("i4", 2, 0, "f8", [0, 2, 4]),
        ("f8", 2, 0, "f8", [0, 2, 4]),
    ],
)
def test_scaling(
    tmp_path: Path, stored: str, slope: float, intercept: float, dtype: str, expected: list[float]
) -> None:
    path = make_nifti(tmp_path / "a.nii", VOXELS.astype(stored), scl_slope=slope, scl_inter=intercept)
    array = nifti.read(path).array
    assert array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(array[0, 0, 0, :3], expected)


def test_nan_and_infinity_stay(tmp_path: Path) -> None:
    voxels = np.full(SHAPE, 2.5, np.float32)
    voxels[0, 0, :3] = np.nan, np.inf, -np.inf
    np.testing.assert_array_equal(nifti.read(make_nifti(tmp_path / "a.nii", voxels)).array[0], voxels)


@pytest.mark.parametrize("dims", [(4, 5, 6, 1), (4, 5, 6, 1, 1), (4, 30, 1)])
def test_other_axes_of_length_one_are_dropped(tmp_path: Path, dims: tuple[int, ...]) -> None:
    volume = nifti.read(make_nifti(tmp_path / "a.nii", **set_dims(*dims)))
    assert volume.grid.shape == dims[:3]
    np.testing.assert_array_equal(volume.array.ravel(order="F"), VOXELS.ravel(order="F"))


@pytest.mark.parametrize(
    ("units", "scale"), [(0, 1), (1, 1000), (2, 1), (3, 0.001), (2 + 8, 1), (3 + 16, 0.001), (7, 1)]
)
@pytest.mark.parametrize("fields", [{}, {"sform_code": 0}])
def test_the_grid_is_in_mm_and_itk_agrees(tmp_path: Path, units: int, scale: float, fields: dict[str, Any]) -> None:
    path = make_nifti(tmp_path / "a.nii", xyzt_units=units, **fields)
    grid = nifti.read(path).grid
    np.testing.assert_allclose(grid.affine[:3], AFFINE[:3] * scale, rtol=1e-6, atol=1e-6 * scale)
    np.testing.assert_allclose(grid_corners(grid), itk_corners(path), rtol=1e-6, atol=1e-6 * scale)


@few
@given(axis=st.tuples(*[st.floats(-1, 1)] * 3), angle=st.floats(-3.2, 3.2), mirrored=st.booleans())
@example(axis=(0.3, 0.5, 0.8), angle=np.pi - 9e-4, mirrored=False)
def test_a_qform_is_read_as_itk_reads_it(tmp_path: Path, axis: tuple[float, ...], angle: float, mirrored: bool) -> None:
    half_turn = np.sin(angle / 2) * np.array(axis) / (np.linalg.norm(axis) or 1)
    quaternion = {f"quatern_{letter}": value for letter, value in zip("bcd", half_turn, strict=True)}
    path = make_nifti(tmp_path / "a.nii", sform_code=0, **quaternion)
    content = bytearray(path.read_bytes())
    content[76:80] = struct.pack("<f", -1 if mirrored else 1)
    path.write_bytes(content)
    np.testing.assert_allclose(grid_corners(nifti.read(path).grid), itk_corners(path), atol=1e-4)


@pytest.mark.parametrize(("qfac", "sign"), [(-1, -1), (1, 1), (0, 1), (np.nan, 1)])
def test_qfac(tmp_path: Path, qfac: float, sign: int) -> None:
    path = make_nifti(tmp_path / "a.nii", sform_code=0, pixdim=[qfac, 1.5, 2, 3, 1, 1, 1, 1])
    np.testing.assert_allclose(nifti.read(path).grid.affine, AFFINE * [1, 1, sign, 1], atol=1e-6)


def test_both_codes_0_need_an_assumed_orientation(tmp_path: Path) -> None:
    path = make_nifti(tmp_path / "a.nii", sform_code=0, qform_code=0)
    with pytest.raises(UnknownOrientation, match="does not say where its voxels lie") as caught:
        nifti.read(path)
    assert caught.value.path == path
    grid = nifti.read(path, assume_orientation="LPS").grid
    # The steps are pixdim, 1.5 2 3 mm, and the middle of 4 x 5 x 6 voxels is the index 1.5 2 2.5.
    np.testing.assert_array_equal(grid.affine, [[-1.5, 0, 0, 2.25], [0, -2, 0, 4], [0, 0, 3, -7.5], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("codes", "frame"),
    [((1, 0), "1"), ((1, 2), "2"), ((0, 3), "3"), ((4, 0), "4"), ((0, 5), None), ((1, 5), None), ((0, 0), None)],
)
def test_the_frame_of_reference_is_the_code_in_use(tmp_path: Path, codes: tuple[int, int], frame: str | None) -> None:
    path = make_nifti(tmp_path / "a.nii", qform_code=codes[0], sform_code=codes[1])
    assert nifti.frame_of_reference(path) == (f"NIfTI code {frame}" if frame else None)


# Where programs disagree


def test_a_sheared_sform_is_used_with_a_warning(tmp_path: Path) -> None:
    path = make_nifti(tmp_path / "a.nii", **sform(SHEARED))
    # The shear moves the last of six slices by 5 x 0.3 x 2 mm against the qform.
    with pytest.warns(UserWarning, match="sheared.*ITK programs will read the qform, which places voxels up to 3 mm"):
        grid = nifti.read(path).grid
    np.testing.assert_allclose(grid.affine, SHEARED, atol=1e-6)
    with pytest.warns(UserWarning, match="sheared and it has no qform: ITK programs cannot open it"):
        nifti.read(make_nifti(path, **sform(SHEARED), qform_code=0))


@pytest.mark.parametrize("code", [1, 2, 4])
def test_of_a_disagreeing_pair_the_sform_is_used_with_a_warning(tmp_path: Path, code: int) -> None:
    moved = AFFINE.copy()
    moved[:3, 3] += (3, 0, 4)
    path = make_nifti(tmp_path / "a.nii", **sform(moved, code))
    with pytest.warns(UserWarning, match="sform of this file and its qform place voxels up to 5 mm apart"):
        grid = nifti.read(path).grid
    np.testing.assert_allclose(grid.affine, moved, atol=1e-6)


@pytest.mark.parametrize("spacing", [(1.5, 2, 3.01), (1.5, -2, 3), (1.5, 2, 0), (1.5, np.nan, 3)])
@pytest.mark.parametrize("code", [0, 1])
def test_a_spacing_that_the_sform_denies_is_warned_of(tmp_path: Path, spacing: tuple[float, ...], code: int) -> None:
    path = make_nifti(tmp_path / "a.nii", qform_code=code, pixdim=[1, *spacing, 1, 1, 1, 1])
    with pytest.warns(UserWarning, match="sform of this file and its (qform|spacing) place voxels .* apart"):
        grid = nifti.read(path).grid
    np.testing.assert_array_equal(grid.affine, AFFINE)


@few
@given(turn=st.tuples(*[st.floats(-180, 180)] * 3), short_of_half=st.floats(1e-4, 1e-1))
@example(turn=(10, 20, 30), short_of_half=0.04)
def test_rounding_of_the_qform_is_no_disagreement(
    tmp_path: Path, turn: tuple[float, float, float], short_of_half: float
) -> None:
    # About an axis in any direction, by almost half a turn: there a quaternion of float32 is worst.
    axis = rotation(turn)
    affine = np.eye(4)
    affine[:3, :3] = axis @ rotation((180 - short_of_half, 0, 0)) @ axis.T @ np.diag([0.5, 0.5, 5])
    header = Nifti1Header()
    header.set_qform(affine, 1)
    fields = {name: header[name] for name in ("quatern_b", "quatern_c", "quatern_d", "pixdim")}
    nifti.read(make_nifti(tmp_path / "a.nii", **sform(affine), **fields, qoffset_x=0, qoffset_y=0, qoffset_z=0))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_fourth_axis_holds_channels_where_as_many_are_expected(tmp_path: Path, name: str) -> None:
    voxels = np.random.default_rng(0).integers(-500, 500, (4, 5, 6, 3)).astype(np.int16)
    path = make_nifti(tmp_path / name, voxels, scl_slope=2, scl_inter=1)
    volume = nifti.read(path, channels=3)
    np.testing.assert_array_equal(volume.array, 2.0 * voxels.transpose(3, 0, 1, 2) + 1)
    assert volume.grid.affine.tolist() == AFFINE.tolist()
    assert nifti.read_grid(path).matches(volume.grid)
    labels = volume.with_array((volume.array[:1] > 0).astype(np.uint8))
    nifti.write(labels, tmp_path / f"labels_{name}", geometry_of=path)
    assert nifti.read(tmp_path / f"labels_{name}", channels=3).array.shape == (1, 4, 5, 6)
    for channels, text in (
        (1, "with one value in each voxel"),
        (2, "one value, or 2 along a fourth axis, in each voxel"),
    ):
        with pytest.raises(NotAVolume, match=text):
            nifti.read(path, channels=channels)
    with pytest.raises(NotAVolume):
        nifti.read(make_nifti(tmp_path / f"vectors_{name}", voxels[..., None, :]), channels=3)


# What is refused


@pytest.mark.parametrize(
    ("fields", "error", "reason", "text"),
    [
        (set_dims(4, 5, 1, 6), NotAVolume, "several_frames", "here are 6, over time or as vectors"),
        (set_dims(4, 5, 2, 1, 3), NotAVolume, "vectors", "here are 3, over time or as vectors"),
        (set_dims(4, 30), NotAVolume, "flat", "holds a flat one"),
        (set_dims(120), NotAVolume, "one_row", "one row of numbers"),
        ({"datatype": 32}, NotAVolume, "complex", "of type complex"),
        ({"datatype": 128}, NotAVolume, "rgb", "of type rgb"),
        ({"datatype": 2304}, NotAVolume, "rgb", "of type rgb"),
        ({"datatype": 1536}, NotAVolume, "float128", "of type float128"),
        ({"datatype": 1}, NotAVolume, "bit", "of type bit"),
        ({"datatype": 5}, UnreadableFile, "unreadable", "names no known voxel type"),
        ({"dim": [8, 4, 5, 6, 1, 1, 1, 1]}, UnreadableFile, "unreadable", "no sensible number of voxels"),
        (set_dims(4, 0, 6), UnreadableFile, "unreadable", "no sensible number of voxels"),
        (set_dims(4, 5, 7), UnreadableFile, "unreadable", "shorter than its header says"),
        ({"vox_offset": 0}, UnreadableFile, "unreadable", "shorter than its header says"),
        ({"vox_offset": np.nan}, UnreadableFile, "unreadable", "shorter than its header says"),
        ({"scl_slope": 2, "scl_inter": np.nan}, UnreadableFile, "unreadable", "scales values by an offset"),
        ({"srow_x": [0, 0, 0, 0]}, UnknownOrientation, "bad_affine", "not finite and invertible"),
        ({"srow_x": [np.nan, 0, 0, 0]}, UnknownOrientation, "bad_affine", "not finite and invertible"),
        ({"sform_code": 0, "quatern_b": 2}, UnknownOrientation, "bad_affine", "not finite and invertible"),
        ({"sform_code": 0, "quatern_b": np.nan}, UnknownOrientation, "bad_affine", "not finite and invertible"),
        ({"sform_code": 0, "pixdim": [1, 1, 0, *[1] * 5]}, UnknownOrientation, "bad_spacing", "no positive spacing"),
        ({"sform_code": 0, "pixdim": [1, 1, np.nan, *[1] * 5]}, UnknownOrientation, "bad_spacing", "positive spacing"),
        ({"magic": b""}, UnknownOrientation, "analyze", "Analyze 7.5"),
    ],
)
def test_what_cannot_be_read_right_is_refused(
    tmp_path: Path, fields: dict[str, Any], error: type[MedsegError], reason: str, text: str
) -> None:
    path = make_nifti(tmp_path / "a.nii", **fields)
    with pytest.raises(error, match=text) as caught:
        nifti.read(path, assume_orientation="RAS")
    assert (caught.value.reason, caught.value.path) == (reason, path)


@pytest.mark.parametrize("lost", [1, 4, 8, 9, 60])
def test_a_cut_gzip_is_refused_even_where_only_its_checksum_is_lost(tmp_path: Path, lost: int) -> None:
    path = make_nifti(tmp_path / "a.nii.gz")
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(UnreadableFile, match="cut short, damaged"):
        nifti.read(path)


def test_a_whole_gzip_with_too_few_voxels_is_refused_and_with_more_bytes_is_not(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="cut short, damaged"):
        nifti.read(make_nifti(tmp_path / "a.nii.gz", **set_dims(4, 5, 7)))
    assert nifti.read(make_nifti(tmp_path / "a.nii.gz", **set_dims(4, 5, 5))).grid.shape == (4, 5, 5)


def test_a_changed_byte_in_a_gzip_is_refused(tmp_path: Path) -> None:
    path = make_nifti(tmp_path / "a.nii.gz")
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    with pytest.raises(UnreadableFile, match="cut short, damaged"):
        nifti.read(path)


def test_a_gzip_too_small_for_its_header_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = make_nifti(tmp_path / "a.nii.gz", **set_dims(3000, 3000, 30))
    with pytest.raises(UnreadableFile, match="shorter than its header says"):
        nifti.read(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html><html></html>", gzip.compress(b"<html>" * 100, mtime=0), b"\0" * 400]
)
def test_another_kind_of_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableFile, match=r"NIfTI header was expected|not what its name says"):
        nifti.read(tmp_path / name)


@pytest.mark.parametrize("kind", [Nifti1Header, Nifti2Header])
@settings(few, max_examples=200)
@given(changes=st.dictionaries(st.integers(0, 539), st.integers(0, 255), max_size=16), cut=st.integers(0, 600))
def test_no_header_brings_anything_but_errors_of_medseg(
    tmp_path: Path, capfd: Any, caplog: Any, kind: Any, changes: dict[int, int], cut: int
) -> None:
    path = make_nifti(tmp_path / "a.nii", kind=kind)
    content = bytearray(path.read_bytes())
    for place, value in changes.items():
        content[place] = value
    path.write_bytes(content[: len(content) - max(0, cut - 300)])
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("ignore", UserWarning)
        try:
            nifti.read(path)
        except MedsegError as error:
            assert error.path == path
            assert str(tmp_path) not in str(error)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
