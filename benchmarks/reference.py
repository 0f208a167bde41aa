"""medseg's labels against the plain way: all scores of the whole image, interpolated in float64, then compared."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from medseg.io import load
from medseg.model.preprocess import prepare
from medseg.model.segmenter import Model

MARGINS = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, np.inf)
"""Bounds of the classes of voxels: by how much the winner leads, as a share of the range of all scores."""


def compare(model_folder: Path, source: Path) -> dict[str, Any]:
    """Return how many voxels medseg labels otherwise than the float64 reference, by the reference's margin.

    Both are fed by the same blended logits. The reference interpolates one class after the other over the whole source
    grid with scipy and keeps the best and the second; it shares no code with medseg's export.
    """
    model, volume = Model.load(model_folder, device="cpu"), load(source)
    prepared = prepare(volume, model.plan)
    logits = model.logits(prepared).numpy()
    step = np.linalg.inv(prepared.grid.affine) @ volume.grid.affine
    best, second, winner = _two_best(logits, step, volume.grid.shape)
    margin = (best - second) / float(logits.max() - logits.min())
    values = np.array([0, *(label.value for label in model.plan.labels)])
    differs = model.segment(volume).array[0] != values[winner]
    rows = []
    for low, high in pairwise(MARGINS):
        inside = (margin >= low) & (margin < high)
        rows.append({"margin_from": low, "voxels": int(inside.sum()), "different": int((inside & differs).sum())})
    return {"margins": rows, "mixed_cells": mixed_share(logits.argmax(axis=0))}


def mixed_share(labels: NDArray[np.integer]) -> float:
    """Return the share of the cells between eight neighboring voxels whose corners do not all have one label."""
    mixed = np.zeros([n - 1 for n in labels.shape], bool)
    first = labels[:-1, :-1, :-1]
    for i, j, k in np.ndindex(2, 2, 2):
        corner = labels[i : labels.shape[0] - 1 + i, j : labels.shape[1] - 1 + j, k : labels.shape[2] - 1 + k]
        mixed |= corner != first
    return float(mixed.mean())


def _two_best(
    logits: NDArray[np.float32], step: NDArray[np.float64], shape: tuple[int, int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
    index = np.indices(shape, dtype=np.float64).reshape(3, -1)
    positions = (step[:3, :3] @ index + step[:3, 3:]).reshape(3, *shape)
    best = np.full(shape, -np.inf)
    second, winner = best.copy(), np.zeros(shape, np.intp)
    for label, scores in enumerate(logits):
        score = map_coordinates(scores.astype(np.float64), positions, order=1, mode="nearest")
        wins = score > best
        second = np.where(wins, best, np.maximum(second, score))
        best = np.where(wins, score, best)
        winner[wins] = label
    return best, second, winner
