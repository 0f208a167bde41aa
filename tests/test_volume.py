"""Grid and Volume: where voxels lie, checked by properties over many grids and by numbers worked out by hand."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from conftest import make_grid, rotation
from hypothesis import assume, given
from hypothesis import strategies as st

from medseg.errors import GeometryError
from medseg.volume import GRID_TOLERANCE_MM, Grid, Volume, box_of

WORDS = ["".join(word) for axes in permutations(("LR", "PA", "IS")) for word in product(*axes)]

spacings_mm = st.tuples(*[st.floats(0.1, 10)] * 3)
shapes = st.tuples(*[st.integers(1, 6)] * 3)
angles = st.tuples(*[st.integers(-40, 40)] * 3)
shears = st.tuples(*[st.floats(-0.3, 0.3)] * 3)
origins_mm = st.tuples(*[st.floats(-500, 500)] * 3)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Grids in all 48 orientations, turned, sheared as by a tilted gantry, anisotropic, some one slice thick."""
    tilt = np.eye(3)
    tilt[np.triu_indices(3, 1)] = draw(st.one_of(st.just((0, 0, 0)), shears))
    turn = rotation(draw(st.one_of(st.just((0, 0, 0)), angles)))
    affine = np.eye(4)
    affine[:3, :3] = turn @ tilt @ np.diag(draw(spacings_mm))
    affine[:3, 3] = draw(origins_mm)
    return Grid(draw(shapes), affine).reoriented(draw(st.sampled_from(WORDS)))


def numbered(grid: Grid, channels: int = 1) -> Volume:
    """Return a volume in which every voxel holds another number."""
    return Volume(np.arange(channels * np.prod(grid.shape)).reshape(channels, *grid.shape), grid)


def positions_mm(volume: Volume) -> dict[int, np.ndarray]:
    """Return the world position of every number in the first channel."""
    centers = volume.grid.to_world(np.argwhere(np.ones(volume.grid.shape, dtype=bool)))
    return dict(zip(volume.array[0].ravel().tolist(), centers, strict=True))


def outer_corners(grid: Grid) -> np.ndarray:
    return grid.to_world(list(product(*((-0.5, n - 0.5) for n in grid.shape))))


