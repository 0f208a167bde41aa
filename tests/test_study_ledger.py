"""What is on disk is whole and can be verified; claims exclude, and are void when their process is gone."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import resource
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from medseg.errors import OutputError
from medseg.study import claims as claims_module
from medseg.study.claims import Claims
from medseg.study.ledger import Ledger, state

DONE = {"status": "done", "reason": None, "text": None, "state": "s"}


def publish(ledger: Ledger, study: str, content: str = "labels", **facts: object) -> None:
    work = ledger.work_folder(study, "t")
    (work / "labels.txt").write_text(content)
    ledger.publish(study, work, DONE | facts)


def edit(folder: Path, **facts: object) -> None:
    """Change what a manifest says, as somebody who mends it by hand may do."""
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


class TestLedger:
    def test_what_is_published_verifies_until_something_changes(self, tmp_path):
        ledger = Ledger.open(tmp_path / "out")
        assert ledger.verified("a", {}) is None
        publish(ledger, "a")
        found = ledger.verified("a", {"state": "s"})
        assert found is not None
        digest = hashlib.sha256(b"labels").hexdigest()
        assert found["outputs"] == [{"file": "labels.txt", "bytes": 6, "sha256": digest}]
        assert ledger.verified("a", {"state": "other"}) is None
        for spoil in (
            lambda folder: (folder / "labels.txt").write_text("label"),
            lambda folder: (folder / "labels.txt").unlink(),
            lambda folder: (folder / "more.txt").write_text("x"),
            lambda folder: (folder / "manifest.json").write_text("{"),
            *(partial(edit, **{name: None}) for name in ("format", "status", "outputs", "seconds", "labels")),
        ):
            publish(ledger, "a")
            assert ledger.verified("a", {}) is not None
            spoil(tmp_path / "out" / "a")
            assert ledger.verified("a", {}) is None

    def test_a_second_result_replaces_the_first_whole(self, tmp_path):
        ledger = Ledger.open(tmp_path)
        publish(ledger, "a")
        work = ledger.work_folder("a", "t")
        (work / "other.txt").write_text("x")
        ledger.publish("a", work, DONE)
        assert {file.name for file in (tmp_path / "a").iterdir()} == {"manifest.json", "other.txt"}
        assert not [*(tmp_path / ".work").iterdir()]

    def test_failed_studies_never_verify(self, tmp_path):
        ledger = Ledger.open(tmp_path)
        publish(ledger, "a", status="failed")
        assert ledger.verified("a", {}) is None
        publish(ledger, "b", status="refused")
        assert ledger.verified("b", {}) is not None
        publish(ledger, "c", status="refused", reason="compressed_no_codec")  # decoders may be installed meanwhile
        assert ledger.verified("c", {}) is None

    def test_names_are_keyed_and_the_key_is_for_its_owner(self, tmp_path):
        with ThreadPoolExecutor(8) as pool:
            keys = {ledger.key for ledger in pool.map(lambda _: Ledger.open(tmp_path / "out"), range(8))}
        other = Ledger.open(tmp_path / "other")
        ledger = Ledger.open(tmp_path / "out")
        assert keys == {ledger.key}
        assert ledger.name("1.2.3") != other.name("1.2.3")
        ledger.remember([("n1", "1.2.3", "/some/DOE"), ("n2", "", "b")])
        ledger.remember([("n1", "1.2.3", "/some/DOE"), ("n3", "", "c")])
        table = tmp_path / "out" / "private" / "studies.csv"
        assert table.read_text().splitlines() == ["n1,1.2.3,/some/DOE", "n2,,b", "n3,,c"]
        for path in (table, tmp_path / "out" / "private" / "key"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_a_row_that_was_cut_off_is_written_anew(self, tmp_path):
        ledger = Ledger.open(tmp_path)
        table = tmp_path / "private" / "studies.csv"
        rows = [("a", "1.2.3", "/data/first"), ("b", "1.2.4", os.fsdecode(b"/data/\xfc"))]
        ledger.remember(rows[:1])
        whole = table.read_bytes()
        table.write_bytes(whole[:-4])
        for _ in range(2):
            ledger.remember(rows)
        assert table.read_bytes().splitlines() == [whole[:-4], whole.strip(), b"b,1.2.4,/data/\xfc"]

    def test_a_study_that_moved_has_a_row_for_each_place(self, tmp_path):
        ledger = Ledger.open(tmp_path)
        places = [("a", "1.2.3", "/old"), ("a", "1.2.3", "/new"), ("a", "1.2.3", "/with\na line, and a comma")]
        for place in (*places, *places):
            ledger.remember([place])
        with (tmp_path / "private" / "studies.csv").open(newline="") as table:
            assert [tuple(row) for row in csv.reader(table)] == places

    def test_a_full_disk_leaves_no_damaged_key(self, tmp_path):
        for limit, told in ((0, b""), (resource.RLIM_INFINITY, b"32")):
            command = (
                "import resource, signal; from medseg.study.ledger import Ledger; "
                "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
                f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY)); "
                f"print(len(Ledger.open({str(tmp_path / 'out')!r}).key))"
            )
            done = subprocess.run(
                [sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
            )
            assert done.stdout.strip() == told

    def test_a_folder_that_cannot_be_made_or_has_a_bad_key(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="output folder cannot be used"):
            Ledger.open(tmp_path / "file" / "out")
        with pytest.raises(OutputError, match="could not be written"):
            Ledger(tmp_path / "file", b"").work_folder("a", "t")

    def test_state_knows_sizes_times_and_names(self, tmp_path):
        path = tmp_path / "x"
        path.write_text("1")
        first = state([("x", path)])
        assert first == state([("x", path)]) != state([("y", path)])
        path.write_text("12")
        assert state([("x", path)]) != first
        path.unlink()
        assert state([("x", path)]) not in {first, state([])}


class TestClaims:
    def test_one_of_two_gets_a_study(self, tmp_path):
        first, second = Claims(tmp_path), Claims(tmp_path)
        assert first.claim("a")
        assert not second.claim("a")
        first.release("a")
        assert second.claim("a")
        second.close()
        assert not [*tmp_path.iterdir()]

    def test_many_at_once_and_one_wins(self, tmp_path):
        rivals = [Claims(tmp_path) for _ in range(16)]
        with ThreadPoolExecutor(16) as pool:
            assert sum(pool.map(lambda one: one.claim("a"), rivals)) == 1

    def test_the_claim_of_a_dead_process_is_void_at_once(self, tmp_path):
        code = "import os, sys, pathlib; from medseg.study.claims import Claims\n"
        code += "Claims(pathlib.Path(sys.argv[1])).claim('a'); os._exit(1)"
        subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
        assert (tmp_path / "a.json").exists()
        rivals = [Claims(tmp_path) for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(lambda one: one.claim("a"), rivals)) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]

    def test_a_claim_of_another_machine_is_void_when_its_heart_stops(self, tmp_path):
        claim = {"token": "x", "host": "elsewhere", "pid": 1, "born": "1"}
        (tmp_path / "a.json").write_text(json.dumps(claim))
        mine = Claims(tmp_path)
        assert not mine.claim("a")
        old = time.time() - claims_module.STALE_S - 5
        os.utime(tmp_path / "a.json", (old, old))
        assert mine.claim("a")

    def test_a_heart_beats_while_a_study_is_held(self, tmp_path, monkeypatch):
        monkeypatch.setattr(claims_module, "HEARTBEAT_S", 0.05)
        mine = Claims(tmp_path)
        assert mine.claim("a")
        os.utime(tmp_path / "a.json", (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / "a.json").stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        mine.close()

    @pytest.mark.parametrize("what", [KeyboardInterrupt, OSError(28, "No space left on device")])
    def test_a_claim_that_cannot_be_written_is_not_there(self, tmp_path, monkeypatch, what):
        def refused(handle, text):
            raise what

        monkeypatch.setattr(claims_module.os, "write", refused)
        with pytest.raises(KeyboardInterrupt if what is KeyboardInterrupt else OutputError):
            Claims(tmp_path).claim("a")
        monkeypatch.undo()
        assert not [*tmp_path.iterdir()]

    def test_an_interrupted_claim_is_given_back(self, tmp_path, monkeypatch):
        mine, other = Claims(tmp_path), Claims(tmp_path)
        assert other.claim("b")
        create = Claims._create

        def interrupted(self, path):
            create(self, path)
            raise KeyboardInterrupt

        monkeypatch.setattr(Claims, "_create", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mine.claim("a")
        assert (tmp_path / "a.json").exists()
        mine.close()
        assert [path.name for path in tmp_path.iterdir()] == ["b.json"]

    def test_a_claim_that_was_taken_over_is_not_given_back(self, tmp_path):
        mine = Claims(tmp_path)
        assert mine.claim("a")
        (tmp_path / "a.json").write_text(json.dumps({"token": "x", "host": "h", "pid": 1, "born": "1"}))
        mine.release("a")
        assert (tmp_path / "a.json").exists()

    def test_a_folder_that_is_gone(self, tmp_path):
        with pytest.raises(OutputError, match="cannot be claimed"):
            Claims(tmp_path / "nowhere").claim("a")


@pytest.mark.parametrize("what", ["mode", "owner", "link"])
def test_a_private_folder_that_others_may_look_into_is_refused(tmp_path, what):
    private = tmp_path / "out" / "private"
    Ledger.open(tmp_path / "out")
    assert Ledger.open(tmp_path / "out").private == private
    if what == "mode":
        private.chmod(0o750)
    elif what == "link":
        private.rename(tmp_path / "elsewhere")
        private.symlink_to(tmp_path / "elsewhere")
    elif os.geteuid() == 0:
        os.chown(private, 12345, -1)
    else:
        pytest.skip("only root can give a folder away")
    with pytest.raises(OutputError, match="Make it yours alone"):
        Ledger.open(tmp_path / "out")
