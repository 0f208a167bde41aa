"""The state of a training that was interrupted: tensors and numbers in one safetensors file, no pickle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from medseg.errors import ModelError
from medseg.io.files import check_regular, written_whole
from medseg.model.weights import load_state, state_of
from medseg.train.recipe import STOPPED, continued, differences

FINISH, INTERRUPT = 1.0, 2.0

DAMAGED = (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError)
"""What a damaged checkpoint ends in. A full memory ends in another error: nobody shall delete a good file for it."""


@dataclass
class TrainState:
    """Everything that a training needs to go on where it was.

    `forward` runs the network in training, by default the network itself. `scaler` is there in float16. `asked` is
    whether something wants the training to end before its budget: FINISH for good, INTERRUPT to go on later.
    """

    network: nn.Module
    average: nn.Module
    optimizer: Optimizer
    forward: Callable[[Tensor], Any] | None = None
    scaler: GradScaler | None = None
    asked: float = 0.0
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def save(self, path: Path, recipe: str) -> None:
        """Write the state, whole or not at all. `recipe` is what must be the same for the training to go on."""
        tensors = {f"network.{name}": tensor for name, tensor in state_of(self.network).items()}
        tensors |= {f"average.{name}": tensor for name, tensor in state_of(self.average).items()}
        for place, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{place}.{name}": tensor.cpu().contiguous() for name, tensor in entry.items()}
        numbers = {"step": self.step, "seconds": self.seconds, "history": self.history, "recipe": recipe}
        numbers |= {"scaler": self.scaler.state_dict()} if self.scaler else {}
        with written_whole(path) as beside:
            beside.write_bytes(serialize(tensors, {"state": json.dumps(numbers)}))

    def load(self, path: Path, recipe: str) -> str:
        """Take over the state in a file; return the recipe under which it goes on (`recipe.continued`).

        Raises ModelError where it is damaged or of another recipe.
        """
        try:
            check_regular(path)
            with safe_open(path, framework="pt") as file:
                numbers = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return self._take(path, numbers, tensors, recipe)
        except DAMAGED as error:
            raise ModelError(
                "The checkpoint cannot be read. Delete it to begin this fold anew.", path=path, reason="checkpoint"
            ) from error

    def _take(self, path: Path, numbers: dict[str, Any], tensors: dict[str, Tensor], recipe: str) -> str:
        step, seconds, history = int(numbers["step"]), float(numbers["seconds"]), list(numbers["history"])
        going_on = continued(numbers["recipe"], recipe, step)
        if going_on is None:
            raise ModelError(
                f"The training that was stopped is another one: {differences(numbers['recipe'], recipe)}. {STOPPED}",
                path=path,
                reason="checkpoint",
            )
        load_state(self.network, _below("network.", tensors), path=path)
        load_state(self.average, _below("average.", tensors), path=path)
        self._load_optimizer(_below("optimizer.", tensors))
        if self.scaler and "scaler" in numbers:  # not where the training began on a device without
            self.scaler.load_state_dict(numbers["scaler"])
        self.step, self.seconds, self.history = step, seconds, history
        return going_on

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        entries: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            place, name = key.split(".", 1)
            entries.setdefault(int(place), {})[name] = tensor
        content: dict[str, Any] = self.optimizer.state_dict()
        content["state"] = entries
        self.optimizer.load_state_dict(content)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
