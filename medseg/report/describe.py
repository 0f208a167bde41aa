"""What a volume holds, in a few facts, without a guess."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np

from medseg.io import load
from medseg.volume import Grid


def describe(path: str | PathLike[str], *, assume_orientation: str | None = None) -> dict[str, Any]:
    """Return the facts of a volume as JSON takes them, None for what NaN or infinity leave unsaid.

    Raises what reading the file raises.
    """
    volume = load(path, assume_orientation=assume_orientation)
    with np.errstate(invalid="ignore"):
        low, high = np.percentile(volume.array, (1, 99))
        mean = volume.array.mean(dtype=np.float64)
    intensities = {
        "minimum": volume.array.min(),
        "percentile_01": low,
        "mean": mean,
        "percentile_99": high,
        "maximum": volume.array.max(),
    }
    return {
        "channels": len(volume.array),
        **_grid_facts(volume.grid),
        "type": str(volume.array.dtype),
        **{name: float(value) if np.isfinite(value) else None for name, value in intensities.items()},
    }


def _grid_facts(grid: Grid) -> dict[str, Any]:
    return {
        "shape": list(grid.shape),
        "spacing_mm": [round(length, 4) for length in grid.spacing_mm],
        "orientation": grid.orientation,
        "orthogonal": grid.is_orthogonal,
        "center_mm": [round(x, 3) for x in grid.to_world((np.asarray(grid.shape) - 1) / 2).tolist()],
    }
