"""A picture to judge a segmentation by: three planes with outlines over the image, names and volumes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter

from medseg.errors import GeometryError, UsageError
from medseg.io.files import written_whole
from medseg.labels import PALETTE, Label, label_map
from medseg.report.measurements import Measurement, measure
from medseg.volume import Grid, Volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARGIN_MM = 10.0
"""How far around the labels the close view reaches, and the voxels that set the gray window lie."""

LEAST_ZOOM = 1.5
"""The close view is shown where it magnifies the labels at least so much."""

WIDTH, ROW_HEIGHT, GAP, LINE, DPI = 12.0, 6.0, 0.15, 0.25, 120
"""Inches: the picture, the most that a row of planes may take, between two planes, a line of text. Dots per inch."""

LETTER_PLACES = (
    (0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"),
    (0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom"),
)  # fmt: skip
SCALE_BARS_MM = (1, 2, 5, 10, 20, 50, 100, 200)

Box = tuple[NDArray[np.intp], NDArray[np.intp]]
"""The first index and the one behind the last, on each axis."""


@dataclass(frozen=True)
class Plane:
    """A way to cut an LPI volume: the axes that run across and down the picture, the one it is cut on, the edges."""

    name: str
    across: int
    down: int
    cut: int
    edges: str  # left, right, upper, lower


PLANES = (Plane("axial", 0, 1, 2, "RLAP"), Plane("coronal", 0, 2, 1, "RLSI"), Plane("sagittal", 1, 2, 0, "APSI"))
"""The radiological view, from the feet, from the front and from the left: the patient's right is on the left.

The axes of an LPI volume run to the right and down in all three, so that nothing needs to be flipped.
"""


@dataclass(frozen=True)
class Scene:
    """What all panels share: image and label values on one LPI grid, the slice to show on each axis, and colors."""

    image: NDArray[Any]
    values: NDArray[np.integer[Any]]
    grid: Grid
    slices: tuple[int, ...]
    colors: dict[int, str]

    def cut(self, plane: Plane) -> tuple[NDArray[Any], NDArray[np.integer[Any]]]:
        """Return image and label values (across, down) of the slice to show."""
        place = self.slices[plane.cut]
        return np.moveaxis(self.image, plane.cut, 0)[place], np.moveaxis(self.values, plane.cut, 0)[place]


def draw_overlay(
    image: Volume, labels: Volume, table: Sequence[Label], path: str | PathLike[str], *, title: str | None = None
) -> None:
    """Write a PNG of three planes of the image with the outlines of the labels, their names and volumes in ml.

    Each plane is the slice in which the labels take the largest area, named by the position of its middle; a second row
    shows small structures from near by. The patient's right is on the left. The gray window fits the labels and what
    surrounds them, in the first channel. An oblique volume is shown along its own axes.
    Raises GeometryError where the grids differ, InputError where `labels` is no label map, UsageError without
    matplotlib, OutputError where the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise UsageError('A picture needs matplotlib: pip install "medseg[report]".') from error
    if not image.grid.matches(labels.grid):
        raise GeometryError("The image and the labels lie on different grids; resample one onto the other first.")
    found = [measurement for measurement in measure(labels, table) if measurement.voxels]
    figure = _figure(_scene(image, labels, {one.value: _color(one.value, table) for one in found}), found, title)
    with written_whole(path) as beside, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script without a font shows as boxes
        FigureCanvasAgg(figure).print_png(beside)


def _color(value: int, table: Sequence[Label]) -> str:
    return next((label.color for label in table if label.value == value), PALETTE[(value - 1) % len(PALETTE)])


def _scene(image: Volume, labels: Volume, colors: dict[int, str]) -> Scene:
    shown, values = image.reoriented("LPI"), label_map(labels.reoriented("LPI"))
    return Scene(shown.array[0], values, shown.grid, tuple(_fullest(area) for area in _areas(values)), colors)


def _areas(values: NDArray[np.integer[Any]]) -> list[NDArray[np.intp]]:
    """Return for each axis how many voxels are marked in each slice across it."""
    return [np.count_nonzero(values, axis=others) for others in ((1, 2), (0, 2), (0, 1))]


