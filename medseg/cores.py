"""How many cores and how much memory there are to work with."""

from __future__ import annotations

import math
import os


def cores() -> int:
    """Return how many cores this process may run on: of a shared machine, a scheduler often gives it but a few."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows do not say
        return os.cpu_count() or 1


def memory_bytes() -> float:
    """Return the memory of this machine; infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):  # Windows
        return math.inf
