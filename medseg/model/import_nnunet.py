"""nnU-Net v2 models, read into plans and weights of medseg.

nnU-Net's arrays are (z, y, x), and its plans may permute them further; everything is turned into the order of medseg's
arrays here, once. What nnU-Net does with an image is followed step by step (`docs/importing.md`); what this cannot
express is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medseg.errors import ModelError
from medseg.io.text import read_json
from medseg.labels import make_labels
from medseg.model.imported import DESCRIBED, Imported, unsupported
from medseg.model.nnunet_weights import renamed, turned
from medseg.model.plan import Channel, Plan, Region, Resampling
from medseg.model.untrusted import checksum, read_checkpoint, weights_in
from medseg.networks.kinds import Network
from medseg.problems import first_problem
from medseg.process.normalize import CTNormalization, Normalization, Rescale, ZScore

REORIENTING_READERS = ("NibabelIOWithReorient", "SimpleITKIOWithReorient")
"""nnU-Net's readers that turn images to RAS; the others leave them as they are stored."""

Whole = Annotated[int, Field(ge=1, le=2**16)]
PerLevel = Whole | list[Whole]
Blocks = Annotated[int, Field(ge=1, le=64)]
BlocksPerLevel = Blocks | list[Blocks]
PerAxis = Whole | list[Whole | list[Whole]]

POSTPROCESSING = "postprocessing.json"
"""What nnU-Net found by cross-validation that a clean-up improves."""


class _Kwargs(BaseModel):
    """What nnU-Net's networks are made with; entries that are not here are refused."""

    model_config = ConfigDict(extra="forbid")

    n_stages: Annotated[int, Field(ge=2, le=16)]
    features_per_stage: PerLevel
    conv_op: Literal["torch.nn.modules.conv.Conv3d", "torch.nn.Conv3d"]
    kernel_sizes: PerAxis
    strides: PerAxis
    n_conv_per_stage: BlocksPerLevel | None = None
    n_blocks_per_stage: BlocksPerLevel | None = None
    n_conv_per_stage_decoder: BlocksPerLevel
    conv_bias: bool = False
    norm_op: Literal["torch.nn.modules.instancenorm.InstanceNorm3d", "torch.nn.InstanceNorm3d"]
    norm_op_kwargs: dict[str, Any]
    dropout_op: str | None = None
    dropout_op_kwargs: dict[str, Any] | None = None
    nonlin: Literal["torch.nn.LeakyReLU", "torch.nn.modules.activation.LeakyReLU"]
    nonlin_kwargs: dict[str, Any] | None = None
    deep_supervision: bool = False
    nonlin_first: Literal[False] = False


class _Architecture(BaseModel):
    network_class_name: str
    arch_kwargs: _Kwargs


class _Configuration(BaseModel):
    """One entry of `configurations` in plans.json, with what it inherits."""

    preprocessor_name: Literal["DefaultPreprocessor"] = "DefaultPreprocessor"
    patch_size: list[Whole]
    spacing: list[float]
    normalization_schemes: list[str]
    use_mask_for_norm: list[bool]
    resampling_fn_data: str
    resampling_fn_data_kwargs: dict[str, Any]
    resampling_fn_seg: str
    resampling_fn_seg_kwargs: dict[str, Any]
    resampling_fn_probabilities: str
    resampling_fn_probabilities_kwargs: dict[str, Any]
    architecture: _Architecture
    previous_stage: str | None = None


def is_nnunet(folder: Path) -> bool:
    """Return whether a folder holds a trained nnU-Net v2 model."""
    return (folder / "plans.json").is_file() and (folder / "dataset.json").is_file()