def _fullest(area: NDArray[np.intp]) -> int:
    """Return the slice with the largest area; of several, the one closest to the middle of all that is marked."""
    middle = np.average(np.arange(len(area)), weights=area if area.any() else None)
    best = np.flatnonzero(area == area.max())
    return int(best[np.abs(best - middle).argmin()])


def _views(scene: Scene) -> list[Box]:
    """Return the parts to show, one for each row: everything, and the labels with a margin where they are small."""
    shape = np.asarray(scene.grid.shape)
    views = [(np.zeros(3, dtype=np.intp), shape)]
    if scene.colors:
        marked = [np.flatnonzero(area) for area in _areas(scene.values)]
        margin = _margin(scene.grid)
        start = np.maximum(0, [where[0] for where in marked] - margin)
        close = (start, np.minimum(shape, [where[-1] + 1 for where in marked] + margin))
        if _inches_per_mm(scene.grid, close) > LEAST_ZOOM * _inches_per_mm(scene.grid, views[0]):
            views.append(close)
    return views


def _margin(grid: Grid) -> NDArray[np.intp]:
    return np.ceil(MARGIN_MM / np.asarray(grid.spacing_mm)).astype(np.intp)


def _window(scene: Scene) -> tuple[float, float]:
    """Return black and white: the inner 80 % of the values shown around labels, a third wider to both sides.

    Fat, vessels and bone around an organ stretch it far enough to tell them apart; a little air does not stretch it.
    """
    near = []
    for plane in PLANES:
        image, values = scene.cut(plane)
        reach = 2 * _margin(scene.grid)[[plane.across, plane.down]] + 1
        around = maximum_filter((values > 0).astype(np.uint8), size=reach.tolist()) if scene.colors else values == 0
        near.append(image[around > 0].astype(np.float64))
    some = np.concatenate(near)
    some = some[np.isfinite(some)]
    if not some.size:
        return 0.0, 1.0
    low, high = np.percentile(some, (10, 90))
    if low == high:
        return float(some.min()), float(some.max())
    third = (high - low) / 3
    return float(max(some.min(), low - third)), float(min(some.max(), high + third))


def _sizes_mm(grid: Grid, view: Box) -> NDArray[np.float64]:
    """Return width and height of the three planes of a view."""
    extent = (view[1] - view[0]) * grid.spacing_mm
    return np.array([(extent[plane.across], extent[plane.down]) for plane in PLANES])


def _inches_per_mm(grid: Grid, view: Box) -> float:
    widths, heights = _sizes_mm(grid, view).T
    return float(min((WIDTH - 4 * GAP) / widths.sum(), ROW_HEIGHT / heights.max()))


def _figure(scene: Scene, found: Sequence[Measurement], title: str | None) -> Figure:
    """Return the whole picture: rows of planes in one scale each, and below them the legend."""
    from matplotlib.figure import Figure

    views = _views(scene)
    rows = [_sizes_mm(scene.grid, view) * _inches_per_mm(scene.grid, view) for view in views]
    names = [f"{one.name}  {one.volume_ml:,.{1 if one.volume_ml >= 10 else 2}f} ml" for one in found]
    columns = max(1, int(WIDTH / (0.8 + 0.08 * max(map(len, names), default=1))))
    top = 2 * LINE if title else GAP
    height = top + sum(row[:, 1].max() + 2 * LINE for row in rows) + -(-len(names) // columns) * LINE + LINE
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="black")
    _write(figure, 0.5, 1 - LINE / height, title or "", size=12, ha="center", va="center", parse_math=False)
    if not found:
        _write(figure, 0.5, LINE / height, "No structure was found.", size=9, ha="center", va="center")
    window = _window(scene)
    for view, row in zip(views, rows, strict=True):
        middle = top + LINE + row[:, 1].max() / 2
        left = (WIDTH - row[:, 0].sum() - 2 * GAP) / 2
        for plane, (across, down) in zip(PLANES, row, strict=True):
            place = (left / WIDTH, 1 - (middle + down / 2) / height, across / WIDTH, down / height)
            _draw_panel(figure.add_axes(place, facecolor="black"), scene, plane, view, window)
            left += across + GAP
        top += row[:, 1].max() + 2 * LINE
    _draw_legend(figure, names, list(scene.colors.values()), columns)
    return figure


