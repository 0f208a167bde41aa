"""Muon: steps of equal size along every direction of a weight matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from medseg.networks.layers import is_head

MOMENTUM, BETAS, EPSILON = 0.95, (0.9, 0.999), 1e-8

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of a polynomial that brings singular values near 1 in five turns, as its authors found them."""

AS_ADAM = 0.2
"""The root mean square of an update of AdamW, which makes one learning rate serve both kinds of weights."""


class Muon(Optimizer):
    """Optimizer that makes the momentum of each matrix orthogonal before it is a step; the rest steps as in AdamW.

    The weight of a linear layer is a matrix, and that of a convolution is one of (outputs, inputs x kernel). A linear
    layer that gives query, key and value together (by its name, "qkv") is three. Norms, biases, tables of positions,
    depth-wise convolutions, which mix no channels, and the last layers are the rest.
    Sources: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; Liu et al., "Muon is
    scalable for LLM training", 2025 (size of the steps); Loshchilov and Hutter, ICLR 2019 (AdamW).
    """

    def __init__(self, network: nn.Module, learning_rate: float, weight_decay: float):
        named = list(network.named_parameters())
        parts = _parts(network)
        single, fused, rest = ([weight for _, weight in named if parts.get(id(weight), 0) == n] for n in (1, 3, 0))
        groups: list[dict[str, Any]] = [{"params": single, "hidden": True}, {"params": rest, "hidden": False}]
        if fused:
            groups.append({"params": fused, "hidden": True, "parts": 3})
        super().__init__(groups, {"lr": learning_rate, "weight_decay": weight_decay, "momentum": MOMENTUM})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 - torch's signature
        """Change the weights by one step; there is no closure."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            change = self._hidden_changes(weights, group) if group["hidden"] else self._others(weights)
            rate = group["lr"]  # a number, or on a GPU a tensor of it
            torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
            torch._foreach_mul_(change, -rate)
            torch._foreach_add_(weights, change)

    def _hidden_changes(self, weights: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
        share, parts = group["momentum"], group.get("parts", 1)
        gradients = _gradients(weights)
        momenta = self._kept(weights, "momentum")
        torch._foreach_lerp_(momenta, gradients, 1 - share)
        ahead = list(torch._foreach_lerp(gradients, momenta, share))
        # Weights of one shape are made orthogonal together.
        alike: dict[tuple[int, ...], list[int]] = {}
        for place, weight in enumerate(weights):
            alike.setdefault(tuple(weight.shape), []).append(place)
        for shape, places in alike.items():
            matrices = torch.cat([ahead[place].reshape(parts, shape[0] // parts, -1) for place in places])
            rows, columns = matrices.shape[1:]
            size: float = AS_ADAM * max(rows, columns) ** 0.5 * max(1.0, rows / columns) ** 0.5
            for place, change in zip(places, torch.split(orthogonal(matrices) * size, parts), strict=True):
                ahead[place] = change.view(shape)
        return ahead

    def _others(self, weights: Sequence[Tensor]) -> list[Tensor]:
        gradients = _gradients(weights)
        first, second, steps = (self._kept(weights, name) for name in ("first", "second", "step"))
        torch._foreach_lerp_(first, gradients, 1 - BETAS[0])
        torch._foreach_lerp_(second, torch._foreach_mul(gradients, gradients), 1 - BETAS[1])
        torch._foreach_add_(steps, 1.0)
        unbiased = torch._foreach_div(second, _bias(BETAS[1], steps))
        torch._foreach_sqrt_(unbiased)
        torch._foreach_add_(unbiased, EPSILON)
        changes = torch._foreach_div(first, unbiased)
        torch._foreach_div_(changes, _bias(BETAS[0], steps))
        return list(changes)

    def _kept(self, weights: Sequence[Tensor], name: str) -> list[Tensor]:
        """Return what is kept of each weight under a name, at first 0: for "step" one number, else of its shape."""
        for weight in weights:
            if name not in self.state[weight]:
                like = torch.zeros((), device=weight.device) if name == "step" else torch.zeros_like(weight)
                self.state[weight][name] = like
        return [self.state[weight][name] for weight in weights]


def _parts(network: nn.Module) -> dict[int, int]:
    """Return of how many matrices the weights of hidden layers are, by the identity of each that is any."""
    layers = (nn.Linear, nn.Conv3d, nn.ConvTranspose3d)
    return {
        id(module.weight): 3 if name.rpartition(".")[2] == "qkv" else 1
        for name, module in network.named_modules()
        if isinstance(module, layers) and getattr(module, "groups", 1) == 1 and not is_head(network, name)
    }


def _bias(beta: float, steps: list[Tensor]) -> list[Tensor]:
    """Return what running means that began at 0 have seen of their numbers after so many steps: 1 - beta^step."""
    left = torch._foreach_pow(beta, steps)
    torch._foreach_neg_(left)
    torch._foreach_add_(left, 1.0)
    return list(left)


def _gradients(weights: Sequence[Tensor]) -> list[Tensor]:
    return [weight.grad for weight in weights if weight.grad is not None]


def orthogonal(matrix: Tensor) -> Tensor:
    """Return matrices (..., M, N) with the singular vectors of `matrix` and singular values near 1 (0.7 to 1.2).

    Source: Newton-Schulz iteration of Jordan et al., 2024. A turn is a polynomial of the matrix times its transpose,
    and all these commute: they are multiplied among themselves, and the (much longer) matrix once, at the end.
    """
    a, b, c = QUINTIC
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide: Tensor = (matrix.mT if tall else matrix) / (torch.linalg.matrix_norm(matrix, keepdim=True) + 1e-7)
    square = wide @ wide.mT
    identity = torch.eye(square.shape[-1], device=square.device, dtype=square.dtype)
    total = identity
    for _ in range(5):
        turn = a * identity + (b * identity + c * square) @ square
        square = turn @ square @ turn
        total = turn @ total
    result = total @ wide
    return result.mT if tall else result
