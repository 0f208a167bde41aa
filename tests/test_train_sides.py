from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import make_balls

from medseg.io import load, save
from medseg.labels import make_labels
from medseg.train.begin import plan_from
from medseg.train.dataset import read_dataset
from medseg.train.fingerprint import Fingerprint, fingerprint
from medseg.train.loop import plan_dataset
from medseg.train.planner import make_plan, mirror_axes
from medseg.train.sides import LabelPlace, places_of, side_by_name, side_by_place
from medseg.volume import Grid, Volume


def labels(*names):
    return make_labels(enumerate(names, start=1))


def at(x, y=0.0, z=0.0, half=1.0):
    return LabelPlace(center_mm=(x, y, z), across_mm=(x - half, x + half))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Parotid_L", "Parotid_R"), ("Lung_L_Upper", "Lung_R_Upper"),
        ("L Parotid", "R Parotid"), ("A_Carotid_L", "A_Carotid_R"),
        ("lt kidney", "rt kidney"), ("LKidney", "RKidney"), ("kidneyl", "kidneyr"),
        ("lkidney", "rkidney"), ("EyeL", "EyeR"),
        ("ctx-lh-insula", "ctx-rh-insula"), ("Left-Hippocampus", "Right-Hippocampus"),
        ("KIDNEYLEFT", "KIDNEYRIGHT"),
        ("Niere links", "Niere rechts"), ("linke Niere", "rechte Niere"),
        ("Niere li", "Niere re"), ("rein gauche", "rein droit"),
        ("rein_g", "rein_d"), ("riñón izquierdo", "riñón derecho"),
        ("riñon izq.", "riñon der."), ("rene sinistro", "rene destro"),
        ("rene sin", "rene dx"), ("rene_sx", "rene_dx"), ("ren sinister", "ren dexter"),
        ("ren_s", "ren_d"), ("rim esquerdo", "rim direito"),
        ("nerka lewa", "nerka prawa"), ("vänster njure", "höger njure"),
        ("левая почка", "правая почка"), ("左肾", "右肾"),
        ("LV", "RV"), ("L1", "R1"),
        ("왼쪽 신장", "오른쪽 신장"), ("좌측 신장", "우측 신장"),
        ("Nierelinks", "Niererechts"), ("rein gche", "rein dt"), ("nerka L", "nerka P"),
        ("ľavá oblička", "pravá oblička"), ("ronyó esquerre", "ronyó dret"), ("ліва нирка", "права нирка"),
        ("الكلية اليسرى", "الكلية اليمنى"), ("eye_OD", "eye_OS"),
    ],
)  # fmt: skip
def test_names_that_differ_in_a_side_alone_are_two_sides(left, right):
    assert side_by_name(labels("spleen", left, right)) is not None
    assert side_by_name(labels(right, "spleen", left)) is not None


def test_a_word_says_a_side_by_itself_and_so_does_a_letter_at_either_end():
    assert side_by_name(labels("kidney_left")) == "kidney_left says a side"
    assert side_by_name(labels("rein gauche")) == "rein gauche says a side"
    assert side_by_name(labels("SpinalCord", "Parotid_L")) == "Parotid_L says a side"
    assert side_by_name(labels("SpinalCord", "Rt Kidney")) == "Rt Kidney says a side"
    assert side_by_name(labels("LKidney", "RKidney")) == "LKidney and RKidney differ in the side alone"
    assert side_by_name(labels("L", "spleen")) is None


@pytest.mark.parametrize(
    "names",
    [
        ("vertebrae_L1", "vertebrae_L2", "vertebrae_T1"), ("liver", "spleen", "tumor"),
        ("1", "2", "11"), ("cleft", "bright spot"),
        ("anterior", "posterior"), ("lateral", "medial"), ("A", "B", "C"),
        ("core", "edema", "rim"), ("lens", "lung", "rib"), ("Left_over", "leftover", "upright"),
    ],
)  # fmt: skip
def test_names_without_a_side_have_none(names):
    assert side_by_name(labels(*names)) is None


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "ASL"])
def test_a_place_is_measured_along_the_axes_of_the_body_however_it_is_stored(orientation):
    grid = Grid((20, 10, 8), np.diag([2.0, 3.0, 4.0, 1.0]))
    values = np.zeros((1, *grid.shape), np.uint8)
    values[0, 15:18, 2, 5:7] = 3  # center 16, 2, 5.5 of 9.5, 4.5, 3.5
    values[0, 0, :, :] = 9  # not in the table
    turned = Volume(values, grid).reoriented(orientation)
    places = places_of(turned.array[0], turned.grid, {1: (3,), 2: (3, 4), 5: (5,)})
    assert set(places) == {1, 2}
    assert places[1] == places[2]
    np.testing.assert_allclose(places[1].center_mm, (13, -7.5, 8))
    np.testing.assert_allclose(places[1].across_mm, (11, 15))


def test_the_place_of_a_region_is_that_of_all_its_values():
    values = np.zeros((9, 1, 1), np.uint8)
    values[[1, 2, 8], 0, 0] = (1, 2, 2)
    grid = Grid(values.shape, np.eye(4))
    places = places_of(values, grid, {7: (1, 2), 8: (2,)})
    assert places[7].across_mm == (-3, 4)
    assert places[7].center_mm[0] == pytest.approx((-3 - 2 + 4) / 3)
    assert places[8].across_mm == (-2, 4)


