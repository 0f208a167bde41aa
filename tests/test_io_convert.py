"""Labels from file to file: names, values and voxels survive."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import some_labels, write_source

import medseg
from medseg import cli
from medseg.errors import InputError, UnreadableFile, UsageError
from medseg.io.convert import convert
from medseg.io.dicom_series import choose
from medseg.io.label_table import read_table, write_table
from medseg.io.structures import beside
from medseg.labels import Label, SnomedCode, make_labels
from medseg.report.write import write_report
from medseg.volume import Volume

TABLE = (
    Label(value=1, name="Füße", color="#ff0000"),
    Label(value=2, name="left kidney", color="#00ff80", snomed=SnomedCode(value="64033007", meaning="Kidney")),
    Label(value=5, name="liver", color="#0a141e"),
)


TWICE = json.dumps([{"value": 1, "name": name, "color": "#000000"} for name in ("liver", "spleen")])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "ct", "oblique")


@pytest.fixture
def labels(source: Path) -> Path:
    """Return a label file with a table beside it."""
    path = source.parent / "labels.nii.gz"
    medseg.save(some_labels(choose(source)[1]), path)
    write_table(TABLE, beside(path))
    return path


@pytest.mark.parametrize(("kind", "values"), [(None, [1, 2, 3]), ("labelmap", [1, 2, 5]), ("rtstruct", [1, 2, 5])])
def test_to_dicom_and_back(source: Path, labels: Path, kind: str | None, values: list[int]) -> None:
    made, back = source.parent / "made.dcm", source.parent / "back.nrrd"
    assert convert(labels, made, source=source, kind=kind) == [made]
    assert convert(made, back, source=source) == [back]
    expected = np.array([0, values[0], values[1], 0, 0, values[2]])[medseg.load(labels).array]
    np.testing.assert_array_equal(medseg.load(back).reoriented("LPS").array, medseg.load(labels).with_array(
        expected).reoriented("LPS").array)  # fmt: skip
    assert [(label.value, label.name) for label in read_table(beside(back))] == [
        (value, label.name) for value, label in zip(values, TABLE, strict=True)
    ]


def test_from_one_dicom_object_to_another(source: Path, labels: Path) -> None:
    folder = source.parent
    convert(labels, folder / "rt.dcm", source=source, kind="rtstruct")
    (folder / "rt.dcm").rename(folder / "without_ending")
    convert(folder / "without_ending", folder / "seg.dcm", source=source)
    data = pydicom.dcmread(folder / "seg.dcm")
    assert [item.SegmentLabel for item in data.SegmentSequence] == [label.name for label in TABLE]
    # Nobody knows what drew them.
    assert {item.SegmentAlgorithmType for item in data.SegmentSequence} == {"SEMIAUTOMATIC"}


def test_labels_that_overlap_become_one_mask_each(source: Path, labels: Path) -> None:
    grid = choose(source)[1]
    masks = np.zeros((3, *grid.shape), np.uint8)
    masks[0, 2:6, 2:6], masks[1, 4:9, 3:8], masks[2, 0, 0, 4] = 1, 1, 1
    folder = source.parent
    medseg.save_rtstruct(Volume(masks, grid), folder / "rt.dcm", source=source, table=TABLE)
    files = [folder / f"out_{value}.nii.gz" for value in (1, 2, 5)]
    assert convert(folder / "rt.dcm", folder / "out.nii.gz", source=source) == files
    for mask, file in zip(masks, files, strict=True):
        np.testing.assert_array_equal(medseg.load(file).reoriented(grid.orientation).array[0], mask)
    assert [label.name for label in read_table(folder / "out.labels.json")] == [label.name for label in TABLE]


@pytest.mark.parametrize("names", [[(1, "one"), (5, "five"), (7, "seven")], [(5, "five"), (1, "one")], []])
def test_a_table_names_masks_by_their_values(source: Path, names: list[tuple[int, str]]) -> None:
    grid, folder = choose(source)[1], source.parent
    masks = np.zeros((3, *grid.shape), np.uint8)
    masks[0, 2:6, 2:6], masks[1, 4:9, 3:8], masks[2, 0, 0, 4] = 1, 1, 1
    medseg.save_rtstruct(Volume(masks, grid), folder / "rt.dcm", source=source, table=TABLE)
    write_table([Label(value=value, name=name, color="#000000") for value, name in names], folder / "names.json")
    files = [folder / f"out_{value}.nii.gz" for value in (1, 2, 5)]
    assert convert(folder / "rt.dcm", folder / "out.nii.gz", source=source, table=folder / "names.json") == files
    expected = [dict(names).get(value, f"label {value}") for value in (1, 2, 5)]
    assert [label.name for label in read_table(folder / "out.labels.json")] == expected
    rows = write_report(source, folder / "rt.dcm", folder / "rows.csv", table=folder / "names.json")
    assert [(row.name, row.voxels) for row in rows] == list(zip(expected, masks.sum((1, 2, 3)), strict=True))


@pytest.mark.parametrize("named", [False, True])
def test_names_go_from_volume_to_volume(labels: Path, named: bool) -> None:
    table, out = labels.with_name("names.json"), labels.with_name("out.nrrd")
    write_table(make_labels([(1, "one")]), table)
    convert(labels, out, table=table if named else None)
    assert read_table(beside(out)) == (make_labels([(1, "one")]) if named else TABLE)
    convert(labels, labels.with_suffix("").with_suffix(".mha"), table=table)
    assert read_table(beside(labels)) == TABLE  # of the input


def test_a_table_can_be_named(source: Path, labels: Path) -> None:
    plan = source.parent / "plan.json"
    plan.write_text(json.dumps({"labels": [label.model_dump() for label in make_labels([(1, "one"), (2, "two")])]}))
    convert(labels, source.parent / "seg.dcm", source=source, table=plan)
    names = [item.SegmentLabel for item in pydicom.dcmread(source.parent / "seg.dcm").SegmentSequence]
    assert names == ["one", "two", "label 5"]


@pytest.mark.parametrize("content", ["{}", '[{"value": 0}]', "7", TWICE])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(InputError, match="A label table is a JSON list") as caught:
        read_table(tmp_path / "table.json")
    assert caught.value.reason == "label_table"
    (tmp_path / "table.json").write_text("[{]")
    with pytest.raises(UnreadableFile, match="The label table is not valid JSON"):
        read_table(tmp_path / "table.json")
    with pytest.raises(UnreadableFile, match="The label table is missing"):
        read_table(tmp_path / "missing.json")


def test_what_makes_no_sense(source: Path, labels: Path) -> None:
    with pytest.raises(UsageError, match="belongs to a series"):
        convert(labels, source.parent / "seg.dcm")
    with pytest.raises(UsageError, match="is one of seg, labelmap, rtstruct"):
        convert(labels, source.parent / "seg.dcm", source=source, kind="dose")
    with pytest.raises(UsageError, match=r"medseg report writes SR"):  # as test_report_write.py shows
        convert(labels, source.parent / "sr.dcm", source=source, kind="sr")
    with pytest.raises(UsageError, match="other files take no kind"):
        convert(labels, source.parent / "seg.nii.gz", source=source, kind="seg")


@pytest.fixture
def run(capsys, monkeypatch):
    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["medseg", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        assert not done.value.code
        return capsys.readouterr().out

    return call


def test_command_line(run, source: Path, labels: Path) -> None:
    folder = source.parent
    assert run(labels, folder / "rt.dcm", "--source", source, "--to", "rtstruct") == ""
    assert run(folder / "rt.dcm", folder / "back.nii.gz", "--source", source) == ""
    assert json.loads((folder / "back.labels.json").read_text("utf8"))[0]["name"] == "Füße"
    grid = choose(source)[1]
    medseg.save(Volume(np.zeros((1, *grid.shape), np.uint8), grid), folder / "empty.nii.gz")
    assert "No label is set" in run(folder / "empty.nii.gz", folder / "empty.dcm", "--source", source)
    assert not (folder / "empty.dcm").exists()


def test_a_model_names_labels(source: Path, labels: Path, tmp_path: Path) -> None:
    """By the name of one that ships, by its folder, and by its plan."""
    shipped = Path(medseg.__file__).parent / "models/hippocampus"
    for number, model in enumerate(("hippocampus", shipped, shipped / "plan.json")):
        convert(labels, tmp_path / f"{number}.nii.gz", table=model)
        names = [label.name for label in read_table(tmp_path / f"{number}.labels.json")]
        assert names == ["Anterior", "Posterior"]
    with pytest.raises(UnreadableFile):
        convert(labels, tmp_path / "none.nii.gz", table="no_such_model")
