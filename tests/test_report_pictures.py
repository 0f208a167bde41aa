"""Pictures: what stands where, in which proportions, and what happens with odd inputs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_grid
from matplotlib.image import imread

from medseg.errors import GeometryError, InputError, OutputError, UsageError
from medseg.io import load
from medseg.labels import Label, make_labels
from medseg.report import pictures
from medseg.report.pictures import DPI, LINE, WIDTH, draw_overlay
from medseg.volume import Grid, Volume

RED = (Label(value=1, name="cube", color="#ff0000"),)


def drawn(image: Volume, labels: Volume, path: Path, table: tuple[Label, ...] = RED) -> np.ndarray:
    """Return the colors (rows, columns, RGB) of the picture, from 0 to 1."""
    draw_overlay(image, labels, table, path)
    return imread(path)[..., :3]


def cube(center_mm: tuple[float, float, float], side_mm: float, grid: Grid) -> Volume:
    """Return the voxels whose centers lie in a cube of world space."""
    offset = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1)) - center_mm
    return Volume((np.abs(offset) < side_mm / 2).all(axis=-1).astype(np.uint8)[np.newaxis], grid)


def panels(picture: np.ndarray) -> list[np.ndarray]:
    """Return the axial, coronal and sagittal panel, found by the brightness that the image never falls below."""
    columns = np.flatnonzero((picture.mean(axis=-1) > 0.05).sum(axis=0) > 60)
    parts = np.split(columns, np.flatnonzero(np.diff(columns) > 5) + 1)
    found = []
    for part in parts:
        panel = picture[:, part[0] : part[-1] + 1]
        rows = np.flatnonzero((panel.mean(axis=-1) > 0.05).mean(axis=1) > 0.9)
        found.append(panel[rows[0] : rows[-1] + 1])
    return found


def spot(panel: np.ndarray) -> tuple[float, float, float, float]:
    """Return middle across, middle down, width and height of what is red, as parts of the panel."""
    red = (panel[..., 0] > 0.7) & (panel[..., 1] < 0.4)
    across, down = np.flatnonzero(red.any(axis=0)), np.flatnonzero(red.any(axis=1))
    width, height = panel.shape[1], panel.shape[0]
    return (
        (across[0] + across[-1]) / 2 / width, (down[0] + down[-1]) / 2 / height,
        np.ptp(across) / width, np.ptp(down) / height,
    )  # fmt: skip


@pytest.fixture
def scene() -> tuple[Volume, Volume]:
    """Return gray noise of 120 x 100 x 80 mm in thick slices, a brighter 60 mm cube at its right, front and top."""
    grid = Grid((60, 50, 16), np.diag([2, 2, 5, 1]))
    labels = cube((70, 58, 44), 60, grid)
    noise = np.random.default_rng(5).normal(100, 2, size=labels.array.shape)
    return Volume((noise + 50 * labels.array).astype(np.float32), grid), labels


def test_sides_and_proportions(scene: tuple[Volume, Volume], tmp_path: Path) -> None:
    # Its voxels reach from 41 to 99 mm in a volume from -1 (left) to 119 mm (right), from 29 to 87 mm in one from -1
    # (back) to 99 mm (front), and from 12.5 to 72.5 mm in one from -2.5 (foot) to 77.5 mm (head). Right is at the left
    # of the picture, the front and the head are at its top, and the front is at the left of the sagittal plane.
    picture = drawn(*scene, tmp_path / "picture.png")
    assert picture.shape[1] == round(WIDTH * DPI)
    axial, coronal, sagittal = panels(picture)
    right, front, top = (119 - 70) / 120, (99 - 58) / 100, (77.5 - 42.5) / 80
    assert spot(axial) == pytest.approx((right, front, 58 / 120, 58 / 100), abs=0.02)
    assert spot(coronal) == pytest.approx((right, top, 58 / 120, 60 / 80), abs=0.02)
    assert spot(sagittal) == pytest.approx((front, top, 58 / 100, 60 / 80), abs=0.02)
    for panel, extents_mm in ((axial, (120, 100)), (coronal, (120, 80)), (sagittal, (100, 80))):
        assert panel.shape[1] / panel.shape[0] == pytest.approx(extents_mm[0] / extents_mm[1], rel=0.02)
        # The outline lies around the brighter part of the image.
        across, down, width, height = spot(panel)
        left, right = (round((across + part * width) * panel.shape[1]) for part in (-0.4, 0.4))
        top, bottom = (round((down + part * height) * panel.shape[0]) for part in (-0.4, 0.4))
        assert panel[top:bottom, left:right].mean() > 2 * panel[5:40, 5:40].mean()
        assert panel[top:bottom, left:right].min() > 0.5


def test_letters_name_the_ends_of_the_axes_shown() -> None:
    opposite = dict(zip("RLAPSI", "LRPAIS", strict=True))
    for plane in pictures.PLANES:
        right, lower = "LPI"[plane.across], "LPI"[plane.down]
        assert plane.edges == opposite[right] + right + opposite[lower] + lower


def test_captions_say_where_the_slices_lie(scene: tuple[Volume, Volume]) -> None:
    # The cube takes the most area in its middle: (70, 58, 42.5) mm, between the slices at 40 and 45 mm.
    for shift_mm, expected in ((0, ["S 45 mm", "A 58 mm", "R 70 mm"]), (-200, ["I 155 mm", "P 142 mm", "L 130 mm"])):
        affine = scene[0].grid.affine.copy()
        affine[:3, 3] += shift_mm
        image, labels = (Volume(one.array, Grid(one.grid.shape, affine)) for one in scene)
        shown = pictures._scene(image, labels, {1: "#ff0000"})
        assert [pictures._position(shown, plane) for plane in pictures.PLANES] == expected


@pytest.mark.parametrize("word", ["LPS", "PIR", "SRA"])
def test_the_way_of_storing_changes_nothing(scene: tuple[Volume, Volume], tmp_path: Path, word: str) -> None:
    image, labels = scene
    one = drawn(image, labels, tmp_path / "one.png")
    other = drawn(image.reoriented(word), labels.reoriented(word), tmp_path / "other.png")
    np.testing.assert_array_equal(one, other)


def test_small_structures_are_shown_from_near_by_too(scene: tuple[Volume, Volume], tmp_path: Path) -> None:
    image, large = scene
    small = cube((90, 60, 52), 12, image.grid)
    one_row, two_rows = (drawn(image, labels, tmp_path / "picture.png") for labels in (large, small))
    assert two_rows.shape[0] > 1.5 * one_row.shape[0]


def test_the_slice_with_the_largest_area_is_shown(scene: tuple[Volume, Volume], tmp_path: Path) -> None:
    # Two cubes; a plane through the middle of both would show neither.
    image, _ = scene
    both = cube((20, 20, 10), 24, image.grid).array + 2 * cube((90, 70, 60), 26, image.grid).array
    table = (Label(value=1, name="small", color="#0000ff"), Label(value=2, name="large", color="#ff0000"))
    for panel in panels(drawn(image, image.with_array(both), tmp_path / "picture.png", table))[:3]:
        assert spot(panel)[2] > 0.2


def test_nothing_found_draws_no_outline(scene: tuple[Volume, Volume], tmp_path: Path) -> None:
    image, labels = scene
    picture = drawn(image, labels.with_array(labels.array * 0), tmp_path / "picture.png")
    assert np.ptp(picture, axis=-1).max() == 0


def test_names_are_taken_as_they_are(scene: tuple[Volume, Volume], tmp_path: Path) -> None:
    for name in ("_hidden", "$x^{2$", "海馬" * 90):
        draw_overlay(*scene, [Label(value=1, name=name, color="#000075")], tmp_path / "picture.png", title=name)


def test_a_legend_of_many_labels_makes_room(tmp_path: Path) -> None:
    grid = make_grid("oblique", (20, 20, 20))
    labels = Volume((np.arange(8000).reshape(1, 20, 20, 20) // 80).astype(np.uint8), grid)
    one, many = (
        drawn(labels, given, tmp_path / "picture.png", ()) for given in (labels.with_array(labels.array > 0), labels)
    )
    assert many.shape[0] > one.shape[0] + 15 * LINE * DPI


@pytest.mark.parametrize("fill", [np.nan, np.inf, 7.0])
def test_images_without_contrast(scene: tuple[Volume, Volume], tmp_path: Path, fill: float) -> None:
    image, labels = scene
    assert drawn(image.with_array(np.full_like(image.array, fill)), labels, tmp_path / "picture.png").any()


@pytest.mark.parametrize(("shape", "dtype"), [((1, 1, 1), bool), ((40, 40, 1), np.uint16), ((1, 300, 2), np.float16)])
def test_thin_volumes_and_all_kinds_of_numbers(shape: tuple[int, int, int], dtype: type, tmp_path: Path) -> None:
    labels = Volume(np.ones((1, *shape), dtype=np.int64), make_grid("oblique", shape))
    assert drawn(labels.with_array(labels.array.astype(dtype)), labels, tmp_path / "picture.png").any()


def test_refuses_other_grids_and_images_as_labels(scene: tuple[Volume, Volume], tmp_path: Path) -> None:
    image, labels = scene
    with pytest.raises(GeometryError, match="image and the labels lie on different grids"):
        draw_overlay(image, labels.reoriented("LPS"), RED, tmp_path / "picture.png")
    with pytest.raises(InputError, match="one channel of whole numbers"):
        draw_overlay(image, image, RED, tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())


def test_says_what_to_install_without_matplotlib(
    scene: tuple[Volume, Volume], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(UsageError, match=r'pip install "medseg\[report\]"'):
        draw_overlay(*scene, RED, tmp_path / "picture.png")


def test_refuses_a_folder_that_is_not_there(scene: tuple[Volume, Volume], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="could not be written"):
        draw_overlay(*scene, RED, tmp_path / "nowhere" / "picture.png")


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("image", "labels"),
    [
        ("hippocampus_mr/imagesTr/hippocampus_003.nii.gz", "hippocampus_mr/labelsTr/hippocampus_003.nii.gz"),
        ("trunk_ct_mr/example_ct_sm.nii.gz", "trunk_ct_mr/example_seg.nii.gz"),
        ("trunk_ct_mr/example_mr_sm.nii.gz", "trunk_ct_mr/example_seg_mr.nii.gz"),
    ],
)
def test_real_scans(realdata: Path, image: str, labels: str, tmp_path: Path) -> None:
    table = make_labels([(1, "first"), (2, "second")])
    draw_overlay(load(realdata / image), load(realdata / labels), table, tmp_path / "picture.png", title=image)
    assert (tmp_path / "picture.png").stat().st_size > 100_000