def _draw_panel(axes: Axes, scene: Scene, plane: Plane, view: Box, window: tuple[float, float]) -> None:
    image, values = scene.cut(plane)
    axes.imshow(image.T, cmap="gray", vmin=window[0], vmax=window[1], interpolation="bilinear")
    for value in np.unique(values[values > 0]).tolist():
        _draw_outline(axes, values == value, scene.colors[value])
    start, stop = view
    # The panel has the proportions of the plane in mm, so that voxels of any shape come out right.
    axes.set_aspect("auto")
    axes.set_xlim(start[plane.across] - 0.5, stop[plane.across] - 0.5)
    axes.set_ylim(stop[plane.down] - 0.5, start[plane.down] - 0.5)
    axes.set_axis_off()
    for letter, (x, y, ha, va) in zip(plane.edges, LETTER_PLACES, strict=True):
        _write(axes, x, y, letter, ha=ha, va=va, size=11, weight="bold")
    _write(axes, 0, 1.01, f"{plane.name}, {_position(scene, plane)}", ha="left", va="bottom", size=9)
    if plane is PLANES[0]:  # the others of the row have the same scale
        _draw_scale_bar(axes, (stop - start)[plane.across] * scene.grid.spacing_mm[plane.across])


def _position(scene: Scene, plane: Plane) -> str:
    """Return where the middle of a slice lies in world space, such as "S 12 mm"."""
    middle = (np.asarray(scene.grid.shape) - 1) / 2
    middle[plane.cut] = scene.slices[plane.cut]
    place_mm = scene.grid.to_world(middle)[plane.cut]
    return f"{('RL', 'AP', 'SI')[plane.cut][int(place_mm < 0)]} {abs(place_mm):.0f} mm"


def _draw_scale_bar(axes: Axes, width_mm: float) -> None:
    length_mm = max((length for length in SCALE_BARS_MM if length <= width_mm / 4), default=SCALE_BARS_MM[0])
    axes.plot((0.98 - length_mm / width_mm, 0.98), (0.03, 0.03), transform=axes.transAxes, color="white", linewidth=2)
    _write(axes, 0.98, 0.04, f"{length_mm} mm", ha="right", va="bottom", size=8)


def _write(on: Axes | Figure, x: float, y: float, text: str, **style: Any) -> None:
    frame = on.transAxes if hasattr(on, "transAxes") else on.transFigure
    on.text(x, y, text, transform=frame, color="white", path_effects=_halo("white", 2), **style)


def _draw_outline(axes: Axes, mask: NDArray[np.bool_], color: str) -> None:
    """Draw the border of a mask (across, down), closed where the mask leaves the slice."""
    i, j = np.nonzero(mask)
    across, down = np.arange(i.min() - 1, i.max() + 2), np.arange(j.min() - 1, j.max() + 2)
    part = np.pad(mask[i.min() : i.max() + 1, j.min() : j.max() + 1], 1).astype(np.float64)
    axes.contour(across, down, part.T, levels=[0.5], colors=[color], linewidths=1.3).set_path_effects(_halo(color, 2.2))


def _draw_legend(figure: Figure, names: Sequence[str], colors: Sequence[str], columns: int) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, linewidth=3, path_effects=_halo(color, 4)) for color in colors]
    legend = figure.legend(
        handles, names, loc="lower center", ncols=columns, frameon=False, labelcolor="white", fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _halo(color: str, width: float) -> list[Any]:
    """Return a rim that sets a color off from any gray: white around dark colors, black around light ones."""
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import withStroke

    rim = "white" if np.dot(to_rgb(color), (0.3, 0.6, 0.1)) < 0.2 else "black"
    return [withStroke(linewidth=width, foreground=rim)]
