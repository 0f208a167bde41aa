"""Patches that grow with the budget: small ones first, of which a device takes more steps in the same time.

Source: Fischer et al., "Progressive growing of patch size", MICCAI 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from medseg.networks.kinds import Triple

FIRST_MAP = 2
"""Voxels that the coarsest feature map of the smallest patch has along each axis: one alone cannot be normalized."""

PatchAt = Callable[[int], Triple]
"""The patch of a step."""


def growing_patches(patch: Triple, divisor: Triple, phases: int) -> tuple[Triple, ...]:
    """Return the patches of equal parts of a budget, from the smallest one that the network can halve to `patch`.

    Edges grow by equal amounts; all but those of `patch` are rounded to the `divisor` of the network. With one phase it
    is `patch` alone.
    """
    shares = [phase / (phases - 1) for phase in range(phases - 1)]
    grown = ([_edge(edge, by, share) for edge, by in zip(patch, divisor, strict=True)] for share in shares)
    return (*((i, j, k) for i, j, k in grown), patch)


def _edge(widest: int, divisor: int, share: float) -> int:
    smallest = min(widest, FIRST_MAP * divisor)
    return min(widest, divisor * math.floor((smallest + share * (widest - smallest)) / divisor + 0.5))


def patch_of(patches: tuple[Triple, ...], done: float) -> Triple:
    """Return the patch when `done` of the budget is spent."""
    return patches[min(len(patches) - 1, int(done * len(patches)))]
