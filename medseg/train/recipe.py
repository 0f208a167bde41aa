"""What weights came from, kept with them, so that what differs from a later command can be named."""

from __future__ import annotations

import json
from typing import Any

WAY_ON = (
    "Use the same again to go on; or train into another folder, with --from this model to begin with its weights, once "
    "they are there; or delete the file to train this fold anew."
)
"""The learning rate follows the budget from the first step, so none can be stretched later."""


def differences(before: str, now: str) -> str:
    """Return what differs between two recipes, as texts of JSON: each field with both of its values."""
    try:
        old, new = (_flat(json.loads(text)) for text in (before, now))
    except ValueError:
        return "an older version of medseg kept no record of what it came from"
    lines = [
        f"{name} was {_shown(old.get(name))} and is {_shown(new.get(name))}"
        for name in (*new, *(name for name in old if name not in new))
        if old.get(name) != new.get(name)
    ]
    return "; ".join(lines[:5])


def _flat(fields: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(fields, dict):
        return {place: fields}
    parts = [_flat(value, f"{place} {name}".strip()) for name, value in fields.items()]
    return {name: value for part in parts for name, value in part.items()}


def _shown(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
