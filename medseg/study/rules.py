"""Rules that make a training folder of studies: which series, which structures under which names, what may overlap."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from medseg.study.patterns import matches
from medseg.study.pipeline import Pattern, Rule, Strict, read_record


class LabelRule(Strict):
    """A label, and the names that its structures go by: regular expressions for a whole name, in upper or lower case.

    Without `match` only its own name counts. `several` says what becomes of a case in which several structures match:
    "refuse", or their "union".
    """

    name: str = Field(min_length=1)
    match: tuple[Pattern, ...] = ()
    several: Literal["refuse", "union"] = "refuse"

    def takes(self, structure: str) -> bool:
        """Return whether a structure of this name becomes the label; spaces around it do not count."""
        patterns = self.match or (re.escape(self.name),)
        return any(matches(pattern, structure.strip(), whole=True) for pattern in patterns)


class DatasetRules(Strict):
    """How studies become cases of a training folder. `labels` get the values 1, 2, 3 ... in their order.

    The contours of a case refer to the series of the first channel. Where two labels meet, a case is refused, or the
    "later" one in the list wins. A structure becomes the first label that takes it.
    """

    format: Literal[1]
    name: str
    channels: tuple[Rule, ...] = Field(min_length=1)
    labels: tuple[LabelRule, ...] = Field(min_length=1)
    overlap: Literal["refuse", "later"] = "refuse"
    registration: Literal["rigid"] | None = None

    @model_validator(mode="after")
    def _names_differ(self) -> DatasetRules:
        for names in ([rule.name for rule in self.labels], [rule.name for rule in self.channels]):
            if len(set(names)) < len(names):
                raise ValueError("two labels or two channels have one name")
        if "background" in {rule.name for rule in self.labels}:
            raise ValueError("background is what is left, and no label")
        if "ignore" in {rule.name for rule in self.labels}:
            raise ValueError("in a dataset.json a label called ignore marks voxels that do not count")
        return self

    @property
    def digest(self) -> str:
        """Return a SHA-256 of all decisions."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def label_of(self, structure: str) -> LabelRule | None:
        """Return the label that a structure becomes: the first that takes it; None where no rule does."""
        return next((rule for rule in self.labels if rule.takes(structure)), None)

    def untaken(self, structures: Iterable[str]) -> list[str]:
        """Return the structures that no rule takes."""
        return [one for one in structures if self.label_of(one) is None]


def load_rules(path: str | PathLike[str]) -> DatasetRules:
    """Return the rules in a YAML file. Raises UsageError where it says what no rules can, UnreadableFile without it."""
    return read_record(Path(path), DatasetRules, "The rules for a dataset")
