from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import make_grid, rotation
from hypothesis import given, settings
from hypothesis import strategies as st
from models import UNSCALED, Threshold, threshold_model, tiny_model, tiny_plan
from safetensors.torch import load_file, save_file
from torch import nn

from medseg.errors import GeometryError, InputError, ModelError, UnreadableFile, UsageError
from medseg.labels import make_labels
from medseg.model.plan import Channel
from medseg.model.preprocess import prepare
from medseg.model.segmenter import Model, pick_device
from medseg.model.soft import SoftMaps
from medseg.model.stored import find_model
from medseg.model.weights import load_network, save_weights, state_of
from medseg.process.normalize import CTNormalization, Rescale, ZScore
from medseg.volume import Grid, Volume


def ball(grid: Grid, radius_mm: float = 9.0) -> Volume:
    """Return a bright ball with a soft edge around the center of a grid; at `radius_mm` it has half its height."""
    center = grid.to_world((np.asarray(grid.shape) - 1) / 2)
    distance = np.linalg.norm(grid.to_world(np.stack(np.indices(grid.shape), axis=-1)) - center, axis=-1)
    return Volume((100 / (1 + np.exp((distance - radius_mm) / 1.5))).astype(np.float32)[None], grid)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


@pytest.mark.parametrize("step", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(20, 37, 9), (5, 6, 7), (16, 16, 8), (40, 3, 1)])
def test_blended_tiles_of_a_pointwise_network_are_the_network_on_the_whole_image(shape, step):
    torch.manual_seed(0)
    network = nn.Conv3d(1, 2, 1)
    model = Model(tiny_plan(), [network], torch.device("cpu"), runtime="torch")
    image = Volume(np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32), Grid(shape, np.eye(4)))
    with torch.inference_mode():
        whole = network(torch.from_numpy(image.array)[None])[0]
    torch.testing.assert_close(model.logits(image, step=step), whole, atol=1e-5, rtol=1e-5)


def test_an_identity_network_gives_back_its_input_exactly(grid):
    mask = np.random.default_rng(5).integers(0, 2, size=(1, *grid.shape)).astype(np.uint8)
    model = threshold_model(0.5, spacing_mm=grid.reoriented("RAS").spacing_mm)
    labels = model.segment(Volume(mask, grid))
    assert labels.grid is grid
    assert labels.array.dtype == np.uint8
    np.testing.assert_array_equal(labels.array, mask)


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(["RAS", "LPS", "PIR", "oblique"]),
    spacing=st.tuples(*[st.floats(0.7, 2.5)] * 3),
    orientation=st.sampled_from(["RAS", "LPS", "SAR"]),
)
def test_a_ball_is_found_on_any_grid_at_any_spacing_of_the_plan(kind, spacing, orientation):
    image = ball(make_grid(kind, (33, 29, 15)))
    model = threshold_model(50, spacing_mm=spacing, orientation=orientation)
    found = model.segment(image).array[0] == 1
    assert dice(found, image.array[0] > 50) > 0.97


def test_a_tilted_stack_is_segmented_where_it_is():
    affine = np.diag([1.2, 1.2, 3.0, 1.0])
    affine[1, 2] = 3.0 * np.tan(np.deg2rad(20))  # each slice lies further to the front than the one below
    affine[:3, :3] = rotation((3, 5, 8)) @ affine[:3, :3]
    image = ball(Grid((28, 40, 14), affine))
    assert not image.grid.is_orthogonal
    found = threshold_model(50, spacing_mm=(1, 1, 1)).segment(image)
    assert found.grid is image.grid
    assert dice(found.array[0] == 1, image.array[0] > 50) > 0.97


def test_of_a_tilted_stack_each_channel_has_its_own_air():
    affine = np.eye(4)
    affine[1, 2] = 0.3
    drawn = np.random.default_rng(0).uniform(((-1000,), (5,)), ((1000,), (6,)), (20 * 22 * 16, 2, 1))
    image = Volume(drawn.astype(np.float32).T.reshape(2, 20, 22, 16), Grid((20, 22, 16), affine))
    channels = (Channel(name="CT", normalization=Rescale()), Channel(name="MR", normalization=Rescale()))
    alone = prepare(image.with_array(image.array[1:]), tiny_plan(channels=channels[1:]))
    np.testing.assert_array_equal(prepare(image, tiny_plan(channels=channels)).array[1], alone.array[0])


