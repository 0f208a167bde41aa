"""A batch refuses series of another modality than the model's, and its manifests say what is unlike the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from studies import write_pipeline, write_study

import medseg
from medseg.errors import InputError
from medseg.io.label_table import read_table
from medseg.model.intended import Kept, Range, Seen
from medseg.model.plan import Channel, Plan
from medseg.model.segmenter import Model
from medseg.study.pipeline import load_pipeline
from medseg.study.run import Job, read_job, segment_job


def with_channel(model: Path, name: str) -> None:
    """Call the channel of a model folder otherwise."""
    plan = Plan.load(model / "plan.json")
    channel = plan.channels[0]
    plan.model_copy(update={"channels": (Channel(name=name, normalization=channel.normalization),)}).save(
        model / "plan.json"
    )


@pytest.mark.parametrize("anyway", [False, True])
def test_a_series_of_another_modality_is_refused_unless_the_pipeline_insists(tmp_path, anyway):
    write_study(tmp_path / "studies", 0)
    path = write_pipeline(tmp_path, **({"anyway": True} if anyway else {}))
    with_channel(tmp_path / "model", "MRI")
    pipeline, model = load_pipeline(path), Model.load(tmp_path / "model", runtime="torch")
    job = Job("study", {file: file.name for file in (tmp_path / "studies").rglob("*") if file.is_file()})
    read_job(job, pipeline)
    if anyway:
        segment_job(job, pipeline, model)
        assert job.labels is not None
        return
    with pytest.raises(InputError, match="is CT and the model was made for MR") as error:
        segment_job(job, pipeline, model)
    assert error.value.reason == "modality"


def test_the_word_that_insists_changes_the_hash_of_a_pipeline_alone_where_it_is_said(tmp_path):
    plain = load_pipeline(write_pipeline(tmp_path))
    content = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    for anyway, same in ((False, True), (True, False)):
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content | {"anyway": anyway}))
        assert (load_pipeline(tmp_path / "tiny.yaml").digest == plain.digest) is same


def test_a_manifest_says_what_is_unlike_the_training_and_names_lie_beside_the_labels(tmp_path):
    write_study(tmp_path / "studies", 0)
    path = write_pipeline(tmp_path)
    seen = Seen(
        smallest_view_mm=(200, 200, 200),
        largest_view_mm=(300, 300, 300),
        volumes_ml={1: Range(smallest=500, largest=900, always=True)},
    )
    Kept(seen=seen).save(tmp_path / "model/fingerprint.json")
    (one,) = medseg.run_batch(path, tmp_path / "studies", tmp_path / "out")
    assert one.status == "done"
    manifest = json.loads((tmp_path / "out" / one.study / "manifest.json").read_text())
    view, volume = manifest["warnings"]
    assert "is far from those of the training cases, 200 x 200 x 200 to 300 x 300 x 300 mm" in view
    assert volume.startswith("ball: ")
    assert "training cases had 500 to 900 ml" in volume
    assert read_table(tmp_path / "out" / one.study / "labels.labels.json")[0].name == "ball"
