"""Options of a training that a network or a step can have: dropout, less memory, precision, compilation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from medseg.errors import ModelError
from medseg.model.runtime import tf32
from medseg.networks.layers import is_head
from medseg.train.settings import TrainSettings

ENCODER = ("stem.", "encoder.")
"""What the names of an encoder's weights begin with."""

Forward = Callable[[Tensor], Any]


def forward_of(network: nn.Module, settings: TrainSettings) -> Forward:
    """Return how a network is run in training: with dropout, recomputing or compiled, where the recipe says so.

    The weights and their names stay those of the network.
    """
    if settings.dropout:
        add_dropout(network, settings.dropout)
    if settings.checkpointing:
        recompute(network)
    return torch.compile(network) if settings.compile else network


def add_dropout(network: nn.Module, share: float) -> None:
    """Drop a share of what convolutions and linear layers give, in training mode, at random.

    Of a convolution whole feature maps are dropped, since neighbors say the same; of a linear layer, whose tokens are
    many, single numbers. The outputs stay whole, and so does what has one feature alone: a gate, for example.
    """
    for name, module in network.named_modules():
        if is_head(network, name):
            continue
        if isinstance(module, nn.Conv3d) and module.out_channels > 1:
            module.register_forward_hook(partial(_dropped, functional.dropout3d, share))
        elif isinstance(module, nn.Linear) and module.out_features > 1:
            module.register_forward_hook(partial(_dropped, functional.dropout, share))


def _dropped(drop: Callable[..., Tensor], share: float, module: nn.Module, _: Any, features: Tensor) -> Tensor:
    return drop(features, share, training=module.training)


def freeze(network: nn.Module, settings: TrainSettings, anew: Collection[str]) -> None:
    """Keep the encoder as it is, where the recipe says so, but for the weights whose names are in `anew`.

    Raises ModelError for a network without an encoder of its own.
    """
    if settings.frozen != "encoder":
        return
    encoder = [(name, weight) for name, weight in network.named_parameters() if name.startswith(ENCODER)]
    if not encoder:
        raise ModelError(
            'This network has no encoder that could be kept as it is: set "frozen" to "nothing" in train.json.',
            reason="frozen",
        )
    for name, weight in encoder:
        weight.requires_grad_(name in anew)


def recompute(network: nn.Module) -> None:
    """Keep only what goes into and out of each stage; the backward pass computes the rest again.

    A network says in `stages` what these are.
    Source: Chen et al., "Training deep nets with sublinear memory cost", 2016.
    """
    stages: list[nn.Module] = getattr(network, "stages", [])
    for stage in stages:
        stage.forward = partial(checkpoint, stage.forward, use_reentrant=False)


@contextmanager
def told_if_not_compiled(settings: TrainSettings) -> Iterator[None]:
    """Turn what torch says of a network that it cannot compile, at its first step, into a ModelError of one line."""
    if not settings.compile:  # the compiler takes seconds to import
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise ModelError(
            f"torch.compile cannot compile the network here ({type(error).__name__}). Install a C++ compiler that "
            'torch can use, or set "compile" to false in train.json.',
            reason="compile",
        ) from error


def seed_dropout(settings: TrainSettings, step: int, rank: int) -> None:
    """Make what is dropped a function of (seed, step, process) alone."""
    if settings.dropout:
        torch.manual_seed(int(np.random.SeedSequence([settings.seed, step, rank]).generate_state(1)[0]))


def precision_of(settings: TrainSettings, device: torch.device) -> torch.dtype:
    """Return the type that convolutions compute in: what the recipe says, or by default the half that CUDA is fast in.

    Never half by default on a CPU or on Apple's GPUs.
    """
    if settings.precision == "tf32":
        return torch.float32
    if settings.precision != "auto":
        named: torch.dtype = getattr(torch, settings.precision)
        return named
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def computing(settings: TrainSettings, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context for both passes, in which float32 on CUDA is float32, unless the recipe says tf32."""
    return tf32(settings.precision == "tf32") if device.type == "cuda" else nullcontext()


def autocast(settings: TrainSettings, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context for the forward pass, in which a network computes in the precision of the recipe."""
    precision = precision_of(settings, device)
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


def scaler_of(settings: TrainSettings, device: torch.device) -> torch.amp.GradScaler | None:
    """Return what keeps small gradients above the smallest float16; no other precision needs it."""
    return torch.amp.GradScaler(device.type) if precision_of(settings, device) == torch.float16 else None
