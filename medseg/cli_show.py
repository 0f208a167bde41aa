"""How the command line shows things: tables, bars that move, errors in one line, JSON for machines."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from medseg.cli_terminal import err, out, visible
from medseg.errors import MedsegError

if TYPE_CHECKING:
    from medseg.model.run import Outcome as Segmented
    from medseg.report.measurements import Measurement
    from medseg.report.metrics import Scores
    from medseg.study.batch import Progress as BatchProgress
    from medseg.study.outcomes import Outcome

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

LINE_S = 60.0
"""Between two lines on how far the work is, where standard error is no terminal."""

SHORT, LEAST = 24, 12
"""Characters of cells that stay in one piece, and that a column of longer ones needs to fold into."""

SHOWN = ("surface_dice", "hd95_mm", "volume_error_ml")
"""Scores that fit beside Dice into 80 columns; JSON and CSV have all of them."""


@contextmanager
def batch_table(show_paths: bool, *, as_json: bool = False) -> Iterator[Callable[[BatchProgress], None]]:
    """Give a function that keeps a table of a batch up to date on standard error, or writes a line a minute there.

    Where JSON is asked for, no lines are written: many a caller joins standard error to it.
    """
    from rich.live import Live

    began, write = time.monotonic(), line_a_minute()

    def summary(now: BatchProgress) -> str:
        fresh = now.ended.total() - now.kept
        left = now.total - now.ended.total()
        remaining = clock((time.monotonic() - began) / fresh * left) if fresh else "?"
        counts = ", ".join(f"{now.ended[status]} {status}" for status in ("done", "refused", "failed"))
        return f"{count(now.total, 'study')}: {counts}, {left} to do, {remaining} left, {count(now.workers, 'worker')}"

    if not err.is_terminal:
        yield lambda now: None if as_json else write(summary(now))
        return
    with Live(console=err, refresh_per_second=4) as live:

        def show(now: BatchProgress) -> None:
            table = Table(title=summary(now), title_justify="left")
            for column in ("worker", "study", "stage", "seconds"):
                table.add_column(column)
            for name, study, path, stage, seconds in now.running:
                table.add_row(name, str(path) if show_paths else study, stage, f"{seconds:.0f}")
            live.update(table)

        yield show


@contextmanager
def progress(*, as_json: bool = False) -> Iterator[Callable[[str, float, str], None]]:
    """Give a function (stage, share done, detail) that moves a bar on standard error, or writes a line a minute.

    Where JSON is asked for, no lines are written: many a caller joins standard error to it.
    """
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} % {task.fields[detail]}", markup=False),
    )
    if not err.is_terminal:
        yield (lambda *_: None) if as_json else _lines()
        return
    with Progress(*columns, TimeElapsedColumn(), console=err) as bar:
        stages: dict[str, TaskID] = {}

        def show(stage: str, done: float, detail: str) -> None:
            if stage not in stages:
                stages[stage] = bar.add_task(visible(stage), total=1.0, detail="")
            bar.update(stages[stage], completed=done, detail=visible(detail))

        yield show


def _lines() -> Callable[[str, float, str], None]:
    """Return a function (stage, share done, detail) that writes a line a minute: what, how far, and what is left."""
    write, began = line_a_minute(), dict[str, float]()

    def show(stage: str, done: float, detail: str) -> None:
        seconds = time.monotonic() - began.setdefault(stage, time.monotonic())
        left = f"  {clock(seconds / done * (1 - done))} left" if done and "left" not in detail else ""
        write(f"{stage}: {100 * done:.0f} %  {detail}{left}")

    return show


def line_a_minute() -> Callable[[str], None]:
    """Return a function that writes a line when a minute has passed since the last one, or since the start."""
    last = [time.monotonic()]

    def write(text: str) -> None:
        if time.monotonic() - last[0] >= LINE_S:
            last[0] = time.monotonic()
            err.print(f"medseg: {text}", soft_wrap=True)

    return write


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
    err.print(f"medseg: {place}{error}", style="red", soft_wrap=True)


def print_json(content: object) -> None:
    """Print JSON for machines."""
    text = json.dumps(content, indent=1, allow_nan=False)
    sys.stdout.write(text.replace("\x7f", "\\u007f") + "\n")  # the one letter that steers and that json lets pass


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table; their keys are the columns. Short cells and numbers are in one piece, long ones fold."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    cells = {
        key: [plain(row.get(key, "")) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)
    }
    heads = {key: key.split("_") for key in cells}
    widths = {key: max(map(cell_len, (*heads[key], *lines))) for key, lines in cells.items()}
    numeric = {key for key in cells if all(isinstance(row.get(key), int | float | None) for row in rows)}
    short = _in_one_piece(widths, numeric)
    for key in cells:
        whole, numbers = key in short, key in numeric
        head = ("\n" if whole else " ").join(heads[key])
        table.add_column(Text(head), overflow="fold", no_wrap=whole, justify="right" if numbers else "left")
    for line in zip(*cells.values(), strict=True):
        table.add_row(*line)
    out.print(title, style="table.title", soft_wrap=True)
    out.print(table)


def _in_one_piece(widths: dict[str, int], numeric: Collection[str]) -> set[str]:
    """Return the columns whose cells need not fold; of short texts the longest fold first where all do not fit."""
    short = {key for key, width in widths.items() if width <= SHORT}
    for key in sorted(short - set(numeric), key=widths.__getitem__, reverse=True):
        if sum(widths[one] if one in short else LEAST for one in widths) + 2 * len(widths) <= out.width:
            break
        short.discard(key)
    return short


def print_series(facts: dict[str, Any]) -> None:
    """Print the series of studies with their verdicts, and below them what was refused and why."""
    series, problems = facts["series"], facts["problems"]
    parted = {(one["study"], one["series"]) for one in series if one["part"] > 1}
    rows = []
    for one in series:
        number = f"{one['series']}/{one['part']}" if (one["study"], one["series"]) in parted else one["series"]
        rows.append({"study": one["study"], "series": number, "kind": one["modality"]})
        rows[-1] |= {"description": one["description"]} if "description" in one else {}
        spacing_mm = [round(length, 2) for length in one.get("spacing_mm", ())]
        rows[-1] |= {"voxels": [*one["matrix"], one["slices"]], "spacing_mm": spacing_mm}
        rows[-1] |= {
            "axes": one.get("orientation"),
            "tilt": f"{one.get('tilt_deg', 0):.1f}°",
            "verdict": one["verdict"],
        }
    studies = len({one["study"] for one in (*series, *problems)})
    print_table(f"{count(studies, 'study')}, {len(rows)} series", rows)
    for row, one in zip(rows, series, strict=True):
        if one["text"] is not None:
            told = f"study {row['study']}, series {row['series']}: {one['reason']}: {one['text']}"
            out.print(told, soft_wrap=True)
    for problem in problems:
        out.print(f"study {problem['study']}: {problem['text']}", soft_wrap=True)


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
        err.print(text, style="yellow", soft_wrap=True)


def show_scores(scores: Scores, title: str, *, as_json: bool) -> None:
    """Show the mean scores of each label, or all scores as JSON."""
    content = scores.to_dict()
    if as_json:
        print_json(content)
        return
    rows = []
    for name, row in [*((row["name"], row) for row in content["labels"]), ("mean", content["mean"])]:
        ends = (row.get("dice_low"), row.get("dice_high"))
        interval = "" if None in ends else f"{ends[0]:.3f}–{ends[1]:.3f}"
        rows.append({"label": name, "dice": row["dice"], "95 %_interval": interval})
        rows[-1] |= {key: row[key] for key in SHOWN}
        rows[-1] |= {"cases": str(row.get("cases", "")), "missed": row["missed"]}
        rows[-1] |= {"invented": row["invented"]} if content["mean"]["invented"] else {}
    print_table(f"{title}: {count(len(scores.cases), 'case')}", rows)


def plain(value: object) -> str:
    """Return a value as a table shows it."""
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return "×".join(f"{part:g}" if isinstance(part, float) else str(part) for part in value)
    return "" if value is None else str(value)


def count(number: int, what: str) -> str:
    """Return a number with what it counts, such as "1 study" and "2 studies"."""
    return f"{number} {what}" if number == 1 else f"{number} {what[:-1]}ies" if what[-1] == "y" else f"{number} {what}s"


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
            out.print(f"{name}: {one.status}, {one.reason}: {one.text}")
    counts = [f"{sum(one.status == status for one in outcomes)} {status}" for status in ("done", "refused", "failed")]
    kept = sum(one.kept for one in outcomes)
    total = f"{count(len(outcomes), 'study')}: {', '.join(counts)}; {kept} of them by an earlier run"
    out.print(total, soft_wrap=True)
