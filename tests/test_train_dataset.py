from __future__ import annotations

import json
import shutil
import threading

import nibabel
import numpy as np
import pytest
from datasets import make_balls

from medseg.cores import cores
from medseg.errors import DatasetError, ModelError
from medseg.io import load, save
from medseg.model.run import segment_file
from medseg.model.segmenter import Model
from medseg.train import loop
from medseg.train.dataset import Dataset, read_dataset
from medseg.train.dataset_json import Meaning, read_description, read_meaning
from medseg.train.fingerprint import Fingerprint, fingerprint
from medseg.train.loop import plan_dataset, train_dataset
from medseg.train.parallel import side_by_side
from medseg.volume import Grid, Volume


def write(folder, **fields):
    (folder / "dataset.json").write_text(json.dumps(fields))
    return folder


def touch(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_medsegs_own_layout(tmp_path):
    dataset = read_dataset(make_balls(tmp_path / "balls", cases=3))
    assert dataset.name == "balls"
    assert dataset.channels == ("MR",)
    assert [(label.value, label.name) for label in dataset.labels] == [(1, "ball")]
    assert [case.name for case in dataset] == ["case_0", "case_1", "case_2"]
    assert dataset.cases[1].images == (tmp_path / "balls/images/case_1.nii.gz",)


def test_nnunets_raw_layout_with_two_channels(tmp_path):
    write(tmp_path, channel_names={"0": "T1", "1": "FLAIR"}, labels={"background": 0, "lesion": 7}, file_ending=".nrrd")
    touch(*(tmp_path / f"imagesTr/{name}_000{c}.nrrd" for name in "ba" for c in (0, 1)))
    touch(*(tmp_path / f"labelsTr/{name}.nrrd" for name in "ba"), tmp_path / "labelsTr/notes.txt")
    dataset = read_dataset(tmp_path)
    assert dataset.channels == ("T1", "FLAIR")
    assert [(label.value, label.name) for label in dataset.labels] == [(7, "lesion")]
    assert [[file.name for file in case.images] for case in dataset] == [
        ["a_0000.nrrd", "a_0001.nrrd"],
        ["b_0000.nrrd", "b_0001.nrrd"],
    ]


def test_channels_along_the_fourth_axis_are_as_good_as_files_of_their_own(tmp_path):
    apart = make_balls(tmp_path / "apart", cases=3)
    joined = tmp_path / "joined"
    shutil.copytree(apart / "labels", joined / "labelsTr")
    (joined / "imagesTr").mkdir()
    names = [f"case_{case}.nii.gz" for case in range(3)]
    for name in names:
        image = nibabel.load(apart / "images" / name)
        first = image.get_fdata().astype(np.float32)
        nibabel.save(
            nibabel.Nifti1Image(first**2, None, image.header), apart / "images" / name.replace(".", "_0001.", 1)
        )
        shutil.move(apart / "images" / name, apart / "images" / name.replace(".", "_0000.", 1))
        both = nibabel.Nifti1Image(np.stack([first, first**2], axis=-1), image.affine, image.header)
        nibabel.save(both, joined / "imagesTr" / name)
    channels, labels = {"0": "T1", "1": "T2"}, {"1": "ball"}
    write(apart, name="x", channel_names=channels, labels={"ball": 1}, file_ending=".nii.gz")
    pairs = [{"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"} for name in names]
    write(joined, name="x", modality=channels, labels=labels, training=pairs)
    one, other = fingerprint(read_dataset(apart)), fingerprint(read_dataset(joined))
    assert one == other
    scores = train_dataset(joined, tmp_path / "model", budget="1steps", folds=3)
    assert len(scores.cases) == 1
    segment_file(Model.load(tmp_path / "model"), joined / "imagesTr" / names[0], tmp_path / "labels.nii.gz")
    assert load(tmp_path / "labels.nii.gz").grid.matches(load(joined / "labelsTr" / names[0]).grid)


def test_the_decathlons_layout(tmp_path):
    pairs = [{"image": f"./imagesTr/x_{n}.nii.gz", "label": f"./labelsTr/x_{n}.nii.gz"} for n in (2, 1)]
    write(tmp_path, name="Heart", modality={"0": "MRI"}, labels={"0": "background", "1": "atrium"}, training=pairs)
    touch(*(tmp_path / pair[key] for pair in pairs for key in pair))
    dataset = read_dataset(tmp_path)
    assert (dataset.name, dataset.channels, len(dataset)) == ("Heart", ("MRI",), 2)
    assert [case.name for case in dataset] == ["x_1", "x_2"]
    assert [(label.value, label.name) for label in dataset.labels] == [(1, "atrium")]


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ({"background": 0, "2": 1, "3": 2, "1": 3}, {1: "2", 2: "3", 3: "1"}),
        ({"background": 0, "11": 1, "12": 2}, {1: "11", 2: "12"}),
        ({"0": "background", "1": "11", "2": "12"}, {1: "11", 2: "12"}),
        ({"0": "background", "1": "2", "2": "1"}, {1: "2", 2: "1"}),
        ({"background": "0", "11": "1", "liver": "2"}, {1: "11", 2: "liver"}),
        ({"background": 0, "1": "liver", "2": "11"}, {1: "liver", 2: "11"}),
        ({"0": 0, "1": 7}, {7: "1"}),
    ],
)
def test_a_name_of_a_label_may_be_a_number(tmp_path, labels, named):
    content = {"channel_names": {"0": "CT"}, "labels": labels}
    read = read_description(write(tmp_path, **content)).meaning
    assert {label.value: label.name for label in read.labels} == named
    assert read_meaning(tmp_path / "dataset.json") == read


