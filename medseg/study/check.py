"""Whether a pipeline can run here, found out before a night is spent on it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

from medseg.errors import UsageError
from medseg.model.crf import Neighbors, chosen_crf
from medseg.model.plan import Plan
from medseg.model.stored import find_model
from medseg.study.archive import opened
from medseg.study.choose import choose
from medseg.study.describe import series_names
from medseg.study.find import find_studies
from medseg.study.pipeline import Pipeline
from medseg.study.run import DICOM_OUTPUTS, WRITERS


def check_pipeline(pipeline: Pipeline) -> Path:
    """Return the folder of the pipeline's model, when everything the pipeline asks for is there.

    Raises UsageError with all that is not: channels and labels that the model does not have, outputs that are not
    known, a CRF that reaches too far; ModelError where a model itself is missing or damaged.
    """
    folder = find_model(pipeline.model)
    cleaned = [name for step in pipeline.cleanup for name in step.labels]
    problems = _misfits("model", folder, len(pipeline.channels), cleaned)
    problems += _too_wide(Plan.load(folder / "plan.json"), pipeline)
    if (localizer := pipeline.localizer) is not None:
        count = len(localizer.channels or pipeline.channels)
        problems += _misfits("localizer", find_model(localizer.model), count, localizer.labels)
    outputs = ", ".join(WRITERS)
    problems += [f"there is no output {name!r} but {outputs}" for name in pipeline.outputs if name not in WRITERS]
    if "picture" in pipeline.outputs and not find_spec("matplotlib"):
        problems.append('a picture needs matplotlib: pip install "medseg[report]"')
    if DICOM_OUTPUTS & set(pipeline.outputs) and not find_spec("highdicom"):
        problems.append("DICOM outputs need highdicom: pip install highdicom")
    if problems:
        raise UsageError(f"The pipeline cannot run: {'; '.join(problems)}.")
    return folder


def _misfits(what: str, folder: Path, channels: int, labels: Sequence[str]) -> list[str]:
    """Return why a model cannot be given so many channels, or asked for these labels."""
    plan = Plan.load(folder / "plan.json")
    problems = []
    if channels != len(plan.channels):
        names = ", ".join(channel.name for channel in plan.channels)
        problems.append(f"the {what} has {len(plan.channels)} channel(s) ({names}), not {channels}")
    known = {label.name for label in plan.labels}
    return problems + [f"the {what} has no label {name!r}" for name in dict.fromkeys(labels) if name not in known]


def _too_wide(plan: Plan, pipeline: Pipeline) -> list[str]:
    """Return why the CRF of a pipeline cannot be computed at the spacing of a plan."""
    crf = chosen_crf(plan.crf, pipeline.crf)
    try:
        if crf is not None:
            Neighbors.of(crf, plan.spacing_mm)
    except UsageError as error:
        return [str(error).rstrip(".")]
    return []


def explain(pipeline: Pipeline, path: str | PathLike[str]) -> list[dict[str, Any]]:
    """Return for every study at or below a path what the rules say of each of its series, and the refusal, as JSON.

    Raises UnreadableFile where the path is missing.
    """
    with opened(path) as place:
        studies = find_studies(place)
    explained = []
    for number, study in enumerate(studies, start=1):
        selection = choose(study.series, pipeline.channels, register=pipeline.registration is not None)
        refusal = study.problems[0] if study.problems else selection.refusal
        names = series_names(study)
        explained.append({
            "study": number,
            "choices": [
                {"channel": choice.channel, "series": name, "reason": reason}
                for choice in selection.choices
                for name, reason in zip(names, choice.reasons, strict=True)
            ],
            "refusal": None if refusal is None else {"reason": refusal.reason, "text": str(refusal)},
        })  # fmt: skip
    return explained
