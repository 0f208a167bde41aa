"""How long each stage of a job took, and how much memory the process had used by its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """What a job did: facts, the seconds of each stage without those inside it, and the memory held by its end."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_mb: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    _stack: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of the block to a stage; the stage that it stands in does not count it."""
        now = time.perf_counter()
        self._pause(now)
        self._stack.append((name, now))
        try:
            yield
        finally:
            now = time.perf_counter()
            self._pause(now)
            self._stack.pop()
            self.peak_mb[name] = peak_memory_mb()
            if self._stack:
                self._stack[-1] = (self._stack[-1][0], now)

    def _pause(self, now: float) -> None:
        if self._stack:
            name, since = self._stack[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - since

    def to_dict(self) -> dict[str, Any]:
        """Return facts and stages as JSON takes them."""
        stages = {
            name: {"seconds": round(seconds, 4), "peak_memory_mb": round(self.peak_mb.get(name, 0.0), 1)}
            for name, seconds in self.seconds.items()
        }
        return {**self.facts, "stages": stages}


def peak_memory_mb() -> float:
    """Return the most memory that this process has held so far, in MB; 0 where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
