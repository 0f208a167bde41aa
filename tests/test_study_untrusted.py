"""Texts and archives that somebody else made: nothing of them is shown, runs for ever, or is called what it is not."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import time
import zipfile
from pathlib import Path

import pytest
from dicom_files import write_series
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import InputError, UnreadableFile
from medseg.study.archive import unpack
from medseg.study.claims import HEARTBEAT_S, Claims
from medseg.study.describe import describe_studies
from medseg.study.find import find_studies
from medseg.study.patterns import LONGEST, matches
from medseg.study.rules import LabelRule
from medseg.study.shown import shown_modality, shown_number


class TestPatterns:
    @pytest.mark.parametrize("pattern", ["t1.*mpr.*post", "(a+)+$", "(a|a)*b", "(t1|mpr)*x", "(.*)*y"])
    def test_no_pattern_runs_for_ever(self, pattern):
        """Python's own engine needs hours for each."""
        for text in ("t1mpr" * 12000, "a" * 60000):
            assert not matches(pattern, f"{text}!")
            assert not LabelRule(name="a", match=(pattern,)).takes(f"{text}!")

    def test_a_pattern_that_looks_around_takes_no_long_text(self):
        assert matches("t1(?!.*post)", "T1 mpr")
        assert not matches("t1(?!.*post)", "T1 mpr POST")
        assert matches(r"(a)\1", "x" * (LONGEST - 2) + "aa")
        with pytest.raises(InputError, match="more than the 64 characters") as refused:
            matches("t1(?!.*post)", "t1" + "x" * LONGEST)
        assert refused.value.reason == "long_text"

    @settings(max_examples=300, deadline=None)
    @given(
        pattern=st.text(r"at1 .*+?|()[]^$\dwsbZ<>{},&-~", max_size=8),
        text=st.text("at1 .A\u00fc-", max_size=6),
        whole=st.booleans(),
    )
    def test_every_pattern_means_what_it_means_to_python(self, pattern, text, whole):
        try:
            wanted = (re.fullmatch if whole else re.search)(pattern, text, re.IGNORECASE) is not None
        except (re.error, FutureWarning):
            return
        assert matches(pattern, text, whole=whole) == wanted


@pytest.mark.parametrize("text", ["JANE DOE", "DOE", "ct", "CT\\DOE", "CT\n"])
def test_a_modality_that_the_standard_does_not_have_is_not_shown(text):
    assert shown_modality(text) == "?"
    assert (shown_modality("CT"), shown_modality("RTSTRUCT"), shown_modality("")) == ("CT", "RTSTRUCT", "")


@pytest.mark.parametrize("text", ["DOE^JANE", "1.5", "1\\2", "99999999999", "١", "1" * 5000, "1\n"])
def test_a_number_that_the_standard_does_not_allow_is_not_shown(text):
    assert shown_number(text) == "?"
    assert [shown_number(number) for number in ("7", "+07", "-1", "")] == ["7", "7", "-1", ""]


def test_what_a_file_says_is_shown_nowhere(tmp_path):
    write_series(tmp_path / "a", range(4), Modality="JANE DOE", StudyInstanceUID="1.2.3")
    facts = describe_studies(tmp_path)
    assert [one["modality"] for one in facts["series"]] == ["?"]
    assert "JANE" not in str(facts)


@pytest.mark.parametrize(("ahead_s", "taken"), [(86400.0, True), (HEARTBEAT_S / 2, False), (-86400.0, True)])
def test_a_claim_of_another_machine_that_lies_ahead_is_void(tmp_path, ahead_s, taken):
    claim = tmp_path / "study.json"
    claim.write_text('{"token": "x", "host": "elsewhere", "pid": 1, "born": "1"}')
    os.utime(claim, (time.time() + ahead_s,) * 2)
    mine = Claims(tmp_path)
    assert mine.claim("study") == taken
    mine.close()


def packed(path: Path, *names: str, **how: int) -> Path:
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name in names:
            archive.writestr(name, bytes(500))
    return path


class TestArchives:
    @pytest.mark.parametrize(("method", "name"), [(9, "Deflate64"), (93, "Zstandard"), (77, "method 77")])
    def test_a_way_of_packing_that_python_does_not_know_is_named(self, tmp_path, method, name):
        path = packed(tmp_path / "a.zip", "a", compression=zipfile.ZIP_DEFLATED)
        raw = bytearray(path.read_bytes())
        for at in (8, raw.index(b"PK\1\2") + 10):
            raw[at : at + 2] = struct.pack("<H", method)
        path.write_bytes(raw)
        with pytest.raises(InputError, match=f"packed with {name}") as refused:
            unpack(path, tmp_path)
        assert refused.value.reason == "unknown_compression"
        assert not isinstance(refused.value, UnreadableFile)

    @pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
    def test_damage_anywhere_is_one_line(self, tmp_path, method):
        whole = packed(tmp_path / "whole.zip", "a", "\u00e9", compression=method).read_bytes()
        for at in range(0, len(whole), 3):
            raw = bytearray(whole)
            raw[at : at + 3] = b"\xff" * 3
            (tmp_path / "a.zip").write_bytes(raw)
            (tmp_path / f"out{at}").mkdir()
            with contextlib.suppress(InputError):
                unpack(tmp_path / "a.zip", tmp_path / f"out{at}")

    def test_a_name_that_is_not_in_its_own_code(self, tmp_path):
        path = packed(tmp_path / "a.zip", "\u00e9")
        path.write_bytes(path.read_bytes().replace("\u00e9".encode(), b"\xff\xff"))
        with pytest.raises(UnreadableFile, match="The archive is damaged"):
            unpack(path, tmp_path)

    def test_backslashes_of_windows_are_folders(self, tmp_path):
        write_series(tmp_path / "a", range(4), StudyInstanceUID="1.2.3")
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for name in ("study\\", "study\\ct\\"):
                archive.writestr(name, b"")
            for file in sorted((tmp_path / "a").iterdir()):
                archive.write(file, f"study\\ct\\{file.name}")
            archive.writestr("study\\ct\\.hidden.dcm", b"x")
        (tmp_path / "out").mkdir()
        unpack(tmp_path / "a.zip", tmp_path / "out")
        [study] = find_studies(tmp_path / "out")
        assert (len(study.files), study.problems) == (4, ())

    @pytest.mark.parametrize("kind", [0o120777, 0o010644, 0o060644])
    def test_links_and_devices_are_not_unpacked(self, tmp_path, kind):
        member = zipfile.ZipInfo("a.dcm")
        member.external_attr = kind << 16
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr(member, "/etc/passwd")
        with pytest.raises(InputError, match="link or a device") as refused:
            unpack(tmp_path / "a.zip", tmp_path)
        assert refused.value.reason == "unsafe_archive"
