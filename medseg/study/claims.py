"""Who works on which study: one file for each claim, so that several batches can share an output folder.

Claims save work and do not keep order: results are whole and renamed into place, whoever makes them.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg.errors import InputError, OutputError
from medseg.io.text import read_json

HEARTBEAT_S = 10.0
STALE_S = 60.0
"""A claim from another machine that has not been touched for so long is void; on this machine its process is asked."""

UNKNOWN = "unknown"
"""When a process started, on systems without /proc: there, too, the last touch decides."""


@dataclass
class Claims:
    """The claims of this process in a folder, kept alive by a thread until `close`; `held` are the studies."""

    folder: Path
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    held: set[str] = field(default_factory=set)
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def claim(self, study: str) -> bool:
        """Return whether the study is this process's own now; False where another one that is alive has it."""
        path = self._path(study)
        if not (self._create(path) or self._take_over(path)):
            return False
        self.held.add(study)
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()
        return True

    def release(self, study: str) -> None:
        """Give a study back."""
        self.held.discard(study)
        path = self._path(study)
        if _read(path).get("token") == self.token:
            with suppress(OSError):
                path.unlink()

    def close(self) -> None:
        """Give back all that is this process's on the disk: an interrupt may have come before `held` knew of it."""
        self._ended.set()
        for path in self.folder.glob("*.json"):
            self.release(path.stem)

    def tidy(self) -> None:
        """Remove what killed processes left beside their claims; one that is alive goes on without it."""
        for path in self.folder.iterdir():
            if path.suffix != ".json":
                with suppress(OSError):
                    path.unlink()

    def _path(self, study: str) -> Path:
        return self.folder / f"{study}.json"

    def _create(self, path: Path) -> bool:
        text = self._text().encode()
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                os.write(handle, text)
            except BaseException:  # a full disk, an interrupt: a claim that says nothing would be nobody's
                path.unlink()
                raise
            finally:
                os.close(handle)
        except FileExistsError:
            return False
        except OSError as error:
            raise OutputError(f"A study cannot be claimed: {error.strerror}.", path=self.folder) from error
        return True

    def _take_over(self, path: Path) -> bool:
        """Put this process's claim in the place of that of a process that is gone; return whether that was so."""
        if not self._stale(path, _read(path)):
            return False
        with _one_at_a_time(self.folder):
            # Another process may have been faster, and this is its claim now.
            if not self._stale(path, _read(path)):
                return False
            beside = path.with_name(f"{path.name}.{self.token}")
            try:
                beside.write_text(self._text(), encoding="utf-8")
                beside.replace(path)  # there is a claim at every moment
            except OSError:
                return False
        return True

    def _text(self) -> str:
        return json.dumps({"token": self.token, "host": _host(), "pid": os.getpid(), "born": _born(os.getpid())})

    def _stale(self, path: Path, claim: dict[str, Any]) -> bool:
        if claim.get("host") == _host():
            born = _born(claim["pid"])
            if born != claim["born"] or born != UNKNOWN:
                return bool(born != claim["born"])
        try:
            age = self._now() - path.stat().st_mtime
            return (
                age > STALE_S or age < -HEARTBEAT_S
            )  # ahead of time: by a clock that was wrong, and it would stay for long
        except OSError:
            return False

    def _now(self) -> float:
        """Return the time by the clock of the disk, which other machines see too."""
        probe = self.folder / f".{self.token}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            with suppress(OSError):
                probe.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            for study in [*self.held]:
                with suppress(OSError):
                    os.utime(self._path(study))


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep others out of such a block for the same folder; where the system has no such lock, nothing waits."""
    with ExitStack() as stack:
        with suppress(ImportError, OSError):  # Windows; some network disks
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, "The claim", InputError)
    except InputError:
        return {}
    complete = isinstance(content, dict) and {"token", "host", "pid", "born"} <= content.keys()
    return content if complete else {}


def _host() -> str:
    """Return what tells machines, their restarts, and containers with processes of their own apart."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _born(pid: int) -> str:
    """Return when a process of this machine started, "" where it is gone: numbers of processes are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except OSError:
        pass
    return "" if Path("/proc/self/stat").exists() else UNKNOWN