@pytest.mark.parametrize("shape", [(1, 1, 1), (30, 30, 1), (1, 40, 20), (3, 3, 3)])
def test_constant_images_and_thin_volumes_are_background_and_no_error(shape):
    for value in (0, -1000, 7.5):
        image = Volume(np.full((1, *shape), value, np.float32), Grid(shape, np.eye(4)))
        model = Model(tiny_plan(), [Threshold(0.5)], torch.device("cpu"), runtime="torch")
        with pytest.warns(UserWarning, match="Channel MR of the image has one value everywhere"):
            assert (model.segment(image).array == 0).all()


def test_of_several_channels_the_constant_one_is_named():
    channels = (Channel(name="T1", normalization=UNSCALED), Channel(name="FLAIR", normalization=UNSCALED))
    array = np.zeros((2, 4, 4, 4), np.float32)
    array[0, 1, 2, 3] = 1
    with pytest.warns(UserWarning) as caught:
        tiny_model(tiny_plan(channels=channels)).segment(Volume(array, Grid((4, 4, 4), np.eye(4))))
    told = "Channel FLAIR of the image has one value everywhere: the labels mean nothing."
    assert [str(one.message) for one in caught] == [told]


def test_a_box_is_segmented_as_if_the_rest_were_not_there(grid):
    image = Volume(np.random.default_rng(1).normal(size=(1, *grid.shape)), grid)
    model = tiny_model()
    ends = grid.to_world([(0.6, 0.6, 0.6), np.asarray(grid.shape) - 1.6])
    start, stop = grid.covering(ends)
    inside = model.segment(image.cropped(start, stop)).array
    labels = model.segment(image, roi=ends).array
    i, j, k = (slice(a, b) for a, b in zip(start, stop, strict=True))
    np.testing.assert_array_equal(labels[:, i, j, k], inside)
    labels[:, i, j, k] = 0
    assert (labels == 0).all()


def test_where_the_plan_says_so_only_the_box_around_what_is_not_0_is_looked_at(grid):
    array = np.zeros((1, *grid.shape), np.int16)
    inside = (slice(1, 4), slice(2, 5), slice(0, 2))
    array[0][inside] = np.random.default_rng(2).integers(1, 50, size=(3, 3, 2))
    image = Volume(array, grid)
    # Above 0 after z-scoring: the mean is that of the box alone.
    zscore = (Channel(name="MR", normalization=ZScore()),)
    model = threshold_model(0, channels=zscore, crop_nonzero=True, spacing_mm=grid.reoriented("RAS").spacing_mm)
    soft = SoftMaps(probabilities=True)
    labels = model.segment(image, soft=soft).array[0]
    expected = np.zeros(grid.shape, np.uint8)
    expected[inside] = array[0][inside] > array[0][inside].mean()
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(soft.probabilities.array[1] > 0.5, expected)
    with pytest.warns(UserWarning, match="has one value everywhere"):
        assert model.segment(image.with_array(array * 0)).array.max() == 0


@pytest.mark.parametrize("fill", [0, -1024, 5000])
@pytest.mark.parametrize("widths", [[(9, 7), (3, 8), (6, 6)], [(0, 12), (0, 0), (0, 0)]])
def test_what_was_padded_or_taken_off_leaves_the_labels_as_they_are(fill, widths):
    array = np.random.default_rng(4).normal(100, 10, (1, 14, 16, 18)).astype(np.float32)
    zscore = (Channel(name="T1", normalization=ZScore()),)
    model = threshold_model(0, channels=zscore, measured_only=True)
    found = model.segment(Volume(array, Grid(array.shape[1:], np.eye(4)))).array[0]
    padded = np.pad(array, [(0, 0), *widths], constant_values=fill)
    np.testing.assert_array_equal(
        model.segment(Volume(padded, Grid(padded.shape[1:], np.eye(4)))).array[0], np.pad(found, widths)
    )


