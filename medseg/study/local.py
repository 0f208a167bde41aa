"""Worker processes of this machine, and the pipes to them."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from queue import SimpleQueue
from typing import Any

from medseg.cores import cores
from medseg.study.engine import Event, Hand
from medseg.study.processes import python_command, python_environment
from medseg.study.worker import Start, Task

END_S = 10.0
"""How long a process may take to notice that its input has ended."""


class Local:
    """The engine of one machine: so many processes, among which the cores are shared out."""

    def __init__(self, start: Start, workers: int):
        threads = start.threads
        if threads is None and workers > 1:
            threads = max(1, cores() // workers)
        self._start = replace(start, threads=threads)
        self._workers = workers
        self.events: SimpleQueue[Event] = SimpleQueue()

    def hire(self, hands: Sequence[Hand], wanted: int) -> list[Hand]:
        """Return new processes."""
        count = min(self._workers, wanted) - len(hands)
        return [Process(self._start, self.events) for _ in range(count)]

    def close(self) -> None:
        """Do nothing: there are only the processes."""


class Process(Hand):
    """A worker process; its name is its process id."""

    def __init__(self, start: Start, events: SimpleQueue[Event]):
        threads = {} if start.threads is None else {"OMP_NUM_THREADS": str(start.threads)}
        self._process = subprocess.Popen(  # noqa: S603 - a module of medseg
            python_command("medseg.study.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=python_environment() | threads,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for who started it, who ends it
        )
        super().__init__(str(self._process.pid))
        self._write({"start": asdict(start)})
        self._listener = threading.Thread(target=self._listen, args=(events,), daemon=True)
        self._listener.start()

    def send(self, task: Task) -> None:
        """Give the process a study."""
        self.take(task.study)
        self._write({"study": asdict(task)})

    def end(self) -> None:
        """Kill the process; whoever listens to it will tell."""
        self._process.kill()

    def close(self) -> None:
        """End the process, at once if it has something in work."""
        if self.in_flight or not self.ready:
            self._process.kill()
        with suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join()
        if self._process.stdout:
            self._process.stdout.close()

    def _write(self, message: dict[str, Any]) -> None:
        with suppress(OSError):
            if self._process.stdin:
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()

    def _listen(self, events: SimpleQueue[Event]) -> None:
        for line in self._process.stdout or ():
            with suppress(ValueError):  # cut off by its death
                events.put((self, json.loads(line)))
        events.put((self, {"gone": f"exit code {self._process.wait()}"}))
