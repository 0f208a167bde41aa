"""The networks that can be planned and trained, each adapted to the patch, the spacing and the device by its rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

from pydantic import ValidationError

from medseg.errors import UsageError
from medseg.networks.kinds import AnyNetwork, NestedNetwork, Network, SegFormerNumbers, TransUNetNumbers, Triple
from medseg.networks.monai_kinds import MonaiMedNeXt, MonaiSegResNet, MonaiSwinUNETR, MonaiUNETR
from medseg.problems import first_problem

SMALLEST_MAP = 4
"""Voxels that the coarsest feature map keeps along each axis."""

MOST_FEATURES, MOST_WIDTH = 256, 1024
"""Of the coarsest resolutions by default, and at the finest where a user asks for more."""

RESIDUAL_BLOCKS = (1, 3, 4, 6)
"""Of the encoder at each resolution; those below have as many as the last. Isensee et al., "nnU-Net revisited"."""

TRANSFORMER_BLOCKS, STAGE_BLOCKS = 4, 2
"""Of a TransUNet in all, and of each stage of a SegFormer."""

MOST_EMBEDDED, HEAD = 512, 32
"""Features of the coarsest stages of a SegFormer, and of each attention head."""

SEGRESNET_BLOCKS = (1, 2, 2, 4)
"""Of the encoder at each resolution; those below have as many as the last. Myronenko, BrainLes 2018."""

MOST_HALVINGS = 6
"""Of networks that halve all axes alike: what their kinds allow, with patches of 256 voxels along each edge."""

KEPT = 0.75
"""Of an edge, at least, by a patch that its network can divide; else the network adds zeros behind."""

Numbers = tuple[float, float, float]

Preset = Literal["S", "M", "L"]
SIZES: dict[str, Preset] = {"S": "S", "M": "M", "L": "L"}


class NetworkOptions(TypedDict, total=False):
    """Which network is planned, and how large.

    `network` is one of NETWORKS, by default "unet". `width` counts its features at the finest resolution, by default
    what the device can train on, and `depth` its resolutions, by default as many as the patch allows. `size` is a
    preset, by default M.
    """

    network: str
    width: int | None
    depth: int | None
    size: Preset


@dataclass(frozen=True)
class Frame:
    """What is decided before the network: the widest patch, its spacing in mm, and how large the network may be.

    `width` counts features at the finest resolution, which a user may have `asked` for; `depth` counts resolutions
    (None: as many as the patch allows).
    """

    widest: Triple
    spacing_mm: Numbers
    width: int
    depth: int | None = None
    size: Preset = "M"
    asked: bool = False

    @property
    def scaled_width(self) -> int:
        """The width that was asked for, or else that of the device as the preset scales it: half, as is, or double."""
        return self.width if self.asked else max(1, round(self.width * {"S": 0.5, "M": 1, "L": 2}[self.size]))


@dataclass(frozen=True)
class Architecture:
    """A network by its name: what it is, what it adapts to, and its numbers for a frame."""

    summary: str
    adapts: str
    numbers: Callable[[Frame], AnyNetwork]


def unet(frame: Frame) -> Network:
    """Return a plain U-Net: features double with each resolution, up to MOST_FEATURES."""
    kernels, strides = topology(frame.widest, frame.spacing_mm, frame.depth)
    width = frame.scaled_width
    features = tuple(min(max(MOST_FEATURES, width), width * 2**level) for level in range(len(strides)))
    return Network(features=features, kernels=kernels, strides=strides, heads=heads_for(len(strides)))


def heads_for(levels: int) -> int:
    """Return how many lower resolutions of so many levels learn by outputs of their own. Empirical: two are enough."""
    return max(0, min(2, levels - 2))


def residual_unet(frame: Frame) -> Network:
    """Return a U-Net whose encoder has RESIDUAL_BLOCKS, and whose decoder one convolution at each resolution."""
    plain = unet(frame)
    levels = len(plain.strides)
    blocks = (*RESIDUAL_BLOCKS, *(RESIDUAL_BLOCKS[-1],) * levels)[:levels]
    return plain.model_copy(update={"residual": True, "blocks": blocks, "decoder_blocks": (1,) * (levels - 1)})


def attention_unet(frame: Frame) -> Network:
    """Return a plain U-Net with an attention gate on each skip."""
    return unet(frame).model_copy(update={"attention": True})


def unet_plus_plus(frame: Frame) -> NestedNetwork:
    """Return a U-Net++ with the resolutions and features of the plain U-Net; a step takes about twice as long."""
    plain = unet(frame)
    return NestedNetwork(features=plain.features, kernels=plain.kernels, strides=plain.strides)


def transunet(frame: Frame) -> TransUNetNumbers:
    """Return a plain U-Net with TRANSFORMER_BLOCKS in its bottleneck."""
    plain = unet(frame)
    return TransUNetNumbers(unet=plain, layers=TRANSFORMER_BLOCKS, attention_heads=attention_heads(plain.features[-1]))


def segformer(frame: Frame) -> SegFormerNumbers:
    """Return a SegFormer whose stages are the last four resolutions of a U-Net, but never the finest.

    On patches of 128 x 128 x 128 voxels its stages divide them by 4, 8, 16 and 32, as in the paper; smaller ones begin
    at a half. The first embedding does what the resolutions before it would have done.
    """
    kernels, strides = topology(frame.widest, frame.spacing_mm, frame.depth)
    stages = min(4, len(strides) - 1)
    first = _triple([math.prod(along) for along in zip(*strides[:-stages][1:], strides[-stages], strict=True)])
    width = 2 * frame.scaled_width
    features = tuple(min(width * 2**level, max(MOST_EMBEDDED, width)) for level in range(stages))
    return SegFormerNumbers(
        features=features,
        layers=(STAGE_BLOCKS,) * stages,
        attention_heads=tuple(map(attention_heads, features)),
        kernels=kernels[-stages:],
        strides=(first, *strides[len(strides) - stages + 1 :]),
        decoder_features=2 * width,
    )


def attention_heads(width: int) -> int:
    """Return into how many heads so many features are shared out: of 32 each, or of a few more where 32 do not fit."""
    return next(heads for heads in range(max(1, min(64, width // HEAD)), 0, -1) if width % heads == 0)


def segresnet(frame: Frame) -> MonaiSegResNet:
    """Return a SegResNet with its authors' residual blocks, groups of channels as far as eight divide the width."""
    levels, width = halvings(frame) + 1, frame.scaled_width
    return MonaiSegResNet(
        init_filters=width,
        norm=("GROUP", {"num_groups": math.gcd(width, 8)}),
        blocks_down=(*SEGRESNET_BLOCKS, *(SEGRESNET_BLOCKS[-1],) * levels)[:levels],
        blocks_up=(1,) * (levels - 1),
    )


