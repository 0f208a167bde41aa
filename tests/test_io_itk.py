"""NRRD and MetaImage files: the place of the voxels by hand and by SimpleITK, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from conftest import make_grid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nifti_files import grid_corners, itk_corners
from test_io_files import file_size_limit

from medseg.errors import MedsegError, NotAVolume, OutputError, UnknownOrientation, UnreadableFile
from medseg.io import itk, save
from medseg.volume import Grid, Volume

# i runs fastest in these files, and grows by 1 from voxel to voxel.
VOXELS = np.arange(60, dtype=np.int16).reshape((5, 4, 3), order="F")
RAW = VOXELS.tobytes(order="F")
PLACED = np.array([[-1.0, 0, 0, -10], [0, -2, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]])

NRRD: dict[str, str | None] = {
    "type": "short",
    "dimension": "3",
    "sizes": "5 4 3",
    "encoding": "raw",
    "endian": "little",
    "space dimension": None,
    "space": "left-posterior-superior",
    "space directions": "(1,0,0) (0,2,0) (0,0,3)",
    "space origin": "(10,20,30)",
}
META = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "10 20 30",
    "ElementSpacing": "1 2 3",
    "DimSize": "5 4 3",
    "ElementType": "MET_SHORT",
}


def without(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def make_nrrd(path: Path, fields: dict[str, str | None] | None = None, data: bytes = RAW) -> Path:
    """Write an NRRD file of VOXELS at PLACED, with `fields` changed or, where None, left out."""
    lines = [f"{name}: {value}" for name, value in (NRRD | (fields or {})).items() if value is not None]
    path.write_bytes("\n".join(["NRRD0004", "# made by hand", *lines, "", ""]).encode() + data)
    return path


def make_meta(path: Path, fields: dict[str, str | None] | None = None, data: bytes = RAW) -> Path:
    """Write a MetaImage file of VOXELS at PLACED, with `fields` changed or, where None, left out."""
    lines = [f"{name} = {value}" for name, value in (META | (fields or {})).items() if value is not None]
    if "ElementDataFile" not in (fields or {}):
        lines.append("ElementDataFile = LOCAL")
    path.write_bytes("\n".join([*lines, ""]).encode() + data)
    return path


def test_nrrd_spaces_lead_to_ras(tmp_path: Path) -> None:
    signs = {"left-posterior-superior": (-1, -1, 1), "RAS": (1, 1, 1), "left-anterior-superior": (-1, 1, 1)}
    for space, sign in signs.items():
        volume = itk.read(make_nrrd(tmp_path / "a.nrrd", {"space": space}))
        np.testing.assert_array_equal(volume.grid.affine, np.diag([*sign, 1]) @ np.abs(PLACED))
        np.testing.assert_array_equal(volume.array[0], VOXELS)
        assert volume.array.dtype == np.int16


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_nrrd_encodings_and_detached_headers(tmp_path: Path, encoding: str) -> None:
    data = RAW if encoding == "raw" else gzip.compress(RAW)
    np.testing.assert_array_equal(
        itk.read(make_nrrd(tmp_path / "a.nrrd", {"encoding": encoding}, data)).array[0], VOXELS
    )
    (tmp_path / "a.raw").write_bytes(data)
    path = make_nrrd(tmp_path / "a.nhdr", {"encoding": encoding, "data file": "a.raw"}, b"")
    np.testing.assert_array_equal(itk.read(path).array[0], VOXELS)


@pytest.mark.parametrize("packed", [False, True])
def test_metaimages(tmp_path: Path, packed: bool) -> None:
    data, flag = (zlib.compress(RAW), "True") if packed else (RAW, "False")
    volume = itk.read(
        make_meta(tmp_path / "a.mha", {"CompressedData": flag, "CompressedDataSize": str(len(data))}, data)
    )
    np.testing.assert_array_equal(volume.array[0], VOXELS)
    np.testing.assert_array_equal(volume.grid.affine, PLACED)
    (tmp_path / "a.zraw").write_bytes(data)
    path = make_meta(tmp_path / "a.mhd", {"CompressedData": flag, "ElementDataFile": "a.zraw"}, b"")
    np.testing.assert_array_equal(itk.read(path).array[0], VOXELS)


def test_a_sheared_nrrd_is_read_as_it_is(tmp_path: Path) -> None:
    path = make_nrrd(tmp_path / "a.nrrd", {"space directions": "(1,0,0) (0.5,2,0) (0,0,3)"})
    np.testing.assert_allclose(itk.read(path).grid.affine[:3, 1], (-0.5, -2, 0), atol=1e-12)


@pytest.mark.parametrize(
    ("make", "name", "lacking"),
    [
        (make_nrrd, "a.nrrd", {"space": None, "space directions": None, "space origin": None, "spacings": "1 2 3"}),
        (make_nrrd, "a.nrrd", {"space": None, "space dimension": "3"}),
        (make_nrrd, "a.nrrd", {"space": "scanner-xyz"}),
        (make_nrrd, "a.nrrd", {"space origin": None}),
        (make_meta, "a.mha", {"TransformMatrix": None}),
        (make_meta, "a.mha", {"Offset": None}),
    ],
)
def test_without_a_full_place_an_orientation_must_be_assumed(tmp_path: Path, make, name: str, lacking: dict) -> None:
    path = make(tmp_path / name, lacking)
    with pytest.raises(UnknownOrientation, match="does not say where its voxels lie") as caught:
        itk.read(path)
    assert (caught.value.reason, caught.value.path) == ("unknown_orientation", path)
    grid = itk.read(path, assume_orientation="LAS").grid
    np.testing.assert_array_equal(grid.affine, [[-1, 0, 0, 2], [0, 2, 0, -3], [0, 0, 3, -3], [0, 0, 0, 1]])


NO_SPACE = without("space", "space directions", "space origin")


@pytest.mark.parametrize(
    ("fields", "error", "reason", "text"),
    [
        (NO_SPACE, UnknownOrientation, "bad_spacing", "no positive spacing"),
        ({"space directions": None}, UnknownOrientation, "bad_spacing", "no positive spacing"),
        ({"space units": '"um" "um" "um"'}, UnknownOrientation, "units", "another unit than mm"),
        ({"space directions": "(1,0,0) (1,0,0) (0,0,3)"}, UnknownOrientation, "bad_affine", "finite and invertible"),
        ({"space directions": "(1,0,0) (0,2,0) none"}, NotAVolume, "not_a_volume", "other axes, or several values"),
        ({"kinds": "domain domain time"}, NotAVolume, "not_a_volume", "other axes, or several values"),
        ({"dimension": "2", "sizes": "5 12"} | NO_SPACE, NotAVolume, "not_a_volume", "other axes, or several values"),
        ({"dimension": "4", "sizes": "5 4 3 1"}, NotAVolume, "not_a_volume", "other axes, or several values"),
        ({"dimension": None}, UnreadableFile, "unreadable", "no number of axes"),
        ({"type": "block"}, UnreadableFile, "unreadable", "header is damaged, or of a kind"),
        ({"sizes": "5 4"}, UnreadableFile, "unreadable", "header is damaged, or of a kind"),
        ({"sizes": "5 4 4"}, UnreadableFile, "unreadable", "voxels could not be read"),
        ({"data file": "missing.raw"}, UnreadableFile, "missing", "does not exist"),
    ],
)
def test_nrrd_files_that_are_refused(
    tmp_path: Path, capfd, fields: dict, error: type[MedsegError], reason: str, text: str
) -> None:
    path = make_nrrd(tmp_path / "a.nrrd", fields)
    with pytest.raises(error, match=text) as caught:
        itk.read(path, assume_orientation="RAS")
    assert (caught.value.reason, caught.value.path) == (reason, path)
    assert str(tmp_path) not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("fields", "error", "reason", "text"),
    [
        (without("ElementSpacing"), UnknownOrientation, "bad_spacing", "no positive spacing"),
        ({"DistanceUnits": "cm"}, UnknownOrientation, "units", "another unit than mm"),
        ({"ElementSpacing": "1 2 0"}, UnknownOrientation, "bad_affine", "finite and invertible"),
        ({"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, UnknownOrientation, "bad_affine", "finite and invertible"),
        ({"NDims": "4", "DimSize": "5 4 3 1"}, NotAVolume, "not_a_volume", "other axes, or several values"),
        ({"ElementNumberOfChannels": "2"}, NotAVolume, "not_a_volume", "other axes, or several values"),
        ({"ElementToIntensityFunctionSlope": "2"}, NotAVolume, "scaling", "which ITK ignores"),
        ({"NDims": None}, UnreadableFile, "unreadable", "no number of axes"),
        ({"ElementDataFile": "LIST"}, UnreadableFile, "layout", "must be binary and in one file"),
        ({"ElementDataFile": "a\0.raw"}, UnreadableFile, "layout", "must be binary and in one file"),
        ({"ElementDataFile": "slice%03d.raw 1 3 1"}, UnreadableFile, "layout", "must be binary and in one file"),
        ({"BinaryData": "False"}, UnreadableFile, "layout", "must be binary and in one file"),
        ({"ElementDataFile": "missing.raw"}, UnreadableFile, "missing", "does not exist"),
        ({"DimSize": "5 4 4"}, UnreadableFile, "unreadable", "cut short, damaged"),
        ({"CompressedData": "True"}, UnreadableFile, "unreadable", "cut short, damaged"),
    ],
)
def test_metaimages_that_are_refused(
    tmp_path: Path, capfd, fields: dict, error: type[MedsegError], reason: str, text: str
) -> None:
    path = make_meta(tmp_path / "a.mha", fields)
    with pytest.raises(error, match=text) as caught:
        itk.read(path, assume_orientation="RAS")
    assert (caught.value.reason, caught.value.path) == (reason, path)
    assert str(tmp_path) not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("stated", "lost"), [("84", 1), ("84", 5), ("84", 30), ("40", 0), ("90", 0), ("84x", 0), (None, 0)]
)
def test_a_compressed_metaimage_that_itk_misreads_is_refused(tmp_path: Path, capfd, stated: str, lost: int) -> None:
    packed = zlib.compress(RAW)
    assert len(packed) == 84
    fields = {"CompressedData": "True", "CompressedDataSize": stated}
    path = make_meta(tmp_path / "a.mha", fields, packed[: len(packed) - lost])
    with pytest.raises(UnreadableFile, match="cut short, damaged"):
        itk.read(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("lost", [10, 60])
def test_a_cut_compressed_nrrd_is_refused(tmp_path: Path, lost: int) -> None:
    path = make_nrrd(tmp_path / "a.nrrd", {"encoding": "gzip"}, gzip.compress(RAW)[:-lost])
    with pytest.raises(UnreadableFile, match="cut short or damaged"):
        itk.read(path)


def test_bzip2_is_refused_since_itk_lacks_it(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="could not be read"):
        itk.read(make_nrrd(tmp_path / "a.nrrd", {"encoding": "bzip2"}, bz2.compress(RAW)))


@pytest.mark.parametrize("name", ["a.nrrd", "a.nhdr", "a.mha", "a.mhd"])
@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>\n<html></html>", bytes(range(256)) * 1000])
def test_another_kind_of_file_is_refused(tmp_path: Path, capfd, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableFile, match=r"NRRD header was expected|no number of axes|line ends"):
        itk.read(tmp_path / name)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("make", [make_nrrd, make_meta])
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.integers(8, 330), st.integers(0, 255), max_size=6))
def test_no_header_brings_anything_but_errors_of_medseg(tmp_path: Path, make, changes: dict[int, int]) -> None:
    path = make(tmp_path / ("a.nrrd" if make is make_nrrd else "a.mha"))
    content = bytearray(path.read_bytes())
    for place, value in changes.items():
        content[place % len(content)] = value
    path.write_bytes(content)
    try:
        itk.read(path)
    except MedsegError as error:
        assert error.path == path
        assert str(tmp_path) not in str(error)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_what_is_written_is_compressed_and_the_same_each_time(tmp_path: Path, name: str) -> None:
    grid = make_grid("oblique", (40, 40, 40))
    volume = Volume(np.ones((1, *grid.shape), np.uint8), grid)
    save(volume, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert len(content) < 2000
    save(volume, tmp_path / name)
    assert (tmp_path / name).read_bytes() == content
    assert np.abs(itk_corners(tmp_path / name) - grid_corners(grid)).max() < 1e-9


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    sheared = np.diag([1.0, 2, 3, 1])
    sheared[0, 1] = 0.1
    volume = Volume(np.zeros((1, 4, 5, 6), np.uint8), Grid((4, 5, 6), sheared))
    with pytest.raises(OutputError, match="cannot hold a sheared grid") as caught:
        save(volume, tmp_path / name)
    assert (caught.value.reason, caught.value.path) == ("sheared", tmp_path / name)
    with pytest.raises(OutputError, match="could not be written: No such file or directory"):
        save(Volume(volume.array, make_grid("RAS", (4, 5, 6))), tmp_path / "missing" / name)
    noise = np.random.default_rng(0).integers(0, 255, (1, 20, 20, 20)).astype(np.uint8)
    with pytest.raises(OutputError, match=r"could not be written\. Check the space left"), file_size_limit(1000):
        save(Volume(noise, make_grid("RAS", (20, 20, 20))), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_itk_reads_the_voxels_in_their_order(tmp_path: Path) -> None:
    save(Volume(VOXELS[None], Grid(VOXELS.shape, PLACED)), tmp_path / "a.mha")
    image = SimpleITK.ReadImage(str(tmp_path / "a.mha"))
    assert image.GetSize() == (5, 4, 3)
    assert image[3, 2, 1] == VOXELS[3, 2, 1]
