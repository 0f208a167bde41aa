"""The verbs import and prune of the command line: models that are made out of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.cli_terminal import out
from medseg.errors import UsageError


def import_(
    source: Annotated[
        Path, typer.Argument(help="A trained nnU-Net v2 model or a MONAI bundle: its folder or zip archive.")
    ],
    model: Annotated[Path, typer.Argument(help="The model folder to write; it must be empty or not exist.")],
    orientation: Annotated[
        str | None, typer.Option(help="How the model's training images lay, such as RAS, where it does not say.")
    ] = None,
    configuration: Annotated[
        str | None, typer.Option(help="Which one of several, such as 3d_fullres.", metavar="NAME")
    ] = None,
    folds: Annotated[str | None, typer.Option(help="Numbers such as 0,1; by default all that are there.")] = None,
    checkpoint: Annotated[str, typer.Option(help="final, best or latest.")] = "final",
) -> None:
    """Turn a model of nnU-Net v2 or a MONAI bundle into a model folder. Nothing of the model is run."""
    from medseg.model.importing import import_model

    plan = import_model(
        source,
        model,
        orientation=orientation,
        configuration=configuration,
        folds=None if folds is None else _whole_numbers(folds),
        checkpoint=checkpoint,
    )
    counts = f"{len(plan.channels)} channel(s), {len(plan.labels)} label(s), orientation {plan.orientation}"
    out.print(f"{plan.name}: {counts}")


def prune(
    model: Annotated[Path, typer.Argument(help="A trained model whose network is unet_plus_plus.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="The model folder to write; it must be empty or not exist.")
    ],
    depth: Annotated[int, typer.Option(help="Resolutions of the network to keep, from 2 on.")],
) -> None:
    """Keep the first resolutions of a trained U-Net++ as a smaller and faster model."""
    from medseg.model.prune import prune_model
    from medseg.model.stored import find_model

    prune_model(model, target, depth=depth)
    before, after = (
        sum(file.stat().st_size for file in folder.glob("fold_*.safetensors")) / 1e6
        for folder in (find_model(model), target)
    )
    out.print(
        f"Weights: {before:.2f} MB before, {after:.2f} MB now. Scores of the whole network do not hold for it: "
        "medseg evaluate finds its own.",
        soft_wrap=True,
    )


def _whole_numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"Folds are whole numbers, such as 0,1; not {text!r}.")
    return tuple(int(part) for part in parts)
