"""A batch on a Dask cluster ends as one on this machine does, whoever of worker, client and scheduler is killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from studies import Watch, assert_no_secret, batch_command, complete, environment, write_pipeline, write_study

from medseg.errors import ClusterError, OutputError, UsageError
from medseg.io import load
from medseg.study import cluster as cluster_module
from medseg.study.batch import Options, Progress, run_batch
from medseg.study.cluster import Cluster, prepare
from medseg.study.ledger import Ledger
from medseg.study.worker import Runner, Start, Task

pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of Dask, about ports and versions
TORCH = Options(runtime="torch", threads=1)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path / "pipeline")


class Dask:
    """A scheduler and workers as other people start them, by Dask's own commands; ended with the test."""

    def __init__(self, folder: Path, workers: int = 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        self.folder, self.workers = folder, workers
        self.log = folder / "dask.log"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *more: str) -> None:
        host, port = self.address.removeprefix("tcp://").split(":")
        options = ["--nthreads", "1", "--nworkers", str(self.workers), "--no-dashboard"]
        self._run("scheduler", "--host", host, "--port", port, "--no-dashboard")
        self._run("worker", self.address, "--local-directory", str(self.folder / "space"), *options, *more)

    def end(self) -> None:
        for process in self.processes:
            pids = [process.pid, *descendants(process.pid)]
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        self.processes.clear()

    @property
    def worker_pids(self) -> list[int]:
        """The processes that compute, which the nannies watch."""
        return [pid for pid in descendants(self.processes[1].pid) if "multiprocessing.spawn" in command_of(pid)]

    def _run(self, what: str, *options: str) -> None:
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", *options]
        with self.log.open("ab") as log:
            self.processes.append(subprocess.Popen(command, env=environment(), stdout=log, stderr=log))


def descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [one for child in map(int, children) for one in (child, *descendants(child))]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[Dask]:
    found = Dask(tmp_path)
    yield found
    found.end()


POISON = """
import os, signal
from medseg.study import worker

def read_job(job, pipeline, real=worker.read_job):
    if any("DOE_JANE_1" in str(path) for path in job.files):
        with open({deaths!r}, "a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    real(job, pipeline)

worker.read_job = read_job
"""


def test_a_study_that_kills_its_worker_twice_is_marked_and_the_rest_is_as_without_dask(tmp_path, pipeline, dask):
    studies, out, deaths = tmp_path / "studies", tmp_path / "out", tmp_path / "deaths"
    for number in range(4):
        write_study(studies, number)
    sorted((studies / "DOE_JANE_3").iterdir())[0].write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "poison.py").write_text(POISON.format(deaths=str(deaths)))
    dask.start("--preload", str(tmp_path / "poison.py"))
    seen: list[Progress] = []
    outcomes = run_batch(pipeline, studies, out, TORCH, scheduler=dask.address, progress=seen.append)
    assert deaths.read_text() == "xx"
    assert [(one.path.name, one.status, one.reason) for one in outcomes] == [
        ("DOE_JANE_0", "done", None),
        ("DOE_JANE_1", "failed", "killed_worker"),
        ("DOE_JANE_2", "done", None),
        ("DOE_JANE_3", "failed", "unreadable"),
    ]
    assert {now.workers for now in seen} <= {0, 1, 2}
    assert len({row[0] for now in seen for row in now.running}) >= 2  # it killed both, or one and the one in its place
    assert sorted(complete(out).values()) == ["done", "done", "failed", "failed"]
    assert not [*(out / ".work").iterdir(), *(out / ".claims").iterdir()]
    alone = run_batch(pipeline, studies, tmp_path / "alone", TORCH)
    for there, here in ((outcomes[0], alone[0]), (outcomes[2], alone[2])):
        one, other = load(out / there.study / "labels.nii.gz"), load(tmp_path / "alone" / here.study / "labels.nii.gz")
        assert one.grid.matches(other.grid)
        assert (one.array == other.array).all()
    assert_no_secret(out, dask.log.read_text())


VICTIMS = ("worker", "client", "scheduler")


