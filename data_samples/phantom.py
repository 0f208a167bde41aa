"""Two analytic bodies, a trunk and a head, and how a scanner sees them.

A body is a list of `Shape`s in world millimetres (RAS+). They are painted in order, later over earlier, so a liver cuts
its dome out of a lung. Geometry is exact whatever grid it is rendered on: that is what makes these samples a yardstick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from medseg.volume import Grid

SUBVOXELS = 3
"""Each voxel is the mean of this many samples along each axis, which gives borders their partial volume."""

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Shape:
    """An ellipsoid, or with `flat_ends` an elliptic cylinder along its third axis, filled with one `value`.

    `turn_deg` turns it about x, then y, then z. `boxy` takes the power 2.5 for the square, as suits a trunk. `folds`
    cuts grooves into the border as between gyri: how deep (a share of the squared radius) and how sharp.
    """

    name: str
    value: float
    center_mm: Triple
    radii_mm: Triple
    turn_deg: Triple = (0, 0, 0)
    flat_ends: bool = False
    boxy: bool = False
    folds: tuple[float, float] | None = None

    @cached_property
    def frame(self) -> NDArray[np.float64]:
        """The affine that takes the unit ball, or the unit cylinder, to the shape in world millimetres."""
        frame = np.eye(4)
        frame[:3, :3] = _rotation(self.turn_deg) * self.radii_mm
        frame[:3, 3] = self.center_mm
        return frame

    def inside(self, grid: Grid) -> NDArray[np.bool_]:
        """Return which voxel centres of `grid` lie inside."""
        right, front, head = (self._distance(row, grid.shape) for row in np.linalg.solve(self.frame, grid.affine)[:3])
        if self.flat_ends:
            return (right + front <= 1) & (head <= 1)
        found = right + front + head
        if self.folds:
            depth, sharpness = self.folds
            border = (found > 1 - depth) & (found <= 1)
            found[border] += depth * _grooves(grid.to_world(np.argwhere(border))) ** sharpness
        return found <= 1

    def _distance(self, row: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float32]:
        i, j, k = np.ogrid[: shape[0], : shape[1], : shape[2]]
        # A sum of three vectors costs a third of a matrix product per point; single precision is good to 0.0001 mm.
        along = (row[0] * i + row[3]).astype(np.float32) + (row[1] * j + row[2] * k).astype(np.float32)
        return along**2 * np.sqrt(np.abs(along)) if self.boxy else along**2

    def part_of(self, grid: Grid) -> tuple[list[int], list[int]] | None:
        """Return start and stop of the part of `grid` that the shape can touch, or None where it misses the grid."""
        signs = np.indices((2, 2, 2)).reshape(3, 8).T * 2 - 1
        index = grid.to_index(signs @ self.frame[:3, :3].T + self.frame[:3, 3])
        start = np.clip(np.floor(index.min(axis=0)), 0, grid.shape).astype(int)
        stop = np.clip(np.ceil(index.max(axis=0)) + 1, 0, grid.shape).astype(int)
        return (start.tolist(), stop.tolist()) if (start < stop).all() else None


def _grooves(points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how near each point (N, 3) is to the bottom of a groove, 0 to 1: winding sheets about 16 mm apart."""
    x, y, z = points_mm.T
    bend = 1.6 * np.sin(0.085 * x + 0.06 * z) + 1.3 * np.sin(0.09 * y - 0.05 * z)
    one = np.abs(np.sin(0.16 * y + 0.07 * z + bend))
    other = np.abs(np.sin(0.15 * z - 0.08 * y + 0.05 * x - bend))
    return 1 - np.minimum(one, other)


def _rotation(turn_deg: Triple) -> NDArray[np.float64]:
    return Rotation.from_euler("xyz", turn_deg, degrees=True).as_matrix()


def placed_grid(
    center_mm: Triple, shape: tuple[int, int, int], spacing_mm: Triple, turn_deg: Triple, orientation: str
) -> Grid:
    """Return a grid centered on a world point, turned about x, then y, then z, and stored as `orientation`.

    `shape` and `spacing_mm` are along right, front and head, before the storage order.
    """
    affine = np.eye(4)
    affine[:3, :3] = _rotation(turn_deg) * spacing_mm
    affine[:3, 3] = center_mm - affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return Grid(shape, affine).reoriented(orientation)


