"""Networks of MONAI, built from the numbers in a plan."""

from __future__ import annotations

from importlib.util import find_spec
from types import MethodType
from typing import Any

from torch import Tensor, nn

from medseg.errors import ModelError
from medseg.networks.layers import cropped, cropped_heads, padded
from medseg.networks.monai_kinds import MonaiNetwork

HEADS = {
    "monai_unet": r"model\.2\.",
    "monai_segresnet": r"conv_final\.2\.",
    "monai_dynunet": r"output_block\.|deep_supervision_heads\.|.*super_head\.",
    "monai_swinunetr": r"out\.",
    "monai_unetr": r"out\.",
    "monai_mednext": r"out_0\.|out_blocks\.",
}
"""What the names of the last layers of each kind begin with, as a regular expression."""

STAGES = {
    "monai_segresnet": ("down_layers", "up_layers"),
    "monai_mednext": ("enc_stages", "down_blocks", "bottleneck", "up_blocks", "dec_stages"),
}
"""The lists of modules that checkpointing may compute again."""

NEED_EINOPS = {"monai_swinunetr": "SwinUNETR", "monai_unetr": "UNETR"}


def build(network: MonaiNetwork, inputs: int, outputs: int) -> nn.Module:
    """Return an untrained network of MONAI that takes (B, inputs, I, J, K) to logits (B, outputs, I, J, K).

    Raises ModelError where MONAI refuses its numbers, or einops is missing.
    """
    check_installed(network)
    from monai.networks import nets

    kinds = {
        "monai_unet": nets.UNet,
        "monai_segresnet": nets.SegResNet,
        "monai_dynunet": nets.DynUNet,
        "monai_swinunetr": nets.SwinUNETR,
        "monai_unetr": nets.UNETR,
        "monai_mednext": nets.MedNeXt,
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
    _drop_cross_attention(built)
    return _of_any_size(built, network)


def check_installed(network: MonaiNetwork) -> None:
    """Raise ModelError where a network needs einops, and it is missing."""
    if network.kind in NEED_EINOPS and not find_spec("einops"):
        raise ModelError(
            f"{NEED_EINOPS[network.kind]} needs a package that is not installed. "
            'Install it with: pip install "medseg[swin]"',
            reason="not_installed",
        )


def _drop_counters(network: nn.Module) -> None:
    """Leave tables and counters of whole numbers out of the weights: they follow from the kind, or serve training."""
    for module in network.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not buffer.is_floating_point():
                module.register_buffer(name, buffer, persistent=False)


def _drop_cross_attention(network: nn.Module) -> None:
    """Leave out what a transformer block has for an image that UNETR never gives it: these weights would not learn."""
    for module in network.modules():
        if getattr(module, "with_cross_attention", None) is False:
            module.norm_cross_attn = nn.Identity()


def _of_any_size(built: nn.Module, network: MonaiNetwork) -> nn.Module:
    """Let a network take images whose edges it cannot halve as often as it wants to: with zeros behind them."""
    inner = type(built).forward

    def forward(self: nn.Module, image: Tensor) -> Tensor | list[Tensor]:
        logits = inner(self, _sized(image, network))
        size = image.shape[2:]
        if not isinstance(logits, Tensor):
            return cropped_heads(logits, size)
        if logits.ndim > image.ndim:  # DynUNet in training: heads of all resolutions, brought to the finest
            return [cropped(head, size) for head in logits.unbind(1)]
        return cropped(logits, size)

    built.forward = MethodType(forward, built)
    built.last_layers = HEADS[network.kind]  # type: ignore[assignment]
    lists = [getattr(built, name) for name in STAGES.get(network.kind, ())]
    built.stages = [stage for stages in lists for stage in stages]  # type: ignore[assignment]
    return built


def _sized(image: Tensor, network: MonaiNetwork) -> Tensor:
    """Return images that a network can halve. Raises ModelError for larger ones than UNETR was built for."""
    if network.kind == "monai_unetr" and any(
        edge > most for edge, most in zip(image.shape[2:], network.img_size, strict=True)
    ):
        raise ModelError(
            f"UNETR was built for patches of {network.img_size} voxels, and these have {tuple(image.shape[2:])}. "
            "Make the plan anew for another patch.",
            reason="patch",
        )
    return padded(image, network.divisor)
