from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import threshold_model, tiny_model, tiny_plan
from torch import Tensor, nn

from medseg.model.predict import Predictor
from medseg.model.preprocess import prepare
from medseg.model.segmenter import Model
from medseg.model.timing import Report
from medseg.model.window import Window, finished_rows
from medseg.networks.build import build_network
from medseg.volume import Grid, Volume


@given(
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    patch=st.tuples(*[st.integers(1, 6)] * 3),
    step=st.floats(0.1, 1.0),
    batch=st.integers(1, 3),
)
def test_rows_leave_in_order_once_each_and_whole(shape, patch, step, batch):
    shape = tuple(np.maximum(shape, patch).tolist())
    image = torch.arange(float(np.prod(shape))).reshape(1, *shape)
    window = Window.over(shape, patch, step)
    buffer = torch.zeros(window.buffer_shape(1))
    result = torch.full((1, *shape), torch.nan)
    covered = 0
    parts = finished_rows(image, window, lambda tiles: [tile.clone() for tile in tiles], buffer, batch=batch)
    for first, logits in parts:
        rows = logits.shape[window.axis + 1]
        assert first == max(0, covered - 1)  # one row of overlap
        old = result.narrow(window.axis + 1, first, covered - first).clone()
        result.narrow(window.axis + 1, first, rows).copy_(logits)
        assert torch.equal(result.narrow(window.axis + 1, first, covered - first), old)  # finished rows stay
        covered = first + rows
    assert covered == shape[window.axis]
    torch.testing.assert_close(result, image, rtol=1e-5, atol=1e-4)


def test_the_buffer_does_not_grow_with_the_length_of_the_image():
    assert Window.over((1000, 40, 40), (32, 32, 32), 0.5).buffer_shape(7) == (7, 33, 40, 40)
    assert Window.over((40, 40, 1000), (32, 32, 32), 0.5).buffer_shape(7) == (7, 40, 40, 33)


class Counting(nn.Module):
    """Counts the tiles that a network sees."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.seen = 0

    def forward(self, batch: Tensor) -> Tensor:
        self.seen += len(batch)
        return self.network(batch)


def test_constant_tiles_are_computed_once_and_the_labels_stay_the_same():
    plan = threshold_model(0).plan  # intensities as they are: what is constant stays so
    torch.manual_seed(1)
    network = Counting(build_network(plan.network, 1, plan.outputs))
    model = Model(plan, [network], torch.device("cpu"), runtime="torch")
    array = np.full((1, 64, 32, 16), -1000.0)
    array[0, 40:50, 10:20, 4:12] = np.random.default_rng(0).normal(50, 20, size=(10, 10, 8))
    image = Volume(array, Grid((64, 32, 16), np.eye(4)))
    report = Report()
    fast = model.segment(image, report=report)
    ran, tiles = network.seen, report.facts["tiles_run"] + report.facts["tiles_reused"]
    network.seen = 0
    slow = model.segment(image, reuse=False)
    assert network.seen == tiles == 7 * 3 * 3
    assert ran == report.facts["tiles_run"] < tiles / 2
    np.testing.assert_array_equal(fast.array, slow.array)
    prepared = prepare(image, plan)
    torch.testing.assert_close(model.logits(prepared), model.logits(prepared, reuse=False), rtol=0, atol=0)


def test_mirroring_averages_over_all_flips_of_the_plans_axes():
    plan = tiny_plan(mirror_axes=(0, 2))
    model = tiny_model(plan)
    torch.manual_seed(3)
    tile = torch.randn(1, *plan.patch)
    image = Volume(tile.numpy(), Grid(plan.patch, np.eye(4)))
    with torch.inference_mode():
        flips = [(), (0,), (2,), (0, 2)]
        expected = sum(
            model.networks[0](tile[None].flip([axis + 2 for axis in flip])).flip([axis + 2 for axis in flip])[0]
            for flip in flips
        )
    torch.testing.assert_close(model.logits(image, mirror=True), expected / 4, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model.logits(image), expected / 4, rtol=1e-4, atol=1e-5)


def test_out_of_memory_halves_the_batch_and_says_so():
    def run(batch: Tensor) -> Tensor:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no room")
        return batch * 2

    predictor = Predictor(run, batch=8, reuse=False)
    tiles = [torch.full((1, 2, 2, 2), float(n)) for n in range(8)]
    with pytest.warns(UserWarning, match="ran out of memory; going on with") as caught:
        logits = predictor(tiles)
    assert [int(one[0, 0, 0, 0]) for one in logits] == [2 * n for n in range(8)]
    assert predictor.batch == 2
    assert len(caught) == 2  # 8 -> 4 -> 2


def test_out_of_memory_for_one_tile_is_not_hidden():
    def run(batch: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        Predictor(run)([torch.zeros(1, 2, 2, 2)])


def test_a_device_without_room_for_the_logits_leaves_them_on_the_host(monkeypatch):
    model = tiny_model()
    voxels = np.random.default_rng(0).normal(size=(1, 20, 16, 8)).astype(np.float32)
    image = Volume(voxels, Grid((20, 16, 8), np.eye(4)))
    expected = model.segment(image)
    zeros = torch.zeros

    def full_device(*arguments: object, **options: object) -> Tensor:
        if options.get("device") is not None:
            raise torch.OutOfMemoryError("no room")
        return zeros(*arguments, **options)

    monkeypatch.setattr("medseg.model.segmenter.torch.zeros", full_device)
    with pytest.warns(UserWarning, match="kept on the host"):
        np.testing.assert_array_equal(model.segment(image).array, expected.array)


def test_a_report_says_what_each_stage_took(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("medseg.model.timing.time.perf_counter", lambda: next(clock))
    report = Report()
    with report.stage("outer"):  # begins at 0
        with report.stage("inner"):  # 1 to 2
            pass
        with report.stage("inner"):  # 3 to 4
            pass
    # outer ends at 5: five seconds less the two of inner
    stages = report.to_dict()["stages"]
    assert {name: stage["seconds"] for name, stage in stages.items()} == {"outer": 3, "inner": 2}
    assert stages["outer"]["peak_memory_mb"] > 10
