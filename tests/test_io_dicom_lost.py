"""A file that could be a slice and is not understood is missed by every reader; what certainly is none is not."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from dicom_files import write_series

from medseg.errors import MedsegError, UnreadableFile
from medseg.io.dicom_lost import name_kind
from medseg.io.dicom_series import read
from medseg.study.archive import opened
from medseg.study.cohort import find_cohort
from medseg.study.find import find_studies, read_studies
from medseg.study.run import only_study

ZEROS = bytes(5000)
PAGE = b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 5
TEXT = b"This disk holds the images of one examination.\r\n" * 5
PROGRAM = b"\x7fELF" + bytes(range(256)) * 4
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4


def write_numbered(folder: Path, name: str = "IM{:04d}", count: int = 6, start: int = 0) -> list[Path]:
    """Write a series whose files are called by a count, and return them."""
    write_series(folder / "new", range(count), StudyInstanceUID="1.2.1", SeriesInstanceUID="1.3.1", PatientName=None)
    files = [folder / name.format(number) for number in range(start, start + count)]
    for old, new in zip(sorted((folder / "new").iterdir()), files, strict=True):
        new.parent.mkdir(parents=True, exist_ok=True)
        old.rename(new)
    (folder / "new").rmdir()
    return files


def missed_by_everybody(root: Path, lost: Path) -> bool:
    """Return whether all readers miss a file, after checking that they agree."""
    try:
        read(root)
        by_load = False
    except UnreadableFile as error:
        assert error.path == lost
        by_load = True
    studies = find_studies(root)
    by_info = [study.uid for study in studies if lost in [problem.path for problem in study.problems]]
    entries = [entry for entry in find_cohort(root) if lost in entry.files]
    if by_load:
        assert by_info == ["1.2.1"]
        assert [entry.uid for entry in entries] == ["1.2.1"]
        with pytest.raises(MedsegError):  # the study of a batch fails, by its files alone
            only_study(read_studies(entries[0].files))
    else:
        assert not by_info
        assert not entries
    return by_load


class TestWhatIsMissed:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            *[("IM0006", content) for content in (b"", b"x", ZEROS, PAGE, TEXT, PNG)],
            *[("img/IM0006", content) for content in (b"", ZEROS, PAGE)],
            *[("IM0006.img", content) for content in (b"", ZEROS)],
            *[("IM0006.dcm", content) for content in (b"", ZEROS, PAGE, TEXT, PNG)],
            *[("elsewhere/a.dcm", content) for content in (b"", ZEROS, PAGE, TEXT)],
            ("elsewhere/A.IMA", ZEROS),
            ("IM0006.part", ZEROS[:400]),
            ("IM0006.dcm.crdownload", ZEROS[:400]),
            *[(name, b"bplist00") for name in (".IM0006.icloud", ".IM0006.dcm.icloud", "a.dcm.icloud")],
            ("last.dcm", b""),
            ("last", ZEROS),
            ("last", PAGE),
            ("IM0006.gz", ZEROS),
            ("IM0006.7z", ZEROS),
        ],
    )
    def test_beside_slices_or_named_like_them(self, tmp_path: Path, name: str, content: bytes) -> None:
        write_numbered(tmp_path / "study" / "a")
        lost = tmp_path / "study" / "a" / name
        lost.parent.mkdir(exist_ok=True)
        lost.write_bytes(content)
        assert missed_by_everybody(tmp_path, lost)
        shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "study")
        with opened(tmp_path / "packed.zip") as folder:
            (study,) = find_studies(folder)
            assert len(study.problems) == 1

    @pytest.mark.parametrize("names", ["IM{:04d}", "{:d}", "1.2.840.{:d}", "{:d}.dcm", "MR.1.3.{:d}.4", "8f3-a0c{:d}"])
    @pytest.mark.parametrize("place", ["study/b", "study/a/below", "study", "study/b/c"])
    def test_the_rest_in_another_folder(self, tmp_path: Path, names: str, place: str) -> None:
        write_numbered(tmp_path / "study" / "a", names)
        lost = tmp_path / place / names.format(11)
        lost.parent.mkdir(exist_ok=True, parents=True)
        lost.write_bytes(ZEROS)
        assert missed_by_everybody(tmp_path, lost)

    @pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zip", ".tar", ".tar.gz", ".tgz"])
    @pytest.mark.parametrize("name", ["IM0005.dcm", "IM0005", "last"])
    def test_packed_one_by_one(self, tmp_path: Path, name: str, ending: str) -> None:
        file = write_numbered(tmp_path / "study")[5]
        lost = tmp_path / "study" / f"{name}{ending}"
        content = file.read_bytes()
        if ending in {".gz", ".bz2", ".xz"}:
            lost.write_bytes({".gz": gzip, ".bz2": bz2, ".xz": lzma}[ending].compress(content))
        elif ending == ".zip":
            with zipfile.ZipFile(lost, "w") as archive:
                archive.write(file, "slice")
        else:
            with tarfile.open(lost, "w:gz" if ending.endswith("gz") else "w") as tar:
                tar.add(file, "slice")
        if ending == ".tar":  # a copy, of the same name and size
            with tarfile.open(lost, "w") as tar:
                tar.add(file, file.name)
            assert not missed_by_everybody(tmp_path, lost)
            with tarfile.open(lost, "w") as tar:
                tar.add(file, "slice")
        file.unlink()
        if ending == ".zip":  # an archive is a study of its own, too
            with pytest.raises(UnreadableFile, match="packed file"):
                read(tmp_path)
            loose = next(entry for entry in find_cohort(tmp_path) if entry.uid == "1.2.1")
            assert lost in loose.files
        else:
            assert missed_by_everybody(tmp_path, lost)

    def test_a_copy_that_is_packed_or_partial_is_not_missed(self, tmp_path: Path) -> None:
        file = write_numbered(tmp_path / "study")[5]
        file.with_name("IM0005.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.with_name("IM0005.part").write_bytes(b"")
        shutil.make_archive(str(tmp_path / "copy"), "zip", tmp_path / "study")
        assert read(tmp_path).grid.shape == (6, 4, 6)
        loose, *_ = (entry for entry in find_cohort(tmp_path) if entry.uid)
        assert len(loose.files) == 6

    def test_the_rest_under_the_same_names_in_an_archive(self, tmp_path: Path) -> None:
        """Names begin anew in every folder, and slices are equally long."""
        for start in (0, 3):
            tags = {"StudyInstanceUID": "1.2.1", "SeriesInstanceUID": "1.3.1", "PatientName": None}
            write_series(tmp_path / str(start) / "new", range(start, start + 3), **tags)
            for number, file in enumerate(sorted((tmp_path / str(start) / "new").iterdir())):
                file.rename(tmp_path / str(start) / f"IM{number}")
        shutil.make_archive(str(tmp_path / "rest"), "zip", tmp_path / "3")
        shutil.rmtree(tmp_path / "3")
        with pytest.raises(UnreadableFile, match="packed file"):
            read(tmp_path)
        loose = next(entry for entry in find_cohort(tmp_path) if entry.uid == "1.2.1")
        assert tmp_path / "rest.zip" in loose.files

    def test_the_rest_in_an_archive_elsewhere(self, tmp_path: Path) -> None:
        files = write_numbered(tmp_path / "a")
        (tmp_path / "b").mkdir()
        with zipfile.ZipFile(tmp_path / "b" / "rest.zip", "w") as archive:
            archive.writestr("viewer.exe", PROGRAM)
            archive.write(files[5], "x/IM0005")
        files[5].unlink()
        with pytest.raises(UnreadableFile, match="Unpack it"):
            read(tmp_path)
        entries = find_cohort(tmp_path)
        # Five slices and the archive; and the archive, which must not be done alone, with one of the slices.
        assert sorted(len(entry.files) for entry in entries) == [2, 6]
        for entry in entries:
            assert {files[0], tmp_path / "b" / "rest.zip"} <= {*entry.files}

    @pytest.mark.parametrize("cut", [0, 100, 131, 140, 200, 600, -1])
    @pytest.mark.parametrize("number", [0, 3, 5])
    def test_a_slice_that_is_cut_short(self, tmp_path: Path, number: int, cut: int) -> None:
        """At either end, where no gap would tell, and in the middle."""
        files = write_numbered(tmp_path / "a")
        content = files[number].read_bytes()
        files[number].write_bytes(content[:cut])
        with pytest.raises(MedsegError):
            read(tmp_path)
        (entry,) = find_cohort(tmp_path)
        assert files[number] in entry.files
        (study,) = find_studies(tmp_path)
        assert study.problems or {one.verdict for one in study.series} == {"refused"}


class TestSlicesThatNameNothing:
    """The last slice of six lacks what says where it belongs: without it the scan would be short."""

    @pytest.mark.parametrize("name", ["StudyInstanceUID", "Modality"])
    @pytest.mark.parametrize("value", ["", None])
    def test_the_others_say_it(self, tmp_path: Path, name: str, value: str | None) -> None:
        tags = {"StudyInstanceUID": "1.2.1", "SeriesInstanceUID": "1.3.1", "Modality": "CT"}
        write_series(tmp_path, range(6), **tags, each=lambda k: {name: value} if k == 5 else {})
        assert read(tmp_path).grid.shape[2] == 6
        (study,) = find_studies(tmp_path)
        assert [(one.n_slices, one.modality, one.verdict) for one in study.series] == [(6, "CT", "accepted")]
        (entry,) = find_cohort(tmp_path)
        assert (study.uid, entry.uid, len(entry.files)) == ("1.2.1", "1.2.1", 6)

    @pytest.mark.parametrize("value", ["", None])
    def test_the_series_is_not_guessed(self, tmp_path: Path, value: str | None) -> None:
        tags = {"StudyInstanceUID": "1.2.1", "SeriesInstanceUID": "1.3.1"}
        write_series(tmp_path, range(6), **tags, each=lambda k: {"SeriesInstanceUID": value} if k == 5 else {})
        with pytest.raises(UnreadableFile, match="does not state its SeriesInstanceUID") as caught:
            read(tmp_path)
        assert caught.value.reason == "missing_attribute"
        (study,) = find_studies(tmp_path)
        assert [problem.path for problem in study.problems] == [caught.value.path]

    def test_other_objects_may(self, tmp_path: Path) -> None:
        write_series(tmp_path / "new", range(6), StudyInstanceUID="1.2.1", SeriesInstanceUID="1.3.1")
        for name, tags in {
            "report": {
                "Modality": "SR",
                "Rows": None,
                "Columns": None,
                "PixelData": None,
                "ImagePositionPatient": None,
            },
            "scout": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
        }.items():
            write_series(tmp_path / name, [0], StudyInstanceUID="1.2.1", SeriesInstanceUID="", **tags)
            next((tmp_path / name).iterdir()).rename(tmp_path / "new" / name)
        assert read(tmp_path).grid.shape[2] == 6

    def test_of_two_studies_in_a_folder_none_is_guessed(self, tmp_path: Path) -> None:
        for number, uid in enumerate(("1.2.1", "1.2.2", "")):
            write_series(tmp_path / str(number), StudyInstanceUID=uid)
            for file in (tmp_path / str(number)).iterdir():
                file.rename(tmp_path / f"{number}_{file.name}")
        assert sorted(study.uid for study in find_studies(tmp_path)) == ["", "1.2.1", "1.2.2"]
        assert sorted(entry.uid for entry in find_cohort(tmp_path)) == ["", "1.2.1", "1.2.2"]


class TestWhatIsNotMissed:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            *[(name, TEXT) for name in ("README", "LIESMICH", "VERSION", "MD5SUMS", "checksums.sha", "IM0006.txt")],
            *[("IM0006.jpg", content) for content in (b"", PNG)],
            *[(name, ZEROS) for name in ("DICOMDIR", ".DS_Store", "._IM0006", "Thumbs.db", "desktop.ini")],
            ("viewer", PROGRAM),
            ("preview", PNG),
            ("autorun.inf", TEXT),
            ("viewer/plugin", ZEROS),
            ("viewer/empty", b""),
            ("viewer/lib.dll", PROGRAM),
            ("notes.txt.gz", gzip.compress(TEXT, mtime=0)),
            ("scan.nii.gz", gzip.compress(ZEROS, mtime=0)),
            ("other.gz", gzip.compress(TEXT, mtime=0)),
            ("IM0006.roi", TEXT),
            *[(name, b"") for name in ("_SUCCESS", "done", "LOCK", "transfer.complete", "IM0006.done")],
            *[(name, PROGRAM[4:]) for name in ("mesh.vtk", "scene.mrb", "scan.rec", "scan.mif", "film.webm", "net.pt")],
            ("dicomdir.dcm", None),
        ],
    )
    def test_other_files(self, tmp_path: Path, name: str, content: bytes | None) -> None:
        write_numbered(tmp_path / "study" / "a")
        file = tmp_path / "study" / "a" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(dicomdir() if content is None else content)
        assert not missed_by_everybody(tmp_path, file)
        shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "study")
        with opened(tmp_path / "packed.zip") as folder:
            (study,) = find_studies(folder)
            assert not study.problems

    def test_a_volume_of_two_files(self, tmp_path: Path) -> None:
        write_numbered(tmp_path / "a")
        (tmp_path / "a" / "scan.hdr").write_bytes(ZEROS[:348])
        (tmp_path / "a" / "scan.img").write_bytes(ZEROS)
        assert read(tmp_path).grid.shape == (6, 4, 6)


def dicomdir() -> bytes:
    """Return a real DICOMDIR, which somebody called .dcm."""
    import pydicom

    return (Path(pydicom.__file__).parent / "data/test_files/dicomdirtests/DICOMDIR").read_bytes()


class TestWhoseItIs:
    def test_folders_of_several_studies_do_not_fail_each_other(self, tmp_path: Path) -> None:
        for uid in ("1.2.1", "1.2.2", "1.2.3"):
            write_series(tmp_path / uid, StudyInstanceUID=uid)
        (tmp_path / "4").mkdir()
        for name in ("1.dcm", "2.dcm"):
            (tmp_path / "4" / name).touch()
        assert [study.uid for study in find_studies(tmp_path) if study.problems] == ["", ""]
        assert [(entry.uid, len(entry.files)) for entry in find_cohort(tmp_path)][3:] == [("", 2)]

    def test_a_folder_among_those_of_a_study_may_be_of_it(self, tmp_path: Path) -> None:
        for place, uid in (("a", "1.2.1"), ("b", "1.2.1"), ("c", "1.2.2")):
            write_series(tmp_path / place, StudyInstanceUID=uid)
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "1.dcm").touch()
        assert [study.uid for study in find_studies(tmp_path) if study.problems] == ["1.2.1"]
        assert [entry.uid for entry in find_cohort(tmp_path) if len(entry.files) == 11] == ["1.2.1"]


class TestLinks:
    def test_a_linked_folder_is_entered_once(self, tmp_path: Path) -> None:
        files = write_numbered(tmp_path / "scan" / "a")
        (tmp_path / "elsewhere").mkdir()
        for file in files[3:]:
            file.rename(tmp_path / "elsewhere" / file.name)
        (tmp_path / "scan" / "b").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "scan" / "again").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "scan" / "a" / "circle").symlink_to(tmp_path / "scan")
        assert read(tmp_path / "scan").grid.shape == (6, 4, 6)
        (entry,) = find_cohort(tmp_path / "scan")
        assert len(entry.files) == 6


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("IM0007", ("im#", "")),
        ("IM0007.DCM", ("im#", ".dcm")),
        ("IM0007.dcm.gz", ("im#", ".dcm")),
        ("1.2.840.113619", ("#.#.#.#", "")),
        ("0a9f-77.dcm.part", ("#-#", ".dcm")),
    ],
)
def test_what_names_have_in_common(name: str, kind: tuple[str, str]) -> None:
    assert name_kind(name) == kind
