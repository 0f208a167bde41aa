"""A trained model: load its folder, segment a volume."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cached_property, partial
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from medseg.cores import memory_bytes
from medseg.errors import InputError, ModelError, UsageError
from medseg.io import AnyPath, load
from medseg.model.crf import CRF, chosen_crf
from medseg.model.intended import Seen, kept_seen, modalities_of
from medseg.model.mean_field import refined
from medseg.model.plan import Plan
from medseg.model.predict import Predictor
from medseg.model.preprocess import box_to_see, nearest_scores, network_grid, prepare, with_labels
from medseg.model.runtime import Runtime, make_runtime
from medseg.model.soft import SoftMaps
from medseg.model.stored import find_model
from medseg.model.stream import Rows, pieces
from medseg.model.timing import Report
from medseg.model.weights import load_network
from medseg.model.window import Progress, Window, finished_rows
from medseg.networks.build import placed
from medseg.process.cleanup import keep_largest_piece
from medseg.process.patches import padding_to
from medseg.volume import Volume

if TYPE_CHECKING:
    from torch import Tensor, nn

GPU_BATCH = 4
"""Tiles that a GPU sees at once; where they do not fit, fewer. A CPU is busy with one."""

STEP = 0.5
"""Between tiles, as a share of the patch, where neither plan nor caller say otherwise."""

MOST_NUMBERS = 2**34
"""Numbers that an image may have as the network sees it: 64 GB. More comes of a wrong unit, or of an attack."""

Box = Sequence[Sequence[float]]
"""Two opposite corners, ((x, y, z), (x, y, z)), in mm of RAS+ world space."""


class Model:
    """A plan and the networks trained under it, one for each fold; their logits are averaged."""

    def __init__(
        self,
        plan: Plan,
        networks: Sequence[nn.Module],
        device: torch.device,
        *,
        runtime: str | None = None,
        threads: int | None = None,
        precision: str | None = None,
    ):
        self.plan = plan
        self.networks = [placed(network, device).eval() for network in networks]
        self.device = device
        self.previous: Model | None = None
        self.seen: Seen | None = None
        self._start = partial(make_runtime, runtime=runtime, threads=threads, precision=precision)

    @cached_property
    def runtime(self) -> Runtime:
        """What the networks run through; compiled when it is first asked for. Raises UsageError for one not there."""
        return self._start(self.plan, self.networks, device=self.device)

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        *,
        device: str | None = None,
        folds: Sequence[int | str] | None = None,
        runtime: str | None = None,
        threads: int | None = None,
        precision: str | None = None,
    ) -> Model:
        """Return the model in a folder, or the shipped one of that name, on `device` (by default the fastest there is).

        All weights that are there take part, or those of `folds`: numbers, or "none", which trained on all cases and
        counts as one more fold where it has others beside it. `runtime`, `threads` and `precision` are those of
        `make_runtime`: by default OpenVINO on a CPU where it is installed, else torch.
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
        networks = [load_network(plan, file) for file in files]
        model = cls(plan, networks, pick_device(device), runtime=runtime, threads=threads, precision=precision)
        model.seen = kept_seen(where)
        if plan.previous:
            model.previous = cls.load(
                where / "previous", device=device, folds=folds, runtime=runtime, threads=threads, precision=precision
            )
        return model

    def segment(  # noqa: PLR0913 - one option for each decision
        self,
        volume: Volume | AnyPath | Sequence[AnyPath],
        *,
        anyway: bool = False,
        roi: Box | None = None,
        step: float | None = None,
        mirror: bool = False,
        reuse: bool = True,
        crf: CRF | bool | None = None,
        soft: SoftMaps | None = None,
        progress: Progress | None = None,
        report: Report | None = None,
    ) -> Volume:
        """Return the label map of an image (C, I, J, K), on its grid, in the smallest unsigned type that holds it.

        The image is a Volume, or what `load` takes: the path of a file or of a DICOM series, or one for each channel.
        A series of another modality than the model's is refused, unless it is wanted `anyway`.
        With `roi` the network sees that box alone, intensities are normalized inside it, and the rest is background.
        `step` is the distance between tiles as a share of the patch, by default what the plan says. `mirror` averages
        the logits over the flips that the plan allows. `reuse` computes tiles of one constant value once, with the same
        result. `crf` sharpens boundaries (`model.crf`): by default that of the plan; True is that or the usual one,
        False is none. `soft` and `report` are filled in. Warns where a channel has one value everywhere.
        Raises InputError for an image that does not fit the plan, GeometryError for a box outside it, ModelError for
        scores that are no numbers, UsageError for a CRF that reaches too far, and for a path what `load` raises.
        """
        report = report or Report()
        if not isinstance(volume, Volume):
            wanted = () if anyway else modalities_of(self.plan)
            volume = load(volume, channels=len(self.plan.channels), modalities=wanted)
        seen, part, box = _looked_at(volume, roi, self.plan)
        _check_size(part, self.plan)
        with report.stage("prepare"):
            prepared = prepare(part, self.plan)
        if self.previous is None:  # else that one sees the same, and warns
            _warn_of_constants(seen, self.plan)
        else:
            before = self.previous.segment(part, step=step, mirror=mirror, reuse=reuse)
            prepared = with_labels(prepared, before, part, self.plan)
        with report.stage("compile"):
            predictor = self._predictor(mirror=mirror, reuse=reuse)
        axis, rows = self._rows(prepared, step, predictor, progress, report)
        rows = self._activated(self._refined(rows, axis, prepared, chosen_crf(self.plan.crf, crf), report))
        values, regions = np.array(self.plan.painted), bool(self.plan.regions)
        values = values.astype(np.min_scalar_type(int(values.max())))
        labels = np.zeros(volume.grid.shape, values.dtype)
        if soft is not None:
            soft.begin(volume.grid, self.plan.outputs, box, regions=regions, activated=bool(self.plan.activation))
        with report.stage("export"):
            nearest = nearest_scores(part.grid, self.plan)
            for piece in pieces(rows, axis, prepared.grid, part.grid, regions=regions, nearest_axes=nearest):
                labels[box][piece.index] = values[piece.winners]
                if soft is not None:
                    with report.stage("soft"):
                        soft.take(piece)
        with report.stage("cleanup"):
            for group in self.plan.keep_largest:
                keep_largest_piece(labels, group)
        report.facts |= self._facts() | {"tiles_run": predictor.ran, "tiles_reused": predictor.reused}
        return volume.with_array(labels[None])

    def logits(
        self, prepared: Volume, *, step: float | None = None, mirror: bool = False, reuse: bool = True
    ) -> Tensor:
        """Return the logits (outputs, I, J, K) of a prepared image: tiles blended by a Gaussian, folds averaged."""
        axis, rows = self._rows(prepared, step, self._predictor(mirror=mirror, reuse=reuse), None, Report())
        result = torch.empty((self.plan.outputs, *prepared.grid.shape), device=self.device)
        for first, part in rows:
            result.narrow(axis + 1, first, part.shape[axis + 1]).copy_(part)
        return result

    def _rows(
        self, prepared: Volume, step: float | None, predictor: Predictor, progress: Progress | None, report: Report
    ) -> tuple[int, Rows]:
        """Return the streamed axis and the finished rows of logits, without the padding that brings it to the patch."""
        padding = padding_to(prepared.grid.shape, self.plan.patch)
        tiling = self.plan.tiling
        mode: Any = "edge" if tiling and tiling.padding == "edge" else "constant"
        image = torch.from_numpy(np.pad(prepared.array, ((0, 0), *padding), mode))
        _, i, j, k = image.shape
        shape = (i, j, k)
        if tiling and step is None:
            window = Window.tiled(shape, self.plan.patch, tiling)
        else:
            window = Window.over(shape, self.plan.patch, STEP if step is None else step)

        def predict(tiles: Sequence[Tensor]) -> list[Tensor]:
            with report.stage("network"):
                return predictor(tiles)

        def rows() -> Rows:
            with torch.inference_mode():
                buffer = _zeros(window.buffer_shape(self.plan.outputs), self.device)
                parts = finished_rows(image, window, predict, buffer, batch=predictor.batch, progress=progress)
                while True:
                    with report.stage("blend"):
                        first, logits = next(parts, (0, None))
                        if logits is None:
                            return
                        _check_finite(logits)
                    yield _without_padding(first, logits, window.axis, padding, prepared.grid.shape)

        return window.axis, rows()

    def _refined(self, rows: Rows, axis: int, prepared: Volume, field: CRF | None, report: Report) -> Rows:
        if field is None:
            return rows
        report.facts["crf"] = field.model_dump()
        seen = prepared.with_array(prepared.array[: len(self.plan.channels)])
        return refined(rows, axis, seen, field, regions=bool(self.plan.regions), report=report)

    def _activated(self, rows: Rows) -> Rows:
        """Return rows of what is interpolated: a voxel belongs to a region where that is above 0."""
        if self.plan.activation == "softmax":
            return ((first, logits.softmax(dim=0)) for first, logits in rows)
        if self.plan.activation == "sigmoid":
            return ((first, logits.sigmoid() - 0.5) for first, logits in rows)
        return rows

    def _facts(self) -> dict[str, Any]:
        runtime = self.runtime
        how = {"runtime": runtime.name, "precision": runtime.precision, "threads": runtime.threads}
        return {"model": self.plan.name, "device": str(self.device), **how, "versions": runtime.versions}

    def _predictor(self, *, mirror: bool, reuse: bool) -> Predictor:
        runtime = self.runtime
        axes = self.plan.mirror_axes if mirror else ()
        batch = 1 if self.device.type == "cpu" else GPU_BATCH
        return Predictor(lambda tiles: runtime(self._sent(tiles)), mirror_axes=axes, reuse=reuse, batch=batch)

    def _sent(self, tiles: Tensor) -> Tensor:
        """Return tiles on the device; from pinned memory the copy to a GPU overlaps with what it computes."""
        return (tiles.pin_memory() if self.device.type == "cuda" else tiles).to(self.device, non_blocking=True)


