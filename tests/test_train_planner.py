from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from datasets import make_balls
from hypothesis import given
from hypothesis import strategies as st

from medseg.errors import DatasetError, ModelError
from medseg.io import load, save
from medseg.labels import make_labels
from medseg.process.normalize import CTNormalization, ZScore
from medseg.train.architectures import topology
from medseg.train.dataset import read_dataset
from medseg.train.fingerprint import CaseFacts, Fingerprint, Intensities, fingerprint
from medseg.train.planner import (
    FIXED,
    explain,
    first_patch,
    make_plan,
    mirror_axes,
    normalization,
    target_spacing,
)
from medseg.train.sides import LabelPlace

NUMBERS = Intensities(mean=40, std=20, percentile_00_5=-60, percentile_99_5=120)


def facts(spacing, shape, nonzero=1.0, box=None):
    return CaseFacts(name="x", shape=shape, spacing_mm=spacing, box=box or shape, nonzero=nonzero, label_voxels={1: 10})


def fingerprint_of(cases, channel="MR"):
    labels = make_labels([(1, "organ")])
    return Fingerprint(name="x", channels=(channel,), labels=labels, cases=tuple(cases), intensities=(NUMBERS,))


def planned(cases, channel="MR"):
    return make_plan(fingerprint_of(cases, channel))


def test_a_plan_is_explained_and_what_somebody_changed_is_said_so():
    print_of = Fingerprint(
        name="x",
        channels=("MR",),
        labels=make_labels([(1, "organ"), (2, "cyst")]),
        cases=(facts((1, 1, 1), (36, 50, 35)), facts((1, 1, 2), (36, 50, 35))),
        intensities=(NUMBERS,),
    )
    plan = make_plan(print_of)
    rows = {row["decision"]: row for row in explain(print_of, plan)}
    assert rows["spacing_mm"]["value"] == "1 x 1 x 1.5"
    assert "from 1 x 1 x 1 to 1 x 1 x 2" in rows["spacing_mm"]["why"]
    assert "cyst, is in 0 of 2 cases" in rows["labels"]["why"]
    changed = explain(print_of, plan.model_copy(update={"spacing_mm": (2.0, 2.0, 2.0)}))
    assert [row["decision"] for row in changed if row["why"].startswith("yours")] == ["spacing_mm"]


def test_hippocampus_gets_nnunets_topology_and_a_patch_within_the_case():
    plan = planned([facts((1, 1, 1), (36, 50, 35))])
    assert plan.patch == (32, 48, 32)
    assert plan.network.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    assert plan.network.features == (16, 32, 64, 128)


def test_a_patch_fits_the_box_around_what_was_measured():
    cases = [facts((4, 4, 2), (128, 128, 128), box=box) for box in ((64, 110, 110), (60, 100, 120), (128, 128, 128))]
    plan = planned(cases)
    assert (plan.measured_only, plan.crop_nonzero) == (True, False)
    assert plan.patch[0] <= 64
    row = next(row for row in explain(fingerprint_of(cases), plan) if row["decision"] == "measured_only")
    assert (row["value"], "37 %" in row["why"]) == ("yes", True)


def test_thick_slices_are_not_halved_before_the_others_are_as_thick():
    # 1 x 1 x 5 mm: in-plane halvings make 2, 4, 8 mm; along the third axis they begin once 5 < 2 x the finest.
    kernels, strides = topology((160, 160, 16), (1, 1, 5))
    assert strides[1:4] == ((2, 2, 1), (2, 2, 1), (2, 2, 2))
    assert kernels[:4] == ((3, 3, 1), (3, 3, 1), (3, 3, 3), (3, 3, 3))


@given(
    shape=st.tuples(*[st.integers(1, 600)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 8)] * 3),
)
def test_every_plan_is_valid_and_its_patch_within_bounds(shape, spacing):
    plan = planned([facts(spacing, shape)])
    divisor = np.array(plan.network.divisor)
    assert (np.array(plan.patch) % divisor == 0).all()
    assert (np.array(plan.patch) < np.array(shape) + divisor).all()
    assert np.prod(np.array(plan.patch) - divisor + 1) <= FIXED.voxels
    assert len(plan.network.strides) >= 3


