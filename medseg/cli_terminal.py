"""What the command line writes to: nothing that a file, a header or a path holds steers the terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text
from typer.core import TyperGroup

STEERING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Categories of Unicode that steer and show nothing: escapes, line ends, directions of writing, halves of pairs."""

JOINERS = "\u200c\u200d"
"""What Persian, Indian scripts and emoji are spelled with, although it is of those categories."""


def visible(text: str) -> str:
    r"""Return a text in one line, with a name such as \x1b in the place of every letter that steers a terminal."""
    if text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode("ascii")
        if unicodedata.category(letter) in STEERING and letter not in JOINERS
        else letter
        for letter in text
    )


class Terminal(Console):
    """A console that shows texts as they are: no markup, no names of emoji, no letters that steer a terminal.

    A string is one line; what needs several is a `Text`.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string as a text, before its width is measured."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Give the pieces of whatever is shown; the last place that all of it comes through before it has colors."""
        for piece in super().render(renderable, options):
            if piece.control or piece.text.isprintable():
                yield piece
            else:
                yield Segment("\n".join(map(visible, piece.text.split("\n"))), piece.style)


class Verbs(TyperGroup):
    """Verbs whose wrong use is told with what was typed made visible: names of files are typed by the shell."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options before the verb."""
        left: list[str] = _told(super().parse_args, ctx, args)
        return left

    def invoke(self, ctx: Any) -> Any:
        """Read the options of the verb, and run it."""
        return _told(super().invoke, ctx)


def _told(call: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except WrongUse as error:
        error.message = visible(error.message)
        raise


WrongUse: Any = typer.BadParameter.__base__
"""Of wrong use of every kind; typer has no public name for it."""

out = Terminal()
err = Terminal(stderr=True)
