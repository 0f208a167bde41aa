"""One study through a pipeline: read and choose, segment, tidy up, write. Each stage can run in a thread of its own."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import medseg
from medseg.errors import GeometryError, InputError, MedsegError, UnreadableFile, unexpected
from medseg.io import save
from medseg.io.dicom_seg import save_dicom_seg
from medseg.io.dicom_series import Series, read_series, require_modality
from medseg.io.label_table import write_table
from medseg.io.rtstruct import save_rtstruct
from medseg.io.structures import beside
from medseg.labels import Label
from medseg.process.channels import onto_first
from medseg.process.cleanup import drop_small, fill_holes, keep_largest
from medseg.process.register import register_rigid
from medseg.report.dicom_sr import save_dicom_sr
from medseg.report.measurements import Measurement, measure, save_measurements
from medseg.report.pictures import draw_overlay
from medseg.study.choose import Selection, choose, share_space
from medseg.study.describe import study_facts
from medseg.study.find import Study, read_studies
from medseg.study.ledger import sha256
from medseg.study.localize import localize, segment_box
from medseg.study.pipeline import Cleanup, Pipeline
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.model.segmenter import Model

PACKAGES = ("numpy", "scipy", "pydicom", "nibabel")
"""Packages beside the network's runtime whose version can change a result."""


@dataclass
class Job:
    """A study on its way: its keyed name, its files with theirs, and what has come out of it so far.

    `facts` is what the manifest will say. `image`, `labels` and `series` are there once they were read or made.
    """

    study: str
    files: dict[Path, str]
    facts: dict[str, Any] = field(default_factory=dict)
    image: Volume | None = None
    labels: Volume | None = None
    series: tuple[Series, ...] = ()


@dataclass(frozen=True)
class Result:
    """What an output is made of: image and labels on one grid, the label table, measurements, and the source series."""

    image: Volume
    labels: Volume
    table: tuple[Label, ...]
    measurements: tuple[Measurement, ...]
    series: tuple[Series, ...]


def _write_nifti(result: Result, path: Path) -> None:
    write_table(result.table, beside(path))
    save(result.labels, path)


def _write_measurements(result: Result, path: Path) -> None:
    save_measurements(result.measurements, path)


def _write_picture(result: Result, path: Path) -> None:
    draw_overlay(result.image, result.labels, result.table, path)


def _write_seg(result: Result, path: Path) -> None:
    save_dicom_seg(result.labels, path, source=result.series[0], table=result.table)


def _write_labelmap(result: Result, path: Path) -> None:
    save_dicom_seg(result.labels, path, source=result.series[0], table=result.table, labelmap=True)


def _write_rtstruct(result: Result, path: Path) -> None:
    save_rtstruct(result.labels, path, source=result.series[0], table=result.table)


def _write_sr(result: Result, path: Path) -> None:
    segs = (path.with_name(WRITERS[name][0]) for name in ("seg", "seg_labelmap"))
    seg = next((file for file in segs if file.is_file()), None)
    save_dicom_sr(result.measurements, path, source=result.series[0], table=result.table, segmentation=seg)


Writer = Callable[[Result, Path], None]

WRITERS: dict[str, tuple[str, Writer]] = {
    "nifti": ("labels.nii.gz", _write_nifti),
    "json": ("measurements.json", _write_measurements),
    "csv": ("measurements.csv", _write_measurements),
    "picture": ("picture.png", _write_picture),
    "seg": ("labels.seg.dcm", _write_seg),
    "seg_labelmap": ("labels.labelmap.dcm", _write_labelmap),
    "rtstruct": ("labels.rtstruct.dcm", _write_rtstruct),
    "sr": ("measurements.sr.dcm", _write_sr),
}
"""Outputs that a pipeline can ask for: the file's name, and what writes it, in the order of writing."""

DICOM_OUTPUTS = frozenset({"seg", "seg_labelmap", "rtstruct", "sr"})
"""Outputs that refer to the slices of the source."""


def import_ahead(outputs: Sequence[str]) -> None:
    """Import what the stages need, before they do so in several threads at once.

    Two threads that meet in a circle of imports see modules half made, and what fails then looks like a bad header.
    """
    names = ["pydicom.pixels.utils", "pydicom.pixels.decoders.base"]
    if DICOM_OUTPUTS & set(outputs):
        names += ["highdicom.seg", "highdicom.sr"]
    if "picture" in outputs:
        names += ["matplotlib.backends.backend_agg", "matplotlib.patheffects"]
    for name in names:
        import_module(name)


def read_job(job: Job, pipeline: Pipeline) -> None:
    """Find the series of a study, choose the channels, and read them into `job.image`.

    Raises UnreadableFile where any file of the study is damaged: a missing end would not be noticed. Raises what
    refuses the study, and what reading pixels raises.
    """
    study = only_study(read_studies([*job.files]))
    selection = choose(study.series, pipeline.channels, register=pipeline.registration is not None)
    job.facts["series"] = _series_facts(study_facts(study), selection)
    if selection.refusal is not None:
        raise selection.refusal
    job.series = selection.series
    used = sorted({part.path for series in job.series for part in series.slices}, key=lambda path: job.files[path])
    try:
        job.facts["inputs"] = {"used": [job.files[path] for path in used], "sha256": sha256(*used)}
    except OSError as error:
        raise UnreadableFile(f"A file of the study could not be read: {error.strerror}.") from error
    job.image, job.facts["registrations"] = read_channels(job.series)


