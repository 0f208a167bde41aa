"""Files in, label files out, with one model kept loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from medseg.errors import MedsegError, OutputError, UsageError
from medseg.io import VOLUME_ENDINGS, load, save
from medseg.model.segmenter import Box, Model
from medseg.model.timing import Report
from medseg.report.measurements import Measurement, measure
from medseg.volume import Volume

Progress = Callable[[str, int, int], None]
"""Called with the name of the input, the number of tiles done and the number there are."""

Source = Path | tuple[Path, ...]


@dataclass(frozen=True)
class Options:
    """How a scan is segmented; the fields are those of `Model.segment`, and `assume_orientation` is that of `load`."""

    roi: Box | None = None
    step: float = 0.5
    mirror: bool = False
    reuse: bool = True
    assume_orientation: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one input: its measurements and report, or the error that stopped it."""

    source: Source
    target: Path
    measurements: tuple[Measurement, ...] = ()
    report: Report = field(default_factory=Report)
    error: MedsegError | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON takes it."""
        return {
            "source": str(self.source) if isinstance(self.source, Path) else [str(path) for path in self.source],
            "target": str(self.target),
            "error": None if self.error is None else {"reason": self.error.reason, "text": str(self.error)},
            "labels": [row.to_dict() for row in self.measurements],
            **self.report.to_dict(),
        }


def segment_file(
    model: Model,
    source: Source,
    target: str | PathLike[str],
    options: Options | None = None,
    *,
    progress: Progress | None = None,
) -> Outcome:
    """Return the measurements of one input and write its label map to `target`, on the grid of the (first) source.

    `source` is a volume, a DICOM series folder, or a tuple of them, one for each channel.
    Raises what reading, segmenting or writing raises.
    """
    options = options or Options()
    volume, report = _read(source, options)
    labels = _segment(model, volume, source, options, report, progress)
    return _finish(model, labels, source, Path(target), report)


def segment_folder(
    model: Model, source: Path, target: Path, options: Options | None = None, *, progress: Progress | None = None
) -> Iterator[Outcome]:
    """Yield the outcome of each volume file of a folder, written to `target` under its own name.

    The next scan is read and the last one written while one is segmented. An error stops only the file it concerns.
    Raises UsageError where the two folders are one, OutputError where the second cannot be made.
    """
    if source.resolve() == target.resolve():
        raise UsageError("The labels would replace the images: give another folder for the output.", path=target)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder cannot be made: {error.strerror}.", path=target) from error
    chosen, files = options or Options(), volume_files(source)
    last: tuple[Path, Future[Outcome]] | None = None
    with ThreadPoolExecutor(2) as pool:
        ahead = pool.submit(_read, files[0], chosen) if files else None
        for place, file in enumerate(files):
            now, ahead = ahead, pool.submit(_read, files[place + 1], chosen) if place + 1 < len(files) else None
            written: Future[Outcome] = Future()
            try:
                volume, report = now.result() if now else _read(file, chosen)
                labels = _segment(model, volume, file, chosen, report, progress)
                written = pool.submit(_finish, model, labels, file, target / file.name, report)
            except MedsegError as error:
                written.set_exception(error)
            if last:
                yield _settled(*last, target)
            last = file, written
        if last:
            yield _settled(*last, target)


def volume_files(folder: Path) -> list[Path]:
    """Return the volume files of a folder, sorted; none where it is a folder of DICOM slices."""
    return sorted(file for file in folder.iterdir() if file.is_file() and file.name.endswith(VOLUME_ENDINGS))


def _read(source: Source, options: Options) -> tuple[Volume, Report]:
    report = Report()
    with report.stage("read"):
        return load(source, assume_orientation=options.assume_orientation), report


def _segment(
    model: Model, volume: Volume, source: Source, options: Options, report: Report, progress: Progress | None
) -> Volume:
    name = (source if isinstance(source, Path) else source[0]).name

    def show(done: int, total: int) -> None:
        if progress:
            progress(name, done, total)

    return model.segment(
        volume,
        roi=options.roi,
        step=options.step,
        mirror=options.mirror,
        reuse=options.reuse,
        progress=show,
        report=report,
    )


def _finish(model: Model, labels: Volume, source: Source, target: Path, report: Report) -> Outcome:
    with report.stage("measure"):
        measurements = tuple(measure(labels, model.plan.labels))
    with report.stage("write"):
        save(labels, target, source=source if isinstance(source, Path) else source[0])
    return Outcome(source, target, measurements, report)


def _settled(file: Path, written: Future[Outcome], target: Path) -> Outcome:
    try:
        return written.result()
    except MedsegError as error:
        return Outcome(file, target / file.name, error=error)
