"""Scores against references, with counts worked out by hand."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import make_grid
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from medseg.errors import DatasetError, GeometryError, InputError, OutputError, UnreadableFile, UsageError
from medseg.io import save
from medseg.labels import make_labels
from medseg.report.metrics import (
    SCORES,
    CaseScores,
    LabelScore,
    Scores,
    compare_labels,
    evaluate_folder,
    write_scores_csv,
)
from medseg.volume import Grid, Volume

TABLE = make_labels([(1, "liver"), (2, "spleen")])
GRID = Grid((6, 2, 1), np.diag([1, 2, 5, 1]))  # voxels of 10 mm³


def labels_of(*rows: str, grid: Grid = GRID) -> Volume:
    """Return labels drawn as one row of digits for each j; a dot is background."""
    values = np.array([[int(digit.replace(".", "0")) for digit in row] for row in rows], dtype=np.uint8)
    return Volume(values.T.reshape(1, *grid.shape), grid)


REFERENCE = labels_of("1111..", "..22..")
PREDICTED = labels_of(".111.3", "1.2.2.")


def test_numbers_by_hand() -> None:
    # Label 1: 3 voxels in common, 1 too many, 1 missed. Dice 6 / 8, IoU 3 / 5, precision and recall 3 / 4.
    # Label 2: 1 in common, 1 too many, 1 missed. Dice 2 / 4, IoU 1 / 3. The 3 is in no table, and so background.
    liver, spleen = compare_labels(PREDICTED, REFERENCE, TABLE)
    assert (liver.value, liver.name) == (1, "liver")
    assert (liver.true_positives, liver.false_positives, liver.false_negatives) == (3, 1, 1)
    assert (liver.dice, liver.iou, liver.precision, liver.recall) == pytest.approx((0.75, 0.6, 0.75, 0.75))
    assert (spleen.true_positives, spleen.false_positives, spleen.false_negatives) == (1, 1, 1)
    assert (spleen.dice, spleen.iou) == pytest.approx((0.5, 1 / 3))


def test_precision_recall_and_volumes_by_hand() -> None:
    # 4 voxels in the reference and 2 of them found: precision 2 / 2, recall 2 / 4; 40, 20 and -20 mm³.
    (score,) = compare_labels(labels_of("11....", "......"), REFERENCE, TABLE[:1])
    assert (score.precision, score.recall) == (1, 0.5)
    assert score.volume_reference_ml == pytest.approx(0.04)
    assert score.volume_predicted_ml == pytest.approx(0.02)
    assert (score.volume_difference_ml, score.volume_error_ml) == pytest.approx((-0.02, 0.02))


def test_too_much_in_one_case_and_too_little_in_another_cancel_in_the_bias_alone() -> None:
    # 20 mm³ too many in one case and 20 mm³ too few in the other.
    much, little = labels_of("111111", "......"), labels_of("11....", "......")
    cases = [
        CaseScores(str(n), tuple(compare_labels(found, REFERENCE, TABLE[:1]))) for n, found in enumerate((much, little))
    ]
    mean = Scores(tuple(cases)).to_dict()["labels"][0]
    assert mean["volume_difference_ml"] == pytest.approx(0)
    assert mean["volume_error_ml"] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("predicted", "reference", "expected"),
    [("......", "......", math.nan), ("11....", "......", 0.0), ("......", "11....", 0.0), ("11....", "11....", 1.0)],
)
def test_structures_that_are_not_there(predicted: str, reference: str, expected: float) -> None:
    (score,) = compare_labels(labels_of(predicted, "......"), labels_of(reference, "......"), TABLE[:1])
    for number in (score.dice, score.iou, score.precision, score.recall):
        assert number == pytest.approx(expected, nan_ok=True)
    assert score.to_dict()["dice"] == (None if math.isnan(expected) else expected)
    assert score.to_dict()["volume_difference_ml"] is not None


def test_labels_keep_the_order_of_the_table() -> None:
    forward, backward = (compare_labels(PREDICTED, REFERENCE, table) for table in (TABLE, TABLE[::-1]))
    assert forward == backward[::-1]
    assert compare_labels(PREDICTED, REFERENCE, ()) == []


@given(*[arrays.arrays(np.int32, (1, 3, 4, 2), elements=st.sampled_from([0, 0, 1, 2, 5, 70_000]))] * 2)
def test_counts_agree_with_a_pass_for_each_label(predicted: np.ndarray, reference: np.ndarray) -> None:
    grid = make_grid("oblique", (3, 4, 2))
    table = make_labels((value, f"label {value}") for value in (70_000, 1, 5, 9))
    for score in compare_labels(Volume(predicted, grid), Volume(reference, grid), table):
        p, r = predicted == score.value, reference == score.value
        counts = (score.true_positives, score.false_positives, score.false_negatives)
        assert counts == ((p & r).sum(), (p & ~r).sum(), (~p & r).sum())


@given(*[arrays.arrays(np.uint8, (1, 3, 4, 2), elements=st.integers(0, 2))] * 2)
def test_dice_is_symmetric_and_iou_follows_from_it(one: np.ndarray, other: np.ndarray) -> None:
    a, b = (Volume(array, make_grid("RAS", (3, 4, 2))) for array in (one, other))
    for forth, back in zip(compare_labels(a, b, TABLE), compare_labels(b, a, TABLE), strict=True):
        assert forth.dice == pytest.approx(back.dice, nan_ok=True)
        assert forth.precision == pytest.approx(back.recall, nan_ok=True)
        assert forth.iou == pytest.approx(forth.dice / (2 - forth.dice), nan_ok=True)


def test_another_grid_is_refused() -> None:
    moved = Grid(GRID.shape, GRID.affine + np.eye(4, k=3))
    with pytest.raises(GeometryError, match="lies on another grid than the reference") as caught:
        compare_labels(labels_of("1.....", "......", grid=moved), REFERENCE, TABLE)
    assert caught.value.reason == "other_grid"


def test_an_image_is_refused() -> None:
    with pytest.raises(InputError, match="one channel of whole numbers"):
        compare_labels(REFERENCE.with_array(REFERENCE.array + 0.5), REFERENCE, TABLE)


@pytest.mark.parametrize("tolerance_mm", [-1.0, math.nan, math.inf])
def test_a_tolerance_that_is_no_distance_is_refused(tolerance_mm: float) -> None:
    volume = Volume(np.ones((1, 2, 2, 2), np.uint8), Grid((2, 2, 2), np.eye(4)))
    with pytest.raises(UsageError, match="A tolerance is a distance in mm"):
        compare_labels(volume, volume, make_labels([(1, "a")]), tolerance_mm=tolerance_mm)


class TestScores:
    def test_means_by_hand(self) -> None:
        # Dice of label 1: 0.75 and 1, mean 0.875. Dice of label 2: 0.5 in one case, not there in the other: mean 0.5.
        # The mean over labels is (0.875 + 0.5) / 2 = 0.6875, not the 0.75 that three scores of cases would give.
        only_liver = labels_of("11....", "......")
        scores = Scores(
            (
                CaseScores("a", tuple(compare_labels(PREDICTED, REFERENCE, TABLE))),
                CaseScores("b", tuple(compare_labels(only_liver, only_liver, TABLE))),
            )
        )
        assert scores.label_means[1]["dice"] == pytest.approx(0.875)
        assert scores.label_means[2]["dice"] == pytest.approx(0.5)
        assert scores.mean["dice"] == pytest.approx(0.6875)
        assert scores.failed == ()

    def test_the_interval_of_a_mean_is_a_bootstrap_over_patients(self) -> None:
        def case(name: str, common: int, group: str = "") -> CaseScores:
            return CaseScores(name, (LabelScore(1, "liver", common, 10 - common, 10 - common, 1.0),), group=group)

        ten = Scores(tuple(case(str(n), n) for n in range(11)))
        low, high = ten.interval(1)
        # The standard error of the mean of 0, 0.1 ... 1 is sqrt(0.1 / 11): 0.0953.
        assert (low, high) == pytest.approx((0.5 - 1.96 * 0.0953, 0.5 + 1.96 * 0.0953), abs=0.02)
        # One case each of two patients, and one of them ten times: as few independent numbers as two.
        two = Scores((case("a", 0), *(case(str(n), 10, "p") for n in range(10))))
        assert two.interval(1) == (0, 1)
        assert math.isnan(Scores(two.cases[1:]).interval(1)[0])
        assert ten.to_dict()["labels"][0]["dice_low"] == low

    def test_means_of_nothing_are_nan_and_none_in_json(self) -> None:
        empty = labels_of("......", "......")
        for scores in (Scores(()), Scores((CaseScores("a", tuple(compare_labels(empty, empty, TABLE))),))):
            assert math.isnan(scores.mean["dice"])
            assert scores.to_dict()["mean"]["dice"] is None
            json.dumps(scores.to_dict(), allow_nan=False)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Return a folder of predictions and one of references: one good, and one of each kind of failure."""
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    predictions.mkdir()
    references.mkdir()
    for name in ("fraction", "good", "grid", "lost", "torn"):
        save(REFERENCE, references / f"{name}.nii.gz")
    save(REFERENCE.with_array(REFERENCE.array * 0.5), predictions / "fraction.nii")
    save(PREDICTED, predictions / "good.nrrd")
    save(REFERENCE.reoriented("LPS"), predictions / "grid.nii.gz")
    (predictions / "torn.nii.gz").write_bytes(b"no scan")
    save(REFERENCE, predictions / "without_reference.nii.gz")
    (predictions / "notes.txt").touch()
    (references / "._good.nii").touch()
    return predictions, references


