"""What a model is meant for is checked: modality, field of view, volumes, and that a scan is a scan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from dicom_files import write_source
from models import threshold_model, tiny_model
from test_model_segmenter import ball

import medseg
from medseg.errors import InputError, ModelError, UsageError
from medseg.io import load, save
from medseg.io.folders import holds_slices, is_patches, label_maps
from medseg.io.label_table import read_table, write_table
from medseg.labels import make_labels
from medseg.model.intended import Kept, Range, Seen, kept_seen, modality_of
from medseg.model.plan import Channel
from medseg.model.run import Options, is_folder_of_volumes, segment_file, segment_folder
from medseg.process.normalize import ZScore
from medseg.volume import Grid, Volume

SEEN = Seen(
    smallest_view_mm=(20, 20, 20),
    largest_view_mm=(40, 40, 40),
    volumes_ml={1: Range(smallest=0.5, largest=2.0, always=True)},
)


def scan(shape: tuple[int, int, int] = (20, 24, 22), radius: float = 6, name: str = "RAS") -> Volume:
    return ball(Grid(shape, np.eye(4)).reoriented(name), radius)


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        *((one, "CT") for one in ("CT", "ct", "CT soft", "CT_portal_venous", "ct-1", "cbct")),
        *((one, "MR") for one in ("MR", "MRI", "T1", "T2", "FLAIR", "T1w", "t1ce", "T1-weighted", "T2_FLAIR", "adc")),
        *((one, "PT") for one in ("PET", "PT", "pet_suv", "FDG")),
        *((one, None) for one in ("PET/CT", "0", "image", "noNorm", "octopus", "impact", "Trutz", "")),
    ],
)
def test_what_the_name_of_a_channel_says_of_its_modality(name, modality):
    assert modality_of(name) == modality


@pytest.mark.parametrize(
    ("channel", "stated", "accepted"),
    [
        ("CT", "MR", False),
        ("T1", "CT", False),
        ("PET", "CT", False),
        ("MR", "PT", False),
        ("CT", "NM", False),
        ("CT", "CT", True),
        ("MRI", "MR", True),
        ("image", "CT", True),
        ("CT", "OT", True),
        ("CT", "", True),
    ],
)
def test_a_series_of_another_modality_is_refused_unless_it_is_wanted_anyway(tmp_path, channel, stated, accepted):
    series = write_source(tmp_path / "series", Modality=stated)
    model = tiny_model(tiny_plan_of(channel))
    if accepted:
        assert model.segment(series).grid.matches(load(series).grid)
        return
    with pytest.raises(InputError, match=f"is {stated} and the model was made for") as error:
        model.segment(series)
    assert error.value.reason == "modality"
    with pytest.raises(InputError, match="--anyway"):
        segment_file(model, series, tmp_path / "labels.nii.gz")
    assert not (tmp_path / "labels.nii.gz").exists()
    assert model.segment(series, anyway=True).grid.matches(load(series).grid)
    assert segment_file(model, series, tmp_path / "labels.nii.gz", Options(anyway=True)).error is None


def tiny_plan_of(*channels: str):
    from models import tiny_plan

    return tiny_plan(channels=tuple(Channel(name=name, normalization=ZScore()) for name in channels))


def test_each_channel_has_its_own_modality(tmp_path):
    ct, pet = (write_source(tmp_path / kind, Modality=kind) for kind in ("CT", "PT"))
    model = tiny_model(tiny_plan_of("CT", "PET"))
    model.segment([ct, pet])
    with pytest.raises(InputError) as error:
        model.segment([pet, ct])
    assert error.value.reason == "modality"


def test_what_is_no_path_is_told_what_is_wanted():
    with pytest.raises(UsageError, match=r"ndarray came. Voxels in memory become a volume by medseg\.Volume"):
        tiny_model().segment(np.zeros((4, 4, 4)))
    with pytest.raises(UsageError, match="Volume came"):
        medseg.load(scan())


@pytest.mark.parametrize(("radius", "told"), [(6, False), (12, True), (3, True)])
@pytest.mark.parametrize("orientation", ["RAS", "PIL"])
def test_a_volume_far_from_what_training_saw_is_said(tmp_path, radius, told, orientation):
    model = threshold_model(50)
    model.seen = SEEN
    save(scan((30, 30, 30), radius, orientation), tmp_path / "scan.nii.gz")
    outcome = segment_file(model, tmp_path / "scan.nii.gz", tmp_path / "labels.nii.gz")
    volume = outcome.measurements[0].volume_ml
    assert told is not (0.5 / 3 < volume < 2.0 * 3)  # 0.9, 7.2 and 0.1 ml
    assert len(outcome.warnings) == told
    if told:
        assert f"ball: {volume:.3g} ml; training cases had 0.5 to 2 ml." in outcome.warnings[0]


def test_nothing_found_is_odd_where_every_training_case_had_it(tmp_path):
    model = threshold_model(1e6)
    save(scan(), tmp_path / "scan.nii.gz")
    for always in (True, False):
        volumes = {1: Range(smallest=0.5, largest=2.0, always=always)}
        model.seen = SEEN.model_copy(update={"volumes_ml": volumes})
        outcome = segment_file(model, tmp_path / "scan.nii.gz", tmp_path / "labels.nii.gz")
        assert [text.startswith("ball: 0 ml;") for text in outcome.warnings] == [True] * always


@pytest.mark.parametrize(
    ("shape", "roi", "told"),
    [
        ((30, 30, 30), None, False),
        ((90, 30, 30), None, True),
        ((30, 30, 9), None, True),
        ((90, 30, 30), ((0, 0, 0), (30, 30, 30)), False),
        ((30, 30, 30), ((0, 0, 0), (29, 29, 4)), True),
    ],
)
def test_a_field_of_view_far_from_what_training_saw_is_said(tmp_path, shape, roi, told):
    model = threshold_model(50)
    model.seen = SEEN.model_copy(update={"volumes_ml": {}})
    save(scan(shape), tmp_path / "scan.nii.gz")
    outcome = segment_file(model, tmp_path / "scan.nii.gz", tmp_path / "labels.nii.gz", Options(roi=roi))
    assert [" 20 x 20 x 20 to 40 x 40 x 40 mm" in text for text in outcome.warnings] == [True] * told


def test_a_model_folder_says_what_its_training_saw_where_it_knows(tmp_path):
    assert kept_seen(tmp_path) is None
    Kept(seen=SEEN).save(tmp_path / "fingerprint.json")
    assert kept_seen(tmp_path) == SEEN
    (tmp_path / "fingerprint.json").write_text('{"format": 1, "cases": []}')
    assert kept_seen(tmp_path) is None
    (tmp_path / "fingerprint.json").write_text('{"seen": {"volumes_ml": 7}}')
    with pytest.raises(ModelError, match="fingerprint is not valid"):
        kept_seen(tmp_path)


def labels_of(volume: Volume) -> Volume:
    return volume.with_array((volume.array > 50).astype(np.uint8))


def test_a_label_map_in_a_folder_is_left_out_and_said(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    image = scan()
    noise = np.random.default_rng(0).normal(0, 5, image.array.shape)
    save(image.with_array((image.array + noise).astype(np.float32)), folder / "image.nii.gz")
    save(labels_of(image), folder / "by_others.nrrd")
    save(labels_of(image).with_array(labels_of(image).array.astype(np.float32)), folder / "as_floats.nii.gz")
    outcomes = [*segment_folder(threshold_model(50), folder, tmp_path / "out")]
    assert {one.source.name for one in outcomes if one.left_out} == {"by_others.nrrd", "as_floats.nii.gz"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["image.labels.json", "image.nii.gz"]
    again = [*segment_folder(threshold_model(50), folder, tmp_path / "all", Options(anyway=True))]
    assert not any(one.left_out for one in again)
    assert len(again) == 3


def test_what_was_written_with_a_label_map_is_left_out(tmp_path):
    save(scan(), tmp_path / "image.nii.gz")
    options = Options(probabilities=True, uncertainty=True)
    segment_file(threshold_model(50), tmp_path / "image.nii.gz", tmp_path / "labels.nii.gz", options)
    files = sorted(tmp_path.glob("*.nii.gz"))
    assert {file.name for file in label_maps(files)} == {file.name for file in files} - {"image.nii.gz"}


def test_no_scan_is_left_out_for_what_lies_beside_it(tmp_path):
    """The table of case.mha lies beside case.nii.gz, too; scans share a grid; whole numbers alone are no labels."""
    image = scan()
    wild = np.random.default_rng(0).integers(0, 200, image.array.shape).astype(np.uint8)
    save(image.with_array(wild), tmp_path / "case.nii.gz")
    save(image.with_array(np.minimum(wild + 3, 200)), tmp_path / "case_2.nii.gz")
    save(labels_of(image), tmp_path / "case.mha")
    write_table(make_labels([(1, "ball")]), tmp_path / "case.labels.json")
    files = sorted(tmp_path.glob("case*.[nm]*"))
    assert [file.name for file in label_maps(files)] == ["case.mha"]
    (tmp_path / "case.mha").unlink()
    assert not label_maps([tmp_path / "case.nii.gz", tmp_path / "case_2.nii.gz"])


def test_maps_of_patches_without_a_scan_are_taken_for_scans(tmp_path):
    for name in "ab":
        save(labels_of(scan()), tmp_path / f"{name}.nii.gz")
    assert not label_maps(sorted(tmp_path.iterdir()))


def test_many_labels_are_patches_and_noise_is_none():
    patches = np.kron(np.arange(1, 126).reshape(5, 5, 5), np.ones((6, 6, 6)))[None]
    assert is_patches(patches)
    assert not is_patches(np.random.default_rng(0).permutation(patches.ravel()).reshape(patches.shape))
    assert not is_patches(patches + 0.5)
    assert not is_patches(-patches)
    assert not is_patches(np.zeros((1, 4, 4, 4)))
    assert not is_patches(np.where(patches > 3, np.nan, 1.0))


def test_a_label_map_by_its_own_path_is_refused(tmp_path):
    save(scan(), tmp_path / "image.nii.gz")
    model = threshold_model(50)
    segment_file(model, tmp_path / "image.nii.gz", tmp_path / "labels.nii.gz")
    with pytest.raises(InputError, match="a label map and no scan") as error:
        segment_file(model, tmp_path / "labels.nii.gz", tmp_path / "again.nii.gz")
    assert error.value.reason == "label_map"
    segment_file(model, tmp_path / "labels.nii.gz", tmp_path / "again.nii.gz", Options(anyway=True))


@pytest.mark.parametrize("below", ["", "deep/er"])
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_a_folder_of_slices_is_the_series_whatever_lies_beside(tmp_path, below, ending):
    series = tmp_path / "study"
    write_source(series / below)
    grid = load(series).grid
    save(scan(), series / f"other{ending}")
    assert not is_folder_of_volumes(series)
    outcome = segment_file(tiny_model(tiny_plan_of("CT")), series, tmp_path / "labels.nii.gz")
    assert load(tmp_path / "labels.nii.gz").grid.matches(grid)
    assert "1 volume file(s), which were not" in outcome.warnings[0]
    assert load(series).grid.matches(grid)


def test_objects_of_labels_make_no_series_of_a_folder(tmp_path):
    series = write_source(tmp_path / "series")
    image = load(series)
    medseg.save_dicom_seg(
        image.with_array((image.array > image.array.mean()).astype(np.uint8)), tmp_path / "seg.dcm", source=series
    )
    folder = tmp_path / "volumes"
    folder.mkdir()
    shutil.move(tmp_path / "seg.dcm", folder / "seg.dcm")
    assert not holds_slices(folder)
    save(scan(), folder / "scan.nii.gz")
    assert is_folder_of_volumes(folder)


def test_a_folder_of_volumes_wants_a_folder_for_the_labels(tmp_path):
    (tmp_path / "in").mkdir()
    save(scan(), tmp_path / "in/a.nii.gz")
    with pytest.raises(UsageError, match="so the output is a folder, too"):
        [*segment_folder(tiny_model(), tmp_path / "in", tmp_path / "out.nii.gz")]
    assert not (tmp_path / "out.nii.gz").exists()


def test_names_of_labels_lie_beside_the_labels(tmp_path):
    save(scan(), tmp_path / "scan.nii.gz")
    segment_file(threshold_model(50), tmp_path / "scan.nii.gz", tmp_path / "labels.nii.gz")
    assert [(one.value, one.name) for one in read_table(tmp_path / "labels.labels.json")] == [(1, "ball")]
    rows = medseg.write_report(tmp_path / "scan.nii.gz", tmp_path / "labels.nii.gz", tmp_path / "report.json")
    assert [row.name for row in rows] == ["ball"]


def test_labels_of_a_series_can_be_a_dicom_seg(tmp_path):
    series = write_source(tmp_path / "series")
    level = float(load(series).array.mean())
    model = threshold_model(level)
    outcome = segment_file(model, series, tmp_path / "labels.dcm", Options(uncertainty=True))
    labels, table = medseg.load_dicom_seg(tmp_path / "labels.dcm", source=series)
    assert [one.name for one in table] == ["ball"]
    np.testing.assert_array_equal(labels.array[0], model.segment(series).array[0])
    assert outcome.measurements[0].voxels == np.count_nonzero(labels.array)
    assert (tmp_path / "labels_uncertainty.nii.gz").is_file()
    assert not (tmp_path / "labels.labels.json").exists()  # the names are in the object


def test_a_dicom_seg_needs_a_series_and_replaces_no_slice(tmp_path):
    save(scan(), tmp_path / "scan.nii.gz")
    with pytest.raises(UsageError, match="refers to the slices of a series"):
        segment_file(tiny_model(), tmp_path / "scan.nii.gz", tmp_path / "labels.dcm")
    series = write_source(tmp_path / "series")
    first = min(series.iterdir())
    first = first.rename(first.with_suffix(".dcm"))
    content = first.read_bytes()
    with pytest.raises(UsageError, match="would replace a slice"):
        segment_file(tiny_model(tiny_plan_of("CT")), series, first)
    assert first.read_bytes() == content


def test_the_shipped_model_knows_what_it_saw_and_names_no_case():
    model = medseg.Model.load("hippocampus")
    assert model.seen is not None
    assert set(model.seen.volumes_ml) == {1, 2}
    shipped = Path(medseg.__file__).parent / "models/hippocampus/fingerprint.json"
    assert "hippocampus_0" not in shipped.read_text()
    assert json.loads(shipped.read_text())["seen"] == model.seen.model_dump(mode="json")


@pytest.mark.realdata
def test_the_shipped_fingerprint_is_that_of_the_data(realdata):
    from medseg.train.fingerprint import Fingerprint

    shipped = Path(medseg.__file__).parent / "models/hippocampus/fingerprint.json"
    assert medseg.fingerprint(medseg.read_dataset(realdata / "hippocampus_mr")) == Fingerprint.load(shipped)
