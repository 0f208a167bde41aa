"""The check that no test shows a patient can fail."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import leaks
import pytest
from dicom_files import PATIENT, STUDY
from studies import environment, write_study

CASES = {
    "print": "def test(): print('of ID0001')",
    "stderr": "import sys\ndef test(): sys.stderr.write('A-0815')",
    "log": "import logging\ndef test(): logging.getLogger('x').warning('19550321')",
    "capsys": "def test(capsys):\n    print('Doe^Jane')\n    capsys.readouterr()",
    "file": "def test(tmp_path): (tmp_path / 'x.json').write_text('PID-4711')",
    "nothing": "def test(tmp_path): (tmp_path / 'x.json').write_text('a liver')",
}


def test_every_way_out_is_watched(tmp_path: Path) -> None:
    for name, code in CASES.items():
        (tmp_path / f"test_{name}.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "leaks", "-p", "no:cacheprovider", "-q", "-rA", "."],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    told = [line.split()[:2] for line in done.stdout.splitlines() if line.startswith(("ERROR", "FAILED"))]
    assert sorted(line[1].partition("::")[0] for line in told) == sorted(
        f"test_{name}.py" for name in CASES if name != "nothing"
    )
    assert "6 passed" in done.stdout


@pytest.mark.parametrize(
    "name", ["PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "ReferringPhysicianName"]
)
def test_what_series_carry_is_known(name: str) -> None:
    assert leaks.leaks([f"a {STUDY[name]} b"])


def test_files(tmp_path: Path) -> None:
    write_study(tmp_path, 1)
    assert leaks.leaks([PATIENT]) and not leaks.leaks(leaks.contents(tmp_path))
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "studies.csv").write_text("ID0001")
    assert not leaks.leaks(leaks.contents(tmp_path))
    (tmp_path / "labels.nii.gz").write_bytes(gzip.compress(b"\0 ACC0001"))
    assert leaks.leaks(leaks.contents(tmp_path)) == ["ACC0001"]
    (tmp_path / "labels.nii.gz").write_bytes(b"no gzip")
    assert not leaks.leaks(leaks.contents(tmp_path))
