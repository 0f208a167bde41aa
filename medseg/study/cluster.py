"""Workers of a Dask cluster: each keeps a network loaded, and Dask carries the studies' names there and back.

The batch decides what runs where and what to do about a death, as it does on one machine, so that nothing depends on
how the cluster was set up:

- as many studies are in flight as the workers can have in work, each sent to one worker by name. Dask would blame all
  that a dead worker was given, and run them again four times; here each is run alone the next time.
- a study leaves Dask's thread pool at once, and locks keep its stages in order. So the next one is read while this one
  is computed, with one thread for each worker, too.
- paths travel, voxels do not: whatever is written goes through the disk that all machines share.

`run_study` and `prepare` run in the workers. They start no process by multiprocessing, which Dask's workers may not.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import medseg
from medseg.errors import ClusterError, ModelError, UsageError
from medseg.study.engine import Event, Hand
from medseg.study.processes import end_with
from medseg.study.run import ending
from medseg.study.worker import Runner, Start, Task, collect_warnings

if TYPE_CHECKING:
    from distributed import Client, Future

CONNECT_S = 30
POLL_S = 0.5
"""How often the scheduler is asked which workers there are."""

PATIENCE_S = 120.0
"""After so long without any worker it is said that there is none, again and again."""

MEMORY = {"target": False, "spill": False, "pause": False, "terminate": 0.95}
"""What a local cluster does about memory: nothing can be spilled; a worker that takes more than its share is ended."""


class Cluster:
    """The engine that Dask's workers are, as long as its scheduler is there.

    `scheduler` is "local" for so many `workers` of this machine, the address of a scheduler, or what Dask's Client
    takes, such as a cluster of dask-jobqueue. Raises UsageError where Dask is not installed, ClusterError where nothing
    answers.
    """

    def __init__(self, scheduler: Any, start: Start, workers: int):
        if not find_spec("distributed"):
            raise UsageError('A scheduler needs Dask. Install it with: pip install "medseg[cluster]"')
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.start = start
        self._hands: dict[str, Remote] = {}
        self._unfit: set[str] = set()
        self._absent: set[str] = set()
        self._retired: set[str] = set()
        self._asked = 0.0
        self._alone_since = time.monotonic()
        with ExitStack() as exits:
            exits.enter_context(_quiet())
            if scheduler == "local":
                self.start = replace(start, parent=os.getpid())
                scheduler = exits.enter_context(_local_cluster(workers, start.threads))
            self.client = exits.enter_context(_connected(scheduler))
            self.client.subscribe_topic(topic(start), self._tell)
            self.client.subscribe_topic("all", self._notice)
            self._exits = exits.pop_all()

    def hire(self, hands: Sequence[Hand], wanted: int) -> list[Hand]:
        """Return a hand for each worker that has come, and say of those that have left that they are gone."""
        if time.monotonic() - self._asked < POLL_S:
            return []
        self._asked = time.monotonic()
        there = self._workers()
        for address in self._hands.keys() - there:
            if address in self._absent:  # for the second time, so that what Dask says of it has arrived
                message = {"gone": "the worker left"} | ({"blameless": True} if address in self._retired else {})
                self.events.put((self._hands.pop(address), message))
        self._absent = self._hands.keys() - there
        new = sorted(there - self._hands.keys() - self._unfit)[: max(0, wanted - len(hands))]
        self._hands |= {address: Remote(address, self) for address in new}
        self._tell_when_alone()
        return [self._hands[address] for address in new]

    def _tell_when_alone(self) -> None:
        if self._hands:
            self._alone_since = time.monotonic()
        elif time.monotonic() - self._alone_since > PATIENCE_S:
            self._alone_since = time.monotonic()
            warnings.warn("The cluster has no worker that can run the pipeline; waiting for one.", stacklevel=2)

    def leave_out(self, hand: Remote) -> None:
        """Hire a worker no more."""
        self._unfit.add(hand.address)

    def let_go(self, hand: Remote) -> None:
        """Forget a hand; its worker may be hired again."""
        self._hands.pop(hand.address, None)

    def close(self) -> None:
        """Let workers unload the network, and part from the cluster."""
        with suppress(Exception):  # what cannot be reached needs no good-bye
            if self.client.status == "running":
                for told in (topic(self.start), "all"):  # or the scheduler would tell of our leaving to nobody
                    self.client.unsubscribe_topic(told)
                self.client.run(forget, self.start.token, on_error="ignore")
        with suppress(Exception):
            self._exits.close()

    def _workers(self) -> set[str]:
        try:
            if self.client.status == "running":
                return {*self.client.nthreads()}
        except Exception as error:  # sockets, time-outs, Dask's own
            raise _gone() from error
        raise _gone()

    def _tell(self, event: tuple[float, dict[str, Any]]) -> None:
        """Pass on what a worker says of a study."""
        message = dict(event[1])
        hand = self._hands.get(message.pop("worker"))
        if hand is not None:
            self.events.put((hand, message))

    def _notice(self, event: tuple[float, dict[str, Any]]) -> None:
        """Note workers that leave as they should: at the end of their lifetime, or when a cluster shrinks."""
        message = event[1]
        if isinstance(message, dict) and message.get("action") == "remove-worker" and message.get("expected"):
            self._retired.add(str(message["worker"]))


class Remote(Hand):
    """A worker of the cluster; its name is its address."""

    def __init__(self, address: str, cluster: Cluster):
        super().__init__(address.rpartition("/")[2])
        self.address = address
        self._cluster = cluster
        self._futures: dict[str, Future] = {}
        self._submit("start", prepare, cluster.start, medseg.__version__)

    def send(self, task: Task) -> None:
        """Give the worker a study."""
        self.take(task.study)
        self._submit(task.study, run_study, self._cluster.start, task)

    def end(self) -> None:
        """Hire the worker no more, and ask who watches over it to start another in its place."""
        self._cluster.leave_out(self)
        self._cluster.events.put((self, {"gone": "the worker does not answer"}))
        restart = partial(self._cluster.client.restart_workers, [self.address], raise_for_error=False)
        threading.Thread(target=_tried, args=(restart,), daemon=True).start()

    def close(self) -> None:
        """Take back what has not begun. What has will find its folder swept, and publish nothing."""
        self._cluster.let_go(self)
        for future in [*self._futures.values()]:  # cancelled ones leave it, in a thread of Dask's
            with suppress(Exception):
                future.cancel()

    def _submit(self, what: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        # Keys are shown and logged: keyed names alone. A new one each time, since Dask remembers results by it.
        future = self._cluster.client.submit(
            function, *arguments, key=f"medseg-{what}-{secrets.token_hex(4)}", workers=[self.address], pure=False
        )
        self._futures[what] = future
        future.add_done_callback(partial(self._ended, what))

    def _ended(self, what: str, future: Future) -> None:
        """Pass on a result, in a thread of Dask's. Cancelled: nobody waits. Killed: the worker's absence will tell."""
        self._futures.pop(what, None)
        if future.status == "finished":
            message = future.result()
        elif future.status == "error" and type(future.exception()).__name__ != "KilledWorker":
            cause = type(future.exception()).__name__
            text = f"A worker of the cluster could not run medseg ({cause}). Install the same version on all machines."
            message = {"fatal": {"text": text, "reason": "cluster"}}
        else:
            return
        if "fatal" in message:
            self._cluster.leave_out(self)
        self._cluster.events.put((self, message))


@dataclass
class _Warm:
    """A network that stays loaded in this worker, and the turns that studies take."""

    runner: Runner
    reading: threading.Lock = field(default_factory=threading.Lock)
    computing: threading.Lock = field(default_factory=threading.Lock)
    writing: threading.Lock = field(default_factory=threading.Lock)


_WARM: dict[str, _Warm] = {}
"""The network of the batch with this token; one at a time."""

_LOADING = threading.Lock()


def _tried(action: Callable[[], object]) -> None:
    """Do what may fail: a worker that nobody watches over, a cluster that is gone."""
    with suppress(Exception):
        action()


def topic(start: Start) -> str:
    """Return where workers tell how a batch gets on."""
    return f"medseg-{start.token}"


def prepare(start: Start, version: str) -> dict[str, Any]:
    """Load the network in a worker, and return that it is ready, or why it cannot be."""
    try:
        if version != medseg.__version__:
            raise ModelError("A worker of the cluster has another version of medseg. Install the same one everywhere.")
        if start.parent is not None:
            end_with(start.parent)
        return {"ready": _warm(start).runner.model.runtime.name}
    except Exception as error:  # noqa: BLE001 - whoever started the batch shows it
        return {"fatal": ending(error)}


def run_study(start: Start, task: Task) -> dict[str, Any]:
    """Run a study in a worker, and return how it ended, as `Runner.finish` does."""
    from distributed import secede

    warm = _warm(start)
    secede()
    with warm.reading:
        running = warm.runner.read(task)
    with warm.computing:
        warm.runner.segment(running)
    warm.runner.send({"computed": task.study})
    with warm.writing:
        return warm.runner.finish(running)


def forget(token: str) -> None:
    """Unload the network of a batch in a worker."""
    with _LOADING:
        _WARM.pop(token, None)


def _warm(start: Start) -> _Warm:
    """Return the network of a batch, loaded when it is first asked for."""
    from distributed import get_worker

    worker = get_worker()

    def send(message: dict[str, Any]) -> None:
        worker.log_event(topic(start), message | {"worker": worker.address})

    with _LOADING:
        if start.token not in _WARM:
            _WARM.clear()
            collect_warnings()
            threads = start.threads or worker.state.nthreads
            _WARM[start.token] = _Warm(Runner(replace(start, threads=threads), send))
        return _WARM[start.token]


def _local_cluster(workers: int, threads: int | None) -> Any:
    import dask
    from dask.system import CPU_COUNT
    from distributed import LocalCluster
    from distributed.system import MEMORY_LIMIT

    os.environ["PYTHONSAFEPATH"] = "1"  # for what Dask starts, now and later: the working folder may be one of studies
    with dask.config.set({f"distributed.worker.memory.{name}": value for name, value in MEMORY.items()}):
        return LocalCluster(
            n_workers=workers,
            threads_per_worker=threads or max(1, CPU_COUNT // workers),
            memory_limit=MEMORY_LIMIT // workers,
            dashboard_address=":0",  # any port that is free
            silence_logs="CRITICAL",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask's log off the terminal: what matters comes as events, and lost connections show tracebacks there."""
    import distributed  # noqa: F401 - sets the levels of its loggers when it is imported

    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client", "tornado.application")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def _connected(scheduler: Any) -> Client:
    from distributed import Client

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on versions of other packages that differ between machines
            return Client(scheduler, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise ClusterError(
            "No Dask scheduler answers. An address is tcp://host:port, as the scheduler shows it when it starts.",
        ) from error


def _gone() -> ClusterError:
    return ClusterError("The Dask scheduler is gone. Start it and the batch again: what is done is kept.")