class TestEvaluateFolder:
    def test_failed_cases_count_and_are_listed(self, folders: tuple[Path, Path]) -> None:
        scores = evaluate_folder(*folders, TABLE)
        assert [case.name for case in scores.cases] == ["fraction", "good", "grid", "lost", "torn"]
        reasons = {"fraction": "not_labels", "grid": "other_grid", "lost": "missing", "torn": "unreadable"}
        assert {case.name: case.failure for case in scores.failed} == reasons
        # Four cases with Dice 0 and one with 0.75 and 0.5.
        assert scores.label_means[1]["dice"] == pytest.approx(0.75 / 5)
        assert scores.label_means[2]["dice"] == pytest.approx(0.5 / 5)
        assert scores.label_means[1]["volume_predicted_ml"] == pytest.approx(0.04 / 5)

    def test_a_failed_case_is_scored_where_the_reference_has_the_label(self, folders: tuple[Path, Path]) -> None:
        table = make_labels([(1, "liver"), (9, "pancreas")])
        liver, pancreas = evaluate_folder(*folders, table).failed[0].labels
        assert (liver.dice, liver.recall, liver.false_negatives) == (0, 0, 4)
        assert math.isnan(pancreas.dice)

    def test_json(self, folders: tuple[Path, Path]) -> None:
        content = json.loads(json.dumps(evaluate_folder(*folders, TABLE).to_dict(), allow_nan=False))
        assert content["mean"]["dice"] == pytest.approx((0.15 + 0.1) / 2)
        assert [(label["value"], label["name"]) for label in content["labels"]] == [(1, "liver"), (2, "spleen")]
        assert content["failed"][0] == {"case": "fraction", "reason": "not_labels"}
        assert content["cases"][1]["case"] == "good"
        assert content["cases"][1]["labels"][0]["true_positives"] == 3
        assert set(SCORES) < set(content["cases"][1]["labels"][0])

    def test_csv(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        table = make_labels([(1, "liver, left"), (9, "pancreas")])
        write_scores_csv(evaluate_folder(*folders, table), tmp_path / "scores.csv")
        with (tmp_path / "scores.csv").open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == 5 * 2
        assert (lines[0]["case"], lines[0]["failure"], lines[0]["name"]) == ("fraction", "not_labels", "liver, left")
        assert (lines[2]["failure"], float(lines[2]["dice"])) == ("", 0.75)
        assert lines[3]["dice"] == ""

    def test_without_a_table_the_values_of_references_and_predictions_are_scored(
        self, folders: tuple[Path, Path]
    ) -> None:
        save(labels_of("44....", "......"), folders[1] / "lost.nii.gz")
        scores = evaluate_folder(*folders)
        assert list(scores.label_means) == [1, 2, 3, 4]  # 3 is in a prediction alone
        assert [score.name for score in scores.cases[0].labels] == ["label 1", "label 2", "label 3", "label 4"]

    def test_without_a_table_what_is_nowhere_in_the_references_was_invented(self, folders: tuple[Path, Path]) -> None:
        save(labels_of("77....", "......"), folders[0] / "lost.nii.gz")
        scores = evaluate_folder(*folders)
        assert scores.label_counts[7] == {"cases": 1, "surface_cases": 1, "missed": 0, "invented": 1}
        assert scores.label_means[7]["dice"] == 0
        for file in folders[1].glob("[a-z]*"):
            save(labels_of("......", "......"), file)
        assert evaluate_folder(*folders).to_dict()["mean"]["invented"] == 4  # 1 to 3 in "good", 7 in "lost"

    def test_too_little_in_one_case_and_too_much_in_another_are_errors_of_volume(self) -> None:
        less, more = labels_of("1.....", "......"), labels_of("111111", "......")
        truth = labels_of("111...", "......")
        liver = TABLE[:1]
        scores = Scores(
            tuple(
                CaseScores(name, tuple(compare_labels(one, truth, liver))) for name, one in (("a", less), ("b", more))
            )
        )
        assert scores.mean["volume_error_ml"] == pytest.approx(2.5 * REFERENCE.grid.voxel_mm3 / 1000)
        assert scores.mean["volume_difference_ml"] == pytest.approx(0.5 * REFERENCE.grid.voxel_mm3 / 1000)

    def test_refuses_a_reference_that_cannot_be_read(self, folders: tuple[Path, Path]) -> None:
        reference = folders[1] / "good.nii.gz"
        reference.write_bytes(b"no scan")
        for table in (TABLE, None):
            with pytest.raises(UnreadableFile, match="could not be read") as caught:
                evaluate_folder(*folders, table)
            assert caught.value.path == reference

    def test_refuses_a_reference_that_is_an_image(self, folders: tuple[Path, Path]) -> None:
        reference = folders[1] / "good.nii.gz"
        save(REFERENCE.with_array(REFERENCE.array * 0.5), reference)
        with pytest.raises(InputError, match="one channel of whole numbers") as caught:
            evaluate_folder(*folders, TABLE)
        assert caught.value.path == reference

    def test_refuses_one_name_twice(self, folders: tuple[Path, Path]) -> None:
        save(REFERENCE, folders[1] / "good.mha")
        with pytest.raises(DatasetError, match="Two files of one name differ only in their ending"):
            evaluate_folder(*folders, TABLE)

    def test_refuses_an_empty_folder_and_one_that_is_not_there(
        self, folders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(DatasetError, match=r"holds no \.nii"):
            evaluate_folder(folders[0], tmp_path / "empty", TABLE)
        with pytest.raises(UsageError, match="one of them is not there"):
            evaluate_folder(tmp_path / "nowhere", folders[1], TABLE)


def test_csv_into_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="could not be written"):
        write_scores_csv(Scores(()), tmp_path / "nowhere" / "scores.csv")


def test_missing_half_of_the_structures_improves_no_mean():
    shape = (12, 12, 12)
    grid = Grid(shape, np.diag([1.0, 2.0, 1.0, 1.0]))
    empty = np.zeros((1, *shape), np.uint8)
    truth, near, far = (empty.copy() for _ in range(3))
    truth[:, 2:6, 2:6, 2:6] = near[:, 3:7, 2:6, 2:6] = far[:, 6:10, 2:6, 2:6] = 1
    labels = make_labels({(1, "ball")})

    def scores(*found):
        compared = [compare_labels(Volume(one, grid), Volume(truth, grid), labels) for one in found]
        return Scores(tuple(CaseScores(str(n), tuple(one)) for n, one in enumerate(compared)))

    all_found, half_missed = scores(far, near), scores(empty, near)
    for key in ("dice", "iou", "precision", "recall", "surface_dice"):
        assert half_missed.mean[key] <= all_found.mean[key]
    for key in ("hd95_mm", "mean_surface_mm"):
        assert half_missed.mean[key] > all_found.mean[key]
    assert half_missed.cases[0].labels[0].hd95_mm == pytest.approx(np.sqrt(11**2 + 22**2 + 11**2))
    row = half_missed.to_dict()["labels"][0]
    assert {key: row[key] for key in ("cases", "surface_cases", "missed", "invented")} == {
        "cases": 2, "surface_cases": 2, "missed": 1, "invented": 0,
    }  # fmt: skip
    assert [one["labels"][0]["status"] for one in half_missed.to_dict()["cases"]] == ["missed", "found"]
    (invented,) = compare_labels(Volume(near, grid), Volume(empty, grid), labels)
    (absent,) = compare_labels(Volume(empty, grid), Volume(empty, grid), labels)
    assert (invented.status, absent.status) == ("invented", "absent")
