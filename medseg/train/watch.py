"""What can be seen of a training while it runs: a history, how validation patches fare, a picture, TensorBoard."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from medseg.errors import UsageError
from medseg.io.files import written_whole
from medseg.model.plan import Plan
from medseg.networks.build import memory_format
from medseg.train.cache import Prepared
from medseg.train.checkpoint import TrainState
from medseg.train.dataset import Fold
from medseg.train.loss import IGNORED, deep_loss
from medseg.train.options import autocast
from medseg.train.sampler import in_outputs
from medseg.train.settings import TrainSettings

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PROBE_CASES, PROBE_PATCHES = 4, 8
"""Validation cases that are looked at while a training runs, and patches of them."""

SHARE = 0.01
"""Of all time, what looking at patches may take, and what drawing may take."""

COLUMNS = ("step", "seconds", "loss", "learning_rate", "steps_per_s")
"""Columns of the history; those of validation patches follow where there are any."""


@dataclass
class Paced:
    """Says when work that takes time may be done again, so that it takes at most a share of all time."""

    share: float = SHARE
    _cost: float = 0.0
    _ended: float = field(default_factory=time.monotonic)

    @property
    def is_due(self) -> bool:
        """Whether enough time has passed since the work was done last."""
        return (time.monotonic() - self._ended) * self.share >= self._cost

    @contextmanager
    def work(self) -> Iterator[None]:
        """Take the time of the work that is done inside."""
        began = time.monotonic()
        yield
        self._ended = time.monotonic()
        self._cost = self._ended - began


class Probe:
    """A few patches of validation cases, always the same, each around a voxel of a class that the case has."""

    def __init__(self, cases: Sequence[Prepared], plan: Plan, settings: TrainSettings):
        self.plan, self.settings, self.pace = plan, settings, Paced()
        self._patches = [_patch(cases[n % len(cases)], plan, n) for n in range(PROBE_PATCHES)]

    def __call__(self, network: nn.Module) -> dict[str, float]:
        """Return the loss, and the Dice of each label over all patches in which it was drawn and there or found."""
        device = next(network.parameters()).device
        count = len(self.plan.regions or self.plan.labels)
        common, both = np.zeros(count), np.zeros(count)
        losses = []
        with self.pace.work(), torch.inference_mode():
            network.eval()
            for image, target, known in self._patches:
                with autocast(self.settings, device):
                    logits = network(image.to(device, memory_format=memory_format(device))).float()
                losses.append(float(deep_loss(self.settings.loss, [logits], target.to(device), known.to(device))))
                found, truth = (part.cpu().numpy() for part in self._masks(logits, target.to(device)))
                drawn = known[0, -count:].numpy()
                common += np.where(drawn, (found & truth).sum(axis=1), 0)
                both += np.where(drawn, found.sum(axis=1) + truth.sum(axis=1), 0)
        names = [part.name for part in self.plan.regions or self.plan.labels]
        dice = {f"dice_{name}": 2 * a / b for name, a, b in zip(names, common, both, strict=True) if b}
        return {"validation_loss": float(np.mean(losses)), **dice}

    def _masks(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return where each label (labels, voxels) was found and is, without what is ignored."""
        counted = target != IGNORED
        if self.plan.regions:
            return ((logits > 0) & counted)[0].flatten(1), (target == 1)[0].flatten(1)
        numbers = torch.arange(1, logits.shape[1], device=logits.device)[:, None]
        found = logits.argmax(dim=1)[0].flatten()[None] == numbers
        return found & counted.flatten()[None], target.flatten()[None] == numbers


class Watch:
    """Keeps the history of a training in its state, looks at validation patches, and shows both."""

    def __init__(self, folder: Path, fold: Fold, probe: Probe | None = None, *, tensorboard: bool = False):
        self.history = folder / f"fold_{fold}.history.csv"
        self.picture = folder / f"fold_{fold}.progress.png"
        self.probe = probe
        self._drawing = Paced()
        self._writer = _writer(folder / "tensorboard" / f"fold_{fold}") if tensorboard else None

    def note(self, state: TrainState, loss: float, steps_per_s: float, *, look: bool = False) -> None:
        """Add a line to the history, with the validation patches if it is time for them or with `look`."""
        rate = float(state.optimizer.param_groups[0]["lr"])
        row = {"step": state.step, "seconds": state.seconds, "loss": loss, "learning_rate": rate}
        row["steps_per_s"] = steps_per_s
        before = state.history.pop() if state.history and state.history[-1]["step"] == state.step else {}
        if self.probe and "validation_loss" not in before and (look or self.probe.pace.is_due):
            row |= self.probe(state.average)
        row = before | row
        state.history.append(row)
        if self._writer:
            for name in row.keys() - {"step", "seconds"}:
                self._writer.add_scalar(name, row[name], state.step)

    def show(self, state: TrainState, *, last: bool = False) -> None:
        """Write the history and, if it is time for it and matplotlib is there, the picture."""
        write_history(state.history, self.history)
        if self._writer:
            self._writer.flush()
        if state.history and (last or self._drawing.is_due):
            with self._drawing.work():
                draw_history(state.history, self.picture)

    def close(self) -> None:
        """Let go of TensorBoard's file."""
        if self._writer:
            self._writer.close()


