"""Slow changes of brightness across an MR image, which coils make and tissue does not, estimated and taken out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError
from medseg.volume import Volume

Mask = NDArray[np.bool_]

SHRINK = 4
"""The field is estimated on every fourth voxel along each axis: it is smooth, and N4 takes minutes on all of them."""

SMALLEST_EDGE = 32
"""Voxels along an axis that are still skipped over; a shorter one is looked at whole."""

ITERATIONS = (50, 50, 50, 50)


def correct_bias(volume: Volume, channels: tuple[bool, ...], masks: Sequence[Mask | None] | None = None) -> Volume:
    """Return the image as float32 with the bias field divided out of the channels that ask for it.

    `masks` says for each channel which voxels (I, J, K) the field may be estimated from, by default all.
    It is estimated where a channel is above Otsu's threshold, by one thread, so that it is the same every time.
    A channel that is constant stays as it is. Raises InputError (`too_thin`) for an image that is one voxel thick.
    Source: Tustison et al., "N4ITK: improved N3 bias correction", IEEE TMI 2010; SimpleITK's.
    """
    if not any(channels):
        return volume
    if min(volume.grid.shape) < 2:
        raise InputError(
            "The model asks for bias correction, which needs at least two voxels along each axis; the image has "
            f"{' x '.join(map(str, volume.grid.shape))}. Give it the whole scan.",
            reason="too_thin",
        )
    array = volume.array.astype(np.float32)
    for place, (wanted, inside) in enumerate(zip(channels, masks or [None] * len(channels), strict=True)):
        if wanted and array[place].min() < array[place].max():
            array[place] = _corrected(array[place], volume.grid.spacing_mm, inside)
    return volume.with_array(array)


def _corrected(
    channel: NDArray[np.float32], spacing_mm: tuple[float, float, float], inside: Mask | None
) -> NDArray[np.float32]:
    import SimpleITK

    # N4 takes logarithms: what is not positive says nothing of the field.
    lowest = float(channel.min())
    lifted = channel - lowest + 1e-3 * (float(channel.max()) - lowest) if lowest <= 0 else channel
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(lifted.T))
    image.SetSpacing(spacing_mm)
    factors = [SHRINK if edge >= SMALLEST_EDGE else 1 for edge in channel.shape]
    if inside is None:
        mask = SimpleITK.OtsuThreshold(image, 0, 1, 200)
    else:
        allowed = SimpleITK.GetImageFromArray(np.ascontiguousarray(inside.T).astype(np.uint8))
        allowed.CopyInformation(image)
        mask = SimpleITK.OtsuThreshold(image, allowed, 0, 1, 200, True, 1)
    n4 = SimpleITK.N4BiasFieldCorrectionImageFilter()
    n4.SetNumberOfThreads(1)
    n4.SetMaximumNumberOfIterations(ITERATIONS)
    n4.Execute(SimpleITK.Shrink(image, factors), SimpleITK.Shrink(mask, factors))
    field = np.exp(SimpleITK.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image)).T)
    return np.asarray(channel / field, np.float32)
