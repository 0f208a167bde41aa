"""Whatever the system refuses, a study fails with its reason, the rest completes, and no part of a result is seen.

Each fault is shown to bite before anything is concluded from it.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from studies import assert_no_secret, batch_command, complete, environment, write_pipeline, write_study

from medseg.study.batch import Options, run_batch

TORCH = Options(runtime="torch", threads=1)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path / "pipeline")


def run(command: Sequence[str], **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload,no-any-return]


def as_a_user(command: Sequence[str]) -> list[str]:
    """Return the command as one that permissions stop, as they do not stop root: without these two capabilities."""
    if os.geteuid() != 0:
        return [*command]
    stopped = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if shutil.which("setpriv") is None or run([*stopped, "true"]).returncode:
        pytest.skip("root can lay down none of its rights here")
    return [*stopped, *command]


def test_files_and_folders_without_permission_and_cut_files(tmp_path, pipeline):
    studies, out = tmp_path / "studies", tmp_path / "out"
    for number in range(6):
        write_study(studies, number)
    listed = studies / "DOE_JANE_5"  # and not entered
    unreadable = sorted((studies / "DOE_JANE_1").iterdir())[2]
    closed = studies / "DOE_JANE_2"
    cut = sorted((studies / "DOE_JANE_3").iterdir())[2]
    cut.write_bytes(cut.read_bytes()[:300])  # in its header
    cut = sorted((studies / "DOE_JANE_4").iterdir())[2]
    cut.write_bytes(cut.read_bytes()[:-7])  # in its pixels
    unreadable.chmod(0)
    closed.chmod(0)
    listed.chmod(0o444)
    try:
        for command in (["cat", str(unreadable)], ["ls", str(closed)], ["cat", *map(str, listed.iterdir())]):
            assert "Permission denied" in run(as_a_user(command)).stderr
        done = run(as_a_user(batch_command(pipeline, studies, out)))
    finally:
        unreadable.chmod(0o600)
        closed.chmod(0o700)
        listed.chmod(0o700)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert sorted(complete(out).values()) == ["done", *["failed"] * 5]
    assert done.stdout.count("failed, unreadable") == 5
    assert not [*(out / ".work").iterdir(), *(out / ".claims").iterdir()]
    assert_no_secret(out, done.stdout, done.stderr)


def test_paths_that_the_system_refuses_are_one_line_and_no_traceback(tmp_path, pipeline):
    model, locked, closed = pipeline.parent / "model", tmp_path / "locked", tmp_path / "closed"
    write_study(tmp_path, 0)
    for folder in (locked, closed):
        folder.mkdir()
    (locked / "p.yaml").write_text("format: 1")
    locked.chmod(0)
    closed.chmod(0o555)
    out, long = tmp_path / "out.nii.gz", "a" * 300
    try:
        for command, path, cause in (
            (("info", locked / "x.nii.gz"), locked / "x.nii.gz", "Permission denied"),
            (("info", long), long, "File name too long"),
            (("convert", locked / "x.nii.gz", out), locked / "x.nii.gz", "Permission denied"),
            (("segment", model, locked, out), locked, "Permission denied"),
            (("segment", locked / "model", out, out), locked / "model", "Permission denied"),
            (
                ("segment", model, tmp_path / "DOE_JANE_0", closed / "x.nii.gz"),
                closed / "x.nii.gz",
                "may not be written",
            ),
            (("pipeline", "check", locked / "p.yaml"), locked / "p.yaml", "Permission denied"),
            (("report", locked / "x.nii.gz", out, tmp_path / "r.json"), locked / "x.nii.gz", "Permission denied"),
        ):
            done = run(as_a_user([sys.executable, "-m", "medseg", *map(str, command)]))
            assert done.returncode == 1, done.stderr
            assert done.stderr.startswith(f"medseg: {path}: "), done.stderr
            assert cause in done.stderr
            assert done.stderr.count("\n") == 1
    finally:
        locked.chmod(0o700)


@pytest.mark.parametrize(("place", "told"), [("", "cannot be used"), (".claims", "cannot be claimed")])
def test_an_output_folder_that_may_only_be_read(tmp_path, pipeline, place, told):
    studies, out = tmp_path / "studies", tmp_path / "out"
    write_study(studies, 0)
    (out / place).mkdir(parents=True)
    (out / place).chmod(0o555)
    assert "Permission denied" in run(as_a_user(["touch", str(out / place / "probe")])).stderr
    done = run(as_a_user(batch_command(pipeline, studies, out)))
    assert done.returncode == 1
    assert told in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert complete(out) == {}


def test_a_full_disk_fails_studies_and_leaves_no_part_of_them(tmp_path, pipeline):
    studies, out = tmp_path / "studies", tmp_path / "out"
    write_study(studies, 0)
    write_study(studies, 1)
    limit = 1000

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code = f"import pathlib; pathlib.Path({str(tmp_path / 'probe')!r}).write_bytes(bytes({limit + 1}))"
    bites = subprocess.run([sys.executable, "-c", code], preexec_fn=small_files, capture_output=True, check=False)
    assert bites.returncode == 1
    done = subprocess.run(
        batch_command(pipeline, studies, out), env=environment(), preexec_fn=small_files, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "failed, output: The file could not be written: File too large" in done.stdout
    assert complete(out) == {}
    assert not [*(out / ".work").iterdir(), *(out / ".claims").iterdir()]
    assert_no_secret(out, done.stdout)
    assert [one.status for one in run_batch(pipeline, studies, out, TORCH)] == ["done", "done"]


def test_a_disk_that_fills_up_on_the_way(tmp_path, pipeline):
    studies, out, seen = tmp_path / "studies", tmp_path / "out", tmp_path / "seen"
    for number in range(6):
        write_study(studies, number)
    out.mkdir()
    mounted = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=96k tmpfs "$0" && exec "$@"', str(out)]
    if run([*mounted, "true"]).returncode:
        pytest.skip("nothing can be mounted here")
    assert "No space left" in run([*mounted, "dd", "if=/dev/zero", f"of={out}/probe", "bs=200k", "count=1"]).stderr
    keep = 'out=$1; seen=$2; shift 2; "$@"; code=$?; cp -a "$out" "$seen"; exit $code'
    command = batch_command(pipeline, studies, out)
    done = run([*mounted, "sh", "-c", keep, "sh", str(out), str(seen), *command])
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    statuses = [*complete(seen).values()]
    assert "done" in statuses
    assert statuses.count("done") < 6
    assert not [*(seen / ".work").iterdir(), *(seen / ".claims").iterdir()]
    assert "No space left" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("how", "in_background"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, False), (signal.SIGHUP, False)],
)
def test_a_batch_that_is_told_to_stop_rolls_back_what_is_under_way(tmp_path, pipeline, how, in_background):
    """In the background of a script SIGINT is ignored, and SIGTERM must be heard all the same."""
    studies, out = tmp_path / "studies", tmp_path / "out"
    for number in range(4):
        write_study(studies, number)
    process = subprocess.Popen(
        [
            "env",
            "--default-signal=HUP",  # under nohup, too
            f"--{'ignore' if in_background else 'default'}-signal=INT",
            *batch_command(pipeline, studies, out),
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (out / ".work").exists():
        time.sleep(0.02)
    while process.poll() is None and not [*(out / ".work").iterdir()]:
        time.sleep(0.002)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(how)
    told = "".join(process.communicate(timeout=60))
    assert process.returncode not in {0, None}
    assert told == "medseg: interrupted; what has ended is kept, the same command does the rest.\n"
    assert process.returncode == 130
    assert set(complete(out).values()) <= {"done"}
    assert not [*(out / ".work").iterdir(), *(out / ".claims").iterdir()]
    assert workers
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_a_study_that_exhausts_memory_fails_and_the_rest_completes(tmp_path, pipeline):
    studies, out = tmp_path / "studies", tmp_path / "out"
    write_study(studies, 0)
    write_study(studies, 1, Rows=20000, Columns=20000, PixelData=b"\0\0")
    for path in (studies / "DOE_JANE_1").iterdir():
        data = path.read_bytes()
        start = data.rindex(b"\xe0\x7f\x10\x00OW")  # a sparse file: the pixels take no room on the disk
        size = 2 * 20000 * 20000
        path.write_bytes(data[: start + 8] + size.to_bytes(4, "little"))
        with path.open("r+b") as file:
            file.truncate(start + 12 + size)
    limit = 7 * 2**30

    def little_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    done = subprocess.run(
        batch_command(pipeline, studies, out), env=environment(), preexec_fn=little_memory, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert sorted(complete(out).values()) == ["done", "failed"]
    assert "failed, out_of_memory" in done.stdout or "failed, killed_worker" in done.stdout
