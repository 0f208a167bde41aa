"""plan.json: every decision that running a model needs, and nothing that names a class or a path."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medseg.errors import ModelError
from medseg.labels import Label
from medseg.model.crf import CRF
from medseg.model.stored import Stored
from medseg.networks.kinds import AnyNetwork, Network, Triple
from medseg.networks.monai_kinds import Count, Share
from medseg.process.normalize import Normalization

MOST_PATCH_VOXELS = 2**27
"""Voxels of a patch: 512 along each edge. No device that exists computes a larger one."""

Length = Annotated[float, Field(ge=1e-6, le=1e6)]


class Channel(BaseModel):
    """One input image: its name ("T1", "CT") and how its intensities are normalized.

    With `bias_correction` the field of the coils is taken out before anything else (`process.bias`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    normalization: Normalization
    bias_correction: Literal["n4"] | None = None


class Resampling(BaseModel):
    """How an image comes to the plan's spacing, by splines of `order`, and scores, linearly, back to the image's grid.

    `method` is "smooth", where what shrinks is smoothed first, or "resize", nnU-Net's way (`process.resize`), where an
    axis with voxels more than `separate` times as long as the shortest is resampled by itself, to the nearest voxel;
    `separate_scores` is that for scores. "corners" is MONAI's way (`process.corners`): outer centers stay
    where they are, and nothing is smoothed. With `nearest_scores` scores go to the nearest voxel along every axis.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["smooth", "resize", "corners"] = "smooth"
    order: Literal[0, 1, 3] = 3
    separate: Length | None = None
    separate_scores: Length | None = None
    nearest_scores: bool = False

    @model_validator(mode="after")
    def _separate_in_resize(self) -> Resampling:
        if self.method != "resize" and self.separate:
            raise ValueError("an axis is resampled by itself only with the method resize")
        return self


class Tiling(BaseModel):
    """How MONAI lays tiles, every so many voxels from the start on: `overlap` is the share that neighbors share.

    `blend` says what a tile counts by where several lie: a "gaussian", or as much everywhere ("constant"). A small
    image is brought to the size of a tile by zeros or, with `padding` "edge", by its outermost voxels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    overlap: tuple[Share, Share, Share]
    blend: Literal["gaussian", "constant"]
    padding: Literal["zeros", "edge"] = "zeros"


class Region(BaseModel):
    """One output of a network whose outputs overlap: a union of labels, and the value that it is painted with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    members: tuple[Count, ...] = Field(min_length=1)
    value: Count


class Plan(Stored):
    """What a model decides about an image before its network sees it, and what its outputs mean.

    With `crop_nonzero` only the smallest box around the voxels that are not 0 is looked at, the rest is background.
    With `measured_only` it is the box around the voxels that were measured (`process.measured`); those that were not
    take no part in the statistics of a normalization and become 0 by it, or in a CT channel air.
    An image is reoriented to `orientation` (or left "as_stored"), brought to `spacing_mm` as `resampling` says (without
    it voxels stay as they are), normalized per channel (before that, with `normalize_first`) and cut into tiles of
    `patch` voxels. Along `mirror_axes` patches were flipped in training, so images may be flipped along them in use.
    Tiles lie half a patch apart, or as `tiling` says. What is interpolated back are logits, or their `activation`.
    With `keep_small` each part of a label that resampling would lose in training keeps one voxel.
    With `crf` a conditional random field sharpens the boundaries of what is interpolated back (`model.crf`).
    In the end each group of `keep_largest`, some label values taken together, keeps its largest piece alone.
    The network's output 0 is background, output n the n-th label of the table; with `regions` each output is one of
    them, there where its score is above 0, and later ones are painted over earlier ones. With `previous` the model in
    the folder of that name segments the image first, and each label that it can give is one more input channel.
    """

    what = "plan"

    format: Literal[1] = 1
    name: str
    channels: tuple[Channel, ...] = Field(min_length=1)
    labels: tuple[Label, ...] = Field(min_length=1)
    regions: tuple[Region, ...] = ()
    orientation: str = Field(default="RAS", pattern="^([RLAPSI]{3}|as_stored)$")
    spacing_mm: tuple[Length, Length, Length]
    patch: Triple
    resampling: Resampling | None = Resampling()
    normalize_first: bool = False
    crop_nonzero: bool = False
    measured_only: bool = False
    keep_small: bool = False
    previous: bool = False
    crf: CRF | None = None
    keep_largest: tuple[tuple[Count, ...], ...] = ()
    mirror_axes: tuple[Annotated[int, Field(ge=0, le=2)], ...] = ()
    tiling: Tiling | None = None
    activation: Literal["softmax", "sigmoid"] | None = None
    network: AnyNetwork

    @model_validator(mode="after")
    def _parts_agree(self) -> Plan:
        seen = [-(-edge // by) * by for edge, by in zip(self.patch, self.network.divisor, strict=True)]
        if math.prod(seen) > MOST_PATCH_VOXELS:
            raise ValueError(f"the patch {self.patch}, as the network divides it, has over {MOST_PATCH_VOXELS} voxels")
        values = [label.value for label in self.labels]
        if values != sorted(set(values)):
            raise ValueError("labels must be listed by ascending value, each value once")
        if len(set(self.mirror_axes)) < len(self.mirror_axes):
            raise ValueError(f"each axis may be mirrored along once, and mirror_axes is {self.mirror_axes}")
        if self.regions and {region.value for region in self.regions} != set(values):
            raise ValueError("the values that regions are painted with must be those of the labels")
        return self

    @property
    def unet(self) -> Network:
        """The network, which must be a U-Net of medseg's own. Raises ModelError for another."""
        if not isinstance(self.network, Network):
            raise ModelError(
                f"This needs a plan with a U-Net of medseg's own, and its network is of the kind {self.network.kind}.",
                reason="unsupported",
            )
        return self.network

    @property
    def inputs(self) -> int:
        """Channels that the network takes: those of the image, and with `previous` one for each label."""
        return len(self.channels) + (len(self.labels) if self.previous else 0)

    @property
    def outputs(self) -> int:
        """Channels that the network puts out: background and one for each label, or one for each region."""
        return len(self.regions) or len(self.labels) + 1

    @property
    def painted(self) -> tuple[int, ...]:
        """The label value of no output and of each output in turn; without regions background is an output."""
        return (0, *(region.value for region in self.regions or self.labels))

    @property
    def output_of(self) -> dict[int, int]:
        """The output of each label value; of regions that are painted with one value, the last."""
        return {value: place for place, value in enumerate(self.painted[1:], start=0 if self.regions else 1)}
