"""Which files a path stands for: through links, without those that may not be looked at, by a DICOMDIR."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from dicom_files import write_series
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MediaStorageDirectoryStorage
from studies import write_study

from medseg.errors import UnreadableFile
from medseg.io import load
from medseg.io.listing import slice_files
from medseg.study.cohort import find_cohort
from medseg.study.find import find_studies
from medseg.study.listing import listed


def names(folder: Path) -> list[str]:
    failed: list[OSError] = []
    found = slice_files(folder, failed.append)
    assert not failed
    return [file.relative_to(folder).as_posix() for file in found]


class TestLinks:
    def test_folders_behind_links_are_looked_into_once(self, tmp_path):
        root, far = tmp_path / "root", tmp_path / "far"
        (root / "a").mkdir(parents=True)
        (far / "inner").mkdir(parents=True)
        for file in (root / "a" / "1", far / "2", far / "inner" / "3"):
            file.touch()
        (root / "b").symlink_to(far)
        assert names(root) == ["a/1", "b/2", "b/inner/3"]
        (root / "0").symlink_to(root / "a")  # in the order of names it comes before what it leads to
        (root / "c").symlink_to(far / "inner")
        (root / "d").symlink_to(far)
        assert names(root) == ["a/1", "b/2", "b/inner/3"]

    def test_circles_end(self, tmp_path):
        root, far = tmp_path / "root", tmp_path / "far"
        (root / "a").mkdir(parents=True)
        far.mkdir()
        for file in (tmp_path / "beside", root / "a" / "1", far / "2"):
            file.touch()
        for link, to in (("self", "."), ("up", ".."), ("a/round", "../a"), ("a/far", far), ("a/above", tmp_path)):
            (root / link).symlink_to(to)
        (far / "back").symlink_to(root)
        (far / "above").symlink_to(tmp_path)
        assert names(root) == ["a/1", "a/far/2"]

    def test_the_folder_itself_may_be_a_link(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "1").touch()
        (tmp_path / "link").symlink_to("real")
        assert names(tmp_path / "link") == ["1"]

    def test_a_link_that_leads_in_a_circle_is_a_file_that_is_missing(self, tmp_path):
        (tmp_path / "x").symlink_to("y")
        (tmp_path / "y").symlink_to("x")
        assert names(tmp_path) == ["x", "y"]

    def test_a_cohort_and_a_series_of_links_are_whole(self, tmp_path):
        write_study(tmp_path / "far", 1)
        write_study(tmp_path / "studies", 0)
        (tmp_path / "studies" / "b").symlink_to(tmp_path / "far" / "DOE_JANE_1")
        (tmp_path / "studies" / "again").symlink_to("DOE_JANE_0")
        assert [(entry.uid, len(entry.files)) for entry in find_cohort(tmp_path / "studies")] == [
            ("1.2.3.0", 8),
            ("1.2.3.1", 8),
        ]
        first, rest = tmp_path / "scan" / "first", tmp_path / "rest"
        write_series(first, range(8))
        rest.mkdir()
        for file in sorted(first.iterdir())[4:]:
            file.rename(rest / file.name)
        (tmp_path / "scan" / "rest").symlink_to(rest)
        assert load(tmp_path / "scan").grid.shape[2] == 8


class TestWhatMayNotBeLookedAt:
    def test_it_is_told_once_for_each_folder(self, tmp_path, monkeypatch):
        """A disk that is stale lists its folders from memory, and knows nothing of what is in them."""
        write_study(tmp_path, 0)
        write_study(tmp_path, 1)
        real = Path.stat

        def stat(path: Path, **more: bool) -> os.stat_result:
            if path.parent.name == "DOE_JANE_1":
                raise OSError(116, "Stale file handle", str(path))
            return real(path, **more)

        monkeypatch.setattr(Path, "stat", stat)
        problems: list = []
        assert len(listed(tmp_path, problems)) == 8
        assert [(problem.reason, problem.path.parent) for problem in problems] == [
            ("unreadable", tmp_path / "DOE_JANE_1")
        ]
        assert "Stale file handle" in str(problems[0])
        found = find_cohort(tmp_path)
        assert [entry.uid for entry in found] == ["1.2.3.0", ""]
        with pytest.raises(UnreadableFile, match="Stale file handle"):
            load(tmp_path)

    def test_a_path_that_is_too_long(self, tmp_path):
        """Folders can be made step by step so deep that no path leads to what is in them."""
        write_study(tmp_path, 0)
        home = Path.cwd()
        try:
            os.chdir(tmp_path)
            for _ in range(20):
                Path("x" * 250).mkdir()
                os.chdir("x" * 250)
            Path("1.dcm").touch()
        finally:
            os.chdir(home)
        try:
            found = find_cohort(tmp_path)
        finally:
            shutil.rmtree(tmp_path / ("x" * 250))  # others who look through this folder stumble, too
        assert [entry.uid for entry in found] == ["1.2.3.0", ""]

    def test_a_folder_that_cannot_be_listed_to_its_end(self, tmp_path, monkeypatch):
        write_study(tmp_path, 0)
        write_study(tmp_path, 1)
        real = os.scandir

        class Cut:
            def __init__(self, path):
                self.entries = real(path)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.entries.close()

            def __iter__(self):
                yield next(self.entries)
                raise OSError(5, "Input/output error")

        monkeypatch.setattr("os.scandir", lambda path: Cut(path) if str(path).endswith("1") else real(path))
        found = find_cohort(tmp_path)
        assert [entry.files for entry in found if not entry.uid] == [(tmp_path / "DOE_JANE_1",)]


@pytest.fixture
def disc(tmp_path: Path) -> Path:
    """Return a folder with a DICOMDIR and four slices in two folders below it."""
    write_series(tmp_path / "slices", range(4), StudyInstanceUID="1.2.3")
    records = []
    for number, file in enumerate(sorted((tmp_path / "slices").iterdir())):
        parts = ["DICOM", f"SE{number % 2}", f"IM{number}"]
        target = (tmp_path / "disc").joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
        records.append(Dataset())
        records[-1].DirectoryRecordType, records[-1].ReferencedFileID = "IMAGE", parts
    directory = Dataset()
    directory.file_meta = FileMetaDataset()
    directory.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    directory.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    directory.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    directory.DirectoryRecordSequence = records
    directory.save_as(tmp_path / "disc" / "DICOMDIR", enforce_file_format=True)
    return tmp_path / "disc"


def renamed(disc: Path, rename) -> Path:
    for path in sorted(disc.rglob("*"), reverse=True):
        if path.name != "DICOMDIR":
            path.rename(path.with_name(rename(path)))
    return disc / "DICOMDIR"


class TestDicomdir:
    @pytest.mark.parametrize(
        "rename",
        [
            lambda path: path.name.lower(),
            lambda path: path.name if path.is_dir() else f"{path.name}.dcm",
            lambda path: path.name if path.is_dir() else f"{path.name}.DCM",
            lambda path: path.name.lower() if path.is_dir() else f"{path.name.lower()}.dcm",
            lambda path: path.name if path.is_dir() else f"{path.name};1",
            lambda path: path.name if path.is_dir() else f"{path.name}.;1",
        ],
        ids=["lower_case", "ending", "upper_ending", "lower_case_and_ending", "version", "dot_and_version"],
    )
    def test_files_are_found_under_the_names_that_copies_give_them(self, disc, rename):
        found = find_studies(renamed(disc, rename))
        assert [(len(study.files), study.problems) for study in found] == [(4, ())]

    def test_what_is_missing_is_one_problem_and_names_a_way_out(self, disc):
        files = [file for file in disc.rglob("*") if file.is_file() and file.name != "DICOMDIR"]
        files[0].unlink()
        [study] = find_studies(disc / "DICOMDIR")
        assert [problem.reason for problem in study.problems] == ["missing"]
        for file in files[1:]:
            file.unlink()
        [nothing] = find_studies(disc / "DICOMDIR")
        assert [problem.reason for problem in nothing.problems] == ["missing"]
        assert "4 of 4 files" in str(nothing.problems[0])
        assert "folder that the DICOMDIR lies in" in str(nothing.problems[0])

    def test_two_files_that_fit_as_well_are_not_chosen_from(self, disc):
        files = sorted(file for file in disc.rglob("*") if file.is_file() and file.name != "DICOMDIR")
        shutil.copy(files[0], files[0].with_name(f"{files[0].name}.dcm"))
        files[0].rename(files[0].with_name(f"{files[0].name}.DCM"))
        assert [problem.reason for study in find_studies(disc / "DICOMDIR") for problem in study.problems] == [
            "missing"
        ]

    @pytest.mark.parametrize("name", ["../OUTSIDE", "/etc/passwd", "..\\OUTSIDE", ".\\OUTSIDE"])
    def test_names_outside_of_the_folder_are_refused(self, disc, name):
        (disc.parent / "OUTSIDE").write_bytes(b"x")
        data = dcmread(disc / "DICOMDIR")
        record = next(record for record in data.DirectoryRecordSequence if "ReferencedFileID" in record)
        record["ReferencedFileID"]._value = name.split("\\")
        data.save_as(disc / "DICOMDIR", enforce_file_format=True)
        problems = [problem for study in find_studies(disc / "DICOMDIR") for problem in study.problems]
        assert [str(problem) for problem in problems] == ["The DICOMDIR names a file outside its folder."]

    def test_slashes_in_names_are_folders(self, disc):
        data = dcmread(disc / "DICOMDIR")
        for record in data.DirectoryRecordSequence:
            if "ReferencedFileID" in record:
                record["ReferencedFileID"]._value = "/".join(record.ReferencedFileID)
        data.save_as(disc / "DICOMDIR", enforce_file_format=True)
        assert [(len(study.files), study.problems) for study in find_studies(disc / "DICOMDIR")] == [(4, ())]

    @pytest.mark.parametrize("damage", ["nested", "cut"])
    def test_a_damaged_one_is_said_to_be(self, disc, damage):
        path = disc / "DICOMDIR"
        whole = path.read_bytes()
        head = whole[: whole.index(b"\x04\x00\x20\x12")]
        nested = b"\x04\0\x20\x12SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff" * 3000
        path.write_bytes(head + nested if damage == "nested" else whole[: len(whole) - 40])
        with pytest.raises(UnreadableFile, match="The DICOMDIR is damaged"):
            find_studies(path)
        assert len(find_studies(disc)[0].files) == 4
