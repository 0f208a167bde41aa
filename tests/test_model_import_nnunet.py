"""Models of nnU-Net v2 become model folders: the same function, the same decisions, and refusals by name."""

from __future__ import annotations

import json
import zipfile

import nnunet_files as files
import nnunet_steps
import numpy as np
import pytest
import torch
from scipy import ndimage

import medseg
from medseg.errors import GeometryError, ModelError, OutputError, UsageError
from medseg.model import importing
from medseg.model.importing import import_model
from medseg.model.plan import Resampling
from medseg.model.segmenter import Model
from medseg.process.normalize import CTNormalization, Rescale, ZScore
from medseg.volume import Grid, Volume

pytestmark = pytest.mark.filterwarnings("ignore:The model does not say how its training images were stored")


def imported(tmp_path, *, plan=None, data=None, **kind):
    """Return the plan of a model that was written and imported, which must load."""
    files.write_model(tmp_path / "source", plan=plan, data=data, **kind)
    result = import_model(tmp_path / "source", tmp_path / "model")
    assert Model.load(tmp_path / "model", device="cpu", runtime="torch").plan == result
    return result


def with_configuration(**changes):
    return files.plans({"3d_fullres": files.configuration(**changes)})


@pytest.mark.parametrize("transpose", [[0, 1, 2], [2, 0, 1], [1, 0, 2]])
@pytest.mark.parametrize("residual", [False, True])
def test_the_network_is_the_same_function_whatever_the_order_of_axes(tmp_path, residual, transpose):
    architecture = files.architecture(residual=residual)
    plan = files.plans({"3d_fullres": files.configuration(architecture=architecture)}, transpose_forward=transpose)
    result = imported(tmp_path, plan=plan, residual=residual)
    network = Model.load(tmp_path / "model", device="cpu", runtime="torch").networks[0]
    image = torch.randn(1, 1, *files.PATCH)
    # From the axes of nnU-Net's network to (z, y, x), and from there to (x, y, z).
    order = [0, 1, *(2 + transpose.index(2 - axis) for axis in range(3))]
    with torch.inference_mode():
        expected = files.logits(files.weights(residual=residual), image).permute(order)
        found = network(image.permute(order))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert result.patch == tuple(image.permute(order).shape[2:])
    assert [result.spacing_mm[2 - transpose[axis]] for axis in range(3)] == files.SPACING
    assert result.mirror_axes == tuple(sorted(2 - transpose[axis] for axis in (0, 2)))


CASES = {
    "plain": {},
    "coarse along the first axis of the network": {"transpose": [2, 0, 1], "spacing": (1.0, 1.2, 5.0)},
    "isotropic": {"plan_spacing": [1.3, 0.9, 1.1], "spacing": (1.0, 1.1, 1.0)},
    "smaller than a patch": {"shape": (3, 9, 8), "plan_spacing": [1.3, 0.9, 1.1], "spacing": (1.0, 1.1, 1.0)},
    "stripped": {"masked": True},
    "flips": {"mirror": True},
    "regions": {"order": [2, 1]},
}


