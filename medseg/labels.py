"""The label table: what each value of a label map means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from medseg.errors import InputError
from medseg.snomed import snomed_of
from medseg.volume import Volume

PALETTE = (
    "#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45", "#fabed4", "#469990",
    "#dcbeff", "#9a6324", "#fffac8", "#800000", "#aaffc3", "#808000", "#ffd8b1", "#000075", "#a9a9a9", "#ffe119",
)  # fmt: skip
"""Twenty colors that stay apart for most eyes, after Trubetskoy's list; they repeat for more labels."""


LARGEST_VALUE = 2**31 - 1
"""Of a label, as of a structure in DICOM (VR IS, PS3.5 6.2)."""


class SnomedCode(BaseModel):
    """A SNOMED CT concept, as DICOM writes it: code value and code meaning (PS3.16, CID 7150 to 7166).

    `laterality` is the side of a structure whose code does not say it, such as that of a kidney (CID 244).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: str
    meaning: str
    laterality: Literal["left", "right"] | None = None


class Label(BaseModel):
    """One structure: the value that marks it in a label map, its name, a color for pictures and, if known, its code."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: int = Field(ge=1, le=LARGEST_VALUE)
    name: str
    color: str = Field(pattern="^#[0-9a-f]{6}$")
    snomed: SnomedCode | None = None


def make_labels(names: Iterable[tuple[int, str]]) -> tuple[Label, ...]:
    """Return a label table for (value, name) pairs, sorted by value, with colors, and codes where a name is known.

    Background has no entry.
    """
    pairs = sorted((value, name) for value, name in names if value != 0)
    return tuple(
        Label(value=value, name=name, color=PALETTE[place % len(PALETTE)], snomed=_code(name))
        for place, (value, name) in enumerate(pairs)
    )


def _code(name: str) -> SnomedCode | None:
    known = snomed_of(name)
    return None if known is None else SnomedCode(value=known[0], meaning=known[1], laterality=known[2])


def complete(table: Sequence[Label], values: Iterable[int]) -> tuple[Label, ...]:
    """Return the table with an entry for each of the values that it lacks, called "label N", sorted by value.

    Raises InputError (`label_values`) for values that no label can have.
    """
    unknown = set(values) - {label.value for label in table} - {0}
    if unknown and max(unknown) > LARGEST_VALUE:
        raise InputError(
            f"The value of a label is at most {LARGEST_VALUE}, and the labels have {max(unknown)}. Number them from 1.",
            reason="label_values",
        )
    added = [Label(value=value, name=f"label {value}", color=PALETTE[(value - 1) % len(PALETTE)]) for value in unknown]
    return tuple(sorted([*table, *added], key=lambda label: label.value))


def label_map(labels: Volume) -> NDArray[np.integer[Any]]:
    """Return the label values (I, J, K) of a volume as integers, without a copy where they are stored so.

    Raises InputError (`not_labels`) for several channels, fractions and negative numbers.
    """
    values: NDArray[Any] = labels.array[0]
    whole: NDArray[np.integer[Any]] = values
    if values.dtype.kind in "fb":
        with np.errstate(invalid="ignore"):  # what is not finite turns into something else, and is found so
            whole = values.astype(np.int32)
    if len(labels.array) > 1 or (whole is not values and not np.array_equal(whole, values)) or whole.min() < 0:
        raise InputError(
            "A label map is one channel of whole numbers from 0; this volume holds something else, maybe an image.",
            reason="not_labels",
        )
    return whole
