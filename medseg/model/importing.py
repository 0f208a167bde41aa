"""Models of other toolkits, turned once into model folders of medseg."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as serialize

from medseg.errors import ModelError, UsageError
from medseg.model.import_monai import INFERENCE, is_bundle, read_bundle
from medseg.model.import_nnunet import POSTPROCESSING, is_nnunet, read_nnunet
from medseg.model.imported import Imported
from medseg.model.plan import Plan
from medseg.model.stored import check_new, new_folder
from medseg.model.untrusted import unpacked
from medseg.model.weights import check_state, shapes_of
from medseg.volume import Grid

CHECKPOINTS = ("final", "best", "latest")

DEEPEST = 3
"""How many folders below the source a model may lie; nnU-Net's archives have DATASET/TRAINER__PLANS__CONFIGURATION."""


def import_model(
    source: str | PathLike[str],
    folder: str | PathLike[str],
    *,
    orientation: str | None = None,
    folds: Sequence[int] | None = None,
    checkpoint: str = "final",
    configuration: str | None = None,
) -> Plan:
    """Return the plan of a foreign model and write it, with its weights, as a model folder of medseg.

    `source` is a trained model of nnU-Net v2: its folder, one above it, or the zip archive that nnU-Net exports; or a
    MONAI bundle, as a folder or a zip archive. Where it holds several, `configuration` names one, such as 3d_fullres.
    `orientation` is what the model's training images had, such as RAS, where the model does not say; `folds` are by
    default all; `checkpoint` is final, best or latest; a bundle has one of each.
    Nothing of the source is run. Raises ModelError for a source that is damaged, unsafe or of a kind that medseg does
    not have, UsageError for a folder that holds something, OutputError where it cannot be written.
    """
    if checkpoint not in CHECKPOINTS:
        raise UsageError(f"A checkpoint is one of {', '.join(CHECKPOINTS)}; here it is {checkpoint!r}.")
    if orientation is not None:
        orientation = Grid((1, 1, 1), np.eye(4)).reoriented(orientation).orientation
    where = Path(folder)
    check_new(where)
    with _opened(Path(source)) as opened:
        model = _chosen(opened, configuration)
        if is_bundle(model):
            if folds is not None or checkpoint != "final":
                raise UsageError("A bundle of MONAI has one set of weights: leave folds and checkpoint away.")
            imported = read_bundle(model, orientation=orientation)
        else:
            imported = read_nnunet(model, orientation=orientation, folds=folds, checkpoint=checkpoint)
        with new_folder(where) as beside:
            _write_parts(imported, beside)
    if imported.plan.orientation == "as_stored":
        warnings.warn(
            "The model does not say how its training images were stored, and sees each image as that is stored. If you "
            "know it, import the model again with that orientation, such as RAS.",
            stacklevel=2,
        )
    return imported.plan


@contextmanager
def _opened(source: Path) -> Iterator[Path]:
    """Give a folder with the files of the source."""
    if source.is_dir():
        yield source
        return
    if not source.is_file() or not zipfile.is_zipfile(source):
        raise ModelError("A model is imported from a folder or a zip archive; this is neither.", path=source)
    with unpacked(source, _wanted) as folder:
        yield folder


def _wanted(name: str) -> bool:
    described = name.endswith(("plans.json", "dataset.json", "metadata.json", POSTPROCESSING, *INFERENCE))
    return described or "/checkpoint_" in name or ("models/" in name and name.endswith((".pt", ".ts")))


def _chosen(source: Path, configuration: str | None) -> Path:
    """Return the folder of the one model that the source holds, or that of a configuration."""
    candidates = [source, *(folder for depth in range(1, DEEPEST + 1) for folder in sorted(source.glob("*/" * depth)))]
    found = [(folder.name.split("__")[-1], folder) for folder in candidates if is_nnunet(folder) or is_bundle(folder)]
    if configuration is not None:
        found = [(name, model) for name, model in found if name == configuration]
    if len(found) != 1:
        names = ", ".join(sorted(name for name, _ in found))
        raise ModelError(
            f"One model is imported at a time, and the source holds {len(found)}"
            + (f": {names}. Choose one by its configuration, or give its own folder." if found else "."),
            path=source,
        )
    return found[0][1]


def _write_parts(imported: Imported, folder: Path) -> None:
    plan = imported.plan
    network = shapes_of(plan)
    for state in imported.folds.values():
        check_state(network, state)
    folder.mkdir(parents=True)
    plan.save(folder / "plan.json")
    for fold, state in imported.folds.items():
        weights = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
        (folder / f"fold_{fold}.safetensors").write_bytes(serialize(weights))
    (folder / "MODEL_CARD.md").write_text(_card(imported), encoding="utf-8")
    if imported.previous:
        _write_parts(imported.previous, folder / "previous")


def _card(imported: Imported) -> str:
    plan = imported.plan
    lines = [
        f"# {plan.name}",
        "",
        f"- Imported from: {imported.facts[0]}",
        *(f"- {fact}" for fact in imported.facts[1:]),
        f"- Input: {', '.join(channel.name for channel in plan.channels)}, orientation {plan.orientation}",
        f"- Labels: {', '.join(f'{label.value} {label.name}' for label in plan.labels)}",
        "- Training data, license and intended use: see where the model comes from. Not a medical device.",
        "",
    ]
    return "\n".join(lines)
