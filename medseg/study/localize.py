"""Where a model has to look: the box around what a first one found, with a margin."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.study.pipeline import Localizer, Pipeline
from medseg.volume import Volume, box_of

if TYPE_CHECKING:
    from medseg.model.segmenter import Model
    from medseg.model.timing import Report

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""The first index of a part of a grid, and the one behind its last."""


def localize(
    image: Volume, channels: Sequence[str], wanted: Localizer, localizer: Model
) -> tuple[Box | None, dict[str, Any]]:
    """Return the box that the localizer finds in an image with these channels, and what to record of it.

    None, with a warning, where it finds nothing. Raises what `Model.segment` does.
    """
    from medseg.model.timing import Report

    report = Report()
    seen = [channels.index(name) for name in wanted.channels or channels]
    labels = localizer.segment(image.with_array(image.array[seen]), report=report)
    values = [label.value for label in localizer.plan.labels if not wanted.labels or label.name in wanted.labels]
    box = box_around(labels, values, wanted.margin_mm)
    if box is None:
        warnings.warn("The localizer found nothing, so nothing was segmented: all is background.", stacklevel=1)
    return box, {"box": box, "run": report.to_dict()}


def box_around(labels: Volume, values: Sequence[int], margin_mm: float) -> Box | None:
    """Return the smallest box that holds all voxels of these values and at least `margin_mm` on every side of them.

    It ends where the grid does. None where no voxel has one of the values.
    """
    box = box_of(np.isin(labels.array[0], values))
    if box is None:
        return None
    # Between planes of voxels, along their normal: in a tilted stack that is less than between centers.
    distances_mm = 1 / np.linalg.norm(np.linalg.inv(labels.grid.affine[:3, :3]), axis=1)
    margin = np.ceil(margin_mm / distances_mm - 1e-6).astype(int)
    start = np.maximum([part.start for part in box] - margin, 0)
    stop = np.minimum([part.stop for part in box] + margin, labels.grid.shape)
    return tuple(start.tolist()), tuple(stop.tolist())


def segment_box(image: Volume, box: Box | None, model: Model, pipeline: Pipeline, report: Report) -> Volume:
    """Return the label map of an image, on its grid, of which the model of a pipeline sees a box alone.

    The rest is background. Without a box all is background. `report` is filled in. Raises what `Model.segment` does.
    """
    labels = np.zeros(image.grid.shape, np.min_scalar_type(max(model.plan.painted)))
    if box is not None:
        part = model.segment(image.cropped(*box), mirror=pipeline.mirror, crf=pipeline.crf, report=report)
        labels[tuple(slice(first, behind) for first, behind in zip(*box, strict=True))] = part.array[0]
    return image.with_array(labels[None])
