"""A trunk CT of any length on a scanner's grid: 512 x 512 slices of 0.75 mm, made from one real scan.

The real scan (3 mm, 366 x 303 mm: a body on a couch) is interpolated onto the grid, goes on as its mirror image where
it ends, lies in noisy air, and gets noise of its own, since a scan at 3 mm has lost it.
"""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import affine_transform

TRUNK = Path("trunk_ct_mr", "example_ct.nii.gz")
AIR_HU, OUTSIDE_HU = -1000, -1024
AIR_NOISE_HU, BODY_NOISE_HU = 5, 15
"""Standard deviations; 3.5 to 5 HU were measured in the air of the scan's original slices."""


def write_ct(realdata: Path, path: Path, shape: tuple[int, int, int], spacing_mm: tuple[float, ...], seed: int) -> None:
    """Write the phantom as NIfTI, int16 HU, axes RAS: the same voxels for the same seed, whatever its length."""
    trunk = nibabel.load(realdata / TRUNK)
    body = np.asarray(trunk.dataobj, dtype=np.float32)
    body_mm = np.linalg.norm(trunk.affine[:3, :3], axis=0)
    voxels = np.empty(shape, np.int16)
    circle = _circle(shape[:2], spacing_mm)
    for k in range(shape[2]):
        slice_hu = _slice(body, body_mm, k * spacing_mm[2], shape[:2], spacing_mm)
        noise = np.random.default_rng((seed, k)).standard_normal(slice_hu.shape, dtype=np.float32)
        slice_hu += noise * np.where(slice_hu < -900, AIR_NOISE_HU, BODY_NOISE_HU)
        slice_hu[~circle] = OUTSIDE_HU
        voxels[:, :, k] = np.clip(np.round(slice_hu), OUTSIDE_HU, 3071)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels, np.diag([*spacing_mm, 1.0]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def _slice(
    body: NDArray[np.float32],
    body_mm: NDArray[np.float64],
    height_mm: float,
    shape: tuple[int, int],
    spacing_mm: tuple[float, ...],
) -> NDArray[np.float32]:
    """Return the body at a height, in air, in the middle of the slice."""
    last = body.shape[2] - 1
    place = abs((height_mm / body_mm[2] + last) % (2 * last) - last) if last else 0.0
    low = min(int(place), max(0, last - 1))
    share = place - low
    flat = body[:, :, low] * (1 - share) + body[:, :, min(low + 1, last)] * share
    scale = np.asarray(spacing_mm[:2]) / body_mm[:2]
    offset = (np.asarray(flat.shape) - 1) / 2 - scale * (np.asarray(shape) - 1) / 2
    out = affine_transform(flat, scale, offset, shape, np.float32, order=1, mode="constant", cval=AIR_HU)
    return np.maximum(out, AIR_HU)


def _circle(shape: tuple[int, int], spacing_mm: tuple[float, ...]) -> NDArray[np.bool_]:
    """Return where a scanner reconstructs: a circle a little wider than the square."""
    x, y = ((np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing_mm, strict=False))
    return np.hypot(x[:, None], y) < 0.55 * min(shape[0] * spacing_mm[0], shape[1] * spacing_mm[1])
