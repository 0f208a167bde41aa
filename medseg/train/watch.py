"""What can be seen of a training while it runs: a history, how validation patches fare, a picture, TensorBoard."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medseg.errors import UsageError
from medseg.io.files import written_whole
from medseg.model.plan import Plan
from medseg.networks.build import memory_format
from medseg.report.metrics import TOLERANCE_MM
from medseg.report.surfaces import SurfaceScore, compare_surfaces
from medseg.train.cache import Prepared
from medseg.train.checkpoint import TrainState
from medseg.train.dataset import Fold
from medseg.train.loss import IGNORED, deep_loss
from medseg.train.options import autocast
from medseg.train.sampler import in_outputs
from medseg.train.settings import TrainSettings
from medseg.volume import Grid

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PROBE_CASES, PROBE_PATCHES = 4, 8
"""Validation cases that are looked at while a training runs, and patches of them."""

SHARE = 0.01
"""Of all time, what looking at patches may take, what comparing surfaces in them, and what drawing may take."""

COMPARED_S = 1e-7
"""Seconds for each voxel that comparing the surfaces of a patch is taken to need before it was done once: as measured
of round organs on a CPU, ten times less than noise takes."""

COLUMNS = ("step", "seconds", "loss", "learning_rate", "steps_per_s")
"""Columns of the history; those of validation patches follow where there are any."""

OF_LABELS = {
    "dice_": "Dice on validation patches",
    "surface_dice_": f"surface Dice ({TOLERANCE_MM:g} mm) on validation patches",
    "hd95_mm_": "HD95 (mm) on validation patches",
}
"""How the columns that each label has begin, and what they are called in the picture."""

Seen = tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]
"""Of a patch: what was found and what is there, as `Probe` has them, and of which labels surfaces are compared."""


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
    """A few patches of validation cases, always the same, each around a voxel of a class that the case has.

    Surfaces are compared at a pace of their own, since patches of many voxels and labels have much to compare.
    """

    def __init__(self, cases: Sequence[Prepared], plan: Plan, settings: TrainSettings):
        self.plan, self.settings, self.pace = plan, settings, Paced()
        self.surface_pace = Paced(_cost=COMPARED_S * PROBE_PATCHES * math.prod(plan.patch))
        self._names = [part.name for part in plan.regions or plan.labels]
        self._patches = [_patch(cases[n % len(cases)], plan, n) for n in range(PROBE_PATCHES)]

    def __call__(self, network: nn.Module, *, surfaces: bool = False) -> dict[str, float]:
        """Return the loss, and the Dice of each label over all patches in which it was drawn and there or found.

        With `surfaces`, or if it is time for them, surface Dice and HD95 in mm of each label, too: their means over
        these patches (`_surfaces`).
        """
        device = next(network.parameters()).device
        common, both = np.zeros(len(self._names)), np.zeros(len(self._names))
        losses, seen = [], []
        with self.pace.work(), torch.inference_mode():
            network.eval()
            for image, target, known in self._patches:
                with autocast(self.settings, device):
                    logits = network(image.to(device, memory_format=memory_format(device))).float()
                losses.append(float(deep_loss(self.settings.loss, logits, target.to(device), known.to(device))))
                found, truth = (part.cpu().numpy() for part in self._maps(logits, target.to(device)))
                drawn = known[0, -len(self._names) :].numpy()
                common += drawn * self._counts(np.where(found == truth, found, 0))
                both += drawn * (self._counts(found) + self._counts(truth))
                seen.append((found, truth, drawn & bool((target != IGNORED).all())))
        dice = {f"dice_{name}": 2 * a / b for name, a, b in zip(self._names, common, both, strict=True) if b}
        apart = {}
        if self.plan.resampling and (surfaces or self.surface_pace.is_due):
            with self.surface_pace.work():
                apart = self._surfaces(seen)
        return {"validation_loss": float(np.mean(losses)), **dice, **apart}

    def _maps(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return what was found and what is there, but for what is ignored.

        That is class numbers (1, I, J, K), or for each region where it is (C, I, J, K).
        """
        if self.plan.regions:
            return ((logits > 0) & (target != IGNORED))[0], (target == 1)[0]
        counted = target[0] != IGNORED
        return (logits.argmax(dim=1) * counted).to(torch.int32), (target[0] * counted).to(torch.int32)

    def _counts(self, maps: NDArray[Any]) -> NDArray[np.int64]:
        """Return the voxels of each label."""
        if self.plan.regions:
            return np.asarray(np.count_nonzero(maps, axis=(1, 2, 3)))
        return np.asarray(np.bincount(maps.ravel(), minlength=len(self._names) + 1)[1:])

    def _surfaces(self, seen: Sequence[Seen]) -> dict[str, float]:
        """Return the mean surface Dice and HD95 of each label over the patches in which it is there or found.

        The rules are those of `report.metrics`: where a patch has it on one side alone, its surface Dice is 0 and its
        HD95 the diagonal of the patch; a patch with ignored voxels, which cut surfaces, is left out, and so is one in
        which the label was not drawn. Faces of the patch are surfaces on both sides.
        """
        grid = Grid(self.plan.patch, np.diag((*self.plan.spacing_mm, 1.0)))
        scores: dict[str, list[SurfaceScore]] = {}
        for found, truth, compared in seen:
            for place in np.flatnonzero(compared):
                own, other = (part[place] if self.plan.regions else part[0] == place + 1 for part in (found, truth))
                score = compare_surfaces(own, other, grid, TOLERANCE_MM)
                if not math.isnan(score.dice):
                    scores.setdefault(self._names[place], []).append(score)
        means = {f"surface_dice_{name}": fmean(one.dice for one in some) for name, some in scores.items()}
        return means | {f"hd95_mm_{name}": fmean(one.hd95_mm for one in some) for name, some in scores.items()}