@pytest.mark.parametrize("case", CASES)
def test_labels_are_those_that_nnunet_gives(tmp_path, case):
    shape, spacing, transpose, plan_spacing, masked, mirror, order = (
        CASES[case].get(key, default)
        for key, default in (
            ("shape", (9, 25, 22)), ("spacing", (5.0, 1.2, 1.0)), ("transpose", [0, 1, 2]),
            ("plan_spacing", files.SPACING), ("masked", False), ("mirror", False), ("order", []),
        )
    )  # fmt: skip
    plan = with_configuration(spacing=plan_spacing, use_mask_for_norm=[masked]) | {"transpose_forward": transpose}
    data = (
        files.dataset(labels={"background": 0, "all": [1, 2], "one": 2}, regions_class_order=order) if order else None
    )
    outputs = len(order) or 3
    imported(tmp_path, plan=plan, data=data, outputs=outputs)
    model = Model.load(tmp_path / "model", device="cpu", runtime="torch")
    turned = tuple(np.array(shape)[np.argsort(transpose)])
    image = ndimage.gaussian_filter(np.random.default_rng(4).normal(100, 300, turned), 1)[None].astype(np.float32)
    image[:, :2] = image[:, :, :3] = 0
    spacing = [spacing[place] for place in np.argsort(transpose)]
    network = run_of(files.weights(outputs=outputs))
    flips = (0, 2) if mirror else ()
    expected = nnunet_steps.segment(image, spacing, network, plan, mirror=flips, order=order).transpose(2, 1, 0)
    affine = np.diag([-spacing[2], spacing[1], spacing[0], 1])
    volume = Volume(image.transpose(0, 3, 2, 1), Grid(expected.shape, affine))
    found = model.segment(volume, mirror=mirror).array[0]
    assert len(np.unique(expected)) > 1
    assert (found != expected).mean() < 1e-3


def run_of(state):
    def network(tile):
        with torch.inference_mode():
            return files.logits(state, torch.from_numpy(tile)[None].float())[0].numpy()

    return network


def test_a_cascade_runs_both_stages_as_nnunet_does(tmp_path):
    plan = files.plans({"3d_lowres": files.configuration(spacing=[6.0, 1.5, 1.5])})
    second = plan | {"configurations": plan["configurations"] | {"3d_fullres": files.configuration()}}
    second["configurations"]["3d_fullres"] |= {"previous_stage": "3d_lowres"}
    states = {"3d_lowres": files.weights(2), "3d_fullres": files.weights(4, inputs=3)}
    for name, state in states.items():
        folder = files.write_model(tmp_path / f"Trainer__Plans__{name}", plan=second)
        content = files.checkpoint(state, init_args={"configuration": name})
        torch.save(content, folder / "fold_0" / "checkpoint_final.pth")
    import_model(tmp_path, tmp_path / "model", configuration="3d_fullres")
    assert (tmp_path / "model/previous/MODEL_CARD.md").is_file()
    spacing = (5.0, 1.27, 0.97)
    image = ndimage.gaussian_filter(np.random.default_rng(4).normal(100, 300, (9, 25, 22)), 1)[None].astype(np.float32)
    first = {"transpose_forward": [0, 1, 2], "configurations": {"3d_fullres": plan["configurations"]["3d_lowres"]}}
    before = nnunet_steps.segment(image, spacing, run_of(states["3d_lowres"]), first)
    expected = nnunet_steps.segment(image, spacing, run_of(states["3d_fullres"]), second, before=before).transpose(
        2, 1, 0
    )
    volume = Volume(image.transpose(0, 3, 2, 1), Grid(expected.shape, np.diag([*spacing[::-1], 1])))
    found = Model.load(tmp_path / "model", device="cpu", runtime="torch").segment(volume).array[0]
    assert len(np.unique(expected)) > 1
    assert (found != expected).mean() < 1e-3
    alone = Model.load(tmp_path / "model", device="cpu", runtime="torch")
    alone.previous = Model.load(tmp_path / "model" / "previous", device="cpu", runtime="torch")
    alone.previous.networks[0].outputs[0].bias.data[0] += 100  # a first stage that finds nothing
    assert (alone.segment(volume).array[0] != found).mean() > 0.01


def test_what_nnunet_does_with_an_image_is_in_the_plan(tmp_path):
    plan = imported(tmp_path)
    assert plan.name == "Dataset007_Test 3d_fullres"
    assert (plan.crop_nonzero, plan.normalize_first, plan.orientation) == (True, True, "as_stored")
    assert plan.resampling is not None
    assert plan.resampling == Resampling(method="resize", order=3, separate=3, separate_scores=3)
    assert [(label.value, label.name) for label in plan.labels] == [(1, "left"), (2, "right")]
    card = (tmp_path / "model" / "MODEL_CARD.md").read_text()
    assert "nnU-Net v2, Dataset007_Test, nnUNetTrainer, nnUNetPlans, 3d_fullres" in card
    assert len(card.split("SHA-256 ")[1].split("\n")[0]) == 64


