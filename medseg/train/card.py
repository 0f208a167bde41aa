"""The model card: what a model is, in words, beside its numbers."""

from __future__ import annotations

from itertools import dropwhile
from pathlib import Path
from typing import Any

from medseg.errors import ModelError
from medseg.io.files import written_whole
from medseg.io.text import read_json
from medseg.model.plan import Plan

SCORES = "## Scores on validation cases"

UNSCORED = (
    "| none | no case was kept aside, so that these weights have no scores: those of cross-validation "
    "(medseg train --fold all) say what to expect | | | |"
)
"""The row of weights that were trained on all cases."""


def write_card(folder: Path, plan: Plan, dataset: str, cases: int) -> None:
    """Write MODEL_CARD.md from the plan and the scores of the folds, and of all together.

    What the data are, who may use them and what the model is for cannot be derived: the card asks its owner for them.
    Of a card that exists, only the table of scores is renewed.
    """
    card = folder / "MODEL_CARD.md"
    files = (*sorted(folder.glob("fold_*.scores.json")), folder / "scores.json")
    unscored = [UNSCORED] if (folder / "fold_none.safetensors").is_file() else []
    table = [
        "",
        "| fold | label | Dice | cases with it | missed |",
        "|---|---|---|---|---|",
        *(row for file in files for row in _rows(file)),
        *unscored,
    ]
    # What its owner wrote stays as it is, in whatever encoding.
    text = card.read_text(encoding="utf-8", errors="surrogateescape") if card.is_file() else ""
    lines = text.splitlines() or _first_lines(plan, dataset, cases)
    if SCORES not in lines:
        return
    place = lines.index(SCORES) + 1
    after = list(dropwhile(lambda line: not line or line.startswith("|"), lines[place:]))
    with written_whole(card) as beside:
        written = "\n".join([*lines[:place], *table, "", *after]).rstrip() + "\n"
        beside.write_text(written, encoding="utf-8", errors="surrogateescape")


def _first_lines(plan: Plan, dataset: str, cases: int) -> list[str]:
    labels = ", ".join(f"{label.value} {label.name}" for label in plan.labels)
    spacing = " x ".join(f"{length:g}" for length in plan.spacing_mm)
    return [
        f"# {plan.name}",
        "",
        f"- Input: {', '.join(channel.name for channel in plan.channels)}, resampled to {spacing} mm",
        f"- Labels: {labels}",
        f"- Training data: {dataset}, {cases} cases. Origin, license and population: to be filled in.",
        "- Intended use: research. Not a medical device.",
        "",
        SCORES,
    ]


def _rows(file: Path) -> list[str]:
    if not file.is_file():
        return []
    scores = read_json(file, "The file of scores", ModelError)
    fold = file.name.removesuffix("scores.json").removeprefix("fold_").removesuffix(".") or "all"
    try:
        rows = [(label, _counts(label["name"], scores["cases"])) for label in scores["labels"]]
        return [
            f"| {fold} | {label['name']} | {'none there' if label['dice'] is None else format(label['dice'], '.3f')} | "
            f"{count} of {len(scores['cases'])} | {missed} |"
            for label, (count, missed) in rows
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError("The file of scores is damaged. Delete it to have it written anew.", path=file) from error


def _counts(name: str, cases: list[dict[str, Any]]) -> tuple[int, int]:
    """Return in how many cases a label has a Dice, and in how many of these it was there and nothing was found."""
    own = [one for case in cases for one in case["labels"] if one["name"] == name and one["dice"] is not None]
    return len(own), sum(one["true_positives"] + one["false_positives"] == 0 for one in own)
