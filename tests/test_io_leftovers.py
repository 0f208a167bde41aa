"""What a killed process leaves is known by its name, taken for nothing, and swept where nobody is at work on it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from dicom_files import some_labels, write_source
from models import tiny_model
from test_study_dataset import rules, study

import medseg
from medseg.io import leftovers
from medseg.io.dicom_series import files_below
from medseg.io.files import check_place, written_whole
from medseg.io.leftovers import is_leftover, sweep, temporary_file, temporary_folder
from medseg.model.weights import save_weights
from medseg.study.archive import unpack
from medseg.study.find import find_studies

KILLED = """
import os, signal, sys
import {module} as module
real = module.{name}
def killed(*arguments, **options):
    done = real(*arguments, **options)
    if {told!r} in str(arguments):
        os.kill(os.getpid(), signal.SIGKILL)
    return done
module.{name} = killed
from medseg.cli import main
sys.argv = ["medseg", *sys.argv[1:]]
main()
"""


def left_in(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if is_leftover(path.name)]


def medseg_killed(where: str, told: str, *arguments: object, environment: dict[str, str] | None = None) -> None:
    """Run a command line that is killed after it has called a function of a module with what this text stands in."""
    module, _, name = where.rpartition(".")
    code = KILLED.format(module=module, name=name, told=told)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | (environment or {}), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def medseg_run(*arguments: object, environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "medseg", *map(str, arguments)]
    subprocess.run(command, env=os.environ | (environment or {}), capture_output=True, check=True)


@pytest.fixture(autouse=True)
def fresh():
    """Let each test look into folders as a process does that has just started."""
    leftovers._swept.cache_clear()


@pytest.fixture
def killed_writer(tmp_path):
    """Return a folder in which a process was killed with a file and a folder half written."""
    code = (
        "import sys, pathlib; from medseg.io.leftovers import temporary_file, temporary_folder\n"
        "with temporary_file(pathlib.Path(sys.argv[1]), '.dcm') as a, temporary_folder(sys.argv[1]) as b:\n"
        "    a.write_bytes(b'half'); (b / 'slice.dcm').write_bytes(b'half'); print('there', flush=True); input()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"there\n"
    yield tmp_path, process
    process.kill()
    process.communicate()


def test_a_sweep_takes_what_a_kill_left_and_nothing_that_is_at_work(killed_writer):
    folder, process = killed_writer
    own = folder / ".medseg.notes"
    own.touch()
    sweep(folder)
    assert len(left_in(folder)) == 2
    assert files_below(folder) == [own]
    process.kill()
    process.communicate()
    assert len(left_in(folder)) == 2
    sweep(folder)  # a process looks once
    assert len(left_in(folder)) == 2
    leftovers._swept.cache_clear()
    sweep(folder)
    assert list(folder.iterdir()) == [own]


@pytest.mark.parametrize("start", ["written_whole", "check_place", "temporary_folder"])
def test_each_start_sweeps(killed_writer, start):
    folder, process = killed_writer
    process.kill()
    process.communicate()
    if start == "check_place":
        check_place(folder / "a.txt")
    elif start == "written_whole":
        with written_whole(folder / "a.txt") as beside:
            beside.touch()
    else:
        with temporary_folder(folder):
            pass
    assert left_in(folder) == []


def test_what_another_machine_made_stays(killed_writer, monkeypatch):
    folder, process = killed_writer
    process.kill()
    process.communicate()
    monkeypatch.setattr(leftovers, "_prefix", lambda: f"{leftovers.PREFIX}00000000-")
    sweep(folder)
    assert len(left_in(folder)) == 2
    assert files_below(folder) == []


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    for name, target in (("a", "kept"), ("b", "kept/file"), ("c", "nothing")):
        (tmp_path / f"{leftovers._prefix()}{name}").symlink_to(tmp_path / target)
    os.mkfifo(tmp_path / f"{leftovers._prefix()}d")
    sweep(tmp_path)
    assert (tmp_path / "kept" / "file").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_sweep_between_making_and_lock_costs_nothing(tmp_path, monkeypatch, kind):
    real, swept = leftovers._locked, []

    def late(path):
        if not swept:
            swept.append(path)
            leftovers._swept.cache_clear()
            sweep(tmp_path)
            assert not path.exists()
        return real(path)

    monkeypatch.setattr(leftovers, "_locked", late)
    with temporary_file(tmp_path, ".nii") if kind == "file" else temporary_folder(tmp_path) as path:
        assert path.exists()
        assert path not in swept
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_locks_sweeps_nothing_and_works(killed_writer, monkeypatch):
    folder, process = killed_writer
    process.kill()
    process.communicate()

    def refused(*_args):
        raise OSError("no locks here")

    monkeypatch.setattr(leftovers.fcntl, "flock", refused)
    with written_whole(folder / "a.txt") as beside:
        beside.write_text("whole")
    assert (folder / "a.txt").read_text() == "whole"
    assert len(left_in(folder)) == 2


def test_without_locks_of_the_system_leftovers_stay_and_are_passed_over(killed_writer, monkeypatch):
    folder, process = killed_writer
    process.kill()
    process.communicate()
    monkeypatch.setattr(leftovers, "fcntl", None)
    with written_whole(folder / "a.dcm") as beside, temporary_folder(folder):
        beside.write_text("whole")
    assert len(left_in(folder)) == 2
    assert files_below(folder) == [folder / "a.dcm"]


def test_leftovers_in_an_archive_are_passed_over(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.dcm", b"1")
        archive.writestr(".medseg-01234567-1.dcm", b"2")
        archive.writestr(".medseg-01234567-2/b.dcm", b"3")
    unpack(tmp_path / "a.zip", tmp_path)
    assert [file.read_bytes() for file in tmp_path.rglob("*.dcm")] == [b"1"]


@pytest.fixture
def source(tmp_path):
    """Return a series and labels on it."""
    folder = write_source(tmp_path / "study")
    medseg.save(some_labels(medseg.load(folder).grid), tmp_path / "labels.nii.gz")
    return folder, tmp_path / "labels.nii.gz"


def test_convert_is_killed_beside_the_slices(source):
    folder, labels = source
    before = medseg.load(folder)
    arguments = ("convert", labels, folder / "labels.dcm", "--source", folder)
    medseg_killed("os.fsync", "", *arguments)
    assert len(left_in(folder)) == 1
    assert not (folder / "labels.dcm").exists()
    (study,) = find_studies(folder)
    assert len(study.files) == len(list(folder.iterdir())) - 1
    assert (medseg.load(folder).array == before.array).all()
    medseg_run(*arguments)
    assert left_in(folder) == []


def test_segment_and_report_are_killed(source, tmp_path):
    folder, labels = source
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    out.mkdir()
    tiny = tiny_model()
    tiny.plan.save(model / "plan.json")
    save_weights(tiny.networks[0], model / "fold_0.safetensors")
    for arguments in (
        ("segment", model, folder, out / "labels.nii.gz", "--anyway"),
        ("report", folder, labels, out / "report.csv"),
    ):
        medseg_killed("medseg.io.leftovers._locked", str(out), *arguments)
        assert len(left_in(out)) == 1
        assert not arguments[3].exists()
        medseg_run(*arguments)
        assert left_in(out) == []
        assert arguments[3].exists()


def test_an_unpacked_archive_is_gone_after_the_next_look(source, tmp_path):
    folder, _ = source
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {"TMPDIR": str(temporary)}
    archive = ("info", tmp_path / "study.zip")
    medseg_killed("medseg.study.archive.unpack", "", *archive, environment=environment)
    (left,) = temporary.iterdir()
    assert is_leftover(left.name)
    assert left.stat().st_mode & 0o077 == 0
    assert any(file.stat().st_size for file in left.rglob("*"))
    medseg_run(*archive, environment=environment)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("moment", ["/images/", "/labels/", ".private/cases/"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_dataset_is_killed(tmp_path, moment, gone):
    for number in (1, 2):
        study(tmp_path / "studies", number, {"liver": "liver"})
    arguments = ("dataset", tmp_path / "studies", tmp_path / "out", "--labels", rules(tmp_path))
    medseg_killed("medseg.io.leftovers._locked", moment, *arguments)
    out, private = tmp_path / "out", tmp_path / "out.private"
    assert len(left_in(out, private)) == 1
    medseg_killed("os.replace", moment, *arguments)
    assert not (out / "dataset.json").exists()
    if gone:
        shutil.rmtree(tmp_path / "studies" / "MUELLER_1")
    medseg_run(*arguments)
    assert left_in(out, private) == []
    cases = [f"{one['case']}.nii.gz" for one in json.loads((out / "cases.json").read_text())]
    assert len(cases) == 2 - gone
    for part in ("images", "labels"):
        assert sorted(file.name for file in (out / part).iterdir()) == sorted(cases)
