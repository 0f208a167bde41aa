"""A process that keeps a pipeline's networks loaded and runs studies: python -m medseg.study.worker PARENT.

It reads one JSON message a line from standard input, first {"start": ...}, then {"study": ...}, and answers in the same
way on standard output. Reading the next study and writing the last one overlap with computing. When its input ends
it is gone at once: whoever started it wants no more. When whoever started it is gone, so is it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from medseg.errors import OutputError
from medseg.study.archive import check_one, is_archive, opened
from medseg.study.deidentify import deidentify
from medseg.study.ledger import Ledger, clear, emptied, sha256
from medseg.study.listing import listed
from medseg.study.pipeline import Pipeline
from medseg.study.processes import end_with
from medseg.study.run import Job, ending, import_ahead, read_job, segment_job, versions, write_job

if TYPE_CHECKING:
    from medseg.model.segmenter import Model

Send = Callable[[dict[str, Any]], None]
PACKAGE = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Start:
    """What a worker needs to know once: the pipeline, the folders, how the network runs.

    The key of the output folder does not travel: each worker reads it there, and `check` tells whether it is the same.
    """

    pipeline: dict[str, Any]
    studies: str
    out: str
    check: str
    token: str
    manifest: dict[str, Any]
    device: str | None = None
    runtime: str | None = None
    precision: str | None = None
    threads: int | None = None
    deidentify: bool = False
    parent: int | None = None  # the process that a worker on the same machine ends with


@dataclass(frozen=True)
class Task:
    """A study to run: its keyed name, its files with theirs, and the state that they had."""

    study: str
    files: dict[str, str] = field(repr=False)
    state: str


def model_digests(pipeline: Pipeline) -> dict[str, str]:
    """Return a SHA-256 of each model of a pipeline, under the names that they have in manifests.

    Raises ModelError where one is not there.
    """
    from medseg.model.stored import find_model

    digests = {"model_sha256": _model_digest(find_model(pipeline.model))}
    if pipeline.localizer is not None:
        digests["localizer_sha256"] = _model_digest(find_model(pipeline.localizer.model))
    return digests


def _model_digest(folder: Path) -> str:
    """Return a SHA-256 of a model's plan and weights, and of those of the model before it in a cascade."""
    files = [folder / "plan.json", *sorted(folder.glob("fold_*.safetensors"))]
    hashes = [sha256(file) for file in files]
    if (folder / "previous").is_dir():
        hashes.append(_model_digest(folder / "previous"))
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


