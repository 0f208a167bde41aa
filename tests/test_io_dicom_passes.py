"""Passes over one region that interleave are parted or refused; one scan that looks a little like them is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dicom_files import assert_every_pixel_in_place, write_series
from multiframe_files import write_enhanced

from medseg.errors import SeriesRefused
from medseg.io.dicom_series import find_series, read
from medseg.study.find import find_studies

STEP_MM, COUNT = 5.0, 6


def write_passes(folder: Path, shifts_mm: tuple[float, ...], each: Any, **tags: Any) -> None:
    """Write passes of COUNT slices in steps of STEP_MM, each shifted; `each(number, k)` gives elements of a slice."""
    usual = {"SliceThickness": STEP_MM, "InstanceNumber": None, "Modality": "MR"}

    def elements(n: float) -> dict[str, Any]:
        number, k = divmod(int(n), COUNT)
        return {"ImagePositionPatient": [0, 0, shifts_mm[number] + STEP_MM * k], **each(number, k)}

    write_series(folder, range(len(shifts_mm) * COUNT), each=elements, **{**usual, **tags})


def stacks(folder: Path) -> list[tuple[str, int]]:
    """Return verdict and number of slices of every stack of the one study in a folder."""
    (study,) = find_studies(folder)
    return [(one.verdict, one.n_slices) for one in study.series]


WHAT = {
    "contrast agent": lambda p, k: {"ContrastBolusAgent": "agent" if p else None},
    "kernel": lambda p, k: {"ConvolutionKernel": f"B{p}0f"},
    "voltage": lambda p, k: {"KVP": 80 + 20 * p},
    "echo time": lambda p, k: {"EchoTime": 5 + 5 * p},
    "image type": lambda p, k: {"ImageType": ["ORIGINAL", "PRIMARY", "MPR"[p]]},
    "temporal position": lambda p, k: {"TemporalPositionIdentifier": p + 1},
    "repetition time": lambda p, k: {"RepetitionTime": 500 + 100 * p},
    "sequence": lambda p, k: {"SequenceName": f"*ep_b{1000 * p}"},
    "number of the series": lambda p, k: {"SeriesNumber": 3 + p},
    "description": lambda p, k: {"SeriesDescription": f"phase {p}"},
}
"""What passes differ in that no single scan does."""

WHEN = {
    "acquisition": lambda p, k: {"AcquisitionNumber": p + 1},
    "time": lambda p, k: {"AcquisitionTime": f"1200{30 * p:02d}"},
    "times": lambda p, k: {"AcquisitionTime": f"120{p}0{k}.{k}"},
    "date and time": lambda p, k: {"AcquisitionDateTime": f"20261127120{p}0{k}"},
    "frame time": lambda p, k: {"FrameReferenceTime": 30000 * p},
    "content times": lambda p, k: {"ContentTime": f"120{p}0{k}"},
    "instance numbers": lambda p, k: {"InstanceNumber": COUNT * p + k + 1},
    "there and back": lambda p, k: {"InstanceNumber": COUNT * p + (COUNT - k if p % 2 else k + 1)},
    "trigger": lambda p, k: {"TriggerTime": 100 + 300 * p},
    "triggers": lambda p, k: {"TriggerTime": 100 + 300 * p + k},
}
"""When they were taken: a single scan of MR that is taken in passes differs in it, too."""


class TestPhases:
    @pytest.mark.parametrize("sign", [*WHAT, *WHEN])
    @pytest.mark.parametrize("shifts_mm", [(0, 2.5), (2.5, 0), (0, 1.7), (0, 5 / 3, 10 / 3)])
    @pytest.mark.parametrize("modality", ["MR", "CT"])
    def test_each_is_a_stack(self, tmp_path: Path, sign: str, shifts_mm: tuple[float, ...], modality: str) -> None:
        write_passes(tmp_path, shifts_mm, {**WHAT, **WHEN}[sign], Modality=modality)
        if sign == "contrast agent" and len(shifts_mm) == 3:  # two of three share one
            assert {verdict for verdict, _ in stacks(tmp_path)} <= {"refused", "accepted"}
            return
        assert stacks(tmp_path) == [("accepted", COUNT)] * len(shifts_mm)
        with pytest.raises(SeriesRefused, match="passes over one region") as caught:
            read(tmp_path)
        assert caught.value.reason == "interleaved"
        assert find_series(tmp_path)[0].regular_grid is None

    @pytest.mark.parametrize("modality", ["MR", "CT"])
    def test_what_is_numbered_as_one_scan_and_timed_as_two_is_neither(self, tmp_path: Path, modality: str) -> None:
        """Half of one scan would be wrong, as would two passes in one: MR slices may overlap on purpose."""

        def each(number: int, k: int) -> dict[str, Any]:
            return {"AcquisitionTime": f"120{number}{k:02d}", "InstanceNumber": 2 * k + number}

        write_passes(tmp_path, (0, 2.5), each, Modality=modality)
        with pytest.raises(SeriesRefused, match="numbered as one scan, and by AcquisitionTime they are 2") as caught:
            read(tmp_path)
        assert caught.value.reason == "interleaved"
        assert stacks(tmp_path) == [("refused", 2 * COUNT)]

    def test_one_covers_a_part_of_the_other(self, tmp_path: Path) -> None:
        write_passes(
            tmp_path, (0, 2.5), lambda p, k: {"AcquisitionNumber": p + 1} | ({"Rows": 3} if p and k < 2 else {})
        )
        assert ("accepted", COUNT) in stacks(tmp_path)
        assert "repaired" not in {verdict for verdict, _ in stacks(tmp_path)}

    def test_one_lacks_a_slice(self, tmp_path: Path) -> None:
        """Neither is a stack then, and slices of two phases are never interpolated."""
        write_passes(tmp_path, (0, 1.7), WHEN["acquisition"])
        lost = next(one for one in find_series(tmp_path)[0].slices if one.plane is not None and one.plane[2, 3] == 11.7)
        lost.path.unlink()
        assert "repaired" not in {verdict for verdict, _ in stacks(tmp_path)}

    def test_frames(self, tmp_path: Path) -> None:
        write_passes(tmp_path / "single", (0, 2.5), WHAT["echo time"])
        write_enhanced(tmp_path / "single", tmp_path / "enhanced")
        assert stacks(tmp_path / "enhanced") == [("accepted", COUNT)] * 2


class TestOneScan:
    @pytest.mark.parametrize("sign", WHEN)
    def test_mr_that_is_taken_in_passes(self, tmp_path: Path, sign: str) -> None:
        """Every other slice first, as most 2-D sequences do: each slice is as thick as the step, or less."""
        write_passes(tmp_path, (0, 2.5), WHEN[sign], SliceThickness=2.5)
        assert_every_pixel_in_place(read(tmp_path), tmp_path)
        assert stacks(tmp_path) == [("accepted", 2 * COUNT)]

    @pytest.mark.parametrize("modality", ["CT", "PT", "MR"])
    @pytest.mark.parametrize("engines", [2, 3, 4])
    def test_slices_that_several_computers_made_in_turn(self, tmp_path: Path, modality: str, engines: int) -> None:
        def each(n: float) -> dict[str, Any]:
            return {"ContentTime": f"12{int(n) % engines:02d}{int(n) // engines:02d}", "InstanceNumber": n + 1}

        write_series(tmp_path, range(12), step_mm=(0, 0, 2.5), each=each, SliceThickness=2.5, Modality=modality)
        assert_every_pixel_in_place(read(tmp_path), tmp_path)
        assert stacks(tmp_path) == [("accepted", 12)]

    @pytest.mark.parametrize("modality", ["MR", "CT"])
    @pytest.mark.parametrize(
        "each",
        [
            lambda n: {},
            lambda n: {"AcquisitionTime": f"1200{n:02.0f}", "InstanceNumber": n + 1, "AcquisitionNumber": 1},
            lambda n: {"AcquisitionTime": f"1200{20 - n:02.0f}", "InstanceNumber": 20 - n},
            lambda n: {"AcquisitionNumber": 1 + n // 4, "AcquisitionTime": f"12000{n // 4:.0f}"},  # table positions
            lambda n: {"InstanceNumber": (7 * n) % 12},
        ],
    )
    def test_overlapping_reconstructions(self, tmp_path: Path, modality: str, each: Any) -> None:
        """Slices that are thicker than their step, in one sweep or in any order that is not that of passes."""
        write_series(
            tmp_path,
            range(12),
            step_mm=(0, 0, 2.5),
            each=each,
            SliceThickness=5,
            InstanceNumber=None,
            Modality=modality,
        )
        assert_every_pixel_in_place(read(tmp_path), tmp_path)
        assert stacks(tmp_path) == [("accepted", 12)]

    def test_stations_one_after_the_other(self, tmp_path: Path) -> None:
        write_passes(tmp_path, (0, STEP_MM * COUNT), WHEN["acquisition"], Modality="CT")
        assert stacks(tmp_path) == [("accepted", 2 * COUNT)]


class TestWhatIsBroken:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"ImagePositionPatient": None},
            {"PixelRepresentation": None},
            {"HighBit": 3},
            {"RescaleSlope": 0},
            {"PixelData": None},
            {"Rows": None, "PixelData": None, "ImagePositionPatient": None},
            {"PhotometricInterpretation": "RGB"},
        ],
    )
    def test_a_stack_without_a_slice_of_its_own_is_not_whole(self, tmp_path: Path, wrong: dict[str, Any]) -> None:
        write_series(tmp_path, range(8), each=lambda k: wrong if k == 7 else {})
        assert stacks(tmp_path) == [("refused", 8)]

    def test_other_images_of_the_series_do_not_count(self, tmp_path: Path) -> None:
        picture = {"ImageType": ["DERIVED", "SECONDARY"], "PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}
        write_series(tmp_path, range(8), each=lambda k: picture if k == 7 else {})
        assert sorted(stacks(tmp_path)) == [("accepted", 7), ("refused", 1)]

    def test_a_blank_frame_of_reference_is_no_other(self, tmp_path: Path) -> None:
        write_series(tmp_path, range(8), each=lambda k: {"FrameOfReferenceUID": None} if k > 4 else {})
        assert stacks(tmp_path) == [("accepted", 8)]
        assert find_series(tmp_path)[0].frame_of_reference_uid
        assert_every_pixel_in_place(read(tmp_path), tmp_path)
