"""How the studies of a batch ended, and the tables that say so."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from medseg.io.files import written_whole


@dataclass(frozen=True)
class Outcome:
    """How a study ended: its keyed name, status, reason and text, the volumes in ml, whether an earlier run did it.

    `path` is for who may see it: folders are often called after patients.
    """

    study: str
    status: str
    reason: str | None
    text: str | None
    seconds: float
    volumes_ml: dict[str, float]
    kept: bool
    path: Path


def write_summary(out: Path, shard: tuple[int, int] | None, outcomes: Sequence[Outcome]) -> None:
    """Write one row for each study to summary.csv and summary.json, or those of a shard. Raises OutputError."""
    stem = "summary" if shard is None else f"summary_{shard[0]}_of_{shard[1]}"
    rows = [{name: value for name, value in asdict(one).items() if name != "path"} for one in outcomes]
    with written_whole(out / f"{stem}.json") as beside:
        beside.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    labels = dict.fromkeys(name for one in outcomes for name in one.volumes_ml)
    columns = ["study", "status", "reason", "text", "seconds", "kept", *(f"{name} ml" for name in labels)]
    with written_whole(out / f"{stem}.csv") as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {f"{name} ml": volume for name, volume in row["volumes_ml"].items()})