def test_a_name_of_a_region_may_be_a_number(tmp_path):
    labels = {"background": 0, "18": [1, 2], "1": 2, "ignore": 3}
    read = read_description(
        write(tmp_path, channel_names={"0": "CT"}, labels=labels, regions_class_order=[1, 2])
    ).meaning
    assert [(region.name, region.members, region.value) for region in read.regions] == [
        ("18", (1, 2), 1),
        ("1", (2,), 2),
    ]
    assert read.ignore == 3


def test_what_was_drawn_is_said_by_names_that_are_numbers(tmp_path):
    root = make_balls(tmp_path / "balls", cases=2, shape=(4, 4, 4))
    write(root, channel_names={"0": "MR"}, labels={"background": 0, "11": 1, "1": 2})
    (root / "cases.json").write_text(json.dumps([{"case": "case_0", "structures": ["11"]}]))
    assert [case.undrawn for case in read_dataset(root)] == [{2}, set()]


@pytest.mark.realdata
def test_real_datasets_are_read_as_they_are(realdata):
    hippocampus = read_dataset(realdata / "hippocampus_mr")
    assert (len(hippocampus), len(hippocampus.labels)) == (200, 2)
    training, validation = hippocampus.fold(0)
    assert (len(training), len(validation)) == (160, 40)
    assert len(read_dataset(realdata / "head_neck_ct").labels) == 7


