"""Tables hold in a terminal of 80 columns; without a terminal there is a line a minute."""

from __future__ import annotations

import io
from collections import Counter

import pytest

from medseg import cli_show
from medseg.cli_terminal import Terminal
from medseg.report.metrics import CaseScores, LabelScore, Scores
from medseg.study.batch import Progress


@pytest.fixture
def shown(monkeypatch):
    """Return what is written to a terminal of 80 columns."""
    stream = io.StringIO()
    monkeypatch.setattr(cli_show, "out", Terminal(file=stream, width=80))
    return stream


@pytest.fixture
def told(monkeypatch):
    """Return what is written to standard error that is no terminal, where a minute passes with each look at a clock."""
    stream, now = io.StringIO(), [0.0]

    def clock() -> float:
        now[0] += 61
        return now[0]

    monkeypatch.setattr(cli_show, "err", Terminal(file=stream, width=80))
    monkeypatch.setattr(cli_show.time, "monotonic", clock)
    return stream


def test_scores_of_many_metrics_hold_at_80_columns(shown):
    cases = [
        CaseScores(name, tuple(LabelScore(n, label, 900 + k, 10 * n, 31, 1000.0, 0.9876, 142.995, 15.4)
                   for n, label in enumerate(("left lateral ventricle", "hippocampus"), 1)))
        for k, name in enumerate("abc")
    ]  # fmt: skip
    cli_show.show_scores(Scores(tuple(cases)), "Fold 0, validation cases", as_json=False)
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = [line for line in lines if "left lateral" in line]
    assert "142.995" in row
    assert row.count("0.9") >= 4  # Dice, both ends of its interval, surface Dice: in one line each
    assert "–" in row
    assert any(line.split()[:1] == ["ventricle"] for line in lines)
    assert sum("hippocampus" in line for line in lines) == 1


def test_series_hold_at_80_columns(shown):
    one = {
        "study": 1, "series": "1204", "part": 1, "modality": "MR", "slices": 176, "matrix": [512, 512],
        "spacing_mm": [0.4297, 0.4297, 6.5], "orientation": "LPS", "tilt_deg": 18.5, "verdict": "repaired",
        "reason": "irregular_spacing", "text": "Steps differ.",
    }  # fmt: skip
    cli_show.print_series({"series": [one, {**one, "part": 2}], "problems": []})
    text = shown.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for whole in ("1 study, 2 series", "1204/1", "512×512×176", "0.43×0.43×6.5", "18.5°", "repaired"):
        assert whole in text
    assert "series 1204/1: irregular_spacing: Steps differ." in text


def test_long_texts_fold_and_nothing_is_cut(shown):
    rows = [{"decision": f"field_{n}", "value": n, "why": "because " * 30} for n in range(2)]
    rows.append({"decision": "a name of one word " + "x" * 90, "value": 2, "why": ""})
    cli_show.print_table("plan", rows)
    text = shown.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("because") == 60
    assert text.count("x") == 90


def test_more_short_columns_than_fit_lose_nothing(shown):
    cli_show.print_table("wide", [{f"column_{n}": f"value-{n:02d}" for n in range(12)}])
    digits = "".join(character for character in shown.getvalue() if character.isdigit())
    assert all(f"{n:02d}"[0] in digits for n in range(12))
    assert max(map(len, shown.getvalue().splitlines())) <= 80


def test_without_a_terminal_there_is_a_line_a_minute(told):
    with cli_show.progress() as show:
        show("prepare", 0.25, "1 of 4")
        show("train", 0.5, "step 7  loss 0.500  1.00 steps/s  0:10:00 left")
    first, second = told.getvalue().splitlines()
    assert first.startswith("medseg: prepare: 25 %  1 of 4  ")
    assert first.endswith(" left")
    assert second == "medseg: train: 50 %  step 7  loss 0.500  1.00 steps/s  0:10:00 left"


def test_beside_json_no_lines_are_written(told):
    with cli_show.progress(as_json=True) as show, cli_show.batch_table(show_paths=False, as_json=True) as of_batch:
        show("prepare", 0.25, "1 of 4")
        of_batch(Progress(10, Counter(done=3, refused=1), 0, 1, ()))
    assert told.getvalue() == ""


def test_a_batch_without_a_terminal_says_how_far_it_is(told):
    with cli_show.batch_table(show_paths=False) as show:
        show(Progress(10, Counter(done=3, refused=1), 0, 1, ()))
    (line,) = told.getvalue().splitlines()
    assert line.startswith("medseg: 10 studies: 3 done, 1 refused, 0 failed, 6 to do, 0:0")
    assert line.endswith(" left, 1 worker")


def test_a_short_work_without_a_terminal_says_nothing(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(cli_show, "err", Terminal(file=stream))
    with cli_show.progress() as show:
        for done in range(11):
            show("train", done / 10, "")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("number", "what", "text"), [(1, "study", "1 study"), (0, "study", "0 studies"), (2, "case", "2 cases")]
)
def test_counts_are_english(number, what, text):
    assert cli_show.count(number, what) == text
