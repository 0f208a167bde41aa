"""What a batch needs of whoever moves its work: hands that take studies, and messages of how they get on."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any, Protocol

from medseg.study.worker import Task

Event = tuple["Hand", dict[str, Any]]


class Hand(ABC):
    """A process that keeps a network and runs studies, as its batch sees it; `name` is what to show.

    Its messages, those of `study/worker.py`, come as events of its engine; the last one is {"gone": reason}, however it
    ended; "blameless" in it says that no study can have been the cause. `in_flight` gives the stage of each study that
    it has, and since when.
    """

    def __init__(self, name: str):
        self.name = name
        self.ready = self.alone = False
        self.in_flight: dict[str, tuple[str, float]] = {}
        self._computed: set[str] = set()
        self._worked: dict[str, float] = {}

    @abstractmethod
    def send(self, task: Task) -> None:
        """Give it a study, which is in flight from now on. If it has just died, an event will say so."""

    @abstractmethod
    def close(self) -> None:
        """End it, at once if it has something in work."""

    @abstractmethod
    def end(self) -> None:
        """End it where it may not answer any more; an event will say that it is gone."""

    @property
    def uncomputed(self) -> int:
        """Return how many studies it has whose labels are not there yet."""
        return len(self.in_flight.keys() - self._computed)

    def take(self, study: str) -> None:
        """Note a study as in flight."""
        self._computed.discard(study)
        self._worked[study] = 0.0
        self.in_flight[study] = ("wait", time.monotonic())

    def worked_s(self, study: str) -> float:
        """Return for how many seconds a study that it has has been worked on; waiting for its turn does not count."""
        stage, since = self.in_flight[study]
        return self._worked[study] + (0.0 if stage == "wait" else time.monotonic() - since)

    def note(self, message: dict[str, Any]) -> None:
        """Take in a message of its own, in the thread that looks at its fields."""
        self.ready = self.ready or "ready" in message
        if "stage" in message and message["study"] in self.in_flight:
            self._worked[message["study"]] = self.worked_s(message["study"])
            self.in_flight[message["study"]] = (message["stage"], time.monotonic())
        elif "computed" in message:
            self._computed.add(message["computed"])
        else:
            for end in message.keys() & {"done", "lost"}:
                self.in_flight.pop(message[end], None)


class Engine(Protocol):
    """Where hands come from."""

    events: SimpleQueue[Event]

    def hire(self, hands: Sequence[Hand], wanted: int) -> list[Hand]:
        """Return new hands, so that there are up to `wanted` with those that are there already.

        Called again and again while there is work. Raises ClusterError where there can be none any more.
        """

    def close(self) -> None:
        """Let go of everything but the hands."""
