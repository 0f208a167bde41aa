"""The table of docs/networks.md is that of the code, and its commands and its Python run as they are written."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from datasets import make_balls
from test_networks import network_of, noise, plan_of

from medseg import cli
from medseg.model.plan import Plan
from medseg.train.architectures import NETWORKS

DOC = (Path(__file__).parent.parent / "docs/networks.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", DOC, re.DOTALL)


def medseg(line: str, monkeypatch) -> int:
    program, *arguments = shlex.split(line, comments=True)
    assert program == "medseg"
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return int(done.value.code or 0)


def row(name: str) -> str:
    """Return the row of a network: what the code says of it, and what the network does."""
    plan = plan_of(name)
    network = network_of(plan).train()
    able = (isinstance(network(noise(plan)), list), bool(getattr(network, "stages", ())))
    cells = (f"`{name}`", NETWORKS[name].summary, NETWORKS[name].adapts, *("yes" if one else "no" for one in able))
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", NETWORKS)
def test_each_network_has_its_row(name):
    assert row(name) in DOC.splitlines()


def test_the_table_has_no_other_network():
    table = DOC.split("| deep supervision |", 1)[1].split("\n\n", 1)[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(NETWORKS)


def test_the_verb_networks_lists_them(monkeypatch, capsys):
    assert medseg("medseg networks --json", monkeypatch) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {one["network"]: one["summary"] for one in listed} == {name: one.summary for name, one in NETWORKS.items()}


def test_the_page_has_no_block_of_another_kind():
    assert DOC.count("```") == 2 * len(BLOCKS) > 0


def test_commands_and_snippets_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_balls(tmp_path / "DATASET", cases=3, shape=(20, 20, 20))
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "docs/networks.md", "exec"), {})
            continue
        for line in block.strip().splitlines():
            short = line.replace("--budget 30m", "--budget 2steps --folds 3")
            assert medseg(short, monkeypatch) == 0, f"{line}\n{capsys.readouterr().err}"
    assert len(Plan.load("SMALLER/plan.json").network.features) == 2
