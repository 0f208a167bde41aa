"""The label table: what each value of a label map means."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, Field

PALETTE = (
    "#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45", "#fabed4", "#469990",
    "#dcbeff", "#9a6324", "#fffac8", "#800000", "#aaffc3", "#808000", "#ffd8b1", "#000075", "#a9a9a9", "#ffe119",
)  # fmt: skip
"""Twenty colors that stay apart for most eyes, after Trubetskoy's list; they repeat for more labels."""


class SnomedCode(BaseModel):
    """A SNOMED CT concept, as DICOM writes it: code value and code meaning (PS3.16, CID 7150 to 7166)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: str
    meaning: str


class Label(BaseModel):
    """One structure: the value that marks it in a label map, its name, a color for pictures and, if known, its code."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: int = Field(ge=1)
    name: str
    color: str = Field(pattern="^#[0-9a-f]{6}$")
    snomed: SnomedCode | None = None


def make_labels(names: Iterable[tuple[int, str]]) -> tuple[Label, ...]:
    """Return a label table for (value, name) pairs, sorted by value, with colors. Background has no entry."""
    pairs = sorted((value, name) for value, name in names if value != 0)
    return tuple(
        Label(value=value, name=name, color=PALETTE[place % len(PALETTE)]) for place, (value, name) in enumerate(pairs)
    )
