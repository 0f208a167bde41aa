"""Muon: steps of equal size along every direction of a weight matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MOMENTUM, BETAS, EPSILON = 0.95, (0.9, 0.999), 1e-8

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of a polynomial that brings singular values near 1 in five turns, as its authors found them."""

AS_ADAM = 0.2
"""The root mean square of an update of AdamW, which makes one learning rate serve both kinds of weights."""


class Muon(Optimizer):
    """Optimizer that makes the momentum of each convolution orthogonal before it is a step; the rest steps as in AdamW.

    A convolution is a matrix of (outputs, inputs x kernel); norms, biases and the last layers are the rest.
    Sources: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; Liu et al., "Muon is
    scalable for LLM training", 2025 (size of the steps); Loshchilov and Hutter, ICLR 2019 (AdamW).
    """

    def __init__(self, network: nn.Module, learning_rate: float, weight_decay: float):
        named = list(network.named_parameters())
        hidden = [weight for name, weight in named if weight.ndim == 5 and not name.startswith("outputs")]
        chosen = {id(weight) for weight in hidden}
        groups = [
            {"params": hidden, "hidden": True},
            {"params": [weight for _, weight in named if id(weight) not in chosen], "hidden": False},
        ]
        super().__init__(groups, {"lr": learning_rate, "weight_decay": weight_decay, "momentum": MOMENTUM})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 - torch's signature
        """Change the weights by one step; there is no closure."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    hidden = group["hidden"]
                    change = self._hidden_change(weight, group["momentum"]) if hidden else self._other_change(weight)
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=group["lr"])

    def _hidden_change(self, weight: Tensor, share: float) -> Tensor:
        (momentum,) = self._kept(weight, "momentum")
        momentum.lerp_(weight.grad, 1 - share)  # type: ignore[arg-type]
        ahead = weight.grad.lerp(momentum, share).flatten(1)  # type: ignore[union-attr]
        size: float = AS_ADAM * max(ahead.shape) ** 0.5 * max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
        return orthogonal(ahead).view_as(weight) * size

    def _other_change(self, weight: Tensor) -> Tensor:
        first, second, step = self._kept(weight, "first", "second", "step")
        step += 1
        first.lerp_(weight.grad, 1 - BETAS[0])  # type: ignore[arg-type]
        second.lerp_(weight.grad**2, 1 - BETAS[1])  # type: ignore[operator]
        unbiased = (second / (1 - BETAS[1] ** step)).sqrt() + EPSILON
        change: Tensor = first / (1 - BETAS[0] ** step) / unbiased
        return change

    def _kept(self, weight: Tensor, *names: str) -> Iterator[Tensor]:
        state = self.state[weight]
        for name in names:
            if name not in state:
                state[name] = torch.zeros((), device=weight.device) if name == "step" else torch.zeros_like(weight)
            yield state[name]


def orthogonal(matrix: Tensor) -> Tensor:
    """Return a matrix with the singular vectors of `matrix` and singular values near 1 (0.7 to 1.2).

    Source: Newton-Schulz iteration of Jordan et al., 2024. A turn is a polynomial of the matrix times its transpose,
    and all these commute: they are multiplied among themselves, and the (much longer) matrix once, at the end.
    """
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    wide: Tensor = (matrix.mT if tall else matrix) / (matrix.norm() + 1e-7)
    square = wide @ wide.mT
    identity = torch.eye(len(square), device=square.device, dtype=square.dtype)
    total = identity
    for _ in range(5):
        turn = a * identity + (b * identity + c * square) @ square
        square = turn @ square @ turn
        total = turn @ total
    result = total @ wide
    return result.mT if tall else result
