"""Label tables as files: what the values of a label file mean, written beside it as NAME.labels.json."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from medseg.errors import InputError, UnreadableFile
from medseg.io.files import reading, written_whole
from medseg.io.text import read_json
from medseg.labels import Label

SHIPPED = Path(__file__).parents[1] / "models"
"""Where the models are that ship."""


def write_table(table: Sequence[Label], path: str | os.PathLike[str]) -> None:
    """Write a label table as JSON: a list of value, name, color and SNOMED CT code."""
    with written_whole(path) as beside:
        content = [label.model_dump() for label in table]
        beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table_file(path: str | os.PathLike[str]) -> Path:
    """Return the file that names labels: that of a model for its folder or for the name of one that ships."""
    path = Path(path)
    with reading(path):
        if path.is_dir():
            return path / "plan.json"
        shipped = SHIPPED / path.name / "plan.json"
        return shipped if not path.exists() and str(path) == path.name and shipped.is_file() else path


def read_table(path: str | os.PathLike[str]) -> tuple[Label, ...]:
    """Return the label table of a JSON file: a list of labels, or an object with one as "labels", such as a plan.json.

    A model, by its folder or the name of one that ships, has the labels of its plan.
    Raises UnreadableFile where it is missing or no JSON, and InputError (`label_table`) where it is something else.
    """
    path = table_file(path)
    content = read_json(path, "The label table", UnreadableFile)
    try:
        table = TypeAdapter(tuple[Label, ...]).validate_python(
            content["labels"] if isinstance(content, dict) else content
        )
        if len({label.value for label in table}) < len(table):
            raise ValueError("a value is there twice")
    except (ValueError, KeyError) as error:
        raise InputError(
            'A label table is a JSON list of labels such as {"value": 1, "name": "liver", "color": "#e6194b"}, each '
            "value once; this file holds something else.",
            path=path,
            reason="label_table",
        ) from error
    return table
