"""Which files of a folder are one scan: NAME, or NAME_0000, NAME_0001 ... with one channel each, as in nnU-Net."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg.io import itk, nifti

ENDINGS = sorted((*nifti.ENDINGS, *itk.ENDINGS), key=len, reverse=True)

NUMBERED = re.compile(r"(.+)_(\d{4})", re.ASCII)

MOST_CHANNELS = 10
"""Files NAME_0000, NAME_0001 ... that go on for longer are scans that somebody counted."""


@dataclass(frozen=True)
class Scan:
    """The files of one scan, in the order of its channels; with `is_complete` one for each, or one with all."""

    name: str
    files: tuple[Path, ...]
    numbers: tuple[int, ...] = ()
    is_complete: bool = True


def split_ending(file_name: str) -> tuple[str, str]:
    """Return the name of a volume and its ending, such as ("a", ".nii.gz"); the ending is "" for other files."""
    ending = next((one for one in ENDINGS if file_name.lower().endswith(one)), "")
    stop = len(file_name) - len(ending)
    return file_name[:stop], file_name[stop:]


def scans_of(files: Iterable[Path], channels: int) -> list[Scan]:
    """Return the scans that files hold, sorted by name, for a model of so many channels.

    Files of one NAME that are numbered from 0000, or with a number of some other channel of the model, are one scan,
    called NAME. It is complete if it has each number of a channel once, and no other. Any other file is a scan.
    """
    alone: list[Scan] = []
    numbered: dict[str, list[tuple[int, Path]]] = {}
    for file in files:
        name = split_ending(file.name)[0]
        alone.append(Scan(name, (file,)))
        match = NUMBERED.fullmatch(name)
        if match:
            numbered.setdefault(match[1], []).append((int(match[2]), file))
    sets = {name: sorted(found) for name, found in numbered.items() if _are_channels([n for n, _ in found], channels)}
    together = {file for found in sets.values() for _, file in found}
    scans = [scan for scan in alone if scan.files[0] not in together]
    for name, found in sets.items():
        numbers = tuple(number for number, _ in found)
        scans.append(Scan(name, tuple(file for _, file in found), numbers, numbers == tuple(range(channels))))
    return sorted(scans, key=lambda scan: (scan.name, scan.files))


def _are_channels(numbers: Sequence[int], channels: int) -> bool:
    return min(numbers) < channels and max(numbers) < max(channels, MOST_CHANNELS)
