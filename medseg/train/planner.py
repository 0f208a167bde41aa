"""From a fingerprint to a plan: one short rule for each decision.

Kinds of rules, after Isensee et al., "nnU-Net", Nature Methods 2021: *fixed* (the same for all data), *rule-based*
(derived from the fingerprint), *empirical* (found by trying).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Unpack

import numpy as np

from medseg.labels import Label
from medseg.model.plan import Channel, Plan
from medseg.model.stored import Stored
from medseg.networks.kinds import AnyNetwork, Triple
from medseg.networks.monai_kinds import Count, Width
from medseg.process.normalize import CTNormalization, ZScore
from medseg.train.architectures import NetworkOptions, described, divisible_patch, numbers_for
from medseg.train.dataset_json import members_of
from medseg.train.fingerprint import CaseFacts, Fingerprint, Intensities
from medseg.train.sides import side_by_name, side_by_place

ANISOTROPY = 3.0
"""Voxels longer than this along one axis than along the others call for rules of their own."""

Numbers = tuple[float, float, float]


class Capacity(Stored):
    """What a kind of device can train on: voxels of a patch at most, features at the finest resolution, and why.

    The default is fixed and for any device; `train.capacity` finds that of the device at hand, by `memory_gb` or by
    `voxels_per_s`, which were measured.
    """

    what = "capacity"

    device: str = "any"
    voxels: Count = 2**17
    features: Width = 16
    memory_gb: float | None = None
    voxels_per_s: float | None = None

    @property
    def why(self) -> str:
        """What the device is and has, in words."""
        if self.voxels_per_s is not None:
            return f"{self.device}, measured to train on {self.voxels_per_s:,.0f} voxels a second"
        return f"{self.device} of {self.memory_gb:.1f} GB" if self.memory_gb is not None else f"{self.device} device"


FIXED = Capacity()
"""Patches of 64 x 64 x 32 voxels and 16 features: what two cores train on at about one step a second."""


def make_plan(
    fingerprint: Fingerprint,
    capacity: Capacity = FIXED,
    **options: Unpack[NetworkOptions],
) -> Plan:
    """Return the plan for a dataset and a device: spacing, patch, network and normalization, each by its rule.

    `options` say which network it is, and how large (`architectures.NetworkOptions`).
    Raises UsageError for a network that medseg does not have, and for one that cannot be so large.
    Example: make_plan(facts, network="residual_unet", width=24)
    """
    spacing = target_spacing([case.spacing_mm for case in fingerprint.cases])
    widest = first_patch(median_shape(fingerprint.cases, spacing), spacing, capacity.voxels)
    return plan_with(fingerprint, capacity, numbers_for(widest, spacing, capacity.features, **options))


def plan_with(fingerprint: Fingerprint, capacity: Capacity, network: AnyNetwork) -> Plan:
    """Return the plan for a dataset, a device and the numbers of a network."""
    spacing = target_spacing([case.spacing_mm for case in fingerprint.cases])
    widest = first_patch(median_shape(fingerprint.cases, spacing), spacing, capacity.voxels)
    return Plan(
        name=fingerprint.name,
        channels=tuple(
            Channel(name=name, normalization=normalization(name, numbers))
            for name, numbers in zip(fingerprint.channels, fingerprint.intensities, strict=True)
        ),
        labels=fingerprint.labels,
        regions=fingerprint.regions,
        spacing_mm=spacing,
        measured_only=True,
        patch=divisible_patch(widest, network.divisor),
        mirror_axes=mirror_axes(fingerprint.labels, fingerprint.cases),
        network=network,
    )


def explain(fingerprint: Fingerprint, plan: Plan, capacity: Capacity = FIXED) -> list[dict[str, str]]:
    """Return a row for each decision of a plan: what it is, what was decided, and what in the dataset speaks for it.

    A value that is not what `make_plan` decides with this capacity is said to be the user's.
    """
    spacings = np.asarray([case.spacing_mm for case in fingerprint.cases])
    shape = median_shape(fingerprint.cases, plan.spacing_mm)
    boxes, inside = (float(np.median([one(case) for case in fingerprint.cases])) for one in (_box_share, _measured))
    low, high = (_joined(np.percentile(spacings, share, axis=0)) for share in (0, 100))
    median = _joined(np.median(spacings, axis=0))
    reasons = {
        "orientation": (plan.orientation, "fixed: every image is turned the same way before anything else"),
        "spacing_mm": (_joined(plan.spacing_mm), f"rule: median of the cases is {median} mm, from {low} to {high}"),
        "measured_only": (
            "yes" if plan.measured_only else "no",
            f"fixed: the box around what was measured is looked at, {boxes:.0f} % of the median image",
        ),
        "patch": (
            _joined(plan.patch),
            f"rule: the median case, {_joined(shape)}, within {capacity.voxels} voxels for {capacity.why}",
        ),
        "network": (
            described(plan.network),
            "rule: an axis is halved to 4 voxels, unless it is twice as coarse as the finest; features by the device",
        ),
        "channels": (
            ", ".join(_treatment(channel) for channel in plan.channels),
            f"rule: CT by the numbers of the dataset, others by their own; {inside:.0f} % of an image was measured",
        ),
        "mirror_axes": (_joined(plan.mirror_axes) or "none", _why_mirrored(fingerprint)),
        "labels": (f"{len(plan.labels)}", f"dataset.json; {_rarest(fingerprint)}"),
    }
    own = plan_with(fingerprint, capacity, plan.network)  # whose patch is what this network divides
    changed = {field for field in reasons if getattr(plan, field) != getattr(own, field)}
    if plan.network != make_plan(fingerprint, capacity).network:
        changed.add("network")
    return [
        {"decision": field, "value": value, "why": "yours, or of the model to begin with" if field in changed else why}
        for field, (value, why) in reasons.items()
    ]


def _treatment(channel: Channel) -> str:
    steps = [*([channel.bias_correction] if channel.bias_correction else []), channel.normalization.kind]
    return f"{channel.name}: {', '.join(steps)}"


def _rarest(fingerprint: Fingerprint) -> str:
    members = members_of(fingerprint.labels, fingerprint.regions)
    cases = {
        label.name: sum(any(case.label_voxels.get(one) for one in members[label.value]) for case in fingerprint.cases)
        for label in fingerprint.labels
    }
    name = min(cases, key=lambda name: cases[name])
    return f"the rarest, {name}, is in {cases[name]} of {len(fingerprint.cases)} cases"


def _joined(numbers: Iterable[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)


def target_spacing(spacings_mm: Sequence[Numbers]) -> Numbers:
    """Return the spacing to train at, in mm: the median of each axis; a fine tenth of a very coarse one.

    Rule-based (nnU-Net, supplementary note 2): where one axis is more than three times as coarse as the others, its
    tenth percentile, so that the finer scans are not blurred to the level of the coarser ones.
    """
    table = np.asarray(spacings_mm)
    target = np.median(table, axis=0)
    worst = int(target.argmax())
    others = np.delete(target, worst).max()
    if target[worst] > ANISOTROPY * others:
        target[worst] = max(float(np.percentile(table[:, worst], 10)), float(others))
    return float(target[0]), float(target[1]), float(target[2])


def _box_share(case: CaseFacts) -> float:
    return float(100 * np.prod(case.box) / np.prod(case.shape))


def _measured(case: CaseFacts) -> float:
    return 100 * case.measured


def median_shape(cases: Sequence[CaseFacts], spacing_mm: Numbers) -> Triple:
    """Return the median shape, at `spacing_mm`, of the boxes around what was measured of the cases. Rule-based."""
    extents = [np.asarray(case.box) * np.asarray(case.spacing_mm) / np.asarray(spacing_mm) for case in cases]
    i, j, k = np.maximum(1, np.round(np.median(extents, axis=0))).astype(int).tolist()
    return i, j, k


def first_patch(shape: Triple, spacing_mm: Numbers, voxels: int) -> Triple:
    """Return the largest patch that is as wide in mm along every axis, fits the median case and so many voxels.

    Rule-based (nnU-Net, supplementary note 2): an even view in mm; an axis that the case ends sooner leaves room to
    the others.
    """
    edges = np.asarray(shape, dtype=np.float64)
    per_mm = 1 / np.asarray(spacing_mm)
    # Bisection over the width in mm: the voxel count of the clipped box grows with it.
    low, high = 0.0, float((edges / per_mm).max())
    for _ in range(50):
        width = (low + high) / 2
        if np.prod(np.minimum(edges, width * per_mm)) > voxels:
            high = width
        else:
            low = width
    i, j, k = np.maximum(1, np.floor(np.minimum(edges, high * per_mm) + 1e-6)).astype(int).tolist()
    return i, j, k


def normalization(channel: str, numbers: Intensities) -> CTNormalization | ZScore:
    """Return how a channel is normalized: CT by the dataset's numbers, all else by its own. Rule-based."""
    if channel.casefold() == "ct":
        std = max(numbers.std, 1e-6)
        return CTNormalization(lower=numbers.percentile_00_5, upper=numbers.percentile_99_5, mean=numbers.mean, std=std)
    return ZScore()


def mirror_axes(labels: Sequence[Label], cases: Sequence[CaseFacts] = ()) -> tuple[int, ...]:
    """Return the axes that patches are flipped along: left-right (the first in RAS), where no label has a side.

    Empirical: bodies are nearly symmetric in that plane alone; a kidney on the wrong side is what must not be learned.
    Names of labels and places in the cases speak for a side (`train.sides`); in doubt nothing is mirrored.
    """
    return () if _side(labels, cases) else (0,)


def _side(labels: Sequence[Label], cases: Sequence[CaseFacts]) -> str | None:
    return side_by_name(labels) or side_by_place(labels, [case.label_places for case in cases])


def _why_mirrored(fingerprint: Fingerprint) -> str:
    side = _side(fingerprint.labels, fingerprint.cases)
    looked = "name or place" if any(case.label_places for case in fingerprint.cases) else "name"
    return f"empirical: none, as {side}" if side else f"empirical: left-right, as no label has a side by its {looked}"
