"""Worker processes of this machine, and the pipes to them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from queue import SimpleQueue
from typing import Any

from medseg.study.headers import package_environment
from medseg.study.worker import Start, Task

END_S = 10.0
"""How long a process may take to notice that its input has ended."""

Event = tuple["Process", dict[str, Any]]


class Process:
    """A worker process and the studies that it has: `in_flight` gives the stage of each, and since when.

    Its messages go to `events`; the last one is {"gone": exit code}, however it ended.
    """

    def __init__(self, start: Start, events: SimpleQueue[Event]):
        threads = {} if start.threads is None else {"OMP_NUM_THREADS": str(start.threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "medseg.study.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=package_environment() | threads,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for who started it, who ends it
        )
        self.pid = self._process.pid
        self.ready = self.alone = False
        self.in_flight: dict[str, tuple[str, float]] = {}
        self._computed: set[str] = set()
        self._write({"start": asdict(start)})
        self._listener = threading.Thread(target=self._listen, args=(events,), daemon=True)
        self._listener.start()

    @property
    def uncomputed(self) -> int:
        """Return how many studies it has whose labels are not there yet."""
        return len(self.in_flight.keys() - self._computed)

    def send(self, task: Task) -> None:
        """Give the process a study. If it has just died, `events` will say so."""
        self.in_flight[task.study] = ("wait", time.monotonic())
        self._write({"study": asdict(task)})

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
        events.put((self, {"gone": self._process.wait()}))

    def note(self, message: dict[str, Any]) -> None:
        """Take in a message of the process, in the thread that looks at its fields."""
        self.ready = self.ready or "ready" in message
        if "stage" in message:
            self.in_flight[message["study"]] = (message["stage"], time.monotonic())
        elif "computed" in message:
            self._computed.add(message["computed"])
        elif "done" in message:
            self.in_flight.pop(message["done"], None)