def render(
    grid: Grid, body: Sequence[Shape], label_of: Mapping[str, int], slice_mm: float | None = None
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Return the mean value of `body` in each voxel of `grid`, and its label where half the voxel or more has it.

    `label_of` is the label of each shape name; other shapes have none. Slices lie along the last axis and are as thick
    as they are apart, or `slice_mm`: then they overlap or leave gaps.
    """
    values, labels = np.empty(grid.shape), np.zeros(grid.shape, np.uint8)
    stretch = np.array((1, 1, 1 if slice_mm is None else slice_mm / grid.spacing_mm[2]))
    for k in range(grid.shape[2]):
        plane = grid.cropped((0, 0, k), (*grid.shape[:2], k + 1))
        affine = plane.affine.copy()
        affine[:3, :3] *= stretch
        thick = Grid(plane.shape, affine)
        drawn = _painted(thick.with_spacing(np.asarray(thick.spacing_mm) / SUBVOXELS), body)
        values[..., k] = _voxel_means(np.array([0, *(shape.value for shape in body)])[drawn])
        for label in set(label_of.values()):
            marked = np.array([False, *(label_of.get(shape.name) == label for shape in body)])
            labels[..., k][_voxel_means(marked[drawn]) >= 0.5] = label
    return values, labels


def _painted(grid: Grid, body: Sequence[Shape]) -> NDArray[np.uint8]:
    """Return for each voxel centre 1 + the place in `body` of the last shape that holds it, 0 for none."""
    drawn = np.zeros(grid.shape, np.uint8)
    for place, shape in enumerate(body, start=1):
        part = shape.part_of(grid)
        if part is not None:
            drawn[tuple(map(slice, *part))][shape.inside(grid.cropped(*part))] = place
    return drawn


def _voxel_means(fine: NDArray[np.generic]) -> NDArray[np.float64]:
    rows, columns, layers = (n // SUBVOXELS for n in fine.shape)
    blocks = fine.reshape(rows, SUBVOXELS, columns, SUBVOXELS, layers * SUBVOXELS)
    return blocks.mean(axis=(1, 3, 4), dtype=np.float64)


def trunk() -> list[Shape]:
    """Return a trunk on a couch in HU: heart and lungs above z = 20 mm, below it liver, spleen, stomach and kidneys."""
    return [
        Shape("air", -1000, (0, 0, 0), (900, 900, 900)),
        *_couch(),
        *_body_wall(),
        *_chest(),
        *_abdomen(),
        *(part for z in range(-210, 211, 30) for part in _vertebra(z)),
    ]


def _couch() -> list[Shape]:
    # Three nested cylinders leave a hollow crescent below the patient.
    return [
        Shape("couch shell", -150, (0, 123, 0), (262, 262, 500), flat_ends=True),
        Shape("couch foam", -930, (0, 122, 0), (257, 257, 500), flat_ends=True),
        Shape("couch shell", -150, (0, 212, 0), (328, 328, 500), flat_ends=True),
        Shape("air", -1000, (0, 212, 0), (324, 324, 500), flat_ends=True),
    ]


def _body_wall() -> list[Shape]:
    ribs = [
        Shape("rib", 420, (0, 2, z), (141, 90, 5.5), turn_deg=(28, 0, 0), flat_ends=True, boxy=True)
        for z in range(-62, 260, 27)
    ]
    return [
        Shape("skin", 20, (0, 0, 0), (159, 109, 400), flat_ends=True, boxy=True),
        Shape("fat", -105, (0, 0, 0), (157, 107, 400), flat_ends=True, boxy=True),
        Shape("muscle", 55, (0, -2, 0), (143, 92, 400), flat_ends=True, boxy=True),
        *ribs,
        Shape("cavity fat", -95, (0, 5, 0), (132, 79, 400), flat_ends=True, boxy=True),
        Shape("back muscle", 58, (32, -75, 0), (27, 22, 400), flat_ends=True),
        Shape("back muscle", 58, (-32, -75, 0), (27, 22, 400), flat_ends=True),
        Shape("spine surroundings", 50, (0, -62, 0), (36, 30, 400), flat_ends=True),
    ]


def _chest() -> list[Shape]:
    return [
        Shape("right lung", -850, (74, 2, 90), (55, 74, 132), boxy=True),
        Shape("left lung", -850, (-76, 2, 90), (53, 73, 136), boxy=True),
        *_lung_vessels(),
        Shape("mediastinum", 30, (0, 5, 140), (30, 62, 130), boxy=True),
        Shape("heart", 45, (-26, 24, 68), (54, 44, 46), turn_deg=(0, 25, -20)),
        Shape("heart blood", 190, (-38, 20, 64), (27, 25, 30), turn_deg=(0, 25, -20)),
        Shape("heart blood", 170, (6, 34, 72), (22, 20, 26), turn_deg=(0, 25, -20)),
    ]


def _lung_vessels() -> list[Shape]:
    rng = np.random.default_rng(11)
    vessels = []
    for side in (1, -1) * 26:
        x, y, z = rng.uniform((40, -45, -20), (105, 50, 130))
        radius, length = rng.uniform((1.8, 14), (4, 30))
        turn_deg = tuple(rng.uniform(-60, 60, 3))
        vessels.append(Shape("lung vessel", 60, (side * x, y, z), (radius, radius, length), turn_deg))
    return vessels


def _abdomen() -> list[Shape]:
    kidneys = [
        part
        for side, z in ((1, -52), (-1, -42))
        for part in (
            Shape("kidney", 180, (side * 62, -42, z), (24, 29, 52), turn_deg=(12, side * -10, side * 35)),
            Shape("kidney medulla", 135, (side * 60, -40, z), (13, 17, 38), turn_deg=(12, side * -10, side * 35)),
            Shape("kidney sinus", -80, (side * 50, -34, z), (13, 8, 20), turn_deg=(12, side * -10, side * 35)),
        )
    ]
    return [
        Shape("liver", 110, (62, 12, -34), (76, 66, 72), boxy=True),
        Shape("liver", 110, (8, 36, -22), (70, 36, 38), turn_deg=(0, 14, -8)),
        Shape("portal vein", 165, (38, 10, -30), (36, 6, 7), turn_deg=(0, 25, 20)),
        Shape("hepatic vein", 160, (52, 4, 4), (34, 4, 4.5), turn_deg=(0, -30, -25)),
        Shape("gall bladder", 12, (44, 52, -50), (13, 15, 24), turn_deg=(20, 10, 0)),
        Shape("spleen", 125, (-98, -28, -18), (25, 40, 46), turn_deg=(-15, 0, -18)),
        *kidneys,
        Shape("stomach wall", 50, (-58, 40, -22), (44, 32, 46), turn_deg=(0, -20, 12)),
        Shape("stomach fluid", 15, (-58, 40, -22), (40, 28, 42), turn_deg=(0, -20, 12)),
        Shape("stomach gas", -980, (-56, 54, -14), (27, 12, 26), turn_deg=(0, -20, 4)),
        *_bowel(),
        Shape("aorta", 210, (-14, -36, 0), (12, 12, 400), flat_ends=True),
        Shape("vena cava", 150, (24, -32, 0), (14, 10, 400), flat_ends=True),
    ]


def _bowel() -> list[Shape]:
    places = [(-20, 40, -72), (12, 48, -84), (-50, 34, -88), (-84, 30, -80), (-8, 10, -78), (-34, 6, -62)]
    return [
        part
        for n, place in enumerate(places)
        for part in (
            Shape("bowel", 40, place, (24, 17, 19), turn_deg=(0, 15 * n, 40 * n)),
            Shape("bowel gas", -900, (place[0], place[1] + 5, place[2]), (12, 7, 9), turn_deg=(0, 15 * n, 0)),
        )
    ]


def _vertebra(z: float) -> list[Shape]:
    return [
        Shape("disc", 85, (0, -58, z - 15), (21, 16, 3), flat_ends=True),
        Shape("vertebra cortex", 600, (0, -58, z), (23, 17.5, 12), flat_ends=True),
        Shape("vertebra marrow", 190, (0, -58, z), (20.5, 15, 10.5), flat_ends=True),
        Shape("vertebra arch", 480, (0, -83, z), (16, 13, 9), flat_ends=True),
        Shape("transverse process", 420, (0, -84, z + 2), (38, 4, 5)),
        Shape("spinous process", 450, (0, -97, z - 4), (3.5, 9, 8)),
        Shape("spinal canal", 15, (0, -82, z), (10.5, 8, 15), flat_ends=True),
        Shape("spinal cord", 45, (0, -82, z), (5.5, 4.5, 15), flat_ends=True),
    ]


def head(ventricle_scale: float = 1.0, hippocampus_scale: float = 1.0) -> list[Shape]:
    """Return a head in arbitrary T1-like units; both scales multiply the radii of the structures that carry labels."""
    return [
        Shape("scalp", 235, (0, -2, 4), (75, 93, 92)),
        Shape("skull", 18, (0, -2, 4), (70, 88, 87)),
        Shape("marrow", 120, (0, -2, 4), (67.5, 85.5, 84.5)),
        Shape("skull", 18, (0, -2, 4), (66, 84, 83)),
        Shape("fluid", 42, (0, -2, 4), (64, 82, 81)),
        *_brain(),
        *_deep_brain(ventricle_scale, hippocampus_scale),
        *(Shape("orbit", 210, (side * 30, 60, -30), (17, 19, 16)) for side in (1, -1)),
        *(Shape("eye", 60, (side * 30, 67, -30), (11, 11, 11)) for side in (1, -1)),
    ]


def _brain() -> list[Shape]:
    return [
        Shape("grey matter", 125, (0, -2, 6), (62, 80, 77), folds=(0.36, 7)),
        Shape("white matter", 180, (0, -2, 6), (56, 73, 70), folds=(0.55, 2)),
        Shape("grey matter", 125, (0, 0, 8), (4.5, 78, 74)),
        Shape("fluid", 42, (0, 0, 8), (1.0, 84, 80)),
        *(Shape("grey matter", 125, (side * 52, 8, 0), (16, 26, 6), (0, side * 12, side * 10)) for side in (1, -1)),
        *(Shape("fluid", 42, (side * 54, 8, 0), (14, 24, 2), (0, side * 12, side * 10)) for side in (1, -1)),
        Shape("fluid", 42, (0, -40, -46), (46, 27, 26)),
        *(Shape("cerebellum", 118, (side * 20, -40, -46), (25, 25, 23), folds=(0.3, 4)) for side in (1, -1)),
        *(Shape("cerebellum white", 170, (side * 17, -36, -44), (16, 12, 10), folds=(0.5, 2)) for side in (1, -1)),
        Shape("brain stem", 165, (0, -14, -48), (13, 12, 46), turn_deg=(-12, 0, 0)),
    ]


def _deep_brain(ventricle_scale: float, hippocampus_scale: float) -> list[Shape]:
    ventricle, right, left = np.array([(5.5, 27, 8), (6.5, 17, 5.5), (7, 18, 6)])
    ventricle, right, left = ventricle_scale * ventricle, hippocampus_scale * right, hippocampus_scale * left
    return [
        Shape("corpus callosum", 188, (0, -2, 17), (16, 36, 11)),
        Shape("third ventricle", 42, (0, -6, -2), (1.8, 14, 10)),
        *(Shape("caudate", 150, (side * 16, 14, 10), (5, 16, 8), (0, 0, side * 8)) for side in (1, -1)),
        *(Shape("putamen", 152, (side * 27, 6, 0), (5, 17, 10), (0, 0, side * 10)) for side in (1, -1)),
        *(Shape("thalamus", 158, (side * 11, -10, 1), (8, 14, 9), (0, 0, side * 20)) for side in (1, -1)),
        *(Shape("ventricle", 40, (side * 10, 0, 16), tuple(ventricle), (-8, side * -18, side * 7)) for side in (1, -1)),
        Shape("hippocampus right", 92, (27, -20, -16), tuple(right), (-20, 0, -12)),
        Shape("hippocampus left", 92, (-27, -20, -16), tuple(left), (-20, 0, 12)),
    ]
