"""Regions that overlap, and voxels that are to be ignored, all through training."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from datasets import make_shells, small_plan
from torch.nn import functional

from medseg.errors import DatasetError, ModelError
from medseg.io import load
from medseg.model.plan import Plan, Region
from medseg.model.run import Options, segment_file
from medseg.model.segmenter import Model
from medseg.report.metrics import compare_labels
from medseg.train.cache import prepare_cases
from medseg.train.dataset import read_dataset
from medseg.train.evaluate import evaluate
from medseg.train.fingerprint import fingerprint
from medseg.train.loop import check_possible, train_dataset, train_model
from medseg.train.loss import IGNORED, LOSSES, REGION_LOSSES, WITH_IGNORED, deep_loss, regions_ce
from medseg.train.sampler import Sampler
from medseg.train.settings import TrainSettings

FAST = TrainSettings(folds=3)
REGIONS = (Region(name="ball", members=(1, 2), value=1), Region(name="core", members=(2,), value=2))


@pytest.fixture(scope="module")
def shells(tmp_path_factory):
    return read_dataset(make_shells(tmp_path_factory.mktemp("data") / "shells"))


@pytest.fixture(scope="module")
def half_seen(tmp_path_factory):
    return read_dataset(make_shells(tmp_path_factory.mktemp("data") / "half", regions=False, ignore=7))


def test_regions_and_the_ignore_label_are_read_as_nnunet_writes_them(shells, half_seen):
    assert shells.meaning.regions == REGIONS
    assert [(label.value, label.name) for label in shells.labels] == [(1, "ball"), (2, "core")]
    assert (half_seen.meaning.ignore, half_seen.meaning.values) == (7, (1, 2))
    assert {case.ignore for case in half_seen} == {7}


def test_a_fingerprint_leaves_out_what_is_ignored(half_seen):
    facts = fingerprint(half_seen)
    labels = load(half_seen.cases[0].label).array
    assert facts.cases[0].label_voxels == {value: int((labels == value).sum()) for value in (1, 2)}
    assert facts.intensities[0].mean > 170  # of the ball alone, not of what lies around it


def test_regions_are_trained_stored_and_segmented_like_imported_ones(shells, tmp_path):
    (tmp_path / "model").mkdir()
    small_plan(shells).save(tmp_path / "model/plan.json")
    TrainSettings(optimizer="adamw", learning_rate=3e-3, folds=3).save(tmp_path / "model/train.json")
    root = shells.cases[0].label.parents[1]
    scores = train_dataset(root, tmp_path / "model", budget="60steps", folds=3)
    plan = Plan.load(tmp_path / "model/plan.json")
    assert (plan.regions, plan.outputs, plan.painted) == (REGIONS, 2, (0, 1, 2))
    assert scores.label_means[1]["dice"] > 0.7
    assert scores.label_means[2]["dice"] > 0.4
    model = Model.load(tmp_path / "model")
    assert {2} < set(np.unique(model.segment(load(shells.cases[0].images[0])).array)) <= {0, 1, 2}
    again = evaluate(model, shells.fold(0, 3)[1])
    assert again.mean["dice"] == pytest.approx(scores.mean["dice"])
    image = shells.cases[0].images[0]
    outcome = segment_file(model, image, tmp_path / "labels.nii.gz", Options(probabilities=True, expected_volumes=True))
    ball, core = (load(tmp_path / f"labels_probability_{value}.nii.gz") for value in (1, 2))
    painted = np.where(core.array > 0.5, 2, ball.array > 0.5)  # the later region over the earlier one
    np.testing.assert_array_equal(load(tmp_path / "labels.nii.gz").array, painted)
    for row, probability in zip(outcome.measurements, (ball, core), strict=True):
        volume_ml = probability.array.sum() * probability.grid.voxel_mm3 / 1000
        assert row.expected_volume_ml == pytest.approx(volume_ml, rel=1e-4)


def test_what_is_ignored_is_neither_learned_nor_scored_and_patches_lie_elsewhere(half_seen, tmp_path):
    plan = small_plan(half_seen).model_copy(update={"patch": (8, 8, 8), "mirror_axes": ()})
    prepared = prepare_cases(half_seen.cases, plan, tmp_path / "cache")
    assert all((case.target[:] == IGNORED).any() and 0 in case.places for case in prepared)
    for step in range(30):  # no patch is drawn at random alone
        target = Sampler(prepared, plan, 1, 0.0).batch(step, [0]).target[0]
        assert (target != IGNORED).any()
    model = train_model(half_seen, plan, tmp_path / "model", budget="2steps", settings=FAST)
    scores = evaluate(model, half_seen.cases[:1])
    seen = load(half_seen.cases[0].label).array != 7
    found = model.segment(load(half_seen.cases[0].images[0]))
    (one,) = scores.cases
    assert one.labels[0].true_positives + one.labels[0].false_positives == int(((found.array == 1) & seen).sum())
    assert np.isnan(one.labels[0].surface_dice)


def random_logits(outputs: int) -> torch.Tensor:
    return torch.randn(2, outputs, 6, 5, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("name", WITH_IGNORED)
def test_a_loss_is_what_it_is_on_the_voxels_that_count(name):
    logits, target = random_logits(3), torch.randint(0, 3, (2, 1, 6, 5, 4), generator=torch.Generator().manual_seed(2))
    target[:, :, 3:] = IGNORED
    known = torch.ones(2, 3, dtype=torch.bool)
    loss = deep_loss(name, [logits], target, known)
    loss.backward()
    assert not logits.grad[:, :, 3:].any()
    torch.testing.assert_close(loss, deep_loss(name, [logits[:, :, :3]], target[:, :, :3], known))


@pytest.mark.parametrize("name", REGION_LOSSES)
def test_a_loss_of_regions_is_what_it_is_on_the_voxels_that_count(name):
    logits, target = random_logits(2), torch.randint(0, 2, (2, 2, 6, 5, 4), generator=torch.Generator().manual_seed(2))
    target[:, :, 3:] = IGNORED
    known = torch.ones(2, 2, dtype=torch.bool)
    loss = deep_loss(name, [logits], target, known)
    loss.backward()
    assert not logits.grad[:, :, 3:].any()
    torch.testing.assert_close(loss, deep_loss(name, [logits[:, :, :3]], target[:, :, :3], known))


def test_regions_are_binary_cross_entropy_and_the_dice_of_each():
    logits, target = random_logits(2), torch.randint(0, 2, (2, 2, 6, 5, 4), generator=torch.Generator().manual_seed(2))
    shares = logits.sigmoid()
    dice = 2 * (shares * target).flatten(2).sum(2) / (shares + target).flatten(2).sum(2)
    entropy = functional.binary_cross_entropy(shares, target.float())
    torch.testing.assert_close(
        regions_ce(logits, target, torch.ones(2, 2, dtype=torch.bool)),
        entropy + (1 - dice).mean(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_region_that_was_not_drawn_teaches_nothing(shells, tmp_path):
    logits, target = random_logits(2), torch.zeros(2, 2, 6, 5, 4, dtype=torch.long)
    known = torch.tensor([[True, False], [True, True]])
    regions_ce(logits, target, known).backward()
    assert not logits.grad[0, 1].any()
    assert logits.grad[0, 0].all()
    nothing = random_logits(2)
    regions_ce(nothing, target, torch.zeros(2, 2, dtype=torch.bool)).backward()
    assert torch.equal(nothing.grad, torch.zeros_like(nothing))
    case = dataclasses.replace(shells.cases[0], undrawn=frozenset({2}))
    prepared = prepare_cases([case], small_plan(shells), tmp_path)[0]
    assert prepared.known.tolist() == [True, False]
    assert set(prepared.places) == {1, 2}  # 2 is of the ball, too


def test_patches_of_regions_have_a_channel_for_each(shells, tmp_path):
    plan = small_plan(shells)
    target = Sampler(prepare_cases(shells.cases, plan, tmp_path), plan, 1, 1.0).batch(0, [0]).target[0]
    assert target.shape == (2, *plan.patch)
    assert bool((target[0] >= target[1]).all())  # the core is part of the ball
    assert 0 < int(target[1].sum()) < int(target[0].sum())


def test_what_cannot_be_is_refused_by_name(shells, half_seen):
    plan, half_plan = small_plan(shells), small_plan(half_seen)
    for loss in set(LOSSES) - set(REGION_LOSSES):
        with pytest.raises(ModelError, match=f"The loss {loss} compares classes"):
            check_possible(shells, plan, TrainSettings(loss=loss))
    for loss in set(LOSSES) - set(WITH_IGNORED):
        with pytest.raises(ModelError, match=f"The loss {loss} looks at whole patches"):
            check_possible(half_seen, half_plan, TrainSettings(loss=loss))
    with pytest.raises(ModelError, match="different labels or regions"):
        check_possible(half_seen, plan, FAST)
    with pytest.raises(ModelError, match="previous stage"):
        check_possible(half_seen, half_plan.model_copy(update={"previous": True}), FAST)


def test_cases_that_are_ignored_altogether_are_a_problem(tmp_path):
    root = make_shells(tmp_path / "shells", ignore=7, cases=3)
    labels = load(root / "labels/case_1.nii.gz")
    from medseg.io import save

    save(labels.with_array(np.full_like(labels.array, 7)), root / "labels/case_1.nii.gz")
    with pytest.raises(DatasetError, match="case_1: every voxel is to be ignored"):
        fingerprint(read_dataset(root))


def test_an_undrawn_region_may_have_voxels_of_a_drawn_one(tmp_path):
    root = make_shells(tmp_path / "shells", cases=3)
    (root / "cases.json").write_text(json.dumps([{"case": "case_0", "structures": ["ball"]}]))
    assert fingerprint(read_dataset(root)).regions == REGIONS
    (root / "cases.json").write_text(json.dumps([{"case": "case_0", "structures": ["core"]}]))
    with pytest.raises(DatasetError, match=r"case_0: label values \[1\] are there, but cases.json"):
        fingerprint(read_dataset(root))


def test_regions_are_scored_as_unions_and_ignored_voxels_not_at_all(shells):
    truth = load(shells.cases[0].label)
    found = truth.with_array(np.where(truth.array == 2, 1, truth.array).astype(np.uint8))
    members = {1: (1, 2), 2: (2,)}
    ball, core = compare_labels(found, truth, shells.labels, members=members)
    assert (ball.dice, ball.surface_dice, core.dice) == (1.0, 1.0, 0.0)
    ball, core = compare_labels(found, truth, shells.labels, members=members, ignore=2)
    assert (ball.dice, np.isnan(core.dice), np.isnan(ball.surface_dice)) == (1.0, True, True)