def test_cases_json_says_what_was_drawn_and_what_belongs_together(tmp_path):
    root = make_balls(tmp_path / "balls", cases=4)
    rows = [{"case": "case_0", "structures": []}, {"case": "case_1", "group": "p"}, {"case": "case_3", "group": "p"}]
    (root / "cases.json").write_text(json.dumps(rows))
    dataset = read_dataset(root)
    assert [case.undrawn for case in dataset] == [{1}, set(), set(), set()]
    assert [case.group for case in dataset] == ["", "p", "", "p"]
    sides = [dataset.fold(fold, 3)[1] for fold in range(3)]
    assert sorted(case.name for side in sides for case in side) == [case.name for case in dataset]
    assert sum({"case_1", "case_3"} <= {case.name for case in side} for side in sides) == 1
    with pytest.raises(DatasetError, match="4 of them|groups of them"):
        dataset.fold(0, 4)
    with pytest.raises(DatasetError, match="case_0: label values .1. are there, but cases.json says"):
        fingerprint(dataset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be a list"),
        ('[{"structures": []}]', "must be a list"),
        ('[{"case": "nobody"}]', "nobody"),
        ('[{"case": "case_0", "structures": ["liver"]}]', "liver"),
        ('[{"case": "case_0", "structures": []}, {"case": "case_0", "group": "a"}]', "case_0 twice"),
    ],
)
def test_a_cases_json_that_makes_no_sense_is_refused(tmp_path, content, message):
    root = make_balls(tmp_path / "balls", cases=2)
    (root / "cases.json").write_text(content)
    with pytest.raises(DatasetError, match=message):
        read_dataset(root)


def test_an_image_that_is_there_twice_is_a_problem(tmp_path):
    root = make_balls(tmp_path / "balls", cases=3)
    for folder in ("images", "labels"):
        shutil.copy(root / folder / "case_0.nii.gz", root / folder / "case_2.nii.gz")
    with pytest.raises(DatasetError, match="case_2: the image is the same as that of case_0"):
        fingerprint(read_dataset(root))


@pytest.mark.realdata
def test_organs_that_were_not_drawn_are_known_from_real_data(realdata):
    dataset = read_dataset(realdata / "head_neck_ct")
    case = next(case for case in dataset if case.name == "pt_197")
    assert [label.name for label in dataset.labels if label.value in case.undrawn] == ["Esophagus", "Larynx"]
    assert not next(case for case in dataset if case.name == "pt_338").undrawn


def test_folds_are_scikit_learns_shuffled_ones(tmp_path):
    dataset = read_dataset(make_balls(tmp_path / "balls", cases=11, shape=(4, 4, 4)))
    # KFold(5, shuffle=True, random_state=12345).split(range(11)), test indices, worked out by scikit-learn 1.9.1.
    expected = [[0, 3, 7], [6, 10], [8, 9], [1, 4], [2, 5]]
    order = {case.name: place for place, case in enumerate(dataset)}
    for fold, places in enumerate(expected):
        training, validation = dataset.fold(fold)
        assert [order[case.name] for case in validation] == places
        assert {case.name for case in training} == set(order) - {case.name for case in validation}


@pytest.mark.parametrize(("fold", "folds"), [(5, 5), (-1, 5), (0, 12)])
def test_a_fold_that_cannot_be_is_refused(tmp_path, fold, folds):
    dataset = Dataset("x", ("MR",), Meaning(()), tuple(read_dataset(make_balls(tmp_path / "b", 6, (4, 4, 4)))))
    with pytest.raises(DatasetError, match=rf"Fold {fold} of {folds} cannot be made from 6 cases"):
        dataset.fold(fold, folds)


def test_every_missing_file_is_listed(tmp_path):
    folder = make_balls(tmp_path / "balls", cases=3, shape=(4, 4, 4))
    (folder / "images/case_0.nii.gz").unlink()
    (folder / "images/case_2.nii.gz").unlink()
    with pytest.raises(
        DatasetError, match=r"2 problem\(s\):\ncase_0: image is missing: .*\ncase_2: image is missing: "
    ):
        read_dataset(folder)


def test_two_label_files_of_one_name_are_a_problem(tmp_path):
    folder = make_balls(tmp_path / "balls", cases=2, shape=(4, 4, 4))
    description = json.loads((folder / "dataset.json").read_text())
    del description["file_ending"]
    (folder / "dataset.json").write_text(json.dumps(description))
    save(load(folder / "labels/case_1.nii.gz"), folder / "labels/case_1.nii")
    with pytest.raises(DatasetError, match=r"1 problem\(s\):\ncase_1: two label files are called so"):
        read_dataset(folder)


