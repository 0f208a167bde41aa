"""Every study of a batch ends once, whole, whatever happens to files, processes, disk and memory."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from studies import (
    Watch,
    assert_no_secret,
    batch_command,
    complete,
    environment,
    processes_with,
    write_pipeline,
    write_study,
)

import medseg
from medseg import cli
from medseg.errors import InputError, ModelError, UnreadableFile, UsageError
from medseg.io import load
from medseg.study import batch
from medseg.study.archive import opened
from medseg.study.batch import Options, Progress, run_batch
from medseg.study.cohort import find_cohort
from medseg.study.dataset import make_dataset
from medseg.study.engine import Hand
from medseg.study.find import read_studies
from medseg.study.listing import listed
from medseg.study.run import ending, only_study
from medseg.study.worker import Start

TORCH = Options(runtime="torch", threads=1)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path / "pipeline")


class TestCohort:
    def test_studies_are_found_by_their_uid_and_what_is_unreadable_belongs_to_them(self, tmp_path):
        for number in range(3):
            write_study(tmp_path, number)
        (tmp_path / "DOE_JANE_0").rename(tmp_path / "first")
        next((tmp_path / "first").iterdir()).rename(tmp_path / "one of the first")
        (tmp_path / "DOE_JANE_1" / "x.dcm").touch()
        (tmp_path / "alone").mkdir()
        (tmp_path / "alone" / "x.dcm").touch()
        (tmp_path / "notes.txt").write_text("no DICOM")
        (tmp_path / "packed.zip").touch()
        found = {entry.identity: len(entry.files) for entry in find_cohort(tmp_path)}
        assert found == {
            "study 1.2.3.0": 8,
            "study 1.2.3.1": 9,
            "study 1.2.3.2": 8,
            "path alone/x.dcm": 1,
            "archive packed.zip": 1,
        }

    def test_what_is_unreadable_beside_an_archive_is_not_forgotten(self, tmp_path):
        (tmp_path / "packed.zip").touch()
        (tmp_path / "x.dcm").touch()
        assert [entry.identity for entry in find_cohort(tmp_path)] == ["archive packed.zip", "path x.dcm"]

    def test_shards_are_parts_of_the_whole(self, tmp_path):
        for number in range(7):
            write_study(tmp_path, number)
        parts = [find_cohort(tmp_path, (part, 3)) for part in (1, 2, 3)]
        assert sorted(entry.uid for part in parts for entry in part) == [f"1.2.3.{number}" for number in range(7)]
        assert max(map(len, parts)) < 7
        for wrong in ((0, 3), (4, 3)):
            with pytest.raises(UsageError, match="A shard is i/n"):
                find_cohort(tmp_path, wrong)

    def test_a_folder_without_permission_is_not_forgotten(self, tmp_path, monkeypatch):
        write_study(tmp_path, 1)
        write_study(tmp_path, 2)
        closed = {tmp_path / "DOE_JANE_2", tmp_path / "DOE_JANE_1" / "more"}
        (tmp_path / "DOE_JANE_1" / "more").mkdir()
        real = os.scandir

        def scandir(path: str) -> object:
            if Path(path) in closed:  # the tests may run as root, whom no permission stops
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        monkeypatch.setattr("os.scandir", scandir)
        found = {entry.identity: entry.files for entry in find_cohort(tmp_path)}
        assert set(found) == {"study 1.2.3.1", "path DOE_JANE_2"}
        assert tmp_path / "DOE_JANE_1" / "more" in found["study 1.2.3.1"]


def test_done_refused_failed_and_kept(tmp_path, pipeline, capsys, monkeypatch):
    studies, out = tmp_path / "studies", tmp_path / "out"
    for number in range(6):
        write_study(studies, number)
    cut = sorted((studies / "DOE_JANE_2").iterdir())[3]
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-40])
    sorted((studies / "DOE_JANE_3").iterdir(), key=height)[4].unlink()
    shutil.make_archive(studies / "DOE_ZIPPED", "zip", studies / "DOE_JANE_4")
    shutil.rmtree(studies / "DOE_JANE_4")
    monkeypatch.setattr(sys, "argv", batch_command(pipeline, studies, out, "--json")[2:])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    assert ended.value.code == 1
    assert sorted((row["status"], row["reason"]) for row in json.loads(shown.out)) == [
        ("done", None), ("done", None), ("done", None), ("done", None),
        ("failed", "unreadable"), ("refused", "missing_slice"),
    ]  # fmt: skip
    assert sorted(complete(out).values()) == ["done"] * 4 + ["failed", "refused"]
    assert_no_secret(out, shown.out, shown.err)
    assert not [*(out / ".work").iterdir(), *(out / ".claims").iterdir()]
    assert len((out / "summary.csv").read_text().splitlines()) == 7
    done = next(one for one in out.glob("*/manifest.json") if json.loads(one.read_text())["status"] == "done")
    assert load(done.parent / "labels.nii.gz").grid.shape == (12, 10, 8)
    manifest = json.loads(done.read_text())
    assert manifest["series"][0]["channels"] == {"CT": "taken"}
    assert {"medseg", "python", "pydicom"} <= set(manifest["versions"])
    assert manifest["run"]["runtime"] == "torch"
    assert len(manifest["inputs"]["used"]) in {1, 8}  # an archive counts as one file

    cut.write_bytes(whole)  # copied again; and two that were done are not what they were
    changed = sorted((studies / "DOE_JANE_0").iterdir())[0]
    touched = changed.stat()
    content = bytearray(changed.read_bytes())
    content[-2] ^= 1
    changed.write_bytes(content)
    os.utime(changed, ns=(touched.st_atime_ns, touched.st_mtime_ns))  # only its content tells
    cut_output = out / [row["study"] for row in json.loads(shown.out) if row["status"] == "done"][-1] / "labels.nii.gz"
    whole = cut_output.read_bytes()
    cut_output.write_bytes(whole[:-9])  # as a kill leaves files elsewhere
    outcomes = run_batch(pipeline, studies, out, Options(runtime="torch", threads=1, verify="full"))
    assert cut_output.read_bytes() == whole
    fresh = [one for one in outcomes if not one.kept]
    assert [(one.path.name, one.status) for one in fresh] == [
        ("DOE_JANE_0", "done"),
        ("DOE_JANE_2", "done"),
        ("DOE_JANE_3", "refused"),  # nothing of it was hashed
        ("DOE_JANE_5", "done"),
    ]
    assert sorted(complete(out).values()) == ["done"] * 5 + ["refused"]
    assert outcomes[0].volumes_ml.keys() == {"ball"}

    seen: list[Progress] = []
    monkeypatch.setattr("medseg.study.batch.Local", None)  # nothing is left to do: no network is loaded
    assert all(one.kept for one in medseg.run_batch(pipeline, studies, out, TORCH, progress=seen.append))
    assert seen[-1].kept == 6


def test_what_links_and_archives_hold_is_seen_by_its_own_name(tmp_path, pipeline):
    """As git-annex, DVC and many archives keep files: a link with the name, and content under a hash."""
    studies, store = tmp_path / "studies", tmp_path / "store"
    for number in range(4):
        write_study(store, number)
    source, packed, damaged = (store / f"DOE_JANE_{number}" for number in (0, 2, 3))
    (store / "damaged").touch()
    for name in ("linked", "zipped", "zip", "half"):
        (studies / name).mkdir(parents=True)
    for number, file in enumerate([*(store / "DOE_JANE_1").iterdir(), store / "not fetched"]):
        (studies / "half" / f"{number}.dcm").symlink_to(file)
    for number, file in enumerate([*source.iterdir(), store / "damaged"]):
        (studies / "linked" / f"{number}.dcm").symlink_to(file)
    (packed / "._x.dcm").write_bytes(b"of macOS")
    shutil.make_archive(store / "whole", "zip", packed)
    (studies / "zipped" / "study.zip").symlink_to(store / "whole.zip")
    (damaged / "x.dcm").touch()
    shutil.make_archive(studies / "zip" / "damaged", "zip", damaged)
    outcomes = run_batch(pipeline, studies, tmp_path / "out", TORCH)
    assert {one.path.name: (one.status, one.reason) for one in outcomes} == {
        "linked": ("failed", "unreadable"),
        "zipped": ("done", None),
        "zip": ("failed", "unreadable"),
        "half": ("failed", "missing"),
    }


def test_a_constant_scan_warns_and_one_that_lost_a_slice_fails(tmp_path, pipeline):
    studies, out = tmp_path / "studies", tmp_path / "out"
    write_study(studies, 0, PixelData=bytes(240))
    write_study(studies, 1)
    max((studies / "DOE_JANE_1").iterdir()).write_bytes(b"")
    outcomes = {one.status: one for one in run_batch(pipeline, studies, out, TORCH)}
    assert outcomes.keys() == {"done", "failed"}
    assert outcomes["failed"].reason == "unreadable"
    manifest = json.loads((out / outcomes["done"].study / "manifest.json").read_text())
    assert manifest["warnings"] == ["Channel CT of the image has one value everywhere: the labels mean nothing."]


def test_what_a_study_says_is_kept_while_another_thread_silences_others():
    """Python's filters belong to all threads, and whoever reads a header switches them off."""
    code = """
import threading, warnings
from medseg.study import worker
worker.collect_warnings()
found = worker._WARNINGS[threading.get_ident()] = []
with warnings.catch_warnings(action="ignore"):
    exec(compile("warnings.warn('said')", worker.PACKAGE + "/some.py", "exec"))
    warnings.warn("of others")
warnings.warn("of others")
del worker._WARNINGS[threading.get_ident()]
warnings.warn("not of a study")
print(found)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['said', 'UserWarning of another package']"
    assert done.stderr.startswith("<string>:11: UserWarning: not of a study")


def test_what_goes_wrong_unexpectedly_quotes_no_file() -> None:
    def broken() -> None:
        raise ValueError("/data/SMITH_JOHN_2024.dcm")

    try:
        broken()
    except ValueError as error:
        ended = ending(error)
    assert (ended["status"], ended["reason"]) == ("failed", "internal")
    assert re.fullmatch(
        r"Unexpected ValueError at test_study_batch\.py:\d+ < test_study_batch\.py:\d+\.", ended["text"]
    )
    assert ending(MemoryError())["reason"] == "out_of_memory"


def height(path: Path) -> float:
    import pydicom

    return float(pydicom.dcmread(path).ImagePositionPatient[2])


def test_a_study_that_kills_its_worker_twice_is_marked_and_the_rest_completes(tmp_path, pipeline):
    studies, out = tmp_path / "studies", tmp_path / "out"
    for number in range(3):
        write_study(studies, number)
    killed: set[int] = set()

    def kill(now: Progress) -> None:
        for name, _, path, _, _ in now.running:
            if path.name == "DOE_JANE_1" and int(name) not in killed:
                killed.add(int(name))
                os.kill(int(name), signal.SIGKILL)

    outcomes = run_batch(pipeline, studies, out, TORCH, progress=kill)
    assert len(killed) == 2
    assert [(one.path.name, one.status, one.reason) for one in outcomes] == [
        ("DOE_JANE_0", "done", None),
        ("DOE_JANE_1", "failed", "killed_worker"),
        ("DOE_JANE_2", "done", None),
    ]
    assert sorted(complete(out).values()) == ["done", "done", "failed"]
    assert not [*(out / ".work").iterdir(), *(out / ".claims").iterdir()]


def test_the_claim_of_a_killed_batch_goes_though_its_study_is_done(tmp_path, pipeline):
    """A worker of a cluster outlives whoever started the batch, and finishes its study."""
    studies, out = tmp_path / "studies", tmp_path / "out"
    write_study(studies, 0)
    assert [one.status for one in run_batch(pipeline, studies, out, TORCH)] == ["done"]
    code = "import os, sys, pathlib; from medseg.study.claims import Claims\n"
    code += "Claims(pathlib.Path(sys.argv[1])).claim(sys.argv[2]); os._exit(1)"
    (study,) = complete(out)
    subprocess.run([sys.executable, "-c", code, str(out / ".claims"), study], check=False)
    for left in (".a", f"{study}.json.a"):  # of batches that were killed in the middle of making or taking a claim
        (out / ".claims" / left).touch()
    assert len([*(out / ".claims").iterdir()]) == 3
    assert [one.kept for one in run_batch(pipeline, studies, out, TORCH)] == [True]
    assert not [*(out / ".claims").iterdir()]


@pytest.mark.parametrize(("count", "kills"), [(3, 2), pytest.param(30, 20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("victim", ["client", "worker"])
def test_sigkill_at_random_moments_loses_and_repeats_nothing(tmp_path, pipeline, count, kills, victim):
    studies, out, mark = tmp_path / "studies", tmp_path / "out", f"BATCH_OF={tmp_path}"
    for number in range(count):
        write_study(studies, number)
    command = ["env", mark, *batch_command(pipeline, studies, out)]
    watch = Watch(out, count, random.Random(count))
    for _ in range(kills):
        if watch.look() == count:
            shutil.rmtree(out)  # from the beginning
            watch.forget()
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        runs = watch.wait_for_a_moment(process)
        workers = children(process.pid) if victim == "worker" and runs else []
        if runs:
            with suppress(ProcessLookupError):
                os.kill(watch.chance.choice(workers or [process.pid]), signal.SIGKILL)
        process.wait(3000)
        if workers:
            assert process.returncode == 0
            assert watch.look() == count
        wait_for_the_end_of(mark)
    assert watch.hits >= kills / 2
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert watch.look() == count
    assert list(complete(out, hashed=True).values()) == ["done"] * count
    assert not [*(out / ".work").iterdir(), *(out / ".claims").iterdir()]
    assert_no_secret(out, done.stdout, done.stderr)
    wait_for_the_end_of(mark)


def children(pid: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def wait_for_the_end_of(mark: str) -> None:
    """Wait until workers whose parent was killed have noticed it."""
    deadline = time.monotonic() + 600
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_with(mark)


def test_an_archive_holds_one_study(tmp_path):
    with zipfile.ZipFile(tmp_path / "inner.zip", "w") as archive:
        archive.writestr("slice", b"")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.write(tmp_path / "inner.zip", "inner.zip")
    with opened(tmp_path / "outer.zip") as folder, pytest.raises(InputError, match="archives inside of it") as refused:
        only_study(read_studies(listed(folder, [])))
    assert refused.value.reason == "no_dicom"
    for number in range(2):
        write_study(tmp_path / "in", number)
    files = sorted(file for file in (tmp_path / "in").rglob("*") if file.is_file())
    assert len(only_study(read_studies(files[: len(files) // 2])).series) == 1
    with pytest.raises(InputError, match="one study, found 2"):
        only_study(read_studies(files))


def pack(path: Path, files: list[Path]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in files:
            archive.write(file, file.name)


def test_a_study_in_several_archives_fails_and_a_copy_does_not(tmp_path, pipeline):
    (tmp_path / "in").mkdir()
    for number in range(3):
        write_study(tmp_path / "loose", number)
    slices = [sorted((tmp_path / "loose" / f"DOE_JANE_{number}").iterdir()) for number in range(3)]
    pack(tmp_path / "in" / "a.zip", slices[0][:4])
    pack(tmp_path / "in" / "b.zip", slices[0][4:])
    for name in ("c.zip", "copy of c.zip"):
        pack(tmp_path / "in" / name, slices[1])
    pack(tmp_path / "in" / "d.zip", slices[2])
    entries = find_cohort(tmp_path / "in")
    assert [[file.name for file in entry.files] for entry in entries] == [
        ["a.zip", "b.zip"], ["c.zip"], ["copy of c.zip"], ["d.zip"]
    ]  # fmt: skip
    outcomes = run_batch(pipeline, tmp_path / "in", tmp_path / "out")
    assert sorted((one.status, one.reason) for one in outcomes) == [
        ("done", None), ("done", None), ("done", None), ("failed", "several_archives")
    ]  # fmt: skip
    rules = {"format": 1, "name": "a", "channels": [{"name": "CT", "modality": ["CT"]}], "labels": [{"name": "a"}]}
    (tmp_path / "rules.yaml").write_text(json.dumps(rules))
    made = make_dataset(tmp_path / "in", tmp_path / "set", tmp_path / "rules.yaml")
    assert [one.reason for one in made] == ["several_archives", *["no_structures"] * 3]


class SlowWriter(Hand):
    """A process that computes at once, and writes only when there is nothing else to do."""

    def __init__(self, start: Start, workers: int):
        super().__init__("slow")
        self.events, self.most = self, 0
        self.ready, self.unwritten, self.answers = True, [], []

    def hire(self, hands, wanted):
        return [] if hands else [self]

    def send(self, task):
        self.take(task.study)
        self.most = max(self.most, len(self.in_flight))
        self.unwritten.append(task.study)
        self.answers.append({"computed": task.study})

    def get(self, timeout):
        ended = {"status": "done", "reason": None, "text": None}
        return self, self.answers.pop(0) if self.answers else {"done": self.unwritten.pop(0), "manifest": ended}

    def end(self):
        raise AssertionError("it is never late")

    def close(self):
        pass


def test_what_is_computed_does_not_pile_up_where_writing_takes_longer(tmp_path, pipeline, monkeypatch):
    for number in range(8):
        write_study(tmp_path / "in", number)
    engines = []
    monkeypatch.setattr(batch, "Local", lambda *given: engines.append(SlowWriter(*given)) or engines[0])
    outcomes = run_batch(pipeline, tmp_path / "in", tmp_path / "out", TORCH)
    assert [one.status for one in outcomes] == ["done"] * 8
    assert engines[0].most == batch.MOST_HELD


def test_a_study_that_takes_too_long_is_marked_and_the_rest_completes(tmp_path):
    """A pattern that looks around may hold the interpreter of a worker for ever, even on a text of 64 characters."""
    rule = {"name": "CT", "modality": ["CT"], "not_description": "(?!x)(a|a)*b"}
    pipeline = write_pipeline(tmp_path / "pipeline", channels=[rule])
    for number in range(3):
        write_study(tmp_path / "studies", number, SeriesDescription="a" * 60 if number == 1 else "t1")
    outcomes = run_batch(
        pipeline, tmp_path / "studies", tmp_path / "out", Options(runtime="torch", threads=1, time_limit_s=5.0)
    )
    assert [(one.status, one.reason) for one in outcomes] == [("done", None), ("failed", "time_limit"), ("done", None)]
    assert sorted(complete(tmp_path / "out").values()) == ["done", "done", "failed"]


def test_wrong_use_is_said_before_anything_is_made(tmp_path, pipeline):
    write_study(tmp_path / "studies", 0)
    with pytest.raises(UsageError, match="at least one worker"):
        run_batch(pipeline, tmp_path / "studies", tmp_path / "out", Options(workers=0))
    with pytest.raises(UsageError, match="would lie among the studies"):
        run_batch(pipeline, tmp_path / "studies", tmp_path / "studies" / "out")
    write_study(tmp_path / "results" / "of_before", 1)
    (tmp_path / "studies" / "link").symlink_to(tmp_path / "results")
    with pytest.raises(UsageError, match="would lie among the studies"):
        run_batch(pipeline, tmp_path / "studies", tmp_path / "results")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnreadableFile, match="no DICOM file here"):
        run_batch(pipeline, tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_network_that_cannot_be_loaded_ends_the_batch(tmp_path, pipeline):
    write_study(tmp_path / "studies", 0)
    (tmp_path / "pipeline" / "model" / "fold_0.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="weights cannot be read"):
        run_batch(pipeline, tmp_path / "studies", tmp_path / "out", TORCH)
    assert complete(tmp_path / "out") == {}


def test_dicom_outputs_lie_on_the_slices_of_the_source_or_say_why_not(tmp_path):
    import pydicom
    from dicom_files import write_series

    outputs = ["sr", "seg", "seg_labelmap", "rtstruct", "nifti"]
    pipeline = write_pipeline(tmp_path / "pipeline", outputs=outputs)
    tags = {"shape": (10, 12), "StudyDate": "20200101", "StudyTime": "101010", "PatientID": "1"}
    irregular = [0, 1, 1.9, 3, 4, 5, 6, 7]
    write_series(tmp_path / "studies" / "a", range(8), StudyInstanceUID="1.2.3.8", **tags)
    write_series(tmp_path / "studies" / "b", irregular, StudyInstanceUID="1.2.3.9", **tags)
    write_series(tmp_path / "studies" / "c", range(8), StudyInstanceUID="1.2.3.7", SOPClassUID="", **tags)
    names = [one.study for one in run_batch(pipeline, tmp_path / "studies", tmp_path / "out", TORCH)]
    regular, repaired, blank = (json.loads((tmp_path / "out" / name / "manifest.json").read_text()) for name in names)
    files = [
        *("labels.labelmap.dcm", "labels.labels.json", "labels.nii.gz"),
        *("labels.rtstruct.dcm", "labels.seg.dcm", "measurements.sr.dcm"),
    ]
    for manifest, name in ((regular, names[0]), (repaired, names[1])):
        assert manifest["status"] == "done", manifest["text"]
        assert [one["file"] for one in manifest["outputs"]] == files
        assert manifest["not_written"] == {}
        source = {
            float(header.ImagePositionPatient[2]): header.SOPInstanceUID
            for header in map(pydicom.dcmread, (tmp_path / "studies" / "ab"[name == names[1]]).iterdir())
        }
        frames = pydicom.dcmread(tmp_path / "out" / name / "labels.seg.dcm").PerFrameFunctionalGroupsSequence
        assert {float(frame.PlanePositionSequence[0].ImagePositionPatient[2]) for frame in frames} <= source.keys()
    assert (repaired["series"][0]["verdict"], repaired["series"][0]["reason"]) == ("repaired", "irregular_spacing")
    labels = load(tmp_path / "out" / names[1] / "labels.nii.gz")
    assert labels.grid.shape[2] > 8
    assert blank["status"] == "done"
    assert [one["file"] for one in blank["outputs"]] == ["labels.labels.json", "labels.nii.gz"]
    assert {name: why["reason"] for name, why in blank["not_written"].items()} == dict.fromkeys(
        ("seg", "seg_labelmap", "rtstruct", "sr"), "unreferable_source"
    )
