"""Whatever a file, a header, a path or a name holds: the terminal shows it and does not obey it."""

from __future__ import annotations

import io
import json
import shutil
import sys
import unicodedata
import warnings

import numpy as np
import pytest
from datasets import make_balls
from dicom_files import some_labels, write_source
from rich.table import Table
from rich.text import Text

from medseg import cli, cli_show, cli_terminal
from medseg.cli_terminal import Terminal, visible
from medseg.io import save
from medseg.io.label_table import write_table
from medseg.labels import make_labels
from medseg.volume import Grid

HOSTILE = (
    "a\x1b[2J\x1b]0;owned\x07b\rc\x08d\x7f\x9b31me\u202egnp.\u2066f\u2028g\x00h[bold red]i[/] :smile: [link=http://x]j"
)
PATH = HOSTILE.replace("/", "").replace("\x00", "")
SHOWN = r"a\x1b[2J\x1b]0;owned\x07b\rc\x08d\x7f\x9b31me\u202egnp.\u2066f\u2028g"


def steers(text: str) -> set[str]:
    """Return the letters of a text that steer a terminal."""
    return {one for one in text if unicodedata.category(one) in {"Cc", "Cf", "Cs", "Zl", "Zp"}} - {"\n"}


@pytest.fixture
def run(capsys, monkeypatch):
    """Return a function that runs a command line in a wide terminal and returns (exit code, all that was written)."""
    for console in (cli_terminal.out, cli_terminal.err):
        monkeypatch.setattr(console, "_width", 400)
    monkeypatch.setenv("COLUMNS", "400")  # of what typer shows

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["medseg", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as done:
            code = int(done.code or 0)
        captured = capsys.readouterr()
        assert not steers(captured.out + captured.err)
        return code, captured.out + captured.err

    return call


@pytest.mark.parametrize(
    "letter", ["\x00", "\t", "\n", "\r", "\x1b", "\x7f", "\x85", "\x9b", "\u200e", "\u202e", "\u2069"]
)
def test_a_letter_that_steers_is_named(letter):
    assert visible(f"a{letter}b").encode().decode("unicode_escape") == f"a{letter}b"
    assert not steers(visible(f"a{letter}b\n"))


@pytest.mark.parametrize(
    "text", ["Größe 0.5×0.5 mm", "海馬", "می\u200cخواهم", "👩\u200d⚕️", "e\u0301", "[/path] :smile:", "a\\x1b"]
)
def test_other_texts_are_shown_as_they_are(text):
    assert visible(text) == text


def test_half_of_a_pair_is_named():
    assert visible("a\udcffb") == r"a\udcffb"


@pytest.mark.parametrize("kind", [str, Text])
def test_a_table_with_colors_shows_hostile_cells_titles_and_heads(kind):
    stream = io.StringIO()
    shown = Terminal(file=stream, width=400, force_terminal=True, color_system="truecolor")
    table = Table(title=kind(HOSTILE))
    table.add_column(kind(HOSTILE))
    table.add_row(kind(HOSTILE), style="red")
    shown.print(table)
    text = stream.getvalue()
    assert "\x1b[31m" in text  # colors are the terminal's own
    for forbidden in ("\x1b[2J", "\x1b]", "\x07", "\r", "\x08", "\x7f", "\x9b", "\u202e", "\u2066", "\x00"):
        assert forbidden not in text
    assert kind is Text or "[bold red]i[/] :smile: [link=http://x]j" in text  # a Text folds at line ends


@pytest.mark.parametrize("stage", ["train", HOSTILE])
def test_bars_and_tables_that_move_show_hostile_names(monkeypatch, stage):
    from collections import Counter

    from medseg.study.batch import Progress

    stream = io.StringIO()
    monkeypatch.setattr(cli_show, "err", Terminal(file=stream, width=400, force_terminal=True))
    with cli_show.progress() as show:
        show(stage, 0.5, HOSTILE)
    with cli_show.batch_table(show_paths=True) as tell:
        tell(Progress(10, Counter(done=3), 0, 1, (("local", "0123", PATH, stage, 1.0),)))
    text = stream.getvalue()
    assert "[bold red]i[/] :smile:" in text
    assert "\x1b[2J" not in text
    assert not steers(text) - {"\x1b", "\r"}  # with which a bar moves


def test_json_escapes_and_loses_nothing(capsys):
    content = {HOSTILE: [HOSTILE, "\udcff", "Größe"]}
    cli_show.print_json(content)
    text = capsys.readouterr().out
    assert not steers(text)
    assert json.loads(text) == content


def test_names_of_labels_and_paths(run, tmp_path):
    grid = Grid((6, 5, 4), np.diag([1.0, 2, 3, 1]))
    folder = tmp_path / PATH
    folder.mkdir()
    labels = some_labels(grid, (1, 2))
    save(labels, folder / f"{PATH}.nii.gz")
    write_table(make_labels([(1, HOSTILE), (2, "other")]), folder / f"{PATH}.labels.json")
    shutil.copy(folder / f"{PATH}.nii.gz", folder / "scan.nii.gz")
    code, text = run("report", folder / "scan.nii.gz", folder / f"{PATH}.nii.gz", folder / "out.json")
    assert code == 0
    assert text.count(SHOWN) >= 2  # the path above the table, the name in it


def test_paths_in_errors_and_in_wrong_use(run, tmp_path):
    (tmp_path / PATH).write_bytes(b"")
    code, text = run("info", tmp_path / PATH)
    assert (code, text.count("\n")) == (1, 1)
    assert SHOWN in text
    for arguments in (("info", tmp_path, tmp_path / PATH), (PATH,), (f"--{PATH}",), ("info", f"--{PATH}")):
        code, text = run(*arguments)
        assert code == 2
        assert r"\x1b[2J" in text


@pytest.mark.parametrize("as_json", [False, True])
def test_what_dicom_headers_hold(run, tmp_path, as_json):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no such text is right
        tags = {"Modality": HOSTILE[:14], "SeriesDescription": HOSTILE[:59], "PatientName": HOSTILE[:60]}
        folder = write_source(tmp_path / "study", SpecificCharacterSet="ISO_IR 192", **tags)
    arguments = ["info", "--descriptions", folder, *(["--json"] if as_json else [])]
    code, text = run(*arguments)
    assert code == 0
    if as_json:
        (one,) = json.loads(text)["series"]
        assert one["description"] == HOSTILE[:59]
    else:
        assert r"a\x1b[2J\x1b]0;owned" in text


def test_names_of_datasets_and_structures(run, tmp_path):
    folder = make_balls(tmp_path / PATH, 3)
    facts = json.loads((folder / "dataset.json").read_text())
    facts |= {"name": HOSTILE, "labels": {"background": 0, HOSTILE: 1}}
    (folder / "dataset.json").write_text(json.dumps(facts))
    assert run("plan", folder, tmp_path / "model")[0] == 0
    code, text = run("evaluate", folder / "labels", folder / "labels", "--labels", folder / "dataset.json")
    assert code == 0
    assert SHOWN in text
    (folder / "dataset.json").write_text(json.dumps(facts | {"labels": {HOSTILE: HOSTILE}}))
    assert run("plan", folder, tmp_path / "other")[0] == 1


def test_a_warning(run, tmp_path, monkeypatch):
    def odd(*_args: object, **_options: object) -> dict[str, object]:
        warnings.warn(HOSTILE, stacklevel=1)
        return {HOSTILE: HOSTILE}

    monkeypatch.setattr("medseg.report.describe.describe", odd)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("info", tmp_path / "scan.nii.gz")[1].count(r"\u202e") == 3
