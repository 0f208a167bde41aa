"""A trained model: load its folder, segment a volume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize

from medseg.errors import ModelError, UsageError
from medseg.io.files import written_whole
from medseg.model.export import argmax_onto
from medseg.model.networks import build_network
from medseg.model.plan import Plan
from medseg.model.preprocess import prepare
from medseg.process.patches import blend_weights, padding_to, tiles
from medseg.volume import Volume

if TYPE_CHECKING:
    from torch import Tensor, nn

SHIPPED = Path(__file__).parent.parent / "models"

Progress = Callable[[int, int], None]
"""Called with the number of tiles done and the number there are."""

Box = Sequence[Sequence[float]]
"""Two opposite corners, ((x, y, z), (x, y, z)), in mm of RAS+ world space."""


class Model:
    """A plan and the networks trained under it, one for each fold; their logits are averaged."""

    def __init__(self, plan: Plan, networks: Sequence[nn.Module], device: torch.device):
        self.plan = plan
        self.networks = [network.to(device).eval() for network in networks]
        self.device = device

    @classmethod
    def load(
        cls, folder: str | PathLike[str], *, device: str | None = None, folds: Sequence[int] | None = None
    ) -> Model:
        """Return the model in a folder, or the shipped one of that name, on `device` (by default the fastest there is).

        All folds that are there take part, or those in `folds`.
        Raises ModelError where a file is missing, damaged, or does not fit the plan, and UsageError for an unknown
        device.
        """
        where = find_model(folder)
        plan = Plan.load(where / "plan.json")
        files = sorted(where.glob("fold_*.safetensors"))
        if folds is not None:
            files = [where / f"fold_{fold}.safetensors" for fold in folds]
        if not files:
            raise ModelError("The model has no weights: its folder needs at least one fold_N.safetensors.", path=where)
        return cls(plan, [_load_network(plan, file) for file in files], pick_device(device))

    def segment(
        self, volume: Volume, *, roi: Box | None = None, step: float = 0.5, progress: Progress | None = None
    ) -> Volume:
        """Return the label map of an image (C, I, J, K), on its grid, in the smallest unsigned type that holds it.

        With `roi` the network sees that box alone, intensities are normalized inside it, and the rest is background.
        `step` is the distance between tiles as a share of the patch. Raises InputError for an image that does not fit
        the plan, GeometryError for a box outside it.
        """
        values = np.array([0, *(label.value for label in self.plan.labels)])
        values = values.astype(np.min_scalar_type(int(values.max())))
        start, stop = ((0, 0, 0), volume.grid.shape) if roi is None else volume.grid.covering(roi)
        part = volume.cropped(start, stop)
        prepared = prepare(part, self.plan)
        winners = argmax_onto(self.logits(prepared, step=step, progress=progress), prepared.grid, part.grid)
        labels = np.zeros((1, *volume.grid.shape), values.dtype)
        labels[0][tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = values[winners]
        return volume.with_array(labels)

    def logits(self, prepared: Volume, *, step: float = 0.5, progress: Progress | None = None) -> Tensor:
        """Return the logits (outputs, I, J, K) of a prepared image: tiles blended by a Gaussian, folds averaged."""
        patch = self.plan.patch
        padding = padding_to(prepared.grid.shape, patch)
        image = torch.from_numpy(np.pad(prepared.array, ((0, 0), *padding))).to(self.device)
        weights = torch.from_numpy(blend_weights(patch)).to(self.device)
        total = torch.zeros((self.plan.outputs, *image.shape[1:]), device=self.device)
        weight = torch.zeros(image.shape[1:], device=self.device)
        places = list(tiles(image.shape[1:], patch, step))
        with torch.inference_mode():
            for done, place in enumerate(places, start=1):
                total[(slice(None), *place)] += self._tile(image[(None, slice(None), *place)]) * weights
                weight[place] += weights
                if progress:
                    progress(done, len(places))
        total /= weight
        inner = (slice(before, before + size) for (before, _), size in zip(padding, prepared.grid.shape, strict=True))
        return total[(slice(None), *inner)]

    def _tile(self, image: Tensor) -> Tensor:
        logits = torch.stack([network(image)[0].float() for network in self.networks])
        return logits.mean(dim=0)


def save_weights(network: nn.Module, path: str | PathLike[str]) -> None:
    """Write a network's weights as safetensors, whole or not at all."""
    with written_whole(path) as beside:
        beside.write_bytes(serialize(state_of(network)))


def state_of(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights, each tensor once: DynUNet lists its blocks a second time below `skip_layers`."""
    state = network.state_dict().items()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state if not name.startswith("skip_layers.")}


def load_state(network: nn.Module, state: dict[str, Tensor], *, path: Path | None = None) -> None:
    """Put weights into a network. Raises ModelError where names or shapes differ from what its plan makes."""
    expected = state_of(network)
    wrong = sorted(set(expected) ^ set(state))
    wrong += sorted(name for name in set(expected) & set(state) if expected[name].shape != state[name].shape)
    if wrong:
        raise ModelError(
            f"The weights do not fit the plan: {len(wrong)} tensors differ, the first is {wrong[0]}. "
            "Use plan.json and weights of the same model.",
            path=path,
            reason="weights",
        )
    network.load_state_dict(state, strict=False)


def find_model(name: str | PathLike[str]) -> Path:
    """Return the folder of a model: the path, or the shipped model of that name. Raises ModelError for neither."""
    path = Path(name)
    if path.is_dir():
        return path
    if (SHIPPED / path.name / "plan.json").is_file() and path.name == str(name):
        return SHIPPED / path.name
    shipped = ", ".join(sorted(plan.parent.name for plan in SHIPPED.glob("*/plan.json"))) or "none"
    raise ModelError(f"No model is there: neither a folder nor one that medseg ships ({shipped}).", path=path)


def pick_device(name: str | None) -> torch.device:
    """Return the named torch device; by default CUDA, else MPS, else CPU. Raises UsageError for an absent one."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise UsageError(
            f"There is no device {name!r} here; leave the option away, or say cpu, cuda or mps."
        ) from error
    return device


def _load_network(plan: Plan, file: Path) -> nn.Module:
    network = build_network(plan.network, len(plan.channels), plan.outputs)
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            "The weights cannot be read: the file is damaged or no safetensors file.", path=file
        ) from error
    load_state(network, state, path=file)
    return network
