"""Networks in the words of a plan: the numbers that each kind is built from, and nothing that names a class."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from medseg.networks.monai_kinds import Depth, MonaiNetwork, Size

MOST_LEVELS = 16
"""Resolutions of a network: a patch that is halved so often would have 32,768 voxels along an edge."""

MOST_STAGES, MOST_DIVISOR = 6, 512
"""Of a SegFormer: what it divides an edge by is a kernel of its first stage, whose weights grow with the cube."""

Width = Annotated[int, Field(ge=1, le=2**16)]
Edge = Annotated[int, Field(ge=1, le=2**14)]
Triple = tuple[Edge, Edge, Edge]
Kernel = tuple[Size, Size, Size]
Ratio = Annotated[int, Field(ge=1, le=16)]


def _odd(kernel: Kernel) -> Kernel:
    if not all(size % 2 for size in kernel):
        raise ValueError(f"the kernel of a convolution has odd sizes, so that it has a middle, and it is {kernel}")
    return kernel


OddKernel = Annotated[Kernel, AfterValidator(_odd)]
"""What keeps the size of an image; another one would end in an error of torch at the first patch."""


class Network(BaseModel):
    """A U-Net: features, kernel sizes and strides of each resolution from the finest down (its stride is 1, 1, 1).

    `blocks` counts the convolutions of each resolution in the encoder, or its residual blocks with `residual`;
    `decoder_blocks` the convolutions of each in the decoder, from the coarsest up. By default there are two of each.
    `heads` counts the lower resolutions that give an output of their own in training (deep supervision).
    `downsampling` is by convolutions with a stride or by pooling the largest of their voxels, `upsampling` by
    transposed convolutions or by linear interpolation. With `attention` gates weigh the voxels of each skip.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["unet"] = "unet"
    residual: bool = False
    attention: bool = False
    downsampling: Literal["strided", "pooled"] = "strided"
    upsampling: Literal["transposed", "interpolated"] = "transposed"
    features: tuple[Width, ...] = Field(min_length=2, max_length=MOST_LEVELS)
    kernels: tuple[OddKernel, ...] = Field(max_length=MOST_LEVELS)
    strides: tuple[Kernel, ...] = Field(max_length=MOST_LEVELS)
    blocks: tuple[Size, ...] = Field(default=(), max_length=MOST_LEVELS)
    decoder_blocks: tuple[Size, ...] = Field(default=(), max_length=MOST_LEVELS)
    heads: int = Field(ge=0, le=MOST_LEVELS)

    @model_validator(mode="before")
    @classmethod
    def _two_blocks(cls, fields: Any) -> Any:
        features = fields.get("features") if isinstance(fields, dict) else None
        levels = min(len(features), MOST_LEVELS) if isinstance(features, list | tuple) else 0
        return {"blocks": (2,) * levels, "decoder_blocks": (2,) * (levels - 1), **fields} if levels else fields

    @model_validator(mode="after")
    def _levels_agree(self) -> Network:
        levels = len(self.features)
        counts = {len(self.kernels), len(self.strides), len(self.blocks), len(self.decoder_blocks) + 1}
        if counts != {levels} or self.strides[0] != (1, 1, 1) or self.heads > levels - 2:
            raise ValueError(
                "features, kernels, strides and blocks need one entry per resolution (decoder_blocks one less), the "
                "first stride is 1, 1, 1, and heads are at most levels - 2"
            )
        return self

    @property
    def divisor(self) -> Triple:
        """By what each edge is divided: the product of the strides along it."""
        return _product(self.strides)


