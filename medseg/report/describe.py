"""What a volume holds, in a few facts, without a guess."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np

from medseg.io import load
from medseg.volume import Grid


def describe(path: str | PathLike[str], *, assume_orientation: str | None = None) -> dict[str, Any]:
    """Return the facts of a volume as JSON takes them. Raises what reading the file raises."""
    volume = load(path, assume_orientation=assume_orientation)
    low, high = np.percentile(volume.array, (1, 99))
    return {
        "channels": len(volume.array),
        **_grid_facts(volume.grid),
        "type": str(volume.array.dtype),
        "minimum": float(volume.array.min()),
        "percentile_01": float(low),
        "mean": float(volume.array.mean(dtype=np.float64)),
        "percentile_99": float(high),
        "maximum": float(volume.array.max()),
    }


def _grid_facts(grid: Grid) -> dict[str, Any]:
    return {
        "shape": list(grid.shape),
        "spacing_mm": [round(length, 4) for length in grid.spacing_mm],
        "orientation": grid.orientation,
        "orthogonal": grid.is_orthogonal,
        "center_mm": [round(x, 3) for x in grid.to_world((np.asarray(grid.shape) - 1) / 2).tolist()],
    }
