"""Model folders: where they are, and what they keep as JSON, whole or not there, without a field that nobody knows."""

from __future__ import annotations

from collections.abc import Collection
from os import PathLike
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from medseg.errors import ModelError
from medseg.io.files import reading, written_whole
from medseg.io.label_table import SHIPPED
from medseg.io.text import read_text
from medseg.problems import first_problem


def find_model(name: str | PathLike[str]) -> Path:
    """Return the folder of a model: the path, or the shipped model of that name.

    Raises ModelError for neither, UnreadableFile where the system refuses to say.
    """
    path = Path(name)
    with reading(path):
        if path.is_dir():
            return path
    if (SHIPPED / path.name / "plan.json").is_file() and path.name == str(name):
        return SHIPPED / path.name
    shipped = ", ".join(sorted(plan.parent.name for plan in SHIPPED.glob("*/plan.json")))
    raise ModelError(f"No model is there: neither a folder nor one that medseg ships ({shipped}).", path=path)


class Stored(BaseModel):
    """A frozen record with a file of its own; `what` is what messages call it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    what: ClassVar[str]

    def save(self, path: str | PathLike[str], *, without: Collection[str] = ()) -> None:
        """Write the record as JSON, whole or not at all, but for some fields. Raises OutputError."""
        with written_whole(path) as beside:
            beside.write_text(self.model_dump_json(indent=1, exclude=set(without)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Return the record in a JSON file. Raises ModelError that names the field that is missing or wrong."""
        text = read_text(Path(path), f"The {cls.what}", ModelError)
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ModelError(
                f"The {cls.what} is not valid: {first_problem(error)}.", path=path, reason="not_valid"
            ) from error