def stalled(history: Sequence[dict[str, float]], done: float, patience: float, step: int) -> bool:
    """Return whether the mean Dice of the patches has not risen for a share of the budget, of which `done` is spent."""
    seen = _looks(history)
    if not seen or not step:
        return False
    best = max(seen, key=lambda one: one[1])[0]
    return done * (1 - best / step) > patience


def unseen_for(history: Sequence[dict[str, float]], done: float, step: int) -> float:
    """Return the share of the budget, of which `done` is spent, since the validation patches were looked at."""
    seen = _looks(history)
    return done * (1 - (seen[-1][0] if seen else 0) / max(1, step))


def _looks(history: Sequence[dict[str, float]]) -> list[tuple[float, float]]:
    """Return the (step, mean Dice) of each look at the validation patches."""
    return [(row["step"], _mean_dice(row)) for row in history if any(name.startswith("dice_") for name in row)]


def write_history(history: Sequence[dict[str, float]], path: Path) -> None:
    """Write a line for each row, with an empty cell for what was not looked at. Raises OutputError."""
    names = dict.fromkeys((*COLUMNS, *(name for row in history for name in row)))
    with written_whole(path) as beside, beside.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(names))
        writer.writeheader()
        writer.writerows(history)


def draw_history(history: Sequence[dict[str, float]], path: Path) -> bool:
    """Write a PNG of losses, Dice of each label, learning rate and speed; return whether matplotlib is there for it.

    What the history never looked at is left out.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    known = {name for row in history for name in row}
    dice = sorted(name for name in known if name.startswith("dice_"))
    losses = tuple(name for name in ("loss", "validation_loss") if name in known)
    figure = Figure(figsize=(12, 8), layout="constrained")
    for place, names in enumerate((losses, tuple(dice), ("learning_rate",), ("steps_per_s",)), start=1):
        if not names:
            continue
        axes = figure.add_subplot(2, 2, place)
        for name in names:
            rows = [row for row in history if name in row]
            label = name.removeprefix("dice_").replace("_", " ")
            label = label.replace("$", r"\$")  # matplotlib reads formulas between dollars
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=label, marker=".")
        _dress(axes, names)
    with written_whole(path) as beside:
        FigureCanvasAgg(figure).print_png(beside)
    return True


def _dress(axes: Any, names: Sequence[str]) -> None:
    is_dice = any(name.startswith("dice_") for name in names)
    axes.set_title("Dice on validation patches" if is_dice else " and ".join(names).replace("_", " "))
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if is_dice:
        axes.set_ylim(0, 1)
    if 1 < len(names) <= 20 or is_dice:
        axes.legend(fontsize="small")


def _mean_dice(row: dict[str, float]) -> float:
    return float(np.mean([value for name, value in row.items() if name.startswith("dice_")]))


def _writer(folder: Path) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError('TensorBoard is not installed: pip install "medseg[tensorboard]".') from error
    return SummaryWriter(str(folder))


def _patch(case: Prepared, plan: Plan, turn: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return image (1, C, I, J, K), target and known outputs of a patch around a voxel of one of the case's classes."""
    patch, size = np.asarray(plan.patch), np.asarray(case.target.shape)
    center = size // 2
    if case.places:
        voxels = case.places[sorted(case.places, reverse=True)[turn % len(case.places)]]
        center = np.asarray(voxels[len(voxels) // 2])
    start = np.clip(center - patch // 2, 0, np.maximum(0, size - patch))
    inside = tuple(slice(a, a + b) for a, b in zip(start.tolist(), patch.tolist(), strict=True))
    padding = [(0, int(max(0, edge - length))) for edge, length in zip(patch, size, strict=True)]
    image = np.pad(case.image[(slice(None), *inside)], [(0, 0), *padding])
    numbers = np.pad(case.target[inside], padding).astype(np.int64)
    target = in_outputs(torch.from_numpy(numbers)[None], plan)
    return torch.from_numpy(image)[None], target[None], torch.from_numpy(case.known)[None]