class TestGrid:
    def test_numbers_by_hand(self) -> None:
        # i runs 2 mm to the left, j 3 mm to the head, k 0.5 mm to the front: an LSA grid, det = 2 * 3 * 0.5 = 3.
        grid = Grid((4, 5, 6), np.array([[-2, 0, 0, 10], [0, 0, 0.5, 20], [0, 3, 0, 30], [0, 0, 0, 1]]))
        assert grid.orientation == "LSA"
        assert grid.spacing_mm == (2, 3, 0.5)
        assert grid.voxel_mm3 == pytest.approx(3)
        assert grid.is_orthogonal
        # (1, 1, 2) lies 2 mm left, 3 mm up and 1 mm in front of the origin.
        np.testing.assert_allclose(grid.to_world((1, 1, 2)), (8, 21, 33))
        np.testing.assert_allclose(grid.to_index((8, 21, 33)), (1, 1, 2))

    def test_sheared_voxels_keep_base_times_height(self) -> None:
        # Slices 4 mm apart, each moved 3 mm to the front: centers are sqrt(3² + 4²) = 5 mm apart,
        # but a voxel still has 1 * 1 * 4 mm³, and the cosine between j and k is 3 / 5.
        grid = Grid((2, 2, 2), np.array([[1, 0, 0, 0], [0, 1, 3, 0], [0, 0, 4, 0], [0, 0, 0, 1]]))
        assert grid.spacing_mm == (1, 1, 5)
        assert grid.voxel_mm3 == pytest.approx(4)
        assert not grid.is_orthogonal

    def test_orthogonal_within_what_float32_headers_hold(self) -> None:
        grid = make_grid("oblique")
        assert Grid(grid.shape, grid.affine.astype(np.float32)).is_orthogonal

    def test_affine_is_a_copy_that_cannot_change(self) -> None:
        affine = np.eye(4)
        grid = Grid((1, 1, 1), affine)
        affine[0, 3] = 7
        assert grid.affine[0, 3] == 0
        with pytest.raises(ValueError, match="read-only"):
            grid.affine[0, 3] = 7

    @pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5, 6), (3, 0, 5), (3, -1, 5)])
    def test_refuses_shapes_without_voxels(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(GeometryError, match="three axes of at least one voxel"):
            Grid(shape, np.eye(4))

    @pytest.mark.parametrize("affine", [np.eye(3), np.diag([1, 1, 1, 2]), np.ones((4, 4))])
    def test_refuses_what_is_no_affine(self, affine: np.ndarray) -> None:
        with pytest.raises(GeometryError, match="last row is 0 0 0 1"):
            Grid((3, 4, 5), affine)

    @pytest.mark.parametrize("value", [0, np.nan, np.inf])
    def test_refuses_affines_that_are_not_finite_and_invertible(self, value: float) -> None:
        with pytest.raises(GeometryError, match="not finite and invertible"):
            Grid((3, 4, 5), np.diag([1, value, 1, 1]))

    def test_refuses_two_axes_on_one_line_and_takes_tiny_voxels(self) -> None:
        flat = np.eye(4)
        flat[:3, 1] = (5, 0, 0)
        with pytest.raises(GeometryError, match="not finite and invertible"):
            Grid((3, 4, 5), flat)
        assert Grid((3, 4, 5), np.diag([1e-4, 1e-4, 1e-4, 1])).voxel_mm3 == pytest.approx(1e-12)

    @given(grids(), st.lists(st.tuples(*[st.floats(-1000, 1000)] * 3), min_size=1, max_size=4))
    def test_to_index_undoes_to_world(self, grid: Grid, index: list[tuple[float, float, float]]) -> None:
        np.testing.assert_allclose(grid.to_index(grid.to_world(index)), index, atol=1e-8)
        assert grid.to_index(grid.to_world(index[0])).shape == (3,)


class TestReoriented:
    @given(grids(), st.sampled_from(WORDS))
    def test_there_and_back_is_exact(self, grid: Grid, word: str) -> None:
        volume = numbered(grid, channels=2)
        there = volume.reoriented(word)
        back = there.reoriented(grid.orientation)
        assert there.grid.orientation == word
        assert back.array.tobytes() == volume.array.tobytes()
        assert back.grid.matches(grid, tolerance_mm=1e-9)

    @given(grids(), st.sampled_from(WORDS))
    def test_every_voxel_keeps_its_place(self, grid: Grid, word: str) -> None:
        volume = numbered(grid)
        before, after = positions_mm(volume), positions_mm(volume.reoriented(word))
        assert before.keys() == after.keys()
        for number, position in before.items():
            np.testing.assert_allclose(after[number], position, atol=1e-9)

    @given(grids(), st.sampled_from(WORDS))
    def test_grid_and_volume_agree(self, grid: Grid, word: str) -> None:
        turned = numbered(grid).reoriented(word).grid
        assert turned.matches(grid.reoriented(word), tolerance_mm=0)
        assert turned.voxel_mm3 == pytest.approx(grid.voxel_mm3)

    def test_numbers_by_hand(self) -> None:
        # Three voxels 2 mm apart, from x = 0 to x = 4. Seen from the right, the first lies at x = 4.
        grid = Grid((3, 1, 1), np.diag([2, 1, 1, 1]))
        volume = Volume(np.array([10, 20, 30]).reshape(1, 3, 1, 1), grid).reoriented("las")
        assert volume.array.ravel().tolist() == [30, 20, 10]
        np.testing.assert_allclose(volume.grid.to_world([(0, 0, 0), (2, 0, 0)]), [(4, 0, 0), (0, 0, 0)])

    def test_is_a_view(self, volume: Volume) -> None:
        assert np.shares_memory(volume.reoriented("PIL").array, volume.array)

    @pytest.mark.parametrize("word", ["", "RA", "RASS", "XYZ", "RAR", "RLS", "RPA"])
    def test_refuses_words_that_do_not_name_three_axes(self, volume: Volume, word: str) -> None:
        with pytest.raises(GeometryError, match=r"one letter of each pair .* here it is"):
            volume.reoriented(word)
        with pytest.raises(GeometryError, match=r"one letter of each pair .* here it is"):
            volume.grid.reoriented(word)


class TestWithSpacing:
    @given(grids(), spacings_mm)
    def test_keeps_the_field_of_view(self, grid: Grid, wanted_mm: tuple[float, float, float]) -> None:
        other = grid.with_spacing(wanted_mm)
        counts = np.multiply(grid.shape, grid.spacing_mm) / wanted_mm
        assert other.shape == tuple(max(1, round(count)) for count in counts)
        np.testing.assert_allclose(outer_corners(other), outer_corners(grid), atol=1e-8)
        assert other.orientation == grid.orientation

    @given(grids())
    def test_the_spacing_at_hand_changes_nothing(self, grid: Grid) -> None:
        assert grid.with_spacing(grid.spacing_mm).matches(grid, tolerance_mm=1e-9)

    def test_numbers_by_hand(self) -> None:
        # i: 10 voxels of 1 mm reach from -0.5 to 9.5. At 3 mm that is 3.33, so 3 voxels of 10/3 mm; the first
        # center lies at -0.5 + 5/3 = 7/6. j: 4 mm at 0.5 mm are 8 voxels, the first at -0.5 + 0.25. k: one slice stays.
        grid = Grid((10, 4, 1), np.eye(4)).with_spacing((3, 0.5, 5))
        assert grid.shape == (3, 8, 1)
        np.testing.assert_allclose(grid.spacing_mm, (10 / 3, 0.5, 1))
        np.testing.assert_allclose(grid.to_world((0, 0, 0)), (7 / 6, -0.25, 0))

    @pytest.mark.parametrize("spacing_mm", [(1, 1), (1, 0, 1), (1, -1, 1), (1, np.nan, 1), (1, np.inf, 1), 1.0])
    def test_refuses_what_is_no_spacing(self, spacing_mm: tuple[float, ...]) -> None:
        with pytest.raises(GeometryError, match="three positive lengths in mm"):
            make_grid("RAS").with_spacing(spacing_mm)


class TestOrthogonalized:
    @given(grids())
    def test_covers_the_grid_with_perpendicular_axes(self, grid: Grid) -> None:
        straight = grid.orthogonalized()
        assert straight.is_orthogonal
        index = straight.to_index(outer_corners(grid))
        assert (index >= -0.501).all()
        assert (index <= np.subtract(straight.shape, 0.499)).all()
        # Not one voxel more than the corners need.
        assert (np.ptp(index, axis=0) > np.subtract(straight.shape, 1)).all()
        # Slices stay slices: the first axis and the plane of the first two are kept, and so is the handedness.
        np.testing.assert_allclose(straight.affine[:3, 0], grid.affine[:3, 0], atol=1e-9)
        normal = np.cross(grid.affine[:3, 0], grid.affine[:3, 1])
        assert abs(normal @ straight.affine[:3, 1]) < 1e-9 * np.prod(grid.spacing_mm)
        assert np.linalg.det(straight.affine) * np.linalg.det(grid.affine) > 0

    def test_perpendicular_axes_are_left_alone(self, grid: Grid) -> None:
        assert grid.orthogonalized() is grid

    def test_numbers_by_hand(self) -> None:
        # Four slices 4 mm apart, each moved 3 mm to the front, of five rows of 1 mm. The first slice begins at -0.5 mm,
        # and 1.5 mm further back half a slice below; the last ends at 4.5 + 9 + 1.5 mm: from -2 to 15 mm are 17 rows.
        grid = Grid((2, 5, 4), np.array([[1, 0, 0, 0], [0, 1, 3, 0], [0, 0, 4, 0], [0, 0, 0, 1]])).orthogonalized()
        assert grid.shape == (2, 17, 4)
        np.testing.assert_allclose(grid.affine, [[1, 0, 0, 0], [0, 1, 0, -1.5], [0, 0, 4, 0], [0, 0, 0, 1]], atol=1e-12)


class TestCropped:
    @given(st.data(), grids())
    def test_every_voxel_keeps_its_place(self, data: st.DataObject, grid: Grid) -> None:
        start = [data.draw(st.integers(0, n - 1)) for n in grid.shape]
        stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, grid.shape, strict=True)]
        volume = numbered(grid)
        part = volume.cropped(start, stop)
        before, after = positions_mm(volume), positions_mm(part)
        assert part.grid.shape == tuple(np.subtract(stop, start))
        assert part.grid.matches(grid.cropped(start, stop), tolerance_mm=0)
        for number, position in after.items():
            np.testing.assert_allclose(before[number], position, atol=1e-9)

    def test_is_a_view_of_all_channels(self) -> None:
        volume = numbered(make_grid("PIR"), channels=3)
        part = volume.cropped((1, 0, 2), (3, 4, 4))
        assert part.array.shape == (3, 2, 4, 2)
        assert np.shares_memory(part.array, volume.array)
        assert part.array[2, 0, 0, 0] == volume.array[2, 1, 0, 2]

    @pytest.mark.parametrize(
        ("start", "stop"), [((0, 0, 0), (8, 9, 5)), ((-1, 0, 0), (2, 2, 2)), ((2, 2, 2), (4, 2, 4))]
    )
    def test_refuses_empty_parts_and_parts_beyond(self, start: tuple[int, ...], stop: tuple[int, ...]) -> None:
        with pytest.raises(GeometryError, match=r"is empty or leaves the grid \(7, 9, 5\)"):
            make_grid("RAS", (7, 9, 5)).cropped(start, stop)