class Runner:
    """Runs studies through one pipeline with one model, each from its files to its published folder."""

    def __init__(self, start: Start, send: Send):
        self.start, self.send = start, send
        self.pipeline = Pipeline.model_validate(start.pipeline)
        import_ahead(self.pipeline.outputs)
        self.ledger = Ledger.existing(start.out, deidentify=start.deidentify)
        same = self.ledger.check == start.check and model_digests(self.pipeline).items() <= start.manifest.items()
        if not (same and Path(start.studies).exists()):
            raise OutputError(
                "A worker does not see the same output folder, model and studies as the batch. All machines of a batch "
                "need the same disks under the same paths."
            )
        self.model = self._loaded(self.pipeline.model)
        self.localizer = self._loaded(self.pipeline.localizer.model) if self.pipeline.localizer else None

    def _loaded(self, model: str) -> Model:
        from medseg.model.segmenter import Model

        how = self.start
        return Model.load(model, device=how.device, runtime=how.runtime, precision=how.precision, threads=how.threads)

    def read(self, task: Task) -> _Running:
        """Return the task with its image read, or the error that ended it."""
        running = _Running(task, self.ledger.work_path(task.study, self.start.token))
        running.stage("read", self.send, lambda: self._read(running))
        return running

    def segment(self, running: _Running) -> None:
        """Compute the labels, unless an error ended the task before."""
        running.stage("segment", self.send, lambda: self._segment(running.job))

    def finish(self, running: _Running) -> dict[str, Any]:
        """Write and publish the outputs, or what ended the task, and return the message that says so.

        A task whose folder is gone has been given to another worker, and nothing of it is published: {"lost": study}.
        """
        running.stage("write", self.send, lambda: self._write(running))
        try:
            manifest = self._publish(running)
        except Exception as error:  # noqa: BLE001 - a full disk, most likely: then the answer alone tells
            if running.lost:
                return {"lost": running.task.study}
            manifest = {**ending(error), "study": running.task.study}
        finally:
            running.close()
        return {"done": running.task.study, "manifest": manifest}

    def _segment(self, job: Job) -> None:
        segment_job(job, self.pipeline, self.model, self.localizer)

    def _write(self, running: _Running) -> None:
        write = partial(write_job, running.job, self.pipeline, self.model.plan.labels)
        if not self.start.deidentify:
            write(running.work)
            return
        private = self._private_folder(running)
        write(private)
        for path in private.iterdir():
            if path.suffix == ".dcm":
                deidentify(path, running.task.study, self.ledger.key)
            shutil.move(path, running.work / path.name)

    def _private_folder(self, running: _Running) -> Path:
        """Return a folder for what may lead back to a study; it is gone when the study ends."""
        folder = self.ledger.private_folder(running.task.study, self.start.token)
        running.exits.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder

    def _read(self, running: _Running) -> None:
        emptied(running.work)
        running.begun = True
        files = {Path(path): name for path, name in running.task.files.items()}
        first = next(iter(files))
        check_one([*files])
        if is_archive(first):
            folder = running.exits.enter_context(opened(first, self._private_folder(running)))
            files = {file: self.ledger.name(str(file.relative_to(folder))) for file in listed(folder, [])}
        running.job.files = files
        read_job(running.job, self.pipeline)
        if is_archive(first):
            running.job.facts["inputs"] = {"used": [running.task.files[str(first)]], "sha256": sha256(first)}

    def _publish(self, running: _Running) -> dict[str, Any]:
        job, task = running.job, running.task
        result = {"status": "done", "reason": None, "text": None} if running.error is None else ending(running.error)
        if not running.begun:
            emptied(running.work)
        elif running.error is not None:  # what was written before the error is no result
            clear(running.work)
        if "inputs" in job.facts:
            job.facts["inputs"]["sha256"] = self.ledger.shown(job.facts["inputs"]["sha256"])
        manifest = {
            **result,
            **self.start.manifest,
            "state": task.state,
            "files": len(task.files),
            "versions": versions(),
            **job.facts,
            "seconds": {name: round(seconds, 3) for name, seconds in running.seconds.items()},
            "warnings": running.warnings,
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return self.ledger.publish(task.study, running.work, manifest)


@dataclass
class _Running:
    """A task in work: its folder, what it took, the warnings it gave, and the error that ended it, if one did."""

    task: Task
    work: Path
    job: Job = field(init=False)
    begun: bool = False
    error: BaseException | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    exits: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.job = Job(self.task.study, {})

    @property
    def lost(self) -> bool:
        """Return whether the folder of a task was swept: its batch is over, or takes this worker for dead."""
        return self.begun and not self.work.exists()

    def stage(self, name: str, send: Send, do: Callable[[], None]) -> None:
        """Run one stage, unless an error ended the task before; whatever it raises ends the task and nothing else."""
        if self.error is not None or self.lost:
            return
        send({"stage": name, "study": self.task.study})
        began = time.perf_counter()
        _WARNINGS[threading.get_ident()] = self.warnings
        warnings.simplefilter("always")  # threads that silence others at the same time can leave them silenced
        try:
            do()
        except Exception as error:  # noqa: BLE001 - one study never stops the rest
            self.error = error
        finally:
            _WARNINGS.pop(threading.get_ident(), None)
        self.seconds[name] = time.perf_counter() - began
        send({"stage": "wait", "study": self.task.study})

    def close(self) -> None:
        """Let go of what the task holds: memory, and what an archive was unpacked to."""
        self.job = Job(self.task.study, {})
        self.exits.close()
        shutil.rmtree(self.work, ignore_errors=True)


_WARNINGS: dict[int, list[str]] = {}
"""Where the warnings of each thread go."""


def collect_warnings() -> None:
    """Let the warnings that a study gives go to its manifest, and to nobody else, from now on."""
    shown, warn = warnings.showwarning, warnings.warn

    def collect(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
        found = _WARNINGS.get(threading.get_ident())
        if found is None:
            shown(message, category, filename, *rest, **more)
        else:  # those of others may quote a file, and are named by their class
            found.append(f"{category.__name__} of another package")

    def tell(message: Any, category: Any = None, stacklevel: int = 1, *rest: Any, **more: Any) -> None:
        """Take what medseg says past the filters: all threads share them, and one that reads silences others."""
        found = _WARNINGS.get(threading.get_ident())
        if found is not None and sys._getframe(1).f_code.co_filename.startswith(PACKAGE):
            found.append(str(message))
        else:
            warn(message, category, stacklevel + 1, *rest, **more)

    warnings.showwarning = collect
    warnings.warn = tell
    warnings.simplefilter("always")


def main() -> None:
    """Serve until the input, or the process that started this one, ends."""
    end_with(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints must not disturb the answers
    lock = threading.Lock()

    def send(message: dict[str, Any]) -> None:
        with lock:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

    collect_warnings()
    try:
        runner = Runner(Start(**json.loads(sys.stdin.readline())["start"]), send)
        send({"ready": os.getpid(), "runtime": runner.model.runtime.name})
    except Exception as error:  # noqa: BLE001 - whoever started this process shows it
        send({"fatal": ending(error)})
        return
    _serve(runner, send)


def _serve(runner: Runner, send: Send) -> None:
    tasks: SimpleQueue[Future[_Running]] = SimpleQueue()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:

        def receive() -> None:
            for line in sys.stdin:
                tasks.put(reader.submit(runner.read, Task(**json.loads(line)["study"])))
            os._exit(0)

        def finish(running: _Running) -> None:
            send(runner.finish(running))

        threading.Thread(target=receive, daemon=True).start()
        while True:
            running = tasks.get().result()
            runner.segment(running)
            send({"computed": running.task.study})
            writer.submit(finish, running)


if __name__ == "__main__":
    main()
