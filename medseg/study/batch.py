"""A pipeline over all studies of a folder: thousands overnight, each of which ends as done, refused or failed."""

from __future__ import annotations

import csv
import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from os import PathLike, cpu_count
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal

from medseg.errors import ModelError, OutputError, UnreadableFile, UsageError
from medseg.io.files import written_whole
from medseg.study.check import check_pipeline
from medseg.study.claims import Claims
from medseg.study.cohort import Entry, find_cohort
from medseg.study.ledger import Ledger, sha256, state
from medseg.study.local import Event, Process
from medseg.study.pipeline import Pipeline, load_pipeline
from medseg.study.worker import Start, Task

MOST_DEATHS = 2
"""After so many processes that died of a study it is marked, and the others go on."""

MOST_STARTS = 3
"""Processes that may end before their network is loaded."""

AHEAD = 2
"""Studies that a process has and has not computed yet: one in work, one being read."""

POLL_S, ELSEWHERE_S = 0.5, 2.0
"""How often progress is shown, and studies that another batch has claimed are looked at."""


@dataclass(frozen=True)
class Options:
    """How a batch runs. `verify` "full" hashes the input files, too, before a study is taken for done.

    `shard` (i, n) runs the i-th of n parts. `threads` are those of each network; by default the cores are shared out.
    """

    workers: int = 1
    shard: tuple[int, int] | None = None
    verify: Literal["quick", "full"] = "quick"
    device: str | None = None
    runtime: str | None = None
    precision: str | None = None
    threads: int | None = None


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


@dataclass(frozen=True)
class Progress:
    """Where a batch stands: how many studies there are, ended how, were kept, and what each process works on.

    A row of `running` is process id, study, path, stage, seconds.
    """

    total: int
    ended: Counter[str]
    kept: int
    running: tuple[tuple[int, str, Path, str, float], ...]


Show = Callable[[Progress], None]


def run_batch(
    pipeline: str | PathLike[str] | Pipeline,
    studies: str | PathLike[str],
    out: str | PathLike[str],
    options: Options | None = None,
    *,
    progress: Show | None = None,
) -> list[Outcome]:
    """Return how every study of a folder ended; its outputs and manifest are in a folder of `out` named by a hash.

    What an earlier run did, and still verifies, is kept; failed studies are tried again. Studies that another batch
    works on are waited for. A summary of all is written to `out`.
    Raises UsageError for a pipeline that cannot run, ModelError where the network cannot be loaded, OutputError where
    `out` cannot be written; no single study raises.
    """
    options = options or Options()
    if options.workers < 1:
        raise UsageError(f"A batch needs at least one worker; here it is {options.workers}.")
    chosen = pipeline if isinstance(pipeline, Pipeline) else load_pipeline(pipeline)
    model = check_pipeline(chosen)
    if Path(out).resolve().is_relative_to(Path(studies).resolve()):
        raise UsageError("The outputs would lie among the studies: give a folder outside of theirs.", path=out)
    entries = find_cohort(studies, options.shard)
    if not entries and options.shard is None:
        raise UnreadableFile("There is no DICOM file here.", path=studies, reason="no_dicom")
    ledger = Ledger.open(out)
    batch = _Batch(chosen, _model_digest(model), ledger, options, Path(studies), progress or (lambda _: None))
    ledger.remember((ledger.name(one.identity), one.uid, str(one.files[0].parent)) for one in entries)
    try:
        batch.run(entries)
    finally:
        batch.close()
    outcomes = [batch.outcomes[ledger.name(one.identity)] for one in entries]
    _write_summary(ledger.out, options.shard, outcomes)
    return outcomes


