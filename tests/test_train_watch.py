"""What can be seen of a training, and when it stops."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import make_shells, small_plan

from medseg.errors import UsageError
from medseg.model.weights import state_of
from medseg.report.metrics import compare_labels
from medseg.report.surfaces import compare_surfaces
from medseg.train import run, watch
from medseg.train.cache import Prepared, prepare_cases
from medseg.train.checkpoint import INTERRUPT
from medseg.train.dataset import read_dataset
from medseg.train.loop import recipe_of, train_model
from medseg.train.loss import IGNORED
from medseg.train.optimize import new_state
from medseg.train.run import FoldFiles, TrainProgress, run_steps
from medseg.train.settings import Budget, TrainSettings
from medseg.train.watch import Paced, Probe, Watch, draw_history, stalled
from medseg.volume import Grid, Volume

CPU = torch.device("cpu")
FAST = TrainSettings(folds=3)


@pytest.fixture(scope="module")
def plan(balls):
    return small_plan(balls, features=4)


class Told(torch.nn.Module):
    """A network that knows the answer: the class numbers stand in the image."""

    def __init__(self, outputs: int, *, regions: bool = False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.outputs, self.regions = outputs, regions

    def forward(self, image):
        if self.regions:
            return torch.cat([image >= 1, image >= 2], dim=1).float() * 20 - 10
        return torch.cat([image == number for number in range(self.outputs)], dim=1).float() * 20


@pytest.mark.parametrize("regions", [False, True])
def test_a_probe_sees_what_was_found_and_leaves_out_what_is_not_known(tmp_path, regions):
    dataset = read_dataset(make_shells(tmp_path / "shells", regions=regions, ignore=7, cases=3))
    plan = small_plan(dataset)
    cases = prepare_cases(dataset.cases, plan, tmp_path / "cache")
    told = [dataclasses.replace(case, image=case.target[:][None].astype(np.float32)) for case in cases]
    names = {"dice_ball", "dice_core"} if regions else {"dice_shell", "dice_core"}
    probe = Probe(told, plan, FAST)
    seen = probe(Told(plan.outputs, regions=regions))
    assert seen.keys() == names | {"validation_loss"}
    assert [seen[name] for name in names] == [1.0, 1.0]
    assert seen["validation_loss"] == pytest.approx(0, abs=1e-3)
    known = np.array([True, False] if regions else [True, True, False])
    undrawn = Probe([dataclasses.replace(case, known=known) for case in told], plan, FAST)
    assert undrawn(Told(plan.outputs, regions=regions)).keys() == names - {"dice_core"} | {"validation_loss"}
    nothing = [dataclasses.replace(case, image=np.zeros_like(case.image)) for case in told]
    assert [Probe(nothing, plan, FAST)(Told(plan.outputs, regions=regions))[name] for name in names] == [0.0, 0.0]


def told(found: np.ndarray, truth: np.ndarray, known: tuple[bool, ...] = (True, True, True)) -> Prepared:
    """Return a case in which `Told` finds `found`."""
    return Prepared("told", found[None].astype(np.float32), truth, {}, np.array(known))


def plates(**places: int) -> np.ndarray:
    """Return class numbers (8, 6, 4) of plates one voxel thick, class 1 at `one` along the first axis, 2 at `two`."""
    numbers = np.zeros((8, 6, 4), np.int16)
    for number, name in enumerate(("one", "two"), start=1):
        if name in places:
            numbers[places[name]] = number
    return numbers


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Return a plan with two classes, its patch (8, 6, 4) and its spacing 1.25 x 2 x 3 mm."""
    dataset = read_dataset(make_shells(tmp_path_factory.mktemp("two") / "shells", regions=False, cases=3))
    return small_plan(dataset).model_copy(update={"patch": (8, 6, 4), "spacing_mm": (1.25, 2.0, 3.0)})


