"""Segment 3-D medical images, train the networks that do it, and keep the geometry exact.

The public names are resolved when they are first used, so that importing medseg loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from medseg.errors import MedsegError
    from medseg.io import load, save
    from medseg.io.dicom_seg import load_dicom_seg, save_dicom_seg
    from medseg.io.rtstruct import load_rtstruct, save_rtstruct
    from medseg.model.crf import CRF
    from medseg.model.importing import import_model
    from medseg.model.segmenter import Model
    from medseg.model.soft import SoftMaps
    from medseg.report.dicom_sr import save_dicom_sr
    from medseg.report.measurements import measure
    from medseg.report.metrics import evaluate_folder
    from medseg.report.write import write_report
    from medseg.study.batch import run_batch
    from medseg.study.dataset import make_dataset
    from medseg.train.costs import plan_costs
    from medseg.train.dataset import read_dataset
    from medseg.train.evaluate import evaluate
    from medseg.train.fingerprint import fingerprint
    from medseg.train.loop import train_model
    from medseg.train.planner import make_plan
    from medseg.volume import Grid, Volume

__all__ = [
    "CRF",
    "Grid",
    "MedsegError",
    "Model",
    "SoftMaps",
    "Volume",
    "evaluate",
    "evaluate_folder",
    "fingerprint",
    "import_model",
    "load",
    "load_dicom_seg",
    "load_rtstruct",
    "make_dataset",
    "make_plan",
    "measure",
    "plan_costs",
    "read_dataset",
    "run_batch",
    "save",
    "save_dicom_seg",
    "save_dicom_sr",
    "save_rtstruct",
    "train_model",
    "write_report",
]

_HOME = {
    "CRF": "model.crf",
    "Grid": "volume",
    "MedsegError": "errors",
    "Model": "model.segmenter",
    "SoftMaps": "model.soft",
    "Volume": "volume",
    "evaluate": "train.evaluate",
    "evaluate_folder": "report.metrics",
    "fingerprint": "train.fingerprint",
    "import_model": "model.importing",
    "load": "io",
    "load_dicom_seg": "io.dicom_seg",
    "load_rtstruct": "io.rtstruct",
    "make_dataset": "study.dataset",
    "make_plan": "train.planner",
    "measure": "report.measurements",
    "plan_costs": "train.costs",
    "read_dataset": "train.dataset",
    "run_batch": "study.batch",
    "save": "io",
    "save_dicom_seg": "io.dicom_seg",
    "save_dicom_sr": "report.dicom_sr",
    "save_rtstruct": "io.rtstruct",
    "train_model": "train.loop",
    "write_report": "report.write",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'medseg' has no attribute {name!r}")
    return getattr(importlib.import_module(f"medseg.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
