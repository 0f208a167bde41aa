"""The commands and the Python of docs/dicom.md run as they are written."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from dicom_files import write_source
from models import tiny_model, tiny_plan

import medseg
from medseg import cli
from medseg.model.plan import Channel
from medseg.model.weights import save_weights
from medseg.process.normalize import ZScore

DOC = (Path(__file__).parent.parent / "docs/dicom.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", DOC, re.DOTALL)


def test_the_page_has_no_block_of_another_kind():
    assert DOC.count("```") == 2 * len(BLOCKS) > 0


def test_commands_and_snippets_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_source(tmp_path / "CT")
    (tmp_path / "MODEL").mkdir()
    model = tiny_model(tiny_plan(channels=(Channel(name="CT", normalization=ZScore()),)))
    model.plan.save(tmp_path / "MODEL/plan.json")
    save_weights(model.networks[0], tmp_path / "MODEL/fold_0.safetensors")
    ran = 0
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "docs/dicom.md", "exec"), {})
            ran += 1
            continue
        for line in block.strip().splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "medseg"
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            with pytest.raises(SystemExit) as done:
                cli.main()
            assert done.value.code == 0, f"{line}\n{capsys.readouterr().err}"
            ran += 1
    assert ran >= 7
    written, _ = medseg.load_dicom_seg("seg.dcm", source="CT")
    np.testing.assert_array_equal(written.array > 0, medseg.load("labels.nii.gz").array > 0)
