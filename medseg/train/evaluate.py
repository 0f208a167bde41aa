"""A model scored on labelled cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from medseg.model.segmenter import Model
from medseg.report.metrics import TOLERANCE_MM, CaseScores, Scores, compare_labels
from medseg.train.dataset import Case
from medseg.train.fingerprint import read_case

Progress = Callable[[int, int], None]


def evaluate(
    model: Model, cases: Iterable[Case], *, tolerance_mm: float = TOLERANCE_MM, progress: Progress | None = None
) -> Scores:
    """Return the scores of a model's label maps against the cases' own, each case segmented whole on its own grid.

    Structures that were not drawn in a case are not scored there. `tolerance_mm` is that of `compare_labels`.

    Raises what reading or segmenting a case raises.
    """
    listed = list(cases)
    scored = []
    for done, case in enumerate(listed, start=1):
        image, reference = read_case(case)
        drawn = [label for label in model.plan.labels if label.value not in case.undrawn]
        scores = compare_labels(model.segment(image), reference, drawn, tolerance_mm=tolerance_mm)
        scored.append(CaseScores(case.name, tuple(scores), group=case.group))
        if progress:
            progress(done, len(listed))
    return Scores(tuple(scored))
