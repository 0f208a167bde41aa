"""Rigid registration of one image to another: rotation and shift by mutual information, checked, and reproducible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import GeometryError
from medseg.process.resample import resample
from medseg.volume import Affine, Array, Grid, Volume

if TYPE_CHECKING:
    import SimpleITK

SAMPLES = 60_000
"""Voxels that the mutual information is estimated from, at every resolution."""

SEED = 20
BINS = 32
COARSE_MM, FINE_MM = (8.0, 4.0), (2.0, 1.0)
"""Sizes of voxels, as far as the images have smaller ones, from coarse to fine."""

MOST_INCONSISTENT_MM = 2.0
"""Registering there and back may end so far from where it began, or half the longest side of a voxel where that is
more; images that have nothing in common end farther away."""

LEAST_OVERLAP = 0.5
"""The share of the smaller field of view that has to lie within the other afterwards."""


@dataclass(frozen=True)
class Registration:
    """Where an image lies in the space of another, and how sure that is.

    `matrix` (4, 4) takes RAS+ mm of the fixed image to those of the moving one. `mutual_information` is in nats;
    `inconsistency_mm` the largest distance, over the field of view, that registering there and back leaves; `overlap`
    the share of the smaller field of view within the other.
    """

    matrix: Affine
    mutual_information: float
    inconsistency_mm: float
    overlap: float

    def applied(self, moving: Volume) -> Volume:
        """Return the moving image in the space of the fixed one: the same voxels in another place."""
        return Volume(moving.array, Grid(moving.grid.shape, _inverse(self.matrix) @ moving.grid.affine))

    def to_dict(self) -> dict[str, Any]:
        """Return what a manifest says of it."""
        import SimpleITK as sitk  # noqa: N813

        turn = np.degrees(np.arccos(np.clip((np.trace(self.matrix[:3, :3]) - 1) / 2, -1, 1)))
        return {
            "kind": "rigid",
            "matrix": np.round(self.matrix, 9).tolist(),
            "angle_deg": round(float(turn), 4),
            "mutual_information": round(self.mutual_information, 6),
            "inconsistency_mm": round(self.inconsistency_mm, 4),
            "overlap": round(self.overlap, 4),
            "simpleitk": sitk.Version_VersionString(),
        }


def register_rigid(moving: Volume, fixed: Volume) -> Registration:
    """Return how a one-channel image lies in the space of another of the same patient. The same input, the same result.

    It starts from wherever the images agree best, of equal world spaces, equal centers and equal centers of mass, and
    goes from coarse to fine resolution. Then it registers the other way round; the result lies halfway between both,
    where most of what interpolation adds to one way is gone.
    Raises GeometryError (`registration`) where both ways disagree by more than 2 mm and half a voxel, or too little
    overlaps.
    """
    images = _image(fixed), _image(moving)
    there, value = _registered(*images)
    back, _ = _registered(*reversed(images))
    apart_mm = _apart_mm(there, _inverse(back), fixed.grid)
    matrix = _halfway(there, _inverse(back), fixed.grid)
    registration = Registration(matrix, -value, apart_mm, _overlap(matrix, fixed.grid, moving.grid))
    allowed_mm = max(MOST_INCONSISTENT_MM, max(*fixed.grid.spacing_mm, *moving.grid.spacing_mm) / 2)
    if apart_mm > allowed_mm or registration.overlap < LEAST_OVERLAP:
        raise GeometryError(
            f"A channel could not be registered to the first: there and back ends {apart_mm:.1f} mm from the start "
            f"({allowed_mm:.1f} mm are allowed), and {registration.overlap:.0%} of the smaller image overlap "
            f"({LEAST_OVERLAP:.0%} are needed). Register it yourself, or choose other series.",
            reason="registration",
        )
    return registration


def _image(volume: Volume) -> SimpleITK.Image:
    """Return a volume for SimpleITK, in RAS+ mm. One with sheared axes is resampled first."""
    import SimpleITK as sitk  # noqa: N813

    if not volume.grid.is_orthogonal:
        volume = resample(volume, volume.grid.orthogonalized(), order=1, fill=float(volume.array.min()))
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.array[0].T, dtype=np.float32))
    affine = volume.grid.affine
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetSpacing(volume.grid.spacing_mm)
    image.SetDirection((affine[:3, :3] / volume.grid.spacing_mm).ravel().tolist())
    return image


def _registered(fixed: SimpleITK.Image, moving: SimpleITK.Image) -> tuple[Affine, float]:
    """Return the matrix from the fixed to the moving image, and the metric: less is better."""
    coarse = [_optimized(fixed, moving, start, COARSE_MM) for start in _starts(fixed, moving)]
    transform, _ = min(coarse, key=lambda one: one[1])
    transform, value = _optimized(fixed, moving, transform, FINE_MM)
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(transform.GetMatrix(), (3, 3))
    matrix[:3, 3] = transform.TransformPoint((0.0, 0.0, 0.0))
    return matrix, value


def _starts(fixed: SimpleITK.Image, moving: SimpleITK.Image) -> list[SimpleITK.Euler3DTransform]:
    import SimpleITK as sitk  # noqa: N813

    centered = sitk.CenteredTransformInitializerFilter
    starts = [
        sitk.Euler3DTransform(sitk.CenteredTransformInitializer(fixed, moving, sitk.Euler3DTransform(), mode))
        for mode in (centered.GEOMETRY, centered.MOMENTS)
    ]
    same = sitk.Euler3DTransform(starts[0])
    same.SetTranslation((0.0, 0.0, 0.0))
    return [same, *starts]


def _optimized(
    fixed: SimpleITK.Image, moving: SimpleITK.Image, start: SimpleITK.Euler3DTransform, levels_mm: tuple[float, ...]
) -> tuple[SimpleITK.Euler3DTransform, float]:
    """Return the transform that the metric is least for near `start`, and the metric."""
    import SimpleITK as sitk  # noqa: N813

    transform, value = sitk.Euler3DTransform(start), np.inf
    for level_mm in levels_mm:
        ends = _shrunk(fixed, level_mm), _shrunk(moving, level_mm)
        method = sitk.ImageRegistrationMethod()
        method.SetNumberOfThreads(1)  # sums in one order
        method.SetMetricAsMattesMutualInformation(BINS)
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(min(1.0, SAMPLES / float(np.prod(ends[0].GetSize()))), SEED)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetOptimizerAsRegularStepGradientDescent(
            learningRate=level_mm / 2, minStep=level_mm / 500, numberOfIterations=150, relaxationFactor=0.6,
            gradientMagnitudeTolerance=1e-9,
        )  # fmt: skip
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetInitialTransform(transform, inPlace=True)
        try:
            method.Execute(*ends)
        except RuntimeError:  # hardly a sample lies within the moving image
            return transform, np.inf
        value = method.GetMetricValue()
    return transform, value


def _shrunk(image: SimpleITK.Image, level_mm: float) -> SimpleITK.Image:
    """Return the image with voxels of at most `level_mm`, where it has several in that; each is the mean of those."""
    import SimpleITK as sitk  # noqa: N813

    return sitk.BinShrink(image, [max(1, int(level_mm / length)) for length in image.GetSpacing()])


def _inverse(matrix: Affine) -> Affine:
    return np.asarray(np.linalg.inv(matrix), dtype=np.float64)


def _apart_mm(first: Affine, second: Affine, grid: Grid) -> float:
    corners = grid.to_world(_corners(grid))
    difference = corners @ (first - second)[:3, :3].T + (first - second)[:3, 3]
    return float(np.linalg.norm(difference, axis=1).max())


def _halfway(first: Affine, second: Affine, grid: Grid) -> Affine:
    """Return the rigid matrix between two that differ little, which takes the center of the grid halfway."""
    mean = (first + second) / 2
    left, _, right = np.linalg.svd(mean[:3, :3])
    center = grid.to_world((np.asarray(grid.shape) - 1) / 2)
    matrix: Affine = np.eye(4)
    matrix[:3, :3] = left @ right
    matrix[:3, 3] = mean[:3, :3] @ center + mean[:3, 3] - matrix[:3, :3] @ center
    return matrix


def _overlap(matrix: Affine, fixed: Grid, moving: Grid) -> float:
    """Return the larger of the shares of points of each field of view that lie within the other."""

    def share(of: Grid, within: Grid, between: Affine) -> float:
        points: Array = np.stack(np.meshgrid(*(np.linspace(0, size - 1, 16) for size in of.shape)), axis=-1)
        index = within.to_index(of.to_world(points.reshape(-1, 3)) @ between[:3, :3].T + between[:3, 3])
        inside = (index > -0.5) & (index < np.asarray(within.shape) - 0.5)
        return float(inside.all(axis=1).mean())

    return max(share(fixed, moving, matrix), share(moving, fixed, _inverse(matrix)))


def _corners(grid: Grid) -> NDArray[np.float64]:
    ends = [(0.0, size - 1.0) for size in grid.shape]
    return np.array([(i, j, k) for i in ends[0] for j in ends[1] for k in ends[2]])
