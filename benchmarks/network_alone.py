"""The bare network's time, `network_alone.py MODEL IN RUNTIME`: prints how many tiles there are and what one takes."""

from __future__ import annotations

import json
import math
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch

from medseg.io import load
from medseg.model.plan import Plan
from medseg.model.preprocess import prepare
from medseg.model.runtime import make_runtime
from medseg.model.weights import load_network
from medseg.networks.build import placed

TIMED_TILES = 20
STEP = 0.5


def main() -> None:
    """Time the network, in one of medseg's runtimes, on tiles that lie evenly over the prepared image."""
    folder, source, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    plan = Plan.load(folder / "plan.json")
    image = prepare(load(source), plan).array
    short = [max(0, edge - size) for size, edge in zip(image.shape[1:], plan.patch, strict=True)]
    image = np.pad(image, ((0, 0), *((0, gap) for gap in short)))
    starts = []
    for size, edge in zip(image.shape[1:], plan.patch, strict=True):
        last = math.ceil((size - edge) / (edge * STEP))
        starts.append([round(place * (size - edge) / max(1, last)) for place in range(last + 1)])
    corners = list(product(*starts))
    cpu = torch.device("cpu")
    network = placed(load_network(plan, folder / "fold_0.safetensors"), cpu).eval()
    runtime = make_runtime(plan, [network], device=cpu, runtime=name)
    picked = [corners[round(place)] for place in np.linspace(0, len(corners) - 1, min(TIMED_TILES, len(corners)))]
    times = []
    with torch.inference_mode():
        for corner in [picked[0], *picked]:  # the first one warms up
            part = tuple(slice(a, a + edge) for a, edge in zip(corner, plan.patch, strict=True))
            tile = torch.from_numpy(np.ascontiguousarray(image[(slice(None), *part)]))[None]
            began = time.perf_counter()
            runtime(tile)
            times.append(time.perf_counter() - began)
    print(json.dumps({"tiles": len(corners), "tile_seconds": float(np.mean(times[1:]))}))


if __name__ == "__main__":
    main()
