"""What a batch knows on disk: keyed names for studies, manifests that say what was made, outputs put in place whole.

    OUT/STUDY/manifest.json and outputs     a study that ended, renamed into place as one folder
    OUT/private/key, studies.csv            what leads from keyed names back to studies; for its owner alone (0600).
                                            Of outputs without identifiers it is OUT.private, beside OUT and not in it
    OUT/private/work                        what archives are unpacked to, and objects until their identifiers are out
    OUT/.claims, OUT/.work                  who works on what, and unfinished outputs; empty when nobody works

The disk is the truth: a study is done when its manifest verifies, and not when a file exists. A work folder is the
right to publish, too: who takes a study over sweeps it first, and whoever still writes there can put nothing in place.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import io
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from medseg.errors import InputError, OutputError, UsageError
from medseg.io.files import written_whole
from medseg.io.leftovers import temporary_folder
from medseg.io.text import read_json

FORMAT = 1
MANIFEST = "manifest.json"
KEY_BYTES = 32
CHUNK = 1 << 20

HERE = frozenset({"compressed_no_codec"})
"""What refuses a study for want of something on this machine, which may be there the next time."""


class _Output(BaseModel):
    file: str
    sha256: str


class _Volume(BaseModel):
    name: str
    volume_ml: float


class _Manifest(BaseModel):
    """What of a manifest is read again; it says more."""

    format: Literal[1]
    status: str
    reason: str | None
    text: str | None
    outputs: list[_Output]
    seconds: dict[str, float] = {}
    labels: list[_Volume] = []


@dataclass(frozen=True)
class Ledger:
    """The folder of a batch, and the key that turns names and UIDs into what may be shown."""

    out: Path
    key: bytes = field(repr=False)
    deidentify: bool = False

    @classmethod
    def open(cls, out: str | PathLike[str], *, deidentify: bool = False) -> Ledger:
        """Return the ledger of a folder, which is made with a new key where it is none yet.

        Raises OutputError, and UsageError for a folder that was begun with identifiers and shall have none, or the
        other way round.
        """
        folder = Path(out)
        private, other = (_private(folder, deidentify=which) for which in (deidentify, not deidentify))
        if other.exists():
            raise UsageError(
                "The output folder was begun with the other choice for --deidentify. Use another one, or the same "
                "choice: outputs with and without identifiers do not mix.",
                path=folder,
            )
        try:
            for part in (folder, folder / ".claims", folder / ".work"):
                part.mkdir(parents=True, exist_ok=True)
            own_folder(private)
            return cls(folder, key_in(private / "key"), deidentify)
        except OSError as error:
            raise OutputError(
                f"The output folder cannot be used: {error.strerror or 'its key is damaged'}. "
                "Check that it may be written to and has space left.",
                path=folder,
            ) from error

    @classmethod
    def existing(cls, out: str | PathLike[str], *, deidentify: bool = False) -> Ledger:
        """Return the ledger of a folder that another process has opened. Raises OutputError where it is not there."""
        path = _private(Path(out), deidentify=deidentify) / "key"
        with _guarded(path):
            return cls(Path(out), bytes.fromhex(path.read_text(encoding="ascii")), deidentify)

    @property
    def private(self) -> Path:
        """Return the folder of what leads back to studies."""
        return _private(self.out, deidentify=self.deidentify)

    @property
    def check(self) -> str:
        """Return what tells whether two processes see one output folder."""
        return self.name("check")

    def shown(self, digest: str) -> str:
        """Return a hash of inputs as a manifest shows it: keyed where not even who has them may recognize them."""
        return hmac.new(self.key, digest.encode(), hashlib.sha256).hexdigest() if self.deidentify else digest

    def name(self, what: str) -> str:
        """Return a keyed hash of a UID or a path: the same for one output folder, and telling nothing."""
        return hmac.new(self.key, what.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[:16]

    def remember(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """Add rows (keyed name, StudyInstanceUID, path) that are not there yet to the table that leads back."""
        table = self.private / "studies.csv"
        with _guarded(table):
            add_rows(table, rows)

    def work_path(self, study: str, token: str) -> Path:
        """Return a new path for unfinished outputs of a study."""
        return self.out / ".work" / f"{study}.{token}.{secrets.token_hex(4)}"

    def work_folder(self, study: str, token: str) -> Path:
        """Return a new, empty folder for unfinished outputs of a study. Raises OutputError."""
        return emptied(self.work_path(study, token))

    def private_folder(self, study: str, token: str) -> Path:
        """Return a new, empty folder for what leads back to a study: a kill leaves nothing of it in outputs without."""
        return emptied(self.private / "work" / self.work_path(study, token).name)

    def unfinished(self, study: str = "*") -> Iterator[Path]:
        """Yield the folders of work on a study, or on any: of interrupted runs, if nobody has claimed it."""
        for folder in (self.out / ".work", self.private / "work"):
            yield from folder.glob(f"{study}.*")

    def publish(self, study: str, work: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Put the outputs in `work` in place with their manifest, in one rename; return the manifest.

        What an earlier run put there is gone then. Raises OutputError.
        """
        outputs = [
            {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}
            for file in sorted(work.iterdir())
            if file.name != MANIFEST
        ]
        content = {"format": FORMAT, "study": study, **manifest, "outputs": outputs}
        with written_whole(work / MANIFEST) as beside:
            beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        final = self.out / study
        with _guarded(final):
            _synced(work)
            while True:
                with suppress(FileNotFoundError):
                    final.rename(work.with_name(f"{work.name}.old"))
                try:
                    work.rename(final)
                    break
                except OSError:  # another process put its result there meanwhile: a complete one, but of before
                    if not (work.exists() and final.exists()):
                        with suppress(OSError):
                            work.with_name(f"{work.name}.old").rename(final)
                        raise
            _synced(self.out)
        shutil.rmtree(work.with_name(f"{work.name}.old"), ignore_errors=True)
        return content

    def manifest(self, study: str) -> dict[str, Any] | None:
        """Return the manifest of a study, or None where it is missing, damaged or none."""
        try:
            content: dict[str, Any] = read_json(self.out / study / MANIFEST, "The manifest", InputError)
            _Manifest.model_validate(content)
        except (InputError, ValueError):
            return None
        return content

    def verified(self, study: str, expected: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the manifest of a study that is done or refused and still true, else None.

        True is what says all of `expected` and whose outputs are there with their hashes, and nothing else beside them.
        """
        found = self.manifest(study)
        if found is None or found.get("status") not in {"done", "refused"} or found.get("reason") in HERE:
            return None
        if any(found.get(name) != value for name, value in expected.items()):
            return None
        outputs = {one["file"]: one["sha256"] for one in found["outputs"]}
        try:
            there = {file.name for file in (self.out / study).iterdir()} - {MANIFEST}
            true = there == set(outputs) and all(sha256(self.out / study / name) == outputs[name] for name in there)
        except OSError:
            return None
        return found if true else None

    def sweep(self, study: str) -> None:
        """Remove what an interrupted run left of a study that is claimed by the caller.

        Renamed first: from then on, nobody who still writes there finds the folder again.
        """
        for folder in [*self.unfinished(study)]:
            swept = folder.with_name(f"{study}.{secrets.token_hex(8)}")
            with suppress(OSError):
                folder.rename(swept)
            shutil.rmtree(swept, ignore_errors=True)


def emptied(folder: Path) -> Path:
    """Return the folder, there and empty. Raises OutputError."""
    shutil.rmtree(folder, ignore_errors=True)
    with _guarded(folder):
        folder.mkdir(parents=True)
    return folder


def clear(folder: Path) -> None:
    """Remove what is in a folder. Raises FileNotFoundError where it is gone itself."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def state(files: Sequence[tuple[str, Path]]) -> str:
    """Return a hash of the keyed names, sizes and times of files: another one when a file changes, comes or goes."""
    digest = hashlib.sha256()
    for name, path in sorted(files):
        try:
            found = path.stat()
            digest.update(f"{name} {found.st_size} {found.st_mtime_ns}\n".encode())
        except OSError as error:
            digest.update(f"{name} {error.errno}\n".encode())
    return digest.hexdigest()


def sha256(*paths: Path) -> str:
    """Return the SHA-256 of the content of files, one after the other. Raises OSError."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _private(out: Path, *, deidentify: bool) -> Path:
    whole = out.resolve()  # "." has no name
    return whole.with_name(f"{whole.name}.private") if deidentify else out / "private"


def own_folder(folder: Path) -> None:
    """Make a folder that only its owner may look into. Raises OutputError where one is there that others may, OSError.

    A disk that keeps no permissions shows others for new folders, too, and cannot do better.
    """
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()
        with temporary_folder(folder) as fresh:
            usual = fresh.stat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != usual.st_uid or found.st_mode & ~usual.st_mode & 0o077:
            raise OutputError(
                "The private folder of these outputs is a link, belongs to somebody else, or may be looked into by "
                "others. Make it yours alone (chmod 700), or give another output folder.",
                path=folder,
            ) from None


def key_in(path: Path) -> bytes:
    """Return the key in a file, which the first process to come makes."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            try:
                file.write(secrets.token_hex(KEY_BYTES))
                file.flush()
            except OSError:  # a full disk: half a key would stay damaged when there is room again
                path.unlink()
                raise
    except FileExistsError:
        pass
    for _ in range(50):
        text = path.read_text(encoding="ascii", errors="replace")
        if len(text) == 2 * KEY_BYTES:
            return bytes.fromhex(text)
        time.sleep(0.1)  # its maker is about to write it
    raise OSError


def add_rows(table: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """Add the rows that are not there yet to a table for its owner alone (0600); one that was cut off counts as none.

    A study that moved has a row for each place that it was found in. Raises OSError.
    """
    handle = os.open(table, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(handle, "a+", newline="", encoding="utf-8", errors="surrogateescape") as file:
        file.seek(0)
        text = file.read()
        whole = text[: text.rfind("\n") + 1]
        known = {tuple(row) for row in csv.reader(io.StringIO(whole, newline=""))}
        file.write("\r\n" if whole != text else "")
        csv.writer(file).writerows(row for row in rows if row not in known)


def _synced(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _guarded(path: Path) -> Iterator[None]:
    """Turn what the system raises in the block into OutputError for `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"The output could not be written: {error.strerror or 'the system gives no cause'}. "
            "Check that its folder may be written to and has space left.",
            path=path,
        ) from error
