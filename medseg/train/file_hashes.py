"""What is in files, by hash, without reading a file again that has not changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from medseg.io.files import written_whole


class FileHashes:
    """SHA-256 of the content of files, remembered in a JSON file by size and time of change.

    The memory names files by a hash too, since their names can name patients.
    """

    def __init__(self, memory: Path):
        self._memory = memory
        try:
            self._known: dict[str, str] = dict(json.loads(memory.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            self._known = {}
        self._remembered = len(self._known)

    def of(self, file: Path) -> str:
        """Return the hash of what is in a file. Raises OSError where it cannot be read."""
        state = file.stat()
        facts = f"{file.resolve()} {state.st_size} {state.st_mtime_ns}"
        key = hashlib.sha256(facts.encode()).hexdigest()
        if key not in self._known:
            with file.open("rb") as stream:
                self._known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        return self._known[key]

    def save(self) -> None:
        """Write the memory, if there is something new in it. Raises OutputError."""
        if len(self._known) == self._remembered:
            return
        with written_whole(self._memory) as beside:
            beside.write_text(json.dumps(self._known), encoding="utf-8")
