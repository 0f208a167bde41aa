"""Files in, label files out, with one model kept loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from medseg.errors import InputError, MedsegError, OutputError, UsageError, unexpected
from medseg.io import VOLUME_ENDINGS, check_output, load, save
from medseg.io.files import check_place, leads_nowhere, reading
from medseg.io.folders import has_table, holds_slices, label_maps
from medseg.io.label_table import write_table
from medseg.io.scans import Scan, scans_of, split_ending
from medseg.io.structures import beside, stem
from medseg.model.crf import CRF
from medseg.model.intended import modalities_of
from medseg.model.plan import Plan
from medseg.model.segmenter import Box, Model
from medseg.model.soft import SoftMaps
from medseg.model.timing import Report
from medseg.report.measurements import Measurement, measure
from medseg.volume import Volume

Progress = Callable[[str, int, int], None]
"""Called with the name of the input, the number of tiles done and the number there are."""

Source = Path | tuple[Path, ...]

WRITTEN_AS = {".hdr": ".nii.gz", ".nhdr": ".nrrd", ".mhd": ".mha"}
"""Headers whose voxels lie in a file beside them, and how the names of labels made of them end: one file is written."""


@dataclass(frozen=True)
class Options:
    """How a scan is segmented and what is written beside its labels.

    The first fields and `crf` are those of `Model.segment`, and `assume_orientation` is that of `load`. Beside labels
    NAME.nii.gz stand, where asked for, NAME_probability_VALUE.nii.gz of each label and NAME_uncertainty.nii.gz, both
    float32 as `SoftMaps` has them; `expected_volumes` adds to the measurements the volumes that the probabilities sum
    up to.
    `anyway` takes a series of another modality than the model's, and a label map for a scan.
    """

    roi: Box | None = None
    step: float | None = None
    mirror: bool = False
    reuse: bool = True
    assume_orientation: str | None = None
    probabilities: bool = False
    uncertainty: bool = False
    expected_volumes: bool = False
    anyway: bool = False
    crf: CRF | bool | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one input: its measurements and report, or the error that stopped it.

    `warnings` say what of a result is unlike the training cases. `left_out` says why an input of a folder is no scan.
    """

    source: Source
    target: Path
    measurements: tuple[Measurement, ...] = ()
    report: Report = field(default_factory=Report)
    error: MedsegError | None = None
    warnings: tuple[str, ...] = ()
    left_out: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON takes it."""
        return {
            "source": str(self.source) if isinstance(self.source, Path) else [str(path) for path in self.source],
            "target": str(self.target) if self.left_out is None else None,
            "error": None if self.error is None else {"reason": self.error.reason, "text": str(self.error)},
            "left_out": self.left_out,
            "warnings": list(self.warnings),
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

    `source` is a volume, a DICOM series folder, or a tuple of them, one for each channel. The names of labels are
    written beside, to NAME.labels.json. A target that ends in .dcm becomes a DICOM SEG of the (first) series.
    Raises InputError (`modality`, `label_map`) for a series of another modality than the model's, and for what is no
    scan, unless the options say `anyway`, UsageError where an output would replace an input, and what reading,
    segmenting or writing raises; what can be known of the outputs before the work is checked then.
    """
    job = _Job(model, options or Options(), source, Path(target))
    _check_outputs([job])
    return job.finish(*job.segment(job.read(), progress))


def segment_folder(
    model: Model, source: Path, target: Path, options: Options | None = None, *, progress: Progress | None = None
) -> Iterator[Outcome]:
    """Yield the outcome of each scan of a folder, written to `target` under its name.

    Files NAME_0000, NAME_0001 ... are the channels of one scan called NAME (`scans_of`), other files a scan each.
    Label maps among the files, as `label_maps` knows them, are left out, unless the options say `anyway`.
    NAME.hdr, .nhdr and .mhd become NAME.nii.gz, .nrrd and .mha. The next scan is read and the last one written while
    one is segmented. An error, such as a channel that is missing, stops only the scan it concerns. Raises UsageError
    where the two folders are one, two scans would give one output, or one would be replaced, and OutputError where the
    second folder cannot be made or written to.
    """
    _make_folder(source, target)
    options = options or Options()
    files = volume_files(source)
    scans = scans_of(files, len(model.plan.channels))
    no_scans = {} if options.anyway else _left_out(scans, label_maps(files))
    jobs = [_job_of(scan, model, options, target) for scan in scans if scan.files[0] not in no_scans]
    _check_outputs(jobs)
    for file, why in no_scans.items():
        yield Outcome(file, target / file.name, left_out=why)
    last: tuple[_Job, Future[Outcome]] | None = None
    with ThreadPoolExecutor(2) as pool:
        ahead = pool.submit(jobs[0].read) if jobs else None
        for place, job in enumerate(jobs):
            now, ahead = ahead, pool.submit(jobs[place + 1].read) if place + 1 < len(jobs) else None
            written: Future[Outcome] = Future()
            try:
                volume = now.result() if now else job.read()
                written = pool.submit(job.finish, *job.segment(volume, progress))
            except Exception as error:  # noqa: BLE001 - whatever it is, the other scans do not have it
                written.set_exception(error)
            if last:
                yield _settled(*last)
            last = job, written
        if last:
            yield _settled(*last)


