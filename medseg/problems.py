"""What is wrong with a record that pydantic refuses, on one line, without the values that it held."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

MOST, LONGEST = 10, 300
"""Problems that are listed, and letters of each: a file may have thousands, and choose the words of its keys."""


def first_problem(error: ValidationError) -> str:
    """Return where the first problem lies and what it is, and how many more there are."""
    told = _told(error)
    return f"{told[0]} (and {len(told) - 1} more)" if len(told) > 1 else told[0]


def listed_problems(error: ValidationError) -> str:
    """Return how many problems there are, and where each of the first lies and what it is."""
    told = _told(error)
    shown = "; ".join(told[:MOST]) + ("; ..." if len(told) > MOST else "")
    return f"{len(told)} problem{'s' if len(told) > 1 else ''}: {shown}"


def _told(error: ValidationError) -> list[str]:
    details: Sequence[Any] = error.errors(include_input=False, include_url=False)
    return [_line(detail["loc"], detail["msg"]) for detail in details]


def _line(location: Sequence[int | str], message: str) -> str:
    place = ".".join(map(str, location)) or "the file"
    text = f"{place}: {message.removeprefix('Value error, ')}"
    return re.sub(r"[^ -~\u00a0-\ud7ff\ue000-\uffff]+", " ", text)[:LONGEST]