def test_surfaces_in_patches_are_compared_in_mm_and_their_means_taken(two):
    known = (True, True, False)
    ignored = plates(one=6)
    ignored[0, 0, 0] = IGNORED
    cases = [
        told(plates(one=2, two=7), plates(one=3, two=5)),  # 1.25 mm is within 2 mm, 2.5 mm is not
        told(plates(), plates(one=3)),  # missed: the diagonal of 7 x 5 x 3 voxels
        told(plates(one=0, two=4), plates(one=0), known),  # nobody drew class 2
        told(plates(one=0), ignored),  # surfaces may be cut
    ]
    seen = Probe(cases, two, FAST)(Told(3), surfaces=True)
    diagonal = math.hypot(7 * 1.25, 5 * 2, 3 * 3)
    assert seen["surface_dice_shell"] == pytest.approx((1 + 0 + 1) / 3)
    assert seen["hd95_mm_shell"] == pytest.approx((1.25 + diagonal + 0) / 3)
    assert (seen["surface_dice_core"], seen["hd95_mm_core"]) == (0.0, 2.5)
    assert seen["dice_core"] == 0.0  # Dice, too, leaves out who was not drawn


def test_patches_have_the_scores_of_a_case_that_is_as_large(two):
    random = np.random.default_rng(5)
    found, truth = (random.integers(0, 3, (8, 6, 4)).astype(np.int16) for _ in range(2))
    seen = Probe([told(found, truth)], two, FAST)(Told(3), surfaces=True)
    grid = Grid((8, 6, 4), np.diag([1.25, 2.0, 3.0, 1.0]))
    for score in compare_labels(Volume(found[None], grid), Volume(truth[None], grid), two.labels):
        for key in ("dice", "surface_dice", "hd95_mm"):
            assert seen[f"{key}_{score.name}"] == pytest.approx(getattr(score, key))


def test_surfaces_of_regions_that_overlap_are_compared(tmp_path):
    dataset = read_dataset(make_shells(tmp_path / "shells", regions=True, cases=3))
    plan = small_plan(dataset).model_copy(update={"patch": (8, 6, 4), "spacing_mm": (1.25, 2.0, 3.0)})
    truth = np.maximum(plates(one=3), plates(two=4))  # the ball is both plates, the core the second
    case = told(np.maximum(plates(one=3), plates(two=6)), truth, (True, True))
    seen = Probe([case], plan, FAST)(Told(2, regions=True), surfaces=True)
    # The ball: of plates 3 and 6, 3 meets itself and 6 lies two off 4; of 3 and 4, 4 lies one off 3, so three of four.
    assert (seen["surface_dice_ball"], seen["hd95_mm_ball"]) == (0.75, 2.5)
    assert (seen["surface_dice_core"], seen["hd95_mm_core"]) == (0.0, 2.5)


def test_a_label_that_is_nowhere_and_not_found_has_no_column(two):
    seen = Probe([told(plates(one=2), plates(one=2))], two, FAST)(Told(3), surfaces=True)
    assert seen.keys() == {"validation_loss", "dice_shell", "surface_dice_shell", "hd95_mm_shell"}
    unknown = two.model_copy(update={"resampling": None})  # then no spacing of the plan is that of a case
    seen = Probe([told(plates(one=2), plates(one=2))], unknown, FAST)(Told(3), surfaces=True)
    assert seen.keys() == {"validation_loss", "dice_shell"}


def test_surfaces_have_a_pace_of_their_own_which_expects_large_patches_to_take_long(two, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])

    def slow(*arguments):
        now[0] += 0.5
        return compare_surfaces(*arguments)

    monkeypatch.setattr(watch, "compare_surfaces", slow)
    probe = Probe([told(plates(one=2), plates(one=2))], two, FAST)
    probe.surface_pace._ended = 0.0
    first = 8 * 6 * 4 * 8 * watch.COMPARED_S / watch.SHARE
    compared = []
    for moment in (0.99 * first, 1.01 * first, 100.0, 700.0, 900.0, 1500.0):
        now[0] = max(moment, now[0])
        compared.append("hd95_mm_shell" in probe(Told(3)))
    # Eight patches of two labels took 8 s, so it is 800 s until the next time.
    assert compared == [False, True, False, False, True, False]
    assert "hd95_mm_shell" in probe(Told(3), surfaces=True)


