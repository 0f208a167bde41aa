"""One command measured: wall time, processor time, and the largest memory of all its processes together."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

INTERVAL_S = 0.05
SPARE_GB = 0.7
"""A command is ended, too, before the machine itself has less memory left than this."""


@dataclass(frozen=True)
class Measurement:
    """What a command took. `status` is "done", "failed", or "over N GB" where it was ended for its memory."""

    status: str
    seconds: float
    cpu_seconds: float
    peak_gb: float


def measure(
    command: Sequence[str], log: Path, limit_gb: float, cwd: Path, environment: Mapping[str, str]
) -> Measurement:
    """Return the measurement of a command whose output goes to `log`; its processes end with it, or over the limit.

    Memory is the sum of PSS (each shared page counted once) over every process of the command's session, looked at
    every 50 ms. A sum of RSS is never below it and far cheaper, so PSS is read only while RSS is above the peak so far.
    """
    cpu_before, began, peak, status = _children_cpu(), time.perf_counter(), 0, "done"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=cwd, env=environment, start_new_session=True
        )
        try:
            while process.poll() is None:
                peak = max(peak, _memory(process.pid, peak))
                if peak > limit_gb * 2**30 or _available() < SPARE_GB * 2**30:
                    status = f"over {min(peak / 2**30, limit_gb):.1f} GB"
                    break
                time.sleep(INTERVAL_S)
        finally:
            seconds = time.perf_counter() - began
            for pid in _session(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
    if status == "done" and process.returncode:
        status = "failed"
    return Measurement(status, round(seconds, 2), round(_children_cpu() - cpu_before, 2), round(peak / 2**30, 3))


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _session(session: int) -> list[int]:
    """Return the processes of a session: the command and all its descendants, orphans too."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name, in brackets, may hold spaces; behind it: state, parent, group, session.
            state, _, _, number = stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[:4]
            if int(number) == session and state != "Z":
                members.append(int(stat.parent.name))
    return members


def _memory(session: int, known: int) -> int:
    """Return the PSS of a session in bytes, or 0 where its RSS shows that it cannot be above `known`."""
    pids = _session(session)
    rss = 0
    for pid in pids:
        with suppress(OSError):
            rss += int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    if rss * resource.getpagesize() <= known:
        return 0
    pss = 0
    for pid in pids:
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
            pss += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return pss * 1024


def _available() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
