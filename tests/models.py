"""Plans and networks small enough for a test."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medseg.labels import make_labels
from medseg.model.plan import Channel, Plan
from medseg.model.segmenter import Model
from medseg.networks.build import build_network
from medseg.networks.kinds import Network
from medseg.process.normalize import CTNormalization, ZScore

torch.set_num_threads(1)  # networks this small only wait for a second thread; and sums are the same on every machine

UNSCALED = CTNormalization(lower=-1e6, upper=1e6, mean=0, std=1)


def tiny_plan(**changes: object) -> Plan:
    """Return a plan of one channel, one label, 1 mm and patches of 16 x 16 x 8, with `changes`."""
    network = Network(features=(4, 8, 8), kernels=((3, 3, 3),) * 3, strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)), heads=1)
    fields = {
        "name": "tiny",
        "channels": (Channel(name="MR", normalization=ZScore()),),
        "labels": make_labels([(1, "ball")]),
        "spacing_mm": (1.0, 1.0, 1.0),
        "patch": (16, 16, 8),
        "network": network,
    }
    return Plan.model_validate(fields | changes)


def tiny_model(plan: Plan | None = None) -> Model:
    """Return an untrained network under a tiny plan."""
    plan = plan or tiny_plan()
    torch.manual_seed(0)
    return Model(
        plan, [build_network(plan.network, len(plan.channels), plan.outputs)], torch.device("cpu"), runtime="torch"
    )


class Threshold(nn.Module):
    """A network whose label 1 wins where the first channel is above a level, whatever lies around it."""

    def __init__(self, level: float):
        super().__init__()
        self.level = level

    def forward(self, image: Tensor) -> Tensor:
        score = image[:, :1] - self.level
        return torch.cat([-score, score], dim=1)


def threshold_model(level: float, **changes: object) -> Model:
    """Return a model that labels what is above a level, in intensities as they are."""
    plan = tiny_plan(**({"channels": (Channel(name="CT", normalization=UNSCALED),)} | changes))
    return Model(plan, [Threshold(level)], torch.device("cpu"), runtime="torch")