@pytest.mark.parametrize(
    ("scheme", "masked", "expected"),
    [
        ("CTNormalization", False, CTNormalization(lower=-900, upper=300, mean=40, std=90)),
        ("ZScoreNormalization", False, ZScore()),
        ("ZScoreNormalization", True, ZScore(nonzero=True)),
        ("RescaleTo01Normalization", False, Rescale()),
        ("NoNormalization", False, CTNormalization(mean=0, std=1)),
        ("RGBTo01Normalization", False, CTNormalization(mean=0, std=255)),
    ],
)
def test_normalizations(tmp_path, scheme, masked, expected):
    plan = imported(tmp_path, plan=with_configuration(normalization_schemes=[scheme], use_mask_for_norm=[masked]))
    assert plan.channels[0].normalization == expected


def test_several_channels_in_their_order(tmp_path):
    schemes = {"normalization_schemes": ["ZScoreNormalization"] * 2, "use_mask_for_norm": [False] * 2}
    data = files.dataset(channel_names={"1": "FLAIR", "0": "T1"})
    plan = imported(tmp_path, plan=with_configuration(**schemes), data=data, inputs=2)
    assert [channel.name for channel in plan.channels] == ["T1", "FLAIR"]


def test_regions_are_painted_in_their_order(tmp_path):
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    plan = imported(tmp_path, data=files.dataset(labels=labels, regions_class_order=[1, 3, 2]))
    assert [(region.name, region.members, region.value) for region in plan.regions] == [
        ("whole", (1, 2, 3), 1), ("core", (2, 3), 3), ("enhancing", (3,), 2),
    ]  # fmt: skip
    assert plan.painted == (0, 1, 3, 2)
    assert [(label.value, label.name) for label in plan.labels] == [(1, "whole"), (2, "enhancing"), (3, "core")]


def test_the_ignore_label_is_no_output_and_300_labels_are(tmp_path):
    plan = imported(tmp_path, data=files.dataset(labels={"background": 0, "a": 1, "b": 2, "ignore": 3}))
    assert plan.outputs == 3
    many = {"background": 0, **{f"label {value}": value for value in range(1, 301)}}
    plan = imported(tmp_path / "many", data=files.dataset(labels=many), outputs=301)
    image = Volume(np.random.default_rng(0).normal(size=(1, 12, 16, 4)), Grid((12, 16, 4), np.diag([1.1, 0.9, 4, 1])))
    model = Model.load(tmp_path / "many" / "model", device="cpu", runtime="torch")
    assert model.segment(image).array.dtype == np.uint16


def test_plans_from_before_the_architecture_was_in_them(tmp_path):
    configuration = files.configuration() | {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 3,
        "unet_max_num_features": 5,
        "n_conv_per_stage_encoder": [2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
        "num_pool_per_axis": [1, 2, 2],
        "pool_op_kernel_sizes": files.STRIDES,
        "conv_kernel_sizes": files.KERNELS,
    }
    del configuration["architecture"]
    older = files.plans({"3d_fullres": configuration})
    older["foreground_intensity_properties_by_modality"] = older.pop("foreground_intensity_properties_per_channel")
    data = files.dataset(modality={"0": "T1"})
    del data["channel_names"]
    state = files.weights()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "FEATURES", [3, 5, 5])  # 3, 6, 12, at most 5
        state = files.weights()
    files.write_model(tmp_path / "source", plan=older, data=data)
    torch.save(files.checkpoint(state), tmp_path / "source" / "fold_0" / "checkpoint_final.pth")
    assert import_model(tmp_path / "source", tmp_path / "model").network.features == (3, 5, 5)