def _make_folder(source: Path, target: Path) -> None:
    """Make the folder of the labels for a folder of volumes. Raises UsageError and OutputError."""
    if source.resolve() == target.resolve():
        raise UsageError("The labels would replace the images: give another folder for the output.", path=target)
    if target.name.lower().endswith((*VOLUME_ENDINGS, ".dcm")):
        raise UsageError(
            "The input is a folder of volumes, so the output is a folder, too: give one, or the path of one volume.",
            path=target,
        )
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder cannot be made: {error.strerror}.", path=target) from error


def is_folder_of_volumes(path: Path) -> bool:
    """Return whether a path stands for volumes that are segmented one by one. Raises UnreadableFile.

    A folder in which a scan in DICOM lies stands for that scan, whatever lies beside it.
    """
    with reading(path):
        return path.is_dir() and bool(volume_files(path)) and not holds_slices(path)


def volume_files(folder: Path) -> list[Path]:
    """Return the files of a folder that `load` reads as volumes, sorted; none where it is a folder of DICOM slices.

    Of a pair of files that is the header. Hidden files are left out, links that lead nowhere are not: they stand for a
    scan. Raises UnreadableFile for a folder that cannot be read.
    """
    endings = (*VOLUME_ENDINGS, *WRITTEN_AS)
    with reading(folder):
        named = [file for file in folder.iterdir() if file.name.lower().endswith(endings)]
        return sorted(
            file for file in named if not file.name.startswith(".") and (file.is_file() or leads_nowhere(file))
        )


@dataclass(frozen=True)
class _Job:
    """One scan on its way: read, segmented, written."""

    model: Model
    options: Options
    source: Source
    target: Path
    refusal: MedsegError | None = None
    report: Report = field(default_factory=Report)
    notes: list[str] = field(default_factory=list)

    @property
    def first(self) -> Path:
        return self.source if isinstance(self.source, Path) else self.source[0]

    def outputs(self) -> list[Path]:
        """Return the files that will be written."""
        values = [label.value for label in self.model.plan.labels if self.options.probabilities]
        ends = [*(f"probability_{value}" for value in values), *(["uncertainty"] if self.options.uncertainty else [])]
        return [self.target, *(_beside(self.target, end) for end in ends)]

    def read(self) -> Volume:
        if self.refusal:
            raise self.refusal
        with self.report.stage("read"):
            options = self.options
            if self.first.is_dir() and (beside_slices := len(volume_files(self.first))):
                self.notes.append(
                    f"The folder holds a DICOM series, which was segmented, and {beside_slices} volume file(s), which "
                    "were not. To segment one of those, give its own path."
                )
            volume = load(
                self.source,
                assume_orientation=options.assume_orientation,
                channels=len(self.model.plan.channels),
                modalities=() if options.anyway else modalities_of(self.model.plan),
            )
            if not options.anyway and self.first.is_file() and has_table(self.first, volume.array[:1]):
                raise InputError(
                    "This is a label map and no scan: the label table beside it names all its values. Give the scan, "
                    "or insist (--anyway).",
                    path=self.first,
                    reason="label_map",
                )
            return volume

    def segment(self, volume: Volume, progress: Progress | None) -> tuple[Volume, SoftMaps | None]:
        options, soft = self.options, None
        if options.probabilities or options.uncertainty or options.expected_volumes:
            folder = self.target.parent
            soft = SoftMaps(probabilities=options.probabilities, uncertainty=options.uncertainty, folder=folder)

        def show(done: int, total: int) -> None:
            if progress:
                progress(self.first.name, done, total)

        labels = self.model.segment(
            volume,
            roi=options.roi,
            step=options.step,
            mirror=options.mirror,
            reuse=options.reuse,
            crf=options.crf,
            soft=soft,
            progress=show,
            report=self.report,
        )
        return labels, soft

    def finish(self, labels: Volume, soft: SoftMaps | None) -> Outcome:
        with self.report.stage("measure"):
            measurements = tuple(measure(labels, self.model.plan.labels))
            if soft and self.options.expected_volumes:
                place = self.model.plan.output_of
                measurements = tuple(
                    replace(row, expected_volume_ml=soft.volumes_ml[place[row.value]]) for row in measurements
                )
        with self.report.stage("write"):
            # The labels come last: where they are, the rest is.
            # They are what is compared with a series, which is not looked through again for each map.
            header = None if self.first.is_dir() else self.first
            for end, volume in self._maps(soft) if soft else ():
                save(volume, _beside(self.target, end), source=header)
            self._write_labels(labels)
        view = labels.grid if self.options.roi is None else labels.grid.cropped(*labels.grid.covering(self.options.roi))
        odd = self.model.seen.oddities(view, measurements) if self.model.seen else ()
        return Outcome(self.source, self.target, measurements, self.report, warnings=(*self.notes, *odd))

    def _write_labels(self, labels: Volume) -> None:
        if is_object(self.target):
            from medseg.io.dicom_seg import save_dicom_seg

            save_dicom_seg(labels, self.target, source=self.first, table=self.model.plan.labels)
            return
        write_table(self.model.plan.labels, beside(self.target))
        save(labels, self.target, source=self.first)

    def _maps(self, soft: SoftMaps) -> Iterator[tuple[str, Volume]]:
        if soft.probabilities:
            for value, place in self.model.plan.output_of.items():
                yield f"probability_{value}", soft.probabilities.with_array(soft.probabilities.array[place][None])
        if soft.uncertainty:
            yield "uncertainty", soft.uncertainty