def test_a_channel_that_covers_a_part_is_normalized_by_that_part():
    array = np.random.default_rng(4).normal(100, 10, (2, 14, 16, 18)).astype(np.float32)
    array[1, :9] = 0
    plan = threshold_model(
        0, channels=tuple(Channel(name=name, normalization=ZScore()) for name in "ab"), measured_only=True
    ).plan
    prepared = prepare(Volume(array, Grid(array.shape[1:], np.eye(4))), plan).array
    assert (prepared[1, :9] == 0).all()
    assert prepared[1, 9:].std() == pytest.approx(1, abs=1e-4)
    assert prepared[0].std() == pytest.approx(1, abs=1e-4)


def test_what_a_ct_was_filled_up_with_is_air():
    ct = np.random.default_rng(4).normal(40, 30, (1, 14, 16, 18)).astype(np.float32)
    ct[:, :6, :8] = 0
    scheme = CTNormalization(lower=-100, upper=300, mean=0, std=100)
    plan = threshold_model(0, channels=(Channel(name="CT", normalization=scheme),), measured_only=True).plan
    prepared = prepare(Volume(ct, Grid(ct.shape[1:], np.eye(4))), plan).array
    assert (prepared[0, :6, :8] == -1).all()
    np.testing.assert_allclose(prepared[0, 6:], ct[0, 6:].clip(-100, 300) / 100, rtol=1e-6)


def test_a_bias_field_is_estimated_from_what_was_measured():
    i, j, k = np.indices((24, 24, 24))
    image = (np.random.default_rng(5).normal(100, 3, i.shape) * (1 + i / 24)).astype(np.float32)
    image[(j < 12) & (k < 12)] = 0
    channel = (Channel(name="T1", normalization=CTNormalization(mean=0, std=1), bias_correction="n4"),)
    plan = threshold_model(0, channels=channel, measured_only=True).plan
    even = prepare(Volume(image[None], Grid(image.shape, np.eye(4))), plan).array[0][image > 0]
    assert even.std() / even.mean() < 0.5 * image[image > 0].std() / image[image > 0].mean()


def test_a_plan_can_keep_the_largest_piece_alone():
    array = np.zeros((1, 12, 6, 6), np.float32)
    array[0, 1:3, 1:3, 1:3] = array[0, 6:10, 1:5, 1:5] = 1
    image = Volume(array, Grid(array.shape[1:], np.eye(4)))
    assert threshold_model(0.5).segment(image).array.sum() == 8 + 64
    found = threshold_model(0.5, keep_largest=((1,),)).segment(image).array
    assert found.sum() == 64
    assert found[0, 6:10, 1:5, 1:5].all()


def test_a_box_outside_the_image_is_refused(grid):
    image = Volume(np.zeros((1, *grid.shape)), grid)
    with pytest.raises(GeometryError, match="lies outside the image"):
        tiny_model().segment(image, roi=((1000, 1000, 1000), (1010, 1010, 1010)))


def test_logits_of_folds_are_averaged():
    # Thresholds of 10 and 30 average to one of 20: their scores are linear.
    plan = threshold_model(0).plan
    model = Model(plan, [Threshold(10), Threshold(30)], torch.device("cpu"), runtime="torch")
    values = np.array([5, 15, 19, 21, 25, 35], np.float32).reshape(1, 6, 1, 1)
    labels = model.segment(Volume(values, Grid((6, 1, 1), np.eye(4))))
    assert labels.array[0, :, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]


def test_label_values_are_those_of_the_table_in_a_type_that_holds_them():
    model = threshold_model(0.5, labels=make_labels([(70000, "far")]))
    labels = model.segment(Volume(np.arange(1.0, 65).reshape(1, 4, 4, 4), Grid((4, 4, 4), np.eye(4))))
    assert labels.array.dtype == np.uint32
    assert (labels.array == 70000).all()


