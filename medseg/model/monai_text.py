"""Text of a MONAI configuration that begins with `$`, as far as it says a value. Nothing of it is evaluated.

Such text is Python. A few forms of it are a value in other words, and are taken apart here: a plain value
("$[1, 2]"), the name of a type ("$torch.float32"), a reference to another value ("$@a#b"), how many values that has
("$len(@a)"), and a choice between such by a reference to true or false ("$@a if @b else @c").
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

LONGEST = 200
"""Letters of the longest text that is taken apart."""

TYPE = re.compile(r"\$(torch|np|numpy)\.(float32|float64)")
REFERENCE = re.compile(r"@[A-Za-z_]\w*((#|::)\w+)*")

Follow = Callable[[str], Any]
"""From a reference such as "@a#b" to the value that it points at."""


class Unreadable(Exception):
    """The text is none of the forms above."""


def read_text(text: str, follow: Follow) -> Any:
    """Return the value that text which begins with $ or @ stands for. Raises Unreadable for any other form."""
    if TYPE.fullmatch(text):
        return text[1:]
    if REFERENCE.fullmatch(text.removeprefix("$")):
        return follow(text.removeprefix("$"))
    if not text.startswith("$") or len(text) > LONGEST:
        raise Unreadable
    references: list[str] = []

    def named(match: re.Match[str]) -> str:
        references.append(match[0])
        return f"_{len(references) - 1}_"

    try:
        tree = ast.parse(REFERENCE.sub(named, text[1:]).strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unreadable from error
    names = {f"_{number}_": reference for number, reference in enumerate(references)}
    return _value(tree, lambda name: follow(names[name]) if name in names else _unknown())


def _value(tree: ast.expr, named: Follow) -> Any:
    """Return the value of a tree of Python's grammar."""
    if isinstance(tree, ast.Name):
        return named(tree.id)
    if isinstance(tree, ast.IfExp):
        test = _value(tree.test, named)
        return _value(tree.body if test else tree.orelse, named) if isinstance(test, bool) else _unknown()
    if isinstance(tree, ast.Call):
        counted = isinstance(tree.func, ast.Name) and tree.func.id == "len" and not tree.keywords
        values = _value(tree.args[0], named) if counted and len(tree.args) == 1 else None
        return len(values) if isinstance(values, list | dict) else _unknown()
    if isinstance(tree, ast.List | ast.Tuple):
        return [_value(part, named) for part in tree.elts]
    try:
        value = ast.literal_eval(tree)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise Unreadable from error
    return value if value is None or isinstance(value, bool | int | float | str) else _unknown()


def _unknown() -> Any:
    raise Unreadable