def only_study(studies: Sequence[Study]) -> Study:
    """Return the one study that files are of. Raises what is wrong in it, and InputError for none and for several."""
    problems = [problem for study in studies for problem in study.problems]
    if problems:
        raise problems[0]
    if not studies:
        raise InputError(
            "No DICOM file is in the archive; archives inside of it are not opened: unpack them yourself.",
            reason="no_dicom",
        )
    if len(studies) > 1:
        raise InputError(f"Expected the files of one study, found {len(studies)}.", reason="several_studies")
    return studies[0]


def segment_job(job: Job, pipeline: Pipeline, model: Model, localizer: Model | None = None) -> None:
    """Make `job.labels` from `job.image`: the networks, then the clean-up.

    Warns where the result is unlike the cases that the model was trained on. Raises what `segment` does, and InputError
    (`modality`) for a series of another modality than the model's, unless the pipeline says `anyway`.
    """
    from medseg.model.timing import Report

    if job.image is None:
        raise InputError("The study has not been read.")
    if not pipeline.anyway:
        _check_modalities(job.series, model)
    view = job.image.grid
    report = Report()
    if pipeline.localizer is None:
        labels = model.segment(job.image, roi=pipeline.roi, mirror=pipeline.mirror, crf=pipeline.crf, report=report)
        view = view if pipeline.roi is None else view.cropped(*view.covering(pipeline.roi))
    elif localizer is None:
        raise InputError("The localizer of the pipeline has not been loaded.")
    else:
        channels = [rule.name for rule in pipeline.channels]
        box, job.facts["localizer"] = localize(job.image, channels, pipeline.localizer, localizer)
        labels = segment_box(job.image, box, model, pipeline, report)
        view = view if box is None else view.cropped(*box)
    with report.stage("cleanup"):
        for step in pipeline.cleanup:
            labels = tidy(labels, step, model.plan.labels)
    job.labels = labels
    job.facts |= {"run": report.to_dict()}
    for text in model.seen.oddities(view, measure(labels, model.plan.labels)) if model.seen else ():
        warnings.warn(text, stacklevel=1)


def _check_modalities(series: Sequence[Series], model: Model) -> None:
    from medseg.model.intended import modalities_of

    for one, wanted in zip(series, modalities_of(model.plan), strict=False):
        require_modality(one.modality, wanted)


def write_job(job: Job, pipeline: Pipeline, table: tuple[Label, ...], folder: Path) -> None:
    """Measure the labels and write the outputs of the pipeline to `folder`. Raises OutputError.

    DICOM outputs for a source that nothing can refer to are left out, with the reason in `job.facts["not_written"]`.
    """
    if job.image is None or job.labels is None:
        raise InputError("The study has not been segmented.")
    measurements = tuple(measure(job.labels, table, job.image))
    job.facts["labels"] = [
        {"value": one.value, "name": one.name, "volume_ml": round(one.volume_ml, 6)} for one in measurements
    ]
    result = Result(job.image, job.labels, table, measurements, job.series)
    job.facts["not_written"] = {}
    for name, (file, write) in WRITERS.items():
        if name not in pipeline.outputs:
            continue
        try:
            write(result, folder / file)
        except MedsegError as error:
            if name not in DICOM_OUTPUTS or error.reason != "unreferable_source":
                raise
            job.facts["not_written"][name] = {"reason": error.reason, "text": str(error)}


def tidy(labels: Volume, step: Cleanup, table: Sequence[Label]) -> Volume:
    """Return labels after one clean-up step of a pipeline."""
    values = [label.value for label in table if not step.labels or label.name in step.labels]
    if step.keep_largest:
        labels = keep_largest(labels, values)
    if step.fill_holes:
        labels = fill_holes(labels, values)
    if step.minimal_ml is not None:
        labels = drop_small(labels, values, step.minimal_ml)
    return labels


def ending(error: BaseException) -> dict[str, str]:
    """Return status, reason and text of what ended a study, without a word that a file or a third party chose.

    A study is refused where it does not suit the pipeline or cannot be read right, and failed where something broke.
    """
    refused = isinstance(error, InputError | GeometryError) and not isinstance(error, UnreadableFile)
    known = error if isinstance(error, MedsegError) else unexpected(error)
    return {"status": "refused" if refused else "failed", "reason": known.reason, "text": str(known)}


def versions() -> dict[str, str]:
    """Return the versions of medseg and of what it computes with, beside those of the runtime."""
    installed = {name: version(name) for name in PACKAGES}
    return {"medseg": medseg.__version__, "python": platform.python_version(), **installed}


def read_channels(series: Sequence[Series]) -> tuple[Volume, list[dict[str, Any]]]:
    """Return the series as channels on the grid of the first, and how those in another space were registered to it.

    Raises GeometryError (`registration`) where one cannot be brought into the space of the first.
    """
    image = read_series(series[0])
    grid, arrays, facts = image.grid, [image.array], []
    for number, one in enumerate(series[1:], start=1):
        channel = read_series(one)
        if not share_space(series[0], one):
            registration = register_rigid(channel, image)
            channel = registration.applied(channel)
            facts.append({"channel": number, **registration.to_dict()})
        arrays.append(onto_first(channel, grid, modality=one.modality))
    return Volume(np.concatenate(arrays), grid), facts


def _series_facts(facts: Sequence[Mapping[str, Any]], selection: Selection) -> list[dict[str, Any]]:
    """Return the facts of every series with what each channel's rule says of it."""
    return [
        {**one, "channels": {choice.channel: choice.reasons[place] for choice in selection.choices}}
        for place, one in enumerate(facts)
    ]