def test_what_a_file_manager_left_is_no_case(tmp_path):
    folder = make_balls(tmp_path / "balls", cases=2, shape=(4, 4, 4))
    (folder / "labels/._case_1.nii.gz").write_bytes(b"resource fork")
    assert [case.name for case in read_dataset(folder)] == ["case_0", "case_1"]


@pytest.mark.parametrize(
    "training", [5, None, ["a"], [{"image": ["a", "b"], "label": "c"}], [{"image": None, "label": "c"}]]
)
def test_a_list_of_training_cases_that_makes_no_sense_is_refused(tmp_path, training):
    with pytest.raises(DatasetError, match="must list pairs of an image and a label"):
        read_dataset(write(tmp_path, modality={"0": "CT"}, labels={"1": "a"}, training=training))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": {"a": 1}}, "must name every channel"),
        ({"channel_names": {"0": "CT", "2": "PET"}, "labels": {"a": 1}}, "must name every channel"),
        ({"channel_names": {"0": "CT"}}, "a value of its own above 0"),
        ({"channel_names": {"0": "CT"}, "labels": {"background": 0}}, "a value of its own above 0"),
        ({"channel_names": {"0": "CT"}, "labels": {"a": 1, "b": 1}}, "a value of its own above 0"),
        ({"channel_names": {"0": "CT"}, "labels": {"a": "b"}}, "label 'a' needs one whole number"),
        ({"channel_names": {"0": "CT"}, "labels": {"a": []}}, "label 'a' needs one whole number"),
        ({"channel_names": {"0": "CT"}, "labels": {"1": True}}, "label '1' needs one whole number"),
        ({"channel_names": {"0": "CT"}, "labels": {"1": None}}, "label '1' needs one whole number"),
        ({"channel_names": {"0": "CT"}, "labels": {"a": "\N{SUPERSCRIPT TWO}"}}, "label 'a' needs one whole number"),
        ({"channel_names": {"0": "CT"}, "labels": {"whole": [1, 2]}}, "regions_class_order must give for each"),
        (
            {"channel_names": {"0": "CT"}, "labels": {"a": [1, 2], "b": 2}, "regions_class_order": [2, 2]},
            "regions_class_order must give",
        ),
        (
            {"channel_names": {"0": "CT"}, "labels": {"a": [1, 2], "b": 2}, "regions_class_order": [1, 3]},
            "regions_class_order must give",
        ),
        ({"channel_names": {"0": "CT"}, "labels": {"a": 1, "ignore": 1}}, '"ignore" must have one value of its own'),
        ({"channel_names": {"0": "CT"}, "labels": {"a": 1, "ignore": [2, 3]}}, '"ignore" must have one value'),
        ({"channel_names": {"0": "CT"}, "labels": {"a": 1, "ignore": 0}}, '"ignore" must have one value'),
        (
            {"channel_names": {"0": "CT"}, "labels": {"a": 1}},
            "there is no labelled image: there is no folder imagesTr or",
        ),
    ],
)
def test_a_dataset_json_that_says_too_little_is_refused(tmp_path, fields, message):
    with pytest.raises(DatasetError, match=message):
        read_dataset(write(tmp_path, **fields))


def test_a_folder_without_a_dataset_json_or_with_a_broken_one_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="dataset.json of the dataset is missing"):
        read_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(DatasetError, match="not valid JSON"):
        read_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(DatasetError, match="one object"):
        read_dataset(tmp_path)


def changed(file, change):
    """Write a volume back with its array changed by a function."""
    volume = load(file)
    save(volume.with_array(change(volume.array.copy())), file)


