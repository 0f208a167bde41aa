"""Voxels beside the header are read; a header that names any other file of the system reads nothing."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

import medseg
from medseg.errors import NotAVolume, UnreadableFile

VOXELS = np.arange(24, dtype="<u2")
META = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\n"
    "ElementSpacing = 1 1 1\nDimSize = 2 3 4\nElementType = MET_USHORT\n"
)
NRRD = (
    "NRRD0004\ntype: ushort\ndimension: 3\nspace: left-posterior-superior\nsizes: 2 3 4\nendian: little\n"
    "space directions: (1,0,0) (0,1,0) (0,0,1)\nkinds: domain domain domain\nspace origin: (0,0,0)\n"
)


def write_meta(folder: Path, line: str) -> Path:
    (folder / "a.mhd").write_bytes((META + line + "\n").encode())
    return folder / "a.mhd"


def write_nrrd(folder: Path, lines: str, encoding: str = "raw") -> Path:
    (folder / "a.nhdr").write_bytes(f"{NRRD}encoding: {encoding}\n{lines}\n".encode())
    return folder / "a.nhdr"


def check(path: Path) -> None:
    assert (medseg.load(path).array[0].ravel(order="F") == VOXELS).all()


def test_voxels_beside_the_header(tmp_path):
    (tmp_path / "x y.raw").write_bytes(VOXELS.tobytes())
    (tmp_path / "x.raw.gz").write_bytes(gzip.compress(VOXELS.tobytes()))
    check(write_meta(tmp_path, "ElementDataFile = x y.raw"))
    check(write_meta(tmp_path, "ElementDataFile = ./x y.raw"))
    check(write_nrrd(tmp_path, "data file: x y.raw"))
    check(write_nrrd(tmp_path, "datafile: ./x.raw.gz", "gzip"))


def test_a_list_of_files_and_numbered_files(tmp_path):
    for number in range(4):
        (tmp_path / f"s{number + 1:02d}.raw").write_bytes(VOXELS[6 * number : 6 * number + 6].tobytes())
    check(write_nrrd(tmp_path, "data file: LIST\ns01.raw\ns02.raw\ns03.raw\ns04.raw"))
    check(write_nrrd(tmp_path, "data file: s%02d.raw 1 4 1"))


@pytest.mark.parametrize("name", ["../secret", "{secret}", "sub/secret", "..\\secret", "sub/../../secret"])
@pytest.mark.parametrize(
    "line",
    ["ElementDataFile = @", "ElementDataFile : @", "ElementDataFile : @\nElementDataFile = x.raw",
     "elementdatafile = @", "elementdatafile = x.raw\nElementDataFile = @", "Comment = a\rElementDataFile = @"],
)  # fmt: skip
def test_a_metaimage_that_names_another_file(tmp_path, name, line):
    path = write_meta(folder_with_secret(tmp_path), line.replace("@", name.format(secret=tmp_path / "secret")))
    with pytest.raises(UnreadableFile, match=r"another folder|another way|line ends|must be binary and in one file"):
        medseg.load(path)


@pytest.mark.parametrize("name", ["../secret", "{secret}", "sub/secret", "sub/../../secret"])
@pytest.mark.parametrize(
    "line",
    ["data file: @", "DataFile: @", "datafile: @", "data file: LIST\nx.raw\n@", "data file: LIST 2\n@",
     "data file: @%02d 1 4 1", "# a\rdata file: @", "data file: x.raw\ndatafile: @"],
)  # fmt: skip
def test_an_nrrd_that_names_another_file(tmp_path, name, line):
    path = write_nrrd(folder_with_secret(tmp_path), line.replace("@", name.format(secret=tmp_path / "secret")))
    with pytest.raises(UnreadableFile, match=r"another folder|line ends|one field twice"):
        medseg.load(path)


def folder_with_secret(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for file in (tmp_path / "secret", folder / "sub" / "secret", folder / "x.raw"):
        file.write_bytes(b"s" * 48)
    return folder


def test_pipes_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "x.raw")
    (tmp_path / "zero.raw").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "a.mha")
    for path in (
        tmp_path / "a.mha",
        *(write_meta(tmp_path, f"ElementDataFile = {name}") for name in ("x.raw",)),
        write_nrrd(tmp_path, "data file: LIST\nzero.raw\nx.raw"),
    ):
        with pytest.raises(UnreadableFile, match="not a regular file"):
            medseg.load(path)


@pytest.mark.parametrize("line", ["data file: s%d%d.raw 1 4 1", "data file: s%d.raw 1 4 0", "data file: s%n.raw 1 4 1"])
def test_numbers_of_files_that_are_not_known(tmp_path, line):
    with pytest.raises(UnreadableFile, match="numbers its data files in a way"):
        medseg.load(write_nrrd(tmp_path, line))


@pytest.mark.parametrize("kind", ["MET_STRING", "MET_LONG_LONG_ARRAY", "MET_NONE"])
def test_elements_that_are_no_numbers(tmp_path, kind):
    path = tmp_path / "a.mha"
    path.write_bytes((META.replace("MET_USHORT", kind) + "ElementDataFile = LOCAL\n").encode() + bytes(48))
    with pytest.raises((NotAVolume, UnreadableFile)):
        medseg.load(path)


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_an_nrrd_that_is_said_to_be_larger_than_its_file_can_hold(tmp_path, encoding):
    (tmp_path / "x.raw").write_bytes(gzip.compress(bytes(100)))
    path = write_nrrd(tmp_path, "data file: x.raw", encoding)
    path.write_bytes(path.read_bytes().replace(b"sizes: 2 3 4", b"sizes: 9999 9999 9999"))
    with pytest.raises(UnreadableFile, match="cut short"):
        medseg.load(path)


def test_a_header_without_end(tmp_path):
    (tmp_path / "a.nrrd").write_bytes(b"NRRD0004\n" + b"a: b\n" * 4_000_000)
    with pytest.raises(UnreadableFile, match="header does not end"):
        medseg.load(tmp_path / "a.nrrd")
