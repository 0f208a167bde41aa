"""A smaller and faster model out of a trained U-Net++, which holds a network of each lower depth."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from shutil import copyfile

from medseg.errors import ModelError, UsageError
from medseg.model.plan import Plan
from medseg.model.stored import check_new, find_model, new_folder
from medseg.model.weights import load_network, recipe_in, save_weights, shapes_of, state_of
from medseg.networks.kinds import NestedNetwork

CARRIED = ("fingerprint.json", "train.json", "capacity.json")
"""What is known of the training, and holds for the smaller model, too."""


def prune_model(model: str | PathLike[str], folder: str | PathLike[str], *, depth: int) -> Plan:
    """Return the plan of a trained U-Net++ with only its first `depth` resolutions, and write it as a model folder.

    All of its weights are weights of the model; what it gives are the logits of the head of that depth. The scores of
    the model do not hold for it, and are not taken along. With all resolutions it is the model itself.
    Raises ModelError where the model is not a U-Net++ or cannot be read, UsageError for a depth that it does not have
    and for a folder that holds something, OutputError where that cannot be written.
    Source: Zhou et al., "UNet++", IEEE Transactions on Medical Imaging 2020.
    """
    source, where = find_model(model), Path(folder)
    check_new(where)
    whole = Plan.load(source / "plan.json")
    plan = pruned_plan(whole, depth)
    files = sorted(source.glob("fold_*.safetensors"))
    if not files:
        raise ModelError("The model to prune has no weights: its folder needs fold_N.safetensors.", path=source)
    network = shapes_of(plan)
    with new_folder(where) as beside:
        beside.mkdir()
        plan.save(beside / "plan.json")
        for file in files:
            weights = state_of(load_network(whole, file))
            kept = {name: weights[name] for name in network.state_dict()}
            network.load_state_dict(kept, assign=True)
            save_weights(network, beside / file.name, recipe=recipe_in(file))
        for name in CARRIED:
            if (source / name).is_file():
                copyfile(source / name, beside / name)
    return plan


def pruned_plan(plan: Plan, depth: int) -> Plan:
    """Return a plan whose network has the first `depth` resolutions of a U-Net++. Raises as `prune_model` does."""
    network = plan.network
    if not isinstance(network, NestedNetwork):
        raise ModelError(
            f"Only a U-Net++ (unet_plus_plus) holds smaller networks, and the model has the kind {network.kind}.",
            reason="network",
        )
    levels = len(network.features)
    if not 2 <= depth <= levels:
        raise UsageError(f"The network of the model can be pruned to 2 to {levels} resolutions, and not to {depth}.")
    return plan.model_copy(update={"network": network.pruned(depth)})
