"""Trainings on all cases, on one case, on a longer budget, and with the weights of another model."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
import torch
from datasets import make_balls, small_plan

from medseg.errors import DatasetError, ModelError, UsageError
from medseg.model.segmenter import Model
from medseg.model.weights import recipe_in, state_of
from medseg.train.begin import warn_of_seen, weights_to_begin_with
from medseg.train.dataset import read_dataset
from medseg.train.fingerprint import fingerprint
from medseg.train.loop import train_dataset, train_model
from medseg.train.run import TrainProgress
from medseg.train.settings import TrainSettings

FAST = TrainSettings(folds=3)


@pytest.fixture(scope="module")
def plan(balls):
    return small_plan(balls)


@pytest.fixture(scope="module")
def whole(balls, plan, tmp_path_factory):
    """A model that was trained on all cases, in the folder of a fold."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    train_model(balls, plan, folder, budget="2steps", settings=FAST)
    train_model(balls, plan, folder, budget="3steps", fold="none", settings=FAST)
    return folder


def stopper(step):
    def stop(now: TrainProgress) -> None:
        if now.stage == "train" and now.step == step:
            raise KeyboardInterrupt

    return stop


def rates(folder, fold=0):
    rows = csv.DictReader((folder / f"fold_{fold}.history.csv").read_text().splitlines())
    return {int(row["step"]): float(row["learning_rate"]) for row in rows}


def test_without_a_fold_all_cases_train_and_nothing_is_looked_at(balls, whole):
    recipe = json.loads(recipe_in(whole / "fold_none.safetensors"))
    assert recipe["training cases"] == len(balls) == 6
    header = (whole / "fold_none.history.csv").read_text().splitlines()[0]
    assert header == "step,seconds,loss,learning_rate,steps_per_s"
    assert "validation_loss" in (whole / "fold_0.history.csv").read_text()
    assert (whole / "fold_none.progress.png").is_file()
    assert not (whole / "fold_none.checkpoint").exists()


def test_weights_of_all_cases_count_as_one_more_fold_or_answer_alone(whole):
    assert len(Model.load(whole).networks) == 2
    alone = Model.load(whole, folds=("none",))
    assert len(alone.networks) == 1
    fold = state_of(Model.load(whole, folds=(0,)).networks[0])
    assert any(not torch.equal(tensor, fold[name]) for name, tensor in state_of(alone.networks[0]).items())


def test_folds_are_drawn_and_scored_as_if_no_weights_of_all_cases_were_there(balls, whole):
    assert balls.fold("none") == (balls.cases, ())
    assert len(balls.fold(0, 3)[1]) == 2
    one_fold = dataclasses.replace(balls, splits=((frozenset({"case_0"}), frozenset({"case_1"})),))
    assert one_fold.fold("none")[0] == balls.cases


def test_training_on_all_cases_is_done_once_goes_on_and_is_told_in_the_card(balls, plan, tmp_path):
    root, folder = balls.cases[0].label.parents[1], tmp_path / "model"
    folder.mkdir()
    plan.save(folder / "plan.json")
    with pytest.raises(KeyboardInterrupt):
        train_dataset(root, folder, budget="4steps", fold="none", progress=stopper(2))
    assert (folder / "fold_none.checkpoint").is_file()
    stages: list[TrainProgress] = []
    scores = train_dataset(root, folder, budget="4steps", fold="none", progress=stages.append)
    assert scores.cases == ()
    assert min(now.step for now in stages if now.stage == "train") == 3
    assert "validate" not in {now.stage for now in stages}
    assert "| none | no case was kept aside" in (folder / "MODEL_CARD.md").read_text()
    assert not list(folder.glob("*scores*"))
    written = (folder / "fold_none.safetensors").stat().st_mtime_ns
    (folder / "train.json").unlink()  # another number of folds is nothing to these weights
    train_dataset(root, folder, budget="4steps", fold="none", folds=2)
    assert (folder / "fold_none.safetensors").stat().st_mtime_ns == written
    assert len(train_dataset(root, folder, budget="1steps", fold=1).cases) == 3
    card = (folder / "MODEL_CARD.md").read_text()
    assert "| 1 | ball |" in card
    assert card.count("| none |") == 1


