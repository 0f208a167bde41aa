"""All files that pydicom ships for its own tests, odd ones among them: read as dcm2niix reads them, or refused."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from test_study_realdata import TOLERANCE_MM, by_dcm2niix, same

from medseg.errors import MedsegError
from medseg.io.dicom_series import Series, read_series
from medseg.study.find import find_studies

DATA = Path(pydicom.__file__).parent / "data"
FILES = sorted(
    file
    for file in DATA.rglob("*")
    if file.is_file() and file.suffix not in {".py", ".pyc", ".json"} and "TINY_ALPHA" not in file.parts
)
STUDIES = DATA / "test_files" / "dicomdirtests"

ODD = {"J2K_pixelrep_mismatch.dcm"}
"""dcm2niix takes the values of this one for unsigned: air is 6192 there, and -2000 in truth."""


def readable(path: Path) -> list[Series]:
    return [one for study in find_studies(path) for one in study.series if one.verdict != "refused"]


def test_every_file_is_read_or_refused_and_nothing_warns() -> None:
    counts = {"read": 0, "refused": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file in FILES:
            try:
                volumes = [read_series(one) for one in readable(file)]
                assert all(np.isfinite(volume.array).all() for volume in volumes)
                counts["read" if volumes else "refused"] += 1
            except MedsegError:
                counts["refused"] += 1
    assert counts["read"] > 30
    assert counts["refused"] > 80


SINGLE = [file for file in sorted((DATA / "test_files").glob("*.dcm")) if file.name != "MR_truncated.dcm"]
SERIES = [STUDIES / name for name in ("98892001/CT5N", "98892003/MR1", "98892003/MR2", "98892003/MR700")]


def test_what_is_read_agrees_with_dcm2niix(tmp_path: Path) -> None:
    compared = 0
    for number, path in enumerate([*SINGLE, *SERIES]):
        folder = tmp_path / str(number)
        if path.is_file():
            folder.mkdir()
            shutil.copy(path, folder)
        else:
            shutil.copytree(path, folder)
        ours = [read_series(one).reoriented("RAS") for one in readable(folder)]
        if not ours:
            continue
        theirs = by_dcm2niix(folder, tmp_path / f"{number}_out", "y")
        for volume in ours:
            agrees = (
                volume.grid.matches(one.grid, TOLERANCE_MM) if path.name in ODD else same(volume, one) for one in theirs
            )
            assert any(agrees), path.name
            compared += 1
    assert compared > 20


def test_signs_follow_the_header_where_the_codestream_says_otherwise(tmp_path: Path) -> None:
    (series,) = readable(DATA / "test_files" / "J2K_pixelrep_mismatch.dcm")
    assert read_series(series).array.min() == -2000


@pytest.mark.parametrize("kind", ["DICOMDIR", "DICOMDIR-bigEnd", "DICOMDIR-implicit", "DICOMDIR-reordered"])
def test_every_kind_of_dicomdir_names_the_same_series(kind: str) -> None:
    assert (
        sorted(one.n_slices for one in readable(STUDIES / kind))[-3:]
        == sorted(one.n_slices for one in readable(STUDIES / "DICOMDIR"))[-3:]
    )
