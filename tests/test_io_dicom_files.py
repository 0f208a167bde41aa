"""DICOM files as they come: what file meta says against what the data are, pixels that nobody decodes, and bombs."""

from __future__ import annotations

import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
import pytest
from dicom_files import some_labels, write_series, write_source
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset, write_file_meta_info
from pydicom.uid import (
    MPEG2MPML,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from medseg.errors import InputError, MedsegError, SeriesRefused, UnreadableFile
from medseg.io import dicom_compressed, dicom_file
from medseg.io.dicom_file import begins_as_dicom, read_data
from medseg.io.dicom_header import parsing
from medseg.io.dicom_seg import load_dicom_seg, save_dicom_seg
from medseg.io.dicom_series import choose, find_series, read
from medseg.io.dicom_slice import read_headers, read_study_uid
from medseg.io.structures import object_kind
from medseg.study.find import find_studies

GE = "1.2.840.113619.5.2"
ENCODINGS = {"implicit": ImplicitVRLittleEndian, "explicit": ExplicitVRLittleEndian, "big": ExplicitVRBigEndian}
PREFIX = bytes(128) + b"DICM"
STUDY = "1.2.826.0.1.3680043.8.498.8"


def elements(data: Dataset, encoding: str) -> bytes:
    """Return a data set in an encoding; its pixels are little-endian in `data`."""
    if encoding == "big" and "PixelData" in data and data.BitsAllocated > 8:
        width = f"u{data.BitsAllocated // 8}"
        data.PixelData = np.frombuffer(data.PixelData, f"<{width}").astype(f">{width}").tobytes()
    file = DicomBytesIO()
    file.is_implicit_VR, file.is_little_endian = encoding == "implicit", encoding != "big"
    write_dataset(file, data)
    return file.getvalue()


def meta(data: Dataset, syntax: str | None) -> bytes:
    file = DicomBytesIO()
    file.is_implicit_VR, file.is_little_endian = False, True
    with warnings.catch_warnings(action="ignore"):
        if syntax is None:
            del data.file_meta.TransferSyntaxUID
        else:
            data.file_meta.TransferSyntaxUID = syntax
        write_file_meta_info(file, data.file_meta, enforce_standard=False)
    return file.getvalue()


def rewrite(
    folder: Path,
    encoding: str,
    syntax: str | None,
    head: bytes = PREFIX,
    change: Callable[[Dataset], None] = lambda data: None,
    pack: Callable[[bytes], bytes] = bytes,
) -> np.ndarray:
    """Write the files of a folder anew: data as `encoding`, file meta that says `syntax`, or none at all for "".

    Returns the stored values in the order of the stack, axes as in volumes.
    """
    truth = {}
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        truth[float(data.ImagePositionPatient[2])] = data.pixel_array.T
        if "PixelData" in data:
            data["PixelData"].VR = "OW"
        change(data)
        said = b"" if syntax == "" else meta(data, syntax)
        path.write_bytes(head + said + pack(elements(data, encoding)))
    return np.stack([truth[z] for z in sorted(truth)], axis=-1)


def refusal(folder: Path) -> MedsegError:
    """Return why the one series of a folder is refused: by its headers and when it is read alike."""
    (series,) = find_series(folder)
    assert series.refusal is not None
    with pytest.raises(SeriesRefused) as caught:
        read(folder)
    assert caught.value.reason == series.refusal.reason
    return caught.value


class TestEncoding:
    """The shortcut to the pixels follows what the parser found."""

    @pytest.mark.parametrize("is_so", ENCODINGS)
    @pytest.mark.parametrize(
        "said",
        [
            *ENCODINGS.values(),
            *(RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1, DeflatedExplicitVRLittleEndian),
        ],
        ids=lambda uid: uid.keyword,
    )
    @pytest.mark.parametrize("shape", [(4, 6), (128, 131)], ids=["small", "large"])
    def test_data_tell_how_they_are_encoded(
        self, tmp_path: Path, is_so: str, said: str, shape: tuple[int, int]
    ) -> None:
        write_series(tmp_path, range(2), shape=shape)
        truth = rewrite(tmp_path, is_so, said)
        np.testing.assert_array_equal(read(tmp_path).array[0], truth)

    @pytest.mark.parametrize("is_so", ENCODINGS)
    @pytest.mark.parametrize("head", [PREFIX, b""], ids=["prefix", "no preamble"])
    @pytest.mark.parametrize("syntax", [None, ""], ids=["no syntax", "no meta"])
    def test_without_preamble_file_meta_or_syntax(
        self, tmp_path: Path, is_so: str, head: bytes, syntax: str | None
    ) -> None:
        write_series(tmp_path, range(2), StudyInstanceUID=STUDY)
        truth = rewrite(tmp_path, is_so, syntax, head)
        np.testing.assert_array_equal(read(tmp_path).array[0], truth)
        path = next(tmp_path.iterdir())
        assert read_study_uid(path) == STUDY
        with path.open("rb") as file:
            assert begins_as_dicom(file)

    @pytest.mark.parametrize("said", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
    @pytest.mark.parametrize("is_so", ENCODINGS)
    @pytest.mark.parametrize("bits", [8, 32])
    def test_other_widths(self, tmp_path: Path, is_so: str, said: str, bits: int) -> None:
        values = np.random.default_rng(bits).integers(0, 2 ** (bits - 1), (4, 6)).astype(f"<i{bits // 8}")
        tags = {"BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1, "PixelData": values.tobytes()}
        write_series(tmp_path, range(2), **tags)

        def words(data: Dataset) -> None:
            data["PixelData"].VR = "OW" if bits > 8 and is_so != "implicit" else "OB"

        rewrite(tmp_path, is_so, said, change=words)
        np.testing.assert_array_equal(read(tmp_path).array[0, ..., 0], values.T)

    @pytest.mark.parametrize(
        ("is_so", "said"), [("explicit", ImplicitVRLittleEndian), ("implicit", ExplicitVRLittleEndian)]
    )
    def test_icons_and_private_elements_around_the_pixels(self, tmp_path: Path, is_so: str, said: str) -> None:
        def decorate(data: Dataset) -> None:
            icon = Dataset()
            icon.Rows = icon.Columns = 2
            icon.BitsAllocated, icon.PixelData = 8, b"\1\2\3\4"
            icon["PixelData"].VR = "OB"
            data.IconImageSequence = [icon]
            data["IconImageSequence"].is_undefined_length = True
            block = data.private_block(0x7FE1, "MADE UP", create=True)
            block.add_new(0x10, "OB", bytes(range(64)))
            data.add(DataElement(0xFFFCFFFC, "OB", bytes(18)))

        write_series(tmp_path, range(3))
        truth = rewrite(tmp_path, is_so, said, change=decorate)
        np.testing.assert_array_equal(read(tmp_path).array[0], truth)

    @pytest.mark.parametrize(("spare", "reason"), [(0, None), (2, "transfer_syntax")])
    @pytest.mark.parametrize("is_so", ["explicit", "big"])
    def test_uncompressed_pixels_of_undefined_length(
        self, tmp_path: Path, is_so: str, spare: int, reason: str | None
    ) -> None:
        order: Literal["little", "big"] = "big" if is_so == "big" else "little"

        def pack(data: bytes) -> bytes:
            start = len(data) - 48
            assert int.from_bytes(data[start - 4 : start], order) == 48
            closing = b"".join(number.to_bytes(2, order) for number in (0xFFFE, 0xE0DD, 0, 0))
            return data[: start - 4] + b"\xff\xff\xff\xff" + data[start:] + bytes(spare) + closing

        write_series(tmp_path)
        truth = rewrite(tmp_path, is_so, ENCODINGS[is_so], pack=pack)
        if reason is None:
            np.testing.assert_array_equal(read(tmp_path).array[0], truth)
        else:
            assert refusal(tmp_path).reason == reason

    def test_compressed_pixels_of_known_length(self, tmp_path: Path) -> None:
        def pack(data: bytes) -> bytes:
            head, pixels = data[:-8].split(b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff")
            return head + b"\xe0\x7f\x10\x00OB\0\0" + struct.pack("<L", len(pixels)) + pixels

        write_series(tmp_path)
        truth = rewrite(tmp_path, "explicit", RLELossless, change=lambda data: data.compress(RLELossless), pack=pack)
        np.testing.assert_array_equal(read(tmp_path).array[0], truth)

    def test_deflated(self, tmp_path: Path) -> None:
        write_series(tmp_path, range(3), shape=(64, 65), StudyInstanceUID=STUDY)
        truth = rewrite(tmp_path, "explicit", DeflatedExplicitVRLittleEndian, pack=deflated)
        np.testing.assert_array_equal(read(tmp_path).array[0], truth)
        assert {read_study_uid(path) for path in tmp_path.iterdir()} == {STUDY}

    def test_big_endian_pixels_of_ge(self, tmp_path: Path) -> None:
        def swap(data: Dataset) -> None:
            data.PixelData = np.frombuffer(data.PixelData, "<i2").astype(">i2").tobytes()

        write_series(tmp_path)
        truth = rewrite(tmp_path, "implicit", GE, change=swap)
        np.testing.assert_array_equal(read(tmp_path).array[0], truth)

    @pytest.mark.parametrize("name", ["a note", "numbers"])
    def test_other_files_are_no_dicom(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        path.write_bytes(b"Study of 200 patients. " * 40 if name == "a note" else struct.pack("<h", 8) * 400)
        assert read_headers(path) == []
        assert read_study_uid(path) is None
        assert object_kind(path) is None
        with parsing(path), pytest.raises(UnreadableFile, match="is not DICOM") as caught:
            read_data(path)
        assert caught.value.reason == "no_dicom"


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def jpeg(bits: int, rows: int = 4, columns: int = 6, marker: int = 0xC1) -> bytes:
    """Return the beginning of a JPEG codestream, up to its size, behind a comment and a filling byte."""
    size = struct.pack(">BBHBHHB", 0xFF, marker, 11, bits, rows, columns, 1)
    return b"\xff\xd8\xff\xfe\x00\x04ab\xff" + size + b"\x01\x11\x00\xff\xd9"


def compressed(frames: list[bytes], **tags: Any) -> Callable[[Dataset], None]:
    def change(data: Dataset) -> None:
        data.PixelData = encapsulate(frames)
        data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
        for name, value in tags.items():
            setattr(data, name, value)

    return change


class TestRefused:
    """Headers alone say what pixels cannot be read, and why."""

    @pytest.mark.parametrize(
        ("syntax", "frame", "available", "reason", "text"),
        [
            (JPEGLSLossless, b"1234", False, "compressed_no_codec", r"\(JPEG-LS Lossless .*medseg\[codecs\]"),
            (RLELossless, b"1234", False, "compressed_no_codec", r"\(RLE Lossless"),
            (JPEGExtended12Bit, jpeg(12), True, "compressed_no_codec", "more than 8 bits.*pylibjpeg-libjpeg"),
            (MPEG2MPML, b"1234", True, "compressed_unknown", r"\(MPEG2 .*no package"),
            ("1.2.840.10008.1.2.1.98", b"1234", True, "compressed_unknown", "Encapsulated Uncompressed"),
            ("1.2.840.10008.1.2.8.1", b"1234", True, "transfer_syntax", "not known"),
            (GE, b"1234", True, "transfer_syntax", "not known"),
            ("1.2.826.1.JANE-DOE", b"1234", True, "transfer_syntax", "not known"),
            (None, b"1234", True, "transfer_syntax", "does not say how"),
            (ExplicitVRLittleEndian, bytes(200), True, "transfer_syntax", "does not say how"),
        ],
    )
    def test_what_is_missing_is_named(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        syntax: str,
        frame: bytes,
        available: bool,
        reason: str,
        text: str,
    ) -> None:
        monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.is_available", available)
        monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.available_plugins", ("gdcm", "pillow"))
        write_series(tmp_path)
        rewrite(tmp_path, "explicit", syntax, change=compressed([frame]))
        told = refusal(tmp_path)
        assert told.reason == reason
        assert re.search(text, str(told))
        assert "JANE" not in str(told)

    def test_twelve_bits_are_read_where_a_decoder_is_installed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.available_plugins", ("pylibjpeg",))
        write_series(tmp_path)
        rewrite(tmp_path, "explicit", JPEGExtended12Bit, change=compressed([jpeg(12)]))
        assert find_series(tmp_path)[0].refusal is None

    @pytest.mark.parametrize("syntax", ["1.2.3.4", GE])
    @pytest.mark.parametrize("is_so", ["explicit", "big"])
    def test_unknown_byte_order(self, tmp_path: Path, syntax: str, is_so: str) -> None:
        write_series(tmp_path)
        rewrite(tmp_path, is_so, syntax)
        assert refusal(tmp_path).reason == "transfer_syntax"

    def test_said_to_be_compressed_and_of_another_length(self, tmp_path: Path) -> None:
        def lengthen(data: Dataset) -> None:
            data.PixelData += bytes(12)

        write_series(tmp_path)
        rewrite(tmp_path, "explicit", RLELossless, change=lengthen)
        assert refusal(tmp_path).reason == "transfer_syntax"

    def test_header_without_pixels(self, tmp_path: Path) -> None:
        write_series(tmp_path, PixelData=None)
        assert refusal(tmp_path).reason == "no_pixels"

    @pytest.mark.parametrize(
        "tags",
        [
            {"BitsAllocated": 12, "BitsStored": 12, "HighBit": 11},
            {"BitsAllocated": 64},
        ],
    )
    def test_bits_that_the_header_does_not_describe(self, tmp_path: Path, tags: dict[str, Any]) -> None:
        write_series(tmp_path, **tags)
        assert refusal(tmp_path).reason == "bit_layout"

    def test_a_slice_that_cannot_be_decoded_is_not_left_out(self, tmp_path: Path) -> None:
        write_series(tmp_path, StudyInstanceUID=STUDY)
        last = max(tmp_path.iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
        data = pydicom.dcmread(last)
        compressed([b"1234"])(data)
        last.write_bytes(PREFIX + meta(data, MPEG2MPML) + elements(data, "explicit"))
        (study,) = find_studies(tmp_path)
        (series,) = study.series
        assert series.n_slices == 5
        assert series.refusal is not None
        assert series.refusal.reason == "compressed_unknown"

    def test_pixels_that_are_cut_short_are_a_damaged_file(self, tmp_path: Path) -> None:
        write_series(tmp_path)
        path = next(tmp_path.iterdir())
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(UnreadableFile, match="pixels .* cut short"):
            find_series(tmp_path)
        (study,) = find_studies(tmp_path)
        assert [problem.path for problem in study.problems] == [path]


def packbits(raw: bytes) -> bytes:
    """Return bytes in RLE: one segment of literal runs (PS3.5 G)."""
    body = b"".join(bytes([len(raw[i : i + 128]) - 1]) + raw[i : i + 128] for i in range(0, len(raw), 128))
    return struct.pack("<16I", 1, 64, *[0] * 14) + body + b"\x80" * (len(body) % 2)


class TestObjects:
    """Objects of labels are files like any other."""

    @pytest.fixture
    def written(self, tmp_path: Path) -> tuple[Path, Path, np.ndarray]:
        source = write_source(tmp_path / "ct")
        labels = some_labels(choose(source)[1], (1, 2, 3))
        (tmp_path / "objects").mkdir()
        path = tmp_path / "objects" / "labels.dcm"
        save_dicom_seg(labels, path, source=source)
        return source, path, labels.array

    def test_binary_frames_in_rle(self, written: tuple[Path, Path, np.ndarray]) -> None:
        source, path, labels = written
        data = pydicom.dcmread(path)
        # 11 x 13 pixels are no whole number of bytes: frames follow bit on bit before, and begin with a byte in RLE.
        masks = np.asarray(data.pixel_array)
        compressed([packbits(np.packbits(mask, bitorder="little").tobytes()) for mask in masks])(data)
        path.write_bytes(PREFIX + meta(data, RLELossless) + elements(data, "explicit"))
        np.testing.assert_array_equal(load_dicom_seg(path, source=source)[0].array, labels)

    @pytest.mark.parametrize(("is_so", "said"), [("implicit", ExplicitVRLittleEndian), ("explicit", RLELossless)])
    def test_encoding_shows(self, written: tuple[Path, Path, np.ndarray], is_so: str, said: str) -> None:
        source, path, labels = written
        data = pydicom.dcmread(path)
        path.write_bytes(PREFIX + meta(data, said) + elements(data, is_so))
        np.testing.assert_array_equal(load_dicom_seg(path, source=source)[0].array, labels)

    @pytest.mark.parametrize("kind", ["no preamble", "deflated"])
    def test_as_they_come(self, written: tuple[Path, Path, np.ndarray], kind: str) -> None:
        source, path, labels = written
        data = pydicom.dcmread(path)
        whole = elements(data, "explicit")
        if kind == "deflated":
            path.write_bytes(PREFIX + meta(data, DeflatedExplicitVRLittleEndian) + deflated(whole))
        else:
            path.write_bytes(whole)
        assert object_kind(path) == "SEG"
        np.testing.assert_array_equal(load_dicom_seg(path, source=source)[0].array, labels)

    def test_a_compression_that_nothing_decodes(self, written: tuple[Path, Path, np.ndarray]) -> None:
        source, path, _ = written
        data = pydicom.dcmread(path)
        compressed([b"12"] * data.NumberOfFrames)(data)
        path.write_bytes(PREFIX + meta(data, MPEG2MPML) + elements(data, "explicit"))
        with pytest.raises(InputError, match="MPEG2") as caught:
            load_dicom_seg(path, source=source)
        assert caught.value.reason == "compressed_unknown"

    def test_frames_that_are_missing(self, written: tuple[Path, Path, np.ndarray]) -> None:
        source, path, _ = written
        data = pydicom.dcmread(path)
        compressed([packbits(bytes(18))])(data)
        path.write_bytes(PREFIX + meta(data, RLELossless) + elements(data, "explicit"))
        with pytest.raises(UnreadableFile, match="fewer frames"):
            load_dicom_seg(path, source=source)


class TestDamaged:
    """Compressed pixels that are not what the header says."""

    @pytest.mark.parametrize(
        ("syntax", "frame", "reason"),
        [
            (JPEGLSLossless, jpeg(16, marker=0xF7, rows=60000, columns=60000), "unreadable"),
            (JPEGLSLossless, jpeg(16, marker=0xF7), "undecodable"),
            (JPEGLSLossless, b"nothing of that kind", "unreadable"),
            (JPEGLSLossless, b"\xff\xd8\xff\xd9", "unreadable"),
            (
                JPEG2000Lossless,
                b"\xff\x4f\xff\x51\x00\x2f\x00\x00" + struct.pack(">4I", 60000, 60000, 0, 0),
                "unreadable",
            ),
            (JPEG2000Lossless, b"\xff\x4f\xff\x51\x00\x2f\x00\x00" + struct.pack(">4I", 7, 5, 1, 1), "undecodable"),
            (JPEG2000Lossless, b"\xff\x4f\xff\x51\x00", "unreadable"),
        ],
    )
    def test_frames_are_looked_at_before_they_are_decoded(
        self, tmp_path: Path, syntax: str, frame: bytes, reason: str
    ) -> None:
        write_series(tmp_path)
        rewrite(tmp_path, "explicit", syntax, change=compressed([frame]))
        with pytest.raises(UnreadableFile) as caught:
            read(tmp_path)
        assert caught.value.reason == reason

    def test_a_short_run_does_not_make_a_large_picture(self, tmp_path: Path) -> None:
        frame = struct.pack("<16I", 2, 64, 66, *[0] * 13) + b"\x81\x00\x81\x00"
        write_series(tmp_path)
        rewrite(tmp_path, "explicit", RLELossless, change=compressed([frame], Rows=8000, Columns=8000))
        with pytest.raises(UnreadableFile, match="another size"):
            read(tmp_path)


class TestMemory:
    """What little files ask for is bounded."""

    def test_compressed_pixels_have_a_largest_size(self, tmp_path: Path) -> None:
        write_series(tmp_path)
        rewrite(tmp_path, "explicit", JPEG2000Lossless, change=compressed([b"1"], Rows=65535, Columns=65535))
        assert refusal(tmp_path).reason == "too_large"

    def test_uncompressed_pixels_must_be_in_the_file(self, tmp_path: Path) -> None:
        write_series(tmp_path, Rows=65535, Columns=65535)
        with pytest.raises(UnreadableFile, match="cut short"):
            find_series(tmp_path)

    @pytest.mark.parametrize("kind", ["one element", "undefined length", "items"])
    def test_deflated_headers_unpack_within_bounds(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        monkeypatch.setattr(dicom_file, "LARGEST_HEADER", 1 << 20)
        monkeypatch.setattr(dicom_file, "MOST_ITEMS", 1000)
        bomb = {
            "one element": b"\x09\x00\x10\x10OB\0\0\0\0\x20\0" + bytes(1 << 21),
            "undefined length": b"\x09\x00\x10\x10OB\0\0\xff\xff\xff\xff" + bytes(1 << 21),
            "items": b"\x09\x00\x10\x10SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\0\xe0\0\0\0\0" * 2000,
        }[kind]

        def pack(data: bytes) -> bytes:
            return deflated(data[: data.index(b"\x08\x00\x60\x00CS")] + bomb)

        write_series(tmp_path, [0])
        rewrite(tmp_path, "explicit", DeflatedExplicitVRLittleEndian, pack=pack)
        (path,) = tmp_path.iterdir()
        for reading in (read_headers, read_study_uid, object_kind):
            with pytest.raises(UnreadableFile, match="unpacks to more") as caught:
                reading(path)
            assert caught.value.reason == "too_large"
        (study,) = find_studies(tmp_path)
        assert [problem.reason for problem in study.problems] == ["too_large"]

    def test_long_elements_of_a_header(self, tmp_path: Path) -> None:
        write_series(tmp_path, [0])
        (path,) = tmp_path.iterdir()
        whole = path.read_bytes()
        at = whole.index(b"\x20\x00\x0e\x00UI")
        path.write_bytes(whole[:at] + b"\x08\x00\x60\x00UT\0\0\0\0\0\x80" + whole[at:])
        with pytest.raises(UnreadableFile, match="256 MB"):
            read_headers(path)

    def test_no_memory_costs_a_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_series(tmp_path, [0, 1])
        hungry = min(tmp_path.iterdir())

        def parse(file: Any, *rest: Any) -> Any:
            if file.name == str(hungry):
                raise MemoryError
            return dicom_file.parse(file, *rest)

        monkeypatch.setattr("medseg.io.dicom_slice.parse", parse)
        (study,) = find_studies(tmp_path)
        assert [(problem.path, problem.reason) for problem in study.problems] == [(hungry, "too_large")]

    def test_limits_are_wide(self) -> None:
        assert dicom_compressed.LARGEST_FRAME > 8192 * 8192
