"""DICOM series: every voxel where its own header puts it, and a reason for every series that is not read."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from conftest import rotation
from dicom_files import (
    FRAME,
    ORIENTATIONS,
    PATIENT,
    assert_every_pixel_in_place,
    decimals,
    normal_of,
    pixels_in_space,
    write_series,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.misc import is_dicom
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless, RLELossless

from medseg.errors import MedsegError, SeriesRefused, UnreadableFile, UsageError
from medseg.io.dicom_header import silence
from medseg.io.dicom_pixels import read_pixels
from medseg.io.dicom_series import choose, find_series, frame_of_reference, read

FILES = Path(pydicom.__file__).parent / "data" / "test_files"


class TestPlace:
    @pytest.mark.parametrize("name", ORIENTATIONS)
    @pytest.mark.parametrize("direction", [1, -1])
    def test_each_pixel_lies_where_its_header_says(self, tmp_path: Path, name: str, direction: int) -> None:
        normal = direction * normal_of(ORIENTATIONS[name])
        write_series(tmp_path, orientation=ORIENTATIONS[name], step_mm=1.7 * normal)
        volume = read(tmp_path)
        assert_every_pixel_in_place(volume, tmp_path)
        assert volume.grid.is_orthogonal
        assert volume.grid.spacing_mm == pytest.approx((1.25, 0.75, 1.7))

    @settings(deadline=None, max_examples=30)
    @given(
        angles=st.tuples(*[st.integers(-180, 180)] * 3),
        step_mm=st.sampled_from([-1, 1]).flatmap(lambda way: st.floats(0.2, 9).map(lambda mm: way * round(mm, 3))),
        tilt=st.tuples(*[st.floats(-0.6, 0.6)] * 2),
        spacing=st.tuples(*[st.integers(1, 4000).map(lambda um: um / 1000)] * 2),
        count=st.integers(2, 6),
    )
    def test_any_orientation_spacing_order_and_tilt(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        angles: tuple[int, int, int],
        step_mm: float,
        tilt: tuple[float, float],
        spacing: tuple[float, float],
        count: int,
    ) -> None:
        folder = tmp_path_factory.mktemp("series")
        turn = rotation(angles)
        write_series(
            folder,
            range(count),
            orientation=turn[:, :2].T.ravel(),
            step_mm=step_mm * (turn @ [*tilt, 1]),
            PixelSpacing=decimals(spacing),
        )
        assert_every_pixel_in_place(read(folder), folder)

    def test_centroid_two_ways(self, tmp_path: Path) -> None:
        write_series(tmp_path, orientation=ORIENTATIONS["oblique"], RescaleIntercept=1000)
        volume = read(tmp_path)
        centers = volume.grid.to_world(np.argwhere(np.ones(volume.grid.shape, dtype=bool)))
        raw = [*pixels_in_space(tmp_path)]
        weighed = sum((values[..., None] * world_mm).sum(axis=(0, 1)) for world_mm, values in raw)
        np.testing.assert_allclose(
            np.average(centers, axis=0, weights=volume.array[0].ravel()),
            weighed / sum(values.sum() for _, values in raw),
            atol=1e-9,
        )

    def test_affine_by_hand(self, tmp_path: Path) -> None:
        # Columns are 1.25 mm apart and run to the left, rows 0.75 mm and run to the back, so both count down in RAS+.
        # The gantry is tilted: each slice lies 2 mm higher and 0.5 mm further back.
        write_series(tmp_path, step_mm=(0, 0.5, 2))
        grid = read(tmp_path).grid
        assert grid.shape == (6, 4, 5)
        expected = [[-1.25, 0, 0, 30.5], [0, -0.75, -0.5, -41.25], [0, 0, 2, 7], [0, 0, 0, 1]]
        np.testing.assert_allclose(grid.affine, expected, atol=1e-12)
        assert not grid.is_orthogonal

    def test_slices_are_listed_in_the_order_of_the_volume(self, tmp_path: Path) -> None:
        write_series(tmp_path, step_mm=(0, 0, -3))
        (series,) = find_series(tmp_path)
        assert series.n_slices == 5
        heights = [float(pydicom.dcmread(part.path).ImagePositionPatient[2]) for part in series.slices]
        assert heights == [-5, -2, 1, 4, 7]

    def test_rounded_positions_are_read_and_worse_ones_are_not(self, tmp_path: Path) -> None:
        # Rounding moves the first and the last slice down by 0.45 last digits on each axis, and the second one up.
        for digits, unit in ((1, 0.1), (2, 0.01)):
            places = [[round(unit * (0.45 + k / 10) + k * mm, digits) for mm in (1, 1, 2)] for k in range(11)]
            write_series(tmp_path / str(digits), range(11), each=lambda k, at=places: {"ImagePositionPatient": at[k]})
        affine = read(tmp_path / "2").grid.affine
        np.testing.assert_allclose(affine[:3, 2], (-1.001, -1.001, 2.001), atol=1e-9)
        with pytest.raises(SeriesRefused, match=r"one lies 0\.16 mm .*\(0\.02 mm is allowed") as caught:
            read(tmp_path / "1")
        assert caught.value.reason == "irregular_spacing"

    def test_only_positions_say_where_slices_lie(self, tmp_path: Path) -> None:
        odd = {"SliceThickness": 9, "SpacingBetweenSlices": -7, "GantryDetectorTilt": 8, "SliceLocation": 0}
        write_series(tmp_path, InstanceNumber=None, **odd)
        volume = read(tmp_path)
        assert_every_pixel_in_place(volume, tmp_path)
        assert volume.grid.is_orthogonal
        assert volume.grid.spacing_mm == pytest.approx((1.25, 0.75, 2.5))

    def test_single_slice_takes_its_thickness(self, tmp_path: Path) -> None:
        write_series(tmp_path, [0], SliceThickness=4, SpacingBetweenSlices=5)
        assert read(tmp_path).grid.spacing_mm == pytest.approx((1.25, 0.75, 5))
        write_series(tmp_path, [0], SliceThickness=4)
        assert read(tmp_path).grid.spacing_mm == pytest.approx((1.25, 0.75, 4))


class TestValues:
    def test_slope_and_intercept_of_each_slice(self, tmp_path: Path) -> None:
        write_series(tmp_path, each=lambda k: {"RescaleSlope": 0.25 + k / 8, "RescaleIntercept": -k})
        volume = read(tmp_path)
        assert volume.array.dtype == np.float32
        assert_every_pixel_in_place(volume, tmp_path)

    @pytest.mark.parametrize(
        ("tags", "dtype"),
        [
            ({}, np.int16),
            ({"RescaleSlope": "1.00000", "RescaleIntercept": "-1024"}, np.int16),
            ({"RescaleSlope": "40"}, np.int32),
            ({"RescaleIntercept": "-33000"}, np.int32),
            ({"PixelRepresentation": 0}, np.int32),
            ({"RescaleSlope": "1", "RescaleIntercept": "4000000000"}, np.float32),
            ({"RescaleSlope": "0.5"}, np.float32),
            ({"RescaleIntercept": "0.5"}, np.float32),
        ],
    )
    def test_smallest_type_that_is_exact(self, tmp_path: Path, tags: dict[str, Any], dtype: type) -> None:
        write_series(tmp_path, **tags)
        volume = read(tmp_path)
        assert volume.array.dtype == dtype
        for world_mm, values in pixels_in_space(tmp_path):
            i, j, k = np.round(volume.grid.to_index(world_mm)).astype(int).transpose(2, 0, 1)
            np.testing.assert_array_equal(volume.array[0, i, j, k], values.astype(dtype))

    @pytest.mark.parametrize(("signed", "expected"), [(0, [4095, 0, 2049]), (1, [-1, 0, -2047])])
    def test_bits_above_the_high_bit_do_not_count(self, tmp_path: Path, signed: int, expected: list[int]) -> None:
        stored = np.array([[0xFFFF, 0xF000, 0x7801]], dtype="<u2")
        tags = {"BitsStored": 12, "HighBit": 11, "PixelRepresentation": signed, "PixelData": stored.tobytes()}
        write_series(tmp_path, shape=(1, 3), **tags)
        assert read(tmp_path).array[0, :, 0, 0].tolist() == expected

    @pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, RLELossless])
    def test_transfer_syntaxes(self, tmp_path: Path, syntax: str) -> None:
        write_series(tmp_path, syntax=syntax)
        assert_every_pixel_in_place(read(tmp_path), tmp_path)

    @pytest.mark.parametrize("name", ["bigendian", "expb", "implicit", "jp2klossless", "RLE"])
    def test_other_encodings_of_one_signed_image(self, name: str) -> None:
        expected, volume = read(FILES / "MR_small.dcm"), read(FILES / f"MR_small_{name}.dcm")
        assert volume.grid.matches(expected.grid)
        np.testing.assert_array_equal(volume.array, expected.array)

    def test_blank_or_private_identifiers(self, tmp_path: Path) -> None:
        blank = dict.fromkeys(("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"), "")
        write_series(tmp_path, **blank)
        assert_every_pixel_in_place(read(tmp_path), tmp_path)
        assert frame_of_reference(tmp_path) == ""


PALETTE = {"RedPaletteColorLookupTableDescriptor": [256, 0, 16]}
CLASSES = "1.2.840.10008.5.1.4.1.1."
COMPRESSED = {"PixelData": pydicom.encaps.encapsulate([b"1234"]), "syntax": JPEGLSLossless}

REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("missing_slice", r"1 of 6 slices are missing: .* 2\.50 mm apart, but 5\.00 mm", {"slices": [0, 1, 3, 4, 5]}),
    ("irregular_spacing", r"2\.25 to 2\.75 mm apart, and one lies 0\.25 mm", {"slices": [0, 1, 1.9, 3, 4]}),
    ("irregular_spacing", r"3\.00 to 6\.00 mm apart", {"slices": [0, 1, 2, 3, 5, 7, 9], "step_mm": (0, 0, 3)}),
    ("duplicate_positions", r"6 slices lie at only 5 positions .* No usual tag", {"slices": [0, 1, 2, 2, 3, 4]}),
    ("single_slice", "one slice, and neither", {"slices": [0]}),
    (
        "irregular_spacing",
        r"2\.50 to 2\.50 mm apart, and one lies 1\.00 mm",
        {"each": lambda k: {"ImagePositionPatient": [k == 2, 0, 2.5 * k]}},
    ),
    ("irregular_spacing", r"0\.001 mm is allowed", {"slices": [0, 1, 2.35, 3, 4], "step_mm": (0, 0, 0.01)}),
    ("steep_tilt", "stacked 63 degrees off their normal", {"step_mm": (2, 0, 1)}),
    (
        "mixed_orientation",
        r"not parallel: their edges diverge by up to 15\.00 mm",
        {
            "each": lambda k: {"ImageOrientationPatient": ORIENTATIONS["negated" if k == 4 else "axial"]},
            "shape": (10, 1),
        },
    ),
    (
        "mixed_pixel_spacing",
        r"from 0\.7500 to 1\.2500 mm",
        {"each": lambda k: {"PixelSpacing": [0.75 if k else 0.76, 1.25]}},
    ),
    ("mixed_frame_of_reference", "several frames", {"each": lambda k: {"FrameOfReferenceUID": f"1.2.{k}"}}),
    ("duplicate_instances", "4 of 5 files repeat", {"SOPInstanceUID": "1.2.3"}),
    ("multi_frame", "several frames", {"NumberOfFrames": 2}),
    ("multi_frame", "several frames", {"NumberOfFrames": 2, "PerFrameFunctionalGroupsSequence": [Dataset()]}),
    ("no_geometry", "where it lies", {"SharedFunctionalGroupsSequence": [Dataset()], "PixelSpacing": None}),
    ("mosaic", "many slices tiled", {"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}),
    ("color", "color picture", {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}),
    ("color", "color picture", {"PhotometricInterpretation": "PALETTE COLOR"}),
    ("color", "color picture", {"SamplesPerPixel": 3}),
    ("missing_attribute", "does not state Rows", {"Rows": None}),
    ("missing_attribute", "PixelRepresentation,", {"PixelRepresentation": None}),
    ("missing_attribute", "BitsStored and PixelRepresentation", {"BitsStored": None, "PixelRepresentation": None}),
    ("missing_attribute", "SamplesPerPixel and Phot", {"SamplesPerPixel": None, "PhotometricInterpretation": ""}),
    ("missing_attribute", "PhotometricInt", {"PhotometricInterpretation": None, **COMPRESSED}),
    (
        "color",
        "color picture",
        {"PhotometricInterpretation": None, **PALETTE},
    ),
    ("bit_layout", "HighBit is not BitsStored - 1", {"BitsStored": 12}),
    ("bit_layout", "BitsStored does not fit", {"BitsStored": 17, "HighBit": 16}),
    ("bit_layout", "neither 0 nor 1", {"PixelRepresentation": 2}),
    ("bit_layout", "floating-point", {"PixelData": None, "FloatPixelData": bytes(96), "BitsAllocated": 32}),
    ("rescale", "table or no numbers", {"ModalityLUTSequence": [Dataset()]}),
    ("rescale", "table or no numbers", {"RescaleSlope": 0}),
    *[
        (
            "rescale",
            "1 of 5 slices do not state RescaleSlope and RescaleIntercept",
            {"RescaleSlope": 1, "RescaleIntercept": -1024, "each": lambda k, tags=tags: {} if k < 4 else tags},
        )
        for tags in ({"RescaleSlope": None}, {"RescaleIntercept": None}, {"RescaleIntercept": ""})
    ],
    *[
        (
            "picture",
            "do not say where they lie",
            {"SOPClassUID": CLASSES + ending, "ImagePositionPatient": None, **tags},
        )
        for ending, tags in [
            ("7", {"NumberOfFrames": 1}),
            *[(ending, {"NumberOfFrames": 4}) for ending in ("7.2", "3.1", "6.1", "12.1")],
            *[(ending, {}) for ending in ("1", "1.1", "481.1", "77.1.4")],
        ]
    ],
    ("no_geometry", "where it lies", {"SOPClassUID": CLASSES + "128", "ImagePositionPatient": None}),
    ("no_geometry", "where it lies", {"SOPClassUID": "1.3.12.2.1107.5.9.1", "ImagePositionPatient": None}),
    ("not_an_image", "no scan", {"Rows": None, "Columns": None, "PixelData": None, "Modality": "SR"}),
    ("not_an_image", "no scan", {"Modality": "SEG"}),
    ("not_an_image", "no scan", {"Modality": "RTDOSE"}),
    ("no_pixels", "has no pixels", {"PixelData": None}),
    ("no_pixels", "has no pixels", {"PixelData": None, "Rows": None, "Columns": None, "SOPClassUID": ""}),
    ("localizer", "localizer", {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}),
    ("no_geometry", "where it lies", {"each": lambda k: {"ImagePositionPatient": None} if k == 3 else {}}),
    (
        "no_geometry",
        "ImageOrientationPatient is missing and PixelSpacing is missing",
        {"ImageOrientationPatient": None, "PixelSpacing": ""},
    ),
    ("no_geometry", "PixelSpacing is not two positive", {"PixelSpacing": [0, 1]}),
    ("no_geometry", "PixelSpacing is not two positive", {"PixelSpacing": [1, 1, 1]}),
    ("no_geometry", "ImagePositionPatient is not three num", {"ImagePositionPatient": ["1e300", "0", "0"]}),
    ("no_geometry", "is not two perp", {"ImageOrientationPatient": [1, 0, 0, 0.01, 1, 0]}),
    ("no_geometry", "is not two perp", {"ImageOrientationPatient": [1, 0, 0, 0, 1.01, 0]}),
]


class TestRefusals:
    @pytest.mark.parametrize(("reason", "text", "how"), REFUSED, ids=[f"{n}-{r[0]}" for n, r in enumerate(REFUSED)])
    def test_series_is_refused_with_its_reason(
        self, tmp_path: Path, reason: str, text: str, how: dict[str, Any]
    ) -> None:
        write_series(tmp_path, **how)
        (series,) = find_series(tmp_path)
        assert series.grid is None
        assert series.refusal is not None
        assert series.refusal.reason == reason
        with pytest.raises(SeriesRefused, match=text) as caught:
            read(tmp_path)
        assert caught.value.reason == reason
        assert caught.value.path == tmp_path
        assert str(tmp_path) not in str(caught.value)

    def test_several_stacks_in_one_series_name_what_tells_them_apart(self, tmp_path: Path) -> None:
        echoes = {"each": lambda k: {"EchoTime": 5 if k < 5 else 10, "ImagePositionPatient": [0, 0, 2.5 * (k % 5)]}}
        write_series(tmp_path, range(10), **echoes)
        with pytest.raises(
            SeriesRefused, match=r"10 slices lie at only 5 .* differ in EchoTime \(2 values\)"
        ) as caught:
            read(tmp_path)
        assert caught.value.reason == "duplicate_positions"

    def test_slices_of_different_size(self, tmp_path: Path) -> None:
        write_series(tmp_path, each=lambda k: {"Rows": 4 if k else 3})
        with pytest.raises(SeriesRefused, match="columns x rows: 6 x 3, 6 x 4") as caught:
            read(tmp_path)
        assert caught.value.reason == "mixed_matrix"


class TestMissingAttributes:
    """What is missing and says nothing about the pixels is not asked for."""

    @pytest.mark.parametrize(
        "tags",
        [
            {"NumberOfFrames": 0},
            {"NumberOfFrames": ""},
            {"HighBit": None},
            {"PhotometricInterpretation": None},
            {"SamplesPerPixel": None},
            {"Modality": None, "ImageType": None, "FrameOfReferenceUID": None},
        ],
    )
    @pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    def test_enough_is_left(self, tmp_path: Path, tags: dict[str, Any], syntax: str) -> None:
        write_series(tmp_path / "whole", syntax=syntax)
        write_series(tmp_path / "lacking", syntax=syntax, **tags)
        lacking, whole = read(tmp_path / "lacking"), read(tmp_path / "whole")
        assert lacking.grid.matches(whole.grid, 0)
        np.testing.assert_array_equal(lacking.array, whole.array)

    def test_no_frames_and_compressed(self, tmp_path: Path) -> None:
        with silence():
            write_series(tmp_path, syntax=RLELossless, NumberOfFrames=0)
            volume = read(tmp_path)
            assert_every_pixel_in_place(volume, tmp_path)


class TestFolders:
    def test_several_series(self, tmp_path: Path) -> None:
        write_series(tmp_path / "a")
        write_series(tmp_path / "b", [0, 1, 3, 4, 5], SeriesDescription="T2", Modality="MR")
        good, broken = find_series(tmp_path)
        assert (good.refusal, broken.grid) == (None, None)
        assert (broken.modality, broken.description, broken.frame_of_reference_uid) == ("MR", "T2", FRAME)
        with pytest.raises(SeriesRefused, match="Expected one series, found 2, of which 1 can be read") as caught:
            read(tmp_path)
        assert caught.value.reason == "several_series"
        assert_every_pixel_in_place(read(tmp_path, series_uid=good.uid), tmp_path / "a")
        with pytest.raises(SeriesRefused, match="missing"):
            read(tmp_path, series_uid=broken.uid)
        with pytest.raises(UsageError, match="No series here"):
            read(tmp_path, series_uid="1.2.3")

    def test_what_is_no_scan_may_lie_beside_one(self, tmp_path: Path) -> None:
        write_series(tmp_path / "ct", SeriesInstanceUID="1.2.3")
        write_series(tmp_path / "scout", [9], SeriesInstanceUID="1.2.3", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
        write_series(tmp_path / "other scout", [9], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
        write_series(tmp_path / "rt", [0], Modality="RTSTRUCT", Rows=None, Columns=None, PixelData=None)
        write_series(tmp_path / "picture", [0], PhotometricInterpretation="RGB", SamplesPerPixel=3)
        write_series(tmp_path / "dose report", [0], SOPClassUID=f"{CLASSES}7", ImagePositionPatient=None)
        (tmp_path / "README").write_text("not DICOM")
        assert len(find_series(tmp_path)) == 5
        assert_every_pixel_in_place(read(tmp_path), tmp_path / "ct")

    def test_blank_series_uids_count_as_one_series_per_folder(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            write_series(tmp_path / name, SeriesInstanceUID="")
        assert [series.n_slices for series in find_series(tmp_path)] == [5, 5]

    def test_dicomdir_and_real_series_of_pydicom(self) -> None:
        expected: dict[str, int] = {}
        for path in (FILES / "dicomdirtests").rglob("*"):
            if path.is_file() and is_dicom(path) and not path.name.startswith("DICOMDIR"):
                uid = pydicom.dcmread(path, stop_before_pixels=True).SeriesInstanceUID
                expected[uid] = expected.get(uid, 0) + 1
        found = find_series(FILES / "dicomdirtests")
        assert len(found) > 5
        assert all(series.n_slices <= expected[series.uid] for series in found)
        assert {series.uid for series in found} == set(expected)

    def test_frame_of_reference(self, tmp_path: Path) -> None:
        write_series(tmp_path)
        assert frame_of_reference(tmp_path) == FRAME
        with pytest.raises(UsageError, match="series_uid"):
            frame_of_reference(tmp_path, series_uid="1.2.3")

    def test_a_file_stands_for_itself(self, tmp_path: Path) -> None:
        write_series(tmp_path, SliceThickness=2)
        assert read(next(tmp_path.iterdir())).grid.shape == (6, 4, 1)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(UnreadableFile, match="no DICOM file here") as caught:
            read(tmp_path)
        assert caught.value.reason == "no_dicom"
        with pytest.raises(UnreadableFile, match="no such file or folder") as caught:
            find_series(tmp_path / "nowhere")
        assert caught.value.reason == "missing"


class TestDamage:
    @pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
    def test_cut_short_anywhere(self, tmp_path: Path, syntax: str) -> None:
        write_series(tmp_path, syntax=syntax)
        path = sorted(tmp_path.iterdir())[2]
        whole = path.read_bytes()
        closing = 8 if syntax == RLELossless else 0  # a delimiter after the pixels, which holds nothing
        for length in range(len(whole) - closing - 1, 132, -17):
            path.write_bytes(whole[:length])
            with pytest.raises((UnreadableFile, SeriesRefused)):
                read(tmp_path)
            with pytest.raises((UnreadableFile, SeriesRefused)):  # headers alone tell
                choose(tmp_path)

    @pytest.mark.parametrize(("length", "text"), [(-1, "pixels .* are cut short"), (300, "before it names its series")])
    def test_cut_file_is_named_by_its_path_alone(self, tmp_path: Path, length: int, text: str) -> None:
        write_series(tmp_path)
        path = sorted(tmp_path.iterdir())[2]
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(UnreadableFile, match=text) as caught:
            read(tmp_path)
        assert caught.value.path == path
        assert path.name not in str(caught.value)

    def test_file_that_is_replaced_between_header_and_pixels(self, tmp_path: Path) -> None:
        write_series(tmp_path)
        part = find_series(tmp_path)[0].slices[0]
        part.path.write_text("not DICOM")
        with pytest.raises(UnreadableFile, match="is not DICOM"):
            read_pixels(part.path)

    def test_flipped_header_bytes_raise_what_medseg_raises(self, tmp_path: Path) -> None:
        write_series(tmp_path)
        path = sorted(tmp_path.iterdir())[2]
        whole = path.read_bytes()
        chance = random.Random(3)
        good = read(tmp_path)
        for _ in range(60):
            data = bytearray(whole)
            data[chance.randrange(132, len(whole) - 60)] = chance.randrange(256)
            path.write_bytes(data)
            try:
                assert good.grid.matches(read(tmp_path).grid)
            except MedsegError as error:
                assert PATIENT not in str(error)

    def test_odd_values_neither_warn_nor_leak(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        with silence():
            write_series(tmp_path, EchoTime="1" * 20, SeriesInstanceUID=f"1.{PATIENT}", StudyDate="yesterday")
        caplog.clear()
        assert read(tmp_path).grid.shape == (6, 4, 5)
        assert capfd.readouterr() == ("", "")
        assert caplog.text == ""

    def test_number_that_is_none(self, tmp_path: Path) -> None:
        write_series(tmp_path, RescaleSlope="1.0")
        for path in tmp_path.iterdir():
            path.write_bytes(path.read_bytes().replace(b"1.0 ", b"abc ", 1))
        with pytest.raises(SeriesRefused, match="no numbers"):
            read(tmp_path)