def test_labels_that_lie_beside_each_other_are_two_sides_whatever_they_are_called():
    two = labels("1", "2")
    pairs = [{1: at(-30 + n, 5), 2: at(28, n)} for n in range(10)]
    assert side_by_place(two, pairs) == "1 and 2 lie beside each other, the same in 10 of 10 cases"
    turned = [{1: pair[2], 2: pair[1]} for pair in pairs]
    assert side_by_place(two, [*turned[:1], *pairs[1:]]) == "1 and 2 lie beside each other, the same in 9 of 10 cases"
    assert side_by_place(two, [*turned[:2], *(({1: at(0), 2: at(0)}),) * 8]) is None
    behind = [{1: at(-3, -20, half=9), 2: at(3, 20, half=9)}] * 4  # beside each other less than behind
    assert side_by_place(two, behind) is None


def test_labels_that_are_never_in_one_case_could_be_two_sides():
    two = labels("a", "b")
    assert side_by_place(two, [{1: at(0)}, {2: at(0)}]) == (
        "a and b are never in one case, and could be the sides of one structure"
    )
    assert side_by_place(two, [{1: at(0)}, {1: at(0)}]) is None
    assert side_by_place(two, []) is None


def test_a_label_that_stays_on_one_side_may_have_a_twin_and_one_that_crosses_the_middle_has_none():
    one = labels("kidney")
    assert side_by_place(one, [{1: at(-40, half=30)}] * 3) == "kidney lies on one side of the middle in 3 of 3 cases"
    assert side_by_place(one, [{1: at(40, half=60)}] * 3) is None
    assert side_by_place(one, [{1: at(40, half=30)}, {1: at(-40, half=30)}] * 5) is None


def make_pairs(root, names, cases=4):
    """Write a dataset of two equal balls, 1 on the left and 2 on the right; names may be anything."""
    make_balls(root, cases)
    for case in range(cases):
        file = root / f"labels/case_{case}.nii.gz"
        volume = load(file)
        x = volume.grid.reoriented("RAS").to_index(
            volume.grid.to_world(np.stack(np.indices(volume.grid.shape), axis=-1))
        )[..., 0]
        middle = (volume.grid.reoriented("RAS").shape[0] - 1) / 2
        values = (1 + (x > middle)).astype(np.uint8)
        values[0, 0, : case + 1] = 0  # no two are the same
        save(volume.with_array(values[None]), file)
    described = {"channel_names": {"0": "MR"}, "labels": {"background": 0, **dict(zip(names, (1, 2), strict=True))}}
    (root / "dataset.json").write_text(json.dumps(described))
    return root


def test_a_plan_mirrors_nothing_where_the_data_show_two_sides(tmp_path):
    root = make_pairs(tmp_path / "pairs", ("11", "21"))
    facts = fingerprint(read_dataset(root))
    assert facts.cases[0].label_places[1].center_mm[0] < 0 < facts.cases[0].label_places[2].center_mm[0]
    assert make_plan(facts).mirror_axes == ()
    assert mirror_axes(facts.labels) == (0,)  # by their names
    balls = fingerprint(read_dataset(make_balls(tmp_path / "balls")))
    assert make_plan(balls).mirror_axes == (0,)


def test_a_fingerprint_of_an_older_version_is_planned_by_names(tmp_path):
    facts = fingerprint(read_dataset(make_pairs(tmp_path / "pairs", ("11", "21"))))
    content = json.loads(facts.model_dump_json())
    for case in content["cases"]:
        del case["label_places"]
    (tmp_path / "fingerprint.json").write_text(json.dumps(content))
    older = Fingerprint.load(tmp_path / "fingerprint.json")
    assert make_plan(older).mirror_axes == (0,)


def test_a_model_to_begin_with_is_mirrored_no_longer_where_the_data_show_two_sides(tmp_path):
    plan_dataset(make_balls(tmp_path / "balls"), tmp_path / "model")
    root = make_pairs(tmp_path / "pairs", ("11", "21"))
    _, plan = plan_dataset(root, tmp_path / "next", start=tmp_path / "model")
    assert plan.mirror_axes == ()
    assert plan_from(tmp_path / "model", read_dataset(root)).mirror_axes == (0,)  # nothing was measured


@pytest.mark.realdata
def test_real_labels_have_the_sides_that_their_names_say(realdata):
    hippocampus = fingerprint(read_dataset(realdata / "hippocampus_mr"))
    assert side_by_place(hippocampus.labels, [case.label_places for case in hippocampus.cases]) is None
    head = fingerprint(read_dataset(realdata / "head_neck_ct"))
    middle = [label for label in head.labels if "Parotid" not in label.name]
    assert side_by_place(middle, [case.label_places for case in head.cases]) is None
    parotids = [label for label in head.labels if "Parotid" in label.name]
    assert "the same in 98 of 98 cases" in str(side_by_place(parotids, [case.label_places for case in head.cases]))