def test_everything_that_is_wrong_is_in_one_list(tmp_path):
    root = make_balls(tmp_path / "balls", cases=9)
    (root / "images/case_0.nii.gz").unlink()
    (root / "labels/case_1.nii.gz").write_bytes(b"nothing")
    changed(root / "labels/case_2.nii.gz", lambda values: values.astype(np.float32) + 0.5)
    changed(root / "labels/case_3.nii.gz", lambda values: values * 5)
    changed(root / "images/case_3.nii.gz", lambda image: np.where(image > 150, np.inf, image))
    shutil.copy(root / "images/case_4.nii.gz", root / "images/case_5.nii.gz")
    shutil.copy(root / "labels/case_4.nii.gz", root / "labels/case_5.nii.gz")
    image, labels = load(root / "images/case_6.nii.gz"), load(root / "labels/case_6.nii.gz")
    shifted = labels.grid.affine.copy()
    shifted[:3, 3] += 2
    save(Volume(labels.array, Grid(labels.grid.shape, shifted)), root / "labels/case_6.nii.gz")
    save(Volume(image.array * 2, image.grid), root / "images/case_7.nii.gz")
    save(labels, root / "labels/case_7.nii.gz")
    save(Volume(image.array * 3, image.grid), root / "images/case_8.nii.gz")
    save(labels, root / "labels/case_8.nii.gz")
    with pytest.raises(DatasetError) as caught:
        fingerprint(read_dataset(root, check_files=False))
    first, *lines = str(caught.value).splitlines()
    assert first == "The dataset has 8 problem(s):"
    expected = [
        "case_0: image is missing", "case_1: label: The file could not be read",
        "case_2: A label map is one channel of whole numbers", "case_3: the image has voxels that are NaN or infinite",
        "case_3: label values [5] are not in dataset.json", "case_6: Image and labels lie on different grids",
        "case_5: the image is the same as that of case_4", "case_8: the labels are the same as those of case_7",
    ]  # fmt: skip
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
    assert "corners up to 3.46 mm apart" in lines[5]


def test_labels_that_several_images_of_a_patient_share_are_no_problem(tmp_path):
    root = make_balls(tmp_path / "balls", cases=3)
    image = load(root / "images/case_0.nii.gz")
    save(image.with_array(image.array * 2), root / "images/case_2.nii.gz")
    shutil.copy(root / "labels/case_0.nii.gz", root / "labels/case_2.nii.gz")
    with pytest.raises(DatasetError, match="case_2: the labels are the same as those of case_0"):
        fingerprint(read_dataset(root))
    (root / "cases.json").write_text(json.dumps([{"case": f"case_{n}", "group": "p"} for n in (0, 2)]))
    assert len(fingerprint(read_dataset(root)).cases) == 3


