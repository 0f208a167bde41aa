"""The model card: what a model is, in words, beside its numbers."""

from __future__ import annotations

import json
from pathlib import Path

from medseg.io.files import written_whole
from medseg.model.plan import Plan


def write_card(folder: Path, plan: Plan, dataset: str, cases: int) -> None:
    """Write MODEL_CARD.md from the plan and the scores of the folds, and of all together. A card that exists stays.

    What the data are, who may use them and what the model is for cannot be derived: the card asks its owner for them.
    """
    card = folder / "MODEL_CARD.md"
    if card.is_file():
        return
    labels = ", ".join(f"{label.value} {label.name}" for label in plan.labels)
    spacing = " x ".join(f"{length:g}" for length in plan.spacing_mm)
    lines = [
        f"# {plan.name}",
        "",
        f"- Input: {', '.join(channel.name for channel in plan.channels)}, resampled to {spacing} mm",
        f"- Labels: {labels}",
        f"- Training data: {dataset}, {cases} cases. Origin, license and population: to be filled in.",
        "- Intended use: research. Not a medical device.",
        "",
        "## Scores on validation cases",
        "",
        "| fold | cases | label | Dice |",
        "|---|---|---|---|",
        *(row for file in (*sorted(folder.glob("fold_*.scores.json")), folder / "scores.json") for row in _rows(file)),
        "",
    ]
    with written_whole(card) as beside:
        beside.write_text("\n".join(lines), encoding="utf-8")


def _rows(file: Path) -> list[str]:
    if not file.is_file():
        return []
    scores = json.loads(file.read_text(encoding="utf-8"))
    fold = file.name.removesuffix("scores.json").removeprefix("fold_").removesuffix(".") or "all"
    dice = {
        label["name"]: "none there" if label["dice"] is None else f"{label['dice']:.3f}" for label in scores["labels"]
    }
    return [f"| {fold} | {len(scores['cases'])} | {name} | {value} |" for name, value in dice.items()]
