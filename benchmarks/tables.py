"""Results of benchmark runs as tables and as a plot."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

PEER = "nnunet"

Result = dict[str, Any]
Group = dict[str, list[Result]]
"""The results of each system, one for each seed."""


def read_results(folder: Path) -> list[Result]:
    """Return every run of a folder of results, in the order of file names."""
    found = (json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json")))
    return [result for result in found if "system" in result]


def print_tables(results: Iterable[Result]) -> None:
    """Print a table for each case, count of classes and network; figures are medians over seeds."""
    for (case, classes, features), group in _groups(results).items():
        table = Table(title=f"{case}: {classes} classes, {features} features", title_justify="left")
        columns = ("system", "time s", "cpu s", "peak GB", "faster than nnU-Net", "smaller", "time / network", "runs")
        for column in columns:
            table.add_column(column, justify="left" if column == "system" else "right")
        for system, runs in group.items():
            table.add_row(*_row(system, runs, group))
        Console().print(table)


def write_plot(results: Iterable[Result], path: Path) -> None:
    """Draw time and peak memory against classes (120 slices of 3 mm) and against slices of 1 mm (25 classes)."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import, and seldom wanted

    done = [result for result in results if result["status"] == "done" and result["setting"]["features"] == 4]
    by_classes = [result for result in done if result["setting"]["case"]["name"] == "small"]
    by_slices = [result for result in done if result["setting"]["classes"] == 25 and _is_slices(result)]
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for row, (value, unit) in enumerate((("seconds", "time (s)"), ("peak_gb", "peak memory (GB)"))):
        _lines(axes[row][0], by_classes, lambda setting: setting["classes"], value)
        _lines(axes[row][1], by_slices, lambda setting: setting["case"]["slices"], value)
        axes[row][0].set(xlabel="classes (512 x 512 x 120 at 0.75 x 0.75 x 3 mm)", ylabel=unit)
        axes[row][1].set(xlabel="slices of 512 x 512 at 0.75 x 0.75 x 1 mm (25 classes)", ylabel=unit)
    figure.savefig(path, dpi=120)


def _groups(results: Iterable[Result]) -> dict[tuple[str, int, int], Group]:
    groups: dict[tuple[str, int, int], Group] = defaultdict(lambda: defaultdict(list))
    for result in results:
        setting = result["setting"]
        groups[setting["case"]["name"], setting["classes"], setting["features"]][result["system"]].append(result)
    return dict(sorted(groups.items()))


def _row(system: str, runs: Sequence[Result], group: Group) -> list[str]:
    if any(run["status"] != "done" for run in runs):
        return [system, *sorted({run["status"] for run in runs})]
    if system.startswith("network"):
        seconds = median(run["tiles"] * run["tile_seconds"] for run in runs)
        return [system, f"{seconds:.1f}", "", "", "", "", "1.00", str(len(runs))]
    seconds, cpu, peak = (_median(runs, key) for key in ("seconds", "cpu_seconds", "peak_gb"))
    row = [system, f"{seconds:.1f}", f"{cpu:.1f}", f"{peak:.2f}", "", "", "", str(len(runs))]
    peers = group.get(PEER, [])
    if peers and all(run["status"] == "done" for run in peers):
        row[4] = f"{_median(peers, 'seconds') / seconds:.2f} x"
        row[5] = f"{_median(peers, 'peak_gb') / peak:.2f} x"
    networks = [run for run in group.get(_network_of(system), []) if run["status"] == "done"]
    if networks:
        tiles = median(run.get("report", {}).get("tiles_run", networks[0]["tiles"]) for run in runs)
        row[6] = f"{seconds / (tiles * _median(networks, 'tile_seconds')):.2f}"
    return row


def _median(runs: Sequence[Result], key: str) -> float:
    return float(median(run[key] for run in runs))


def _network_of(system: str) -> str:
    return "network-openvino" if "openvino" in system else "network-torch"


def _is_slices(result: Result) -> bool:
    case = result["setting"]["case"]
    return bool(case["edge"] == 512 and case["slice_mm"] == 1.0)


def _lines(axes: Any, results: Sequence[Result], position: Any, value: str) -> None:
    systems: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        if not result["system"].startswith("network"):
            systems[result["system"]][position(result["setting"])].append(result[value])
    for system, points in sorted(systems.items()):
        places = sorted(points)
        axes.plot(places, [median(points[place]) for place in places], marker="o", label=system)
    axes.set_ylim(bottom=0)
    if systems:
        axes.legend()
