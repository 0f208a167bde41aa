"""A localizer says where the model looks: a box with a margin in mm, on the grid of the source, recorded, verified."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
import yaml
from conftest import make_grid
from dicom_files import ORIENTATIONS, STUDY, write_series
from models import threshold_model, tiny_model, tiny_plan
from studies import batch_command, environment
from test_model_mean_field import SMOOTH, speckled
from test_study_pipeline import RULE, pipeline, written

import medseg
from medseg.errors import InputError, UsageError
from medseg.io.dicom_seg import load_dicom_seg
from medseg.model.plan import Channel
from medseg.model.timing import Report
from medseg.model.weights import save_weights
from medseg.process.normalize import ZScore
from medseg.study.batch import Options, run_batch
from medseg.study.check import check_pipeline
from medseg.study.localize import box_around, segment_box
from medseg.study.pipeline import load_pipeline
from medseg.study.run import Job, segment_job
from medseg.volume import Grid, Volume

TORCH = Options(runtime="torch", threads=1)
SHEARED = Grid((9, 8, 7), np.array([[1, 0, 0, 3], [0, 1.5, 1.2, 4], [0, 0, 2.5, 5], [0, 0, 0, 1.0]]))


@pytest.mark.parametrize("grid", [make_grid("oblique"), make_grid("PIR"), SHEARED], ids=["oblique", "PIR", "tilted"])
@pytest.mark.parametrize("margin_mm", [0, 0.9, 3.1, 1000])
def test_the_box_holds_all_within_the_margin_and_no_plane_more(grid: Grid, margin_mm: float) -> None:
    labels = np.zeros((1, *grid.shape), np.uint8)
    labels[0, 2:4, 3, 2:5], labels[0, 0, 0, 0] = 5, 3
    start, stop = box_around(Volume(labels, grid), [5, 7], margin_mm)
    index = np.stack(np.indices(grid.shape), axis=-1).reshape(-1, 3)
    places, found = grid.to_world(index), grid.to_world(np.argwhere(labels[0] == 5))
    near = index[np.linalg.norm(places[:, None] - found[None], axis=2).min(axis=1) <= margin_mm]
    assert (near >= start).all()
    assert (near < stop).all()
    for axis in range(3):  # one plane less on any side would be nearer than the margin
        normal = np.cross(*np.delete(grid.affine[:3, :3], axis, axis=1).T)
        heights = places @ normal / np.linalg.norm(normal)
        ends = [heights[index[:, axis] == at][0] for at in (start[axis], stop[axis] - 1)]
        reach = sorted(found @ normal / np.linalg.norm(normal))
        step_mm = abs(heights[index[:, axis] == 1][0] - heights[index[:, axis] == 0][0])
        assert min(ends) > reach[0] - margin_mm - step_mm
        assert max(ends) < reach[-1] + margin_mm + step_mm
    assert box_around(Volume(labels, grid), [7], margin_mm) is None


@pytest.mark.parametrize(
    ("localizer", "text"),
    [
        ({"channels": ["T1"]}, r"the localizer asks for channels that are not there: T1"),
        ({"margin_mm": -1}, r"localizer\.margin_mm"),
        ({"box": 1}, r"localizer\.box: Extra inputs"),
        ({"model": None}, r"localizer\.model"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, localizer: dict, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        load_pipeline(written(tmp_path, localizer={"model": "hippocampus"} | localizer))


def test_a_box_and_a_localizer_do_not_go_together(tmp_path: Path) -> None:
    both = {"roi": [[0, 0, 0], [1, 1, 1]], "localizer": {"model": "hippocampus"}}
    with pytest.raises(UsageError, match="roi and localizer both say where to look"):
        load_pipeline(written(tmp_path, **both))


def test_check_knows_the_localizer_too() -> None:
    two = {"channels": [RULE | {"name": "T1"}, RULE | {"name": "T2"}], "localizer": {"model": "hippocampus"}}
    with pytest.raises(UsageError, match=r"the model has 1.* not 2; the localizer has 1 channel\(s\) \(MRI\), not 2"):
        check_pipeline(pipeline(**two))
    wrong = {"model": "hippocampus", "labels": ["Anterior", "Liver"]}
    with pytest.raises(UsageError, match="the localizer has no label 'Liver'"):
        check_pipeline(pipeline(localizer=wrong))
    assert check_pipeline(pipeline(localizer=wrong | {"labels": ["Anterior"]})).is_dir()
    ran = Job("study", {}, image=Volume(np.zeros((1, 4, 4, 4)), Grid((4, 4, 4), np.eye(4))))
    with pytest.raises(InputError, match="localizer of the pipeline has not been loaded"):
        segment_job(ran, pipeline(localizer=wrong), tiny_model())


def test_the_crf_of_a_pipeline_is_used_in_the_whole_image_and_in_a_box() -> None:
    image = speckled(Grid((20, 20, 20), np.eye(4)))
    model = threshold_model(50)
    with_crf, plain = pipeline(crf=SMOOTH.model_dump(), anyway=True), model.segment(image).array
    job = Job("study", {}, image=image)
    segment_job(job, with_crf, model)
    assert job.labels is not None
    assert (job.labels.array != plain).any()
    assert job.facts["run"]["crf"] == SMOOTH.model_dump()
    boxed = segment_box(image, ((0, 0, 0), (20, 20, 20)), model, with_crf, Report())
    np.testing.assert_array_equal(boxed.array, job.labels.array)


def write_head(folder: Path) -> None:
    """Write an oblique study of two series on different grids: a bright ball in one corner, smooth elsewhere."""
    for number, (name, size, step) in enumerate((("t1", (20, 24, 14), 2.0), ("flair", (18, 22, 12), 2.4))):
        rows, columns, slices = size
        row, column = np.indices((rows, columns))

        def each(k: float, row=row, column=column, step=step) -> dict:
            ball = (row * 0.75 - 4) ** 2 + (column * 1.25 - 8) ** 2 + (k * step - 9) ** 2 < 16
            return {"PixelData": (100 + 3 * column + 400 * ball).astype(np.int16).tobytes()}

        normal = np.cross(*np.reshape(ORIENTATIONS["oblique"], (2, 3)))
        tags = STUDY | {"Modality": "MR", "SeriesDescription": name, "SeriesNumber": number, "SliceThickness": step}
        write_series(
            folder / name, range(slices), orientation=ORIENTATIONS["oblique"], step_mm=step * normal,
            shape=(rows, columns), each=each, **tags,
        )  # fmt: skip


def write_model(folder: Path, channels: int, level: float) -> medseg.Model:
    """Write a model that finds what is bright: so many deviations above the mean of the first channel in a tile."""
    names = [Channel(name=f"MR{number}", normalization=ZScore()) for number in range(channels)]
    model = tiny_model(tiny_plan(channels=tuple(names), spacing_mm=(1.2, 1.0, 2.2)))
    (network,) = model.networks
    with torch.no_grad():
        for name, weights in network.named_parameters():
            if "norm" not in name:
                weights.zero_()
        for stage, first in ((network.encoder[0], 0), (network.decoder[1], 4)):  # the skip follows on four features
            stage[0].conv.weight[0, first, 1, 1, 1] = stage[1].conv.weight[0, 0, 1, 1, 1] = 1
        network.outputs[0].weight[1, 0], network.outputs[0].bias[1] = 1, -level
    folder.mkdir(parents=True, exist_ok=True)
    model.plan.save(folder / "plan.json")
    save_weights(network, folder / "fold_0.safetensors")
    return model


def manifest_of(out: Path) -> tuple[dict, Path]:
    (path,) = out.glob("*/manifest.json")
    return json.loads(path.read_text(encoding="utf-8")), path.parent


def test_an_oblique_study_of_two_channels(tmp_path: Path) -> None:
    studies, out = tmp_path / "studies", tmp_path / "out"
    write_head(studies / "a")
    with pytest.warns(UserWarning, match="covers 84 % of the first image"):
        image = medseg.load([studies / "a" / "t1", studies / "a" / "flair"])
    flair = image.with_array(image.array[1:])

    localizer = write_model(tmp_path / "where", 1, 2.5)
    model = write_model(tmp_path / "what", 2, 1)
    content = {
        "format": 1,
        "name": "two",
        "model": "what",
        "channels": [{"name": name, "modality": ["MR"], "description": name} for name in ("t1", "flair")],
        "localizer": {"model": "where", "labels": ["ball"], "channels": ["flair"], "margin_mm": 3},
        "outputs": ["nifti", "seg", "json", "sr"],
    }
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")

    found = np.argwhere(localizer.segment(flair).array[0])
    steps = np.ceil(3 / np.array(image.grid.spacing_mm)).astype(int)
    start = np.maximum(found.min(axis=0) - steps, 0)
    stop = np.minimum(found.max(axis=0) + 1 + steps, image.grid.shape)
    assert (stop - start < image.grid.shape).all(), "the box is no smaller than the image"
    expected = np.zeros(image.grid.shape, np.uint8)
    part = model.segment(image.cropped(start, stop)).array[0]
    expected[tuple(map(slice, start, stop))] = part
    assert 0 < part.mean() < 1
    assert (expected != model.segment(image).array[0]).any()

    done = subprocess.run(
        batch_command(path, studies, out), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    manifest, folder = manifest_of(out)
    assert manifest["localizer"]["box"] == [start.tolist(), stop.tolist()]
    assert manifest["localizer"]["run"]["runtime"] == "torch"
    (warning,) = manifest["warnings"]
    assert "covers 84 %" in warning
    labels = medseg.load(folder / "labels.nii.gz")
    assert labels.grid.matches(image.grid)
    np.testing.assert_array_equal(labels.array[0], expected)
    segments, _ = load_dicom_seg(folder / "labels.seg.dcm", source=studies / "a" / "t1")
    np.testing.assert_array_equal(segments.array[0], expected)
    assert [one.kept for one in run_batch(path, studies, out, TORCH)] == [True]

    write_model(tmp_path / "where", 1, 1000)  # it finds nothing now
    (outcome,) = run_batch(path, studies, out, TORCH)
    assert (outcome.kept, outcome.status, outcome.volumes_ml) == (False, "done", {"ball": 0.0})
    nothing, folder = manifest_of(out)
    assert nothing["localizer_sha256"] != manifest["localizer_sha256"]
    assert nothing["model_sha256"] == manifest["model_sha256"]
    assert nothing["localizer"]["box"] is None
    assert nothing["warnings"] == [
        warning,
        "The localizer found nothing, so nothing was segmented: all is background.",
    ]
    empty = medseg.load(folder / "labels.nii.gz")
    assert (empty.grid.matches(image.grid), empty.array.dtype, int(empty.array.max())) == (True, np.uint8, 0)
    assert [one["file"] for one in nothing["outputs"]] == [
        *("labels.labels.json", "labels.nii.gz", "measurements.json", "measurements.sr.dcm"),
    ]
    assert str(pydicom.dcmread(folder / "measurements.sr.dcm")).count("Absent") == 1


def test_a_changed_model_of_a_cascade_is_another_model(tmp_path: Path) -> None:
    from medseg.study.worker import model_digests

    write_model(tmp_path / "what", 1, 0)
    write_model(tmp_path / "what" / "previous", 1, 0)
    before = model_digests(pipeline(model=str(tmp_path / "what")))
    write_model(tmp_path / "what" / "previous", 1, 1)
    assert model_digests(pipeline(model=str(tmp_path / "what"))) != before


@pytest.mark.realdata
def test_a_real_scan(realdata: Path, tmp_path: Path) -> None:
    """What the shipped model finds in a real MR is found again in a box around it, on the grid of the scan."""
    (tmp_path / "p.yaml").write_text(
        yaml.safe_dump(
            yaml.safe_load((Path(__file__).parents[1] / "pipelines" / "hippocampus.yaml").read_text(encoding="utf-8"))
            | {"localizer": {"model": "hippocampus", "labels": ["Anterior", "Posterior"], "margin_mm": 12}}
        ),
        encoding="utf-8",
    )
    (outcome,) = run_batch(tmp_path / "p.yaml", realdata / "dicom/brain_mr_study", tmp_path / "out", TORCH)
    assert outcome.status == "done", outcome.text
    manifest, folder = manifest_of(tmp_path / "out")
    labels = medseg.load(folder / "labels.nii.gz")
    start, stop = map(np.array, manifest["localizer"]["box"])
    assert (stop <= labels.grid.shape).all()
    inside = np.argwhere(labels.array[0])
    assert len(inside)
    assert (inside >= start).all()
    assert (inside < stop).all()
