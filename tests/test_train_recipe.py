from __future__ import annotations

import json

from medseg.train.recipe import continued, differences, lengthened
from medseg.train.settings import TrainSettings


def test_what_differs_is_named_with_both_values():
    old = {"train.json": {"learning_rate": 0.01, "folds": 5}, "budget": {"steps": 400}}
    new = {"train.json": {"learning_rate": 0.003, "folds": 5}, "budget": {"seconds": 60.0}}
    assert differences(json.dumps(old), json.dumps(new)) == (
        "train.json learning_rate was 0.01 and is 0.003; budget seconds was not set and is 60.0; "
        "budget steps was 400 and is not set"
    )
    assert differences(json.dumps(old), json.dumps(old)) == ""


def test_of_an_older_record_nothing_is_known():
    assert "older version" in differences("0f3a", "{}")


def test_a_field_that_came_later_is_no_difference_while_it_has_its_default():
    settings = TrainSettings().model_dump(mode="json")
    older = {name: value for name, value in settings.items() if name != "frozen"}
    old, new = (json.dumps({"train.json": fields}) for fields in (older, settings))
    assert differences(old, new) == differences(new, old) == ""
    changed = json.dumps({"train.json": settings | {"frozen": "encoder"}})
    assert differences(old, changed) == 'train.json frozen was "nothing" and is "encoder"'


def recipe(**fields):
    return json.dumps({"train.json": {"folds": 5}, "budget": {"steps": 400}} | fields)


def test_each_longer_budget_is_kept_and_no_other_difference_is_taken():
    first = continued(recipe(), recipe(budget={"steps": 500}), 123)
    second = continued(first, recipe(budget={"steps": 600}), 450)
    earlier = [{"steps": 400, "until_step": 123}, {"steps": 500, "until_step": 450}]
    assert json.loads(second) == json.loads(recipe(budget={"steps": 600}, **{"earlier budgets": earlier}))
    assert continued(second, recipe(budget={"steps": 600}), 500) == second
    assert "step 450 of a budget of 500 steps and goes on to 600 steps" in lengthened(second, 450)
    assert [lengthened(second, 500), lengthened(recipe(), 0), lengthened("0f3a", 0)] == [""] * 3
    changed = {"train.json": {"folds": 4}}
    for other in (
        recipe(budget={"steps": 300}),
        recipe(budget={"seconds": 9e9}),
        recipe(budget={"steps": 500}, **changed),
    ):
        assert continued(recipe(), other, 123) is None
    assert continued("0f3a", recipe(), 1) is None
