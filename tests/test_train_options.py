"""Options of the recipe do what they say."""

from __future__ import annotations

import copy
from functools import partial
from itertools import chain
from typing import get_args

import numpy as np
import pytest
import torch
from datasets import assert_goes_on_as_if_not_stopped, small_plan

from medseg.errors import ModelError
from medseg.model.weights import state_of
from medseg.networks.build import build_network
from medseg.train.cache import prepare_cases
from medseg.train.checkpoint import TrainState
from medseg.train.loss import LossName
from medseg.train.optimize import new_state, optimize
from medseg.train.options import add_dropout, precision_of, recompute, scaler_of
from medseg.train.sampler import Sampler
from medseg.train.schedules import make_optimizer, set_rates, share_of_rate
from medseg.train.settings import Budget, TrainSettings

CPU = torch.device("cpu")
BASE = {"folds": 3, "optimizer": "sgd", "learning_rate": 0.01, "momentum": 0.9, "schedule": "poly"}


@pytest.fixture(scope="module")
def plan(balls):
    return small_plan(balls, features=4)


@pytest.fixture(scope="module")
def sampler(balls, plan, tmp_path_factory):
    return Sampler(prepare_cases(balls.cases[:3], plan, tmp_path_factory.mktemp("cache")), plan, 1, 0.5)


def trained(sampler: Sampler, steps: int = 3, **changes) -> TrainState:
    settings = TrainSettings(**(BASE | changes))
    state = new_state(sampler.plan, settings, CPU)
    losses = list(chain(*optimize(state, sampler, settings, Budget(steps=steps))))
    assert np.isfinite(losses).all()
    return state


def assert_close(a: TrainState, b: TrainState, **tolerance) -> None:
    one, other = state_of(a.network), state_of(b.network)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, **tolerance)


def test_gradients_of_two_batches_are_those_of_one_twice_as_large(sampler):
    assert_close(trained(sampler, batch=1, accumulate=2), trained(sampler, batch=2), atol=1e-5, rtol=1e-3)
    with pytest.raises(AssertionError):
        assert_close(trained(sampler, batch=1), trained(sampler, batch=2), atol=1e-5, rtol=1e-3)


def test_recomputed_stages_have_the_same_gradients_and_names(plan):
    torch.manual_seed(1)
    network = build_network(plan.network, 1, plan.outputs).train()
    other = copy.deepcopy(network)
    recompute(other)
    image = torch.randn(1, 1, *plan.patch)
    for one in (network, other):
        sum(out.square().mean() for out in one(image)).backward()
    assert state_of(network).keys() == state_of(other).keys()
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_recomputing_keeps_less(plan):
    def kept(network) -> int:
        sizes: dict[int, int] = {}

        def note(tensor):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network(torch.randn(1, 1, *plan.patch))
        return sum(sizes.values())

    network = build_network(plan.network, 1, plan.outputs).train()
    all_kept = kept(network)
    recompute(network)
    assert kept(network) < 0.6 * all_kept


def test_dropout_leaves_out_whole_feature_maps_in_training_alone(plan):
    network = build_network(plan.network, 1, plan.outputs)
    seen = []
    add_dropout(network, 0.5)
    network.encoder[0][0].conv.register_forward_hook(lambda module, given, out: seen.append(out))
    image = torch.randn(8, 1, *plan.patch)
    network.train()(image)
    empty = (seen[0].flatten(2) == 0).all(dim=2)
    assert 0.2 < empty.float().mean() < 0.8
    network.eval()(image)
    assert not (seen[1].flatten(2) == 0).all(dim=2).any()
    assert torch.equal(network(image), network(image))


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.3, "accumulate": 2, "batch": 1},
        {"optimizer": "adamw", "schedule": "one_cycle", "checkpointing": True},
        {"precision": "bfloat16"},
    ],
    ids="-".join,
)
def test_options_do_not_keep_a_training_from_going_on_as_if_it_had_not_stopped(balls, plan, tmp_path, options):
    settings = TrainSettings(**(BASE | options))
    assert_goes_on_as_if_not_stopped(balls, plan, tmp_path, 2, budget="4steps", settings=settings)


def test_gradient_descent_is_nesterovs(plan):
    network = build_network(plan.network, 1, plan.outputs)
    optimizer = make_optimizer(network, TrainSettings(**BASE))
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["nesterov"], optimizer.defaults["momentum"]) == (True, 0.9)


