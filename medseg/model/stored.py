"""Model folders: where they are, and what they keep as JSON, whole or not there, without a field that nobody knows."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from medseg.errors import ModelError, OutputError, UsageError
from medseg.io.files import reading, written_whole
from medseg.io.label_table import SHIPPED
from medseg.io.leftovers import temporary_folder
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


def check_new(folder: Path) -> None:
    """Raise UsageError for a folder that holds something, and for a file."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("The model needs a folder of its own: give one that is empty or does not exist.", path=folder)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give the path of a folder to make; at the end of the block it takes the place of `folder`, whole or not at all.

    Raises OutputError where it cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder.parent) as beside:
            yield beside / "model"
            if folder.exists():
                folder.rmdir()
            (beside / "model").rename(folder)
    except OSError as error:
        raise OutputError(f"The model folder could not be written: {error.strerror}.", path=folder) from error


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
