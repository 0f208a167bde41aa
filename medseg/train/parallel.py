"""Cases worked on side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from medseg.cores import cores
from medseg.train.dataset import Case

Result = TypeVar("Result")
Progress = Callable[[int, int], None]


def side_by_side(
    work: Callable[[Case], Result], cases: Sequence[Case], progress: Progress | None = None
) -> Iterator[tuple[Case, Result]]:
    """Yield every case with what `work` makes of it, in order, from one thread for each core that is given to it.

    Threads, since unpacking and resampling leave Python, and a process would first have to import torch. Where one
    case raises, those that have not begun are left.
    """
    pool = ThreadPoolExecutor(cores())
    try:
        for done, (case, result) in enumerate(zip(cases, pool.map(work, cases), strict=True), start=1):
            yield case, result
            if progress:
                progress(done, len(cases))
    finally:
        pool.shutdown(cancel_futures=True)