def test_a_training_leaves_a_history_with_dice_and_a_picture(balls, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "HISTORY_STEPS", 3)
    train_model(balls, plan, tmp_path, budget="7steps", settings=FAST)
    rows = list(csv.DictReader((tmp_path / "fold_0.history.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["3", "6", "7"]
    scores = {"dice_ball", "surface_dice_ball", "hd95_mm_ball"}
    assert set(rows[-1]) == {*watch.COLUMNS, "validation_loss", *scores}
    assert 0 <= float(rows[-1]["dice_ball"]) <= 1
    assert 0 <= float(rows[-1]["surface_dice_ball"]) <= 1
    assert 0 <= float(rows[-1]["hd95_mm_ball"]) <= math.dist((0, 0, 0), np.multiply(plan.patch, plan.spacing_mm))
    assert (tmp_path / "fold_0.progress.png").read_bytes().startswith(b"\x89PNG")


def test_looking_changes_no_weight(balls, plan, tmp_path, monkeypatch):
    found = []
    for name, steps in (("often", 1), ("never", 100)):
        monkeypatch.setattr(run, "HISTORY_STEPS", steps)
        found.append(train_model(balls, plan, tmp_path / name, budget="4steps", settings=FAST).networks[0])
    often, never = (state_of(network) for network in found)
    assert all(torch.equal(tensor, never[name]) for name, tensor in often.items())


def test_work_that_takes_time_takes_a_share_of_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    pace, spent = Paced(0.01, _ended=0.0), 0.0
    for _ in range(10_000):
        now[0] += 1.0
        if pace.is_due:
            with pace.work():
                now[0] += 2.0
                spent += 2.0
    assert 0.005 < spent / now[0] < 0.011


def test_a_label_may_be_called_like_half_a_formula(tmp_path):
    row = {"step": 1, "loss": 1.0, "dice_lesion $10^$": 0.5, "dice_other $": 0.5}
    assert draw_history([row, row | {"step": 2}], tmp_path / "picture.png")


def test_the_picture_has_a_panel_for_each_score_of_labels(tmp_path, monkeypatch):
    panels = {}
    monkeypatch.setattr(
        watch, "_dress", lambda axes, title, _: panels.update({title: [line.get_label() for line in axes.lines]})
    )
    row = {"step": 1, "loss": 1.0, "learning_rate": 0.1, "steps_per_s": 1.0, "validation_loss": 1.0}
    row |= {"dice_a": 0.5, "dice_b": 0.5, "surface_dice_a": 0.4, "hd95_mm_b": 3.0, "dice_surface_dice_a": 0.1}
    assert draw_history([row], tmp_path / "picture.png")
    assert panels == {
        "loss and validation_loss": ["loss", "validation loss"],
        "Dice on validation patches": ["a", "b", "surface dice a"],  # a label may be called so
        "surface Dice (2 mm) on validation patches": ["a"],
        "HD95 (mm) on validation patches": ["b"],
        "learning_rate": ["learning rate"],
        "steps_per_s": ["steps per s"],
    }


def test_a_history_of_before_there_were_surface_scores_goes_on(plan, tmp_path):
    state = new_state(plan, FAST, CPU)
    state.step, state.history = (
        50,
        [{"step": 50, "loss": 1.0, "validation_loss": 2.0, "dice_ball": 0.5}],
    )
    state.save(tmp_path / "old", "{}")
    goes_on = new_state(plan, FAST, CPU)
    goes_on.load(tmp_path / "old", "{}")
    goes_on.step = 100
    case = told(plates(one=2), plates(one=2), (True, True))
    patches = Probe([case], plan.model_copy(update={"patch": (8, 6, 4)}), FAST)
    goes_on.average = Told(2)
    seen = Watch(tmp_path, 0, patches)
    seen.note(goes_on, 0.5, 1.0, last=True)
    seen.show(goes_on, last=True)
    rows = list(csv.DictReader((tmp_path / "fold_0.history.csv").read_text().splitlines()))
    assert [(row["step"], row["dice_ball"], row["surface_dice_ball"]) for row in rows] == [
        ("50", "0.5", ""),
        ("100", "1.0", "1.0"),
    ]
    assert not stalled(goes_on.history, 0.9, 0.5, 100)


def test_without_matplotlib_there_is_no_picture_and_no_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw_history([{"step": 1, "loss": 1.0}], tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_the_history(balls, plan, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(run, "HISTORY_STEPS", 2)
    train_model(balls, plan, tmp_path, budget="4steps", settings=FAST, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard/fold_0")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 4]
    assert {"dice_ball", "surface_dice_ball", "hd95_mm_ball"} <= set(events.Tags()["scalars"])


def test_tensorboard_that_is_not_installed_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"medseg\[tensorboard\]"):
        Watch(tmp_path, 0, tensorboard=True)


def test_early_stopping_waits_for_a_share_of_the_budget():
    history = [{"step": step, "dice_a": dice} for step, dice in ((50, 0.5), (100, 0.8), (150, 0.7), (200, 0.75))]
    assert not stalled(history[:2], 0.2, 0.1, 100)
    assert not stalled(history, 0.4, 0.25, 200)  # best at 0.2 of the budget, now at 0.4
    assert stalled(history, 0.4, 0.15, 200)
    assert not stalled([{"step": 50}], 0.9, 0.1, 50)
    surfaces = [row | {"surface_dice_a": row["step"] / 1000, "hd95_mm_a": 9.0} for row in history]
    assert stalled(surfaces, 0.4, 0.15, 200)  # surfaces got better, but it is Dice that counts
    assert not stalled([{"step": 50, "surface_dice_a": 0.5}], 0.9, 0.1, 50)


def test_a_training_that_is_not_getting_better_stops_and_is_whole(balls, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "HISTORY_STEPS", 2)
    monkeypatch.setattr(Paced, "is_due", True)
    monkeypatch.setattr(Probe, "__call__", lambda *_, **__: {"validation_loss": 1.0, "dice_ball": 0.5})
    steps: list[int] = []
    settings = FAST.model_copy(update={"early_stop": 0.31})
    train_model(balls, plan, tmp_path, budget="20steps", settings=settings, progress=lambda now: steps.append(now.step))
    assert max(steps) == 10  # best at step 2, the share since then is more than 0.3 at step 10
    assert (tmp_path / "fold_0.safetensors").is_file()
    assert not (tmp_path / "fold_0.checkpoint").exists()


def test_a_training_ends_early_only_after_a_look_that_found_it_no_better(balls, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "HISTORY_STEPS", 2)
    monkeypatch.setattr(Paced, "is_due", False)  # looking takes long: nobody would look before the end
    looks: list[float] = []

    def better(*_, **__):
        looks.append(len(looks))
        return {"validation_loss": 1.0, "dice_ball": looks[-1] / 100}

    monkeypatch.setattr(Probe, "__call__", better)
    steps: list[int] = []
    settings = FAST.model_copy(update={"early_stop": 0.39})
    train_model(balls, plan, tmp_path, budget="20steps", settings=settings, progress=lambda now: steps.append(now.step))
    assert max(steps) == 20
    assert len(looks) == 10  # every tenth of the budget, a quarter of 0.4


def test_what_was_not_looked_at_is_taken_for_no_better_by_nobody(balls, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "HISTORY_STEPS", 10)  # the share ends between two lines of the history
    monkeypatch.setattr(Paced, "is_due", False)
    dice = iter((0.5, 0.4, 0.4))
    monkeypatch.setattr(Probe, "__call__", lambda *_, **__: {"validation_loss": 1.0, "dice_ball": next(dice)})
    settings = FAST.model_copy(update={"early_stop": 0.2})
    train_model(balls, plan, tmp_path, budget="40steps", settings=settings)
    rows = list(csv.DictReader((tmp_path / "fold_0.history.csv").read_text().splitlines()))
    assert [(row["step"], row["dice_ball"]) for row in rows] == [("10", "0.5"), ("20", "0.4")]


@pytest.mark.parametrize("budget", [Budget(seconds=2000.0), Budget(steps=1000)])
def test_the_time_that_is_left_is_right_within_5_percent(plan, tmp_path, monkeypatch, budget):
    """A step takes 2 s, but the first ten take 10: something is compiled, or disks are cold."""
    state = new_state(plan, FAST, CPU)
    told: list[tuple[float, float]] = []

    def losses():
        while budget.spent(state.step, state.seconds) < 1:
            state.step += 1
            state.seconds += 10.0 if state.step <= 10 else 2.0
            yield [1.0]

    def note(now: TrainProgress) -> None:
        told.append((state.seconds, now.seconds_left))

    run_steps(state, losses(), budget, FoldFiles(tmp_path, 0, "", None), note)
    end = state.seconds
    late = [(seconds, left) for seconds, left in told if seconds > 0.15 * end]
    for seconds, left in late:
        assert left == pytest.approx(end - seconds, abs=0.05 * end)
    assert told[-1][1] == 0.0


ASKED_TO_STOP = """
import signal, sys, time
from medseg.train.run import stop_signals

for number in (signal.SIGINT, signal.SIGTERM):
    before = signal.getsignal(number)
    try:
        with stop_signals() as stopped:
            print("runs", stopped(), flush=True)
            while not stopped():
                time.sleep(0.01)
            print("ends its step", flush=True)
            time.sleep(600)
    except KeyboardInterrupt:
        print("does not wait", signal.getsignal(number) is before, flush=True)
"""


def test_a_signal_lets_the_step_end_and_a_second_one_does_not_wait():
    """In a process of its own, whose main thread is ours."""
    command = [sys.executable, "-c", ASKED_TO_STOP]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for number in (signal.SIGINT, signal.SIGTERM):
            for said in ("runs False", "ends its step"):
                assert process.stdout.readline().strip() == said
                process.send_signal(number)
            assert process.stdout.readline().strip() == "does not wait True"
    assert process.returncode == 0


def test_sigterm_writes_a_checkpoint_and_the_training_goes_on_from_it(balls, plan, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    plan.save(folder / "plan.json")
    FAST.save(folder / "train.json")
    dataset = balls.cases[0].label.parent.parent
    code = (
        "import sys, torch; torch.set_num_threads(1); from medseg.train.loop import train_dataset\n"
        "show = lambda now: print(now.step, flush=True)\n"
        "train_dataset(sys.argv[1], sys.argv[2], budget='100000steps', folds=3, progress=show)"
    )
    command = [sys.executable, "-c", code, str(dataset), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert any(int(line) >= 3 for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    state = new_state(plan, FAST, CPU)
    state.load(
        folder / "fold_0.checkpoint",
        recipe_of(plan, FAST, Budget(steps=100_000), balls.fold(0, 3)[0], folder / "cache"),
    )
    assert state.step >= 3
    assert (folder / "fold_0.history.csv").is_file()


def test_an_interrupt_while_progress_is_shown_counts_as_one_between_steps(plan, tmp_path):
    state = new_state(plan, FAST, CPU)

    def stop(_: TrainProgress) -> None:
        raise KeyboardInterrupt

    def losses():
        while not state.asked:
            state.step += 1
            yield [1.0]

    with pytest.raises(KeyboardInterrupt):
        run_steps(state, losses(), Budget(steps=10), FoldFiles(tmp_path, 0, "", Watch(tmp_path, 0)), stop)
    assert (state.step, state.asked) == (1, INTERRUPT)
    assert (tmp_path / "fold_0.checkpoint").is_file()