def mednext(frame: Frame) -> MonaiMedNeXt:
    """Return a MedNeXt: kernels of 3 and two blocks at each resolution, each of which has a head.

    Raises UsageError for patches of which one voxel would be left: it cannot be normalized.
    """
    if max(frame.widest) <= 2:
        raise UsageError(f"A MedNeXt needs patches of over 2 voxels along an axis, and these have {frame.widest}.")
    blocks = (2,) * halvings(frame)
    return MonaiMedNeXt(
        init_filters=frame.scaled_width,
        kernel_size=3,
        deep_supervision=True,
        use_residual_connection=True,
        blocks_down=blocks,
        blocks_up=blocks,
    )


def swin_unetr(frame: Frame) -> MonaiSwinUNETR:
    """Return a SwinUNETR, whose features are a multiple of 12; windows of 4 voxels on small patches, else of 8."""
    _check_no_depth(frame, "SwinUNETR", 5)
    features = max(12, 12 * round(frame.scaled_width / 12))
    heads = min(3, features // 12)
    return MonaiSwinUNETR(
        feature_size=features,
        num_heads=(heads, 2 * heads, 4 * heads, 8 * heads),
        window_size=4 if max(frame.widest) <= 64 else 8,
        norm_name=("group", {"num_groups": 12}),
    )


def unetr(frame: Frame) -> MonaiUNETR:
    """Return a UNETR: twelve transformer blocks with 12 heads, each as wide as the finest features."""
    _check_no_depth(frame, "UNETR", 5)
    width = frame.scaled_width
    edges = [edge // 16 * 16 if edge // 16 * 16 >= KEPT * edge else -(-edge // 16) * 16 for edge in frame.widest]
    return MonaiUNETR(
        img_size=_triple(edges), feature_size=width, hidden_size=12 * width, mlp_dim=48 * width, num_heads=12
    )


def _check_no_depth(frame: Frame, name: str, levels: int) -> None:
    if frame.depth not in (None, levels):
        raise UsageError(f"A {name} always has {levels} resolutions, and not {frame.depth}.")


def halvings(frame: Frame) -> int:
    """Return how often a network that halves all axes alike halves a patch: at least once, or as `depth` says.

    Empirical: while the map keeps as many voxels as a cube with SMALLEST_MAP along its edges, and one along each axis.
    Raises UsageError for a depth that the patch does not have.
    """
    by_mean = math.prod(frame.widest) ** (1 / 3) / SMALLEST_MAP
    most = min(MOST_HALVINGS, max(1, math.floor(math.log2(max(1.0, min(by_mean, *frame.widest))) + 1e-9)))
    return most if frame.depth is None else _checked_depth(frame.depth, most + 1) - 1


ANY = "patch, spacing, channels, classes, device; any size"
ALIKE = "patch, channels, classes, device; any size"

MONAI_NAMES = {
    "monai_segresnet": "segresnet",
    "monai_mednext": "mednext",
    "monai_swinunetr": "swin_unetr",
    "monai_unetr": "unetr",
}
"""Under which names MONAI's networks can be planned, by their kind."""

NETWORKS: dict[str, Architecture] = {
    "unet": Architecture("3D U-Net (Ronneberger 2015, Cicek 2016)", ANY, unet),
    "residual_unet": Architecture("U-Net with a residual encoder (nnU-Net revisited, 2024)", ANY, residual_unet),
    "attention_unet": Architecture("U-Net with attention gates on its skips (Oktay 2018)", ANY, attention_unet),
    "unet_plus_plus": Architecture(
        "U-Net++: nested dense skips (Zhou 2018, 2020)", f"{ANY}; can be pruned", unet_plus_plus
    ),
    "transunet": Architecture(
        "U-Net whose coarsest features attend to each other (Chen 2021; 3D: Chen 2024)", ANY, transunet
    ),
    "segformer": Architecture(
        "transformer of several resolutions with a small head (Xie 2021; 3D: Perera 2024)", ANY, segformer
    ),
    "segresnet": Architecture("SegResNet of MONAI (Myronenko 2018)", ALIKE, segresnet),
    "mednext": Architecture("MedNeXt of MONAI (Roy 2023)", ALIKE, mednext),
    "swin_unetr": Architecture("SwinUNETR of MONAI (Hatamizadeh 2022)", ALIKE, swin_unetr),
    "unetr": Architecture("UNETR of MONAI (Hatamizadeh 2022)", ALIKE, unetr),
}


def architecture(name: str) -> Architecture:
    """Return a network by its name. Raises UsageError where medseg has none of that name."""
    if name not in NETWORKS:
        raise UsageError(f"A network is one of {', '.join(NETWORKS)}; not {name!r}.", reason="network")
    return NETWORKS[name]


def numbers_for(widest: Triple, spacing_mm: Numbers, features: int, **options: Unpack[NetworkOptions]) -> AnyNetwork:
    """Return the numbers of a network for a patch, its spacing and the features that a device can train on.

    Raises UsageError for a network that medseg does not have, and for one that cannot be so large.
    """
    width, depth = options.get("width"), options.get("depth")
    if width is not None and not 1 <= width <= MOST_WIDTH:
        raise UsageError(f"The width of a network is 1 to {MOST_WIDTH} features at the finest resolution, not {width}.")
    frame = Frame(widest, spacing_mm, width or features, depth, options.get("size", "M"), width is not None)
    try:
        return architecture(options.get("network", "unet")).numbers(frame)
    except ValidationError as error:
        raise UsageError(f"This network cannot be so large: {first_problem(error)}.", reason="network") from error


def name_of(network: AnyNetwork) -> str:
    """Return under which name a network of a plan can be planned, or else its kind."""
    if isinstance(network, Network):
        return "residual_unet" if network.residual else "attention_unet" if network.attention else "unet"
    return MONAI_NAMES.get(network.kind, network.kind)


def described(network: AnyNetwork) -> str:
    """Return the numbers of a network in a few words."""
    if isinstance(network, TransUNetNumbers):
        heads = f"of {network.attention_heads} attention heads"
        plain = described(network.unet).removeprefix("unet: ")
        return f"transunet: {plain}, {network.layers} transformer blocks {heads} in the bottleneck"
    if isinstance(network, SegFormerNumbers):
        rows = (network.features, network.layers, network.attention_heads)
        features, layers, heads = (" x ".join(map(str, row)) for row in rows)
        strides = ", ".join("x".join(map(str, stride)) for stride in network.strides)
        return (
            f"segformer: features {features}, transformer blocks {layers}, attention heads {heads}, strides {strides}"
        )
    if not isinstance(network, Network | NestedNetwork):
        return name_of(network)
    kernels = ", ".join("x".join(map(str, kernel)) for kernel in network.kernels)
    features = " x ".join(map(str, network.features))
    return f"{name_of(network)}: {len(network.strides)} resolutions, features {features}, kernels {kernels}"


def divisible_patch(widest: Triple, divisor: Triple) -> Triple:
    """Return a patch that the network can halve, no larger than the widest: padding costs time and teaches little.

    Empirical: on crops of 35 x 50 x 35 voxels patches of 32 x 48 x 32 learn in half the time of 40 x 56 x 40.
    """
    return _triple([_divisible_edge(edge, by) for edge, by in zip(widest, divisor, strict=True)])


def _divisible_edge(edge: int, by: int) -> int:
    while by > 1 and edge // by * by < KEPT * edge:
        by //= 2
    return edge // by * by


def topology(
    patch: Triple, spacing_mm: Numbers, depth: int | None = None
) -> tuple[tuple[Triple, ...], tuple[Triple, ...]]:
    """Return the (kernels, strides) of each resolution, finest first; at least three, or as many as `depth` says.

    Rule-based (nnU-Net, supplementary note 2): an axis is halved while it keeps SMALLEST_MAP voxels and is not yet
    twice as coarse as the finest; it is convolved once it is no more than twice as coarse.
    Raises UsageError for a depth that the patch does not have.
    """
    size, spacing = list(patch), list(spacing_mm)
    kernels: list[Triple] = []
    strides: list[Triple] = [(1, 1, 1)]
    while True:
        finest = min(spacing)
        kernels.append(_triple([3 if length < 2 * finest else 1 for length in spacing]))
        able = [edge >= 2 * SMALLEST_MAP for edge in size]
        floor = min((length for length, ok in zip(spacing, able, strict=True) if ok), default=0.0)
        stride = [2 if ok and length < 2 * floor else 1 for ok, length in zip(able, spacing, strict=True)]
        if max(stride) == 1 and len(strides) >= 3:
            break
        strides.append(_triple(stride))
        size = [-(-edge // by) for edge, by in zip(size, stride, strict=True)]
        spacing = [length * by for length, by in zip(spacing, stride, strict=True)]
    levels = len(strides) if depth is None else _checked_depth(depth, len(strides))
    return tuple(kernels[:levels]), tuple(strides[:levels])


def _checked_depth(depth: int, most: int) -> int:
    if not 2 <= depth <= most:
        raise UsageError(f"On patches of this size a network has 2 to {most} resolutions, and not {depth}.")
    return depth


def _triple(values: Sequence[int]) -> Triple:
    i, j, k = values
    return i, j, k
