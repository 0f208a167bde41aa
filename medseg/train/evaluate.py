"""A model scored on labelled cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np

from medseg.errors import MedsegError, ModelError
from medseg.model.plan import Plan
from medseg.model.segmenter import Model
from medseg.report.metrics import TOLERANCE_MM, CaseScores, Scores, compare_labels
from medseg.train.check import read_case
from medseg.train.dataset import Case, Dataset
from medseg.train.dataset_json import members_of
from medseg.volume import Volume

Progress = Callable[[int, int], None]


def evaluate(
    model: Model, cases: Iterable[Case], *, tolerance_mm: float = TOLERANCE_MM, progress: Progress | None = None
) -> Scores:
    """Return the scores of a model's label maps against the cases' own, each case segmented whole on its own grid.

    Structures that were not drawn in a case are not scored there, nor are voxels that are to be ignored. A case that
    cannot be segmented has failed: nothing was found in it. `tolerance_mm` is that of `compare_labels`.

    Raises what reading a case raises.
    """
    listed = list(cases)
    scored = []
    for done, case in enumerate(listed, start=1):
        image, reference = read_case(case)
        failure = None
        try:
            found = model.segment(image)
        except MedsegError as error:
            found, failure = reference.with_array(np.zeros(reference.array.shape, np.uint8)), error.reason
        scored.append(compare_case(found, reference, case, model.plan, tolerance_mm, failure))
        if progress:
            progress(done, len(listed))
    return Scores(tuple(scored))


def require_labels(plan: Plan, dataset: Dataset) -> None:
    """Raise ModelError where a label of a plan means nothing, or other values, in a dataset."""
    unknown = members_of(plan.labels, plan.regions).items() - dataset.meaning.members.items()
    if unknown:
        raise ModelError(
            f"The model marks {_listed(value for value, _ in unknown)}, and the dataset has "
            f"{_listed(dataset.meaning.members)}. Give references with the labels of the model.",
            reason="labels",
        )


def _listed(values: Iterable[int]) -> str:
    return "values " + ", ".join(map(str, sorted(values)))


def drawn_alone(scores: Scores, facts: Mapping[str, tuple[frozenset[int], str]]) -> Scores:
    """Return scores without those of labels that `read_facts` says were not drawn in a case, and with the groups."""
    cases = []
    for case in scores.cases:
        undrawn, group = facts.get(case.name, (frozenset(), ""))
        drawn = tuple(label for label in case.labels if label.value not in undrawn)
        cases.append(replace(case, labels=drawn, group=group))
    return Scores(tuple(cases))


def compare_case(
    found: Volume, reference: Volume, case: Case, plan: Plan, tolerance_mm: float | None, failure: str | None = None
) -> CaseScores:
    """Return the scores of a label map of a case for each label of a plan that was drawn in it.

    Without a tolerance surfaces are not compared; `failure` is why there was nothing to find.
    """
    drawn = [label for label in plan.labels if label.value not in case.undrawn]
    members = members_of(plan.labels, plan.regions)
    scores = compare_labels(found, reference, drawn, tolerance_mm=tolerance_mm, members=members, ignore=case.ignore)
    return CaseScores(case.name, tuple(scores), failure, case.group)
