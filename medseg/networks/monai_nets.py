"""Networks of MONAI, built from the numbers in a plan."""

from __future__ import annotations

from importlib.util import find_spec
from types import MethodType
from typing import Any

from torch import Tensor, nn

from medseg.errors import ModelError
from medseg.networks.layers import cropped, padded
from medseg.networks.monai_kinds import MonaiNetwork


def build(network: MonaiNetwork, inputs: int, outputs: int) -> nn.Module:
    """Return an untrained network of MONAI that takes (B, inputs, I, J, K) to logits (B, outputs, I, J, K).

    Raises ModelError where MONAI refuses its numbers, or einops is missing.
    """
    if network.kind == "monai_swinunetr" and not find_spec("einops"):
        raise ModelError(
            'SwinUNETR needs a package that is not installed. Install it with: pip install "medseg[swin]"',
            reason="not_installed",
        )
    from monai.networks import nets

    kinds = {
        "monai_unet": nets.UNet,
        "monai_segresnet": nets.SegResNet,
        "monai_dynunet": nets.DynUNet,
        "monai_swinunetr": nets.SwinUNETR,
    }
    settings: dict[str, Any] = network.model_dump(exclude={"kind"})
    try:
        built: nn.Module = kinds[network.kind](spatial_dims=3, in_channels=inputs, out_channels=outputs, **settings)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            "MONAI cannot build the network of the model from its numbers: they contradict each other, or name a layer "
            "that MONAI does not have.",
            reason="network",
        ) from error
    _drop_counters(built)
    return _of_any_size(built, network)


def _drop_counters(network: nn.Module) -> None:
    """Leave tables and counters of whole numbers out of the weights: they follow from the kind, or serve training."""
    for module in network.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not buffer.is_floating_point():
                module.register_buffer(name, buffer, persistent=False)


def _of_any_size(built: nn.Module, network: MonaiNetwork) -> nn.Module:
    """Let a network take images whose edges it cannot halve as often as it wants to: with zeros behind them."""
    inner = type(built).forward

    def forward(self: nn.Module, image: Tensor) -> Tensor | list[Tensor]:
        logits: Tensor = inner(self, padded(image, network.divisor))
        if logits.ndim > image.ndim:  # DynUNet in training: heads of all resolutions, brought to the finest
            return [cropped(head, image.shape[2:]) for head in logits.unbind(1)]
        return cropped(logits, image.shape[2:])

    built.forward = MethodType(forward, built)
    return built
