"""The runtime for CPUs: OpenVINO, in the layout and with the fused operations that it is fastest with."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from medseg.model import runtime_cache
from medseg.model.plan import Plan
from medseg.model.runtime import Run
from medseg.networks.kinds import Network

HINTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
CAPABILITIES = {"FP16": "float16", "BF16": "bfloat16"}

POINTWISE = ((1, 1, 1), (1, 1, 1), (0, 0, 0))
"""Kernel, stride and padding of a convolution that looks at one voxel."""


def precisions() -> tuple[str, ...]:
    """Return in what OpenVINO can compute on this CPU; float32 first, since halves are often slower and less exact."""
    able = _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("float32", *(name for capability, name in CAPABILITIES.items() if capability in able))


def start(network: nn.Module, plan: Plan, precision: str, threads: int) -> Run:
    """Return what runs a network on the CPU, one patch after the other. The next run overwrites the logits."""
    tensor = _openvino().Tensor
    request = _compiled(network, plan, precision, threads).create_infer_request()
    logits = torch.from_numpy(request.get_output_tensor().data)

    def run_one(patch: Tensor) -> Tensor:
        request.set_input_tensor(tensor(patch.numpy(), shared_memory=True))
        request.infer()
        return logits

    def run(patches: Tensor) -> Tensor:
        rows = torch.split(patches.detach().contiguous(), 1)
        return run_one(rows[0]) if len(rows) == 1 else torch.cat([run_one(row).clone() for row in rows])

    return run


def _compiled(network: nn.Module, plan: Plan, precision: str, threads: int) -> Any:
    """Return the network compiled for one patch, from the user's cache where it is there."""
    core = _openvino().Core()
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # two processes would pin their threads to the same cores
    }
    cpu = (core.get_property("CPU", "FULL_DEVICE_NAME"), torch.backends.cpu.get_cpu_capability())
    versions = (torch.__version__, _openvino().__version__, version("monai"))
    name = runtime_cache.fingerprint(network, plan.network, plan.patch, precision, versions, cpu) + ".openvino"
    stored = runtime_cache.read(name)
    if stored is not None:
        with suppress(RuntimeError):
            return core.import_model(stored, "CPU", config)
    compiled = core.compile_model(_converted(network, plan), "CPU", config)
    runtime_cache.write(name, compiled.export_model().getvalue())
    return compiled


def _converted(network: nn.Module, plan: Plan) -> Any:
    """Return an OpenVINO model of a network, for one patch."""
    openvino = _openvino()
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    size = plan.patch
    whole = all(edge % by == 0 for edge, by in zip(plan.patch, plan.network.divisor, strict=True))
    if isinstance(plan.network, Network) and whole:
        # The U-Net is traced on less than a patch, which is quicker and finds the same operations.
        i, j, k = (min(edge, 2 * divisor) for edge, divisor in zip(plan.patch, plan.network.divisor, strict=True))
        size = (i, j, k)
    example = torch.zeros(1, plan.inputs, *size)
    with torch.no_grad(), _rewritten(network), warnings.catch_warnings(action="ignore"):
        decoder = TorchScriptPythonDecoder(network, example_input=example, trace_kwargs={"check_trace": False})
        frontend = openvino.frontend.FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(decoder))
    model.reshape([1, plan.inputs, *plan.patch])
    return model


@contextmanager
def _rewritten(network: nn.Module) -> Iterator[None]:
    """Replace modules by others that give the same numbers and that OpenVINO runs faster; afterwards put them back."""
    places = [(parent, name, child) for parent in network.modules() for name, child in parent.named_children()]
    try:
        for parent, name, child in places:
            setattr(parent, name, _faster(child))
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


def _faster(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels:
        # One operation with the activation that follows, where groups are reshaped to and fro.
        norm = nn.InstanceNorm3d(module.num_channels, eps=module.eps, affine=module.affine).eval()
        norm.weight, norm.bias = module.weight, module.bias
        return norm
    if isinstance(module, nn.Conv3d) and (module.kernel_size, module.stride, module.padding) == POINTWISE:
        return _Pointwise(module) if module.groups == 1 else module
    return module


class _Pointwise(nn.Module):
    """A convolution of one voxel as a matrix product: OpenVINO then writes each class by itself, at no cost.

    After a convolution it would turn all logits from channels last in a pass of their own, which takes longer than the
    convolution.
    """

    def __init__(self, convolution: nn.Conv3d):
        super().__init__()
        self.weight = convolution.weight.detach().flatten(1)
        self.bias = None if convolution.bias is None else convolution.bias.detach()[:, None]

    def forward(self, image: Tensor) -> Tensor:
        voxels = image.permute(0, 2, 3, 4, 1).flatten(1, 3)
        product = self.weight @ voxels.transpose(1, 2)
        if self.bias is not None:
            product = product + self.bias
        return product.reshape(len(image), -1, *image.shape[2:])


def _openvino() -> ModuleType:
    """Return OpenVINO, imported without openvino_telemetry, with which the import itself reports to a server."""
    telemetry = "openvino_telemetry"
    hide = not {"openvino", telemetry} & set(sys.modules)
    if hide:
        sys.modules[telemetry] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if hide:
            del sys.modules[telemetry]
    return openvino  # type: ignore[no-any-return]
