"""A pipeline over all studies of a folder: thousands overnight, each of which ends as done, refused or failed."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from queue import Empty
from typing import Any, Literal

from medseg.errors import ModelError, OutputError, UnreadableFile, UsageError
from medseg.study.check import check_pipeline
from medseg.study.claims import Claims
from medseg.study.cluster import Cluster
from medseg.study.cohort import Entry, find_cohort
from medseg.study.deidentify import check_deidentified
from medseg.study.engine import Engine, Event, Hand
from medseg.study.ledger import Ledger, sha256, state
from medseg.study.local import Local
from medseg.study.outcomes import Outcome, write_summary
from medseg.study.pipeline import Pipeline, load_pipeline
from medseg.study.worker import Start, Task, model_digests

MOST_DEATHS = 2
"""After so many processes that died of a study it is marked, and the others go on."""

MOST_STARTS = 3
"""Processes that may end before their network is loaded."""

AHEAD = 2
"""Studies that a process has and has not computed yet: one in work, one being read."""

MOST_HELD = 4
"""Studies that a process has in all: those that are computed wait in its memory to be written."""

TIME_LIMIT_S = 4 * 3600.0
"""For so long one study may be worked on; then its worker counts as dead."""

POLL_S, ELSEWHERE_S = 0.5, 2.0
"""How often progress is shown, and studies that another batch has claimed are looked at."""


@dataclass(frozen=True)
class Options:
    """How a batch runs. `verify` "full" hashes the input files, too, before a study is taken for done.

    `shard` (i, n) runs the i-th of n parts. `threads` are those of each network; by default the cores are shared out,
    and on a cluster each worker takes those that it was started with. `deidentify` leaves out of the results whatever
    says whose they are, see `study/deidentify.py`. A worker is ended that works on one study for more than
    `time_limit_s`.
    """

    workers: int = 1
    shard: tuple[int, int] | None = None
    verify: Literal["quick", "full"] = "quick"
    device: str | None = None
    runtime: str | None = None
    precision: str | None = None
    threads: int | None = None
    deidentify: bool = False
    time_limit_s: float = TIME_LIMIT_S


@dataclass(frozen=True)
class Progress:
    """Where a batch stands: how many studies there are, ended how, were kept, and what each process works on.

    `workers` counts those that are ready. A row of `running` is the worker's name, study, path, stage, seconds.
    """

    total: int
    ended: Counter[str]
    kept: int
    workers: int
    running: tuple[tuple[str, str, Path, str, float], ...]


Show = Callable[[Progress], None]


def run_batch(
    pipeline: str | PathLike[str] | Pipeline,
    studies: str | PathLike[str],
    out: str | PathLike[str],
    options: Options | None = None,
    *,
    scheduler: Any = None,
    progress: Show | None = None,
) -> list[Outcome]:
    """Return how every study of a folder ended; its outputs and manifest are in a folder of `out` named by a hash.

    What an earlier run did, and still verifies, is kept; failed studies are tried again. Studies that another batch
    works on are waited for. A summary of all is written to `out`.
    `scheduler` hands the work to Dask: the address of a scheduler, "local" for a cluster on this machine, or a cluster
    object, such as one of dask-jobqueue; all machines see the folders under the same paths.
    Raises UsageError for a pipeline that cannot run, ModelError where the network cannot be loaded, OutputError where
    `out` cannot be written, ClusterError where the scheduler is gone; no single study raises.
    """
    options = options or Options()
    if options.workers < 1:
        raise UsageError(f"A batch needs at least one worker; here it is {options.workers}.")
    chosen = pipeline if isinstance(pipeline, Pipeline) else load_pipeline(pipeline)
    check_pipeline(chosen)
    if options.deidentify:
        check_deidentified(chosen)
    whole = Path(out).resolve()
    among = UsageError("The outputs would lie among the studies: give a folder outside of theirs.", path=out)
    if whole.is_relative_to(Path(studies).resolve()):
        raise among
    entries = find_cohort(studies, options.shard)
    if any(folder.resolve().is_relative_to(whole) for folder in {file.parent for one in entries for file in one.files}):
        raise among  # a link leads there
    if not entries and options.shard is None:
        raise UnreadableFile("There is no DICOM file here.", path=studies, reason="no_dicom")
    ledger = Ledger.open(out, deidentify=options.deidentify)
    batch = _Batch(
        chosen, model_digests(chosen), ledger, options, Path(studies), progress or (lambda _: None), scheduler
    )
    ledger.remember((ledger.name(one.identity), one.uid, str(one.files[0].parent)) for one in entries)
    try:
        batch.run(entries)
    finally:
        batch.close()
    outcomes = [batch.outcomes[ledger.name(one.identity)] for one in entries]
    write_summary(ledger.out, options.shard, outcomes)
    return outcomes


@dataclass
class _Batch:
    pipeline: Pipeline
    models: dict[str, str]
    ledger: Ledger
    options: Options
    root: Path
    show: Show
    scheduler: Any = None
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    pending: deque[str] = field(default_factory=deque)
    elsewhere: deque[str] = field(default_factory=deque)
    claimed: deque[str] = field(default_factory=deque)
    suspects: deque[str] = field(default_factory=deque)
    deaths: Counter[str] = field(default_factory=Counter)
    late: set[str] = field(default_factory=set)
    early_deaths: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    hands: list[Hand] = field(default_factory=list)
    engine: Engine | None = None

    def __post_init__(self) -> None:
        self.claims = Claims(self.ledger.out / ".claims")

    def run(self, entries: Sequence[Entry]) -> None:
        """Bring every entry to its end."""
        self.entries = {self.ledger.name(entry.identity): entry for entry in entries}
        self.pending.extend(self.entries)
        self._sweep()
        while len(self.outcomes) < len(self.entries):
            self._feed()
            self._end_late()
            self._report()
            if self.elsewhere and not (self.pending or self.suspects or self._in_flight()):
                time.sleep(ELSEWHERE_S)
                self.pending, self.elsewhere = self.elsewhere, deque()
            if self.engine is not None:
                with suppress(Empty):
                    self._handle(self.engine.events.get(timeout=POLL_S))
        self._report()

    def close(self) -> None:
        """End the workers and give back what is claimed."""
        for hand in self.hands:
            hand.close()
        if self.engine is not None:
            self.engine.close()
        for study in self.entries:
            if study in self.claims.held:
                self.ledger.sweep(study)
        self.claims.close()

    def _feed(self) -> None:
        """Give studies to workers that wait for some; a suspect gets a worker of its own."""
        for hand in self._ready_hands():
            if hand.alone:
                continue
            if self.suspects:
                if not hand.in_flight:
                    hand.alone = True
                    self._send(hand, self.suspects.popleft())
                continue
            while hand.uncomputed < AHEAD and len(hand.in_flight) < MOST_HELD and (study := self._next()) is not None:
                self._send(hand, study)

    def _end_late(self) -> None:
        """End workers that have worked on a study for too long; it is run again by itself, as after a death."""
        for hand in self.hands:
            late = {study for study in hand.in_flight if hand.worked_s(study) > self.options.time_limit_s}
            if late:
                self.late |= late
                hand.end()

    def _ready_hands(self) -> list[Hand]:
        """Return the workers that have loaded their network; more are hired while there is work for them."""
        if not self.hands and not self.suspects and not self.claimed and (study := self._next()) is not None:
            self.claimed.append(study)  # so that no network is loaded where everything is done already
        if self.hands or self.claimed or self.suspects:
            if self.engine is None:
                start, workers = self._start(), self.options.workers
                self.engine = Local(start, workers) if not self.scheduler else Cluster(self.scheduler, start, workers)
            waiting = len(self.pending) + len(self.claimed) + len(self.suspects)
            self.hands += self.engine.hire(self.hands, waiting + len(self._in_flight()))
        return [hand for hand in self.hands if hand.ready]

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
        found = self._verified(study)
        if found is not None:
            self._ended(study, found, kept=True)
        return found is not None

    def _verified(self, study: str) -> dict[str, Any] | None:
        """Return the manifest of a study that is done or refused and true."""
        found = self.ledger.verified(study, {**self._identity(), "state": self._state(study)})
        if found is None or (self.options.verify == "full" and not self._same_inputs(study, found)):
            return None
        return found

    def _same_inputs(self, study: str, manifest: dict[str, Any]) -> bool:
        inputs = manifest.get("inputs")
        if not isinstance(inputs, dict):
            return False  # refused before anything was read
        files = {name: path for path, name in self._files(study).items()}
        if not set(inputs["used"]) <= files.keys():
            return False  # inside an archive
        try:
            return self.ledger.shown(sha256(*(files[name] for name in inputs["used"]))) == str(inputs["sha256"])
        except OSError:
            return False

    def _identity(self) -> dict[str, Any]:
        return {
            "pipeline": self.pipeline.name,
            "pipeline_sha256": self.pipeline.digest,
            **self.models,
            "deidentified": self.options.deidentify,
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
        return Start(
            pipeline=self.pipeline.with_models(_placed).model_dump(mode="json"),
            studies=str(self.root.resolve()),
            out=str(self.ledger.out.resolve()),
            check=self.ledger.check,
            token=self.claims.token,
            manifest=self._identity(),
            device=self.options.device,
            runtime=self.options.runtime,
            precision=self.options.precision,
            threads=self.options.threads,
            deidentify=self.options.deidentify,
        )

    def _send(self, hand: Hand, study: str) -> None:
        # Links are not followed: the ending of a name, and the folder that files share, tell what belongs together.
        files = {str(path.absolute()): name for path, name in self._files(study).items()}
        hand.send(Task(study, files, self._state(study)))

    def _handle(self, event: Event) -> None:
        hand, message = event
        if hand not in self.hands:
            return  # taken for gone meanwhile
        hand.note(message)
        if "fatal" in message or "gone" in message:
            self._gone(hand, message)
        elif "lost" in message:  # another batch has it, and this one's claim was void: it was asleep
            self.claims.release(str(message["lost"]))
            self.elsewhere.append(str(message["lost"]))
        elif "done" in message:
            self.early_deaths = 0
            hand.alone = False
            self._ended(str(message["done"]), message["manifest"], kept=False)

    def _gone(self, hand: Hand, message: dict[str, Any]) -> None:
        """Blame the studies that a dead worker had; the next time each has a worker of its own."""
        self.hands.remove(hand)
        hand.close()
        fatal = message.get("fatal")
        self.early_deaths += fatal is not None or not hand.ready
        if self.early_deaths >= MOST_STARTS or (fatal is not None and not self.hands):
            why = fatal or {"text": "The process that runs the network ended before it was loaded, several times."}
            raise ModelError(str(why["text"]), reason=why.get("reason"))
        for study in hand.in_flight:
            if (found := self._verified(study)) is not None:  # it died between the end of its work and its last word
                self._ended(study, found, kept=False)
                continue
            self.ledger.sweep(study)
            self.deaths[study] += "blameless" not in message
            if "blameless" in message:
                self.claimed.append(study)
            elif self.deaths[study] < MOST_DEATHS:
                self.suspects.append(study)
            else:
                self._mark(study)

    def _mark(self, study: str) -> None:
        """Write down that a study kills who runs it."""
        text = f"{MOST_DEATHS} processes died of this study, most likely for want of memory."
        reason = "killed_worker"
        if study in self.late:
            reason = "time_limit"
            text = f"The study took longer than {self.options.time_limit_s / 60:g} minutes, by itself, too."
        facts = {"status": "failed", "reason": reason, "text": text, "state": self._state(study)}
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
        return [study for hand in self.hands for study in hand.in_flight]

    def _report(self) -> None:
        now = time.monotonic()
        running = tuple(
            (hand.name, study, self.entries[study].files[0].parent, stage, now - since)
            for hand in self.hands
            for study, (stage, since) in hand.in_flight.items()
        )
        ready = sum(hand.ready for hand in self.hands)
        self.show(Progress(len(self.entries), self.ended.copy(), self.kept, ready, running))

    def _sweep(self) -> None:
        """Remove what interrupted runs left of studies that nobody works on: outputs, and claims of what is done."""
        self.claims.tidy()
        left = [*self.ledger.unfinished(), *(self.ledger.out / ".claims").iterdir()]
        for study in {path.name.split(".")[0] for path in left}:
            if study and self.claims.claim(study):  # names of other files there begin with a dot
                self.ledger.sweep(study)
                self.claims.release(study)


def _placed(model: str) -> str:
    """Return a model's name, or its whole path: whoever runs it may do so in another folder."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model
