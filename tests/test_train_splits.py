from __future__ import annotations

import json

import pytest
from datasets import make_balls

from medseg.errors import DatasetError
from medseg.train.dataset import read_dataset
from medseg.train.loop import train_dataset
from medseg.train.settings import TrainSettings

PAIRS = [
    {"train": ["case_2", "case_3"], "val": ["case_0", "case_1"]},
    {"train": ["case_1", "case_0"], "val": ["case_2", "case_3"]},
]


@pytest.fixture
def root(tmp_path):
    return make_balls(tmp_path / "nnUNet_raw" / "Dataset001_Balls", cases=4, shape=(8, 8, 8))


def write(root, content, name="splits_final.json"):
    text = content if isinstance(content, str) else json.dumps(content)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def add_fields(root, **fields):
    write(root, json.loads((root / "dataset.json").read_text()) | fields, "dataset.json")


def sides(dataset, fold, folds=None):
    return tuple([case.name for case in side] for side in dataset.fold(fold, folds))


def test_nnunets_folds_beside_dataset_json_are_followed(root):
    write(root, PAIRS)
    dataset = read_dataset(root)
    assert dataset.folds == 2
    assert sides(dataset, 0) == (["case_2", "case_3"], ["case_0", "case_1"])
    assert sides(dataset, 1, 2) == (["case_0", "case_1"], ["case_2", "case_3"])
    for fold, folds in ((0, 5), (2, 2), (-1, 2)):
        with pytest.raises(DatasetError, match=rf"Fold {fold} of {folds} is not one of the 2 that came with"):
            dataset.fold(fold, folds)


def test_without_a_list_folds_are_drawn(root):
    dataset = read_dataset(root)
    assert (dataset.splits, dataset.folds) == ((), 5)
    with pytest.raises(DatasetError, match="Fold 0 of 1 cannot be made"):
        dataset.fold(0, 1)  # nothing would be left to train on


@pytest.mark.parametrize("listed", [PAIRS[:1], PAIRS[0]])
def test_one_fold_is_enough_and_is_what_is_trained(root, tmp_path, listed):
    write(root, listed)
    scores = train_dataset(root, tmp_path / "model", budget="1steps", fold="all")
    assert [case.name for case in scores.cases] == ["case_0", "case_1"]
    assert TrainSettings.load(tmp_path / "model/train.json").folds == 1


def test_folds_may_stand_in_the_list_of_training_cases(root):
    pairs = [
        {"image": f"images/case_{n}.nii.gz", "label": f"labels/case_{n}.nii.gz", "fold": 3 + n // 2} for n in range(4)
    ]
    add_fields(root, training=pairs)
    assert sides(read_dataset(root), 1) == (["case_0", "case_1"], ["case_2", "case_3"])
    del pairs[0]["fold"]
    add_fields(root, training=pairs)
    with pytest.warns(UserWarning, match='gives a "fold" to some cases'):
        assert read_dataset(root).folds == 5


def test_a_list_that_is_none_beside_the_field_dataset_is_no_list_of_folds(root):
    rows = {f"case_{n}": {"images": [f"images/case_{n}.nii.gz"], "label": f"labels/case_{n}.nii.gz"} for n in range(4)}
    add_fields(root, training=5, dataset=rows)
    assert read_dataset(root).splits == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ([], "must be a list of folds"),
        ([["a"]], "must be a list of folds"),
        ([{"train": ["case_0"]}], "must be a list of folds"),
        ([{"train": "case_0", "val": ["case_1"]}], "must be a list of folds"),
        ([{"train": [0], "val": [1]}], "must be a list of folds"),
        ([{"train": ["case_0"], "val": ["case_7"]}], r"names 1 case\(s\) that the dataset does not have: case_7"),
        ([{"train": ["case_0"], "val": []}], "Each fold needs cases to train on"),
        ([{"train": ["case_0", "case_1"], "val": ["case_1"]}], "no case on both sides"),
    ],
)
def test_a_list_that_cannot_be_followed_is_refused(root, content, message):
    write(root, content)
    with pytest.raises(DatasetError, match=message):
        read_dataset(root)


def test_a_list_with_a_patient_on_both_sides_is_refused(root):
    write(root, PAIRS)
    write(root, [{"case": f"case_{n}", "group": "p"} for n in (1, 2)], "cases.json")
    with pytest.raises(DatasetError, match="same group of cases.json: case_2 and case_1"):
        read_dataset(root)


def test_what_is_not_followed_is_said(root):
    write(root, [{"train": ["case_0"], "val": ["case_1"]}])
    with pytest.warns(
        UserWarning, match=r"2 case\(s\) are in no fold of the list, so that no fold uses them: case_2, case_3"
    ):
        read_dataset(root)
    (root / "splits_final.json").unlink()
    write(root, PAIRS, "../../nnUNet_preprocessed/Dataset001_Balls/splits_final.json")
    write(root, "", "splits_final.pkl")
    write(root, "", "patients.csv")
    write(root, "", "readme.txt")
    add_fields(root, validation=[{"image": "a.nii", "label": "b.nii"}])
    with pytest.warns(UserWarning) as caught:
        assert read_dataset(root).folds == 5
    (text,) = (str(one.message) for one in caught)
    assert 'the cases of "validation" in dataset.json are not read' in text
    assert "splits_final.json of nnUNet_preprocessed is not read" in text
    assert "patients.csv, splits_final.pkl may list folds or patients and is not read" in text
