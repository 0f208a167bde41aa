"""How a training runs: its budget and the numbers of its recipe. Kept in train.json beside the plan."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from medseg.errors import UsageError
from medseg.model.stored import Stored
from medseg.train.loss import LossName

STEPS_PER_EPOCH = 250
"""What an epoch means here, as in nnU-Net: a fixed number of steps, whatever the size of the dataset."""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Budget(BaseModel):
    """How long to train: seconds of training time, or steps. Exactly one of the two."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float | None = None
    steps: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Return the budget in "30m", "8h", "90s", "20epochs" or "500steps". Raises UsageError for other words."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|m|h|steps?|epochs?)", text.strip())
        if not match or float(match[1]) <= 0:
            raise UsageError(
                f"A budget is a time or a number of steps, such as 30m, 8h, 20epochs or 500steps; not {text!r}."
            )
        amount, unit = float(match[1]), match[2]
        if unit in _UNITS:
            return cls(seconds=amount * _UNITS[unit])
        return cls(steps=max(1, round(amount * (STEPS_PER_EPOCH if unit.startswith("epoch") else 1))))

    def spent(self, step: int, seconds: float) -> float:
        """Return the share of the budget that is used up after `step` steps and `seconds` of training."""
        return step / self.steps if self.steps else seconds / (self.seconds or 1.0)

    def left(self, step: int, seconds: float, steps_per_s: float) -> float:
        """Return the seconds of training that are left; those of a budget in steps at the speed of now."""
        left = (self.steps - step) / max(steps_per_s, 1e-9) if self.steps else (self.seconds or 0.0) - seconds
        return max(0.0, left)


class TrainSettings(Stored):
    """The recipe. Defaults are what learned soonest in experiments (docs/training.md).

    `learning_rate` is the highest of Muon, after a linear rise over `warmup` of the budget; it falls by a cosine to 0.
    `schedule` may also be "one_cycle" (with momentum running against it) or "poly" (falling from the start), and
    `optimizer` "adamw" (which wants a third of the learning rate) or "sgd", with Nesterov's `momentum`. A step sums up
    the gradients of `accumulate` batches. `dropout` is the share of feature maps that are left out at random.
    `checkpointing` computes stages again in the backward pass instead of keeping them. `precision` is that of
    convolutions, by default half on CUDA and float32 elsewhere; tf32 is float32 with rounded factors on CUDA. `compile`
    runs the network through torch.compile. With `early_stop` a training ends when for that share of its budget the
    validation patches have not been better: never by default, as the learning rate is small only at the end. `ema` is
    the decay of the running mean of the weights, which is what a model keeps. `foreground` is the share of patches that
    are centered on a labelled voxel. `loss` is one of `train.loss`. With `growth` patches grow in so many phases, each
    as long as the others, from the smallest that the network can halve to the plan's. A training that begins with a
    model may leave its encoder as it is (`frozen`).
    """

    what = "recipe in train.json"

    batch: int = Field(default=2, ge=1, le=2**16)
    loss: LossName = "dice_ce"
    optimizer: Literal["muon", "adamw", "sgd"] = "muon"
    learning_rate: float = Field(default=1e-2, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    ema: float = Field(default=0.99, ge=0, lt=1)
    gradient_norm: float = Field(default=12.0, gt=0)
    foreground: float = Field(default=0.67, ge=0, le=1)
    momentum: float = Field(default=0.99, ge=0, lt=1)
    schedule: Literal["cosine", "one_cycle", "poly"] = "cosine"
    accumulate: int = Field(default=1, ge=1, le=2**16)
    dropout: float = Field(default=0, ge=0, lt=1)
    checkpointing: bool = False
    precision: Literal["auto", "float32", "tf32", "float16", "bfloat16"] = "auto"
    compile: bool = False
    frozen: Literal["nothing", "encoder"] = "nothing"
    early_stop: float = Field(default=0, ge=0, lt=1)
    growth: int = Field(default=1, ge=1, le=64)
    folds: int = Field(default=5, ge=1, le=2**16)
    seed: int = Field(default=12345, ge=0, lt=2**32)
