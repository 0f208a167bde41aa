"""What a model is for: the modality of its channels, and what the cases that it was trained on were like."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat

from medseg.model.plan import Plan
from medseg.model.stored import Stored
from medseg.report.measurements import Measurement
from medseg.volume import Grid

MODALITIES = {
    "CT": frozenset({"ct", "cect", "cta", "cbct", "ncct", "ldct"}),
    "MR": frozenset({
        *("mr", "mri", "mra", "t1", "t2", "t1w", "t2w", "t1n", "t1c", "t1ce", "t1gd", "t2f", "t2star", "t2s", "pd"),
        *("pdw", "flair", "stir", "tirm", "dixon", "mprage", "dwi", "adc", "swi", "dce", "dti", "tof", "bold", "fmri"),
    }),
    "PT": frozenset({"pt", "pet", "fdg", "suv"}),
}  # fmt: skip
"""The modality that DICOM states for a channel, by the usual words in the names of channels."""

FAR_LENGTH, FAR_VOLUME = 2.0, 3.0
"""How many times as large as the largest, or as small as the smallest, of the training cases is far from them."""

Lengths = tuple[PositiveFloat, PositiveFloat, PositiveFloat]


def modality_of(channel: str) -> str | None:
    """Return the DICOM modality that the name of a channel speaks of; None where it names none, or several."""
    words = set(re.findall(r"[a-z]+[0-9]*[a-z]*", channel.lower()))
    named = [modality for modality, known in MODALITIES.items() if words & known]
    return named[0] if len(named) == 1 else None


def modalities_of(plan: Plan) -> tuple[str | None, ...]:
    """Return the modality of each channel of a plan, where its name speaks of one."""
    return tuple(modality_of(channel.name) for channel in plan.channels)


class Range(BaseModel):
    """The smallest and the largest volume of a label in ml, in the cases that have it; `always` says that all do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    smallest: NonNegativeFloat
    largest: NonNegativeFloat
    always: bool


class Seen(BaseModel):
    """What training saw: fields of view in mm along R, A and S, from the smallest to the largest, and volumes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    smallest_view_mm: Lengths
    largest_view_mm: Lengths
    volumes_ml: dict[int, Range]

    def oddities(self, view: Grid, measurements: Sequence[Measurement]) -> Iterator[str]:
        """Yield a sentence for what the model looked at, and for each label, where they lie far from what was seen."""
        canonical = view.reoriented("RAS")
        lengths = [count * length for count, length in zip(canonical.shape, canonical.spacing_mm, strict=True)]
        ends = zip(lengths, self.smallest_view_mm, self.largest_view_mm, strict=True)
        if any(_is_far(length, low, high, FAR_LENGTH) for length, low, high in ends):
            yield (
                f"The field of view, {_mm(lengths)} mm, is far from those of the training cases, "
                f"{_mm(self.smallest_view_mm)} to {_mm(self.largest_view_mm)} mm. Give the model such a part of the "
                "scan: a box (roi), or a crop."
            )
        for row in measurements:
            seen = self.volumes_ml.get(row.value)
            if seen and (row.voxels or seen.always) and _is_far(row.volume_ml, seen.smallest, seen.largest, FAR_VOLUME):
                yield (
                    f"{row.name}: {_ml(row.volume_ml)} ml; training cases had {_ml(seen.smallest)} to "
                    f"{_ml(seen.largest)} ml. Look at the labels before you use them."
                )


class Kept(Stored):
    """What of fingerprint.json a model in use looks at; the planner reads the rest."""

    what: ClassVar[str] = "fingerprint"
    model_config = ConfigDict(frozen=True, extra="ignore")

    seen: Seen | None = Field(default=None)


def kept_seen(folder: Path) -> Seen | None:
    """Return what the training of a model folder saw; None where nobody wrote it down.

    Raises ModelError for a fingerprint that is damaged.
    """
    file = folder / "fingerprint.json"
    return Kept.load(file).seen if file.is_file() else None


def _is_far(one: float, low: float, high: float, factor: float) -> bool:
    return one > factor * high or one * factor < low


def _mm(lengths_mm: Sequence[float]) -> str:
    return " x ".join(f"{length:.0f}" for length in lengths_mm)


def _ml(volume: float) -> str:
    return f"{volume:.3g}" if volume < 100 else f"{volume:.0f}"
