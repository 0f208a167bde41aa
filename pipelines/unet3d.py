"""Train a 3-D U-Net on a dataset folder, segment one image with it, and check that the labels lie where the image does.

    python pipelines/unet3d.py DATASET MODEL IMAGE LABELS [BUDGET]

Copy this file and change what you like: it is the public API and nothing else.
"""

from __future__ import annotations

import sys

import medseg


def main(dataset: str, model_folder: str, image: str, labels_file: str, budget: str = "30m") -> None:
    """Train for `budget`, then segment `image` into `labels_file`."""
    cases = medseg.read_dataset(dataset)
    plan = medseg.make_plan(medseg.fingerprint(cases))
    model = medseg.train_model(cases, plan, model_folder, budget=budget)

    volume = medseg.load(image)
    labels = model.segment(volume)
    medseg.save(labels, labels_file, source=image)

    written = medseg.load(labels_file)
    if not written.grid.matches(volume.grid):
        sys.exit("The labels do not lie on the grid of the image.")
    print(f"{labels_file}: spacing {written.grid.spacing_mm} mm, as the image's")


if __name__ == "__main__":
    if len(sys.argv) not in (5, 6):
        sys.exit(__doc__)
    main(*sys.argv[1:])