def test_progress_counts_every_tile():
    seen: list[tuple[int, int]] = []
    image = Volume(np.arange(2560.0).reshape(1, 20, 16, 8), Grid((20, 16, 8), np.eye(4)))
    tiny_model().segment(image, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]  # 20 voxels, patch 16, step 8: two tiles


def test_another_number_of_channels_is_refused():
    channels = (Channel(name="T1", normalization=UNSCALED), Channel(name="FLAIR", normalization=UNSCALED))
    image = Volume(np.zeros((1, 4, 4, 4)), Grid((4, 4, 4), np.eye(4)))
    with pytest.raises(InputError, match=r"needs 2 channel\(s\) \(T1, FLAIR\) and the input has 1"):
        tiny_model(tiny_plan(channels=channels)).segment(image)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.6, 0.6, 0.6)])
def test_voxels_that_are_no_numbers_never_give_a_label_map(spacing):
    array = np.zeros((1, 8, 8, 8), np.float32)
    array[0, 1, 2, 3] = np.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        tiny_model(tiny_plan(spacing_mm=spacing)).segment(Volume(array, Grid((8, 8, 8), np.eye(4))))


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_weights_that_are_no_numbers_never_give_a_label_map(number):
    model = tiny_model()
    with torch.no_grad():
        model.networks[0].outputs[0].bias[1] = number
    with pytest.raises(ModelError, match="scores that are NaN or infinite"):
        model.segment(Volume(np.arange(2560.0).reshape(1, 20, 16, 8), Grid((20, 16, 8), np.eye(4))))


MANY = make_labels((value, f"label {value}") for value in range(1, 10_000))


@pytest.mark.parametrize(
    "changes", [{"spacing_mm": (1e-6,) * 3}, {"spacing_mm": (0.02,) * 3, "patch": (400, 400, 8), "labels": MANY}]
)
def test_an_image_that_would_outgrow_all_memory_is_refused(changes):
    with pytest.raises(InputError, match="are the most on this machine"):
        tiny_model(tiny_plan(**changes)).segment(Volume(np.zeros((1, 8, 8, 8)), Grid((8, 8, 8), np.eye(4))))


def test_voxels_that_are_zero_stay_zero_where_the_plan_says_so():
    plan = tiny_plan(
        channels=({"name": "MR", "normalization": {"kind": "zscore", "nonzero": True}},), spacing_mm=(0.5, 1, 1)
    )
    array = np.zeros((1, 12, 6, 6), np.float32)
    array[0, 6:] = np.random.default_rng(0).normal(100, 5, size=(6, 6, 6))
    prepared = prepare(Volume(array, Grid((12, 6, 6), np.eye(4))), plan).array[0]
    assert (prepared[:12] == 0).all()
    assert abs(prepared[12:].mean()) < 0.1


@pytest.fixture
def model_folder(tmp_path):
    model = tiny_model()
    model.plan.save(tmp_path / "plan.json")
    save_weights(model.networks[0], tmp_path / "fold_0.safetensors")
    return tmp_path


def test_a_model_folder_loads_anywhere_and_segments_the_same(model_folder, tmp_path_factory):
    image = Volume(np.random.default_rng(1).normal(size=(1, 18, 20, 9)), make_grid("LPS", (18, 20, 9)))
    moved = shutil.copytree(model_folder, tmp_path_factory.mktemp("elsewhere") / "model")
    np.testing.assert_array_equal(Model.load(moved).segment(image).array, tiny_model().segment(image).array)


def test_folds_can_be_chosen(model_folder):
    shutil.copy(model_folder / "fold_0.safetensors", model_folder / "fold_3.safetensors")
    assert len(Model.load(model_folder).networks) == 2
    assert len(Model.load(model_folder, folds=[3]).networks) == 1
    with pytest.raises(ModelError, match="cannot be read"):
        Model.load(model_folder, folds=[1])


def test_weights_that_are_missing_or_damaged_are_refused(model_folder):
    file = model_folder / "fold_0.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="damaged") as caught:
        Model.load(model_folder)
    assert caught.value.path == file
    file.unlink()
    with pytest.raises(ModelError, match="at least one fold_N.safetensors"):
        Model.load(model_folder)


