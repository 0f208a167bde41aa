"""MONAI bundles become model folders: the same labels as MONAI's own workflow, and refusals by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import monai_files as files
import numpy as np
import pytest
import torch
from conftest import make_grid

import medseg
from medseg.errors import ModelError, UsageError
from medseg.model.importing import import_model
from medseg.model.segmenter import Model

pytestmark = [
    pytest.mark.filterwarnings("ignore:The model does not say how its training images were stored"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:monai"),
]

KINDS = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(kind == "SwinUNETR" and not find_spec("einops"), reason="einops is not installed"),
    )
    for kind in files.NETWORKS
]


def dice(found, expected):
    """Return the Dice of all foreground labels, the smallest."""
    values = np.unique(expected[expected > 0])
    assert values.size
    return min(
        2 * ((found == v) & (expected == v)).sum() / ((found == v).sum() + (expected == v).sum()) for v in values
    )


def beside(tmp_path, config, grid, meta=None):
    """Return labels of medseg and of MONAI for one scan, and the plan."""
    network = files.write_bundle(tmp_path / "bundle", config, meta)
    plan = import_model(tmp_path / "bundle", tmp_path / "model")
    files.write_scan(tmp_path / "scan.nii.gz", grid)
    model = Model.load(tmp_path / "model", device="cpu", runtime="torch")
    found = model.segment(medseg.load(tmp_path / "scan.nii.gz")).array[0]
    return found, files.run_monai(config, network, tmp_path / "scan.nii.gz"), plan


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", ["LPS", "PIR", "oblique"])
def test_labels_are_those_of_monai_whatever_the_orientation(tmp_path, kind, orientation):
    roi = [64, 32, 32] if kind == "SwinUNETR" else [16, 16, 8]
    config = files.inference(network_def=files.network_def(kind), roi=roi)
    found, expected, _ = beside(tmp_path, config, make_grid(orientation, (21, 18, 23)))
    assert dice(found, expected[0]) >= 0.999


@pytest.mark.skipif(not find_spec("einops"), reason="einops is not installed")
def test_an_import_loads_no_compiler_which_would_leave_a_folder_behind(tmp_path):
    for kind in files.NETWORKS:
        roi = [64, 32, 32] if kind == "SwinUNETR" else [16, 16, 8]
        config = files.inference(network_def=files.network_def(kind), roi=roi)
        files.write_bundle(tmp_path / "bundles" / kind, config, files.metadata())
    (tmp_path / "temporary").mkdir()
    code = """import sys, medseg, pathlib
for bundle in pathlib.Path("bundles").iterdir():
    medseg.import_model(bundle, bundle.name)
