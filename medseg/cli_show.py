"""How the command line shows things: tables, bars that move, errors in one line, JSON for machines."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medseg.errors import MedsegError

if TYPE_CHECKING:
    from medseg.model.run import Outcome as Segmented
    from medseg.report.measurements import Measurement
    from medseg.report.metrics import Scores
    from medseg.study.batch import Progress as BatchProgress
    from medseg.study.outcomes import Outcome

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

out = Console()
err = Console(stderr=True)


@contextmanager
def batch_table(show_paths: bool) -> Iterator[Callable[[BatchProgress], None]]:
    """Give a function that keeps a table of a batch up to date on standard error, if that is a terminal."""
    from rich.live import Live

    began = time.monotonic()
    if not err.is_terminal:
        yield lambda _: None
        return
    with Live(console=err, refresh_per_second=4) as live:

        def show(now: BatchProgress) -> None:
            fresh = now.ended.total() - now.kept
            left = now.total - now.ended.total()
            remaining = clock((time.monotonic() - began) / fresh * left) if fresh else "?"
            counts = "  ".join(f"{now.ended[status]} {status}" for status in ("done", "refused", "failed"))
            title = f"{now.total} studies: {counts}  {left} to do, {remaining} left, {now.workers} workers"
            table = Table(title=title, title_justify="left")
            for column in ("worker", "study", "stage", "seconds"):
                table.add_column(column)
            for name, study, path, stage, seconds in now.running:
                table.add_row(name, str(path) if show_paths else study, stage, f"{seconds:.0f}")
            live.update(table)

        yield show


@contextmanager
def progress() -> Iterator[Callable[[str, float, str], None]]:
    """Give a function (stage, share done, detail) that moves a bar on standard error, if that is a terminal."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} % {task.fields[detail]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=err, disable=not err.is_terminal) as bar:
        stages: dict[str, TaskID] = {}

        def show(stage: str, done: float, detail: str) -> None:
            if stage not in stages:
                stages[stage] = bar.add_task(stage, total=1.0, detail="")
            bar.update(stages[stage], completed=done, detail=detail)

        yield show


def tiles(show: Callable[[str, float, str], None]) -> Callable[[str, int, int], None]:
    """Return a function (name, done, total) that shows tiles, their speed, and the time that is left."""
    began: dict[str, float] = {}

    def report(name: str, done: int, total: int) -> None:
        seconds = time.monotonic() - began.setdefault(name, time.monotonic())
        speed = (done - 1) / seconds if seconds else math.nan
        left = clock((total - done) / speed) if done > 1 else "?"
        show(name, done / total, f"tile {done} of {total}  {speed:.1f}/s  {left} left" if done > 1 else "")

    return report


def print_error(error: MedsegError | str, path: object) -> None:
    """Show an expected error in one line, with the path that it concerns."""
    place = "" if path is None else f"{path}: "
    err.print(f"medseg: {place}{error}", markup=False, highlight=False, style="red", soft_wrap=True)


