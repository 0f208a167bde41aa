"""Networks of MONAI in the words of a plan: the numbers that each kind is built from, and nothing that names a class.

The fields are those of MONAI's own networks (`monai.networks.nets`), without the channels that go in and out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Size = Annotated[int, Field(ge=1, le=64)]
Depth = Annotated[int, Field(ge=1, le=24)]
Window = Annotated[int, Field(ge=1, le=10)]
"""A table of each block of SwinUNETR grows with the sixth power of this, and is not among the weights."""

Width = Annotated[int, Field(ge=1, le=4096)]
Edge = Annotated[int, Field(ge=1, le=2**14)]
Expansion = Annotated[int, Field(ge=1, le=16)]
Sizes = Size | tuple[Size, Size, Size]
Share = Annotated[float, Field(ge=0, lt=1)]
Layer = Annotated[str, Field(pattern="^[A-Za-z]{1,20}$")]
Named = Layer | tuple[Layer, dict[str, bool | int | float]]
"""A layer by MONAI's name for it ("PRELU"), and maybe its settings."""

Triple = tuple[Count, Count, Count]


class _Kind(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def divisor(self) -> Triple:
        """By what each edge is divided; a network adds zeros behind a patch that cannot be."""
        return 1, 1, 1


class MonaiUNet(_Kind):
    """MONAI's UNet: channels of each resolution from the finest down, and the strides between them."""

    kind: Literal["monai_unet"] = "monai_unet"
    channels: tuple[Width, ...] = Field(min_length=2, max_length=10)
    strides: tuple[Sizes, ...] = Field(max_length=9)
    kernel_size: Sizes = 3
    up_kernel_size: Sizes = 3
    num_res_units: int = Field(default=0, ge=0, le=64)
    act: Named = "PRELU"
    norm: Named = "INSTANCE"
    dropout: Share = 0.0
    bias: bool = True
    adn_ordering: str = Field(default="NDA", pattern="^[NDA]{1,3}$")

    @property
    def divisor(self) -> Triple:
        """By what each edge is divided: the product of the strides along it."""
        return _product(self.strides)


class MonaiSegResNet(_Kind):
    """MONAI's SegResNet: residual blocks of each resolution, which halves with each."""

    kind: Literal["monai_segresnet"] = "monai_segresnet"
    init_filters: Width = 8
    dropout_prob: Share | None = None
    act: Named = ("RELU", {"inplace": True})
    norm: Named = ("GROUP", {"num_groups": 8})
    use_conv_final: bool = True
    blocks_down: tuple[Size, ...] = Field(default=(1, 2, 2, 4), min_length=1, max_length=8)
    blocks_up: tuple[Size, ...] = Field(default=(1, 1, 1), max_length=7)
    upsample_mode: Literal["deconv", "nontrainable", "pixelshuffle"] = "nontrainable"

    @property
    def divisor(self) -> Triple:
        """By what each edge is divided; a network adds zeros behind a patch that cannot be."""
        return (2 ** (len(self.blocks_down) - 1),) * 3


class MonaiDynUNet(_Kind):
    """MONAI's DynUNet: kernels and strides of each resolution from the finest down."""

    kind: Literal["monai_dynunet"] = "monai_dynunet"
    kernel_size: tuple[Sizes, ...] = Field(min_length=3, max_length=10)
    strides: tuple[Sizes, ...] = Field(min_length=3, max_length=10)
    upsample_kernel_size: tuple[Sizes, ...] = Field(min_length=2, max_length=9)
    filters: tuple[Width, ...] | None = None
    dropout: Share | None = None
    norm_name: Named = ("INSTANCE", {"affine": True})
    act_name: Named = ("leakyrelu", {"inplace": True, "negative_slope": 0.01})
    deep_supervision: bool = False
    deep_supr_num: int = Field(default=1, ge=1, le=8)
    res_block: bool = False
    trans_bias: bool = False

    @property
    def divisor(self) -> Triple:
        """By what each edge is divided: the product of the strides along it."""
        return _product(self.strides)


class MonaiSwinUNETR(_Kind):
    """MONAI's SwinUNETR: depth and attention heads of its four stages. It needs the package einops."""

    kind: Literal["monai_swinunetr"] = "monai_swinunetr"
    patch_size: Literal[2] = 2
    depths: tuple[Depth, Depth, Depth, Depth] = (2, 2, 2, 2)
    num_heads: tuple[Size, Size, Size, Size] = (3, 6, 12, 24)
    window_size: Window | tuple[Window, Window, Window] = 7
    qkv_bias: bool = True
    mlp_ratio: float = Field(default=4.0, gt=0, le=16)
    feature_size: Annotated[int, Field(ge=12, le=384, multiple_of=12)] = 24
    norm_name: Named = "instance"
    drop_rate: Share = 0.0
    attn_drop_rate: Share = 0.0
    dropout_path_rate: Share = 0.0
    normalize: bool = True
    patch_norm: bool = False
    use_checkpoint: bool = False
    downsample: Literal["merging", "mergingv2"] = "merging"
    use_v2: bool = False

    @property
    def divisor(self) -> Triple:
        """By what each edge is divided; a network adds zeros behind a patch that cannot be."""
        return 32, 32, 32


class MonaiUNETR(_Kind):
    """MONAI's UNETR: a vision transformer of twelve blocks that sees images of `img_size`. It needs einops."""

    kind: Literal["monai_unetr"] = "monai_unetr"
    img_size: tuple[Edge, Edge, Edge]
    feature_size: Annotated[int, Field(ge=1, le=256)] = 16
    hidden_size: Annotated[int, Field(ge=1, le=4096)] = 768
    mlp_dim: Annotated[int, Field(ge=1, le=2**14)] = 3072
    num_heads: Size = 12
    proj_type: Literal["conv", "perceptron"] = "conv"
    norm_name: Named = "instance"
    conv_block: bool = True
    res_block: bool = True
    dropout_rate: Share = 0.0
    qkv_bias: bool = False

    @model_validator(mode="before")
    @classmethod
    def _edges(cls, fields: Any) -> Any:
        """Read one edge for all three, as MONAI does."""
        one = fields.get("img_size") if isinstance(fields, dict) else None
        return {**fields, "img_size": (one,) * 3} if isinstance(one, int) else fields

    @model_validator(mode="after")
    def _divides(self) -> MonaiUNETR:
        if any(edge % 16 for edge in self.img_size) or self.hidden_size % self.num_heads:
            raise ValueError("each edge of img_size must be a multiple of 16, and hidden_size one of num_heads")
        return self

    @property
    def divisor(self) -> Triple:
        """The size of image that it takes: smaller patches get zeros behind."""
        return self.img_size


class MonaiMedNeXt(_Kind):
    """MONAI's MedNeXt: blocks and expansion of each resolution, which halves with each; odd kernels."""

    kind: Literal["monai_mednext"] = "monai_mednext"
    init_filters: Annotated[int, Field(ge=1, le=1024)] = 32
    encoder_expansion_ratio: Expansion | tuple[Expansion, ...] = 2
    decoder_expansion_ratio: Expansion | tuple[Expansion, ...] = 2
    bottleneck_expansion_ratio: Expansion = 2
    kernel_size: Literal[1, 3, 5, 7, 9] = 7
    deep_supervision: bool = False
    use_residual_connection: bool = False
    blocks_down: tuple[Depth, ...] = Field(default=(2, 2, 2, 2), min_length=1, max_length=7)
    blocks_bottleneck: Depth = 2
    blocks_up: tuple[Depth, ...] = Field(default=(2, 2, 2, 2), min_length=1, max_length=7)
    norm_type: Literal["group"] = "group"
    global_resp_norm: bool = False

    @model_validator(mode="after")
    def _levels_agree(self) -> MonaiMedNeXt:
        ratios = (self.encoder_expansion_ratio, self.decoder_expansion_ratio)
        counts = {len(ratio) for ratio in ratios if isinstance(ratio, tuple)}
        if {len(self.blocks_down), len(self.blocks_up)} | counts != {len(self.blocks_down)}:
            raise ValueError("blocks_down, blocks_up and expansion ratios need one entry per resolution")
        return self

    @property
    def divisor(self) -> Triple:
        """By what each edge is divided; a network adds zeros behind a patch that cannot be."""
        return (2 ** len(self.blocks_down),) * 3


MonaiNetwork = MonaiUNet | MonaiSegResNet | MonaiDynUNet | MonaiSwinUNETR | MonaiUNETR | MonaiMedNeXt


def _product(strides: tuple[Sizes, ...]) -> Triple:
    product = [1, 1, 1]
    for stride in strides:
        factors = (stride,) * 3 if isinstance(stride, int) else stride
        product = [a * b for a, b in zip(product, factors, strict=True)]
    return product[0], product[1], product[2]
