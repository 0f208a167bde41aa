from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import blosc2
import numpy as np
import pytest
import safetensors.torch
import torch
from datasets import make_balls, small_plan

from medseg.errors import ClusterError, DatasetError, ModelError, OutputError, UnreadableFile, UsageError
from medseg.io import load, save
from medseg.labels import make_labels
from medseg.model.crf import CRF
from medseg.model.plan import Plan, Region
from medseg.model.segmenter import Model
from medseg.model.weights import save_weights, state_of
from medseg.train import cache, loop
from medseg.train.begin import plan_from
from medseg.train.cache import prepare_cases
from medseg.train.checkpoint import TrainState
from medseg.train.dataset import read_dataset
from medseg.train.dataset_json import Meaning
from medseg.train.loop import train_dataset, train_model
from medseg.train.optimize import new_state, optimize
from medseg.train.ranks import Ranks
from medseg.train.run import TrainProgress
from medseg.train.sampler import Sampler
from medseg.train.schedules import schedule
from medseg.train.settings import Budget, TrainSettings
from medseg.train.watch import Watch

FAST = TrainSettings(folds=3)


@pytest.fixture(scope="module")
def plan(balls):
    return small_plan(balls)


def weights(folder):
    return state_of(Model.load(folder).networks[0])


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_a_short_training_finds_the_ball_and_leaves_a_model_that_runs_anywhere(balls, plan, tmp_path):
    stages = []
    model = train_model(balls, plan, tmp_path / "model", budget="50steps", settings=FAST, progress=stages.append)
    scores = loop.validate_fold(model, balls, tmp_path / "model")
    assert scores.mean["dice"] > 0.75
    assert {now.stage for now in stages} == {"prepare", "train"}
    last = stages[-1]
    assert (last.done, last.step, last.seconds_left) == (1.0, 50, 0.0)
    files = sorted(file.name for file in (tmp_path / "model").iterdir() if file.is_file())
    assert files == [
        "MODEL_CARD.md", "fold_0.history.csv", "fold_0.progress.png", "fold_0.safetensors", "fold_0.scores.csv",
        "fold_0.scores.json", "plan.json", "train.json",
    ]  # fmt: skip
    history = list(csv.DictReader((tmp_path / "model/fold_0.history.csv").read_text().splitlines()))
    assert [row["step"] for row in history] == ["50"]
    written = json.loads((tmp_path / "model/fold_0.scores.json").read_text())
    assert written["mean"]["dice"] == pytest.approx(scores.mean["dice"])
    assert "| 0 | ball | 0." in (tmp_path / "model/MODEL_CARD.md").read_text()


def test_the_same_seed_gives_the_same_weights_and_another_does_not(balls, plan, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_model(balls, plan, tmp_path / name, budget="6steps", settings=TrainSettings(folds=3, seed=seed))
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    with pytest.raises(AssertionError):
        assert_same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(balls, plan, tmp_path):
    def stop_at_4(now: TrainProgress) -> None:
        if now.stage == "train" and now.step == 4:
            raise KeyboardInterrupt

    options = {"budget": "9steps", "settings": FAST}
    with pytest.raises(KeyboardInterrupt):
        train_model(balls, plan, tmp_path / "stopped", **options, progress=stop_at_4)
    assert (tmp_path / "stopped/fold_0.checkpoint").is_file()
    train_model(balls, plan, tmp_path / "stopped", **options)
    train_model(balls, plan, tmp_path / "straight", **options)
    assert_same(weights(tmp_path / "stopped"), weights(tmp_path / "straight"))
    assert not (tmp_path / "stopped/fold_0.checkpoint").exists()


def test_an_interrupt_after_the_last_step_is_one(balls, plan, tmp_path, monkeypatch):
    real = Watch.note

    def note(*given, look=False, last=False):
        real(*given, look=look, last=last)
        if last:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Watch, "note", note)
    with pytest.raises(KeyboardInterrupt):
        train_model(balls, plan, tmp_path, budget="1steps", settings=FAST)
    assert (tmp_path / "fold_0.checkpoint").is_file()
    monkeypatch.undo()
    train_model(balls, plan, tmp_path, budget="1steps", settings=FAST)
    assert (tmp_path / "fold_0.safetensors").is_file()


