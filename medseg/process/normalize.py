"""Intensities brought to the scale that a network was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

SMALLEST_STD = 1e-8
"""A constant image has no spread to divide by; it becomes 0 throughout."""

Mask = NDArray[np.bool_]
Number = Annotated[float, Field(allow_inf_nan=False)]


class CTNormalization(BaseModel):
    """Clip to two intensities of the training set, then subtract its mean and divide by its standard deviation.

    CT numbers mean the same in every scan, so one set of numbers, taken over the labelled voxels of the training set,
    serves all (Isensee et al., "nnU-Net", Nature Methods 2021, supplementary note 2). Without `lower` and `upper`
    nothing is clipped: with mean 0 and std 1 intensities stay as they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ct"] = "ct"
    lower: Number | None = None
    upper: Number | None = None
    mean: Number
    std: Number = Field(gt=0)


class ZScore(BaseModel):
    """Subtract the image's own mean and divide by its own standard deviation; `nonzero`: of the voxels that are not 0.

    With `nonzero`, voxels that are 0 in the image stay 0: the air around a brain that was stripped of its skull.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["zscore"] = "zscore"
    nonzero: bool = False


class Rescale(BaseModel):
    """Map the image's own smallest intensity to `lowest` and its largest to `highest`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["rescale"] = "rescale"
    lowest: Number = 0.0
    highest: Number = 1.0


class NonzeroZScore(BaseModel):
    """Subtract the mean and divide by the standard deviation of the voxels that are not 0 in this channel, now.

    Unlike with ZScore nothing is known of other channels, of holes, or of the image before it was resampled (MONAI's
    NormalizeIntensity).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["nonzero_zscore"] = "nonzero_zscore"


Step = CTNormalization | ZScore | Rescale | NonzeroZScore


class Chain(BaseModel):
    """One normalization after another."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["chain"] = "chain"
    steps: tuple[Annotated[Step, Field(discriminator="kind")], ...] = Field(min_length=2)


Scheme = Step | Chain
Normalization = Annotated[Scheme, Field(discriminator="kind")]


def normalize(
    array: NDArray[np.float32], schemes: Sequence[Scheme], masks: Sequence[Mask | None] | None = None
) -> NDArray[np.float32]:
    """Return float32 channels (C, I, J, K), each normalized by its scheme.

    `masks` has a mask (I, J, K) for each channel, or None: of its voxels alone statistics are taken, and what lies
    outside becomes 0. CT is scaled alike everywhere. With ZScore(nonzero=True) the default is where a channel is not 0.
    """
    result = np.empty_like(array)
    for channel, scheme, mask, out in zip(array, schemes, masks or [None] * len(array), result, strict=True):
        if isinstance(scheme, Chain):
            out[...] = channel
            for step in scheme.steps:
                out[...] = normalize(out[None], [step], [mask])[0]
        elif isinstance(scheme, CTNormalization):
            low = -np.inf if scheme.lower is None else scheme.lower
            np.clip(channel, low, np.inf if scheme.upper is None else scheme.upper, out=out)
            np.subtract(out, scheme.mean, out=out)
            np.divide(out, scheme.std, out=out)
        elif isinstance(scheme, Rescale):
            _rescale(channel, scheme, mask, out)
        else:
            found = isinstance(scheme, NonzeroZScore) or (scheme.nonzero and mask is None)
            _standardize(channel, channel != 0 if found else mask, out)
    return result


def _rescale(channel: NDArray[np.float32], scheme: Rescale, mask: Mask | None, out: NDArray[np.float32]) -> None:
    values = channel if mask is None or not mask.any() else channel[mask]
    np.subtract(channel, values.min(), out=out)
    np.divide(out, max(float(values.max() - values.min()), SMALLEST_STD), out=out)
    if (scheme.lowest, scheme.highest) != (0, 1):
        np.multiply(out, scheme.highest - scheme.lowest, out=out)
        np.add(out, scheme.lowest, out=out)
    if mask is not None:
        out[~mask] = 0


def _standardize(channel: NDArray[np.float32], mask: Mask | None, out: NDArray[np.float32]) -> None:
    values = channel if mask is None else channel[mask] if mask.any() else np.zeros(1, np.float32)
    mean, std = values.mean(dtype=np.float64), values.std(dtype=np.float64)
    out[...] = (channel - mean) / max(std, SMALLEST_STD)
    if mask is not None:
        out[~mask] = 0
