"""The runtime that many other tools share: ONNX Runtime, on the CPU."""

from __future__ import annotations

import logging
import os
import warnings
from importlib.metadata import version
from types import ModuleType

import torch
from torch import Tensor, nn

from medseg.model import runtime_cache
from medseg.model.plan import Plan
from medseg.model.runtime import Run


def start(network: nn.Module, plan: Plan, _precision: str, threads: int) -> Run:
    """Return what runs a network on the CPU, one patch after the other."""
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors alone
    session = runtime.InferenceSession(_exported(network, plan), options, providers=["CPUExecutionProvider"])

    def run(patches: Tensor) -> Tensor:
        rows = torch.split(patches.detach().contiguous(), 1)
        return torch.cat([torch.from_numpy(session.run(None, {"patch": row.numpy()})[0]) for row in rows])

    return run


def _exported(network: nn.Module, plan: Plan) -> bytes:
    """Return the network as ONNX, for one patch, from the user's cache where it is there."""
    versions = (torch.__version__, _onnxruntime().__version__, version("monai"))
    name = runtime_cache.fingerprint(network, plan.network, versions, plan.patch) + ".onnx"
    stored = runtime_cache.read(name)
    if stored is not None:
        return stored
    example = torch.zeros(1, plan.inputs, *plan.patch)
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torch logs that torchvision, which nothing here needs, is not installed
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(network, (example,), input_names=["patch"], dynamo=True, verbose=False)
    finally:
        logging.disable(quiet)
    content: bytes = program.model_proto.SerializeToString()  # type: ignore[union-attr]
    runtime_cache.write(name, content)
    return content


def _onnxruntime() -> ModuleType:
    """Return ONNX Runtime, imported so that it reports nothing to a server and keeps no identifier of this machine."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime  # type: ignore[no-any-return]