def test_a_configuration_inherits(tmp_path):
    parent = files.configuration()
    child = {"inherits_from": "parent", "spacing": [2.0, 1.0, 1.0]}
    plan = imported(tmp_path, plan=files.plans({"parent": parent, "3d_fullres": child}))
    assert plan.spacing_mm == (1, 1, 2)


TORCH_KWARGS = {"is_seg": False, "force_separate_z": False, "memefficient_seg_resampling": False}


@pytest.mark.parametrize(
    ("function", "kwargs", "expected"),
    [
        ("resample_torch_fornnunet", TORCH_KWARGS, (1, None)),
        ("resample_torch_fornnunet", TORCH_KWARGS | {"force_separate_z": None}, (1, 3)),
        (
            "resample_data_or_seg_to_shape",
            {"is_seg": False, "order": 1, "separate_z_anisotropy_threshold": 2},
            (1, None),
        ),
        ("no_resampling_hack", {}, None),
    ],
)
def test_ways_to_resample(tmp_path, function, kwargs, expected):
    changes = {f"resampling_fn_{part}": function for part in ("data", "probabilities")}
    changes |= {f"resampling_fn_{part}_kwargs": kwargs for part in ("data", "probabilities")}
    how = imported(tmp_path, plan=with_configuration(**changes)).resampling
    assert (how and (how.order, how.separate)) == expected


def test_folds_and_checkpoints(tmp_path):
    source = files.write_model(tmp_path / "source", folds=(0, 2, "all"))
    import_model(source, tmp_path / "each")
    assert sorted(file.name for file in (tmp_path / "each").glob("fold*")) == [
        "fold_0.safetensors",
        "fold_2.safetensors",
    ]
    import_model(source, tmp_path / "one", folds=[2])
    assert [file.name for file in (tmp_path / "one").glob("fold*")] == ["fold_2.safetensors"]
    whole = files.write_model(tmp_path / "whole", folds=("all",), name="best")
    import_model(whole, tmp_path / "all", checkpoint="best")
    assert [file.name for file in (tmp_path / "all").glob("fold*")] == ["fold_0.safetensors"]
    with pytest.raises(ModelError, match=r"folds that have one: \[0, 2\]"):
        import_model(source, tmp_path / "none", folds=[1])
    with pytest.raises(ModelError, match="checkpoint_latest.pth; folds that have one: none"):
        import_model(source, tmp_path / "none", checkpoint="latest")
    with pytest.raises(UsageError, match="one of final, best, latest; here it is 'newest'"):
        import_model(source, tmp_path / "none", checkpoint="newest")
    assert not (tmp_path / "none").exists()


def test_orientation_is_that_of_the_reader_or_the_users_or_as_stored_with_a_warning(tmp_path):
    source = files.write_model(tmp_path / "source")
    with pytest.warns(UserWarning, match="does not say how its training images were stored"):
        import_model(source, tmp_path / "a")
    assert import_model(source, tmp_path / "b", orientation="LPS").orientation == "LPS"
    reader = files.plans(image_reader_writer="NibabelIOWithReorient")
    assert import_model(files.write_model(tmp_path / "reader", plan=reader), tmp_path / "c").orientation == "RAS"
    with pytest.raises(GeometryError, match="one letter of each pair"):
        import_model(source, tmp_path / "d", orientation="RRS")


