"""Runtimes: what turns patches into logits. torch is always there; each of the others is a file that can be deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from medseg.errors import UsageError
from medseg.model.plan import Plan
from medseg.networks.build import memory_format

Run = Callable[[Tensor], Tensor]
"""From patches (B, C, I, J, K) to logits (B, outputs, I, J, K), float32, on one device."""

Start = Callable[[nn.Module, Plan, str, int], Run]
"""From a network, its plan, a precision and a number of CPU threads to what runs it."""

PACKAGES = {"torch": ("torch",), "openvino": ("openvino",), "onnx": ("onnxruntime", "onnx", "onnxscript")}
"""What must be installed for each runtime, first what computes."""


@dataclass(frozen=True)
class Runtime:
    """Networks ready to run, and what a report should say about how they run."""

    name: str
    precision: str
    device: torch.device
    threads: int
    versions: dict[str, str]
    run: Run

    def __call__(self, patches: Tensor) -> Tensor:
        """Return the logits (B, outputs, I, J, K) of patches (B, C, I, J, K), float32, on `device`.

        The next call may overwrite them.
        """
        return self.run(patches)


def make_runtime(
    plan: Plan,
    networks: Sequence[nn.Module],
    *,
    device: torch.device,
    runtime: str | None = None,
    threads: int | None = None,
    precision: str | None = None,
) -> Runtime:
    """Return what runs networks that are on `device` and in evaluation mode; the logits of several are averaged.

    `runtime` is torch, openvino or onnx; by default OpenVINO on a CPU where it is installed, else torch.
    `threads` counts CPU threads; by default those that torch takes, one for each physical core. `precision` is float32,
    or float16 or bfloat16 where the device is good at them; CUDA takes float16 by default, everything else float32.
    CUDA also has tf32: float32 whose factors are rounded to 10 bits.
    Raises UsageError for a runtime or a precision that is not there.
    """
    name = runtime or ("openvino" if device.type == "cpu" and find_spec("openvino") else "torch")
    _check_runtime(name, device)
    if threads is not None and threads < 1:
        raise UsageError(f"The network needs at least one thread; here it is {threads}.")
    precisions, start = _choose(name, device)
    if precision is not None and precision not in precisions:
        raise UsageError(
            f"The runtime {name} does not compute in {precision} on this device; "
            f"leave the precision away, or say {' or '.join(precisions)}."
        )
    precision = precision or precisions[0]
    threads = threads or torch.get_num_threads()
    network = networks[0] if len(networks) == 1 else _Mean(networks).eval()
    versions = {package: version(package) for package in dict.fromkeys(("torch", PACKAGES[name][0]))}
    return Runtime(name, precision, device, threads, versions, start(network, plan, precision, threads))


class _Mean(nn.Module):
    """The mean of the logits of several networks."""

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, patches: Tensor) -> Tensor:
        first, *others = self.networks
        total: Tensor = first(patches)
        for network in others:
            total = total + network(patches)
        return total / len(self.networks)


def _check_runtime(name: str, device: torch.device) -> None:
    if name not in PACKAGES:
        raise UsageError(f"There is no runtime {name!r}; leave the option away, or say {', '.join(PACKAGES)}.")
    if not all(find_spec(package) for package in PACKAGES[name]):
        raise UsageError(
            f'The runtime {name} is not installed. Install it with: pip install "medseg[{name}]"',
            reason="not_installed",
        )
    if name != "torch" and device.type != "cpu":
        raise UsageError(f"The runtime {name} runs on the CPU and not on {device.type}; leave one of the two away.")


def _choose(name: str, device: torch.device) -> tuple[tuple[str, ...], Start]:
    """Return the precisions that a runtime offers, the default first, and what starts it."""
    if name == "openvino":
        from medseg.model import runtime_openvino

        return runtime_openvino.precisions(), runtime_openvino.start
    if name == "onnx":
        from medseg.model import runtime_onnx

        return ("float32",), runtime_onnx.start
    if device.type == "cuda":
        return ("float16", "float32", "tf32", *(["bfloat16"] if torch.cuda.is_bf16_supported() else [])), _start_torch
    # Convolutions of a CPU are slower in half precision than in float32.
    return ("float32", *(["float16"] if device.type == "mps" else [])), _start_torch


def _start_torch(network: nn.Module, _plan: Plan, precision: str, threads: int) -> Run:
    dtype: torch.dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)

    def run(patches: Tensor) -> Tensor:
        device = patches.device
        half = torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)
        with torch.inference_mode(), _threads(threads), tf32(precision == "tf32"), half:
            logits: Tensor = network(patches.to(memory_format=memory_format(device)))
        # Adding tiles up takes ten times as long when they lie channels last.
        return logits.float().contiguous()

    return run


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let convolutions in float32 on CUDA round their factors to 10 bits, which is faster, or forbid it."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use `count` CPU threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