class Watch:
    """Keeps the history of a training in its state, looks at validation patches, and shows both."""

    def __init__(self, folder: Path, fold: Fold, probe: Probe | None = None, *, tensorboard: bool = False):
        self.history = folder / f"fold_{fold}.history.csv"
        self.picture = folder / f"fold_{fold}.progress.png"
        self.probe = probe
        self._drawing = Paced()
        self._writer = _writer(folder / "tensorboard" / f"fold_{fold}") if tensorboard else None

    def note(
        self, state: TrainState, loss: float, steps_per_s: float, *, look: bool = False, last: bool = False
    ) -> None:
        """Add a line to the history, with the validation patches if it is time for them or with `look`.

        The `last` line of a training has the surfaces in them, too.
        """
        rate = float(state.optimizer.param_groups[0]["lr"])
        row = {"step": state.step, "seconds": state.seconds, "loss": loss, "learning_rate": rate}
        row["steps_per_s"] = steps_per_s
        before = state.history.pop() if state.history and state.history[-1]["step"] == state.step else {}
        if self.probe and "validation_loss" not in before and (look or last or self.probe.pace.is_due):
            row |= self.probe(state.average, surfaces=last)
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
    """Write a PNG of losses, scores of each label, learning rate and speed; return whether matplotlib is there for it.

    What the history never looked at is left out.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    known = {name for row in history for name in row}
    losses = sorted(known & {"loss", "validation_loss"})
    panels: list[tuple[str, str, list[str]]] = [(" and ".join(losses), "", losses)]
    for begin, title in OF_LABELS.items():
        panels.append((title, begin, sorted(name for name in known if name.startswith(begin))))
    panels += [(name, "", [name]) for name in ("learning_rate", "steps_per_s")]
    figure = Figure(figsize=(18, 8), layout="constrained")
    for place, (title, begin, names) in enumerate(panels, start=1):
        if not names:
            continue
        axes = figure.add_subplot(2, 3, place)
        for name in names:
            rows = [row for row in history if name in row]
            label = name.removeprefix(begin).replace("_", " ")
            label = label.replace("$", r"\$")  # matplotlib reads formulas between dollars
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=label, marker=".")
        _dress(axes, title, begin)
    with written_whole(path) as beside:
        FigureCanvasAgg(figure).print_png(beside)
    return True


def _dress(axes: Any, title: str, begin: str) -> None:
    axes.set_title(title.replace("_", " "))
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if begin:
        axes.set_ylim(0, 1 if begin.endswith("dice_") else None)
    if begin or len(axes.lines) > 1:
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