assert "torch._dynamo" not in sys.modules"""
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, check=True)
    assert len(list(tmp_path.glob("*/plan.json"))) == len(files.NETWORKS)
    assert not list((tmp_path / "temporary").iterdir())


CASES = {
    "constant blend, smaller than a tile": (
        {"inferer": {"_target_": "SlidingWindowInferer", "roi_size": [32, 16, 16], "overlap": 0.25}}, (18, 17, 23)
    ),
    "z-score of what is not 0, before": (
        {"preprocessing": {"_target_": "Compose", "transforms": [
            *files.LOAD, files.transform("NormalizeIntensityd", nonzero=True), files.TURN, files.SPACE,
        ]}}, (20, 18, 16)
    ),
    "regions": ({"postprocessing": {"_target_": "Compose", "transforms": files.behind(sigmoid=True)}}, (20, 18, 16)),
    "z-score of what is not 0, then a range; small, with its edges going on; labels brought back": (
        {
            "preprocessing": {"_target_": "Compose", "transforms": [
                *files.LOAD, files.TURN, files.SPACE, files.transform("NormalizeIntensityd", nonzero=True),
                files.transform("ScaleIntensityd", minv=-1.0, maxv=1.0),
                files.transform("CastToTyped", dtype="$torch.float32"),
            ]},
            "inferer": {
                "_target_": "SlidingWindowInferer", "roi_size": [32, 16, 16], "overlap": 0.25, "mode": "gaussian",
                "padding_mode": "replicate",
            },
            "postprocessing": {"_target_": "Compose", "transforms": files.behind(nearest=True, discrete_first=True)},
        },
        (18, 17, 23),
    ),
    "nearest": (
        {"postprocessing": {"_target_": "Compose", "transforms": files.behind(nearest=True, discrete_first=True)}},
        (20, 18, 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_that_of_monai(tmp_path, case):
    changes, shape = CASES[case]
    outputs = {"0": "all", "1": "one", "2": "two"} if case == "regions" else None
    found, expected, _ = beside(
        tmp_path, files.inference(**changes), make_grid("LPS", shape), files.metadata(outputs=outputs)
    )
    painted = expected[0]
    if case == "regions":
        painted = np.zeros(expected.shape[1:])
        for value, region in enumerate(expected, 1):
            painted[region > 0] = value
    assert dice(found, painted) >= 0.999


def test_the_plan_and_the_card_say_where_the_model_comes_from(tmp_path):
    files.write_bundle(tmp_path / "bundle", files.inference(), key="model")
    shutil.make_archive(str(tmp_path / "bundle"), "zip", tmp_path, "bundle")
    plan = import_model(tmp_path / "bundle.zip", tmp_path / "model")
    assert [(label.value, label.name) for label in plan.labels] == [(1, "liver"), (2, "spleen")]
    assert (plan.channels[0].name, plan.orientation, plan.patch) == ("CT", "RAS", (16, 16, 8))
    assert "Intended use: Tests alone" in (tmp_path / "model/MODEL_CARD.md").read_text()
    with pytest.raises(ModelError, match="a U-Net of medseg's own, and its network is of the kind monai_unet"):
        plan.unet  # noqa: B018


def attacked(witness):
    return f"$__import__('os').system('touch {witness}')"


@pytest.mark.parametrize("part", ["network_def", "preprocessing", "inferer", "postprocessing", "reference"])
def test_expressions_are_refused_and_run_nothing(tmp_path, part):
    witness = tmp_path / "witness"
    code = attacked(witness)
    changes = {
        "network_def": {"network_def": files.network_def() | {"dropout": code}},
        "preprocessing": {"preprocessing": {"_target_": "Compose", "transforms": [code]}},
        "inferer": {"inferer": {"_target_": "SlidingWindowInferer", "roi_size": code}},
        "postprocessing": {"postprocessing": code},
        "reference": {"roi": code},
    }[part]
    files.write_bundle(tmp_path / "bundle", files.inference())
    (tmp_path / "bundle/configs/inference.json").write_text(json.dumps(files.inference(**changes)))
    with pytest.raises(ModelError, match="an expression at .*never evaluates") as caught:
        import_model(tmp_path / "bundle", tmp_path / "model")
    assert caught.value.reason == "unsafe"
    assert not witness.exists()
    assert not (tmp_path / "model").exists()


SAID = {
    "$[16, 16, 8]": {},
    "$@deep#er::1": {"deep": {"er": [0, [16, 16, 8]]}},
    "$@large if @fine else [16, 16, 8]": {"fine": False, "large": "$never.looked(at)"},
    "$[16, @two, len(@eight)]": {"two": "$@three", "three": 16, "eight": list(range(8))},
}


@pytest.mark.parametrize("text", SAID)
def test_expressions_that_say_a_value_are_read(tmp_path, text):
    files.write_bundle(tmp_path / "bundle", files.inference())
    (tmp_path / "bundle/configs/inference.json").write_text(json.dumps(files.inference(roi=text, **SAID[text])))
    assert import_model(tmp_path / "bundle", tmp_path / "model").patch == (16, 16, 8)


@pytest.mark.parametrize(
    "text",
    [
        "$[WITNESS, 16, 8]", "$@roi if WITNESS else 3", "$len(WITNESS)", "$len(@roi, key=WITNESS)", "$@device.WITNESS",
        "$(lambda: WITNESS)()", "$[WITNESS for _ in [1]]", "$f'{WITNESS}'", "$@imports[WITNESS]", "$16 + 16", "$open",
        "$len(@device)", "$1 if @device else 2", "$@nothing", "$@imports#9", "$1j", "$b'16'", "%other.json#roi", "$",
        "$" + "(" * 300,
    ],
)  # fmt: skip
def test_every_other_expression_is_refused_and_runs_nothing(tmp_path, text):
    witness = tmp_path / "witness"
    files.write_bundle(tmp_path / "bundle", files.inference())
    config = files.inference(roi=text.replace("WITNESS", f"__import__('os').system('touch {witness}')"))
    (tmp_path / "bundle/configs/inference.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="an expression at .*never evaluates"):
        import_model(tmp_path / "bundle", tmp_path / "model")
    assert not witness.exists()


@pytest.mark.parametrize("text", ["$@roi", "$len(@roi)", "$@roi if @roi else @roi", "$[@roi]"])
def test_expressions_that_refer_to_themselves(tmp_path, text):
    files.write_bundle(tmp_path / "bundle", files.inference())
    (tmp_path / "bundle/configs/inference.json").write_text(json.dumps(files.inference(roi=text)))
    with pytest.raises(ModelError, match="refers to itself"):
        import_model(tmp_path / "bundle", tmp_path / "model")


def test_transforms_may_be_a_reference_and_known_names_have_codes(tmp_path):
    steps = files.inference()["preprocessing"]["transforms"]
    config = files.inference(preprocessing={"_target_": "Compose", "transforms": "$@steps"}, steps=steps)
    files.write_bundle(tmp_path / "bundle", files.inference())
    (tmp_path / "bundle/configs/inference.json").write_text(json.dumps(config))
    plan = import_model(tmp_path / "bundle", tmp_path / "model")
    assert plan.spacing_mm == (1.3, 1.1, 2.1)
    assert [label.snomed.meaning for label in plan.labels] == ["Liver", "Spleen"]


def test_expressions_in_parts_that_are_not_read_run_nothing(tmp_path):
    witness = tmp_path / "witness"
    files.write_bundle(tmp_path / "bundle", files.inference())
    config = files.inference(initialize=[attacked(witness)], device=attacked(witness))
    (tmp_path / "bundle/configs/inference.json").write_text(json.dumps(config))
    import_model(tmp_path / "bundle", tmp_path / "model")
    assert not witness.exists()


def compose(*steps):
    return {"_target_": "Compose", "transforms": list(steps)}


REFUSED = {
    "network that medseg does not have: UNETR": {"network_def": {"_target_": "UNETR"}},
    "at network_def that medseg does not have: os.system": {"network_def": {"_target_": "os.system"}},
    "spatial_dims": {"network_def": files.network_def(spatial_dims=2)},
    "act: .*|act.": {"network_def": files.network_def(act="no layer")},
    "transform that medseg does not have: CropForegroundd at": {
        "preprocessing": compose(files.transform("CropForegroundd"))
    },
    "order of transforms": {"preprocessing": compose(files.SPACE, files.TURN)},
    "Spacingd at .*diagonal": {"preprocessing": compose(files.SPACE | {"diagonal": True})},
    "setting of ScaleIntensityRange": {"preprocessing": compose(files.SCALE | {"a_max": -100})},
    "that medseg does not have: ScaleIntensity, Spacing, NormalizeIntensity": {
        "preprocessing": compose(
            files.transform("ScaleIntensityd"), files.SPACE, files.transform("NormalizeIntensityd")
        )
    },
    "setting of ScaleIntensity that medseg does not have: channel_wise": {
        "network_def": files.network_def(in_channels=2),
        "preprocessing": compose(files.transform("ScaleIntensityd")),
    },
    "setting of NormalizeIntensity": {"preprocessing": compose(files.transform("NormalizeIntensityd", divisor=2))},
    "inferer that medseg does not have: SimpleInferer": {"inferer": {"_target_": "SimpleInferer"}},
    "mixture of transforms": {"postprocessing": compose()},
    "order of transforms behind": {"postprocessing": compose(*files.behind(discrete_first=True))},
    "too large, or refers to itself": {"roi": ["@roi"]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_medseg_does_not_have_is_named(tmp_path, message):
    files.write_bundle(tmp_path / "bundle", files.inference())
    (tmp_path / "bundle/configs/inference.json").write_text(json.dumps(files.inference(**REFUSED[message])))
    with pytest.raises(ModelError, match=message) as caught:
        import_model(tmp_path / "bundle", tmp_path / "model")
    assert caught.value.path is not None


def test_folds_and_checkpoints_are_nnunets(tmp_path):
    files.write_bundle(tmp_path / "bundle", files.inference())
    with pytest.raises(UsageError, match="one set of weights"):
        import_model(tmp_path / "bundle", tmp_path / "model", folds=[0])


def test_weights_and_metadata_that_do_not_fit(tmp_path):
    files.write_bundle(tmp_path / "bundle", files.inference(), files.metadata(outputs={"0": "background"}))
    with pytest.raises(ModelError, match="do not name 3 channels of outputs"):
        import_model(tmp_path / "bundle", tmp_path / "model")
    files.write_bundle(tmp_path / "bundle", files.inference(), [])
    with pytest.raises(ModelError, match="not those of a MONAI bundle"):
        import_model(tmp_path / "bundle", tmp_path / "model")
    files.write_bundle(tmp_path / "bundle", files.inference())
    (tmp_path / "bundle/models/model.pt").rename(tmp_path / "bundle/models/model.ts")
    with pytest.raises(ModelError, match="TorchScript alone"):
        import_model(tmp_path / "bundle", tmp_path / "model")
    (tmp_path / "bundle/models/model.ts").unlink()
    with pytest.raises(ModelError, match=r"has 0 files of weights"):
        import_model(tmp_path / "bundle", tmp_path / "model")
    for name in ("one.pt", "other.pt"):
        (tmp_path / "bundle/models" / name).touch()
    with pytest.raises(ModelError, match=r"has 2 files of weights, models/\*.pt, and none is models/model.pt"):
        import_model(tmp_path / "bundle", tmp_path / "model")


def test_weights_may_have_another_name_where_they_are_alone(tmp_path):
    files.write_bundle(tmp_path / "bundle", files.inference())
    (tmp_path / "bundle/models/model.pt").rename(tmp_path / "bundle/models/fine_tuned.pt")
    shutil.make_archive(str(tmp_path / "bundle"), "zip", tmp_path, "bundle")
    import_model(tmp_path / "bundle.zip", tmp_path / "model")
    assert (tmp_path / "model/fold_0.safetensors").is_file()


def test_a_bundle_in_yaml(tmp_path):
    files.write_bundle(tmp_path / "bundle", files.inference())
    text = (tmp_path / "bundle/configs/inference.json").read_text()
    (tmp_path / "bundle/configs/inference.json").unlink()
    file = tmp_path / "bundle/configs/inference.yaml"
    for content in ("a: &a [*a]", "a: [", "a: !!bool x"):
        file.write_text(content)
        with pytest.raises(ModelError, match="not valid YAML"):
            import_model(tmp_path / "bundle", tmp_path / "model")
    file.write_text(text)
    assert import_model(tmp_path / "bundle", tmp_path / "model").patch == (16, 16, 8)


@pytest.mark.parametrize("runtime", ["openvino", "onnx"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_runtimes_agree(tmp_path, kind, runtime):
    pytest.importorskip("openvino" if runtime == "openvino" else "onnxruntime")
    config = files.inference(
        network_def=files.network_def(kind), roi=[64, 32, 32] if kind == "SwinUNETR" else [16, 16, 8]
    )
    network = files.write_bundle(tmp_path / "bundle", config)
    plan = import_model(tmp_path / "bundle", tmp_path / "model")
    image = torch.randn(1, 1, *plan.patch)
    model = Model.load(tmp_path / "model", device="cpu", runtime=runtime)
    with torch.inference_mode():
        torch.testing.assert_close(model.runtime(image), network(image), rtol=1e-3, atol=1e-3)
