"""Cross-validation: every case scored by the fold that has not seen it, and the clean-up that this speaks for."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import make_balls, make_shells, small_plan

from medseg.errors import InputError, ModelError
from medseg.io import load, save
from medseg.labels import make_labels
from medseg.model.plan import Plan
from medseg.model.segmenter import Model
from medseg.report.metrics import evaluate_folder
from medseg.train.card import write_card
from medseg.train.dataset import read_dataset
from medseg.train.dataset_json import read_meaning
from medseg.train.evaluate import evaluate
from medseg.train.loop import train_dataset, train_model
from medseg.train.postprocess import choose_largest
from medseg.train.run import TrainProgress
from medseg.train.settings import TrainSettings
from medseg.train.validate import cross_validate, is_scored, load_prediction, validate_fold

FAST = TrainSettings(folds=3)


@pytest.fixture(scope="module")
def plan(balls):
    return small_plan(balls)


@pytest.fixture(scope="module")
def crossed(balls, plan, tmp_path_factory):
    """A cross-validation of all folds, interrupted in the second one and begun again."""
    folder = tmp_path_factory.mktemp("model") / "model"
    folder.mkdir()
    plan.save(folder / "plan.json")

    def stop(now: TrainProgress) -> None:
        if now.fold == 1 and now.step == 2:
            raise KeyboardInterrupt

    root = balls.cases[0].label.parents[1]
    with pytest.raises(KeyboardInterrupt):
        train_dataset(root, folder, budget="20steps", fold="all", folds=3, progress=stop)
    written = (folder / "fold_0.safetensors").stat().st_mtime_ns
    seen: list[TrainProgress] = []
    scores = train_dataset(root, folder, budget="20steps", fold="all", folds=3, progress=seen.append)
    assert (folder / "fold_0.safetensors").stat().st_mtime_ns == written
    assert min(now.step for now in seen if now.stage == "train" and now.fold == 1) == 3
    return folder, scores


def test_every_case_is_scored_once_by_the_fold_that_has_not_seen_it(balls, crossed):
    folder, scores = crossed
    assert sorted(case.name for case in scores.cases) == [case.name for case in balls]
    written = json.loads((folder / "scores.json").read_text())
    assert written["mean"]["dice"] == pytest.approx(scores.mean["dice"])
    assert len(list(csv.DictReader((folder / "scores.csv").read_text().splitlines()))) == 6
    for fold in range(3):
        model = Model.load(folder, folds=(fold,))
        for case in balls.fold(fold, 3)[1]:
            kept = load(folder / f"validation/fold_{fold}/{case.name}.nii.gz")
            raw = model.plan.model_copy(update={"keep_largest": ()})
            model.plan = raw
            np.testing.assert_array_equal(kept.array, model.segment(load(case.images[0])).array)


def test_what_may_be_shared_names_no_case_and_validation_does(balls, crossed):
    folder, scores = crossed
    shared = [file for file in folder.iterdir() if file.is_file()]
    assert {"scores.csv", "scores.json", "fold_0.scores.csv", "MODEL_CARD.md"} <= {file.name for file in shared}
    for file in shared:
        assert not [case.name for case in balls if case.name.encode() in file.read_bytes()], file.name
    named, numbered = (json.loads((where / "scores.json").read_text()) for where in (folder / "validation", folder))
    assert [case["case"] for case in named["cases"]] == [case.name for case in scores.cases]
    assert [case["case"] for case in numbered["cases"]] == [f"case {n}" for n in range(1, len(scores.cases) + 1)]
    assert [case["labels"] for case in named["cases"]] == [case["labels"] for case in numbered["cases"]]
    assert named["labels"] == numbered["labels"]


def test_what_is_done_is_not_done_again(balls, crossed, monkeypatch):
    folder, scores = crossed
    monkeypatch.setattr(Model, "segment", None)
    assert cross_validate(balls, folder).mean["dice"] == pytest.approx(scores.mean["dice"])


def test_the_choice_is_stored_in_the_plan_and_told(crossed):
    folder, _ = crossed
    tried = json.loads((folder / "scores.json").read_text())["postprocessing"]
    assert [one["largest_piece_of"] for one in tried] == [["ball"]]
    assert bool(Plan.load(folder / "plan.json").keep_largest) == tried[0]["kept"]
    assert tried[0]["kept"] == (tried[0]["dice_after"] > tried[0]["dice_before"])


def test_folds_that_are_not_trained_are_named(balls, plan, tmp_path):
    train_model(balls, plan, tmp_path, budget="1steps", fold=1, settings=FAST)
    with pytest.raises(ModelError, match="not trained: 0, 2"):
        cross_validate(balls, tmp_path)


def test_folds_answer_together_by_the_mean_of_their_logits(balls, crossed):
    folder, _ = crossed
    from medseg.model.preprocess import prepare

    model = Model.load(folder, runtime="torch")
    prepared = prepare(load(balls.cases[0].images[0]), model.plan)
    alone = [Model.load(folder, runtime="torch", folds=(fold,)).logits(prepared) for fold in range(3)]
    torch.testing.assert_close(model.logits(prepared), torch.stack(alone).mean(dim=0), atol=1e-4, rtol=1e-4)


def test_pictures_of_the_worst_and_the_middle_case_lie_beside_the_label_maps(crossed):
    folder, _ = crossed
    names = {file.name for file in (folder / "validation").glob("fold_0.*.png")}
    assert names == {f"fold_0.{case}.{kind}.png" for case in ("worst", "middle") for kind in ("found", "reference")}


def test_a_case_that_cannot_be_segmented_has_failed(balls, plan, tmp_path, monkeypatch):
    model = train_model(balls, plan, tmp_path, budget="1steps", settings=FAST)
    segment, name = Model.segment, balls.fold(0, 3)[1][0].name

    def fail_once(self, volume, **options):
        if volume.grid.matches(load(balls.fold(0, 3)[1][0].images[0]).grid):
            raise InputError("The scan is too dark.", reason="dark")
        return segment(self, volume, **options)

    monkeypatch.setattr(Model, "segment", fail_once)
    for scores in (validate_fold(model, balls, tmp_path), evaluate(model, balls.fold(0, 3)[1])):
        (failed,) = scores.failed
        assert (failed.name, failed.failure, failed.labels[0].dice) == (name, "dark", 0.0)
        assert len(scores.cases) == 2


def written_cases(dataset, folder, change):
    """Return cases with files of their own labels, each changed by a function of (place, values)."""
    folder.mkdir()
    pairs = []
    for place, case in enumerate(dataset):
        labels = load(case.label)
        file = folder / f"{case.name}.nii.gz"
        save(labels.with_array(change(place, labels.array.copy())), file)
        pairs.append((case, file))
    return pairs


def with_speck(place, values):
    values[0, 0, 0, 0] = 1
    return values


def halved(place, values):
    middle = np.argwhere(values[0] > 0)[:, 0].mean()
    values[0, int(middle)] = 0
    return values


def test_the_largest_piece_is_kept_where_that_is_better_and_not_where_it_is_worse(balls, plan, tmp_path):
    groups, tried = choose_largest(written_cases(balls, tmp_path / "a", with_speck), plan, load_prediction)
    assert groups == ((1,),)
    assert (tried[0]["kept"], tried[0]["dice_after"]) == (True, 1.0)
    groups, tried = choose_largest(written_cases(balls, tmp_path / "b", halved), plan, load_prediction)
    assert groups == ()
    assert tried[0]["dice_after"] < tried[0]["dice_before"] < 1


@pytest.mark.parametrize("regions", [False, True])
def test_each_label_is_tried_by_itself_too(tmp_path, regions):
    dataset = read_dataset(make_shells(tmp_path / "shells", regions=regions, cases=3))
    plan = small_plan(dataset)

    def specks(place, values):
        values[0, 0, 0, 0] = 2  # of the core alone; a piece of all labels taken together as well
        return halved(place, values)

    pairs = written_cases(dataset, tmp_path / "found", specks)
    _, tried = choose_largest(pairs, plan, load_prediction)
    names = ["ball", "core"] if regions else ["shell", "core"]
    assert [one["largest_piece_of"] for one in tried] == [names, names[:1], names[1:]]
    # What is tried alone has the Dice that evaluating changed files gives.
    from medseg.process.cleanup import keep_largest_piece

    for row, group in zip(tried[1:], [(1, 2) if regions else (1,), (2,)], strict=True):
        (tmp_path / f"only{group}").mkdir()
        for case, file in pairs:
            labels = load(file)
            array = labels.array.copy()
            if tried[0]["kept"]:
                keep_largest_piece(array[0], (1, 2))
            keep_largest_piece(array[0], group)
            save(labels.with_array(array), tmp_path / f"only{group}" / f"{case.name}.nii.gz")
        scores = evaluate_folder(
            tmp_path / f"only{group}", tmp_path / "shells/labels", dataset.labels, members=dataset.meaning.members
        )
        assert row["dice_after"] == pytest.approx(scores.label_means[group[-1] if len(group) == 1 else 1]["dice"])


def test_a_missing_label_map_counts_as_one_in_which_nothing_was_found(balls, plan, tmp_path):
    pairs = written_cases(balls, tmp_path / "a", with_speck)
    pairs[0][1].unlink()
    _, tried = choose_largest(pairs, plan, load_prediction)
    assert tried[0]["dice_after"] == pytest.approx(5 / 6)


def test_ignored_voxels_do_not_speak_for_or_against_a_clean_up(balls, plan, tmp_path):
    root = make_balls(tmp_path / "balls", cases=2, shape=(16, 18, 14))
    for file in (root / "labels").iterdir():
        labels = load(file)
        values = labels.array.copy()
        values[0, :3] = 9
        save(labels.with_array(values), file)
    content = json.loads((root / "dataset.json").read_text())
    content["labels"]["ignore"] = 9
    (root / "dataset.json").write_text(json.dumps(content))
    dataset = read_dataset(root)

    def speck_where_nobody_looked(place, values):
        values[values == 9] = 0
        return with_speck(place, values)

    groups, tried = choose_largest(
        written_cases(dataset, tmp_path / "a", speck_where_nobody_looked), plan, load_prediction
    )
    assert (groups, tried[0]["dice_before"], tried[0]["dice_after"]) == ((), 1.0, 1.0)


def test_of_a_card_only_the_scores_are_renewed(plan, tmp_path):
    for name, dice in (("fold_0.scores.json", 0.5), ("scores.json", 0.75)):
        found = {"name": "ball", "dice": 0.9, "true_positives": 5, "false_positives": 1}
        missed = {"name": "ball", "dice": 0.0, "true_positives": 0, "false_positives": 0}
        cases = [{"labels": [found]}, {"labels": [missed]}, {"labels": [missed | {"dice": None}]}]
        scores = {"cases": cases, "labels": [{"name": "ball", "dice": dice}]}
        (tmp_path / name).write_text(json.dumps(scores))
        write_card(tmp_path, plan, "balls", 6)
        card = tmp_path / "MODEL_CARD.md"
        if name != "scores.json":
            edited = (
                card.read_bytes().replace(b"to be filled in", b"CC0 by J\xfcrgen") + b"\nFold 0 | alone.\n\n## Limits\n"
            )
            card.write_bytes(edited)
    table = b"| 0 | ball | 0.500 | 2 of 3 | 1 |"
    assert card.read_bytes() == edited.replace(table, table + b"\n| all | ball | 0.750 | 2 of 3 | 1 |")
    card.write_text("A card by hand.\n")
    write_card(tmp_path, plan, "balls", 6)
    assert card.read_text() == "A card by hand.\n"


def test_a_label_of_which_only_specks_were_found_does_not_stop_the_choice(balls, plan, tmp_path):
    plan = plan.model_copy(update={"labels": make_labels([(1, "ball"), (2, "never there")])})

    def with_specks(place, values):
        values[0, 0, 0, 0] = values[0, -1, -1, -1] = 2
        return values

    groups, tried = choose_largest(written_cases(balls, tmp_path / "a", with_specks), plan, load_prediction)
    assert [one["largest_piece_of"] for one in tried] == [["ball", "never there"], ["ball"], ["never there"]]
    assert not any(one["kept"] for one in tried)  # the ball is whole as it is
    assert groups == ()

    def apart(place, values):
        values[0, 0, 0, 0], values[0, -1, -1, -1] = 1, 2
        return values

    groups, tried = choose_largest(written_cases(balls, tmp_path / "b", apart), plan, load_prediction)
    assert groups == ((1, 2),)
    assert tried[0]["dice_after"] == 1.0


def test_an_image_that_was_replaced_is_segmented_again(plan, tmp_path):
    root = make_balls(tmp_path / "balls")
    cases = read_dataset(root)
    model = train_model(cases, plan, tmp_path / "model", budget="1steps", settings=FAST)
    validate_fold(model, cases, tmp_path / "model")
    assert is_scored(cases, tmp_path / "model", 0)
    case = cases.fold(0, 3)[1][0]
    file = tmp_path / "model/validation/fold_0" / f"{case.name}.nii.gz"
    before = file.stat().st_mtime_ns
    validate_fold(model, cases, tmp_path / "model")
    assert file.stat().st_mtime_ns == before
    save(load(case.images[0]), case.images[0])
    assert not is_scored(cases, tmp_path / "model", 0)
    validate_fold(model, cases, tmp_path / "model")
    assert file.stat().st_mtime_ns > before
    assert is_scored(cases, tmp_path / "model", 0)
    older = shutil.copy(case.images[0], tmp_path / "older.nii.gz")
    os.utime(older, (1, 1))
    Path(older).replace(case.images[0])  # as rsync and cp -p put a file of another day in place
    assert not is_scored(cases, tmp_path / "model", 0)


def test_a_structure_that_is_nowhere_is_not_decided_on(balls, plan, tmp_path):
    cases = [dataclasses.replace(case, undrawn=frozenset({1})) for case in balls]
    pairs = written_cases(dataclasses.replace(balls, cases=tuple(cases)), tmp_path / "a", with_speck)
    assert choose_largest(pairs, plan, load_prediction) == ((), [])


def test_labels_are_named_by_a_dataset_a_plan_or_a_table(balls, plan, tmp_path):
    root = balls.cases[0].label.parents[1]
    plan.save(tmp_path / "plan.json")
    table = [label.model_dump() for label in plan.labels]
    (tmp_path / "table.json").write_text(json.dumps(table))
    for file in (root / "dataset.json", tmp_path / "plan.json", tmp_path / "table.json"):
        assert read_meaning(file).labels == plan.labels
    for text, message in (("no table", "not valid JSON"), ("[5]", "label table")):
        (tmp_path / "table.json").write_text(text)
        with pytest.raises(InputError, match=message):
            read_meaning(tmp_path / "table.json")
    with pytest.raises(InputError):
        read_meaning(tmp_path / "missing.json")
    assert math.isnan(evaluate_folder(root / "labels", root / "labels", ()).mean["dice"])