def test_one_case_can_be_trained_on_without_a_fold_alone(tmp_path):
    root = make_balls(tmp_path / "balls", cases=1)
    for folds in (None, 1, 2):
        with pytest.raises(DatasetError, match="At least two cases.*--fold none") as refused:
            train_dataset(root, tmp_path / "model", budget="1steps", folds=folds)
        assert refused.value.reason == "folds"
    assert train_dataset(root, tmp_path / "model", budget="1steps", fold="none", folds=2).cases == ()
    assert len(Model.load(tmp_path / "model").networks) == 1


def test_early_stopping_without_cases_to_look_at_is_refused(balls, plan, tmp_path):
    settings = FAST.model_copy(update={"early_stop": 0.3})
    with pytest.raises(ModelError, match="no case is kept aside") as refused:
        train_model(balls, plan, tmp_path, budget="1steps", fold="none", settings=settings)
    assert refused.value.reason == "early_stop"


@pytest.mark.parametrize("word", [None, "some", "0"])
def test_a_fold_that_is_none_is_refused(balls, tmp_path, word):
    with pytest.raises(UsageError, match='"all" or "none"'):
        train_dataset(balls.cases[0].label.parents[1], tmp_path, budget="1steps", fold=word)


def test_a_training_that_was_stopped_goes_on_to_a_longer_budget_and_says_so(balls, plan, tmp_path):
    def train(budget, **options):
        return train_model(balls, plan, tmp_path, budget=budget, settings=FAST, **options)

    with pytest.raises(KeyboardInterrupt):
        train("4steps", progress=stopper(2))
    for other in ("3steps", "1h"):
        with pytest.raises(ModelError, match=r"budget.*was .*or a longer budget of the same kind"):
            train(other)
    with (
        pytest.warns(UserWarning, match="stopped at step 2 of a budget of 4 steps and goes on to 50 steps"),
        pytest.raises(KeyboardInterrupt),
    ):
        train("50steps", progress=stopper(3))
    train("50steps")  # of what was said before, no word: warnings are errors here
    recipe = json.loads(recipe_in(tmp_path / "fold_0.safetensors"))
    assert recipe["budget"] == {"steps": 50}
    assert recipe["earlier budgets"] == [{"steps": 4, "until_step": 2}]
    train("50steps")
    with pytest.raises(ModelError, match=r"budget steps was 50 and is 60\. .*--from this model"):
        train("60steps")


def test_from_there_on_the_learning_rate_is_that_of_the_longer_budget(balls, plan, tmp_path):
    options = {"settings": FAST}
    with pytest.raises(KeyboardInterrupt):
        train_model(balls, plan, tmp_path / "longer", budget="60steps", **options, progress=stopper(2))
    with pytest.warns(UserWarning, match="longer budget"):
        train_model(balls, plan, tmp_path / "longer", budget="100steps", **options)
    train_model(balls, plan, tmp_path / "straight", budget="100steps", **options)
    assert rates(tmp_path / "longer") == pytest.approx(rates(tmp_path / "straight"))


def test_a_fold_begins_with_the_weights_that_have_not_seen_what_it_keeps_aside(balls, plan, tmp_path):
    first = tmp_path / "first"
    for fold in (0, 1, "none"):
        train_model(balls, plan, first, budget="1steps", fold=fold, settings=FAST)
    names = [weights_to_begin_with(first, fold).name for fold in (0, 1, 2, "none")]
    assert names == [f"fold_{fold}.safetensors" for fold in (0, 1, 0, "none")]
    warn_of_seen(first, balls, 2, 3)  # what it was trained on is not known: no fingerprint
    fingerprint(balls).save(first / "fingerprint.json")
    for fold, folds in ((0, 3), (1, 3), ("none", 3)):
        warn_of_seen(first, balls, fold, folds)
    for fold, folds in ((2, 3), (0, 2)):
        with pytest.warns(UserWarning, match="will flatter"):
            warn_of_seen(first, balls, fold, folds)
    warn_of_seen(first, dataclasses.replace(balls, cases=balls.cases[:2]), 2, 3)
    with pytest.warns(UserWarning, match="will flatter"):
        train_model(balls, plan, tmp_path / "second", budget="1steps", fold=2, settings=FAST, start=first)


def test_a_list_of_folds_says_nothing_of_a_training_on_all_cases(tmp_path):
    root = make_balls(tmp_path / "balls", cases=3, shape=(10, 12, 10))
    (root / "splits_final.json").write_text('[{"train": ["case_0"], "val": ["case_1"]}]')
    with pytest.warns(UserWarning, match="no fold uses them: case_2"):
        assert len(read_dataset(root).fold("none")[0]) == 3
