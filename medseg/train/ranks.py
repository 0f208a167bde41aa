"""Several processes that train one network: each draws its own part of the batch, and gradients are averaged.

They are started by torchrun, which tells them in the environment who is who.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed, nn

from medseg.errors import ClusterError

PATIENCE = timedelta(hours=12)
"""How long processes wait for the first one, which prepares thousands of cases alone; torch's own is ten minutes."""


@dataclass(frozen=True)
class Ranks:
    """Which process among all this one is: its number, from 0, and how many there are; by itself 0 of 1."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has come this far. Raises ClusterError where one has ended."""
        if self.size > 1:
            with _together():
                distributed.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process through the block before the others, which then find what it left on the disk."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def agreed(self, number: float) -> float:
        """Return the number that the first process gives, so that all decide alike."""
        if self.size == 1:
            return number
        shared = torch.tensor([number], dtype=torch.float64)
        if torch.cuda.is_available():
            shared = shared.cuda()
        with _together():
            distributed.broadcast(shared, 0)
        return float(shared)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes, in one exchange."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        with _together():
            distributed.all_reduce(flat)
        flat /= self.size
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))


def starts_first() -> bool:
    """Return whether torchrun, if it started this process, counts it as the first one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _together() -> Iterator[None]:
    """Say in a line that another process has ended, where torch says it in a page that hides what that one has said."""
    try:
        yield
    except RuntimeError as error:
        raise ClusterError("Another process of this training has ended: what it said is the reason.") from error


@contextmanager
def joined() -> Iterator[Ranks]:
    """Give this process's place among those that torchrun started; without torchrun it is by itself."""
    if not distributed.is_torchelastic_launched():
        yield Ranks()
        return
    mine = not distributed.is_initialized()
    if mine:
        on_gpus = torch.cuda.is_available()
        if on_gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if on_gpus else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        if mine:
            distributed.destroy_process_group()
