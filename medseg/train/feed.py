"""Batches on the device that trains: drawn on the host, cut, turned and changed where the network is.

On a GPU the prepared cases lie in its memory where they fit, and batches are made ahead, on streams of their own.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from medseg.cores import cores
from medseg.networks.build import memory_format
from medseg.networks.kinds import Triple
from medseg.train.augment import change_intensities
from medseg.train.cache import Chunks, Prepared
from medseg.train.growth import PatchAt
from medseg.train.sampler import Batch, Sampler

MEMORY_SHARE = 0.3
"""Of a GPU's free memory that prepared cases may take; a step has the rest."""

READERS = 4
"""Threads, at most, that read cases from the disk for a GPU: as many cores as it needs beside it."""


def resident(cases: Sequence[Prepared], device: torch.device) -> list[Prepared]:
    """Return the cases in the memory of a GPU, images in half precision, where all of them fit; else as they are.

    Normalized intensities lose what is far below the noise of a scanner.
    """
    if device.type != "cuda" or _bytes(cases) > MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
        return list(cases)
    with ThreadPoolExecutor(min(READERS, cores())) as pool:
        return list(pool.map(lambda case: _moved(case, device), cases))


def _bytes(cases: Sequence[Prepared]) -> int:
    return sum(2 * math.prod(case.image.shape) + math.prod(case.target.shape) * _width(case) for case in cases)


def _width(case: Prepared) -> int:
    return int(case.target.dtype.itemsize)


def _moved(case: Prepared, device: torch.device) -> Prepared:
    image, target = (torch.from_numpy(part[:]) for part in (case.image, case.target))
    return replace(case, image=image.to(device, torch.float16), target=target.to(device))


def batches(sampler: Sampler, samples: range, first: int, patch_at: PatchAt | None = None) -> Iterator[Batch]:
    """Yield the batches of `samples` from step `first` on, changed at random; for CUDA they are made ahead.

    Patches have the plan's size, or that of `patch_at`, which is asked before a batch is made.
    """
    size = patch_at or (lambda _: sampler.plan.patch)
    if sampler.device.type != "cuda":  # on a CPU a second thread would only take cores from the network
        for step in itertools.count(first):
            yield _made(sampler, step, samples, size(step))
    on_disk = any(isinstance(case.image, Chunks) for case in sampler.cases)
    threads = min(READERS, cores()) if on_disk else 1
    streams = [torch.cuda.Stream(sampler.device) for _ in range(threads)]  # type: ignore[no-untyped-call]
    with ThreadPoolExecutor(threads) as pool:
        made: deque[Future[tuple[Batch, torch.cuda.Event]]] = deque()
        for step in itertools.count(first):
            while len(made) <= threads:
                ahead = step + len(made)
                made.append(pool.submit(_made_on, streams[ahead % threads], sampler, ahead, samples, size(ahead)))
            batch, ready = made.popleft().result()
            _taken(batch, ready)
            yield batch


def _made(sampler: Sampler, step: int, samples: range, patch: Triple) -> Batch:
    batch = sampler.batch(step, samples, patch)
    images = change_intensities(batch.images, batch.seeds)
    return batch._replace(images=images.contiguous(memory_format=memory_format(sampler.device)))


def _made_on(
    stream: torch.cuda.Stream, sampler: Sampler, step: int, samples: range, patch: Triple
) -> tuple[Batch, torch.cuda.Event]:
    """Return a batch and the event after which it is complete, made while the GPU works on the one before."""
    with torch.cuda.stream(stream):
        batch = _made(sampler, step, samples, patch)
        return batch, stream.record_event()


def _taken(batch: Batch, ready: torch.cuda.Event) -> None:
    """Let the stream of now wait for a batch, and keep its memory until that stream is done with it."""
    stream = torch.cuda.current_stream(batch.images.device)
    stream.wait_event(ready)
    for part in (batch.images, batch.target, batch.known):
        if part is not None:
            part.record_stream(stream)
