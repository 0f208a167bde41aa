from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from datasets import make_balls, make_shells, small_plan

from medseg.io import load, save
from medseg.train.cache import prepare_cases
from medseg.train.dataset import read_dataset
from medseg.train.loop import train_dataset
from medseg.train.small_parts import keep_parts, lost_parts
from medseg.volume import Grid, Volume

FINE = Grid((20, 10, 10), np.diag([0.4, 0.4, 0.4, 1]))
COARSE = Grid((8, 4, 4), np.diag([1.0, 1.0, 1.0, 1]))


def numbers(*voxels, grid=FINE):
    values = np.zeros(grid.shape, np.int8)
    for number, *slices in voxels:
        values[tuple(slices)] = number
    return values


def test_a_part_without_a_voxel_of_its_own_is_lost_and_counted():
    # At 0.4 mm voxels 5 and 6 lie at 2.0 and 2.4 mm, nearest to 2; 8 and 9 at 3.2 and 3.6 mm, to 3 and 4.
    source = numbers((1, slice(5, 7), 5, 5), (1, slice(8, 10), 0, 0), (2, 15, 5, 5))
    target = numbers((1, 3, 0, 0), grid=COARSE)
    one, two = lost_parts(source, FINE, target, COARSE)
    assert (one.row, two.row) == ((1, 1, 2, 2, 4), (2, 1, 1, 1, 1))
    assert [places.tolist() for places in (*one.places, *two.places)] == [[[2, 2, 2], [2, 2, 2]], [[6, 2, 2]]]


def test_voxels_that_touch_at_a_corner_are_one_part():
    source = numbers((1, 5, 5, 5), (1, 6, 6, 6))
    assert not list(lost_parts(source, FINE, numbers((1, 2, 2, 2), grid=COARSE), COARSE))
    (lost,) = lost_parts(source, FINE, numbers(grid=COARSE), COARSE)
    assert lost.row == (1, 1, 1, 2, 2)


def test_on_the_same_voxels_nothing_is_lost_and_ignored_voxels_are_no_part():
    source = numbers((1, 5, 5, 5), (-1, 0, 0, 0))
    flipped = FINE.reoriented("LPS")
    assert not list(lost_parts(source, FINE, Volume(source[None], FINE).reoriented("LPS").array[0], flipped))
    assert [one.number for one in lost_parts(source, FINE, numbers(grid=COARSE), COARSE)] == [1]


def test_each_lost_part_gets_a_voxel_of_background_where_there_is_one():
    source = numbers((1, 5, 5, 5), (2, slice(2, 4), 0, 0), (3, slice(3, 5), 2, 0))
    target = numbers((4, 1, 0, 0), grid=COARSE)
    # 2 lies in voxel 1 of the coarse grid (0.8 and 1.2 mm), which 4 has; 3 in 1 and 2, at j = 1.
    assert keep_parts(target, list(lost_parts(source, FINE, target, COARSE))) == []
    assert target[2, 2, 2] == 1
    assert target[1, 0, 0] == 2  # there is no other
    assert (target == 3).sum() == 1


def test_two_lost_parts_in_one_voxel_do_not_take_it_from_each_other():
    source = numbers((1, slice(3, 5), 0, 0), (2, slice(3, 5), 1, 0))  # 1.2 and 1.6 mm: voxels 1 and 2 of both
    target = numbers(grid=COARSE)
    keep_parts(target, list(lost_parts(source, FINE, target, COARSE)))
    assert sorted(target[target > 0].tolist()) == [1, 2]


def test_what_lies_outside_stays_lost():
    source = numbers((1, 19, 9, 9), (1, 5, 5, 5))
    target = np.zeros((3, 3, 3), np.int8)
    (lost,) = lost_parts(source, FINE, target, Grid((3, 3, 3), COARSE.affine))
    (outside,) = keep_parts(target, [lost])
    assert (lost.row[1], outside.row[1], target.sum()) == (2, 1, 1)


@pytest.fixture
def root(tmp_path):
    """A dataset with one fine scan, in which one lesion of two is smaller than half a voxel of the others."""
    root = make_balls(tmp_path / "balls", cases=4)
    shape = (44, 40, 36)
    values = np.zeros((1, *shape), np.uint8)
    values[0, 10:20, 10:20, 10:20] = 1
    values[0, 30, 30, 30] = 1
    image = np.random.default_rng(0).normal(100, 15, (1, *shape)).astype(np.float32)
    grid = Grid(shape, np.diag([0.4, 0.4, 0.4, 1]))
    save(Volume(image, grid), root / "images/fine.nii.gz")
    save(Volume(values, grid), root / "labels/fine.nii.gz")
    return root


def test_a_lesion_that_is_lost_is_said_by_case_and_label_each_time(root, tmp_path):
    dataset = read_dataset(root)
    plan = small_plan(dataset)
    for _ in range(2):  # prepared, and from the cache
        with pytest.warns(UserWarning, match=r"fine: ball \(1 of 2 parts, 1 of 1001 voxels\)\. Make spacing_mm"):
            prepare_cases(dataset.cases, plan, tmp_path / "cache")
    with pytest.warns(UserWarning, match=r"fine: ball \(1 of 2 parts"):
        train_dataset(root, tmp_path / "model", budget="1steps", folds=2, fold=1)


def test_a_small_part_is_kept_where_the_plan_says_so(root, tmp_path):
    dataset = read_dataset(root)
    plan = small_plan(dataset).model_copy(update={"keep_small": True})
    (case,) = [one for one in dataset if one.name == "fine"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (kept,) = prepare_cases([case], plan, tmp_path / "cache")
    assert not len(kept.lost)
    target = kept.target[:]
    with pytest.warns(UserWarning, match="fine: ball"):
        (without,) = prepare_cases([case], plan.model_copy(update={"keep_small": False}), tmp_path / "cache")
    assert (target != without.target[:]).sum() == 1


def test_what_was_not_drawn_is_not_lost_and_a_region_is_named(tmp_path):
    root = make_shells(tmp_path / "shells", cases=2)
    label = load(root / "labels/case_0.nii.gz")
    values = label.array.copy()
    values[0, 0, 0, 0] = 2
    save(label.with_array(values), root / "labels/case_0.nii.gz")
    dataset = read_dataset(root)
    plan = small_plan(dataset).model_copy(update={"spacing_mm": (1.7, 1.7, 1.7)})
    with pytest.warns(UserWarning, match=r"case_0: ball, core \(1 of \d parts, 1 of \d+ voxels\)"):
        prepare_cases(dataset.cases[:1], plan, tmp_path / "cache")
    flat = make_balls(tmp_path / "balls", cases=2)
    labels = load(flat / "labels/case_0.nii.gz")
    save(labels.with_array(labels.array * 0), flat / "labels/case_0.nii.gz")
    (flat / "cases.json").write_text(json.dumps([{"case": "case_0", "structures": []}]))
    dataset = read_dataset(flat)
    prepare_cases(dataset.cases, small_plan(dataset), tmp_path / "cache")
