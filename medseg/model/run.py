"""Files in, label files out, with one model kept loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from medseg.errors import MedsegError, UsageError
from medseg.io import load, save
from medseg.model.segmenter import Box, Model
from medseg.report.measurements import Measurement, measure

Progress = Callable[[str, int, int], None]
"""Called with the name of the input, the number of tiles done and the number there are."""

VOLUME_ENDINGS = (".nii", ".nii.gz", ".nrrd", ".mha")

Source = Path | tuple[Path, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of one input: its measurements, or the error that stopped it."""

    source: Source
    target: Path
    measurements: tuple[Measurement, ...] = ()
    error: MedsegError | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON takes it."""
        return {
            "source": str(self.source) if isinstance(self.source, Path) else [str(path) for path in self.source],
            "target": str(self.target),
            "error": None if self.error is None else {"reason": self.error.reason, "text": str(self.error)},
            "labels": [row.to_dict() for row in self.measurements],
        }


def segment_file(
    model: Model,
    source: Source,
    target: str | PathLike[str],
    *,
    roi: Box | None = None,
    step: float = 0.5,
    assume_orientation: str | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Return the measurements of one input and write its label map to `target`, on the grid of the (first) source.

    `source` is a volume, a DICOM series folder, or a tuple of them, one for each channel.
    Raises what reading, segmenting or writing raises.
    """
    volume = load(source, assume_orientation=assume_orientation)
    first = source if isinstance(source, Path) else source[0]

    def report(done: int, total: int) -> None:
        if progress:
            progress(first.name, done, total)

    labels = model.segment(volume, roi=roi, step=step, progress=report)
    save(labels, target, source=first)
    return Outcome(source, Path(target), tuple(measure(labels, model.plan.labels)))


def segment_folder(model: Model, source: Path, target: Path, **options: Any) -> Iterator[Outcome]:
    """Yield the outcome of each volume file of a folder, written to `target` under its own name.

    An error stops only the file that it concerns. `options` are those of `segment_file`.
    Raises UsageError where the two folders are one.
    """
    if source.resolve() == target.resolve():
        raise UsageError("The labels would replace the images: give another folder for the output.", path=target)
    target.mkdir(parents=True, exist_ok=True)
    for file in volume_files(source):
        try:
            yield segment_file(model, file, target / file.name, **options)
        except MedsegError as error:
            yield Outcome(file, target / file.name, error=error)


def volume_files(folder: Path) -> list[Path]:
    """Return the volume files of a folder, sorted; none where it is a folder of DICOM slices."""
    return sorted(file for file in folder.iterdir() if file.is_file() and file.name.endswith(VOLUME_ENDINGS))
