"""Compiled networks in the user's cache folder: whole or not there, never stale, never trusted when damaged."""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.errors import OutputError
from medseg.io.files import written_whole

if TYPE_CHECKING:
    from torch import nn

KEPT = 10
"""Compiled networks that stay in the folder: those used last. Each is about as large as its weights."""

CHECKSUM_BYTES = 32


def fingerprint(network: nn.Module, *facts: object) -> str:
    """Return a name for a network in evaluation mode and what else its compiled form depends on.

    It covers all that `forward` can read, which is the kind and the settings of every module and every weight, and the
    code of this package, which says what is made of them.
    """
    digest = hashlib.sha256(repr(facts).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    for name, module in network.named_modules():
        numbers = {
            key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str | tuple)
        }
        digest.update(f"{name} {type(module).__qualname__} {sorted(numbers.items())}".encode())
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def read(name: str) -> bytes | None:
    """Return what was stored under a name, or None where nothing is there or a byte of it has changed."""
    file = folder() / name
    if not file.is_absolute():
        return None
    try:
        if not (_is_own(file.parent) and _is_own(file)):
            return None
        with file.open("rb") as stored:
            checksum, content = stored.read(CHECKSUM_BYTES), stored.read()
        os.utime(file)
    except OSError:
        return None
    return content if hashlib.sha256(content).digest() == checksum else None


def _is_own(path: Path) -> bool:
    """Return whether nobody else can have written a path: it belongs to this user, and only they may write to it."""
    state = path.stat()
    own = not hasattr(os, "getuid") or state.st_uid == os.getuid()
    return own and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def write(name: str, content: bytes) -> None:
    """Store bytes under a name and forget what was used longest ago; where nothing can be written, do nothing."""
    where = folder()
    if not where.is_absolute():  # without a home "~" stays as it is, and would become a folder here
        return
    with suppress(OSError, OutputError):
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_own(where):
            return
        with written_whole(where / name) as beside:
            beside.write_bytes(hashlib.sha256(content).digest() + content)
        by_age = sorted(where.iterdir(), key=lambda file: file.stat().st_mtime)
        for file in by_age[:-KEPT]:
            file.unlink()


def folder() -> Path:
    """Return the folder of compiled networks, which may be deleted at any time."""
    import platformdirs

    return platformdirs.user_cache_path("medseg", appauthor=False) / "networks"
