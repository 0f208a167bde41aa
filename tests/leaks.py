"""A plugin that fails every test which shows or writes whose data it had: what it prints, logs, and leaves in files.

The generated series carry names, numbers and dates that appear nowhere else. Series themselves, DICOM objects and the
private folder of a batch may hold them, and are not looked into.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

SECRET = re.compile(
    r"Doe.Jane|M\S{1,6}ller.J\S{1,6}rg|House.Gregory|PID-4711|A-0815|19550321|\bID0\d{3}|\bACC0\d{3}", re.IGNORECASE
)
"""Patients, physicians, patient ids, accession numbers and birth dates of the series that tests write."""

OPEN = frozenset({".json", ".csv", ".txt", ".log", ".md", ".html", ".yaml", ".nii", ".gz", ".nrrd", ".mha"})
"""Endings of files that must not have any of it."""

FOLDER = "DOE_JANE"
"""Folders are called after patients, and a path may be shown to who gave it."""

HEAD = 1 << 20

READ: list[str] = []
"""What the test at hand has read of its own output, which its report does not have any more."""


def leaks(texts: Iterable[str]) -> list[str]:
    """Return what identifies a patient in texts."""
    return [found for text in texts for found in SECRET.findall(text) if found != FOLDER]


def contents(folder: Path) -> Iterator[str]:
    """Yield the beginning of every file below a folder that must not identify a patient."""
    for path in folder.rglob("*"):
        if path.suffix not in OPEN or not path.is_file() or any(part.endswith("private") for part in path.parts):
            continue
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                yield file.read(HEAD).decode("latin-1")
        except (OSError, EOFError):
            continue  # damaged on purpose


def pytest_configure() -> None:
    """Remember what tests read of their own output."""
    read = pytest.CaptureFixture.readouterr

    def readouterr(self: Any) -> Any:
        result = read(self)
        READ.extend(map(str, result))
        return result

    pytest.CaptureFixture.readouterr = readouterr  # type: ignore[method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Fail the test behind which something is left that identifies a patient."""
    report = yield
    if call.when == "teardown":
        folder = getattr(item, "funcargs", {}).get("tmp_path")
        texts = [*(text for _, text in report.sections), *READ, *(contents(folder) if folder else ())]
        READ.clear()
        if (found := leaks(texts)) and report.passed:
            report.outcome = "failed"
            report.longrepr = f"This test shows or leaves behind whose data it had: {sorted(set(found))}"
    return report