@dataclass
class _Batch:
    pipeline: Pipeline
    model_digest: str
    ledger: Ledger
    options: Options
    root: Path
    show: Show
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    pending: deque[str] = field(default_factory=deque)
    elsewhere: deque[str] = field(default_factory=deque)
    claimed: deque[str] = field(default_factory=deque)
    suspects: deque[str] = field(default_factory=deque)
    deaths: Counter[str] = field(default_factory=Counter)
    early_deaths: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    processes: list[Process] = field(default_factory=list)
    events: SimpleQueue[Event] = field(default_factory=SimpleQueue)

    def __post_init__(self) -> None:
        self.claims = Claims(self.ledger.out / ".claims")

    def run(self, entries: Sequence[Entry]) -> None:
        """Bring every entry to its end."""
        self.entries = {self.ledger.name(entry.identity): entry for entry in entries}
        self.pending.extend(self.entries)
        self._sweep()
        while len(self.outcomes) < len(self.entries):
            self._feed()
            self._report()
            if self.elsewhere and not (self.pending or self.suspects or self._in_flight()):
                time.sleep(ELSEWHERE_S)
                self.pending, self.elsewhere = self.elsewhere, deque()
            with suppress(Empty):
                self._handle(self.events.get(timeout=POLL_S if self.processes else 0.01))
        self._report()

    def close(self) -> None:
        """End the processes and give back what is claimed."""
        for process in self.processes:
            process.close()
        for study in self.entries:
            if study in self.claims.held:
                self.ledger.sweep(study)
        self.claims.close()

    def _feed(self) -> None:
        """Give studies to processes that wait for some; a suspect gets a process of its own."""
        for process in self._ready_processes():
            if process.alone:
                continue
            if self.suspects:
                if not process.in_flight:
                    process.alone = True
                    self._send(process, self.suspects.popleft())
                continue
            while process.uncomputed < AHEAD and (study := self._next()) is not None:
                self._send(process, study)

    def _ready_processes(self) -> list[Process]:
        """Return the processes that have loaded their network; more are started while there is work for them."""
        if not self.processes and not self.suspects and (study := self._next()) is not None:
            self.claimed.append(study)  # so that no network is loaded where everything is done already
        waiting = len(self.pending) + len(self.claimed) + len(self.suspects)
        busy = len(self._in_flight())
        if self.processes or self.claimed or self.suspects:
            while len(self.processes) < min(self.options.workers, waiting + busy):
                self.processes.append(Process(self._start(), self.events))
        return [process for process in self.processes if process.ready]

    def _next(self) -> str | None:
        """Return the next study to run, which is claimed then; what verifies or is claimed elsewhere is passed over."""
        if self.claimed:
            return self.claimed.popleft()
        while self.pending:
            study = self.pending.popleft()
            if self._kept(study):
                continue
            if not self.claims.claim(study):
                self.elsewhere.append(study)
                continue
            self.ledger.sweep(study)
            if not self._kept(study):
                return study
            self.claims.release(study)
        return None

    def _kept(self, study: str) -> bool:
        expected = {**self._identity(), "state": self._state(study)}
        found = self.ledger.verified(study, expected)
        if found is None or (self.options.verify == "full" and not self._same_inputs(study, found)):
            return False
        self._ended(study, found, kept=True)
        return True

    def _same_inputs(self, study: str, manifest: dict[str, Any]) -> bool:
        inputs = manifest.get("inputs")
        if not isinstance(inputs, dict):
            return False  # refused before anything was read
        files = {name: path for path, name in self._files(study).items()}
        if not set(inputs["used"]) <= files.keys():
            return False  # inside an archive
        try:
            return sha256(*(files[name] for name in inputs["used"])) == str(inputs["sha256"])
        except OSError:
            return False

    def _identity(self) -> dict[str, Any]:
        return {
            "pipeline": self.pipeline.name,
            "pipeline_sha256": self.pipeline.digest,
            "model_sha256": self.model_digest,
        }

    def _files(self, study: str) -> dict[Path, str]:
        root = self.root
        return {
            file: self.ledger.name(str(file.relative_to(root) if file.is_relative_to(root) else file))
            for file in self.entries[study].files
        }

    def _state(self, study: str) -> str:
        return state([(name, path) for path, name in self._files(study).items()])

    def _start(self) -> Start:
        threads = self.options.threads
        if threads is None and self.options.workers > 1:
            threads = max(1, (cpu_count() or 1) // self.options.workers)
        return Start(
            pipeline=self.pipeline.model_dump(mode="json"),
            out=str(self.ledger.out.resolve()),
            key=self.ledger.key.hex(),
            token=self.claims.token,
            manifest=self._identity(),
            device=self.options.device,
            runtime=self.options.runtime,
            precision=self.options.precision,
            threads=threads,
        )

    def _send(self, process: Process, study: str) -> None:
        files = {str(path.resolve()): name for path, name in self._files(study).items()}
        process.send(Task(study, files, self._state(study)))

    def _handle(self, event: Event) -> None:
        process, message = event
        process.note(message)
        if "fatal" in message:
            raise ModelError(str(message["fatal"]["text"]), reason=str(message["fatal"]["reason"]))
        if "gone" in message:
            self._gone(process)
        elif "done" in message:
            self.early_deaths = 0
            process.alone = False
            self._ended(str(message["done"]), message["manifest"], kept=False)

    def _gone(self, process: Process) -> None:
        """Blame the studies that a dead process had; the next time each has a process of its own."""
        self.processes.remove(process)
        process.close()
        if not process.ready:
            self.early_deaths += 1
            if self.early_deaths >= MOST_STARTS:
                raise ModelError("The process that runs the network ended before it was loaded, several times.")
        for study in process.in_flight:
            self.ledger.sweep(study)
            self.deaths[study] += 1
            if self.deaths[study] < MOST_DEATHS:
                self.suspects.append(study)
                continue
            self._mark(study)

    def _mark(self, study: str) -> None:
        """Write down that a study kills who runs it."""
        text = f"{MOST_DEATHS} processes died of this study, most likely for want of memory."
        facts = {"status": "failed", "reason": "killed_worker", "text": text, "state": self._state(study)}
        with suppress(OutputError):  # the summary will say so, if there is room for it
            work = self.ledger.work_folder(study, self.claims.token)
            self.ledger.publish(study, work, facts | self._identity())
        self._ended(study, facts, kept=False)

    def _ended(self, study: str, manifest: dict[str, Any], *, kept: bool) -> None:
        self.outcomes[study] = Outcome(
            study=study,
            status=str(manifest["status"]),
            reason=manifest["reason"],
            text=manifest["text"],
            seconds=round(sum(manifest.get("seconds", {}).values()), 3),
            volumes_ml={one["name"]: one["volume_ml"] for one in manifest.get("labels", [])},
            kept=kept,
            path=self.entries[study].files[0].parent,
        )
        self.ended[self.outcomes[study].status] += 1
        self.kept += kept
        if not kept:
            self.claims.release(study)

    def _in_flight(self) -> list[str]:
        return [study for process in self.processes for study in process.in_flight]

    def _report(self) -> None:
        now = time.monotonic()
        running = tuple(
            (process.pid, study, self.entries[study].files[0].parent, stage, now - since)
            for process in self.processes
            for study, (stage, since) in process.in_flight.items()
        )
        self.show(Progress(len(self.entries), self.ended.copy(), self.kept, running))

    def _sweep(self) -> None:
        """Remove what interrupted runs left of studies that nobody works on."""
        for study in {folder.name.split(".")[0] for folder in (self.ledger.out / ".work").iterdir()}:
            if self.claims.claim(study):
                self.ledger.sweep(study)
                self.claims.release(study)


def _model_digest(folder: Path) -> str:
    files = [folder / "plan.json", *sorted(folder.glob("fold_*.safetensors"))]
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()


def _write_summary(out: Path, shard: tuple[int, int] | None, outcomes: Sequence[Outcome]) -> None:
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
