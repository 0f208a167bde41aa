"""Prepared cases that no training needs any more are swept, and none that one reads from."""

from __future__ import annotations

import builtins
import subprocess
import sys

import pytest
from datasets import make_balls, small_plan

from medseg.io import load, save
from medseg.train.cache import needed_stems, prepare_cases
from medseg.train.dataset import read_dataset
from medseg.train.loop import train_model
from medseg.train.settings import TrainSettings
from medseg.train.sweep import swept_and_kept

FAST = TrainSettings(folds=3)


@pytest.fixture(scope="module")
def plan(balls):
    return small_plan(balls)


@pytest.fixture
def cache(tmp_path):
    """A cache with files of two prepared cases, and three of other kinds."""
    for name in (
        "a" * 24 + ".image.b2nd",
        "a" * 24 + ".lost.npy",
        "b" * 24 + ".target.b2nd",
        "files.json",
        "b.npy",
        "b" * 24,
    ):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


OTHERS = {"files.json", "b.npy", "b" * 24, "in_use"}


def names(folder):
    return {file.name for file in folder.iterdir()}


def test_prepared_cases_alone_are_swept_and_those_that_are_needed_stay(cache):
    with swept_and_kept(cache, lambda: ["a" * 24]):
        assert names(cache) == OTHERS | {"a" * 24 + ".image.b2nd", "a" * 24 + ".lost.npy"}
    with swept_and_kept(cache, list):
        assert names(cache) == OTHERS


def test_nothing_is_swept_while_another_training_reads(cache):
    before = names(cache)
    with swept_and_kept(cache, lambda: ["a" * 24, "b" * 24]), swept_and_kept(cache, list):
        assert names(cache) == before | {"in_use"}
    with swept_and_kept(cache, list):
        assert names(cache) == OTHERS


def test_the_lock_of_another_process_holds_until_it_is_killed(cache):
    before = names(cache)
    code = (
        "import sys, time; from pathlib import Path; from medseg.train.sweep import swept_and_kept\n"
        "with swept_and_kept(Path(sys.argv[1]), lambda: ['a' * 24, 'b' * 24]): print('in', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(cache)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        with swept_and_kept(cache, list):
            assert names(cache) == before | {"in_use"}
        other.kill()
    with swept_and_kept(cache, list):
        assert names(cache) == OTHERS


def test_where_a_case_cannot_be_read_or_nothing_can_be_locked_nothing_is_swept(cache, monkeypatch):
    def unreadable():
        raise PermissionError

    before = names(cache)
    with swept_and_kept(cache, unreadable):
        assert names(cache) == before | {"in_use"}
    real = builtins.__import__

    def without_locks(name, *rest):
        if name == "fcntl":
            raise ImportError
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_locks)
    with swept_and_kept(cache, list):
        assert names(cache) == before | {"in_use"}


def test_the_prepared_cases_of_a_model_are_those_of_its_plan_and_files(plan, tmp_path):
    balls = read_dataset(make_balls(tmp_path / "balls"))
    cache = tmp_path / "model/cache"

    def stems():
        return {file.name.split(".")[0] for file in cache.glob("*.b2nd")}

    train_model(balls, plan, tmp_path / "model", budget="1steps", settings=FAST)
    train_model(balls, plan, tmp_path / "model", budget="1steps", fold=1, settings=FAST)  # takes none of the other's
    assert stems() == set(needed_stems(balls.cases, plan, cache))
    for fold in (0, 1):
        (tmp_path / f"model/fold_{fold}.safetensors").unlink()
    image = load(balls.cases[0].images[0])
    save(image.with_array(image.array + 1), balls.cases[0].images[0])
    coarse = plan.model_copy(update={"spacing_mm": (1.2, 1.2, 1.2)})
    coarse.save(tmp_path / "model/plan.json")
    train_model(balls, coarse, tmp_path / "model", budget="1steps", fold="none", settings=FAST)
    assert stems() == set(needed_stems(balls.cases, coarse, cache))
    assert len(stems()) == 6


def test_a_training_keeps_what_it_reads_from_others_with_another_plan(balls, plan, tmp_path):
    def sweep_meanwhile(now):
        if now.stage == "train" and now.step == 1:
            with swept_and_kept(tmp_path / "cache", list):
                pass

    train_model(balls, plan, tmp_path, budget="3steps", settings=FAST, progress=sweep_meanwhile)
    assert len(list((tmp_path / "cache").glob("*.b2nd"))) == 2 * 6
    with swept_and_kept(tmp_path / "cache", list):
        assert not list((tmp_path / "cache").glob("*.b2nd"))
    assert len(prepare_cases(balls.cases, plan, tmp_path / "cache")) == 6