def test_a_patch_sees_as_far_along_every_axis_in_mm():
    edges = np.array(first_patch((500, 500, 500), (0.5, 1, 2), 2**18)) * (0.5, 1, 2)
    assert np.ptp(edges) < 2.1  # within one voxel of the coarsest axis
    assert first_patch((10, 500, 500), (1, 1, 1), 2**18)[0] == 10


def test_spacing_is_the_median_and_for_very_thick_slices_a_finer_one():
    assert target_spacing([(1, 1, 1), (2, 1, 1), (3, 1, 1)]) == (2, 1, 1)
    # The third axis: median 5 > 3 x 1, so its tenth percentile: 3 + 0.1 x 4 steps of ... numpy: 3.4
    assert target_spacing([(1, 1, z) for z in (3, 4, 5, 6, 7)]) == pytest.approx((1, 1, 3.4))


def test_normalization_follows_the_channels_name():
    assert normalization("CT", NUMBERS) == CTNormalization(lower=-60, upper=120, mean=40, std=20)
    assert normalization("ct", NUMBERS).kind == "ct"
    assert normalization("T1", NUMBERS) == ZScore()


def test_a_fingerprint_says_what_the_cases_are(tmp_path):
    folder = make_balls(tmp_path / "balls", cases=4)
    found = fingerprint(read_dataset(folder))
    image, labels = load(folder / "images/case_2.nii.gz"), load(folder / "labels/case_2.nii.gz")
    assert image.grid.orientation == "PIR"
    assert found.cases[2].shape == image.grid.reoriented("RAS").shape
    assert found.cases[2].label_voxels == {1: int(labels.array.sum())}
    assert found.intensities[0].mean == pytest.approx(180, abs=1)  # a ball is 80 brighter than the 100 around it
    assert found.intensities[0].std == pytest.approx(15, abs=1)
    found.save(tmp_path / "fingerprint.json")
    assert Fingerprint.load(tmp_path / "fingerprint.json") == found


def test_every_broken_case_is_listed(tmp_path):
    folder = make_balls(tmp_path / "balls", cases=5, shape=(8, 8, 8))
    image = load(folder / "images/case_1.nii.gz")
    save(image.cropped((0, 0, 0), (8, 8, 7)), folder / "images/case_1.nii.gz")
    labels = load(folder / "labels/case_2.nii.gz")
    save(labels.with_array(labels.array + np.uint8(1)), folder / "labels/case_2.nii.gz")
    (folder / "images/case_3.nii.gz").write_bytes(b"nothing")
    image = load(folder / "images/case_4.nii.gz")
    save(image.with_array(np.full_like(image.array, np.nan)), folder / "images/case_4.nii.gz")
    with pytest.raises(DatasetError) as caught:
        fingerprint(read_dataset(folder))
    text = str(caught.value)
    assert "4 problem(s)" in text
    assert "case_1: Image and labels lie on different grids: shape (8, 8, 7) against (8, 8, 8)" in text
    assert "case_2: label values [2] are not in dataset.json" in text
    assert "case_3: " in text
    assert "case_4: the image has voxels that are NaN or infinite" in text


def test_a_dataset_without_one_labelled_voxel_is_refused(tmp_path):
    folder = make_balls(tmp_path / "balls", cases=2, shape=(4, 4, 4))
    for file in (folder / "labels").iterdir():
        labels = load(file)
        save(labels.with_array(labels.array * 0), file)
    with pytest.raises(DatasetError, match="no case has a labelled voxel"):
        fingerprint(read_dataset(folder))


def test_a_fingerprint_that_is_missing_or_wrong_is_refused(tmp_path):
    with pytest.raises(ModelError, match="The fingerprint is missing"):
        Fingerprint.load(tmp_path / "fingerprint.json")
    (tmp_path / "fingerprint.json").write_text('{"cases": 3}')
    with pytest.raises(ModelError, match="not valid"):
        Fingerprint.load(tmp_path / "fingerprint.json")


