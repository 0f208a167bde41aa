"""Outputs that are whole or not there, errors that know their path, and grids of files that state half of one."""

from __future__ import annotations

import gzip
import resource
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from medseg.errors import GeometryError, NotAVolume, OutputError, UnknownOrientation, UnreadableFile, UsageError
from medseg.io.files import assumed_grid, check_place, placed_grid, reading, written_whole


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Let files grow to `limit` bytes only: what a full disk looks like to a program."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_appears_under_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / f"{'long' * 50}.of.john.doe.NII.gz"
    with written_whole(path) as beside:
        beside.write_bytes(b"whole")
        assert not path.exists()
        assert beside.parent == tmp_path
        assert beside.name.endswith(".nii.gz")
        assert "doe" not in beside.name
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_keeps_the_older_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "labels.nii"
    path.write_bytes(b"older")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as beside:
        beside.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_output_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "labels.nii"
    full = pytest.raises(OutputError, match="could not be written: File too large")
    with full, file_size_limit(1000), written_whole(path) as beside:
        beside.write_bytes(bytes(5000))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "cause"),
    [("missing/labels.nii", "No such file or directory"), ("file/labels.nii", "Not a directory")],
)
def test_a_folder_that_is_none_is_an_output_error(tmp_path: Path, name: str, cause: str) -> None:
    (tmp_path / "file").touch()
    expected = pytest.raises(OutputError, match=f"could not be written: {cause}")
    with expected as caught, written_whole(tmp_path / name) as beside:
        beside.write_bytes(b"anything")
    assert caught.value.path == tmp_path / name
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("missing/labels.nii", "its folder does not exist"),
        ("file/labels.nii", "its folder does not exist"),
        ("folder", "a folder has that name"),
        (f"{'a' * 300}.nii", "File name too long"),
    ],
)
def test_a_place_is_checked_before_the_work(tmp_path: Path, name: str, cause: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=f"cannot be written: {cause}") as caught:
        check_place(tmp_path / name)
    assert caught.value.path == tmp_path / name
    check_place(tmp_path / "file", [tmp_path / "folder", tmp_path / "missing"])
    with pytest.raises(UsageError, match="would replace an input"):
        check_place(tmp_path / "file", [tmp_path / "folder" / ".." / "file"])


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "out.nii").mkdir()
    with pytest.raises(OutputError, match="Is a directory"), written_whole(tmp_path / "out.nii") as beside:
        beside.write_bytes(b"anything")
    assert [one.name for one in tmp_path.iterdir()] == ["out.nii"]


def test_errors_of_medseg_get_the_path_that_they_lack() -> None:
    with pytest.raises(NotAVolume) as caught, reading("scan.nii"):
        raise NotAVolume("text")
    assert caught.value.path == Path("scan.nii")
    with pytest.raises(NotAVolume) as caught, reading("folder"):
        raise NotAVolume("text", path="folder/slice")
    assert caught.value.path == Path("folder/slice")


@pytest.mark.parametrize(
    ("error", "reason", "text"),
    [
        (FileNotFoundError(2, "No such file", "/secret"), "missing", "no such file or folder"),
        (PermissionError(13, "Permission denied", "/secret"), "unreadable", "could not be read: Permission denied"),
        (gzip.BadGzipFile("Not a gzipped file (b'/secret')"), "unreadable", "cut short, damaged, or not what its name"),
        (EOFError("/secret"), "unreadable", "cut short, damaged, or not what its name"),
        (zlib.error("/secret"), "unreadable", "cut short, damaged, or not what its name"),
    ],
)
def test_errors_of_the_system_become_unreadable_file(error: Exception, reason: str, text: str) -> None:
    with pytest.raises(UnreadableFile, match=text) as caught, reading("/secret/scan.nii"):
        raise error
    assert caught.value.reason == reason
    assert caught.value.path == Path("/secret/scan.nii")
    assert "secret" not in str(caught.value)


def test_a_part_that_is_missing_is_told_from_a_path_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="A file that belongs to this one") as caught, reading(tmp_path):
        (tmp_path / "voxels.raw").read_bytes()
    assert caught.value.reason == "missing"
    (tmp_path / "scan.nhdr").touch()
    (tmp_path / "link.nhdr").symlink_to(tmp_path / "scan.nhdr")
    with pytest.raises(UnreadableFile, match="A file that belongs to this one"), reading(tmp_path / "link.nhdr"):
        (tmp_path / "voxels.raw").read_bytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, 1e200])
def test_an_affine_that_is_no_place_is_refused(bad: float) -> None:
    affine = np.eye(4)
    affine[0, :3] = bad
    with pytest.raises(UnknownOrientation, match="not finite and invertible") as caught, reading("scan.nii"):
        placed_grid((2, 3, 4), affine)
    assert caught.value.reason == "bad_affine"


def test_an_assumed_orientation_places_the_axes_and_the_centre() -> None:
    grid = assumed_grid((3, 4, 5), (1.0, 2.0, 3.0), "pir")
    assert grid.orientation == "PIR"
    # i runs to the back in steps of 1 mm, j to the feet in steps of 2, k to the right in steps of 3.
    expected = [[0, 0, 3, -6], [-1, 0, 0, 1], [0, -2, 0, 3], [0, 0, 0, 1]]
    np.testing.assert_array_equal(grid.affine, expected)
    np.testing.assert_array_equal(grid.to_world([1, 1.5, 2]), [0, 0, 0])


def test_no_orientation_is_assumed_unasked() -> None:
    with pytest.raises(UnknownOrientation, match="does not say where its voxels lie") as caught:
        assumed_grid((3, 4, 5), (1, 1, 1), None)
    assert caught.value.reason == "unknown_orientation"


@pytest.mark.parametrize("spacing", [(1, 0, 1), (1, -1, 1), (1, np.nan, 1), (np.inf, 1, 1)])
def test_an_orientation_does_not_replace_a_spacing(spacing: tuple[float, ...]) -> None:
    with pytest.raises(UnknownOrientation, match="no positive spacing") as caught:
        assumed_grid((3, 4, 5), spacing, "RAS")
    assert caught.value.reason == "bad_spacing"


@pytest.mark.parametrize("word", ["", "RA", "RASA", "XYZ", "RRS", "RLS"])
def test_an_orientation_names_three_directions(word: str) -> None:
    with pytest.raises(UsageError, match="one letter of each pair") as caught:
        assumed_grid((3, 4, 5), (1, 1, 1), word)
    assert not isinstance(caught.value, GeometryError)
