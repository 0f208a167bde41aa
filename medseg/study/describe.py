"""What studies hold, in a few facts on each stack of slices, and nothing about the patient."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import UnreadableFile
from medseg.io import VOLUME_ENDINGS
from medseg.io.dicom_geometry import stack_measures
from medseg.io.dicom_series import Series
from medseg.study.archive import opened
from medseg.study.find import Study, find_studies
from medseg.study.patterns import LONGEST
from medseg.study.shown import shown_modality, shown_number


def describe_studies(path: str | PathLike[str], *, descriptions: bool = False) -> dict[str, Any]:
    """Return facts and verdict of every stack in a folder, DICOMDIR or .zip, and what could not be read, as JSON does.

    Studies, series and parts of series are told apart by numbers. Descriptions are free text, which can hold a name:
    they are left out unless asked for. Raises UnreadableFile where there is no DICOM file.
    """
    with opened(path) as place:
        studies = find_studies(place)
    if not studies:
        volumes = any(file.name.lower().endswith(VOLUME_ENDINGS) for file in Path(path).rglob("*"))
        hint = ", but there are volumes: name one of them" if volumes else ""
        raise UnreadableFile(f"There is no DICOM file here{hint}.", path=path, reason="no_dicom")
    numbered = [*enumerate(studies, start=1)]
    return {
        "series": [
            {"study": number, **facts} for number, study in numbered for facts in study_facts(study, descriptions)
        ],
        "problems": [
            {"study": number, "reason": error.reason, "text": str(error)}
            for number, study in numbered
            for error in study.problems
        ],
    }


def study_facts(study: Study, descriptions: bool = False) -> list[dict[str, Any]]:
    """Return the facts of each stack of a study, as JSON takes them; `part` counts the stacks of one series."""
    parts: dict[str, int] = {}
    rows = []
    for series in study.series:
        parts[series.uid] = parts.get(series.uid, 0) + 1
        rows.append(_facts(series, parts[series.uid], descriptions))
    return rows


def series_names(study: Study) -> list[str]:
    """Return what to call each stack of a study: the number of its series and, where that has parts, its own."""
    facts = study_facts(study)
    parted = {one["series"] for one in facts if one["part"] > 1}
    return [f"{one['series']}/{one['part']}" if one["series"] in parted else one["series"] for one in facts]


def _facts(series: Series, part: int, descriptions: bool) -> dict[str, Any]:
    grid = series.grid or series.regular_grid
    facts: dict[str, Any] = {"series": shown_number(series.number), "part": part}
    facts["modality"] = shown_modality(series.modality)
    if descriptions:
        facts["description"] = series.description[:LONGEST]
    facts |= {"slices": series.n_slices, "matrix": list(series.slices[0].shape)}
    if grid is not None:
        facts |= {
            "spacing_mm": [round(length, 4) for length in grid.spacing_mm],
            "orientation": grid.orientation,
            "center_mm": [round(x, 3) for x in grid.to_world((np.asarray(grid.shape) - 1) / 2).tolist()],
        }
    planes = [part.plane for part in series.slices if part.plane is not None]
    if len(planes) == series.n_slices > 1:
        facts |= {name: round(value, 4) for name, value in stack_measures(np.array(planes)).items()}
    refusal = series.refusal
    return facts | {
        "verdict": series.verdict,
        "reason": None if refusal is None else refusal.reason,
        "text": None if refusal is None else str(refusal),
    }