def test_left_and_right_are_not_mirrored_where_labels_tell_them_apart():
    assert mirror_axes(make_labels([(1, "liver")])) == (0,)
    assert mirror_axes(make_labels([(1, "Kidney_Left"), (2, "Kidney_Right")])) == ()


def test_a_fingerprint_names_no_case_and_says_what_training_saw(tmp_path):
    root = make_balls(tmp_path / "smith", cases=4)
    dataset = read_dataset(root)
    found = fingerprint(dataset)
    found.save(tmp_path / "fingerprint.json")
    assert not any(case.name in (tmp_path / "fingerprint.json").read_text() for case in dataset)
    labels = [load(case.label) for case in dataset]
    value = dataset.labels[0].value
    volumes = [(one.array == value).sum() * one.grid.voxel_mm3 / 1000 for one in labels]
    seen = found.seen.volumes_ml[value]
    assert (seen.smallest, seen.largest, seen.always) == (
        pytest.approx(min(volumes)),
        pytest.approx(max(volumes)),
        True,
    )
    views = [np.multiply(one.grid.reoriented("RAS").shape, one.grid.reoriented("RAS").spacing_mm) for one in labels]
    assert found.seen.largest_view_mm == pytest.approx(np.max(views, axis=0), abs=1e-3)
    assert found.seen.smallest_view_mm == pytest.approx(np.min(views, axis=0), abs=1e-3)


def test_a_structure_that_was_not_drawn_says_nothing_of_its_volumes(tmp_path):
    root = make_balls(tmp_path / "balls", cases=3)
    dataset = read_dataset(root)
    names = [label.name for label in dataset.labels]
    empty = load(root / "labels/case_0.nii.gz")
    save(empty.with_array(empty.array * 0), root / "labels/case_0.nii.gz")
    for structures, always in ((names[1:], True), (names, False)):
        (root / "cases.json").write_text(json.dumps([{"case": "case_0", "structures": structures}]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a case without a labelled voxel is odd
            assert fingerprint(read_dataset(root)).seen.volumes_ml[dataset.labels[0].value].always is always


def test_an_older_fingerprint_with_names_is_read_without_them(tmp_path):
    old = json.loads(fingerprint(read_dataset(make_balls(tmp_path / "balls", cases=2))).model_dump_json())
    del old["seen"], old["names_sha256"]
    for number, case in enumerate(old["cases"]):
        case["name"] = f"Smith_{number}"
    (tmp_path / "fingerprint.json").write_text(json.dumps(old))
    read = Fingerprint.load(tmp_path / "fingerprint.json")
    assert read.seen is None
    assert "Smith" not in read.model_dump_json()


def test_a_plan_says_why_it_mirrors_or_does_not():
    def why(names, places=({},)):
        cases = [facts((1, 1, 1), (36, 50, 35)).model_copy(update={"label_places": one}) for one in places]
        one = fingerprint_of(cases).model_copy(update={"labels": make_labels(enumerate(names, start=1))})
        row = next(row for row in explain(one, make_plan(one)) if row["decision"] == "mirror_axes")
        return row["value"], row["why"]

    middle = {1: LabelPlace(center_mm=(0, 0, 0), across_mm=(-3, 3))}
    assert why(["organ"]) == ("0", "empirical: left-right, as no label has a side by its name")
    assert why(["organ"], [middle]) == ("0", "empirical: left-right, as no label has a side by its name or place")
    none = ("none", "empirical: none, as Parotid_L and Parotid_R differ in the side alone")
    assert why(["Parotid_L", "Parotid_R"]) == none
    aside = {1: LabelPlace(center_mm=(9, 0, 0), across_mm=(2, 16))}
    assert why(["organ"], [aside] * 3)[1].endswith("organ lies on one side of the middle in 3 of 3 cases")