class NestedNetwork(BaseModel):
    """A U-Net++: features, kernel sizes and strides of each resolution from the finest down (its stride is 1, 1, 1).

    `blocks` counts the convolutions of each node. The network that is pruned to fewer resolutions has the first entries
    of each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["unet_plus_plus"] = "unet_plus_plus"
    features: tuple[Width, ...] = Field(min_length=2, max_length=MOST_LEVELS)
    kernels: tuple[OddKernel, ...] = Field(max_length=MOST_LEVELS)
    strides: tuple[Kernel, ...] = Field(max_length=MOST_LEVELS)
    blocks: Annotated[int, Field(ge=1, le=8)] = 2

    @model_validator(mode="after")
    def _levels_agree(self) -> NestedNetwork:
        levels = len(self.features)
        if {len(self.kernels), len(self.strides)} != {levels} or self.strides[0] != (1, 1, 1):
            raise ValueError("features, kernels and strides need one entry per resolution, the first stride is 1, 1, 1")
        return self

    @property
    def divisor(self) -> Triple:
        """By what each edge is divided: the product of the strides along it."""
        return _product(self.strides)

    def pruned(self, depth: int) -> NestedNetwork:
        """Return the numbers of the network within this one that has `depth` resolutions, from 2 to all."""
        kept = {name: getattr(self, name)[:depth] for name in ("features", "kernels", "strides")}
        return NestedNetwork(**kept, blocks=self.blocks)


class TransUNetNumbers(BaseModel):
    """A U-Net with `layers` transformer blocks in its bottleneck, of some `attention_heads`.

    The layer in the middle of each MLP is `mlp_ratio` times as wide as the bottleneck.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["transunet"] = "transunet"
    unet: Network
    layers: Depth
    attention_heads: Size
    mlp_ratio: Ratio = 4

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> TransUNetNumbers:
        if self.unet.features[-1] % self.attention_heads:
            raise ValueError("attention_heads must divide the features of the bottleneck")
        return self

    @property
    def divisor(self) -> Triple:
        """By what each edge is divided."""
        return self.unet.divisor


class SegFormerNumbers(BaseModel):
    """A SegFormer: for each stage, from the finest down, its features, blocks, attention heads, kernel and stride.

    `kernels` are those of the convolutions within MLPs, `strides` those of the patch embeddings; the first divides the
    image itself. The head is `decoder_features` wide.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["segformer"] = "segformer"
    features: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(min_length=1, max_length=MOST_STAGES)
    layers: tuple[Depth, ...] = Field(max_length=MOST_STAGES)
    attention_heads: tuple[Size, ...] = Field(max_length=MOST_STAGES)
    kernels: tuple[Kernel, ...] = Field(max_length=MOST_STAGES)
    strides: tuple[Kernel, ...] = Field(max_length=MOST_STAGES)
    mlp_ratio: Ratio = 4
    decoder_features: Annotated[int, Field(ge=1, le=4096)]

    @model_validator(mode="after")
    def _stages_agree(self) -> SegFormerNumbers:
        counts = {len(self.layers), len(self.attention_heads), len(self.kernels), len(self.strides)}
        if counts != {len(self.features)}:
            raise ValueError("features, layers, attention_heads, kernels and strides need one entry per stage")
        if any(width % heads for width, heads in zip(self.features, self.attention_heads, strict=True)):
            raise ValueError("attention_heads must divide the features of their stage")
        if any(edge % 2 == 0 for kernel in self.kernels for edge in kernel) or max(self.divisor) > MOST_DIVISOR:
            raise ValueError(f"kernels are odd, and strides divide an edge by at most {MOST_DIVISOR} in all")
        return self

    @property
    def reductions(self) -> tuple[Triple, ...]:
        """How many voxels of each stage share a key: as many as make one of the coarsest stage."""
        return tuple(_product(self.strides[level + 1 :]) for level in range(len(self.strides)))

    @property
    def divisor(self) -> Triple:
        """By what each edge is divided: the product of the strides along it."""
        return _product(self.strides)


def _product(strides: tuple[Triple, ...]) -> Triple:
    product = [1, 1, 1]
    for stride in strides:
        product = [a * b for a, b in zip(product, stride, strict=True)]
    return product[0], product[1], product[2]


AnyNetwork = Annotated[
    Network | NestedNetwork | TransUNetNumbers | SegFormerNumbers | MonaiNetwork, Field(discriminator="kind")
]
"""Whatever a plan can name, told apart by `kind`."""
