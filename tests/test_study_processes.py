"""Processes that medseg starts run nothing of the working folder, and end with who started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dicom_files import write_series
from studies import complete, write_pipeline, write_study

from medseg.study.processes import python_environment

HELD = "import re; re.search('(a|a)*b', 'a' * 40)"
"""Holds the interpreter for longer than anybody waits: no other thread of Python runs meanwhile."""

NAMES = ("rle", "numpy", "pickle", "json", "gdcm", "medseg_codec")
"""What processes import before and while they work, and what they only ask for."""


def trapped(folder: Path, witness: Path) -> None:
    """Lay down modules that leave a word where they are run."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(witness)!r}, 'a').write({name!r})\n", encoding="utf-8")


def clean_environment(**more: str) -> dict[str, str]:
    return {name: text for name, text in os.environ.items() if name not in {"PYTHONPATH", "PYTHONSAFEPATH"}} | more


def medseg(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program as the installed command is one: it lies in a folder of its own."""
    program = cwd.parent / "bin" / "program.py"
    program.parent.mkdir()
    program.write_text("from medseg.cli import main\n\nif __name__ == '__main__':\n    main()\n", encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(program), *map(str, arguments)],
        cwd=cwd, env=clean_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_batch_runs_nothing_of_the_folder_that_it_is_started_in(tmp_path):
    pipeline, studies, witness = write_pipeline(tmp_path / "pipeline"), tmp_path / "studies", tmp_path / "witness"
    write_study(studies, 0)
    trapped(studies, witness)
    done = medseg("batch", pipeline, ".", "../out", "--runtime", "torch", "--threads", 1, cwd=studies)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [*complete(tmp_path / "out").values()] == ["done"]
    assert not witness.exists(), witness.read_text(encoding="utf-8")


def test_workers_of_a_local_cluster_run_nothing_of_the_folder(tmp_path):
    pytest.importorskip("distributed")
    pipeline, studies, witness = write_pipeline(tmp_path / "pipeline"), tmp_path / "studies", tmp_path / "witness"
    write_study(studies, 0)
    trapped(studies, witness)
    done = medseg("batch", pipeline, ".", "../out", "--runtime", "torch", "--scheduler", "local", cwd=studies)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not witness.exists(), witness.read_text(encoding="utf-8")


def test_readers_of_headers_run_nothing_of_the_folder(tmp_path):
    write_series(tmp_path / "studies" / "a", range(4))
    witness = tmp_path / "witness"
    trapped(tmp_path / "studies", witness)
    code = (
        "from medseg.study import headers, find; headers.MANY, headers.cores = 2, lambda: 2\n"
        "print(len(find.find_studies('a')[0].files))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path / "studies", env=clean_environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["4"], done.stderr
    assert not witness.exists(), witness.read_text(encoding="utf-8")


def test_the_module_runs_nothing_of_the_folder(tmp_path):
    """Python imports medseg and some of its own before medseg can say anything; what it imports then is its own."""
    write_series(tmp_path / "studies", range(4))
    witness = tmp_path / "witness"
    trapped(tmp_path / "studies", witness)
    done = subprocess.run(
        [sys.executable, "-m", "medseg", "info", "."], cwd=tmp_path / "studies", env=clean_environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not witness.exists(), witness.read_text(encoding="utf-8")


def test_a_path_of_the_user_is_still_searched(tmp_path):
    """Also one that is relative: PYTHONPATH is what its user says, the working folder is not."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "of_a_user.py").write_text("print('found')\n", encoding="utf-8")
    code = (
        "import subprocess\nfrom medseg.study.processes import python_command, python_environment\n"
        "command = python_command('of_a_user')\n"
        "print(subprocess.run(command, env=python_environment(), capture_output=True, text=True).stdout)"
    )
    for path in (str(tmp_path / "plugins"), "plugins"):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], cwd=tmp_path, env=clean_environment(PYTHONPATH=path),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout.split() == ["found"], done.stderr


def test_a_blank_entry_of_the_path_is_not_handed_on(monkeypatch):
    """What PYTHONPATH=$PYTHONPATH:folder leaves stands for the working folder."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "src", "", "/lib"]))
    assert python_environment()["PYTHONPATH"].split(os.pathsep)[1:] == ["src", "/lib"]
    assert python_environment()["PYTHONSAFEPATH"] == "1"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("how", ["the system", "a timer"])
def test_a_process_whose_interpreter_is_held_ends_with_its_parent(how):
    watch = {
        "the system": "processes.end_with(os.getppid())",
        "a timer": "threading.Thread(target=processes._look, args=(os.getppid(), 1.0, 0.2), daemon=True).start()",
    }[how]
    child = (
        f"import os, threading, time\nfrom medseg.study import processes\n{watch}\n"
        f"time.sleep(0.5)\nprint(os.getpid(), flush=True)\n{HELD}"
    )
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    started = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    held = int(started.stdout.readline())
    time.sleep(0.3)
    assert alive(held), "nothing is shown where it ended by itself"
    started.kill()
    started.wait()
    started.stdout.close()
    until = time.monotonic() + 30
    while alive(held) and time.monotonic() < until:
        time.sleep(0.05)
    gone = not alive(held)
    if not gone:
        os.kill(held, signal.SIGKILL)
    assert gone, "it outlives its parent"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_process_whose_parent_is_gone_before_it_looks_ends():
    code = "import time\nfrom medseg.study import processes\nprocesses.end_with(1 << 30)\ntime.sleep(60)"
    assert subprocess.run([sys.executable, "-c", code], timeout=50, check=False).returncode == 1
