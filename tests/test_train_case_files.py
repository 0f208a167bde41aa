from __future__ import annotations

import json
import shutil

import nibabel
import numpy as np
import pytest
from datasets import make_balls

from medseg.errors import DatasetError
from medseg.io import load, save
from medseg.train.dataset import read_dataset
from medseg.train.fingerprint import fingerprint

ONE = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "ball": 1}}
TWO = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "ball": 1}}


def made(root, files, **fields):
    """Write empty files and a dataset.json."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "dataset.json").write_text(json.dumps(fields))
    return root


def images(root, **options):
    return {case.name: [str(file.relative_to(root)) for file in case.images] for case in read_dataset(root, **options)}


def refusal(root):
    with pytest.raises(DatasetError) as caught:
        read_dataset(root)
    return str(caught.value)


def test_nnunets_first_version_lists_names_without_the_number_of_the_channel(tmp_path):
    files = [f"imagesTr/{case}_000{channel}.nii.gz" for case in "ab" for channel in (0, 1)]
    labels = [f"labelsTr/{case}.nii.gz" for case in "ab"]
    pairs = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in "ab"]
    root = made(tmp_path, [*files, *labels], modality={"0": "T1", "1": "T2"}, labels={"1": "ball"}, training=pairs)
    assert images(root) == {"a": files[:2], "b": files[2:]}


def test_a_training_list_may_name_the_first_channel_or_each_of_them(tmp_path):
    files = [f"imagesTr/{case}_000{channel}.nii" for case in "ab" for channel in (0, 1)]
    pairs = [{"image": files[0], "label": "labelsTr/a.nii"}, {"image": files[2:], "label": "labelsTr/b.nii"}]
    root = made(tmp_path, [*files, "labelsTr/a.nii", "labelsTr/b.nii"], **TWO, training=pairs)
    assert images(root) == {"a": files[:2], "b": files[2:]}


def test_an_empty_training_list_leaves_the_folders_to_be_read(tmp_path):
    root = made(tmp_path, ["imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"], **ONE, training=[])
    assert images(root) == {"a": ["imagesTr/a_0000.nii.gz"]}


def test_nnunets_field_dataset_names_the_files_of_each_case(tmp_path):
    root = made(
        tmp_path / "here",
        ["scans/x_0000.nrrd", "../shared/y.nii.gz", "marks/x.nii.gz"],
        **TWO,
        dataset={"x": {"images": ["scans/x_0000.nrrd", "../shared/y.nii.gz"], "label": "marks/x.nii.gz"}},
    )
    (case,) = read_dataset(root)
    assert (case.name, case.label) == ("x", root / "marks/x.nii.gz")
    assert case.images == (root / "scans/x_0000.nrrd", root / "../shared/y.nii.gz")


@pytest.mark.parametrize(
    "listed",
    [
        5,
        [],
        {},
        {"a": "scans/a.nii.gz"},
        {"a": {"images": "a.nii"}},
        {"a": {"images": ["a.nii"], "label": ["b.nii", "c.nii"]}},
        {"a": {"images": [1, 2], "label": "b.nii"}},
        {"a": {"images": ["a.nii", "b.nii", "c.nii"], "label": "d.nii"}},
    ],
)
def test_a_field_dataset_that_makes_no_sense_is_refused(tmp_path, listed):
    assert '"dataset" of dataset.json must name the files of each case' in refusal(
        made(tmp_path, [], **TWO, dataset=listed)
    )


@pytest.mark.parametrize("ending", ["nii.gz", ".nii.gz", ".NII.GZ"])
def test_a_file_ending_is_known_with_and_without_its_dot(tmp_path, ending):
    root = made(tmp_path, ["imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "labelsTr/b.nii"], **ONE, file_ending=ending)
    assert images(root) == {"a": ["imagesTr/a_0000.nii.gz"]}


def test_images_may_have_another_ending_than_labels(tmp_path):
    root = make_balls(tmp_path / "balls", cases=3)
    for file in sorted((root / "images").iterdir()):
        save(load(file), file.with_name(file.name.replace(".nii.gz", ".nrrd")))
        file.unlink()
    assert images(root) == {f"case_{case}": [f"images/case_{case}.nrrd"] for case in range(3)}
    assert len(fingerprint(read_dataset(root)).cases) == 3


def test_several_channels_may_lie_along_the_fourth_axis_of_a_file_in_a_folder(tmp_path):
    root = make_balls(tmp_path / "balls", cases=2)
    for file in (root / "images").iterdir():
        image = nibabel.load(file)
        both = np.stack([image.get_fdata()] * 2, axis=-1).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(both, image.affine, image.header), file)
    made(root, [], **TWO)
    assert fingerprint(read_dataset(root)).channels == ("T1", "T2")


def test_what_was_looked_for_and_what_is_there_stands_beside_what_is_missing(tmp_path):
    root = made(
        tmp_path,
        ["imagesTr/a_T1.nii.gz", "imagesTr/ab_0000.nii.gz", "imagesTr/c_0001.nii.gz"]
        + [f"labelsTr/{case}.nii.gz" for case in "abc"],
        **ONE,
    )
    assert refusal(root).splitlines()[1:] == [
        "a: image is missing: looked for a.nii.gz or a_0000.nii.gz in imagesTr; it holds a_T1.nii.gz",
        "b: image is missing: looked for b.nii.gz or b_0000.nii.gz in imagesTr; it holds 3 .nii.gz file(s)",
        "c: image is missing: looked for c.nii.gz or c_0000.nii.gz in imagesTr; it holds c_0001.nii.gz",
    ]
    listed = {"a": {"images": ["scans/a.nii.gz"], "label": "marks/a.nii"}}
    assert refusal(made(tmp_path, ["marks/a.txt"], **ONE, dataset=listed)).splitlines()[1:] == [
        "a: image is missing: there is no folder scans",
        "a: label is missing: looked for a.nii in marks; it holds a.txt",
    ]


@pytest.mark.parametrize(
    ("files", "fields", "said"),
    [
        ([], {}, "there is no folder imagesTr or images beside dataset.json; it holds 1 .json file"),
        (["gt_segmentations/a.nii"], {}, "give the folder in nnUNet_raw"),
        (["scans/a.nii"], {}, "imagesTr or images beside dataset.json; it holds 1 "),
        (["imagesTr/a_0000.nii"], {}, "imagesTr is there, and the folder labelsTr is not"),
        (["images/a.nii", "labels/a.mhd"], {}, "looked for .nii, .nii.gz, .nrrd, .mha in labels; it holds 1 .mhd"),
        (
            ["images/a.nii", "labels/a.nii"],
            {"file_ending": "nrrd"},
            "looked for .nrrd in labels, as file_ending in dat",
        ),
        (["images/a.nii", "labels/.a.nii"], {}, "in labels; it holds nothing"),
        (["images/a.nii", "labels/a.nii"], {"training": [{"image": "a.nii"}]}, "name no image with a label"),
    ],
)
def test_a_dataset_without_a_case_says_what_was_looked_for(tmp_path, files, fields, said):
    text = refusal(made(tmp_path, files, **ONE, **fields))
    assert "1 problem(s): there is no labelled image: " in text
    assert said in text


def test_an_image_of_a_channel_that_dataset_json_does_not_name_is_a_problem(tmp_path):
    root = made(tmp_path, [f"imagesTr/a_000{n}.nii" for n in (0, 1)] + ["labelsTr/a.nii"], **ONE)
    assert "a: there is an image 0001, too; dataset.json names 1 channel(s)" in refusal(root)


def test_label_files_that_a_list_leaves_out_are_said(tmp_path):
    root = make_balls(tmp_path / "balls", cases=3, shape=(4, 4, 4))
    shutil.copy(root / "labels/case_0.nii.gz", root / "labels/._case_9.nii.gz")
    pairs = [{"image": f"images/case_{n}.nii.gz", "label": f"labels/case_{n}.nii.gz"} for n in range(2)]
    made(root, [], **ONE, training=pairs)
    with pytest.warns(UserWarning, match=r"^1 label file\(s\) are not in the list of dataset.json and are left out"):
        assert len(read_dataset(root)) == 2


def test_images_without_labels_and_a_number_of_cases_that_is_not_there_are_said(tmp_path):
    files = ["imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz", "imagesTr/c_0000.nii.gz", "labelsTr/a.nii.gz"]
    with pytest.warns(UserWarning, match=r"2 image\(s\) in imagesTr have no label file .*; numTraining .* is 3, .* 1"):
        read_dataset(made(tmp_path, files, **ONE, numTraining=3))
    (tmp_path / "labelsTr/b.nii.gz").touch()
    (tmp_path / "labelsTr/c.nii.gz").touch()
    assert len(read_dataset(tmp_path).cases) == 3


def test_a_list_written_on_windows_is_read(tmp_path):
    files = ["imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"]
    pairs = [{"image": ".\\imagesTr\\a.nii.gz", "label": ".\\labelsTr\\a.nii.gz"}]
    assert images(made(tmp_path, files, **ONE, training=pairs)) == {"a": files[:1]}