def _check_outputs(jobs: Sequence[_Job]) -> None:
    taken: set[Path] = set()
    for job in jobs:
        inputs = (job.source,) if isinstance(job.source, Path) else job.source
        for path in job.outputs():
            if is_object(path):
                _check_series(job.first, path)
                check_place(path, inputs)
            else:
                check_output(path, inputs)
            if path in taken:
                raise UsageError("Two scans would give one output: rename one, or move it elsewhere.", path=path)
            taken.add(path)


def _job_of(scan: Scan, model: Model, options: Options, target: Path) -> _Job:
    """Return the work on a scan of a folder, to be written to the folder `target` under its name."""
    ending = split_ending(scan.files[0].name)[1]
    written = target / f"{scan.name}{WRITTEN_AS.get(ending.lower(), ending)}"
    refusal = None if scan.is_complete else _incomplete(scan, model.plan)
    return _Job(model, options, scan.files if len(scan.files) > 1 else scan.files[0], written, refusal)


def _left_out(scans: Sequence[Scan], no_scans: Mapping[Path, str]) -> dict[Path, str]:
    """Return which scans of one file are none, and why; a channel may hold what it likes."""
    return {
        scan.files[0]: no_scans[scan.files[0]] for scan in scans if len(scan.files) == 1 and scan.files[0] in no_scans
    }


def _incomplete(scan: Scan, plan: Plan) -> InputError:
    found = ", ".join(f"{number:04d}" for number in scan.numbers)
    needed = ", ".join(f"{number:04d} ({channel.name})" for number, channel in enumerate(plan.channels))
    return InputError(
        f"The files of this scan have the numbers {found}, and the channels of the model are {needed}. Give one file "
        "for each channel and no other, or rename files whose numbers are not those of channels.",
        path=scan.files[0],
        reason="channels",
    )


def is_object(path: Path) -> bool:
    """Return whether labels of that name are a DICOM object."""
    return path.name.lower().endswith(".dcm")


def _check_series(source: Path, target: Path) -> None:
    with reading(source):
        if not source.is_dir():
            raise UsageError(
                "A DICOM SEG refers to the slices of a series: give the folder of one as the scan, or write .nii.gz.",
                path=target,
            )
        if target.is_file() and holds_slices(target):
            raise UsageError("The output would replace a slice of a scan: give it another name.", path=target)


def _beside(path: Path, end: str) -> Path:
    """Return the path of a file that stands beside `path` and whose name goes on with `end`."""
    ending = next((one for one in VOLUME_ENDINGS if path.name.lower().endswith(one)), ".nii.gz")
    return path.with_name(f"{stem(path)}_{end}{ending}")


def _settled(job: _Job, written: Future[Outcome]) -> Outcome:
    try:
        return written.result()
    except MedsegError as error:
        return Outcome(job.source, job.target, error=error)
    except Exception as error:  # noqa: BLE001 - as above
        return Outcome(job.source, job.target, error=unexpected(error))