def print_json(content: object) -> None:
    """Print JSON for machines."""
    sys.stdout.write(json.dumps(content, indent=1, allow_nan=False) + "\n")


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table; their keys are the columns."""
    table = Table(title=Text(title, "table.title"), title_justify="left")  # brackets of a path are no markup
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(plain(row.get(column, "")) for column in columns))
    out.print(table, markup=False)


def print_series(facts: dict[str, Any]) -> None:
    """Print the series of studies with their verdicts, and below them what was refused and why."""
    series, problems = facts["series"], facts["problems"]
    parted = {(one["study"], one["series"]) for one in series if one["part"] > 1}
    rows = []
    for one in series:
        number = f"{one['series']}/{one['part']}" if (one["study"], one["series"]) in parted else one["series"]
        rows.append({"study": one["study"], "series": number, "kind": one["modality"]})
        rows[-1] |= {"description": one["description"]} if "description" in one else {}
        rows[-1] |= {"slices": one["slices"], "matrix": one["matrix"], "spacing_mm": one.get("spacing_mm")}
        rows[-1] |= {"axes": one.get("orientation"), "tilt": f"{one.get('tilt_deg', 0):.1f}°"}
        rows[-1] |= {"verdict": one["verdict"] + (f": {one['reason']}" if one["reason"] else "")}
    studies = len({one["study"] for one in (*series, *problems)})
    print_table(f"{studies} {'study' if studies == 1 else 'studies'}, {len(rows)} series", rows)
    for row, one in zip(rows, series, strict=True):
        if one["text"] is not None:
            out.print(f"study {row['study']}, series {row['series']}: {one['text']}", markup=False, highlight=False)
    for problem in problems:
        out.print(f"study {problem['study']}: {problem['text']}", markup=False, highlight=False)


def print_measurements(title: str, measurements: Sequence[Measurement]) -> None:
    """Print the volume of each structure."""
    rows = [{"label": row.value, "name": row.name, "volume_ml": row.volume_ml} for row in measurements]
    if any(row.expected_volume_ml is not None for row in measurements):
        for line, row in zip(rows, measurements, strict=True):
            line["expected_volume_ml"] = row.expected_volume_ml
    print_table(title, rows)


def show_segmented(outcomes: Sequence[Segmented], report: Path | None, *, as_json: bool) -> None:
    """Show the measurements or the error of each scan; after that, write all of it to the report."""
    from medseg.io.files import written_whole

    content = [outcome.to_dict() for outcome in outcomes]
    if as_json:
        print_json(content)
    for outcome in outcomes:
        if outcome.error is not None:
            source = outcome.source
            print_error(outcome.error, source if isinstance(source, Path) else ",".join(map(str, source)))
        elif not as_json:
            _show_one(outcome)
    if report is not None:
        with written_whole(report) as beside:
            beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _show_one(outcome: Segmented) -> None:
    remarks = [f"warning: {text}" for text in outcome.warnings]
    if outcome.left_out is None:
        print_measurements(str(outcome.target), outcome.measurements)
    else:
        remarks = [f"{outcome.source}: left out, since it is no scan: {outcome.left_out} (--anyway takes it)."]
    for text in remarks:
        err.print(text, markup=False, highlight=False, style="yellow", soft_wrap=True)


def show_scores(scores: Scores, title: str, *, as_json: bool) -> None:
    """Show the mean scores of each label, or all scores as JSON."""
    content = scores.to_dict()
    if as_json:
        print_json(content)
        return
    keys = ("dice", "precision", "recall", "surface_dice", "hd95_mm", "mean_surface_mm", "volume_difference_ml")
    rows = [{"label": row["name"], **{key: row[key] for key in keys}} for row in content["labels"]]
    for row, label in zip(rows, content["labels"], strict=True):
        if label["dice_low"] is not None:
            row["dice"] = f"{label['dice']:.3f} ({label['dice_low']:.3f} to {label['dice_high']:.3f})"
    print_table(
        f"{title}: {len(scores.cases)} cases", [*rows, {"label": "mean", **{key: content["mean"][key] for key in keys}}]
    )


def plain(value: object) -> str:
    """Return a value as a table shows it."""
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return "×".join(f"{part:g}" if isinstance(part, float) else str(part) for part in value)
    return "" if value is None else str(value)


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def show_outcomes(outcomes: Sequence[Outcome], *, show_paths: bool, as_json: bool) -> None:
    """Show how the studies of a batch ended: all of them as JSON, else those that are not done, and how many are."""
    if as_json:
        names = ("study", "status", "reason", "text", *(["path"] if show_paths else []))
        rows = [{name: getattr(one, name) for name in names} for one in outcomes]
        print_json([row | ({"path": str(row["path"])} if show_paths else {}) for row in rows])
        return
    for one in outcomes:
        if one.status != "done":
            name = one.path if show_paths else one.study
            out.print(f"{name}: {one.status}, {one.reason}: {one.text}", markup=False, highlight=False)
    counts = [f"{sum(one.status == status for one in outcomes)} {status}" for status in ("done", "refused", "failed")]
    kept = sum(one.kept for one in outcomes)
    out.print(f"{len(outcomes)} studies: {', '.join(counts)}; {kept} of them by an earlier run", highlight=False)
