from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models import UNSCALED, threshold_model

from medseg.errors import UsageError
from medseg.io import load, save
from medseg.io.scans import scans_of, split_ending
from medseg.model.plan import Channel
from medseg.model.run import segment_folder
from medseg.report.metrics import evaluate_folder
from medseg.volume import Grid, Volume

GRID = Grid((16, 16, 8), np.eye(4))


def names(files, channels):
    return {
        scan.name: ([file.name for file in scan.files], scan.is_complete)
        for scan in scans_of(map(Path, files), channels)
    }


def write(folder, *file_names):
    folder.mkdir(exist_ok=True)
    for place, name in enumerate(sorted(file_names)):
        image = np.zeros((1, *GRID.shape), np.float32)
        image[0, 4:8, 4:8, place % 4 : place % 4 + 3] = 100
        save(Volume(image, GRID), folder / name)
    return folder


def model_of(channels):
    return threshold_model(
        50, channels=tuple(Channel(name=f"C{number}", normalization=UNSCALED) for number in range(channels))
    )


@pytest.mark.parametrize(
    ("file_name", "parts"),
    [
        ("a.nii.gz", ("a", ".nii.gz")),
        ("a.b_0000.NII", ("a.b_0000", ".NII")),
        ("a.mhd", ("a", ".mhd")),
        ("a.txt", ("a.txt", "")),
    ],
)
def test_the_ending_of_a_volume_is_the_longest_that_fits(file_name, parts):
    assert split_ending(file_name) == parts


@pytest.mark.parametrize(
    ("files", "channels", "scans"),
    [
        (["a_0000.nii.gz"], 1, {"a": (["a_0000.nii.gz"], True)}),
        (["a.nii", "b_0000.nii"], 1, {"a": (["a.nii"], True), "b": (["b_0000.nii"], True)}),
        (["a_0001.nrrd", "a_0000.nii.gz"], 2, {"a": (["a_0000.nii.gz", "a_0001.nrrd"], True)}),
        (["a_0000_0000.nii", "a_0000_0001.nii"], 2, {"a_0000": (["a_0000_0000.nii", "a_0000_0001.nii"], True)}),
        (["a.nii"], 2, {"a": (["a.nii"], True)}),  # all channels along its fourth axis
        (["a_0000.nii"], 2, {"a": (["a_0000.nii"], False)}),
        (["a_0001.nii"], 2, {"a": (["a_0001.nii"], False)}),
        (["a_0000.nii", "a_0001.nii"], 1, {"a": (["a_0000.nii", "a_0001.nii"], False)}),
        (["a_0000.nii", "a_0002.nii"], 2, {"a": (["a_0000.nii", "a_0002.nii"], False)}),
        (["a_0000.nii", "a_0000.nrrd"], 1, {"a": (["a_0000.nii", "a_0000.nrrd"], False)}),
        # Numbers of scans, not of channels.
        (["a_0001.nii", "a_0002.nii"], 1, {f"a_000{n}": ([f"a_000{n}.nii"], True) for n in (1, 2)}),
        (["a_2024.nii"], 2, {"a_2024": (["a_2024.nii"], True)}),
        ([f"a_{n:04d}.nii" for n in range(12)], 1, {f"a_{n:04d}": ([f"a_{n:04d}.nii"], True) for n in range(12)}),
        (["a_00000.nii", "_0000.nii"], 1, {"a_00000": (["a_00000.nii"], True), "_0000": (["_0000.nii"], True)}),
    ],
)
def test_files_of_one_name_that_are_numbered_as_channels_are_one_scan(files, channels, scans):
    assert names(files, channels) == scans


def test_a_folder_of_channels_is_segmented_into_one_label_map_a_case(tmp_path):
    images = write(tmp_path / "imagesTs", *(f"{case}_000{number}.nii.gz" for case in "ab" for number in (0, 1)))
    outcomes = list(segment_folder(model_of(2), images, tmp_path / "out"))
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert outcomes[0].source == (images / "a_0000.nii.gz", images / "a_0001.nii.gz")
    assert sorted(file.name for file in (tmp_path / "out").glob("*.nii.gz")) == ["a.nii.gz", "b.nii.gz"]
    first = load(images / "b_0000.nii.gz").array > 50
    np.testing.assert_array_equal(load(tmp_path / "out/b.nii.gz").array, first)


def test_label_maps_of_a_folder_are_found_by_the_names_of_the_cases(tmp_path):
    images = write(tmp_path / "imagesTr", "a_0000.nii.gz", "b.nii.gz")
    for name in "ab":
        image = load(images / ("a_0000.nii.gz" if name == "a" else "b.nii.gz"))
        (tmp_path / "labelsTr").mkdir(exist_ok=True)
        save(image.with_array((image.array > 50).astype(np.uint8)), tmp_path / f"labelsTr/{name}.nii.gz")
    assert not [one for one in segment_folder(model_of(1), images, tmp_path / "out") if one.error]
    scores = evaluate_folder(tmp_path / "out", tmp_path / "labelsTr")
    assert [(case.name, case.failure, case.labels[0].dice) for case in scores.cases] == [("a", None, 1), ("b", None, 1)]


def test_a_scan_with_other_channels_than_the_model_is_refused_and_the_others_are_not(tmp_path):
    images = write(tmp_path / "in", "a_0000.nii", "b_0000.nii", "b_0001.nii", "c_0000.nii", "c_0001.nii", "c_0002.nii")
    found = {outcome.target.name: outcome.error for outcome in segment_folder(model_of(2), images, tmp_path / "out")}
    assert found["b.nii"] is None
    assert {name: error.reason for name, error in found.items() if error} == {"a.nii": "channels", "c.nii": "channels"}
    assert "have the numbers 0000, and the channels of the model are 0000 (C0), 0001 (C1)" in str(found["a.nii"])
    assert "have the numbers 0000, 0001, 0002," in str(found["c.nii"])
    assert sorted(file.name for file in (tmp_path / "out").glob("*.nii")) == ["b.nii"]


def test_two_scans_of_one_name_are_refused(tmp_path):
    images = write(tmp_path / "in", "a_0000.nii.gz", "a.nii.gz")
    with pytest.raises(UsageError, match="Two scans would give one output"):
        list(segment_folder(model_of(1), images, tmp_path / "out"))