def test_schedules_begin_peak_and_end_where_they_should():
    poly = TrainSettings(schedule="poly")
    assert [share_of_rate(poly, done) for done in (0, 0.5, 1)] == pytest.approx([1, 0.5**0.9, 0])
    cycle = TrainSettings(schedule="one_cycle", optimizer="adamw")
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, other = torch.optim.AdamW([weight], lr=1), torch.optim.AdamW([weight], lr=1)
    reference = torch.optim.lr_scheduler.OneCycleLR(other, max_lr=cycle.learning_rate, total_steps=101)
    for step in range(101):
        set_rates(optimizer, cycle, step / 100)
        ours, theirs = optimizer.param_groups[0], other.param_groups[0]
        # Torch counts its rise in steps, to 0.3 x 101 - 1: most of a step apart, and one is up to 5 % of the rate.
        assert ours["lr"] == pytest.approx(theirs["lr"], abs=0.05 * cycle.learning_rate)
        assert ours["betas"][0] == pytest.approx(theirs["betas"][0], abs=0.003)
        other.step()
        if step < 100:
            reference.step()
    descent = torch.optim.SGD([weight], lr=1, momentum=0.9)
    set_rates(descent, cycle, 0.3)
    assert (descent.param_groups[0]["lr"], descent.param_groups[0]["momentum"]) == (cycle.learning_rate, 0.85)


def test_a_cpu_computes_in_float32_unless_it_is_told_otherwise(sampler):
    assert precision_of(TrainSettings(), CPU) == torch.float32
    assert precision_of(TrainSettings(), torch.device("mps")) == torch.float32
    assert precision_of(TrainSettings(precision="bfloat16"), CPU) == torch.bfloat16
    assert scaler_of(TrainSettings(precision="bfloat16"), CPU) is None
    assert scaler_of(TrainSettings(precision="float16"), CPU) is not None
    with pytest.raises(AssertionError):
        assert_close(trained(sampler), trained(sampler, precision="bfloat16"), atol=0, rtol=0)
    assert_close(trained(sampler), trained(sampler, precision="bfloat16"), atol=0.02, rtol=0.5)


def test_float16_scales_its_gradients_and_keeps_the_scale_in_the_checkpoint(plan, tmp_path):
    settings = TrainSettings(**(BASE | {"precision": "float16"}))
    state = new_state(plan, settings, CPU)
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 128.0})
    state.save(tmp_path / "checkpoint", "recipe")
    other = new_state(plan, settings, CPU)
    other.load(tmp_path / "checkpoint", "recipe")
    assert other.scaler.get_scale() == 128.0


def compiling_by(monkeypatch, backend) -> None:
    """Let torch.compile trace the network as ever, and leave the writing and building of code out: it takes long."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))


def test_a_compiled_network_trains_and_its_weights_keep_their_names(sampler, monkeypatch):
    compiling_by(monkeypatch, "aot_eager")
    state = trained(sampler, compile=True)
    assert isinstance(state.forward, torch._dynamo.OptimizedModule)
    assert_close(state, trained(sampler), atol=1e-5, rtol=1e-3)


def test_a_network_that_cannot_be_compiled_is_one_line(sampler, monkeypatch):
    def broken(graph, inputs):
        raise OSError("no compiler")

    compiling_by(monkeypatch, broken)
    with pytest.raises(ModelError, match="compiler") as caught:
        trained(sampler, compile=True)
    assert caught.value.reason == "compile"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses what torch deprecates
def test_a_network_trains_through_the_compiler_itself(sampler):
    assert_close(trained(sampler, compile=True), trained(sampler), atol=1e-4, rtol=1e-2)


OTHERWISE = {
    "batch": [1, 3],
    "loss": get_args(LossName),
    "optimizer": ["muon", "adamw", "sgd"],
    "learning_rate": [1e-3],
    "weight_decay": [0.0],
    "warmup": [0.5],
    "ema": [0.0],
    "gradient_norm": [0.1],
    "foreground": [0.0, 1.0],
    "momentum": [0.0],
    "schedule": ["cosine", "one_cycle", "poly"],
    "accumulate": [2],
    "dropout": [0.2],
    "checkpointing": [True],
    "precision": ["float32", "tf32", "float16", "bfloat16"],
    "compile": [True],
    "early_stop": [0.5],
    "frozen": ["encoder"],
    "growth": [2],
    "folds": [2],
    "seed": [0],
}


def test_no_option_of_the_recipe_is_left_out_here():
    assert OTHERWISE.keys() == TrainSettings.model_fields.keys()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OTHERWISE.items() for value in values], ids=str
)
def test_each_option_trains(sampler, monkeypatch, name, value):
    compiling_by(monkeypatch, "eager")
    state = trained(sampler, steps=2, **{name: value})
    assert state.step == 2
    assert all(weight.isfinite().all() for weight in state.network.parameters())
