"""Studies are found whole, series are parted into stacks, and every stack has a verdict."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import ORIENTATIONS, assert_every_pixel_in_place, decimals, normal_of, pixels_in_space, write_series
from multiframe_files import write_enhanced
from pydicom.uid import ImplicitVRLittleEndian

from medseg.errors import InputError, SeriesRefused, UnreadableFile
from medseg.io.dicom_geometry import LARGEST_GAP_MM, stack_measures
from medseg.io.dicom_series import find_series, read, read_series
from medseg.io.dicom_slice import VARIANTS
from medseg.study.archive import opened, unpack
from medseg.study.cohort import find_cohort
from medseg.study.describe import describe_studies, series_names
from medseg.study.find import find_studies

FILES = Path(pydicom.__file__).parent / "data" / "test_files"


def series_of(folder: Path):
    (study,) = find_studies(folder)
    assert not study.problems
    return study.series


def echoes(k: float) -> dict:
    """Return two echoes at the same five positions."""
    return {"EchoTime": 5 if k < 5 else 10, "ImagePositionPatient": [0, 0, 2.5 * (k % 5)]}


class TestStacks:
    def test_studies_and_series_are_told_apart_whatever_the_folders(self, tmp_path):
        for study in ("1.2.1", "1.2.2"):
            for series in ("1.3.1", "1.3.2"):
                write_series(
                    tmp_path / "all" / study / series, StudyInstanceUID=study, SeriesInstanceUID=study + series
                )
        studies = find_studies(tmp_path)
        assert sorted(study.uid for study in studies) == ["1.2.1", "1.2.2"]
        assert [len(study.series) for study in studies] == [2, 2]
        assert sum(len(study.files) for study in studies) == 20

    def test_files_without_a_study_make_one_for_each_folder(self, tmp_path):
        write_series(tmp_path / "a")
        write_series(tmp_path / "b")
        assert [study.uid for study in find_studies(tmp_path)] == ["", ""]

    @pytest.mark.parametrize(
        "each",
        [
            echoes,
            lambda k: echoes(k) | {"EchoTime": None, "AcquisitionNumber": 1 if k < 5 else 2},
            lambda k: echoes(k) | {"EchoTime": None, "TemporalPositionIdentifier": 1 if k < 5 else 2},
            lambda k: echoes(k) | {"EchoTime": None, "ImageType": ["ORIGINAL", "PRIMARY", "M" if k < 5 else "P"]},
            lambda k: echoes(k) | {"EchoTime": None, "AcquisitionTime": "101010" if k < 5 else "101112"},
        ],
    )
    def test_stacks_at_the_same_positions_are_parted_by_what_tells_them_apart(self, tmp_path, each):
        write_series(tmp_path, range(10), each=each)
        series = series_of(tmp_path)
        assert [one.verdict for one in series] == ["accepted", "accepted"]
        assert [one.n_slices for one in series] == [5, 5]
        with pytest.raises(SeriesRefused, match="more than one stack"):
            read(tmp_path)

    @pytest.mark.parametrize("tag", ["StudyInstanceUID", "SeriesInstanceUID"])
    @pytest.mark.parametrize("blank", [[0, 1], [3, 4], [6, 7, 8], [8]])
    def test_slices_that_state_no_study_or_series_belong_to_the_only_one_beside_them(self, tmp_path, tag, blank):
        stated = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.4"}
        write_series(tmp_path / "a", range(9), each=lambda k: {tag: ""} if k in blank else {}, **stated)
        write_series(tmp_path / "b", range(4), StudyInstanceUID="1.9")
        first, second = find_studies(tmp_path)
        assert [one.n_slices for one in first.series] == [9]
        assert [one.n_slices for one in second.series] == [4]
        assert (first.uid, first.series[0].verdict) == ("1.2.3", "accepted")
        assert [(one.uid, len(one.files)) for one in find_cohort(tmp_path)] == [("1.2.3", 9), ("1.9", 4)]

    @pytest.mark.parametrize(("first", "second"), [(5.0049, 5.0051), (5.0051, 5.0049), (5, 5.0009), (5, 5)])
    def test_positions_on_both_sides_of_a_half_are_one(self, tmp_path, first, second):
        heights = [0, 2.5, first, 7.5, 10, second]
        write_series(
            tmp_path,
            range(6),
            each=lambda k: {"EchoTime": 5 + (k == 5), "ImagePositionPatient": [0, 0, heights[int(k)]]},
        )
        series = series_of(tmp_path)
        assert [one.n_slices for one in series] == [5, 1]
        assert series[0].verdict == "accepted"

    @pytest.mark.parametrize(
        ("name", "spellings"),
        [
            ("EchoTime", ("2.46", "2.460")),
            ("EchoNumbers", ("1", "01")),
            ("TriggerTime", ("0", "-0.0")),
            ("InversionTime", ("900", "9e2")),
            ("AcquisitionTime", ("101010", "101010.000000")),
            ("AcquisitionNumber", ("+4", "4")),
        ],
    )
    def test_one_number_in_two_spellings_is_one(self, tmp_path, name, spellings):
        def each(k: float) -> dict:
            own = {} if name == "EchoTime" else {"EchoTime": 5 if k < 5 else 10}
            return echoes(k) | own | {name: spellings[int(k) % 2]}

        write_series(tmp_path, range(10), each=each, EchoTime=None)
        series = series_of(tmp_path)
        place = VARIANTS.index(name)
        assert {part.variants[place] for one in series for part in one.slices} == {series[0].slices[0].variants[place]}
        if name != "EchoTime":
            assert [(one.verdict, one.n_slices) for one in series] == [("accepted", 5)] * 2

    def test_two_elements_together_part_four_stacks(self, tmp_path):
        write_series(
            tmp_path,
            range(20),
            each=lambda k: echoes(k % 10) | {"AcquisitionNumber": 1 + k // 10},
        )
        assert [one.n_slices for one in series_of(tmp_path)] == [5, 5, 5, 5]

    def test_copies_that_nothing_tells_apart_are_refused(self, tmp_path):
        write_series(tmp_path, range(10), each=lambda k: {"ImagePositionPatient": [0, 0, 2.5 * (k % 5)]})
        (series,) = series_of(tmp_path)
        assert (series.verdict, series.refusal.reason) == ("refused", "duplicate_positions")

    def test_orientation_matrix_spacing_and_frame_always_part(self, tmp_path):
        def each(k: float) -> dict:
            kinds = [{}, {"ImageOrientationPatient": ORIENTATIONS["sagittal"]}, {"PixelSpacing": [2, 2]}]
            kinds += [{"FrameOfReferenceUID": "1.9"}, {"Rows": 3}]
            return {**kinds[int(k) % 5], "ImagePositionPatient": [2.5 * (k // 5)] * 3}

        write_series(tmp_path, range(20), each=each)
        assert [one.n_slices for one in series_of(tmp_path)] == [4] * 5

    def test_a_localizer_inside_a_series_is_a_stack_of_its_own(self, tmp_path):
        write_series(
            tmp_path, [*range(5), 40], each=lambda k: {"ImageType": ["A", "B", "LOCALIZER"]} if k == 40 else {}
        )
        series = series_of(tmp_path)
        assert [(one.n_slices, one.verdict) for one in series] == [(5, "accepted"), (1, "refused")]

    def test_interleaved_acquisitions_are_parted_and_not_mixed(self, tmp_path):
        def each(k: float) -> dict:
            return {"AcquisitionNumber": 1 if k < 10 else 2, "ImagePositionPatient": [0, 0, 3 * (k % 10) + (k >= 10)]}

        write_series(tmp_path, [*range(6), *range(10, 16)], each=each)
        series = series_of(tmp_path)
        assert [one.verdict for one in series] == ["accepted", "accepted"]
        assert [one.grid.spacing_mm[2] for one in series] == pytest.approx([3, 3])

    def test_a_scan_whose_steps_change_on_the_way_stays_one(self, tmp_path):
        def each(k: float) -> dict:
            return {
                "AcquisitionNumber": 1 if k < 5 else 2,
                "ImagePositionPatient": [0, 0, k * 2 if k < 5 else 3 * k - 5],
            }

        write_series(tmp_path, range(10), each=each)
        (series,) = series_of(tmp_path)
        assert series.verdict == "repaired"


class TestRepair:
    def test_irregular_steps_are_interpolated_onto_a_regular_grid(self, tmp_path):
        heights = [0, 2, 4, 7, 10, 11.5]
        places = [[0, 0, mm] for mm in heights]
        write_series(
            tmp_path, range(6), shape=(1, 2),
            each=lambda k: {
                "ImagePositionPatient": places[k],
                "PixelData": np.array([100 * heights[k], -heights[k]], "<i2").tobytes(),
            },
        )  # fmt: skip
        with pytest.raises(SeriesRefused, match=r"pipeline interpolates steps of up to 5 mm"):
            read(tmp_path)
        (series,) = series_of(tmp_path)
        assert series.verdict == "repaired"
        volume = read_series(series)
        step = 11.5 / 8  # the closest to the smallest step, 1.5 mm, that ends where the slices do
        assert volume.grid.shape == (2, 1, 9)
        assert volume.grid.spacing_mm[2] == pytest.approx(step)
        np.testing.assert_allclose(volume.grid.to_world((0, 0, 8)), [0, 0, 11.5], atol=1e-9)
        assert volume.array.dtype == np.int16
        assert np.rint(series.heights).tolist() == [0, 1, 3, 5, 7, 8]
        # Values that grow evenly along the normal are found exactly between slices, too.
        np.testing.assert_allclose(volume.array[0, 0, 0], 100 * step * np.arange(9), atol=0.5)

    def test_a_tilted_stack_with_irregular_steps_stays_tilted(self, tmp_path):
        way = normal_of(ORIENTATIONS["oblique"]) + 0.2 * np.array(ORIENTATIONS["oblique"][:3])
        write_series(tmp_path, [0, 1, 2.5, 3.5, 4.5], orientation=ORIENTATIONS["oblique"], step_mm=2 * way)
        (series,) = series_of(tmp_path)
        assert series.regular_grid is not None
        assert not series.regular_grid.is_orthogonal
        measures = stack_measures(np.array([part.plane for part in series.slices]))
        assert measures["tilt_deg"] == pytest.approx(np.degrees(np.arctan(0.2)))
        assert measures["shear_mm"] == pytest.approx(0.2 * 9)
        assert (measures["step_min_mm"], measures["step_max_mm"]) == pytest.approx((2, 3))

    @pytest.mark.parametrize(
        ("heights", "reason"),
        [
            ([0, 2, 4, 4 + LARGEST_GAP_MM + 0.5, 12], "irregular_spacing"),  # a gap above the limit
            ([0, 2, 4, 8, 10], "missing_slice"),
        ],
    )
    def test_gaps_are_not_interpolated(self, tmp_path, heights, reason):
        write_series(tmp_path, range(5), each=lambda k: {"ImagePositionPatient": [0, 0, heights[k]]})
        (series,) = series_of(tmp_path)
        assert (series.verdict, series.refusal.reason) == ("refused", reason)
        with pytest.raises(SeriesRefused):
            read_series(series)

    def test_a_slice_beside_the_line_is_not_moved(self, tmp_path):
        write_series(tmp_path, each=lambda k: {"ImagePositionPatient": [k == 2, 0, 2.5 * k]})
        assert [one.verdict for one in series_of(tmp_path)] == ["refused"]


class TestMultiFrame:
    @pytest.mark.parametrize("name", ORIENTATIONS)
    def test_each_frame_lies_where_its_groups_say(self, tmp_path, name):
        write_series(tmp_path / "single", orientation=ORIENTATIONS[name], RescaleSlope="2", RescaleIntercept="-5")
        write_enhanced(tmp_path / "single", tmp_path / "enhanced")
        volume = read(tmp_path / "enhanced")
        assert_every_pixel_in_place(volume, tmp_path / "single")
        assert volume.grid.matches(read(tmp_path / "single").grid, 1e-9)

    def test_enhanced_ct_with_implicit_vr(self, tmp_path):
        write_series(tmp_path / "single", step_mm=(0, 0.35, 2.5))
        write_enhanced(tmp_path / "single", tmp_path / "enhanced", modality="CT", syntax=ImplicitVRLittleEndian)
        volume = read(tmp_path / "enhanced")
        assert_every_pixel_in_place(volume, tmp_path / "single")
        assert not volume.grid.is_orthogonal  # a gantry tilt of 8 degrees

    def test_frames_of_two_echoes_are_two_stacks(self, tmp_path):
        write_series(tmp_path / "single", range(10), each=echoes)
        write_enhanced(tmp_path / "single", tmp_path / "enhanced")
        series = series_of(tmp_path / "enhanced")
        assert [(one.n_slices, one.verdict) for one in series] == [(5, "accepted")] * 2
        with pytest.raises(SeriesRefused, match=r"differ in .*EchoTime \(2 values\)"):
            read(tmp_path / "enhanced")
        values = {one.slices[0].variants: read_series(one).array for one in series}
        expected = {}
        for path in (tmp_path / "single").iterdir():
            data = pydicom.dcmread(path)
            expected.setdefault(float(data.EchoTime), []).append((data.ImagePositionPatient[2], data.pixel_array))
        stacks = [
            np.stack([array.T for _, array in sorted(part, key=lambda one: one[0])], 2) for part in expected.values()
        ]
        assert all(any(np.array_equal(array[0], stack) for stack in stacks) for array in values.values())

    def test_inverted_gray_values_are_left_as_they_are(self, tmp_path):
        write_series(tmp_path, PhotometricInterpretation="MONOCHROME1")
        assert_every_pixel_in_place(read(tmp_path), tmp_path)


class TestPlaces:
    def test_a_dicomdir_names_the_files(self, tmp_path):
        shutil.copytree(FILES / "dicomdirtests", tmp_path / "cd")
        (tmp_path / "cd" / "beside.dcm").write_bytes((FILES / "CT_small.dcm").read_bytes())
        found = find_studies(tmp_path / "cd" / "DICOMDIR")
        files = [file for study in found for file in study.files]
        assert not [problem for study in found for problem in study.problems]
        named = pydicom.dcmread(tmp_path / "cd" / "DICOMDIR").DirectoryRecordSequence
        assert len(files) == sum("ReferencedFileID" in record for record in named) > 20
        files[0].unlink()
        problems = [problem for study in find_studies(tmp_path / "cd" / "DICOMDIR") for problem in study.problems]
        assert {(problem.reason, problem.path) for problem in problems} == {("missing", files[0])}

    def test_an_archive_is_unpacked_and_gone_again(self, tmp_path):
        write_series(tmp_path / "study" / "a", SeriesInstanceUID="")
        write_series(tmp_path / "study" / "b", SeriesInstanceUID="")
        shutil.make_archive(tmp_path / "packed", "zip", tmp_path / "study")
        with opened(tmp_path / "packed.zip") as folder:
            assert len(find_studies(folder)) == 2
            volumes = [read(part) for part in sorted(folder.iterdir())]
        assert not folder.exists()
        assert [volume.grid.shape for volume in volumes] == [(6, 4, 5)] * 2

    @pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:\\evil"])
    def test_an_archive_that_points_elsewhere_is_not_unpacked(self, tmp_path, name):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
            archive.writestr("good", "content")
            member = zipfile.ZipInfo("x")
            member.filename = name
            archive.writestr(member, "evil")
        (tmp_path / "out").mkdir()
        with pytest.raises(InputError, match="written outside of its folder") as caught:
            unpack(tmp_path / "bad.zip", tmp_path / "out")
        assert caught.value.reason == "unsafe_archive"
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["bad.zip", "out"]

    def test_an_archive_that_grows_too_large_is_stopped(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("zeros", bytes(10_000_000))
        (tmp_path / "out").mkdir()
        with pytest.raises(InputError, match="unpacks to more than"):
            unpack(tmp_path / "bomb.zip", tmp_path / "out", largest=1_000_000)
        assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file()) <= 2_000_000

    @pytest.mark.parametrize("name", ["a.dcm", "IM0001"])
    def test_an_archive_in_an_archive_is_left_out_only_without_dicom_files(self, tmp_path, name):
        for inner, content in ((name, bytes(128) + b"DICM"), ("viewer.dll", bytes(200))):
            with zipfile.ZipFile(tmp_path / "inner.zip", "w") as archive:
                archive.writestr("folder/", "")
                archive.writestr(inner, content)
            with zipfile.ZipFile(tmp_path / f"{inner}.zip", "w") as archive:
                archive.write(tmp_path / "inner.zip", "series/Inner.ZIP")
                archive.writestr("broken.zip", "PK no zip")
        out = tmp_path / "out"
        out.mkdir()
        with pytest.raises(InputError, match="holds another archive") as caught:
            unpack(tmp_path / f"{name}.zip", out)
        assert caught.value.reason == "nested_archive"
        shutil.rmtree(out)
        out.mkdir()
        unpack(tmp_path / "viewer.dll.zip", out)
        assert len([path for path in out.rglob("*") if path.is_file()]) == 2

    def test_a_damaged_archive_is_unreadable(self, tmp_path):
        (tmp_path / "bad.zip").write_bytes(b"PK no zip")
        with pytest.raises(UnreadableFile, match="is damaged, is not a zip"), opened(tmp_path / "bad.zip"):
            pass

    def test_what_cannot_be_read_is_listed_with_the_study_beside_it(self, tmp_path):
        write_series(tmp_path / "a", StudyInstanceUID="1.2")
        write_series(tmp_path / "b", StudyInstanceUID="1.3")
        (tmp_path / "a" / "cut.dcm").write_bytes(b"")
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "cut").write_bytes(next((tmp_path / "b").iterdir()).read_bytes()[:300])
        (tmp_path / "b" / "notes.txt").write_text("no DICOM")
        problems = {study.uid: [error.path.name for error in study.problems] for study in find_studies(tmp_path)}
        assert problems == {"1.2": ["cut.dcm"], "1.3": [], "": ["cut"]}

    def test_a_slice_that_was_not_fetched_is_missed_by_every_reader(self, tmp_path):
        """As git-annex and DataLad leave what they have not copied: a link that leads nowhere."""
        write_series(tmp_path / "a", StudyInstanceUID="1.2")
        (tmp_path / "a" / "notes.txt").symlink_to(tmp_path / "nowhere")
        read(tmp_path / "a")
        lost = tmp_path / "a" / "last"
        lost.symlink_to(tmp_path / "nowhere")
        with pytest.raises(UnreadableFile, match="The link leads to a file that is not there") as caught:
            read(tmp_path / "a")
        assert (caught.value.reason, caught.value.path) == ("missing", lost)
        (study,) = find_studies(tmp_path)
        assert [(error.reason, error.path) for error in study.problems] == [("missing", lost)]
        (entry,) = find_cohort(tmp_path)
        assert lost in entry.files  # so that the study fails of it

    @pytest.mark.parametrize("name", ["last.dcm", "LAST.IMA", "last", "IM.0007", "1.2.840.113619"])
    def test_a_slice_of_which_nothing_is_left_is_missed_by_every_reader(self, tmp_path, name):
        write_series(tmp_path / "a", StudyInstanceUID="1.2")
        (tmp_path / "a" / name).write_bytes(b"\0" * 131)
        with pytest.raises(UnreadableFile, match="is empty") as caught:
            read(tmp_path / "a")
        assert (caught.value.reason, caught.value.path) == ("unreadable", tmp_path / "a" / name)
        (study,) = find_studies(tmp_path)
        assert [(error.reason, error.path) for error in study.problems] == [("unreadable", tmp_path / "a" / name)]
        (entry,) = find_cohort(tmp_path)
        assert tmp_path / "a" / name in entry.files  # so that the study fails of it
        shutil.make_archive(tmp_path / "packed", "zip", tmp_path / "a")
        with opened(tmp_path / "packed.zip") as folder, pytest.raises(UnreadableFile, match="is empty"):
            read(next(folder.iterdir()))

    @pytest.mark.parametrize(
        "name",
        ["DICOMDIR", ".DS_Store", "._1.dcm", "Thumbs.db", "notes.txt", "a.bval", "x.NII.GZ", "readme", "below/stub"],
    )
    def test_what_may_lie_beside_slices_is_passed_over(self, tmp_path, name):
        write_series(tmp_path / "a", StudyInstanceUID="1.2")
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(b"no DICOM " * (20 if name == "readme" else 1))
        assert read(tmp_path / "a").grid.shape == (6, 4, 5)
        (study,) = find_studies(tmp_path)
        assert not study.problems
        (entry,) = find_cohort(tmp_path)
        assert len(entry.files) == 5
        shutil.make_archive(tmp_path / "packed", "zip", tmp_path / "a")
        with opened(tmp_path / "packed.zip") as folder:
            (study,) = find_studies(folder)
            assert not study.problems

    def test_nothing_there(self, tmp_path):
        assert find_studies(tmp_path) == []
        with pytest.raises(UnreadableFile, match="no DICOM file here"):
            describe_studies(tmp_path)
        with pytest.raises(UnreadableFile, match="no such file or folder"):
            find_studies(tmp_path / "nowhere")


class TestManyFiles:
    def test_several_processes_read_what_one_reads(self, tmp_path, monkeypatch):
        for number in range(4):
            write_series(
                tmp_path / str(number), StudyInstanceUID=f"1.2.{number % 2}", SeriesInstanceUID=f"1.3.{number}"
            )
        (tmp_path / "1" / "cut.dcm").touch()
        (tmp_path / "0" / "cut").write_bytes(next((tmp_path / "0").iterdir()).read_bytes()[:300])
        alone, alone_cohort = find_studies(tmp_path), find_cohort(tmp_path)
        monkeypatch.setattr("medseg.study.headers.MANY", 10)
        monkeypatch.setattr("medseg.study.headers.cores", lambda: 2)
        together = find_studies(tmp_path)
        assert [study.files for study in together] == [study.files for study in alone]
        for ours, theirs in zip(together, alone, strict=True):
            assert [one.n_slices for one in ours.series] == [one.n_slices for one in theirs.series]
            assert [(str(one), one.path, one.reason) for one in ours.problems] == [
                (str(one), one.path, one.reason) for one in theirs.problems
            ]
            for one, other in zip(ours.series, theirs.series, strict=True):
                assert one.grid.matches(other.grid, 0)
        assert find_cohort(tmp_path) == alone_cohort
        monkeypatch.setattr("sys.executable", "false")  # where no process can be started, this one does it all
        assert find_cohort(tmp_path) == alone_cohort


class TestDescriptions:
    def test_nothing_of_the_patient_is_shown_unless_asked_for(self, tmp_path):
        write_series(tmp_path, SeriesDescription="Doe^Jane T1", SeriesNumber=3, PatientID="12345")
        facts = describe_studies(tmp_path)
        text = str(facts)
        assert "Doe" not in text
        assert "12345" not in text
        assert str(tmp_path) not in text
        assert "1.2.826" not in text
        assert facts["series"][0]["verdict"] == "accepted"
        assert describe_studies(tmp_path, descriptions=True)["series"][0]["description"] == "Doe^Jane T1"

    def test_parts_of_a_series_have_names(self, tmp_path):
        write_series(tmp_path, range(10), each=echoes, SeriesNumber=4)
        (study,) = find_studies(tmp_path)
        assert series_names(study) == ["4/1", "4/2"]


def test_the_strict_reader_is_as_strict_as_before(tmp_path):
    write_series(tmp_path, [0, 1, 1.9, 3, 4])
    (series,) = find_series(tmp_path)
    assert series.grid is None
    with pytest.raises(SeriesRefused, match="equal steps") as caught:
        read(tmp_path)
    assert caught.value.reason == "irregular_spacing"
    assert decimals([1.5]) and len([*pixels_in_space(tmp_path)]) == 5
