"""load and save: one contract for all formats, the choice between them, channels, sources, and real odd files."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from conftest import make_grid
from dicom_files import write_series
from nifti_files import AFFINE, SHAPE, VOXELS, geometry_bytes, grid_corners, itk_corners, make_nifti, sform
from test_io_files import file_size_limit

from medseg.errors import (
    GeometryError,
    InputError,
    MedsegError,
    NotAVolume,
    OutputError,
    UnknownOrientation,
    UnreadableFile,
    UsageError,
)
from medseg.io import load, save
from medseg.volume import Grid, Volume

WRITTEN = ["a.nii", "a.nii.gz", "a.nrrd", "a.mha"]


def moved(grid: Grid, *offset_mm: float) -> Grid:
    affine = grid.affine.copy()
    affine[:3, 3] += offset_mm
    return Grid(grid.shape, affine)


def centroid_mm(volume: Volume) -> np.ndarray:
    return volume.grid.to_world(np.argwhere(volume.array[0] > 500)).mean(axis=0)


def centroid_mm_by_itk(path: Path) -> np.ndarray:
    image = SimpleITK.ReadImage(str(path))
    places = np.argwhere(SimpleITK.GetArrayFromImage(image).T > 500).tolist()
    return np.mean([image.TransformIndexToPhysicalPoint(place) for place in places], axis=0) * (-1, -1, 1)


@pytest.mark.parametrize("name", WRITTEN)
class TestEveryFormat:
    def test_what_is_saved_is_loaded(self, tmp_path: Path, name: str, volume: Volume) -> None:
        save(volume, tmp_path / name)
        loaded = load(tmp_path / name)
        assert loaded.array.dtype == np.int16
        np.testing.assert_array_equal(loaded.array, volume.array)
        assert loaded.grid.matches(volume.grid)
        assert loaded.grid.orientation == volume.grid.orientation
        np.testing.assert_allclose(centroid_mm(loaded), centroid_mm(volume), atol=1e-5)
        np.testing.assert_allclose(centroid_mm_by_itk(tmp_path / name), centroid_mm(volume), atol=1e-4)

    def test_a_reoriented_view_is_saved_as_it_is(self, tmp_path: Path, name: str, volume: Volume) -> None:
        view = volume.reoriented("SLP")
        save(view, str(tmp_path / name))
        np.testing.assert_array_equal(load(str(tmp_path / name)).array, view.array)
        assert load(tmp_path / name).grid.matches(view.grid)

    @pytest.mark.parametrize(
        ("values", "given", "stored"),
        [
            ([0, 1], "bool", "u1"),
            ([0, 255], "u8", "u1"),
            ([0, 256], "i8", "i2"),
            ([-1, 255], "i4", "i2"),
            ([0, 40000], "i4", "u2"),
            ([0, 70000], "u8", "i4"),
            ([-70000, 1], "f4", "f4"),
            ([0, 3_000_000_000], "i8", "u4"),
            ([-1, 3_000_000_000], "i8", "i8"),
            ([0, 2**63 - 1], "u8", "i8"),
            ([0, 2**64 - 1], "u8", "u8"),
            ([0, 1], ">i2", "u1"),
            ([0.5, 2], "f2", "f4"),
            ([0.5, 2], ">f4", "f4"),
            ([1e-300, np.nan], "f8", "f8"),
            ([0.5, np.inf], "longdouble", "f8"),
        ],
    )
    def test_the_stored_type(self, tmp_path: Path, name: str, values: list[float], given: str, stored: str) -> None:
        array = np.zeros((1, 3, 4, 5), given)
        array[0, 0, 0, :2] = values
        save(Volume(array, make_grid("LPS", (3, 4, 5))), tmp_path / name)
        loaded = load(tmp_path / name).array
        assert loaded.dtype == np.dtype(stored)
        np.testing.assert_array_equal(loaded, array)

    def test_one_slice(self, tmp_path: Path, name: str) -> None:
        grid = make_grid("PIR", (1, 3, 4))
        volume = Volume(np.ones((1, *grid.shape), np.uint8), grid)
        save(volume, tmp_path / name)
        assert load(tmp_path / name).grid.matches(volume.grid)

    def test_a_failure_keeps_the_older_file_and_leaves_nothing_else(self, tmp_path: Path, name: str) -> None:
        grid = make_grid("RAS", (20, 20, 20))
        save(Volume(np.ones((1, *grid.shape), np.uint8), grid), tmp_path / name)
        older = (tmp_path / name).read_bytes()
        noise = Volume(np.random.default_rng(1).random((1, *grid.shape)), grid)
        with pytest.raises(OutputError, match="could not be written") as caught, file_size_limit(2000):
            save(noise, tmp_path / name)
        assert caught.value.path == tmp_path / name
        assert (tmp_path / name).read_bytes() == older
        assert list(tmp_path.iterdir()) == [tmp_path / name]

    def test_a_missing_folder(self, tmp_path: Path, name: str, volume: Volume) -> None:
        with pytest.raises(OutputError, match="could not be written: No such file or directory"):
            save(volume, tmp_path / "missing" / name)

    def test_channels_are_not_put_into_one_file(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(OutputError, match="one channel and this volume has 2") as caught:
            save(Volume(np.zeros((2, 7, 9, 5)), make_grid("RAS")), tmp_path / name)
        assert caught.value.reason == "several_channels"

    @pytest.mark.parametrize("source", [*WRITTEN, "series"])
    def test_source(self, tmp_path: Path, name: str, source: str) -> None:
        (tmp_path / "in").mkdir()
        if source == "series":
            write_series(tmp_path / "in" / source)
        else:
            save(Volume(VOXELS[None], Grid(SHAPE, AFFINE)), tmp_path / "in" / source)
        image = load(tmp_path / "in" / source)
        labels = image.with_array(image.array > 0)
        save(labels, tmp_path / name, source=tmp_path / "in" / source)
        np.testing.assert_array_equal(load(tmp_path / name).array, labels.array)
        assert load(tmp_path / name).grid.matches(image.grid)
        for other in (moved(image.grid, 0, 0, 0.01), make_grid("RAS", (3, 3, 3))):
            with pytest.raises(GeometryError, match="lies on another grid than the source") as caught:
                save(Volume(np.zeros((1, *other.shape)), other), tmp_path / "b.nii", source=tmp_path / "in" / source)
            assert (caught.value.reason, caught.value.path) == ("source_grid", tmp_path / "in" / source)
        assert not (tmp_path / "b.nii").exists()


class TestSourceWithoutOrientation:
    def test_nifti_codes_stay_0(self, tmp_path: Path) -> None:
        source = make_nifti(tmp_path / "source.nii", sform_code=0, qform_code=0)
        image = load(source, assume_orientation="PIR")
        save(image, tmp_path / "a.nii", source=source)
        assert geometry_bytes(tmp_path / "a.nii") == geometry_bytes(source)
        with pytest.raises(UnknownOrientation, match="does not say"):
            load(tmp_path / "a.nii")

    def test_another_spacing_does_not_match(self, tmp_path: Path) -> None:
        source = make_nifti(tmp_path / "source.nii", sform_code=0, qform_code=0)
        grid = load(source, assume_orientation="PIR").grid
        wider = Grid(grid.shape, grid.affine @ np.diag([1.1, 1, 1, 1]))
        with pytest.raises(GeometryError, match="another grid than the source"):
            save(Volume(np.zeros((1, *SHAPE)), wider), tmp_path / "a.nii", source=source)


class TestChoice:
    @pytest.mark.parametrize("name", ["a.txt", "a", "a.dcm", "a.nii.bz2", "nii"])
    def test_an_unknown_kind_of_file(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        with pytest.raises(
            UnreadableFile, match=r"Expected .nii, .nii.gz, .* or the folder of a DICOM series"
        ) as caught:
            load(tmp_path / name)
        assert (caught.value.reason, caught.value.path) == ("format", tmp_path / name)

    @pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha", "a.txt", "folder/a.nii"])
    def test_a_missing_file(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UnreadableFile, match="no such file or folder") as caught:
            load(tmp_path / name)
        assert (caught.value.reason, caught.value.path) == ("missing", tmp_path / name)

    def test_a_folder_without_dicom(self, tmp_path: Path) -> None:
        with pytest.raises(UnreadableFile) as caught:
            load(tmp_path)
        assert caught.value.path == tmp_path

    def test_endings_in_capitals(self, tmp_path: Path, volume: Volume) -> None:
        for name in ("A.NII.GZ", "A.NRRD", "A.MHA"):
            save(volume, tmp_path / name)
            np.testing.assert_array_equal(load(tmp_path / name).array, volume.array)

    @pytest.mark.parametrize("name", ["a.dcm", "a", "a.hdr", "a.nhdr", "a.mhd", "a.gz"])
    def test_what_is_not_written(self, tmp_path: Path, name: str, volume: Volume) -> None:
        with pytest.raises(OutputError, match=r"ends in .nii.gz, .nii, .nrrd or .mha") as caught:
            save(volume, tmp_path / name)
        assert (caught.value.reason, caught.value.path) == ("format", tmp_path / name)

    def test_an_assumed_orientation_changes_nothing_for_other_files(self, tmp_path: Path, volume: Volume) -> None:
        for name in WRITTEN:
            save(volume, tmp_path / name)
            assert load(tmp_path / name, assume_orientation="PIR").grid.matches(volume.grid)


class TestChannels:
    def test_matching_grids_are_stacked_whatever_the_format(self, tmp_path: Path, volume: Volume) -> None:
        doubled = volume.with_array(volume.array * np.float32(2.5))
        paths = [tmp_path / "t1.nii.gz", tmp_path / "t2.mha", tmp_path / "flair.nrrd"]
        for one, path in zip((volume, doubled, volume), paths, strict=True):
            save(one, path)
        loaded = load(paths)
        assert loaded.array.shape == (3, *volume.grid.shape)
        assert loaded.array.dtype == np.float32
        np.testing.assert_array_equal(loaded.array, np.concatenate([volume.array, doubled.array, volume.array]))
        assert loaded.grid.matches(volume.grid)

    def test_integers_stay_integers(self, tmp_path: Path, volume: Volume) -> None:
        save(volume, tmp_path / "a.nii")
        save(volume.with_array(np.full(volume.array.shape, 200)), tmp_path / "b.nii")
        assert load([tmp_path / "a.nii", tmp_path / "b.nii"]).array.dtype == np.int16

    @pytest.mark.parametrize("code", [1, 2, 3, 4])
    def test_one_space_is_resampled_onto_the_first(self, tmp_path: Path, code: int) -> None:
        # The second grid is one step of the first, 2 mm, further along x, so voxels coincide and one plane is missing.
        first = make_nifti(tmp_path / "a.nii", **sform(AFFINE, code), qform_code=0)
        second = make_nifti(
            tmp_path / "b.nii", **sform(moved(Grid(SHAPE, AFFINE), -2, 0, 0).affine, code), qform_code=0
        )
        with pytest.warns(UserWarning, match="A channel covers .* % of the first image"):
            loaded = load([first, second])
        np.testing.assert_array_equal(loaded.grid.affine, AFFINE)
        np.testing.assert_array_equal(loaded.array[0], VOXELS)
        np.testing.assert_array_equal(loaded.array[1, :, 1:], VOXELS[:, :-1])
        np.testing.assert_array_equal(loaded.array[1, :, 0], VOXELS.min())

    @pytest.mark.parametrize("codes", [(1, 2), (2, 4), (5, 5)])
    def test_other_spaces_are_not_mixed(self, tmp_path: Path, codes: tuple[int, int]) -> None:
        first = make_nifti(tmp_path / "a.nii", **sform(AFFINE, codes[0]), qform_code=0)
        other = moved(Grid(SHAPE, AFFINE), 1, 0, 0).affine
        second = make_nifti(tmp_path / "b.nii", **sform(other, codes[1]), qform_code=0)
        with pytest.raises(GeometryError, match="do not say that they share a frame of reference") as caught:
            load([first, second])
        assert (caught.value.reason, caught.value.path) == ("frame_of_reference", second)

    def test_formats_without_a_frame_need_matching_grids(self, tmp_path: Path, volume: Volume) -> None:
        save(volume, tmp_path / "a.nrrd")
        save(Volume(volume.array, moved(volume.grid, 1, 0, 0)), tmp_path / "b.nrrd")
        with pytest.raises(GeometryError, match="Register it to the first"):
            load([tmp_path / "a.nrrd", tmp_path / "b.nrrd"])

    def test_dicom_series_share_the_frame_that_they_name(self, tmp_path: Path) -> None:
        write_series(tmp_path / "a")
        write_series(tmp_path / "b", range(1, 6))
        write_series(tmp_path / "c", range(1, 6), FrameOfReferenceUID="1.2.3")
        write_series(tmp_path / "d", range(1, 6), FrameOfReferenceUID=None)
        with pytest.warns(UserWarning, match="A channel covers"):
            loaded = load([tmp_path / "a", tmp_path / "b"]).array
        assert (loaded[1, ..., 0] == min(-1000, loaded[1, ..., 1:].min())).all()  # air: it is a CT
        np.testing.assert_array_equal(loaded[1, :, :, 1:], load(tmp_path / "b").array[0, :, :, :-1])
        for other in ("c", "d"):
            with pytest.raises(GeometryError, match="share a frame of reference"):
                load([tmp_path / "a", tmp_path / other])
        with pytest.raises(GeometryError, match="share a frame of reference"):
            load([tmp_path / "d", tmp_path / "a"])

    def test_what_resampling_refuses_names_the_channel(self, tmp_path: Path) -> None:
        first = make_nifti(tmp_path / "a.nii")
        voxels = np.full(SHAPE, np.nan, np.float32)
        second = make_nifti(
            tmp_path / "b.nii", voxels, **sform(moved(Grid(SHAPE, AFFINE), 1, 0, 0).affine), qform_code=0
        )
        with pytest.raises(InputError) as caught:
            load([first, second])
        assert caught.value.path == second

    def test_no_channel(self) -> None:
        with pytest.raises(UsageError, match="At least one image is needed"):
            load([])


ODDITIES: dict[str, tuple[str, str] | tuple[type[MedsegError], str]] = {
    "AIL.nii.gz": ("float32", "AIL"),
    "FLAIR.nii.gz": ("uint8", "RAS"),
    "FLAIR.nrrd": ("uint8", "RAS"),
    "aal.nii.gz": ("uint8", "RAS"),
    "avg152T1_RL_nifti.nii.gz": ("uint8", "RAS"),
    "complex.nii.gz": (NotAVolume, "complex"),
    "ct_perfusion.nii.gz": (NotAVolume, "rgb"),
    "draw.nii.gz": ("uint8", "AIL"),
    "hippo.nii.gz": ("float32", "LAS"),
    "hippolr.nii.gz": ("float32", "LAS"),
    "inia19-NeuroMaps.nii.gz": ("int16", "RAS"),
    "inia19-t1-brain.nii.gz": ("uint8", "RAS"),
    "labels256.nii.gz": ("uint8", "LIA"),
    "lesion.nii.gz": ("uint8", "RAS"),
    "low_res.nii.gz": ("uint8", "RAS"),
    "mha.mha": ("int16", "LAS"),
    "minimal.nii.gz": (UnknownOrientation, "unknown_orientation"),
    "mni152_pveseg.nii.gz": ("uint8", "RAS"),
    "shear.nii.gz": ("float32", "RAS"),
    "spmMotor.nii.gz": ("float32", "LAS"),
    "strokez.nii.gz": ("float32", "LAS"),
    "torsoLabel.nii.gz": ("uint8", "RAS"),
}


@pytest.mark.realdata
class TestOddities:
    def test_each_has_a_verdict(self, realdata: Path) -> None:
        assert {path.name for path in (realdata / "nifti_oddities").iterdir() if path.is_file()} == set(ODDITIES)

    @pytest.mark.parametrize(("name", "verdict"), [one for one in ODDITIES.items() if not isinstance(one[1][0], str)])
    def test_refused(self, realdata: Path, name: str, verdict: tuple[type[MedsegError], str]) -> None:
        with pytest.raises(verdict[0]) as caught:
            load(realdata / "nifti_oddities" / name)
        assert (caught.value.reason, caught.value.path) == (verdict[1], realdata / "nifti_oddities" / name)

    @pytest.mark.filterwarnings("ignore:The sform of this file is sheared")
    @pytest.mark.parametrize(("name", "verdict"), [one for one in ODDITIES.items() if isinstance(one[1][0], str)])
    def test_labels_carry_the_place_of_their_source(
        self, realdata: Path, tmp_path: Path, name: str, verdict: tuple[str, str]
    ) -> None:
        source = realdata / "nifti_oddities" / name
        image = load(source)
        assert (image.array.dtype.name, image.grid.orientation) == verdict
        labels = image.with_array(np.where(image.array > image.array.mean(), 70, 0))
        save(labels, tmp_path / "a.nii.gz", source=source)
        written = nib.load(tmp_path / "a.nii.gz")
        assert written.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(written.dataobj, labels.array[0])
        if name.endswith(".nii.gz"):
            assert geometry_bytes(tmp_path / "a.nii.gz") == geometry_bytes(source)
            np.testing.assert_array_equal(written.affine, nib.load(source).affine)
        if name != "shear.nii.gz":
            assert np.abs(itk_corners(tmp_path / "a.nii.gz") - grid_corners(image.grid)).max() < 1e-3

    def test_shear_is_warned_of(self, realdata: Path) -> None:
        with pytest.warns(UserWarning, match=re.escape("qform, which places voxels up to 35.6 mm elsewhere")):
            load(realdata / "nifti_oddities" / "shear.nii.gz")

    def test_an_assumed_orientation_opens_the_file_without_one(self, realdata: Path, tmp_path: Path) -> None:
        source = realdata / "nifti_oddities" / "minimal.nii.gz"
        image = load(source, assume_orientation="LAS")
        assert (image.grid.orientation, image.grid.spacing_mm) == ("LAS", (3, 3, 3))
        save(image, tmp_path / "a.nii.gz", source=source)
        assert geometry_bytes(tmp_path / "a.nii.gz") == geometry_bytes(source)

    def test_twins_of_two_formats_are_one_image(self, realdata: Path) -> None:
        nifti, nrrd = (load(realdata / "nifti_oddities" / name) for name in ("FLAIR.nii.gz", "FLAIR.nrrd"))
        assert nifti.grid.matches(nrrd.grid)
        np.testing.assert_array_equal(nifti.array, nrrd.array)
