"""A step of a training on CUDA as one recorded piece of work: the GPU waits for no kernel to be launched.

A step is some thousand small kernels, which a processor launches more slowly than a GPU runs them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from medseg.train.checkpoint import TrainState
from medseg.train.loss import WAITING
from medseg.train.sampler import Batch
from medseg.train.settings import TrainSettings

FIRST = 3
"""Steps that are taken one kernel after the other: libraries choose their ways, and optimizers make their state."""


def can_record(state: TrainState, settings: TrainSettings) -> bool:
    """Return whether a step does the same work each time, on a CUDA device, and waits for no number."""
    on_cuda = next(state.network.parameters()).device.type == "cuda"
    changing = settings.compile or settings.dropout or settings.checkpointing or settings.schedule == "one_cycle"
    return on_cuda and not changing and state.scaler is None and settings.loss not in WAITING


class Recorded:
    """Takes steps: the first ones as they are, then by replaying a record of one; anew where batches change their size.

    What changes from step to step must lie in tensors: the batch is copied to where the record reads it.
    Source: "Accelerating PyTorch with CUDA graphs", 2021.
    """

    def __init__(self, step: Callable[[Batch], Tensor]):
        self._step = step
        self._taken = 0
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._shape: torch.Size | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch
        self._loss: Tensor

    def __call__(self, batch: Batch) -> Tensor:
        """Take a step, and return its loss."""
        current = torch.cuda.current_stream()
        if batch.images.shape != self._shape:
            self._stream.synchronize()  # a record must not go while it is replayed
            self._shape, self._taken, self._graph = batch.images.shape, 0, None
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            if self._taken == FIRST:
                self._record(batch)
            loss = self._step(batch) if self._graph is None else self._replay(self._graph, batch)
        self._taken += 1
        current.wait_stream(self._stream)
        return loss

    def _record(self, batch: Batch) -> None:
        self._batch = Batch(*(None if part is None else part.clone() for part in batch))  # type: ignore[arg-type]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._loss = self._step(self._batch)
        except RuntimeError as error:
            warnings.warn(
                f"The steps cannot be recorded ({type(error).__name__}) and run kernel by kernel, which takes longer.",
                stacklevel=2,
            )
        else:
            self._graph = graph

    def _replay(self, graph: torch.cuda.CUDAGraph, batch: Batch) -> Tensor:
        for kept, part in zip(self._batch[:3], batch[:3], strict=True):
            if kept is not None and part is not None:
                kept.copy_(part)
        graph.replay()
        return self._loss.clone()