def test_a_model_can_begin_with_the_weights_of_another_of_other_labels(balls, plan, tmp_path):
    train_model(balls, plan, tmp_path / "first", budget="2steps", settings=FAST)
    twice = dataclasses.replace(balls, meaning=Meaning(make_labels([(1, "ball"), (2, "cube")])))
    further = plan_from(tmp_path / "first", twice)
    assert (further.labels, further.spacing_mm) == (twice.labels, plan.spacing_mm)
    state = new_state(further, FAST, torch.device("cpu"), tmp_path / "first/fold_0.safetensors")
    first, begun = weights(tmp_path / "first"), state_of(state.network)
    assert_same(*({name: t for name, t in of.items() if not name.startswith("outputs.")} for of in (first, begun)))
    assert len(begun["outputs.0.bias"]) == 3
    same = new_state(plan, FAST, torch.device("cpu"), tmp_path / "first/fold_0.safetensors")
    assert_same(first, state_of(same.network))
    sided = dataclasses.replace(balls, meaning=Meaning(make_labels([(1, "kidney left"), (2, "kidney right")])))
    mirrored = plan.model_copy(update={"mirror_axes": (0, 1), "keep_largest": ((1,),), "crf": CRF()})
    mirrored.save(tmp_path / "first/plan.json")
    assert plan_from(tmp_path / "first", twice).mirror_axes == (0, 1)
    assert plan_from(tmp_path / "first", sided).crf is None
    assert (plan_from(tmp_path / "first", sided).mirror_axes, plan_from(tmp_path / "first", sided).keep_largest) == (
        (),
        (),
    )
    with pytest.raises(ModelError, match="without its fingerprint"):
        plan_from(tmp_path / "first", dataclasses.replace(balls, channels=("T1", "T2")))
    (tmp_path / "first/fold_0.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        train_model(balls, plan, tmp_path / "second", budget="1steps", settings=FAST, start=tmp_path / "first")


def test_two_processes_train_as_one_with_twice_the_batch(balls, plan, tmp_path):
    root = balls.cases[0].images[0].parents[1]
    for name, batch in (("two", 1), ("one", 2)):
        (tmp_path / name).mkdir()
        plan.save(tmp_path / name / "plan.json")
        FAST.model_copy(update={"batch": batch}).save(tmp_path / name / "train.json")
    script = "import sys, torch; torch.set_num_threads(1); from medseg.train.loop import train_dataset\n"
    script += "print(len(train_dataset(sys.argv[1], sys.argv[2], budget='6steps', folds=3).cases))"
    (tmp_path / "train.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(tmp_path / "train.py"), str(root), str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["0", "2"]
    train_dataset(root, tmp_path / "one", budget="6steps", folds=3)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=2e-3)


def test_a_process_whose_others_have_ended_says_so_in_a_line(monkeypatch):
    def closed(*_: object) -> None:
        raise RuntimeError("[transport/tcp/pair.cc:553] Connection closed by peer")

    for name in ("barrier", "broadcast", "all_reduce"):
        monkeypatch.setattr(torch.distributed, name, closed)
    ranks, weight = Ranks(1, 2), torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    for share in (ranks.wait, lambda: ranks.agreed(1.0), lambda: ranks.average_gradients([weight])):
        with pytest.raises(ClusterError, match="Another process of this training has ended"):
            share()


def test_a_finished_fold_is_not_trained_again(balls, plan, tmp_path):
    train_model(balls, plan, tmp_path, budget="2steps", settings=FAST)
    before = (tmp_path / "fold_0.safetensors").stat().st_mtime_ns
    stages: list[str] = []
    train_model(balls, plan, tmp_path, budget="2steps", settings=FAST, progress=lambda now: stages.append(now.stage))
    assert (tmp_path / "fold_0.safetensors").stat().st_mtime_ns == before
    assert stages == []


def test_weights_that_were_trained_otherwise_are_not_validated(balls, plan, tmp_path):
    train_model(balls, plan, tmp_path, budget="2steps", settings=FAST)
    fewer = dataclasses.replace(balls, cases=tuple(case for case in balls if case is not balls.fold(0, 3)[0][0]))
    for dataset, budget in ((fewer, "2steps"), (balls, "3steps")):
        with pytest.raises(ModelError, match="trained before, otherwise") as refused:
            train_model(dataset, plan, tmp_path, budget=budget, settings=FAST)
        assert (refused.value.reason, refused.value.path) == ("trained", tmp_path / "fold_0.safetensors")
    save_weights(Model.load(tmp_path).networks[0], tmp_path / "fold_0.safetensors")  # as an imported model has them
    with pytest.raises(ModelError, match="trained before"):
        train_model(balls, plan, tmp_path, budget="2steps", settings=FAST)
    (tmp_path / "fold_0.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match="weights cannot be read"):
        train_model(balls, plan, tmp_path, budget="2steps", settings=FAST)


def test_weights_of_another_content_of_the_training_cases_are_not_validated(plan, tmp_path):
    root = make_balls(tmp_path / "balls")
    cases = read_dataset(root)
    train_model(cases, plan, tmp_path / "model", budget="1steps", settings=FAST)
    training, validation = cases.fold(0, 3)
    image = load(validation[0].images[0])
    save(image.with_array(image.array + 1), validation[0].images[0])
    train_model(cases, plan, tmp_path / "model", budget="1steps", settings=FAST)
    save(load(training[0].label).with_array(load(training[1].label).array), training[0].label)
    with pytest.raises(ModelError, match="trained before"):
        train_model(cases, plan, tmp_path / "model", budget="1steps", settings=FAST)
    training[0].label.unlink()
    with pytest.raises(UnreadableFile) as missing:
        train_model(cases, plan, tmp_path / "model", budget="1steps", settings=FAST)
    assert missing.value.path == training[0].label


def test_the_number_of_folds_is_what_train_json_says(balls, plan, tmp_path):
    root, folder = balls.cases[0].label.parents[1], tmp_path / "model"
    folder.mkdir()
    plan.save(folder / "plan.json")
    (folder / "train.json").write_text('{"batch": 1}')
    assert len(train_dataset(root, folder, budget="1steps", folds=3).cases) == 2
    assert (TrainSettings.load(folder / "train.json").folds, TrainSettings.load(folder / "train.json").batch) == (3, 1)
    assert len(train_dataset(root, folder, budget="1steps").cases) == 2
    with pytest.raises(ModelError, match=r"another train\.json"):
        train_dataset(root, folder, budget="1steps", folds=2)


def test_a_plan_that_another_process_made_meanwhile_is_followed(balls, plan, tmp_path, monkeypatch):
    def slow(*_):
        plan.model_copy(update={"name": "the other's"}).save(tmp_path / "plan.json")
        return plan

    monkeypatch.setattr(loop, "make_plan", slow)
    _, followed = loop.plan_dataset(balls.cases[0].label.parents[1], tmp_path)
    assert followed.name == "the other's"


def test_a_fold_is_validated_without_the_folds_that_have_seen_its_cases(balls, plan, tmp_path):
    for fold in (0, 1):
        model = train_model(balls, plan, tmp_path, budget="1steps", fold=fold, settings=FAST)
        assert len(model.networks) == 1
    assert len(Model.load(tmp_path).networks) == 2


def test_sigkill_costs_at_most_the_time_between_checkpoints(balls, plan, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    plan.save(folder / "plan.json")
    FAST.save(folder / "train.json")
    dataset = balls.cases[0].label.parent.parent
    code = (
        "import sys, torch, medseg.train.loop as loop, medseg.train.run as run\n"
        "run.CHECKPOINT_S = 0.0; torch.set_num_threads(1)\n"
        "loop.train_dataset(sys.argv[1], sys.argv[2], budget='12steps', folds=3)"
    )
    command = [sys.executable, "-c", code, str(dataset), str(folder)]
    process = subprocess.Popen(command)
    checkpoint = folder / "fold_0.checkpoint"
    while not checkpoint.is_file():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = new_state(plan, FAST, torch.device("cpu"))
    training, _ = balls.fold(0, FAST.folds)
    state.load(checkpoint, loop.recipe_of(plan, FAST, Budget.parse("12steps"), training, folder / "cache"))
    assert 1 <= state.step < 12
    seen: list[int] = []
    train_dataset(dataset, folder, budget="12steps", folds=3, progress=lambda now: seen.append(now.step))
    assert seen[seen.index(state.step + 1)] == state.step + 1  # the next step, not the first
    assert 1 not in seen
    assert_same(weights(folder), weights_of_straight_run(balls, plan, tmp_path / "straight"))


def weights_of_straight_run(balls, plan, folder):
    train_model(balls, plan, folder, budget="12steps", settings=FAST)
    return weights(folder)


def test_a_plan_in_the_folder_is_followed_and_another_refused(balls, plan, tmp_path):
    edited = plan.model_copy(update={"name": "edited by hand"})
    tmp_path.joinpath("model").mkdir()
    edited.save(tmp_path / "model/plan.json")
    FAST.save(tmp_path / "model/train.json")
    train_dataset(balls.cases[0].label.parent.parent, tmp_path / "model", budget="1steps", folds=3)
    assert Plan.load(tmp_path / "model/plan.json").name == "edited by hand"
    with pytest.raises(ModelError, match=r"another plan.json: .*Train into another folder"):
        train_model(balls, plan, tmp_path / "model", budget="1steps", settings=FAST)


def test_a_checkpoint_of_another_recipe_or_a_damaged_one_is_refused(balls, plan, tmp_path):
    state = new_state(plan, FAST, torch.device("cpu"))
    state.save(tmp_path / "fold_0.checkpoint", "another")
    with pytest.raises(ModelError, match="was stopped is another one"):
        train_model(balls, plan, tmp_path, budget="3steps", settings=FAST)
    (tmp_path / "fold_0.checkpoint").write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match="cannot be read. Delete it"):
        train_model(balls, plan, tmp_path, budget="3steps", settings=FAST)


@pytest.mark.parametrize(
    "numbers",
    ["[" * 10**5, "[]", "{}", '{"recipe": "one"}', '{"recipe": "one", "step": [], "seconds": 1, "history": []}', "nan"],
    ids=["deep", "list", "empty", "without a step", "step", "word"],
)
def test_a_checkpoint_whose_numbers_are_damaged_is_refused(plan, tmp_path, numbers):
    state = new_state(plan, FAST, torch.device("cpu"))
    (tmp_path / "damaged").write_bytes(safetensors.torch.save({"network.a": torch.zeros(1)}, {"state": numbers}))
    with pytest.raises(ModelError, match="cannot be read. Delete it"):
        state.load(tmp_path / "damaged", "one")
    assert state.step == 0


def test_a_checkpoint_that_is_a_pipe_is_refused(plan, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="cannot be read. Delete it"):
        new_state(plan, FAST, torch.device("cpu")).load(tmp_path / "pipe", "one")


def test_a_training_goes_on_with_half_precision_on_another_device(plan, tmp_path):
    # By default float32 on a CPU, and float16, which needs gradients scaled, on some GPUs: one recipe for both.
    half = FAST.model_copy(update={"precision": "float16"})
    scaled, plain = (new_state(plan, settings, torch.device("cpu")) for settings in (half, FAST))
    plain.step = 7
    plain.save(tmp_path / "plain", "one")
    scaled.load(tmp_path / "plain", "one")
    assert scaled.step == 7
    scaled.save(tmp_path / "scaled", "one")
    plain.load(tmp_path / "scaled", "one")


def test_what_is_begun_with_another_model_is_another_training(balls, plan, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for seed, folder in enumerate((first, second)):
        folder.mkdir()
        plan.save(folder / "plan.json")
        settings = FAST.model_copy(update={"seed": seed})
        save_weights(new_state(plan, settings, torch.device("cpu")).network, folder / "fold_0.safetensors")
    options = {"budget": "1steps", "settings": FAST}
    train_model(balls, plan, tmp_path / "model", **options, start=first)
    train_model(balls, plan, tmp_path / "model", **options, start=first)
    for other in (second, None):
        with pytest.raises(ModelError, match="trained before, otherwise"):
            train_model(balls, plan, tmp_path / "model", **options, start=other)


def test_folds_that_cannot_be_are_not_written_down(balls, plan, tmp_path):
    root, folder = balls.cases[0].label.parents[1], tmp_path / "model"
    folder.mkdir()
    plan.save(folder / "plan.json")
    (folder / "train.json").write_text('{"batch": 1}')
    with pytest.raises(DatasetError, match="cannot be made from 6 cases.*fewer folds"):
        train_dataset(root, folder, budget="1steps", folds=7)
    assert (folder / "train.json").read_text() == '{"batch": 1}'
    train_dataset(root, folder, budget="1steps")
    with pytest.raises(ModelError, match=r"another train\.json"):
        train_dataset(root, folder, budget="1steps", folds=3)
    assert (folder / "train.json").read_text() == '{"batch": 1}'


def test_a_training_that_diverges_says_so(balls, plan, tmp_path):
    settings = FAST.model_copy(update={"learning_rate": 1e30, "gradient_norm": 1e30})
    with pytest.raises(ModelError, match="The training diverged: the loss is nan at step"):
        train_model(balls, plan, tmp_path, budget="20steps", settings=settings)


def test_a_model_folder_that_cannot_be_made_is_said_so(balls, plan, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="model folder cannot be made"):
        train_model(balls, plan, tmp_path / "file" / "model", budget="1steps", settings=FAST)


def test_a_time_budget_ends_in_time_and_the_learning_rate_with_it(balls, plan, tmp_path, monkeypatch):
    seconds = itertools.count()  # each look at the clock is a second later, so a step takes one
    monkeypatch.setattr("medseg.train.optimize.time.monotonic", lambda: float(next(seconds)))
    training, _ = balls.fold(0, 3)
    sampler = Sampler(prepare_cases(training, plan, tmp_path), plan, 1, 0.5)
    state = new_state(plan, FAST, torch.device("cpu"))
    for _ in optimize(state, sampler, FAST, Budget(seconds=4.0)):
        pass
    assert (state.step, state.seconds) == (4, 4.0)
    assert state.optimizer.param_groups[0]["lr"] == FAST.learning_rate * schedule(0.75, FAST.warmup)


def test_prepared_cases_are_kept_and_made_anew_when_a_file_changes(balls, plan, tmp_path):
    folder = make_balls(tmp_path / "balls", cases=2, shape=(8, 8, 8))
    cases = read_dataset(folder).cases
    prepare_cases(cases, plan, tmp_path / "cache")
    first = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    prepare_cases(cases, plan, tmp_path / "cache")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == first
    cases[0].label.touch()
    moved = shutil.copytree(folder, tmp_path / "moved")
    prepare_cases([*cases, *read_dataset(moved)], plan, tmp_path / "cache")
    assert {file.name for file in (tmp_path / "cache").iterdir()} == {file.name for file in first}
    labels = load(cases[0].label)
    save(labels.with_array(1 - labels.array), cases[0].label)
    prepare_cases(cases, plan, tmp_path / "cache")
    assert (
        len(list((tmp_path / "cache").iterdir())) == len(first) + 4
    )  # image, target, places and lost parts of one case


def test_a_prepared_file_that_was_cut_short_is_made_again(balls, plan, tmp_path):
    whole = prepare_cases(balls.cases[:1], plan, tmp_path)[0].image[:]
    image = next(tmp_path.glob("*.image.b2nd"))
    image.write_bytes(image.read_bytes()[:-100])
    np.testing.assert_array_equal(prepare_cases(balls.cases[:1], plan, tmp_path)[0].image[:], whole)


def test_a_prepared_file_that_would_compute_something_is_made_again_and_computes_nothing(balls, plan, tmp_path):
    whole = prepare_cases(balls.cases[:1], plan, tmp_path)[0].target[:]
    target = next(tmp_path.glob("*.target.b2nd"))
    for name in "ab":
        blosc2.zeros(whole.shape, urlpath=str(tmp_path / f"{name}.b2nd"), mode="w")
    a, b = (blosc2.open(str(tmp_path / f"{name}.b2nd")) for name in "ab")
    (a + b).save(urlpath=str(target), mode="w")
    assert isinstance(blosc2.open(str(target), deserialize="full"), blosc2.LazyArray)
    np.testing.assert_array_equal(prepare_cases(balls.cases[:1], plan, tmp_path)[0].target[:], whole)
    blosc2.SChunk(data=bytes(100), urlpath=str(target), mode="w")  # no array
    np.testing.assert_array_equal(prepare_cases(balls.cases[:1], plan, tmp_path)[0].target[:], whole)


def test_a_patch_is_read_alike_from_chunks_and_from_memory(balls, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CHUNKS", 9)
    monkeypatch.setattr(cache, "BLOCKS", 4)
    kept = prepare_cases(balls.cases[:2], plan, tmp_path)
    found = blosc2.open(str(kept[0].image.file))
    assert (found.shape, found.chunks, found.blocks) == ((1, 16, 18, 12), (1, 8, 9, 6), (1, 4, 3, 3))
    memory = [dataclasses.replace(case, image=case.image[:], target=case.target[:]) for case in kept]
    for step in range(5):
        for a, b in zip(*(Sampler(cases, plan, 7, 0.5).batch(step, [0]) for cases in (kept, memory)), strict=True):
            assert a is b is None or torch.equal(a, b)


def test_places_to_center_patches_on_are_of_their_class_and_keep_no_file_open(balls, plan, tmp_path):
    cases = prepare_cases(balls.cases[:3], plan, tmp_path)
    for case in cases:
        target = case.target[:]
        rows = [tuple(case.places[1][row]) for row in range(len(case.places[1]))]
        assert sorted(rows) == [tuple(index) for index in np.argwhere(target == 1)]
    maps = Path("/proc/self/maps")  # on Linux
    assert not maps.exists() or str(tmp_path) not in maps.read_text()  # thousands of cases would be too many files


def test_a_case_that_cannot_be_prepared_is_named(balls, plan, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    broken = dataclasses.replace(balls.cases[1], label=tmp_path / "away.nii.gz")
    with pytest.raises(DatasetError, match="case_1 could not be prepared: FileNotFoundError"):
        prepare_cases([broken], plan, tmp_path)
    channels = plan.model_copy(update={"channels": plan.channels * 2})
    with pytest.raises(DatasetError, match="case_0 could not be prepared: The model needs 2 channel"):
        prepare_cases(balls.cases[:1], channels, tmp_path)
    monkeypatch.setattr(cache, "prepare", fail)
    with pytest.raises(DatasetError, match="case_0 could not be prepared: MemoryError"):
        prepare_cases(balls.cases[:1], plan, tmp_path / "new")


def test_a_case_that_no_patch_can_be_drawn_from_is_named(balls, plan, tmp_path):
    case = prepare_cases(balls.cases[:1], plan, tmp_path)[0]
    broken = dataclasses.replace(case, target=case.target[0])
    with pytest.raises(DatasetError, match="No patch could be drawn from case_0"):
        for step in range(50):
            Sampler([broken], plan, 1, 0.5).batch(step, [0])


def test_an_organ_that_was_not_drawn_is_never_asked_for(balls, plan, tmp_path):
    case = dataclasses.replace(balls.cases[0], undrawn=frozenset({1}))
    prepared = prepare_cases([case], plan, tmp_path)[0]
    assert prepared.places == {}
    assert not prepared.target[:].any()  # though the file has it: it is not known there
    assert prepared.known.tolist() == [True, False]


def test_patches_are_a_function_of_seed_step_and_sample(balls, plan, tmp_path):
    prepared = prepare_cases(balls.cases, plan, tmp_path)
    sampler = Sampler(prepared, plan, 7, 1.0)
    again = Sampler(prepared, plan, 7, 1.0)
    again.batch(3, [0])  # what was drawn before does not matter
    image = sampler.batch(5, [1]).images
    assert torch.equal(image, again.batch(5, [1]).images)
    # What is drawn beside it changes it by no more than rounding does.
    torch.testing.assert_close(image[0], sampler.batch(5, [0, 1, 2]).images[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(sampler.batch(5, [1]).target[0], sampler.batch(5, [0, 1, 2]).target[1])
    assert not torch.equal(image, sampler.batch(5, [0]).images)
    assert not torch.equal(image, Sampler(prepared, plan, 8, 1.0).batch(5, [1]).images)


def test_patches_that_ask_for_foreground_have_it_and_keep_image_and_target_together(balls, plan, tmp_path):
    sampler = Sampler(
        prepare_cases(balls.cases, plan, tmp_path), plan.model_copy(update={"mirror_axes": (0, 1, 2)}), 3, 1.0
    )
    for step in range(20):
        image, target = (part[0] for part in sampler.batch(step, [0])[:2])
        assert image.shape == (1, *plan.patch)
        assert target.shape == (1, *plan.patch)
        inside = target[0] == 1
        assert inside.any()
        # Normalized by its own mean and deviation, a ball is about two deviations brighter than the rest of the image.
        assert image[0][inside].mean() > image[0][~inside].mean() + 1


def test_a_patch_that_is_not_turned_is_the_image_itself(balls, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(Sampler, "_warp", lambda *_: np.eye(3))
    case = prepare_cases(balls.cases[:1], plan, tmp_path)[0]
    small = plan.model_copy(update={"patch": (8, 8, 8)})
    image, target = (part[0] for part in Sampler([case], small, 3, 0.0).batch(0, [0])[:2])
    found = [
        start
        for start in np.ndindex(*(size - 7 for size in case.target.shape))
        if np.array_equal(case.target[tuple(slice(s, s + 8) for s in start)], target[0].numpy())
        and np.allclose(case.image[0][tuple(slice(s, s + 8) for s in start)], image[0].numpy(), atol=1e-4)
    ]
    assert len(found) == 1


def test_the_learning_rate_rises_and_falls_to_nothing():
    assert schedule(0.05, 0.05) == 1
    assert schedule(0.025, 0.05) == pytest.approx(0.5)
    assert schedule(0.525, 0.05) == pytest.approx(0.5)
    assert schedule(1.0, 0.05) == pytest.approx(0)
    assert 0 < schedule(0, 0.05) < 0.05


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", Budget(seconds=90)), ("30m", Budget(seconds=1800)), ("1.5h", Budget(seconds=5400)),
        ("500steps", Budget(steps=500)), ("1step", Budget(steps=1)), ("2epochs", Budget(steps=500)),
    ],
)  # fmt: skip
def test_budgets_in_words(text, expected):
    assert Budget.parse(text) == expected


@pytest.mark.parametrize("text", ["", "30", "0m", "-5m", "soon", "5 days"])
def test_a_budget_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="such as 30m, 8h, 20epochs or 500steps"):
        Budget.parse(text)


def test_settings_are_checked(tmp_path):
    with pytest.raises(ModelError, match="is missing"):
        TrainSettings.load(tmp_path / "train.json")
    (tmp_path / "train.json").write_text('{"batch": 0}')
    with pytest.raises(ModelError, match="batch: Input should be greater than or equal to 1"):
        TrainSettings.load(tmp_path / "train.json")


def test_label_files_of_a_trained_model_lie_where_the_image_does(balls, plan, tmp_path):
    model = train_model(balls, plan, tmp_path, budget="1steps", settings=FAST)
    image = load(balls.cases[2].images[0])
    assert model.segment(image).grid.matches(image.grid)
    assert isinstance(new_state(plan, FAST, torch.device("cpu")), TrainState)


def test_a_plan_with_other_channels_than_the_dataset_is_not_trained(balls, plan, tmp_path):
    with pytest.raises(ModelError, match=r"The plan has 1 channel\(s\), the dataset 2. Make the plan anew"):
        train_model(dataclasses.replace(balls, channels=("T1", "T2")), plan, tmp_path, budget="1steps", settings=FAST)


def test_a_plan_with_other_regions_than_the_dataset_is_not_trained(balls, plan, tmp_path):
    regions = (Region(name="all", members=(1,), value=1),)
    with pytest.raises(ModelError, match="different labels or regions"):
        train_model(balls, plan.model_copy(update={"regions": regions}), tmp_path / "model", budget="1steps")
    assert not (tmp_path / "model").exists()
