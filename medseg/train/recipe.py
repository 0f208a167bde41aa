"""What weights came from, kept with them, so that what differs from a later command can be named."""

from __future__ import annotations

import json
from typing import Any

from medseg.model.plan import Plan
from medseg.model.stored import Stored
from medseg.train.settings import TrainSettings

EARLIER = "earlier budgets"
"""The field for the budgets that a training was stopped under, and left for a longer one."""

STOPPED = (
    "Use the same again to go on, or a longer budget of the same kind; or train into another folder; or delete the "
    "file to begin this fold anew."
)

ENDED = (
    "Use the same again to have its scores. A training that ended takes no longer budget, since its learning rate fell "
    "to nothing: begin a new one with its weights (medseg train DATASET NEW --from this model --budget ...), or "
    "delete the file to train this fold anew."
)


def differences(before: str, now: str) -> str:
    """Return what differs between two recipes, as texts of JSON: each field with both of its values; "" for nothing.

    Budgets that were given up for a longer one are no difference: the same command has them in its past.
    """
    try:
        old, new = (_flat(_completed(json.loads(text))) for text in (before, now))
    except ValueError:
        return "" if before == now else "an older version of medseg kept no record of what it came from"
    lines = [
        f"{name} was {_shown(old.get(name))} and is {_shown(new.get(name))}"
        for name in (*new, *(name for name in old if name not in new))
        if old.get(name) != new.get(name) and name != EARLIER
    ]
    return "; ".join(lines[:5])


def continued(before: str, now: str, step: int) -> str | None:
    """Return the recipe under which a training that was stopped after `step` steps goes on; None for another training.

    A longer budget of the same kind, in time or in steps, is taken: from there on the learning rate follows it. The
    recipe then keeps both.
    """
    if not differences(before, now):
        return before
    try:
        old, new = json.loads(before), json.loads(now)
        budgets = old["budget"], new["budget"]
        earlier = [*old.get(EARLIER, []), old["budget"] | {"until_step": step}]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    going_on = json.dumps(new | {EARLIER: earlier})
    return going_on if is_longer(*budgets) and not differences(json.dumps(old | {"budget": budgets[1]}), now) else None


def is_longer(before: dict[str, float], now: dict[str, float]) -> bool:
    """Return whether a budget is longer than another one, and of the same kind."""
    return before.keys() == now.keys() and all(now[name] > before[name] for name in now)


def lengthened(recipe: str, step: int) -> str:
    """Return a sentence about the longer budget that a training got at a step; "" where it got none there."""
    try:
        fields = json.loads(recipe)
        before = dict(fields[EARLIER][-1])
        stopped = before.pop("until_step")
    except (ValueError, KeyError, TypeError, IndexError):
        return ""
    if stopped != step:
        return ""
    old, new = (f"{amount:g} {unit}" for budget in (before, fields["budget"]) for unit, amount in budget.items())
    return (
        f"The training was stopped at step {step} of a budget of {old} and goes on to {new}: from here on the learning "
        "rate follows the longer budget."
    )


def _completed(fields: Any) -> Any:
    """Return a recipe with the fields that medseg had not yet when it was written: by default nothing has changed."""
    known: dict[str, type[Stored]] = {"plan.json": Plan, "train.json": TrainSettings}
    if not isinstance(fields, dict):
        return fields
    whole = {
        name: kind.model_validate(fields[name]).model_dump(mode="json")
        for name, kind in known.items()
        if name in fields
    }
    return fields | whole


def _flat(fields: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(fields, dict):
        return {place: fields}
    parts = [_flat(value, f"{place} {name}".strip()) for name, value in fields.items()]
    return {name: value for part in parts for name, value in part.items()}


def _shown(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