def test_what_is_odd_is_a_warning(tmp_path):
    root = make_balls(tmp_path / "balls", cases=4)
    changed(root / "labels/case_1.nii.gz", lambda values: values * 0)
    changed(root / "labels/case_2.nii.gz", lambda values: values * 0)
    changed(root / "images/case_3.nii.gz", lambda image: image * 0)
    content = json.loads((root / "dataset.json").read_text())
    content["labels"]["cube"] = 2
    (root / "dataset.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning) as caught:
        facts = fingerprint(read_dataset(root))
    assert len(facts.cases) == 4
    (text,) = (str(one.message) for one in caught)
    assert "2 case(s) have no labelled voxel: case_1, case_2" in text
    assert "1 case(s) have an image that is constant: case_3" in text
    assert "1 label(s) are in no case: cube" in text


def test_a_case_in_which_nothing_was_drawn_is_meant_to_be_empty(tmp_path):
    root = make_balls(tmp_path / "balls", cases=3)
    changed(root / "labels/case_1.nii.gz", lambda values: values * 0)
    (root / "cases.json").write_text(json.dumps([{"case": "case_1", "structures": []}]))
    assert len(fingerprint(read_dataset(root)).cases) == 3


def test_cases_are_checked_again_when_they_are_others_than_before(tmp_path, monkeypatch):
    root = make_balls(tmp_path / "balls", cases=4)
    plan_dataset(root, tmp_path / "model")
    with monkeypatch.context() as patched:
        patched.setattr(loop, "fingerprint", None)
        plan_dataset(root, tmp_path / "model")  # nothing has changed: nothing is read
    changed(root / "labels/case_1.nii.gz", lambda values: values * 5)
    with pytest.raises(DatasetError, match=r"case_1: label values \[5\]"):
        plan_dataset(root, tmp_path / "model")
    changed(root / "labels/case_1.nii.gz", lambda values: values // 5)
    (root / "images/case_3.nii.gz").unlink()
    (root / "labels/case_3.nii.gz").unlink()
    plan_dataset(root, tmp_path / "model")
    assert len(Fingerprint.load(tmp_path / "model/fingerprint.json").cases) == 3


def test_cases_are_checked_again_when_what_is_said_of_them_changes(tmp_path):
    root = make_balls(tmp_path / "balls", cases=4)
    plan_dataset(root, tmp_path / "model")
    (root / "cases.json").write_text(json.dumps([{"case": "case_1", "structures": []}]))
    with pytest.raises(DatasetError, match=r"case_1: label values \[1\] are there, but cases.json says"):
        plan_dataset(root, tmp_path / "model")
    (root / "cases.json").unlink()
    description = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(description | {"labels": {"cube": 1}}))
    with pytest.raises(ModelError, match="different labels or regions"):
        train_dataset(root, tmp_path / "model", budget="1steps", folds=2)


def test_a_group_that_is_null_is_none(tmp_path):
    root = make_balls(tmp_path / "balls", cases=2, shape=(4, 4, 4))
    (root / "cases.json").write_text(json.dumps([{"case": f"case_{case}", "group": None} for case in range(2)]))
    assert len(read_dataset(root).fold(0, 2)[1]) == 1


def test_cases_are_looked_at_on_the_cores_that_are_given_to_it(monkeypatch):
    together = threading.Barrier(2)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5}, raising=False)
    found = side_by_side(lambda _: (together.wait(10), threading.get_ident()), [None] * 8)
    assert len({thread for _, (_, thread) in found}) == 2
    monkeypatch.delattr("os.sched_getaffinity")
    assert cores() == 64


def test_a_group_that_is_0_is_one(tmp_path):
    root = make_balls(tmp_path / "balls", cases=3, shape=(4, 4, 4))
    (root / "cases.json").write_text(json.dumps([{"case": f"case_{case}", "group": case // 2} for case in range(3)]))
    assert [case.group for case in read_dataset(root)] == ["0", "0", "1"]


def test_a_plan_that_is_brought_along_does_not_spare_the_checks(tmp_path):
    root = make_balls(tmp_path / "balls", cases=3)
    plan_dataset(root, tmp_path / "model")
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "model/plan.json", tmp_path / "other/plan.json")
    (root / "images/case_1.nii.gz").unlink()
    with pytest.raises(DatasetError, match="case_1: image is missing"):
        plan_dataset(root, tmp_path / "other")


def test_a_channel_that_covers_a_part_of_the_first_is_a_warning_that_names_the_case(tmp_path):
    root = make_balls(tmp_path / "balls", cases=3)
    content = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(content | {"channel_names": {"0": "T1", "1": "FLAIR"}}))
    for place in range(3):
        image = load(root / f"images/case_{place}.nii.gz")
        (root / f"images/case_{place}.nii.gz").unlink()
        other = image.with_array(image.array + np.float32(1))
        half = (other.grid.shape[0] // 2, *other.grid.shape[1:])
        for channel, volume in enumerate((image, other.cropped((0, 0, 0), half) if place == 1 else other)):
            save(volume, root / f"images/case_{place}_{channel:04d}.nii.gz", source=None)
    with pytest.warns(UserWarning) as caught:
        fingerprint(read_dataset(root))
    texts = " ".join(str(one.message) for one in caught)
    assert "1 case(s) have a channel that covers a part of the first alone, and is filled up: case_1" in texts
