"""The main job on a brain that everybody may see: both hippocampi of the ICBM152 template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from os import PathLike
from pathlib import Path

import numpy as np

from medseg.errors import OutputError, UsageError
from medseg.io import load, save
from medseg.io.label_table import write_table
from medseg.model.segmenter import Model
from medseg.report.measurements import Measurement, measure
from medseg.report.pictures import draw_overlay

TEMPLATE = "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"

BOXES_MM = {
    "left": ((-41.0, -49.0, -33.0), (-5.0, 2.0, 4.0)),
    "right": ((5.0, -49.0, -33.0), (41.0, 2.0, 4.0)),
}
"""A box around each hippocampus in MNI space, as large as the crops that the model was trained on."""


def run_demo(folder: str | PathLike[str], *, progress: Callable[[str], None] | None = None) -> list[Measurement]:
    """Return the measurements of both hippocampi of the ICBM152 T1; write image, labels and picture.

    The folder gets image.nii.gz, labels.nii.gz with labels.labels.json beside it, and overlay.png.
    Raises UsageError where nilearn, whose package ships the template, is not installed.
    """
    say = progress or (lambda _: None)
    out = Path(folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder cannot be made: {error.strerror}.", path=out) from error
    source = template_path()
    say("Reading the ICBM152 T1 template, an average of 152 brains at 1 mm")
    volume = load(source)
    model = Model.load("hippocampus")
    labels = np.zeros(volume.array.shape, np.uint8)
    measurements = []
    for side, box in BOXES_MM.items():
        say(f"Segmenting the {side} hippocampus")
        found = model.segment(volume, roi=box)
        np.maximum(labels, found.array, out=labels)
        measurements += [replace(row, name=f"{side} {row.name.lower()}") for row in measure(found, model.plan.labels)]
    result = volume.with_array(labels)
    write_table(model.plan.labels, out / "labels.labels.json")
    save(result, out / "labels.nii.gz", source=source)
    save(volume, out / "image.nii.gz", source=source)
    say("Drawing the picture")
    draw_overlay(volume, result, model.plan.labels, out / "overlay.png", title="Hippocampi of the ICBM152 template")
    return measurements


def template_path() -> Path:
    """Return the file of the ICBM152 T1 that nilearn ships. Raises UsageError where nilearn is not installed."""
    found = find_spec("nilearn")
    path = Path(found.origin).parent / TEMPLATE if found and found.origin else None
    if path is None or not path.is_file():
        raise UsageError(
            'The demo reads a brain that the package nilearn ships; install it with pip install "medseg[demo]".'
        )
    return path
