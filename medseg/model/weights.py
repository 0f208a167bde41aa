"""Weights in and out of networks. Safetensors only: a model cannot run code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from medseg.errors import ModelError
from medseg.io.files import check_regular, written_whole
from medseg.model.plan import Plan
from medseg.networks.build import OWN, build_network
from medseg.networks.layers import is_head


def load_network(plan: Plan, file: Path) -> nn.Module:
    """Return the plan's network with the weights in a file. Raises ModelError for damage and for another plan's."""
    shapes = _shapes_in(file)
    network = shapes_of(plan)
    check_state(network, shapes, path=file)
    state = _read(file)
    if plan.network.kind in OWN:
        # Copied, since what is read lies in the file itself, which somebody may write to while the network runs.
        own = {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
        network.load_state_dict(own, assign=True)
        return network
    network = build_network(plan.network, plan.inputs, plan.outputs)
    load_state(network, state, path=file)
    return network


def shapes_of(plan: Plan) -> nn.Module:
    """Return the plan's network without memory: a plan that asks for more than there is must not get it."""
    with _WithoutMemory():
        return build_network(plan.network, plan.inputs, plan.outputs)


class _WithoutMemory(TorchFunctionMode):
    """Makes weights without memory and fills none in. What a network computes while it is built has memory.

    On `meta` both of these would load a compiler, which takes seconds and leaves a folder in the temporary one.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones):
            return func(*args, **(kwargs | {"device": "meta"}))
        name, target = getattr(func, "__name__", ""), args[0] if args else None
        in_place = name.endswith("_") and not name.endswith("__") and isinstance(target, Tensor) and target.is_meta
        return target if in_place else func(*args, **kwargs)


def _shapes_in(file: Path) -> dict[str, Tensor]:
    """Return the weights of a file without memory, from its header. Raises ModelError for damage, and other types."""
    with _opened(file) as weights:
        parts = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 - no mapping
        if other := {part.get_dtype() for part in parts.values()} - {"F64", "F32", "F16", "BF16"}:
            raise ModelError(
                f"The weights are of the type {min(other)}, and those of a network are floats of 16 to 64 bits.",
                path=file,
                reason="weights",
            )
        return {name: torch.empty(part.get_shape(), device="meta") for name, part in parts.items()}


def _read(file: Path) -> dict[str, Tensor]:
    with _opened(file) as weights:
        return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 - no mapping


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Give the opened file. Raises ModelError where it is missing, damaged, or is not a regular safetensors file."""
    try:
        check_regular(file)
        with safe_open(file, framework="pt") as weights:
            yield weights
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, LookupError) as error:
        raise ModelError(
            "The weights cannot be read: the file is missing, damaged, or is not a safetensors file.", path=file
        ) from error


def save_weights(network: nn.Module, path: str | PathLike[str], *, recipe: str = "") -> None:
    """Write a network's weights as safetensors, whole or not at all, with a hash of what they were trained by."""
    with written_whole(path) as beside:
        beside.write_bytes(serialize(state_of(network), {"recipe": recipe} if recipe else None))


def recipe_in(path: Path) -> str:
    """Return the hash that weights were written with; "" for none. Raises ModelError for a damaged file."""
    with _opened(path) as file:
        return str((file.metadata() or {}).get("recipe", ""))


def begin_with(network: nn.Module, plan: Plan, file: Path) -> set[str]:
    """Put weights, which lie beside their own plan, into the network of another; return the names of what begins anew.

    That are outputs of another number of labels, and heads that the given network lacks: they stay as they are. And
    kernels that look at the image, where its channels differ: a channel that the given model has by the same name keeps
    its kernels, and another one gets the mean of all.
    Raises ModelError where anything else differs.
    """
    before = Plan.load(file.parent / "plan.json")
    given, own = state_of(load_network(before, file)), state_of(network)
    at_image, heads = _differing(before, inputs=1), _differing(before, outputs=1)
    anew = {name for name in own if is_head(network, name) and name not in given}
    anew |= {name for name in heads & own.keys() if own[name].shape != given[name].shape}
    given = {name: weight for name, weight in given.items() if name in own or not is_head(network, name)}
    given |= {name: own[name] for name in anew}
    if _names(plan) != _names(before):
        given |= {name: _for_channels(given[name], before, plan) for name in at_image}
        anew |= at_image
    load_state(network, given, path=file)
    return anew


def _differing(plan: Plan, inputs: int = 0, outputs: int = 0) -> set[str]:
    """Return the names of the weights whose shape depends on the number of channels, or on that of outputs."""
    with _WithoutMemory():
        more = build_network(plan.network, plan.inputs + inputs, plan.outputs + outputs).state_dict()
    return {name for name, weight in shapes_of(plan).state_dict().items() if weight.shape != more[name].shape}


def _names(plan: Plan) -> list[str]:
    return [channel.name.casefold() for channel in plan.channels]


def _for_channels(kernels: Tensor, before: Plan, plan: Plan) -> Tensor:
    """Return kernels (features, channels, ...) of one plan for the channels of another."""
    names, mean = _names(before), kernels.mean(dim=1)
    parts = [kernels[:, names.index(name)] if name in names else mean for name in _names(plan)]
    return torch.stack(parts, dim=1)


def state_of(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a network, on the CPU; those that it has under two names are there twice, for the files."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in network.state_dict().items():
        kept = tensor.detach().cpu().contiguous()
        state[name] = kept.clone() if kept.data_ptr() in seen else kept
        seen.add(kept.data_ptr())
    return state


def load_state(network: nn.Module, state: dict[str, Tensor], *, path: Path | None = None) -> None:
    """Put weights into a network. Raises ModelError where names or shapes differ from what its plan makes."""
    check_state(network, state, path=path)
    # Compared already; batch normalization would ask for the counters that are left out.
    network.load_state_dict(state, strict=False)


def check_state(network: nn.Module, state: dict[str, Tensor], *, path: Path | None = None) -> None:
    """Compare weights with a network, which may be without memory. Raises ModelError where names or shapes differ."""
    expected = network.state_dict()
    wrong = sorted(set(expected) ^ set(state))
    wrong += sorted(name for name in set(expected) & set(state) if expected[name].shape != state[name].shape)
    if wrong:
        raise ModelError(
            f"The weights do not fit the plan: {len(wrong)} tensors differ, the first is {wrong[0]}. "
            "Use plan.json and weights of the same model.",
            path=path,
            reason="weights",
        )
