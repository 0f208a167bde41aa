"""Mosaics are refused as such, whichever sign of them is left; slices that look a little alike are not."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pydicom
import pytest
from dicom_files import assert_every_pixel_in_place, write_series
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medseg.errors import SeriesRefused
from medseg.io.dicom_series import find_series, read

Private = tuple[int, str, str, Any]
"""A tag whose block is left to choose, its creator, VR and value."""


def csa_header(name: str, value: str) -> bytes:
    """Return a CSA header of one entry with one value, laid out as Siemens' CSA2."""
    text = value.encode() + b"\0"
    entry = struct.pack("<64si4siii", name.encode(), 1, b"IS\0\0", 6, 1, 77)
    return b"SV10\4\3\2\1" + struct.pack("<II", 1, 77) + entry + struct.pack("<4i", 0, len(text), 77, 0) + text


def csa_header_1(name: str, value: str) -> bytes:
    """Return the same without the mark at its start, as older scanners wrote it."""
    return csa_header(name, value)[8:]


SIGNS: dict[str, list[Private]] = {
    "count": [(0x0019000A, "SIEMENS MR HEADER", "US", 4)],
    "count as text": [(0x0019000A, "SIEMENS MR HEADER", "IS", "4")],
    "type of XA": [(0x00210075, "SIEMENS MR SDI 02", "CS", ["ORIGINAL", "PRIMARY", "M", "MOSAIC"])],
    "type before XA": [(0x00510016, "SIEMENS MR HEADER", "LO", "p2 M/ND/MOSAIC")],
    "CSA header": [(0x00290010, "SIEMENS CSA HEADER", "OB", csa_header("NumberOfImagesInMosaic", "35"))],
    "CSA header 1": [(0x00290010, "SIEMENS CSA HEADER", "UN", csa_header_1("NumberOfImagesInMosaic", "      35"))],
    "grid": [(0x00650050, "Image Private Header", "DS", "9")],
    "frames of a grid": [(0x00650051, "Image Private Header", "SQ", [Dataset()])],
}

SLICES: dict[str, list[Private]] = {
    "count of one": [(0x0019000A, "SIEMENS MR HEADER", "US", 1)],
    "count of another vendor": [(0x0019000A, "GEMS_ACQU_01", "US", 4)],
    "other type": [(0x00210075, "SIEMENS MR SDI 02", "CS", ["ORIGINAL", "PRIMARY", "M", "NONE"])],
    "other text": [(0x00510016, "SIEMENS MR HEADER", "LO", "p2 M/ND/NORM")],
    "CSA header without": [(0x00290010, "SIEMENS CSA HEADER", "OB", csa_header("MosaicRefAcqTimes", "35"))],
    "CSA header of one": [(0x00290010, "SIEMENS CSA HEADER", "OB", csa_header("NumberOfImagesInMosaic", "1"))],
    "grid of one": [(0x00650050, "Image Private Header", "DS", "1")],
}


def write_private(folder: Path, elements: list[Private], *, block: int = 0x10, creators: bool = True) -> None:
    """Write a series of MR with private elements, in explicit VR where a VR counts."""
    write_series(folder, [0], Modality="MR", SliceThickness=4, ImageType=["ORIGINAL", "PRIMARY", "M"])
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        for tag, creator, vr, value in elements:
            if creators:
                data.add_new(tag >> 16 << 16 | block, "LO", creator)
            data.add_new(tag | block << 8, vr, value)
        data.save_as(path)


class TestSigns:
    @pytest.mark.parametrize("sign", SIGNS)
    @pytest.mark.parametrize(("block", "creators"), [(0x10, True), (0x11, True), (0x17, True), (0x10, False)])
    def test_a_sign_is_enough(self, tmp_path: Path, sign: str, block: int, creators: bool) -> None:
        write_private(tmp_path, SIGNS[sign], block=block, creators=creators)
        (series,) = find_series(tmp_path)
        assert series.verdict == "refused"
        with pytest.raises(SeriesRefused, match="many slices tiled into one picture") as caught:
            read(tmp_path)
        assert caught.value.reason == "mosaic"

    @pytest.mark.parametrize("sign", SIGNS)
    def test_implicit_vr(self, tmp_path: Path, sign: str) -> None:
        write_private(tmp_path, SIGNS[sign])
        for path in tmp_path.iterdir():
            data = pydicom.dcmread(path)
            data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
            data.save_as(path, implicit_vr=True, little_endian=True)
        assert find_series(tmp_path)[0].refusal.reason == "mosaic"

    @pytest.mark.parametrize("word", ["MOSAIC", "VFRAME"])
    def test_image_type(self, tmp_path: Path, word: str) -> None:
        """Before anything else that is wrong: a grid of United Imaging has no position."""
        write_series(tmp_path, [0], ImageType=["ORIGINAL", "PRIMARY", "M", word], ImagePositionPatient=None)
        assert find_series(tmp_path)[0].refusal.reason == "mosaic"

    @pytest.mark.parametrize(
        ("spacing", "modality", "reason"),
        [
            ([180, 170], "MR", "mosaic"),
            ([180, 160], "MR", None),  # a whole body, from the side
            ([140, 170], "MR", None),
            ([300, 300], "PT", None),
        ],
    )
    def test_a_field_of_view_of_a_meter_in_both_directions(
        self, tmp_path: Path, spacing: list[int], modality: str, reason: str | None
    ) -> None:
        write_series(tmp_path, [0, 1], shape=(6, 6), PixelSpacing=spacing, Modality=modality)
        refusal = find_series(tmp_path)[0].refusal
        assert (refusal and refusal.reason) == reason


@pytest.mark.parametrize("kind", SLICES)
def test_slices_that_have_the_same_elements_are_read(tmp_path: Path, kind: str) -> None:
    write_private(tmp_path, SLICES[kind])
    assert_every_pixel_in_place(read(tmp_path), tmp_path)


@pytest.mark.realdata
@pytest.mark.parametrize("left", ["CSA", "size"])
def test_a_real_mosaic_without_the_word(realdata: Path, tmp_path: Path, left: str) -> None:
    source = realdata / "dicom/geometry/mr_12bit/In/12bitUnsigned.dcm"
    data = pydicom.dcmread(source)
    data.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
    if left == "size":
        data.remove_private_tags()
    else:
        data.PixelSpacing = [1, 1]
        for tag in [*data.keys()]:
            if tag.group in {0x0019, 0x0051}:
                del data[tag]
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.save_as(tmp_path / "mosaic")
    assert find_series(tmp_path)[0].refusal.reason == "mosaic"
