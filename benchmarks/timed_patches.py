"""Patches per second through a trained network in each CPU runtime that is installed: timed_patches.py MODEL S OUT."""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from medseg.cores import cores
from medseg.model.segmenter import Model
from medseg.train.costs import noise


def main() -> None:
    """Time one runtime after the other, on noise, for so many seconds at least."""
    folder, seconds, out = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
    found = {}
    for name in ("torch", "openvino"):
        if name == "openvino" and not find_spec("openvino"):
            continue
        model = Model.load(folder, device="cpu", runtime=name, threads=cores())
        patch, run = torch.as_tensor(noise(model.plan).image)[None], model.runtime
        run(patch)  # warms up
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            run(patch)
            count += 1
        found[name] = count / (time.perf_counter() - began)
    out.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
