"""The steps of one fold, from the first or from where they were stopped, and what they leave on the disk."""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from medseg.model.weights import save_weights
from medseg.train.checkpoint import FINISH, INTERRUPT, TrainState
from medseg.train.dataset import Fold
from medseg.train.recipe import lengthened
from medseg.train.settings import Budget
from medseg.train.watch import Watch, stalled, unseen_for

HISTORY_STEPS = 50
"""Steps that one line of the history sums up."""

LOOKS = 4
"""Looks at validation patches, at least, in the share of a budget after which a training may end early."""

CHECKPOINT_S = 60.0
"""Seconds between two checkpoints: the work that a crash can cost."""


@dataclass(frozen=True)
class TrainProgress:
    """Where a training is: its stage ("look", "prepare", "train", "validate"), the share done, the numbers of now."""

    stage: str
    done: float
    step: int = 0
    loss: float = math.nan
    steps_per_s: float = math.nan
    seconds_left: float = math.nan
    fold: Fold | None = None


Progress = Callable[[TrainProgress], None]


@dataclass(frozen=True)
class FoldFiles:
    """What a training of a fold leaves on the disk; of several processes one writes."""

    folder: Path
    fold: Fold
    recipe: str
    watch: Watch | None

    @property
    def checkpoint(self) -> Path:
        """The file with the state of a training that has not ended."""
        return self.folder / f"fold_{self.fold}.checkpoint"

    def resumed(self, state: TrainState) -> FoldFiles:
        """Take over the state of an earlier run, if there is one; return these files with the recipe that goes on.

        Warns where it is under a longer budget than before. Raises ModelError for a run of another recipe.
        """
        if not self.checkpoint.is_file():
            return self
        recipe = state.load(self.checkpoint, self.recipe)
        if self.watch and (change := lengthened(recipe, state.step)):
            warnings.warn(change, stacklevel=2)
        return replace(self, recipe=recipe)

    def save(self, state: TrainState) -> None:
        """Write the state and what is to be seen of it."""
        if self.watch:
            state.save(self.checkpoint, self.recipe)
            self.watch.show(state)

    def finish(self, state: TrainState) -> None:
        """Write the weights and the history; the checkpoint goes."""
        if self.watch:
            self.watch.show(state, last=True)
            self.watch.close()
            save_weights(state.average, self.folder / f"fold_{self.fold}.safetensors", recipe=self.recipe)
            self.checkpoint.unlink(missing_ok=True)


class _Speed:
    """Steps per second, of the last few steps: what the rest of a training will run at."""

    def __init__(self, state: TrainState):
        self._marks = deque([(state.step, state.seconds)], maxlen=2 * HISTORY_STEPS)

    def __call__(self, state: TrainState) -> float:
        self._marks.append((state.step, state.seconds))
        (first, began), (last, ended) = self._marks[0], self._marks[-1]
        return (last - first) / max(1e-9, ended - began)


def run_steps(
    state: TrainState,
    losses: Iterator[list[float]],
    budget: Budget,
    files: FoldFiles,
    progress: Progress | None = None,
    patience: float = 0.0,
) -> None:
    """Take the steps of a training: history, progress, a checkpoint each minute, at the end, and when asked to stop.

    With `patience` it ends early when validation patches, looked at LOOKS times at least and at the last step, have not
    been better for that share of the budget.
    `losses` are those of `optimize`: where a step tells none, its weights may yet prove useless, and are not kept.
    Raises KeyboardInterrupt after the step in which SIGINT or SIGTERM came, with the checkpoint written.
    """
    saved = time.monotonic()
    recent: deque[float] = deque(maxlen=HISTORY_STEPS)
    speed = _Speed(state)
    with stop_signals() as stopped:
        for read in losses:
            recent.extend(read)
            now = _now(state, recent, speed(state), budget, files.fold)
            if files.watch and state.step % HISTORY_STEPS == 0:
                look = bool(patience) and unseen_for(state.history, now.done, state.step) >= patience / LOOKS
                files.watch.note(state, now.loss, now.steps_per_s, look=look, last=now.done >= FINISH)
                if patience and stalled(state.history, now.done, patience, state.step):
                    # Only a look at this very step may end a training: what was not looked at may be better.
                    files.watch.note(state, now.loss, now.steps_per_s, last=True)
                    state.asked = FINISH if stalled(state.history, now.done, patience, state.step) else state.asked
            if _interrupted(progress, now) or stopped():
                state.asked = INTERRUPT
            if read and time.monotonic() - saved > CHECKPOINT_S:
                files.save(state)
                saved = time.monotonic()
        if files.watch and recent and state.asked != INTERRUPT:
            files.watch.note(state, now.loss, now.steps_per_s, last=True)
        files.save(state)
        interrupted = state.asked == INTERRUPT or stopped()  # after the last step, too: other folds may follow
    if interrupted:
        raise KeyboardInterrupt


def _now(state: TrainState, recent: deque[float], steps_per_s: float, budget: Budget, fold: Fold) -> TrainProgress:
    done = min(1.0, budget.spent(state.step, state.seconds))
    left = budget.left(state.step, state.seconds, steps_per_s)
    loss = sum(recent) / len(recent) if recent else math.nan
    return TrainProgress("train", done, state.step, loss, steps_per_s, left, fold)


def _interrupted(progress: Progress | None, now: TrainProgress) -> bool:
    try:
        if progress:
            progress(now)
    except KeyboardInterrupt:
        return True
    return False


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether SIGINT or SIGTERM has come; a second one interrupts at once.

    The first only asks: an interrupt in the middle of a step would leave weights that belong to no step.
    """
    asked: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