@pytest.mark.parametrize(
    ("count", "victims"),
    [(3, VICTIMS), *(pytest.param(30, (victim,) * 20, id=victim, marks=pytest.mark.slow) for victim in VICTIMS)],
)
def test_sigkill_at_random_moments_loses_and_repeats_nothing(tmp_path, pipeline, dask, count, victims):
    studies, out = tmp_path / "studies", tmp_path / "out"
    for number in range(count):
        write_study(studies, number)
    command = batch_command(pipeline, studies, out, "--scheduler", dask.address)
    dask.start()
    watch = Watch(out, count, random.Random(count))
    for victim in victims:
        if watch.look() == count:
            shutil.rmtree(out)  # from the beginning
            watch.forget()
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if watch.wait_for_a_moment(process):
            killed = {"client": [process.pid], "scheduler": [dask.processes[0].pid], "worker": dask.worker_pids}[victim]
            with suppress(ProcessLookupError, IndexError):
                os.kill(watch.chance.choice(killed), signal.SIGKILL)
        told = process.communicate(timeout=3000)[1]
        assert "Traceback" not in told
        if victim == "worker":
            assert process.returncode == 0
            assert watch.look() == count
        if victim == "scheduler":
            assert process.returncode in {0, 1}
            dask.end()
            dask.start()
    assert watch.hits >= len(victims) / 2
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert watch.look() == count
    assert list(complete(out, hashed=True).values()) == ["done"] * count
    assert not [*(out / ".work").iterdir(), *(out / ".claims").iterdir()]
    assert_no_secret(out, done.stdout, done.stderr, dask.log.read_text())
    dask.end()
    running = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    assert not [pid for pid in running if dask.address in command_of(pid)]


def test_a_cluster_of_this_machine(tmp_path, pipeline):
    write_study(tmp_path / "studies", 0)
    command = batch_command(pipeline, tmp_path / "studies", tmp_path / "out", "--scheduler", "local", "--json")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in json.loads(done.stdout)] == ["done"]
    assert done.stderr == ""


def start_of(pipeline: Path, tmp_path: Path) -> Start:
    """Return what a worker is told for a batch, and make its output folder."""
    from medseg.study.pipeline import load_pipeline
    from medseg.study.worker import model_digests

    chosen = load_pipeline(pipeline)
    write_study(tmp_path / "studies", 0)
    ledger = Ledger.open(tmp_path / "out")
    return Start(
        pipeline=chosen.model_dump(mode="json"), studies=str(tmp_path / "studies"), out=str(ledger.out),
        check=ledger.check, token="t", manifest=model_digests(chosen), runtime="torch",
    )  # fmt: skip


class TestWorkers:
    def test_a_worker_that_sees_other_disks_or_is_of_another_version_is_left_out(self, tmp_path, pipeline):
        start = start_of(pipeline, tmp_path)
        Runner(start, lambda _: None)
        with pytest.raises(OutputError, match="does not see the same output folder, model and studies"):
            Runner(Start(**vars(start) | {"check": "other"}), lambda _: None)
        with pytest.raises(OutputError, match="does not see the same"):
            Runner(Start(**vars(start) | {"manifest": {"model_sha256": "other"}}), lambda _: None)
        with pytest.raises(OutputError, match="No such file"):
            Runner(Start(**vars(start) | {"out": str(tmp_path / "elsewhere")}), lambda _: None)
        fatal = prepare(start, "0.0.0")["fatal"]
        assert "another version of medseg" in fatal["text"]

    def test_who_was_taken_for_dead_publishes_nothing(self, tmp_path, pipeline):
        start = start_of(pipeline, tmp_path)
        runner, ledger = Runner(start, lambda _: None), Ledger.existing(start.out)
        files = {str(path): path.name for path in (tmp_path / "studies").rglob("*") if path.is_file()}
        for stage in range(3):
            running = runner.read(Task("a", files, "s"))
            if stage == 0:
                ledger.sweep("a")
            runner.segment(running)
            if stage == 1:
                ledger.sweep("a")
            if stage == 2:
                running.error = ValueError("what failed is not published either")
                ledger.sweep("a")
            assert runner.finish(running) == {"lost": "a"}
            assert {path.name for path in Path(start.out).iterdir()} == {".claims", ".work", "private"}
            assert not [*(Path(start.out) / ".work").iterdir()]

    def test_the_network_stays_loaded_and_is_unloaded_at_the_end(self, tmp_path, pipeline):
        from distributed import Client, LocalCluster

        start = start_of(pipeline, tmp_path)
        with LocalCluster(n_workers=1, processes=False, dashboard_address=None) as local, Client(local) as client:
            first, second = (client.submit(_runner_id, start, pure=False).result() for _ in range(2))
            assert first == second
            client.run(cluster_module.forget, "t")
            assert client.submit(_kept, pure=False).result() == 0


def _runner_id(start: Start) -> int:
    return id(cluster_module._warm(start))


def _kept() -> int:
    return len(cluster_module._WARM)


def test_wrong_use_is_said(tmp_path, pipeline, monkeypatch):
    write_study(tmp_path / "studies", 0)
    monkeypatch.setattr(cluster_module, "CONNECT_S", 1)
    for address in ("tcp://127.0.0.1:1", "nonsense://x"):
        with pytest.raises(ClusterError, match="No Dask scheduler answers"):
            run_batch(pipeline, tmp_path / "studies", tmp_path / "out", TORCH, scheduler=address)
    assert not [*(tmp_path / "out" / ".claims").iterdir()]
    monkeypatch.setattr(cluster_module, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="pip install"):
        Cluster("local", start_of(pipeline, tmp_path / "more"), 1)
