from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_plan
from pydantic import ValidationError

from medseg.errors import ModelError
from medseg.labels import make_labels
from medseg.model.plan import Plan
from medseg.networks.kinds import Network
from medseg.process.normalize import CTNormalization


@given(
    spacing=st.tuples(*[st.floats(0.1, 10)] * 3),
    patch=st.tuples(*[st.integers(1, 32).map(lambda n: 4 * n)] * 3),
    order=st.sampled_from([0, 1, 3]),
    values=st.sets(st.integers(1, 70000), min_size=1, max_size=5),
)
def test_a_saved_plan_loads_as_it_was(tmp_path_factory, spacing, patch, order, values):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan = tiny_plan(
        spacing_mm=spacing,
        patch=patch,
        resampling={"order": order},
        labels=make_labels((v, f"organ {v}") for v in values),
    )
    plan.save(path)
    assert Plan.load(path) == plan


def edited(tmp_path, **changes):
    path = tmp_path / "plan.json"
    tiny_plan().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windowing": 3}, "windowing: Extra inputs are not permitted"),
        ({"format": 2}, "format: Input should be 1"),
        ({"spacing_mm": [1, 0, 1]}, "spacing_mm.1: Input should be greater than or equal to 0.000001"),
        ({"patch": [512, 512, 513]}, "has over 134217728 voxels"),
        ({"labels": []}, "labels: Tuple should have at least 1 item"),
        ({"resampling": {"separate": 3}}, "only with the method resize"),
        ({"regions": [{"name": "all", "members": [1, 2], "value": 2}]}, "must be those of the labels"),
        ({"mirror_axes": [0, 2, 0]}, "each axis may be mirrored along once"),
        ({"orientation": "RAX"}, "orientation: String should match pattern"),
        (
            {"network": {"kind": "torch.nn.Linear"}},
            "network: Input tag 'torch.nn.Linear' .* does not match any of the expected tags: 'unet'",
        ),
    ],
)
def test_a_wrong_field_is_named(tmp_path, changes, message):
    with pytest.raises(ModelError, match=message) as caught:
        Plan.load(edited(tmp_path, **changes))
    assert caught.value.path == tmp_path / "plan.json"


def test_a_missing_plan_is_said_to_be_missing(tmp_path):
    with pytest.raises(ModelError, match="The plan is missing"):
        Plan.load(tmp_path / "plan.json")


def test_labels_need_ascending_values_of_their_own():
    twice = (*make_labels([(1, "a")]), *make_labels([(1, "b")]))
    with pytest.raises(ValidationError, match="each value once"):
        tiny_plan(labels=twice)


def test_a_network_needs_one_entry_for_each_resolution():
    with pytest.raises(ValidationError, match="one entry per resolution"):
        Network(features=(4, 8, 8), kernels=((3, 3, 3),) * 2, strides=((1, 1, 1),) * 3, heads=0)
    with pytest.raises(ValidationError, match="heads are at most levels - 2"):
        Network(features=(4, 8, 8), kernels=((3, 3, 3),) * 3, strides=((1, 1, 1),) * 3, heads=2)
    with pytest.raises(ValidationError, match="decoder_blocks one less"):
        Network(features=(4, 8), kernels=((3, 3, 3),) * 2, strides=((1, 1, 1),) * 2, decoder_blocks=(2, 2), heads=0)
    with pytest.raises(ValidationError, match="the first stride is 1, 1, 1"):
        Network(features=(4, 8), kernels=((3, 3, 3),) * 2, strides=((2, 1, 1),) * 2, heads=0)


def test_a_network_has_two_blocks_at_each_resolution_where_the_plan_says_nothing_else():
    network = Network(features=(4, 8, 8), kernels=((3, 3, 3),) * 3, strides=((1, 1, 1),) * 3, heads=0)
    assert (network.blocks, network.decoder_blocks, network.residual) == ((2, 2, 2), (2, 2), False)


def test_normalizations_are_told_apart_by_their_kind(tmp_path):
    ct = CTNormalization(lower=-1000, upper=1000, mean=0, std=300)
    plan = tiny_plan(channels=({"name": "CT", "normalization": ct.model_dump()},))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").channels[0].normalization == ct


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("network", {"kind": "unet", "features": 5, "kernels": [], "strides": [], "heads": 0}),
        ("network", {"kind": "unet", "features": [10**9] * 2, "kernels": [[3] * 3] * 2, "strides": [[1] * 3] * 2}),
        ("network", {"kind": "unet", "features": [4] * 10**5, "kernels": [], "strides": [], "heads": 0}),
        ("network", {"kind": "monai_swinunetr", "window_size": 64}),
        ("network", {"kind": "monai_unet", "channels": [8, 8], "strides": [10**30]}),
        ("network", "unet"),
        ("patch", [4 * 10**200] * 3),
        ("patch", [2**13] * 3),
        ("spacing_mm", [1e300, 1, 1]),
        ("spacing_mm", [1e-300, 1, 1]),
        ("labels", [{"value": 10**30, "name": "a", "color": "#000000"}]),
        ("mirror_axes", [10**30]),
        ("keep_largest", [[10**30]]),
        ("channels", 7),
    ],
)
def test_numbers_of_any_size_and_type_are_refused_on_one_line(tmp_path, field, value):
    with pytest.raises(ModelError, match=r"^The plan is not valid: [^\n]{1,400}$"):
        Plan.load(edited(tmp_path, **{field: value}))


@pytest.mark.parametrize(
    "text", ['{"patch": [' + "9" * 10**5 + "]}", "[" * 10**5, "null", "{" + '"a\\n\\u001b":1,' * 99]
)
def test_a_plan_that_is_not_one_is_refused_on_one_line(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ModelError, match=r"^The plan is not valid: [ -~]{1,400}$"):
        Plan.load(tmp_path / "plan.json")
