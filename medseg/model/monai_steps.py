"""The transforms and the inferer of a MONAI bundle that medseg knows, and what they come to in a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from medseg.model.imported import unsupported
from medseg.model.plan import Length, Resampling, Tiling
from medseg.networks.kinds import Triple
from medseg.networks.monai_kinds import Count, Share
from medseg.process.normalize import Chain, CTNormalization, NonzeroZScore, Normalization, Rescale, Step, ZScore

SPEED = {"sw_batch_size", "progress", "cache_roi_weight_map", "cpu_thresh", "buffer_steps", "buffer_dim"}
"""Keywords of MONAI's inferer that change how fast it is and not what it finds."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Key = str | Annotated[list[str], Field(min_length=1, max_length=1)]
Float = Literal[
    "float32", "float64", "torch.float32", "torch.float64", "np.float32", "np.float64", "numpy.float32", "numpy.float64"
]


class Ends(BaseModel):
    """What every network says of its ends."""

    spatial_dims: Literal[3] = 3
    in_channels: Annotated[int, Field(ge=1, le=1000)] = 1
    out_channels: Annotated[int, Field(ge=1, le=10_000)] = 2


class _Step(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: Key | None = None
    allow_missing_keys: bool = False


class Load(_Step):
    """LoadImage; medseg reads files its own way."""

    reader: str | None = None
    image_only: bool = True
    ensure_channel_first: bool = False


class ChannelFirst(_Step):
    """EnsureChannelFirst."""

    channel_dim: Literal["no_channel"] | None = None
    strict_check: bool = True


class EnsureType(_Step):
    """EnsureType."""

    data_type: Literal["tensor", "numpy"] = "tensor"
    dtype: Float | None = None
    track_meta: Literal[True] | None = None


class Orientation(_Step):
    """Orientation."""

    axcodes: str | None = Field(default=None, pattern="^[RLAPSI]{3}$")
    as_closest_canonical: bool = False
    labels: None = None


class Spacing(_Step):
    """Spacing: linear, to the spacing that is asked for whatever the image's is."""

    pixdim: Length | Annotated[list[Length], Field(min_length=1, max_length=3)]
    diagonal: Literal[False] = False
    mode: Literal["bilinear"] | tuple[Literal["bilinear"]] = "bilinear"
    padding_mode: Literal["border"] | tuple[Literal["border"]] = "border"
    align_corners: bool | tuple[bool] | None = False
    dtype: Float | None = "float64"
    scale_extent: Literal[False] = False
    recompute_affine: Literal[False] = False
    min_pixdim: None = None
    max_pixdim: None = None


class ScaleIntensityRange(_Step):
    """ScaleIntensityRange: a_min becomes b_min and a_max b_max."""

    a_min: Number
    a_max: Number
    b_min: Number | None = None
    b_max: Number | None = None
    clip: bool = False
    dtype: Float | None = "float32"


class NormalizeIntensity(_Step):
    """NormalizeIntensity: by the image's own mean and standard deviation, or by numbers."""

    subtrahend: Number | list[Number] | None = None
    divisor: Number | list[Number] | None = None
    nonzero: bool = False
    channel_wise: bool = False
    dtype: Float | None = "float32"


class ScaleIntensity(_Step):
    """ScaleIntensity: the image's smallest intensity becomes minv and its largest maxv."""

    minv: Number = 0.0
    maxv: Number = 1.0
    factor: None = None
    channel_wise: bool = False
    dtype: Float | None = "float32"


class CastToType(_Step):
    """CastToType, to what everything is computed in."""

    dtype: Literal["float32", "torch.float32", "np.float32", "numpy.float32"] = "float32"


class Activations(_Step):
    """Activations."""

    sigmoid: bool = False
    softmax: bool = False
    other: None = None


class AsDiscrete(_Step):
    """AsDiscrete: the largest score, or whatever is above one half."""

    argmax: bool = False
    threshold: Annotated[float, Field(ge=0.5, le=0.5)] | None = None
    to_onehot: None = None
    rounding: None = None


class Invert(BaseModel):
    """Invert, of which it is read how it interpolates."""

    nearest_interp: bool = True


BEFORE: dict[str, type[BaseModel] | None] = {
    "LoadImage": Load,
    "EnsureChannelFirst": ChannelFirst,
    "EnsureType": EnsureType,
    "Orientation": Orientation,
    "Spacing": Spacing,
    "ScaleIntensityRange": ScaleIntensityRange,
    "NormalizeIntensity": NormalizeIntensity,
    "ScaleIntensity": ScaleIntensity,
    "CastToType": CastToType,
}

TYPES = ("LoadImage", "EnsureChannelFirst", "EnsureType", "CastToType")
SCALINGS = ("ScaleIntensityRange", "NormalizeIntensity", "ScaleIntensity")

AFTER: dict[str, type[BaseModel] | None] = {
    "EnsureType": EnsureType,
    "Activations": Activations,
    "Invert": Invert,
    "AsDiscrete": AsDiscrete,
    "SaveImage": None,
}


class SlidingWindow(BaseModel):
    """SlidingWindowInferer."""

    model_config = ConfigDict(extra="forbid")

    roi_size: Count | Triple
    overlap: Share | tuple[Share, Share, Share] = 0.25
    mode: Literal["gaussian", "constant"] = "constant"
    sigma_scale: Annotated[float, Field(ge=0.125, le=0.125)] = 0.125
    padding_mode: Literal["constant", "replicate"] = "constant"
    cval: Annotated[float, Field(ge=0, le=0)] = 0
    roi_weight_map: None = None
    with_coord: Literal[False] = False

    @property
    def patch(self) -> Triple:
        """The tiles' shape."""
        return (self.roi_size,) * 3 if isinstance(self.roi_size, int) else self.roi_size

    @property
    def tiling(self) -> Tiling:
        """Where tiles lie."""
        overlap = self.overlap if isinstance(self.overlap, tuple) else (self.overlap,) * 3
        padding: Literal["zeros", "edge"] = "edge" if self.padding_mode == "replicate" else "zeros"
        return Tiling(overlap=overlap, blend=self.mode, padding=padding)


@dataclass(frozen=True)
class Before:
    """What a bundle does before its network, in the words of a plan."""

    orientation: str | None
    spacing_mm: tuple[float, float, float]
    resampling: Resampling | None
    normalizations: tuple[Normalization, ...]
    normalize_first: bool


@dataclass(frozen=True)
class After:
    """What a bundle does behind its network, in the words of a plan."""

    regions: bool
    nearest: bool
    activation: Literal["softmax", "sigmoid"] | None


def preprocessing(found: Sequence[tuple[str, Any]], channels: int) -> Before:
    """Return what a list of transforms comes to. Raises ModelError for an order or a repetition that medseg has not."""
    names = [name for name, _ in found if name not in TYPES]
    scalings = [step for name, step in found if name in SCALINGS]
    order = [name for name in names if name not in SCALINGS]
    places = [place for place, name in enumerate(names) if name in SCALINGS]
    apart = places != list(range(len(names)))[places[0] : places[-1] + 1] if places else False
    if apart or order not in ([], ["Orientation"], ["Spacing"], ["Orientation", "Spacing"]):
        raise unsupported("order of transforms", ", ".join(names))
    chosen = dict(found)
    turn, spacing = chosen.get("Orientation"), chosen.get("Spacing")
    orientation = None
    if turn is not None:
        orientation = "RAS" if turn.as_closest_canonical else turn.axcodes
    lengths = (1.0,) if spacing is None else spacing.pixdim if isinstance(spacing.pixdim, list) else (spacing.pixdim,)
    i, j, k = (*lengths, *(lengths[-1],) * 3)[:3]
    return Before(
        orientation=orientation,
        spacing_mm=(i, j, k),
        resampling=None if spacing is None else Resampling(method="corners", order=1),
        normalizations=_normalizations(scalings, channels),
        normalize_first=bool(scalings and spacing) and places[0] < names.index("Spacing"),
    )


def postprocessing(found: Sequence[tuple[str, Any]]) -> After:
    """Return what a list of transforms comes to. Raises ModelError for an order or a mixture that medseg has not."""
    names = [name for name, _ in found if name != "EnsureType"]
    chosen = dict(found)
    activation, discrete = chosen.get("Activations", Activations()), chosen.get("AsDiscrete", AsDiscrete())
    kinds = (activation.softmax, activation.sigmoid, discrete.argmax, discrete.threshold is not None)
    regions = kinds == (False, True, False, True)
    if len(set(names)) < len(names) or not (
        regions or kinds in ((True, False, True, False), (False, False, True, False))
    ):
        raise unsupported("mixture of transforms behind its network", ", ".join(names) or "none")
    place = {name: number for number, name in enumerate(names)}
    inverted = place.get("Invert", len(names))
    nearest = "Invert" not in place or chosen["Invert"].nearest_interp
    early = place["AsDiscrete"] < max(inverted, place.get("Activations", -1))
    if place["AsDiscrete"] < place.get("Activations", -1) or (early and not nearest):
        raise unsupported("order of transforms behind its network", ", ".join(names))
    interpolated = not nearest and place.get("Activations", len(names)) < inverted
    if not interpolated or not (activation.softmax or activation.sigmoid):
        return After(regions, nearest, None)
    return After(regions, nearest, "softmax" if activation.softmax else "sigmoid")


def _normalizations(scalings: Sequence[Any], channels: int) -> tuple[Normalization, ...]:
    """Return the normalization of each channel, which several transforms in a row come to."""
    if not scalings:
        return (CTNormalization(mean=0, std=1),) * channels
    rows = list(zip(*(_scaled(scaling, channels) for scaling in scalings), strict=True))
    return tuple(row[0] if len(row) == 1 else Chain(steps=row) for row in rows)


def _scaled(scaling: ScaleIntensityRange | NormalizeIntensity | ScaleIntensity, channels: int) -> tuple[Step, ...]:
    """Return what one transform does to each channel."""
    if isinstance(scaling, ScaleIntensityRange):
        return (_from_range(scaling),) * channels
    if isinstance(scaling, ScaleIntensity):
        if channels > 1 and not scaling.channel_wise:
            raise unsupported("setting of ScaleIntensity", "channel_wise=False over several channels")
        return (Rescale(lowest=scaling.minv, highest=scaling.maxv),) * channels
    subtrahend, divisor = scaling.subtrahend, scaling.divisor
    if subtrahend is None and divisor is None:
        if channels > 1 and not scaling.channel_wise:
            raise unsupported("setting of NormalizeIntensity", "channel_wise=False over several channels")
        return (NonzeroZScore() if scaling.nonzero else ZScore(),) * channels
    means, stds = _numbers(subtrahend, channels), _numbers(divisor, channels)
    whole = isinstance(subtrahend, list) is isinstance(divisor, list) is scaling.channel_wise
    if scaling.nonzero or not whole or not len(means) == len(stds) == channels or min(stds) <= 0:
        raise unsupported("setting of NormalizeIntensity", "this combination of subtrahend, divisor and nonzero")
    return tuple(CTNormalization(mean=mean, std=std) for mean, std in zip(means, stds, strict=True))


def _numbers(value: float | list[float] | None, channels: int) -> list[float]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value] * channels


def _from_range(scaling: ScaleIntensityRange) -> CTNormalization:
    low, high = (0.0 if scaling.b_min is None else scaling.b_min), (1.0 if scaling.b_max is None else scaling.b_max)
    given = (scaling.b_min is None) == (scaling.b_max is None) and not (scaling.clip and scaling.b_min is None)
    if not given or scaling.a_max <= scaling.a_min or high <= low:
        raise unsupported("setting of ScaleIntensityRange", "this combination of a_min, a_max, b_min, b_max and clip")
    std = (scaling.a_max - scaling.a_min) / (high - low)
    limits = {"lower": scaling.a_min, "upper": scaling.a_max} if scaling.clip else {}
    return CTNormalization(**limits, mean=scaling.a_min - low * std, std=std)
