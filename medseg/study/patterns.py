"""Regular expressions on texts of files, in time that grows with the text alone: neither is to be trusted."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from medseg.errors import InputError

LONGEST = 64
"""Characters of a description or a name of a structure, as the standard has it (PS3.5 6.2, LO)."""

OTHER_MEANING = re.compile(r"\\[<>bB]|[*+?}]\+|\[\[|&&|--|~~|\|\||\(\?[a-z]*x")
"""What means something else to the linear engine, or might, than to Python."""


def matches(pattern: str, text: str, *, whole: bool = False) -> bool:
    """Return whether a regular expression of Python matches a text anywhere, or all of it, in upper or lower case.

    Patterns without looking around and back run in linear time; others run on texts of up to `LONGEST` characters.
    Raises InputError (`long_text`) where such a pattern meets a longer one.
    """
    linear = _linear(rf"(?i)\A(?:{pattern})\z" if whole else f"(?i){pattern}") if _same_meaning(pattern) else None
    if linear is not None:
        return linear(text)
    if len(text) > LONGEST:
        raise InputError(
            f"A description or name in the study has more than the {LONGEST} characters that the standard allows, and "
            "a pattern with (?=...), (?!...) or the like may search it for ever. Write the pattern without.",
            reason="long_text",
        )
    return (re.fullmatch if whole else re.search)(pattern, text, re.IGNORECASE) is not None


def _same_meaning(pattern: str) -> bool:
    return OTHER_MEANING.search(pattern) is None


@cache
def _linear(pattern: str) -> Callable[[str], bool] | None:
    """Return what matches a pattern in linear time, None where that cannot be: the engine that pydantic brings."""
    from pydantic_core import SchemaError, SchemaValidator, core_schema

    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex")).isinstance_python
    except SchemaError:
        return None