class TestCovering:
    @given(grids(), origins_mm, spacings_mm)
    def test_holds_every_voxel_center_in_the_box(
        self, grid: Grid, offset: tuple[float, float, float], half_mm: tuple[float, float, float]
    ) -> None:
        middle = grid.to_world((np.asarray(grid.shape) - 1) / 2) + np.asarray(offset) / 100
        box = (middle - half_mm, middle + half_mm)
        index = np.argwhere(np.ones(grid.shape, dtype=bool))
        centers = grid.to_world(index)
        within = ((centers >= box[0]) & (centers <= box[1])).all(axis=1)
        assume(within.any())
        start, stop = grid.covering(box)
        assert ((index[within] >= start) & (index[within] < stop)).all()

    @given(st.data(), shapes, spacings_mm, origins_mm, st.sampled_from(WORDS))
    def test_finds_a_part_again_from_its_outline(
        self,
        data: st.DataObject,
        shape: tuple[int, int, int],
        spacing_mm: tuple[float, float, float],
        origin_mm: tuple[float, float, float],
        word: str,
    ) -> None:
        affine = np.diag([*spacing_mm, 1])
        affine[:3, 3] = origin_mm
        grid = Grid(shape, affine).reoriented(word)
        start = tuple(data.draw(st.integers(0, n - 1)) for n in grid.shape)
        stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, grid.shape, strict=True))
        corners = outer_corners(grid.cropped(start, stop))
        # Not one voxel more than the outline holds, and the corners may come in any order.
        assert grid.covering((corners[0], corners[-1])) == (start, stop)
        assert grid.covering((corners[-1], corners[0])) == (start, stop)

    @given(grids(), st.tuples(*[st.floats(0, 1)] * 3), spacings_mm)
    def test_is_minimal(
        self, grid: Grid, place: tuple[float, float, float], half_mm: tuple[float, float, float]
    ) -> None:
        middle = grid.to_world(np.multiply(place, np.subtract(grid.shape, 1)))
        box = (middle - half_mm, middle + half_mm)
        start, stop = grid.covering(box)
        corners = grid.to_index(list(product(*zip(*box, strict=True))))
        # The outermost voxels on each side touch the box (a voxel reaches half an index to both sides).
        assert (np.add(start, 0.5) >= corners.min(axis=0) - 1e-5).all()
        assert (np.subtract(stop, 1.5) <= corners.max(axis=0) + 1e-5).all()

    def test_numbers_by_hand(self) -> None:
        # 2 mm voxels, centers at 0, 2 ... 18. The box from 3.1 to 8 mm reaches into voxels 2 (3 to 5 mm) to 4 (7 to 9).
        grid = Grid((10, 10, 10), np.diag([2, 2, 2, 1]))
        assert grid.covering(((3.1, 3.1, 3.1), (8, 8, 8))) == ((2, 2, 2), (5, 5, 5))
        # From 3 to 5 mm is voxel 2 to its borders, and no more.
        assert grid.covering(((3, 3, 3), (5, 5, 5))) == ((2, 2, 2), (3, 3, 3))
        # A point lies in one voxel, even on a border.
        assert grid.covering(((3, 3, 3), (3, 3, 3))) == ((2, 2, 2), (3, 3, 3))
        # What lies beyond the grid is left out, however far it reaches.
        assert grid.covering(((-1e30, 17, -5), (1e30, 99, 0.5))) == ((0, 9, 0), (10, 10, 1))

    @pytest.mark.parametrize("x_mm", [(-9, -2), (19.5, 30), (1e20, 1e21)])
    def test_refuses_boxes_beside_the_grid(self, x_mm: tuple[float, float]) -> None:
        grid = Grid((10, 10, 10), np.diag([2, 2, 2, 1]))
        with pytest.raises(GeometryError, match="lies outside the image"):
            grid.covering(((x_mm[0], 0, 0), (x_mm[1], 5, 5)))

    @pytest.mark.parametrize("box", [((0, 0, 0),), ((0, 0), (1, 1)), ((0, 0, 0), (1, np.nan, 1))])
    def test_refuses_what_is_no_box(self, box: tuple[tuple[float, ...], ...]) -> None:
        with pytest.raises(GeometryError, match="A box is two corners"):
            make_grid("RAS").covering(box)