def test_a_plan_of_more_features_than_memory_holds_is_refused_by_its_weights(model_folder):
    plan = json.loads((model_folder / "plan.json").read_text())
    plan["network"]["features"] = [2**16 for _ in plan["network"]["features"]]
    (model_folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ModelError, match="do not fit the plan"):
        Model.load(model_folder)


def test_a_pickle_is_refused_and_runs_nothing(model_folder, tmp_path_factory):
    class Attack:
        def __reduce__(self):
            return (open, (str(trap), "w"))

    trap = tmp_path_factory.mktemp("trap") / "sprung"
    torch.save(Attack(), model_folder / "fold_0.safetensors")
    with pytest.raises(ModelError, match="not a safetensors file"):
        Model.load(model_folder)
    assert not trap.exists()


def test_weights_of_another_plan_are_refused(model_folder):
    tiny_plan(labels=make_labels([(1, "a"), (2, "b")])).save(model_folder / "plan.json")
    with pytest.raises(ModelError, match=r"do not fit the plan: \d+ tensors differ, the first is"):
        Model.load(model_folder)


def test_an_unknown_model_lists_the_shipped_ones(tmp_path):
    with pytest.raises(ModelError, match=r"ships \(hippocampus\)"):
        find_model("liver")
    with pytest.raises(UnreadableFile, match="could not be read"):
        find_model("x" * 300)
    assert find_model("hippocampus").name == "hippocampus"
    assert find_model(tmp_path) == tmp_path


def test_weights_of_half_precision_are_read_as_what_the_network_computes_in(tmp_path):
    model = tiny_model()
    half = {name: tensor.half() for name, tensor in state_of(model.networks[0]).items()}
    save_file(half, tmp_path / "half.safetensors")
    network = load_network(model.plan, tmp_path / "half.safetensors")
    assert all(torch.equal(tensor, half[name].float()) for name, tensor in state_of(network).items())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_an_unknown_device_is_refused():
    with pytest.raises(UsageError, match="no device 'abacus'"):
        pick_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no device 'cuda'"):
            pick_device("cuda")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "network",
    [
        {"kind": "monai_unet", "channels": [2048, 4096], "strides": [2], "kernel_size": 7},
        {"kind": "monai_segresnet", "init_filters": 4096, "blocks_down": [64] * 3, "blocks_up": [64] * 2},
        {"kind": "monai_dynunet", "kernel_size": [64] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2],
         "filters": [4096] * 3},
        {"kind": "monai_swinunetr", "feature_size": 384, "num_heads": [1, 1, 1, 1], "window_size": 10},
    ],
)  # fmt: skip
def test_a_network_of_monai_is_built_only_where_its_weights_fit(model_folder, monkeypatch, network):
    monkeypatch.setattr("medseg.networks.monai_nets._drop_counters", drop := Counted())
    plan = json.loads((model_folder / "plan.json").read_text()) | {"network": network, "patch": [32, 32, 32]}
    (model_folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ModelError, match="do not fit the plan"):
        Model.load(model_folder)
    assert {parameter.device.type for parameter in drop.networks[0].parameters()} == {"meta"}
    assert len(drop.networks) == 1


class Counted:
    """Keeps the networks that it is called with."""

    def __init__(self):
        self.networks = []

    def __call__(self, network):
        self.networks.append(network)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.uint8])
def test_weights_that_are_no_floats_are_refused(model_folder, dtype):
    file = model_folder / "fold_0.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ModelError, match="those of a network are floats"):
        Model.load(model_folder)


@pytest.mark.parametrize("target", ["pipe", "/dev/zero", "folder"])
def test_weights_that_are_no_regular_file_are_refused(model_folder, target):
    file = model_folder / "fold_0.safetensors"
    file.unlink()
    if target == "pipe":
        os.mkfifo(file)
    elif target == "folder":
        file.mkdir()
    else:
        file.symlink_to(target)
    with pytest.raises(ModelError, match="missing, damaged, or is not a safetensors file"):
        Model.load(model_folder)
