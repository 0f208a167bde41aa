"""One command measured: wall time, processor time, and the largest memory of all its processes together."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

INTERVAL_S = 0.05
SEARCH_EVERY = 5
"""New processes are looked for once in so many intervals."""

TOLERANCE = 0.01
"""Memory is known to this share: reading it exactly costs the machine up to 0.1 s."""

SPARE_GB = 0.7
"""A command is ended, too, before the machine itself has less memory left than this."""

PAGE = resource.getpagesize()


@dataclass(frozen=True)
class Measurement:
    """What a command took. `status` is "done", "failed", or "over N GB" where it was ended for its memory."""

    status: str
    seconds: float
    cpu_seconds: float
    peak_gb: float


def measure(
    command: Sequence[str],
    log: Path,
    limit_gb: float,
    cwd: Path,
    environment: Mapping[str, str],
    interval_s: float = INTERVAL_S,
) -> Measurement:
    """Return the measurement of a command whose output goes to `log`; its processes end with it, or over the limit.

    Memory is the sum of PSS (each shared page counted once) over every process of the command's session, looked at
    every `interval_s`: commands of many minutes need fewer looks, each of which takes time from them.
    """
    cpu_before, began, status = _children_cpu(), time.perf_counter(), "done"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=cwd, env=environment, start_new_session=True
        )
        memory = _Memory(process.pid)
        try:
            while process.poll() is None:
                memory.look()
                if memory.peak > limit_gb * 2**30 or _available() < SPARE_GB * 2**30:
                    status = f"over {min(memory.peak / 2**30, limit_gb):.1f} GB"
                    break
                time.sleep(interval_s)
        finally:
            seconds = time.perf_counter() - began
            for pid in _members(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
    if status == "done" and process.returncode:
        status = "failed"
    return Measurement(status, round(seconds, 2), round(_children_cpu() - cpu_before, 2), round(memory.peak / 2**30, 3))


@dataclass
class _Memory:
    """The memory of a session in bytes, and its peak.

    The sum of PSS grows by no more than the RSS of single processes grows, which is cheap to read. PSS is read where
    this bound passes the peak.
    """

    session: int
    peak: int = 0
    _bound: int = 0
    _rss: dict[int, int] = field(default_factory=dict)
    _members: list[int] = field(default_factory=list)
    _looks: int = 0

    def look(self) -> None:
        """Bring the peak up to date."""
        if self._looks % SEARCH_EVERY == 0:
            self._members = _members(self.session)
        self._looks += 1
        pages = {pid: _read(pid, "statm").split() for pid in self._members}
        rss = {pid: int(counts[1]) * PAGE for pid, counts in pages.items() if counts}
        self._bound += sum(max(0, now - self._rss.get(pid, 0)) for pid, now in rss.items())
        self._rss = rss
        if self._bound > self.peak * (1 + TOLERANCE):
            self._bound = sum(_pss(pid) for pid in rss)
            self.peak = max(self.peak, self._bound)


def _members(session: int) -> list[int]:
    """Return the processes of a session: the command and all its descendants, orphans too."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            # The name, in brackets, may hold spaces; behind it: state, parent, group, session.
            fields = _read(int(entry.name), "stat").rpartition(")")[2].split()
            if fields and int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def _pss(pid: int) -> int:
    lines = _read(pid, "smaps_rollup").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def _read(pid: int, name: str) -> str:
    """Return a file of a process, "" where the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _available() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
