"""What every importer of foreign models makes, and how it refuses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from medseg.errors import ModelError
from medseg.model.plan import Plan

DESCRIBED = "A file that describes the model"
"""What errors call the JSON and YAML files of foreign models."""


@dataclass(frozen=True)
class Imported:
    """A foreign model in medseg's terms: its plan, the weights of each fold, and lines about it for the model card."""

    plan: Plan
    folds: dict[int, dict[str, Tensor]]
    facts: tuple[str, ...]
    previous: Imported | None = None


def unsupported(what: str, name: str) -> ModelError:
    """Return the error that refuses something by its name."""
    return ModelError(f"The model has a {what} that medseg does not have: {name}.", reason="unsupported")