def read_nnunet(
    folder: Path,
    *,
    orientation: str | None = None,
    folds: Sequence[int] | None = None,
    checkpoint: str = "final",
    stages: int = 2,
) -> Imported:
    """Return the model in a trained-model folder of nnU-Net v2 (`Trainer__Plans__Configuration`).

    `folds` are all that are there, or else the fold "all", which becomes fold 0; `checkpoint` is final, best or latest.
    A cascade, of at most so many `stages`, is read with its first stage, which must lie beside it.
    Raises ModelError for files that are missing, damaged or unsafe, and for what medseg does not have, by its name.
    """
    files = _checkpoints(folder, folds, checkpoint)
    plans, dataset = (read_json(folder / name, DESCRIBED, ModelError) for name in ("plans.json", "dataset.json"))
    read = {fold: read_checkpoint(file) for fold, file in files.items()}
    first = next(iter(read.values()))
    try:
        name = str(first["init_args"]["configuration"])
        configuration = _configuration(plans, name)
        axes = _axes(plans["transpose_forward"])
        mirror = [axes.index(axis) for axis in first.get("inference_allowed_mirroring_axes") or ()]
        found = {"mirror_axes": tuple(sorted(mirror)), "keep_largest": _keep_largest(folder, tuple(files))}
        plan = Plan.model_validate(dict(_plan(plans, dataset, configuration, axes, orientation)) | found)
        first_stage = _first_stage(folder, name, configuration, plan, stages)
        states = {fold: content["network_weights"] for fold, content in read.items()}
        facts = (
            f"nnU-Net v2, {plans['dataset_name']}, {first['trainer_name']}, {plans['plans_name']}, {name}",
            *(f"fold {fold}: {file.name}, SHA-256 {checksum(file)}" for fold, file in files.items()),
        )
    except ValidationError as error:
        raise ModelError(f"The plans of the model are not supported: {first_problem(error)}.", path=folder) from error
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(
            "The files of the model do not fit together, or are not those of nnU-Net v2.", path=folder
        ) from error
    weights = {fold: turned(weights_in(state, renamed(plan)), axes) for fold, state in states.items()}
    previous = None
    if first_stage:
        previous = read_nnunet(
            first_stage, orientation=orientation, folds=folds, checkpoint=checkpoint, stages=stages - 1
        )
    return Imported(plan.model_copy(update={"name": f"{plan.name} {name}"}), weights, facts, previous)


