from __future__ import annotations

import json

from medseg.train.recipe import differences


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
