"""Which labels are better with their largest piece alone, found by cross-validation.

The rule is nnU-Net's (Isensee et al., Nature Methods 2021, supplementary note 2): first all labels taken together, if
the mean Dice rises and that of no label falls; then each label, if its own Dice rises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.io import load
from medseg.labels import label_map
from medseg.model.plan import Plan
from medseg.process.cleanup import keep_largest_piece
from medseg.report.metrics import CaseScores, LabelScore, Scores
from medseg.train.dataset import Case
from medseg.train.dataset_json import members_of
from medseg.train.evaluate import compare_case
from medseg.volume import Volume, box_of

Groups = tuple[tuple[int, ...], ...]
Reader = Callable[[Path, Volume], tuple[Volume, str | None]]


@dataclass
class _Tried:
    """Scores of all cases as they are, and with the largest piece of each label alone."""

    plain: list[CaseScores] = field(default_factory=list)
    alone: list[CaseScores] = field(default_factory=list)

    def add(self, case: Case, found: Volume, reference: Volume, plan: Plan) -> None:
        members = members_of(plan.labels, plan.regions)
        plain = compare_case(found, reference, case, plan, None)
        truth = label_map(reference)
        alone = [_without_pieces(one, found.array[0], truth, members[one.value], case.ignore) for one in plain.labels]
        self.plain.append(plain)
        self.alone.append(replace(plain, labels=tuple(alone)))


def choose_largest(cases: Sequence[tuple[Case, Path]], plan: Plan, read: Reader) -> tuple[Groups, list[dict[str, Any]]]:
    """Return the groups of labels to keep the largest piece of, and what was tried, with the mean Dice of each.

    `cases` are the validation cases of all folds with the files of their label maps, without any clean-up. A case
    without one counts as one in which nothing was found.
    """
    every = tuple(label.value for label in plan.labels)
    before, after = _Tried(), _Tried()
    for case, file in cases:
        reference = load(case.label)
        found, _ = read(file, reference)
        before.add(case, found, reference, plan)
        keep_largest_piece(found.array[0], every)
        after.add(case, found, reference, plan)
    plain, together = _dice(before.plain), _dice(after.plain)
    # A label that no reference has is gone where all that was found of it was small pieces: it has no Dice any more.
    both = [value for value in plain if value in together]
    tried = []
    kept = False
    if both:
        old, new = (fmean(dice[value] for value in both) for dice in (plain, together))
        kept = new > old and all(together[value] >= plain[value] for value in both)
        tried.append(_line([label.name for label in plan.labels], old, new, kept))
    groups = [every] if kept else []
    base, alone = (together, _dice(after.alone)) if kept else (plain, _dice(before.alone))
    for label in plan.labels if len(plan.labels) > 1 else ():
        if label.value in base:
            kept = alone[label.value] > base[label.value]
            tried.append(_line([label.name], base[label.value], alone[label.value], kept))
            groups += [members_of(plan.labels, plan.regions)[label.value]] if kept else []
    return tuple(groups), tried


def _line(labels: list[str], before: float, after: float, kept: bool) -> dict[str, Any]:
    return {"largest_piece_of": labels, "dice_before": before, "dice_after": after, "kept": kept}


def _dice(cases: Sequence[CaseScores]) -> dict[int, float]:
    """Return the mean Dice of each label that is there in some case."""
    means = Scores(tuple(cases)).label_means
    return {value: score["dice"] for value, score in means.items() if not np.isnan(score["dice"])}


def _without_pieces(
    score: LabelScore,
    found: NDArray[np.unsignedinteger],
    truth: NDArray[np.integer[Any]],
    members: Sequence[int],
    ignore: int | None,
) -> LabelScore:
    """Return the score of a label of which the largest piece alone is left."""
    inside = np.isin(found, members)
    box = box_of(inside)
    if box is None:
        return score
    part = np.where(inside[box], found[box], 0)
    keep_largest_piece(part, members)
    lost = inside[box] & (part == 0)
    if ignore is not None:
        lost &= truth[box] != ignore
    right = int((lost & np.isin(truth[box], members)).sum())
    return replace(
        score,
        true_positives=score.true_positives - right,
        false_positives=score.false_positives - (int(lost.sum()) - right),
        false_negatives=score.false_negatives + right,
    )
