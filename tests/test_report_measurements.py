"""Measurements of label maps, with numbers worked out by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_grid

from medseg.errors import GeometryError, InputError, OutputError
from medseg.labels import label_map, make_labels
from medseg.report.measurements import measure, save_measurements
from medseg.volume import Grid, Volume

TABLE = make_labels([(1, "liver"), (2, "spleen")])


def labels_on(grid: Grid, **places: tuple[slice, slice, slice]) -> Volume:
    """Return labels with the given values, `v3=np.s_[0:2, 1, :]` meaning that 3 fills that part."""
    array = np.zeros((1, *grid.shape), dtype=np.uint8)
    for value, place in places.items():
        array[0][place] = int(value[1:])
    return Volume(array, grid)


def test_numbers_by_hand() -> None:
    # Voxels of 2 x 1 x 5 = 10 mm³. Label 1 fills i = 1..3, j = 0..1, k = 2: 6 voxels, 60 mm³ = 0.06 ml. Its middle is
    # the index (2, 0.5, 2), in world (10 - 2 * 2, 20 + 0.5, 30 + 5 * 2) = (6, 20.5, 40), as i runs to the left.
    grid = Grid((5, 4, 3), np.array([[-2, 0, 0, 10], [0, 1, 0, 20], [0, 0, 5, 30], [0, 0, 0, 1]]))
    labels = labels_on(grid, v1=np.s_[1:4, 0:2, 2], v7=np.s_[0, 3, 0])
    liver, spleen, unknown = measure(labels, TABLE)
    assert (liver.value, liver.name, liver.voxels) == (1, "liver", 6)
    assert liver.volume_ml == pytest.approx(0.06)
    assert liver.centroid_mm == pytest.approx((6, 20.5, 40))
    assert (liver.intensity_mean, liver.intensity_std) == (None, None)
    assert spleen.to_dict() == {
        "value": 2, "name": "spleen", "voxels": 0, "volume_ml": 0.0,
        "centroid_mm": None, "intensity_mean": None, "intensity_std": None,
        "intensity_min": None, "intensity_max": None, "expected_volume_ml": None,
    }  # fmt: skip
    assert (unknown.value, unknown.name, unknown.voxels) == (7, "label 7", 1)
    assert unknown.centroid_mm == pytest.approx((10, 23, 30))


def test_intensities_by_hand() -> None:
    # 1, 2, 3, 6: the mean is 12 / 4 = 3, the deviations -2, -1, 0, 3, and their mean square 14 / 4 = 3.5.
    grid = make_grid("RAS", (4, 1, 2))
    image = Volume(np.array([[1, 2, 3, 6], [-1000] * 4], dtype=np.int16).T.reshape(1, 4, 1, 2), grid)
    measured = measure(labels_on(grid, v2=np.s_[:, :, 0]), TABLE, image)
    assert measured[1].intensity_mean == pytest.approx(3)
    assert measured[1].intensity_std == pytest.approx(3.5**0.5)
    assert (measured[1].intensity_min, measured[1].intensity_max) == (1, 6)
    assert measured[0].intensity_mean is None
    json.dumps([one.to_dict() for one in measured], allow_nan=False)


def test_the_first_channel_is_measured_and_flat_intensities_do_not_deviate() -> None:
    grid = make_grid("RAS", (3, 3, 3))
    image = Volume(np.stack([np.full(grid.shape, 0.1), np.zeros(grid.shape)]), grid)
    (one,) = measure(labels_on(grid, v1=np.s_[:]), TABLE[:1], image)
    assert one.intensity_mean == pytest.approx(0.1)
    assert one.intensity_std == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_intensities_that_are_no_numbers_are_not_known(tmp_path: Path, number: float) -> None:
    grid = make_grid("RAS", (4, 1, 1))
    labels = Volume(np.array([1, 1, 2, 2], np.uint8).reshape(1, 4, 1, 1), grid)
    image = Volume(np.array([number, 1, 2, 4], np.float32).reshape(1, 4, 1, 1), grid)
    liver, spleen = measure(labels, TABLE, image)
    assert (liver.voxels, liver.intensity_mean, liver.intensity_std) == (2, None, None)
    assert (liver.intensity_min, liver.intensity_max) == (None, None)
    assert (spleen.intensity_mean, spleen.intensity_min, spleen.intensity_max) == (3, 2, 4)
    save_measurements([liver, spleen], tmp_path / "rows.json")


@pytest.mark.parametrize("word", ["LPS", "SAR", "PIR"])
def test_the_way_of_storing_changes_nothing(grid: Grid, word: str) -> None:
    values = np.random.default_rng(3).integers(0, 4, size=(1, *grid.shape))
    labels = Volume(values, grid)
    image = labels.with_array(np.random.default_rng(4).normal(size=values.shape))
    here, there = measure(labels, TABLE, image), measure(labels.reoriented(word), TABLE, image.reoriented(word))
    for one, other in zip(here, there, strict=True):
        assert (one.value, one.name, one.voxels) == (other.value, other.name, other.voxels)
        assert one.centroid_mm == pytest.approx(other.centroid_mm)
        assert one.intensity_std == pytest.approx(other.intensity_std)


def test_values_of_any_size_and_kind() -> None:
    grid = make_grid("RAS", (2, 1, 1))
    for dtype, value in ((np.uint64, 2**31 - 1), (np.int32, 70_000), (np.float32, 300), (bool, 1)):
        labels = Volume(np.array([0, value], dtype=dtype).reshape(1, 2, 1, 1), grid)
        assert [(one.value, one.voxels) for one in measure(labels, ())] == [(value, 1)]
    labels = Volume(np.array([0, 2**31], dtype=np.uint64).reshape(1, 2, 1, 1), grid)
    with pytest.raises(InputError, match="at most 2147483647, and the labels have 2147483648"):
        measure(labels, ())


def test_nothing_found() -> None:
    empty = labels_on(make_grid("RAS"))
    assert measure(empty, ()) == []
    assert [one.voxels for one in measure(empty, TABLE)] == [0, 0]


def test_an_image_on_another_grid_is_refused() -> None:
    labels = labels_on(make_grid("RAS", (3, 3, 3)), v1=np.s_[:])
    image = Volume(np.zeros((1, 3, 3, 3)), make_grid("LAS", (3, 3, 3)))
    with pytest.raises(GeometryError, match="image and the labels lie on different grids"):
        measure(labels, TABLE, image)


@pytest.mark.parametrize(
    "array", [np.full((1, 2, 2, 2), 0.5), np.full((1, 2, 2, 2), np.nan), np.full((1, 2, 2, 2), np.inf),
              np.full((1, 2, 2, 2), -1), np.full((1, 2, 2, 2), -1.0), np.zeros((2, 2, 2, 2), dtype=int)],
)  # fmt: skip
def test_what_is_no_label_map_is_refused(array: np.ndarray) -> None:
    with pytest.raises(InputError, match="one channel of whole numbers from 0") as caught:
        measure(Volume(array, make_grid("RAS", (2, 2, 2))), TABLE)
    assert caught.value.reason == "not_labels"


def test_whole_numbers_are_not_copied() -> None:
    labels = labels_on(make_grid("RAS"), v1=np.s_[0])
    assert np.shares_memory(label_map(labels), labels.array)


def test_measurements_as_csv_and_json(tmp_path: Path) -> None:
    grid = make_grid("RAS", (3, 3, 3))
    rows = measure(labels_on(grid, v1=np.s_[:2]), TABLE, Volume(np.ones((1, 3, 3, 3)), grid))
    save_measurements(rows, tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == json.loads(json.dumps([row.to_dict() for row in rows]))
    save_measurements(rows, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        liver, spleen = csv.DictReader(file)
    assert (liver["name"], liver["voxels"], liver["intensity_max"]) == ("liver", "18", "1.0")
    assert [float(liver[name]) for name in ("x_mm", "y_mm", "z_mm")] == pytest.approx(rows[0].centroid_mm)
    assert (spleen["voxels"], spleen["x_mm"], spleen["intensity_mean"]) == ("0", "", "")
    with pytest.raises(OutputError, match=r"ends in \.json or \.csv"):
        save_measurements(rows, tmp_path / "rows.txt")
