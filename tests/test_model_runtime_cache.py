"""Compiled networks are read from where nobody else can have put them."""

from __future__ import annotations

import pytest

from medseg.model import runtime_cache


@pytest.fixture
def name(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime_cache, "folder", lambda: tmp_path / "networks")
    runtime_cache.write("a", b"compiled")
    assert runtime_cache.read("a") == b"compiled"
    return "a"


@pytest.mark.parametrize("part", ["", "a"])
def test_what_others_may_write_to_is_not_read(name, part):
    path = runtime_cache.folder() / part
    path.chmod(path.stat().st_mode | 0o002)
    assert runtime_cache.read(name) is None


def test_a_folder_that_others_may_write_to_is_not_written_to(name):
    runtime_cache.folder().chmod(0o777)
    runtime_cache.write("b", b"compiled")
    assert not (runtime_cache.folder() / "b").exists()


def test_what_belongs_to_somebody_else_is_not_read(name, monkeypatch):
    monkeypatch.setattr(runtime_cache.os, "getuid", lambda: -1)
    assert runtime_cache.read(name) is None


def test_a_damaged_entry_is_not_read(name):
    path = runtime_cache.folder() / name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert runtime_cache.read(name) is None
