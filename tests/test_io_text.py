"""JSON and YAML from whoever it may be: values, or one error of the kind that was asked for."""

from __future__ import annotations

import datetime
import os

import pytest

from medseg.errors import DatasetError, UsageError
from medseg.io import text
from medseg.io.text import read_json, read_yaml


def written(tmp_path, content: str | bytes):
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_values_are_read(tmp_path):
    path = written(tmp_path, '\ufeff{"name": "Schädel", "values": [1, 2.5, null]}')
    for read in (read_json, read_yaml):
        assert read(path, "The file", UsageError) == {"name": "Schädel", "values": [1, 2.5, None]}
    path = written(tmp_path, "a: &a {b: 1, c: 2}\nd: {<<: *a, c: 3}\ne: [*a, 2001-02-03, 0x1f]\n")
    known = {"b": 1, "c": 2}
    assert read_yaml(path, "The file", UsageError) == {
        "a": known,
        "d": {"b": 1, "c": 3},
        "e": [known, datetime.date(2001, 2, 3), 31],
    }


@pytest.mark.parametrize(
    "content",
    ["", "{", "[" * 10**6, '{"a":' * 10**5, "9" * 10**5, '{"a": 1} {', "nan"],
    ids=["empty", "open", "lists", "objects", "digits", "twice", "word"],
)
def test_what_is_not_json(tmp_path, content):
    with pytest.raises(DatasetError, match=r"^The file is not valid JSON\.$") as caught:
        read_json(written(tmp_path, content), "The file", DatasetError)
    assert caught.value.path == tmp_path / "file"


def doubled(shape: str) -> str:
    return "x0: &x0 {a: 1}\n" + "\n".join(f"x{n}: &x{n} {shape.replace('@', f'*x{n - 1}')}" for n in range(1, 30))


@pytest.mark.parametrize(
    "content",
    [
        *("a: !!bool x", "a: !!int ''", "a: !!float ''", "a: !!timestamp x", "a: !!map [b]", "a: !!seq {b: c}"),
        *("a: !!omap {b: c}", "a: !!null [b]", "!!python/name:os.system", "a: 1\na: 2"),
        *("[" * 10**5, "{a: " * 10**5, "- " * 10**5, "? " * 10**5, "&a [*a]", "&a {b: *a}", "a: &a {<<: *a}"),
        *(doubled("{<<: [@, @]}"), doubled("[@, @]"), doubled("{b: @, c: @}"), "[" + "1, " * 30_000 + "1]"),
        *("a: " + ":".join(["1"] * 100_000), "a: " + "9" * 100_000, "a: b\n---\nc: d", "a: *b"),
        *("\x07", "[1]: {[2]: 3}"),
    ],
    ids=lambda content: repr(content[:20]),
)  # fmt: skip
def test_yaml_beyond_limits_or_with_tags_that_do_not_fit(tmp_path, content):
    with pytest.raises(UsageError, match=r"^The file is not valid YAML, or is nested or repeated beyond limits"):
        read_yaml(written(tmp_path, content), "The file", UsageError)


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_what_cannot_be_read(tmp_path, monkeypatch, read):
    with pytest.raises(UsageError, match=r"^The file is missing\.$"):
        read(tmp_path / "nothing", "The file", UsageError)
    with pytest.raises(UsageError, match="cannot be read: it is not a regular file"):
        read(tmp_path, "The file", UsageError)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="cannot be read: it is not a regular file"):
        read(tmp_path / "pipe", "The file", UsageError)
    with pytest.raises(UsageError, match="is not UTF-8"):
        read(written(tmp_path, b'{"F\xfc\xdfe": 1}'), "The file", UsageError)
    monkeypatch.setattr(text, "LARGEST_JSON", 2**20)
    with pytest.raises(UsageError, match=r"larger than 1 MB, and is not read\.$"):
        text.read_text(written(tmp_path, b" " * (2**20 + 1)), "The file", UsageError, largest=text.LARGEST_JSON)


def test_a_link_to_a_device_is_not_read(tmp_path):
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(UsageError, match="not a regular file"):
        read_json(tmp_path / "link", "The file", UsageError)