def test_as_stored_means_the_order_of_the_array(tmp_path):
    imported(tmp_path)
    model = Model.load(tmp_path / "model", device="cpu", runtime="torch")
    voxels = np.random.default_rng(2).normal(size=(1, 12, 16, 5))
    affine = np.diag([1.1, 0.9, 4, 1])
    first = model.segment(Volume(voxels, Grid((12, 16, 5), affine))).array
    flipped = model.segment(Volume(voxels, Grid((12, 16, 5), np.diag([-1, -1, 1, 1]) @ affine))).array
    np.testing.assert_array_equal(first, flipped)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": [16, 16], "spacing": [1, 1]}, "2d configuration"),
        ({"previous_stage": "3d_lowres"}, "its first stage does not lie beside it"),
        ({"previous_stage": "../x"}, "do not fit together"),
        ({"previous_stage": "3d_lowres", "resampling_fn_seg_kwargs": {"order": 0}}, "kind of cascade"),
        ({"preprocessor_name": "Mine"}, "preprocessor_name: Input should be 'DefaultPreprocessor'"),
        ({"normalization_schemes": ["MyNormalization"]}, "normalization that medseg does not have: MyNormalization"),
        ({"resampling_fn_data": "mine"}, "resampling that medseg does not have: mine"),
        ({"resampling_fn_data_kwargs": {"order": 3, "order_z": 1}}, "order_z=1"),
        ({"resampling_fn_data_kwargs": {"force_separate_z": True}}, "force_separate_z=True"),
        ({"resampling_fn_data_kwargs": {"window": 2}}, "window=2"),
        ({"resampling_fn_data_kwargs": {"order": 2}}, "order: Input should be 0, 1 or 3"),
        (
            {"resampling_fn_probabilities_kwargs": {"order": 3}},
            "order of resampling scores that medseg does not have: 3",
        ),
        ({"architecture": files.architecture(conv_op="torch.nn.Conv2d")}, "conv_op: Input should be"),
        ({"architecture": files.architecture(nonlin="torch.nn.ReLU")}, "nonlin: Input should be"),
        ({"architecture": files.architecture(nonlin_kwargs={"negative_slope": 0.2})}, "slope=0.2"),
        ({"architecture": files.architecture(norm_op_kwargs={"eps": 1e-3, "affine": True})}, "eps=0.001"),
        ({"architecture": files.architecture(squeeze_excitation=True)}, "squeeze_excitation: Extra inputs"),
        ({"architecture": files.architecture() | {"network_class_name": "a.Primus"}}, "network .*: Primus"),
        ({"architecture": files.architecture(strides=[[2, 1, 1]] * 3)}, "first stride is 1, 1, 1"),
        ({"spacing": [1.0, -1.0, 1.0]}, "spacing_mm.1: Input should be greater than or equal to 0.000001"),
        ({"inherits_from": "3d_fullres"}, "inherit from each other in a circle"),
        ({"use_mask_for_norm": [False, False]}, "do not fit together"),
    ],
)
def test_what_medseg_does_not_have_is_refused_by_its_name(tmp_path, changes, message):
    files.write_model(tmp_path / "source", plan=with_configuration(**changes))
    with pytest.raises(ModelError, match=message):
        import_model(tmp_path / "source", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_weights_of_another_network_are_refused(tmp_path):
    files.write_model(tmp_path / "source", residual=True)
    with pytest.raises(ModelError, match=r"do not fit the plan: \d+ tensors differ"):
        import_model(tmp_path / "source", tmp_path / "model")
    state = files.weights() | {"encoder.stages.0.0.convs.0.norm.running_mean": torch.zeros(3)}
    file = tmp_path / "source" / "fold_0" / "checkpoint_final.pth"
    torch.save(files.checkpoint(state), file)
    with pytest.raises(ModelError, match="weights that medseg does not have: .*running_mean"):
        import_model(tmp_path / "source", tmp_path / "model")
    compiled = {f"_orig_mod.{name}": tensor.half() for name, tensor in files.weights().items()}
    torch.save(files.checkpoint(compiled), file)
    import_model(tmp_path / "source", tmp_path / "model")


def test_damaged_descriptions(tmp_path):
    source = files.write_model(tmp_path / "source")
    (source / "plans.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        import_model(source, tmp_path / "model")
    (source / "plans.json").write_text("[]")
    with pytest.raises(ModelError, match="do not fit together"):
        import_model(source, tmp_path / "model")
    files.write_model(source, plan=files.plans(transpose_forward=[0, 0, 1]))
    with pytest.raises(ModelError, match="do not fit together"):
        import_model(source, tmp_path / "model")


def test_an_exported_archive_and_a_choice_of_configurations(tmp_path):
    results = tmp_path / "results" / "Dataset007_Test"
    for name in ("3d_fullres", "3d_lowres"):
        files.write_model(results / f"nnUNetTrainer__nnUNetPlans__{name}")
    with zipfile.ZipFile(tmp_path / "model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(path for path in results.rglob("*") if path.is_file()):
            archive.write(file, file.relative_to(tmp_path / "results"))
        archive.writestr("Dataset007_Test/nnUNetTrainer__nnUNetPlans__3d_fullres/fold_0/progress.png", b"picture")
    for place, source in enumerate((tmp_path / "model.zip", tmp_path / "results")):
        with pytest.raises(ModelError, match="holds 2: 3d_fullres, 3d_lowres. Choose one"):
            import_model(source, tmp_path / f"model {place}")
        import_model(source, tmp_path / f"model {place}", configuration="3d_fullres")
    assert Model.load(tmp_path / "model 0", device="cpu").plan == Model.load(tmp_path / "model 1", device="cpu").plan
    files.write_model(results / "nnUNetTrainerNoMirroring__nnUNetPlans__3d_fullres")
    with pytest.raises(ModelError, match="holds 2: 3d_fullres, 3d_fullres.*give its own folder"):
        import_model(tmp_path / "results", tmp_path / "other", configuration="3d_fullres")
    with pytest.raises(ModelError, match="the source holds 0"):
        import_model(tmp_path / "model.zip", tmp_path / "other", configuration="2d")


def test_sources_and_targets_that_are_none(tmp_path, monkeypatch):
    source = files.write_model(tmp_path / "source")
    with pytest.raises(ModelError, match="a folder or a zip archive; this is neither"):
        import_model(source / "plans.json", tmp_path / "model")
    with pytest.raises(UsageError, match="a folder of its own"):
        import_model(source, source)
    (tmp_path / "empty").mkdir()
    medseg.import_model(source, tmp_path / "empty")
    assert json.loads((tmp_path / "empty" / "plan.json").read_text())["format"] == 1

    def full(_state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importing, "serialize", full)
    with pytest.raises(OutputError, match="could not be written: No space left on device"):
        import_model(source, tmp_path / "model")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "source"]


def test_what_crossvalidation_found_about_largest_pieces_is_kept(tmp_path):
    source = tmp_path / "source"
    files.write_model(source)
    name = "remove_all_but_largest_component_from_segmentation"
    rules = {
        "postprocessing_fns": [name, name],
        "postprocessing_kwargs": [{"labels_or_regions": [2, [1, 2]]}, {"labels_or_regions": 1}],
    }
    crossval = source / "crossval_results_folds_0"
    crossval.mkdir()
    (crossval / "postprocessing.json").write_text(json.dumps(rules))
    assert import_model(source, tmp_path / "model").keep_largest == ((1, 2), (1,))
    rules["postprocessing_fns"][1] = "smooth"
    (crossval / "postprocessing.json").write_text(json.dumps(rules))
    with pytest.raises(ModelError, match="postprocessing.*smooth"):
        import_model(source, tmp_path / "other")
    (crossval / "postprocessing.json").write_text("{}")
    with pytest.raises(ModelError, match="do not fit together"):
        import_model(source, tmp_path / "third")
    nested = "[" * 900 + "]" * 900
    (crossval / "postprocessing.json").write_text(
        f'{{"postprocessing_fns": ["{name}"], "postprocessing_kwargs": [{{"labels_or_regions": {nested}}}]}}'
    )
    with pytest.raises(ModelError, match="do not fit together"):
        import_model(source, tmp_path / "third")
    rules = {"postprocessing_fns": [name], "postprocessing_kwargs": [{"labels_or_regions": [-1]}]}
    (crossval / "postprocessing.json").write_text(json.dumps(rules))
    with pytest.raises(ModelError, match="not supported: keep_largest"):
        import_model(source, tmp_path / "third")
