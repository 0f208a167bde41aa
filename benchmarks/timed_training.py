"""Train a fold for some steps and write down when each ended, and what drawing and changing its patches takes.

python timed_training.py DATASET MODEL STEPS OUT.json
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

from medseg.model.segmenter import pick_device
from medseg.train.cache import prepare_cases
from medseg.train.feed import batches, resident
from medseg.train.loop import plan_dataset, train_model
from medseg.train.run import TrainProgress
from medseg.train.sampler import Sampler
from medseg.train.settings import TrainSettings


def main() -> None:
    """Train, then draw the same batches once more by themselves."""
    dataset, folder, steps, out = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    ends: list[float] = []

    def note(now: TrainProgress) -> None:
        if now.stage == "train":
            ends.append(time.time())

    settings = TrainSettings.load(folder / "train.json")
    cases, plan = plan_dataset(dataset, folder)
    train_model(cases, plan, folder, budget=f"{steps}steps", settings=settings, progress=note)
    training, _ = cases.fold(0, settings.folds)
    device = pick_device(None)
    prepared = resident(prepare_cases(training, plan, folder / "cache"), device)
    sampler = Sampler(prepared, plan, settings.seed, settings.foreground, device)
    began = time.perf_counter()
    for _ in itertools.islice(batches(sampler, range(settings.batch), 0), steps):
        pass
    drawing = (time.perf_counter() - began) / steps
    out.write_text(json.dumps({"ends": ends, "drawing_s": drawing}), encoding="utf-8")


if __name__ == "__main__":
    main()