def _looked_at(volume: Volume, roi: Box | None, plan: Plan) -> tuple[Volume, Volume, tuple[slice, ...]]:
    """Return what is in the box, what of it the network sees, and where in the image that lies."""
    start, stop = ((0, 0, 0), volume.grid.shape) if roi is None else volume.grid.covering(roi)
    part = seen = volume.cropped(start, stop)
    offset, size = box_to_see(part, plan)
    part = part.cropped(offset, size)
    start, stop = _sum(start, offset), _sum(start, size)
    return seen, part, tuple(slice(a, b) for a, b in zip(start, stop, strict=True))


def _warn_of_constants(image: Volume, plan: Plan) -> None:
    for channel, values in zip(plan.channels, image.array, strict=True):
        if values.min() == values.max():
            warnings.warn(
                f"Channel {channel.name} of the image has one value everywhere: the labels mean nothing.",
                stacklevel=3,
            )


def _sum(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(one + other for one, other in zip(a, b, strict=True))


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return zeros on the device, or on the host where the device has no room for them."""
    try:
        return torch.zeros(shape, device=device)
    except torch.OutOfMemoryError:
        warnings.warn(
            "The device has no room for the logits; they are kept on the host, which is slower.", stacklevel=2
        )
        return torch.zeros(shape)


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


def _check_size(image: Volume, plan: Plan) -> None:
    """Raise InputError for an image or scores that would become too large: before any memory is taken for them."""
    shape = tuple(map(max, network_grid(image.grid, plan).shape, plan.patch))
    held = min(edge / size for edge, size in zip(plan.patch, shape, strict=True))  # of the scores, at a time
    numbers = math.prod(shape) * max(plan.inputs, plan.outputs * held)
    most = min(MOST_NUMBERS, memory_bytes() / 4)
    if numbers > most:
        raise InputError(
            f"At the spacing of the model the image or its scores would have {numbers:.1e} numbers, and {most:.1e} "
            "are the most on this machine. Check the units of its spacing, and that of the model.",
            reason="too_large",
        )


def _check_finite(logits: Tensor) -> None:
    """Raise ModelError where a score is NaN or infinite: no class would be above another, and all background."""
    # One infinite or undefined score makes the sum so; summing is far cheaper than testing each score.
    if not torch.isfinite(logits.sum()):
        raise ModelError(
            "The network gave scores that are NaN or infinite: its weights are damaged, or its numbers outgrow their "
            "type. Check the weights; in half precision, try float32.",
            reason="not_finite",
        )


def _without_padding(
    first: int, logits: Tensor, axis: int, padding: Sequence[tuple[int, int]], shape: Sequence[int]
) -> tuple[int, Tensor]:
    for d, ((before, _), size) in enumerate(zip(padding, shape, strict=True)):
        start = max(0, before - first) if d == axis else before
        stop = min(logits.shape[d + 1], before + size - first) if d == axis else before + size
        logits = logits.narrow(d + 1, start, stop - start)
    return max(0, first - padding[axis][0]), logits
