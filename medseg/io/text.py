"""JSON and YAML files, whoever wrote them: only regular files, and limits on size, depth and what aliases expand to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from medseg.errors import MedsegError
from medseg.io.files import check_regular

if TYPE_CHECKING:
    from yaml.nodes import Node

LARGEST_JSON, LARGEST_YAML = 2**26, 2**20
"""Bytes that a file may have. YAML is parsed a hundred times as slowly, and nobody writes a megabyte of it."""

MOST_NODES, DEEPEST = 20_000, 50
"""Values that a YAML file may hold, with those that its aliases repeat, and how deep they may be nested."""

LONGEST_SCALAR = 1000
"""Letters of a YAML value that is not text. A number with a million digits takes minutes to convert."""

TEXT = "tag:yaml.org,2002:str"

NOT_YAML = (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError, ArithmeticError)
"""What PyYAML raises, the last four for tags that do not fit their values."""


def read_text(path: Path, what: str, error: type[MedsegError], *, largest: int = LARGEST_JSON) -> str:
    """Return a file's text, which is UTF-8 with or without a byte order mark.

    Raises `error`, which calls the file `what`, where it is missing, cannot be read, is too large or not UTF-8.
    """
    try:
        check_regular(path)
        with path.open("rb") as stream:
            content = stream.read(largest + 1)
    except FileNotFoundError as cause:
        raise error(f"{what} is missing.", path=path) from cause
    except OSError as cause:
        raise error(f"{what} cannot be read: {cause.strerror or 'no cause is given'}.", path=path) from cause
    if len(content) > largest:
        raise error(f"{what} is larger than {largest >> 20} MB, and is not read.", path=path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as cause:  # replaced letters would be other names, and patterns that match nothing
        raise error(f"{what} is not UTF-8. Save it as UTF-8 in your editor.", path=path) from cause


def read_json(path: Path, what: str, error: type[MedsegError]) -> Any:
    """Return what a JSON file holds. Raises `error` as `read_text` does, and where the file is not valid JSON."""
    text = read_text(path, what, error)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise error(f"{what} is not valid JSON.", path=path) from cause


def read_yaml(path: Path, what: str, error: type[MedsegError]) -> Any:
    """Return what a YAML file holds: text, numbers, dates, lists and dicts.

    Raises `error` as `read_text` does, and where the file is not valid YAML, repeats a key, or is too large or too
    deep once its aliases are followed.
    """
    text = read_text(path, what, error, largest=LARGEST_YAML)
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - it is a SafeLoader
    except NOT_YAML as cause:
        raise error(
            f"{what} is not valid YAML, or is nested or repeated beyond limits. Check for tabs, for colons without "
            "quotes and for repeated keys.",
            path=path,
        ) from cause


class _Loader(yaml.SafeLoader):
    """A loader with limits, for which a repeated key is an error: the first of two would be lost without a word."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Node | None, index: Any) -> Node:
        """Return the next node of the text, which knows how many nodes it stands for when aliases are followed."""
        alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > DEEPEST or len(self._sizes) > MOST_NODES:
            raise yaml.composer.ComposerError(None, None, "too deep or too many values")
        node = cast("Node", super().compose_node(parent, index))
        self._depth -= 1
        if alias:
            if id(node) not in self._sizes:  # it is not complete: the alias lies within
                raise yaml.composer.ComposerError(None, None, "a value that contains itself", node.start_mark)
            return node
        if node.tag != TEXT and isinstance(node.value, str) and len(node.value) > LONGEST_SCALAR:
            raise yaml.composer.ComposerError(None, None, "a number is too long", node.start_mark)
        parts = node.value if isinstance(node.value, list) else []
        parts = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
        self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in parts)
        if self._sizes[id(node)] > MOST_NODES:
            raise yaml.composer.ComposerError(None, None, "too many values", node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the dict of a node. Raises ConstructorError for a repeated key."""
        words = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(words)) < len(words):
            raise yaml.constructor.ConstructorError(None, None, "a key is repeated", node.start_mark)
        return super().construct_mapping(node, deep)
