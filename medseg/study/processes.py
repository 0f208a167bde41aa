"""How medseg starts further Pythons: never with code from the working folder, never to outlive who started them."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""The option of Linux's prctl: a signal to this process when the thread that started it ends."""

LOOK_S = 1.0
HELD_S = 600.0
"""Where there is no such signal: how often a process looks for its parent, and how long its interpreter may be held."""


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of medseg in another Python.

    -P: the working folder, which may be one of studies, is no place to import from.
    """
    return [sys.executable, "-P", "-m", module, str(os.getpid()), *arguments]


def python_environment() -> dict[str, str]:
    """Return the environment in which another Python finds this medseg, and what its user added to PYTHONPATH.

    A blank entry there is what `PYTHONPATH=$PYTHONPATH:folder` leaves, and would stand for the working folder.
    """
    paths = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}


def end_with(parent: int) -> None:
    """Let this process end when its parent does, even while foreign code holds the interpreter.

    The system does it on Linux, for as long as the thread that asked for it lives. Elsewhere that thread looks for the
    parent, and a timer that needs no interpreter ends a process whose thread does not come to look.
    """
    threading.Thread(target=_stay, args=(parent,), daemon=True).start()


def _stay(parent: int) -> None:
    if not _signalled():
        _look(parent)
    elif os.getppid() != parent:  # it ended before the signal was asked for
        os._exit(1)
    threading.Event().wait()


def _signalled() -> bool:
    """Ask Linux for SIGKILL at the parent's end; return whether that could be."""
    if sys.platform != "linux":
        return False
    with suppress(OSError, AttributeError):
        return bool(ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0)
    return False


def _look(parent: int, held_s: float = HELD_S, look_s: float = LOOK_S) -> None:
    ended = threading.Event()
    with Path(os.devnull).open("w", encoding="ascii") as nowhere:
        while os.getppid() == parent:
            faulthandler.dump_traceback_later(held_s, exit=True, file=nowhere)
            ended.wait(look_s)
    os._exit(1)
