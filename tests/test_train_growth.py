"""Patches that grow with the budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import assert_goes_on_as_if_not_stopped, small_plan
from hypothesis import given
from hypothesis import strategies as st

from medseg.train import feed, optimize
from medseg.train.cache import prepare_cases
from medseg.train.feed import batches
from medseg.train.growth import growing_patches, patch_of
from medseg.train.sampler import Sampler
from medseg.train.settings import Budget, TrainSettings

GROWING = TrainSettings(folds=3, growth=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plan(balls):
    return small_plan(balls)


@pytest.fixture(scope="module")
def prepared(balls, plan, tmp_path_factory):
    return prepare_cases(balls.cases, plan, tmp_path_factory.mktemp("cache"))


def test_patches_of_four_phases_as_they_are_derived_by_hand():
    # From 16 by 5.3, 10.7 and 5.3 voxels a phase, each rounded to a multiple of 8.
    assert growing_patches((32, 48, 32), (8, 8, 8), 4) == ((16, 16, 16), (24, 24, 24), (24, 40, 24), (32, 48, 32))
    # An axis that is halved less often begins smaller; one that has two coarsest voxels does not grow.
    assert growing_patches((16, 64, 64), (2, 16, 32), 2) == ((4, 32, 64), (16, 64, 64))
    assert growing_patches((32, 48, 32), (8, 8, 8), 1) == ((32, 48, 32),)
    # A patch that cannot be halved so often is the last one as it is, and no earlier one is wider.
    assert growing_patches((35, 15, 6), (8, 8, 8), 3) == ((16, 15, 6), (24, 15, 6), (35, 15, 6))


edges = st.integers(1, 20)


@given(st.tuples(edges, edges, edges), st.tuples(edges, edges, edges), st.integers(1, 9))
def test_patches_can_be_halved_never_shrink_and_end_as_the_plans(counts, divisor, phases):
    patch = tuple(np.multiply(counts, divisor).tolist())
    grown = np.asarray(growing_patches(patch, divisor, phases))
    assert grown.shape == (phases, 3)
    assert (grown % divisor == 0).all()
    assert (np.diff(grown, axis=0) >= 0).all()
    assert grown[-1].tolist() == list(patch)
    assert (grown[0] >= np.minimum(patch, 2 * np.asarray(divisor))).all()


def test_each_phase_has_an_equal_part_of_the_budget():
    sizes = growing_patches((32, 48, 32), (8, 8, 8), 4)
    assert [sizes.index(patch_of(sizes, done)) for done in (0, 0.24, 0.25, 0.5, 0.74, 0.75, 1, 1.2)] == [
        0, 0, 1, 2, 2, 3, 3, 3,
    ]  # fmt: skip


def test_a_small_patch_has_the_voxel_that_was_asked_for(prepared, plan):
    sampler = Sampler(prepared, plan, 3, 1.0)
    for step in range(20):
        images, target = sampler.batch(step, [0, 1], (8, 8, 8))[:2]
        assert images.shape == (2, 1, 8, 8, 8)
        assert (target == 1).flatten(1).any(dim=1).all()


def test_steps_see_the_patch_of_their_part_of_the_budget(prepared, plan, monkeypatch):
    seen = []
    real = feed.change_intensities

    def note(images, seeds):
        seen.append(tuple(images.shape[2:]))
        return real(images, seeds)

    monkeypatch.setattr(feed, "change_intensities", note)
    state = optimize.new_state(plan, GROWING, CPU)
    for _ in optimize.optimize(state, Sampler(prepared, plan, 1, 0.5), GROWING, Budget(steps=6)):
        pass
    first, second, last = growing_patches(plan.patch, plan.network.divisor, 3)
    assert first != second != last == plan.patch
    assert seen[:6] == [first, first, second, second, last, last]


def test_a_batch_is_of_the_patch_that_its_step_is_asked_for(prepared, plan):
    sampler = Sampler(prepared, plan, 1, 0.5)
    made = batches(sampler, range(2), 5, lambda step: (8, 8, step))
    for step in (5, 6, 7):
        assert next(made).images.shape == (2, 1, 8, 8, step)


def test_a_training_that_was_stopped_while_patches_grew_goes_on_as_if_it_had_not_been(balls, plan, tmp_path):
    assert_goes_on_as_if_not_stopped(balls, plan, tmp_path, 4, budget="9steps", settings=GROWING)