def _keep_largest(folder: Path, folds: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the groups of labels of which cross-validation found that the largest piece alone is better."""
    crossval = folder / f"crossval_results_folds_{'_'.join(map(str, folds))}"
    file = next((one / POSTPROCESSING for one in (folder, crossval) if (one / POSTPROCESSING).is_file()), None)
    if file is None:
        return ()
    content = read_json(file, DESCRIBED, ModelError)
    for name in content["postprocessing_fns"]:
        if name != "remove_all_but_largest_component_from_segmentation":
            raise unsupported("postprocessing", str(name))
    groups = (_flat(kwargs["labels_or_regions"]) for kwargs in content["postprocessing_kwargs"])
    return tuple(tuple(sorted(set(group))) for group in groups)


def _flat(numbers: Any) -> list[int]:
    return [one for part in numbers for one in _flat(part)] if isinstance(numbers, list) else [int(numbers)]


def _first_stage(folder: Path, name: str, configuration: _Configuration, plan: Plan, stages: int) -> Path | None:
    """Return where the stage before lies, if there is one. Raises ModelError for one that medseg cannot run."""
    if configuration.previous_stage is None:
        return None
    kwargs = configuration.resampling_fn_seg_kwargs | {"is_seg": False}
    order, separate = _resampler(configuration.resampling_fn_seg, kwargs)
    same = plan.resampling is not None and separate == plan.resampling.separate
    if plan.regions or stages < 2 or not same or order != 1 or "torch" in configuration.resampling_fn_seg:
        raise unsupported("kind of cascade", name)
    before = folder.with_name(folder.name.removesuffix(name) + configuration.previous_stage)
    if before == folder or not is_nnunet(before):
        raise ModelError(
            "This is the second stage of a cascade, and its first stage does not lie beside it. Give the folder or the "
            "archive that holds both, and choose this one by its configuration.",
            path=folder,
        )
    return before


def _checkpoints(folder: Path, folds: Sequence[int] | None, checkpoint: str) -> dict[int, Path]:
    name = f"checkpoint_{checkpoint}.pth"
    numbered = {file.parent.name.removeprefix("fold_"): file for file in folder.glob(f"fold_*/{name}")}
    there = {int(fold): file for fold, file in sorted(numbered.items()) if fold.isdecimal()}
    if not there and "all" in numbered:
        there = {0: numbered["all"]}
    wanted = list(there if folds is None else folds)
    if not wanted or set(wanted) - set(there):
        raise ModelError(
            f"Not every fold that is asked for has a {name}; folds that have one: {sorted(there) or 'none'}. "
            "Choose other folds, or another checkpoint: final, best or latest.",
            path=folder,
        )
    return {fold: there[fold] for fold in wanted}


def _configuration(plans: Any, name: str) -> _Configuration:
    """Return a configuration with all that it inherits. Raises ModelError for kinds that medseg does not have."""
    chain = [plans["configurations"][name]]
    while "inherits_from" in chain[-1]:
        if len(chain) > len(plans["configurations"]):
            raise ModelError("The plans of the model inherit from each other in a circle.")
        chain.append(plans["configurations"][chain[-1]["inherits_from"]])
    fields = {key: value for part in reversed(chain) for key, value in part.items()}
    if len(fields["patch_size"]) != 3:
        raise ModelError(
            "This is a 2d configuration, and medseg's networks are 3-D. Import the 3d_fullres configuration instead.",
            reason="unsupported",
        )
    if "architecture" not in fields:
        fields["architecture"] = _older_architecture(fields)
    return _Configuration.model_validate(fields)


def _older_architecture(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the network as later plans describe it; before nnU-Net 2.3 its numbers stood one by one."""
    name, stages = fields["UNet_class_name"], len(fields["n_conv_per_stage_encoder"])
    base, most = fields["UNet_base_num_features"], fields["unet_max_num_features"]
    kwargs = {
        "n_stages": stages,
        "features_per_stage": [min(base * 2**stage, most) for stage in range(stages)],
        "conv_op": "torch.nn.Conv3d",
        "kernel_sizes": fields["conv_kernel_sizes"],
        "strides": fields["pool_op_kernel_sizes"],
        "n_blocks_per_stage" if name == "ResidualEncoderUNet" else "n_conv_per_stage": fields[
            "n_conv_per_stage_encoder"
        ],
        "n_conv_per_stage_decoder": fields["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": "torch.nn.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
    }
    return {"network_class_name": name, "arch_kwargs": kwargs}


def _axes(transpose: Sequence[int]) -> list[int]:
    """Return for each axis of medseg's arrays, (x, y, z), the axis of nnU-Net's network that it is."""
    if sorted(transpose) != [0, 1, 2]:
        raise ValueError("no permutation")
    return [list(transpose).index(2 - axis) for axis in range(3)]


def _plan(
    plans: Any, dataset: Any, configuration: _Configuration, axes: Sequence[int], orientation: str | None
) -> Plan:
    regions, labels = _labels(dataset)
    reorients = plans["image_reader_writer"] in REORIENTING_READERS
    return Plan(
        name=str(plans["dataset_name"]),
        channels=_channels(plans, dataset, configuration),
        labels=make_labels(labels),
        regions=regions,
        orientation=orientation or ("RAS" if reorients else "as_stored"),
        spacing_mm=_turn(configuration.spacing, axes),
        patch=_turn(configuration.patch_size, axes),
        resampling=_resampling(configuration),
        normalize_first=True,
        crop_nonzero=True,
        previous=configuration.previous_stage is not None,
        network=_network(configuration.architecture, axes),
    )


def _channels(plans: Any, dataset: Any, configuration: _Configuration) -> tuple[Channel, ...]:
    names = dataset["channel_names"] if "channel_names" in dataset else dataset["modality"]
    key = "foreground_intensity_properties_per_channel"
    intensities = plans[key] if key in plans else plans["foreground_intensity_properties_by_modality"]
    rows = zip(configuration.normalization_schemes, configuration.use_mask_for_norm, strict=True)
    return tuple(
        Channel(name=str(names[str(place)]), normalization=_normalization(scheme, masked, intensities.get(str(place))))
        for place, (scheme, masked) in enumerate(rows)
    )


def _normalization(scheme: str, masked: bool, numbers: Any) -> Normalization:
    fixed: dict[str, Normalization] = {
        "ZScoreNormalization": ZScore(nonzero=masked),
        "RescaleTo01Normalization": Rescale(),
        "NoNormalization": CTNormalization(mean=0, std=1),
        "RGBTo01Normalization": CTNormalization(mean=0, std=255),
    }
    if scheme == "CTNormalization":
        limits = {"lower": numbers["percentile_00_5"], "upper": numbers["percentile_99_5"]}
        return CTNormalization(**limits, mean=numbers["mean"], std=max(numbers["std"], 1e-8))
    if scheme not in fixed:
        raise unsupported("normalization", scheme)
    return fixed[scheme]


def _labels(dataset: Any) -> tuple[tuple[Region, ...], list[tuple[int, str]]]:
    """Return the regions, if outputs overlap, and values and names of the label map, to which "ignore" is no label."""
    members = {
        str(name): [int(part) for part in (value if isinstance(value, list) else [value])]
        for name, value in dataset["labels"].items()
        if name != "ignore"
    }
    if all(len(values) == 1 for values in members.values()):
        return (), [(values[0], name) for name, values in members.items()]
    named = [(name, tuple(sorted(set(values)))) for name, values in members.items() if set(values) != {0}]
    order = [int(value) for value in dataset["regions_class_order"]]
    regions = tuple(
        Region(name=name, members=values, value=value) for (name, values), value in zip(named, order, strict=True)
    )
    return regions, list({region.value: (region.value, region.name) for region in regions}.values())


def _resampling(configuration: _Configuration) -> Resampling | None:
    functions = (configuration.resampling_fn_data, configuration.resampling_fn_probabilities)
    if set(functions) == {"no_resampling_hack"}:
        return None
    order, separate = _resampler(functions[0], configuration.resampling_fn_data_kwargs)
    back, separate_scores = _resampler(functions[1], configuration.resampling_fn_probabilities_kwargs)
    if back != 1:
        raise unsupported("order of resampling scores", str(back))
    return Resampling(method="resize", order=order, separate=separate, separate_scores=separate_scores)


def _resampler(function: str, kwargs: dict[str, Any]) -> tuple[Any, float | None]:
    """Return the order of one of nnU-Net's resampling functions and from which anisotropy on an axis is separate."""
    if function == "resample_torch_fornnunet":
        known: dict[str, Any] = {"force_separate_z": None, "mode": "linear", "aniso_axis_mode": "nearest-exact"}
        known |= {"num_threads": None, "device": None, "memefficient_seg_resampling": None, "order": 1}
    elif function == "resample_data_or_seg_to_shape":
        known = {"force_separate_z": False, "order": 3, "order_z": 0}
    else:
        raise unsupported("resampling", function)
    known |= {"is_seg": False, "separate_z_anisotropy_threshold": 3.0}
    chosen = known | kwargs
    for key in chosen:
        fixed = key in {"mode", "aniso_axis_mode", "order_z", "is_seg"}
        if key not in known or (fixed and chosen[key] != known[key]):
            raise unsupported(f"setting of {function}", f"{key}={chosen[key]}")
    if chosen["force_separate_z"] is True:
        raise unsupported(f"setting of {function}", "force_separate_z=True")
    return chosen["order"], None if chosen["force_separate_z"] is False else chosen["separate_z_anisotropy_threshold"]


def _network(architecture: _Architecture, axes: Sequence[int]) -> Network:
    kwargs, kind = architecture.arch_kwargs, architecture.network_class_name.split(".")[-1]
    blocks = {"PlainConvUNet": kwargs.n_conv_per_stage, "ResidualEncoderUNet": kwargs.n_blocks_per_stage}.get(kind)
    if blocks is None:
        raise unsupported("network", kind)
    norm, slope = (
        {"eps": 1e-5, "affine": False} | kwargs.norm_op_kwargs,
        (kwargs.nonlin_kwargs or {}).get("negative_slope", 0.01),
    )
    if (norm["eps"], norm["affine"], slope) != (1e-5, True, 0.01):
        raise unsupported("normalization or activation of a network", f"eps={norm['eps']}, slope={slope}")
    stages = kwargs.n_stages
    return Network(
        residual=kind == "ResidualEncoderUNet",
        features=_per_level(kwargs.features_per_stage, stages),
        kernels=tuple(_turn(size, axes) for size in _per_axis(kwargs.kernel_sizes, stages)),
        strides=tuple(_turn(size, axes) for size in _per_axis(kwargs.strides, stages)),
        blocks=_per_level(blocks, stages),
        decoder_blocks=_per_level(kwargs.n_conv_per_stage_decoder, stages - 1),
        heads=0,
    )


def _per_level(values: PerLevel, levels: int) -> tuple[int, ...]:
    return (values,) * levels if isinstance(values, int) else tuple(values)


def _per_axis(values: PerAxis, levels: int) -> list[list[int]]:
    sizes = [values] * levels if isinstance(values, int) else values
    return [[size] * 3 if isinstance(size, int) else size for size in sizes]


def _turn(values: Sequence[Any], axes: Sequence[int]) -> Any:
    """Return three values along nnU-Net's axes along medseg's."""
    if len(values) != 3:
        raise ValueError("three axes are needed")
    return tuple(values[axis] for axis in axes)
