"""Every command and snippet of the README works, in the order in which a reader meets them."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from medseg import cli
from medseg.demo import run_demo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)
SETUP = ("make ", "python3 -m venv", ".venv/bin/", "source ")


def commands(block: str) -> list[str]:
    return [line for line in block.strip().splitlines() if line]


def test_the_readme_has_no_block_of_another_kind():
    assert README.count("```") == 2 * len(BLOCKS)


def test_commands_and_snippets_run_in_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("nilearn", reason="the demo's brain comes with it")
    (tmp_path / "data_samples").symlink_to(ROOT / "data_samples")
    monkeypatch.chdir(tmp_path)
    assert "medseg demo demo_out" in README
    run_demo("demo_out")
    ran = 0
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "README.md", "exec"), {})
            continue
        for line in commands(block):
            if line.startswith(SETUP):
                continue
            program, *arguments = shlex.split(line)
            assert program == "medseg", f"the test does not know how to run: {line}"
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            with pytest.raises(SystemExit) as done:
                cli.main()
            assert done.value.code == 0, f"{line}\n{capsys.readouterr().err}"
            ran += 1
    assert ran >= 7


def test_set_up_commands_name_what_is_there():
    """The set-up itself is what continuous integration runs; here only that its words mean something."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    for line in (line for kind, block in BLOCKS if kind == "bash" for line in commands(block)):
        if line.startswith("make "):
            assert f"\n{line.split()[1]}:" in makefile
        for extra in re.findall(r'pip install "\.\[(\w+)\]"', line):
            assert f"\n{extra} =" in extras


def test_linked_files_are_there():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).is_file(), target