class TestMatches:
    @given(grids(), st.tuples(*[st.floats(-1, 1)] * 3))
    def test_tolerates_shifts_below_the_limit_only(self, grid: Grid, direction: tuple[float, float, float]) -> None:
        length = np.linalg.norm(direction)
        assume(length > 0.1)
        for share, expected in ((0.9, True), (1.1, False)):
            affine = grid.affine.copy()
            affine[:3, 3] += share * GRID_TOLERANCE_MM * np.asarray(direction) / length
            assert grid.matches(Grid(grid.shape, affine)) is expected

    def test_measures_at_the_far_corner(self) -> None:
        # 1e-5 mm more per voxel is 0.00099 mm at voxel 99, below 0.001, and 0.00101 mm at voxel 101.
        stretched = np.diag([1.00001, 1, 1, 1])
        assert Grid((100, 1, 1), np.eye(4)).matches(Grid((100, 1, 1), stretched))
        assert not Grid((102, 1, 1), np.eye(4)).matches(Grid((102, 1, 1), stretched))

    def test_needs_one_shape(self) -> None:
        assert not make_grid("RAS", (3, 4, 5)).matches(make_grid("RAS", (3, 4, 6)))


class TestVolume:
    def test_refuses_an_array_that_does_not_fit(self) -> None:
        grid = make_grid("RAS", (7, 9, 5))
        for shape in ((7, 9, 5), (1, 7, 9, 4), (0, 7, 9, 5)):
            with pytest.raises(GeometryError, match=r"needs an array \(channels, 7, 9, 5\)"):
                Volume(np.zeros(shape), grid)

    @pytest.mark.parametrize("dtype", [complex, object, "U3", "M8[s]"])
    def test_refuses_what_is_not_a_real_number(self, dtype: type | str) -> None:
        with pytest.raises(GeometryError, match="Voxels are real numbers"):
            Volume(np.zeros((1, 7, 9, 5), dtype=dtype), make_grid("RAS", (7, 9, 5)))

    @pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float16, np.float64])
    def test_takes_real_numbers(self, dtype: type) -> None:
        assert Volume(np.zeros((2, 7, 9, 5), dtype=dtype), make_grid("RAS", (7, 9, 5))).array.dtype == dtype

    def test_with_array_stays_in_place(self, volume: Volume) -> None:
        assert volume.with_array(volume.array[:, ::1] * 2).grid is volume.grid


def test_the_box_of_a_mask_ends_behind_its_last_voxels():
    mask = np.zeros((4, 5, 6), bool)
    assert box_of(mask) is None
    mask[1, 2, 0] = mask[3, 2, 4] = True
    assert box_of(mask) == (slice(1, 4), slice(2, 3), slice(0, 5))


def test_numpy_takes_a_volume_for_its_voxels(volume):
    assert np.asarray(volume) is volume.array
    assert np.shares_memory(np.asarray(volume, dtype=np.int16), volume.array)
    copied = np.array(volume)
    assert not np.shares_memory(copied, volume.array)
    np.testing.assert_array_equal(copied, volume.array)
    converted = np.asarray(volume, dtype=np.float64)
    assert (converted.dtype, converted.shape) == (np.float64, volume.array.shape)
    assert np.array(volume, dtype=np.float32).dtype == np.float32
    assert float(np.mean(volume)) == volume.array.mean()


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="numpy 1 knows no copy=False of this kind")
def test_numpy_may_ask_for_no_copy(volume):
    assert np.array(volume, copy=False) is volume.array
    with pytest.raises(ValueError, match="copy"):
        np.array(volume, dtype=np.float64, copy=False)
