"""Reports of label files: the same numbers as a table, a picture and a DICOM SR, of whatever holds the labels."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import STUDY, TABLE, errors_of_dciodvfy, some_labels, write_series, write_source

import medseg
from medseg import cli
from medseg.errors import GeometryError, OutputError, UsageError
from medseg.io.dicom_series import choose, find_series
from medseg.io.label_table import write_table
from medseg.report.write import write_report
from medseg.volume import Grid, Volume


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "ct")


@pytest.fixture
def labels(source: Path) -> Path:
    path = source.parent / "labels.nii.gz"
    medseg.save(some_labels(choose(source)[1]), path)
    write_table(TABLE, source.parent / "labels.labels.json")
    return path


def test_one_set_of_numbers(source: Path, labels: Path, tmp_path: Path) -> None:
    rows = write_report(source, labels, tmp_path / "a.json")
    assert [row.name for row in rows] == [label.name for label in TABLE]
    assert json.loads((tmp_path / "a.json").read_text()) == [json.loads(json.dumps(row.to_dict())) for row in rows]
    write_report(source, labels, tmp_path / "a.csv")
    volumes = [float(row["volume_ml"]) for row in csv.DictReader((tmp_path / "a.csv").read_text().splitlines())]
    assert volumes == pytest.approx([row.volume_ml for row in rows])
    write_report(source, labels, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    write_report(source, labels, tmp_path / "a.dcm")
    report = pydicom.dcmread(tmp_path / "a.dcm")
    assert (report.Modality, report.StudyInstanceUID) == ("SR", STUDY["StudyInstanceUID"])
    assert errors_of_dciodvfy(tmp_path / "a.dcm") == []


@pytest.mark.parametrize("ending", ["csv", "png"])
def test_labels_may_lie_a_hundredth_of_a_millimeter_away(
    source: Path, labels: Path, tmp_path: Path, ending: str
) -> None:
    found = medseg.load(labels)
    affine = found.grid.affine.copy()
    affine[0, 3] += 0.01  # as other programs round
    medseg.save(Volume(found.array, Grid(found.grid.shape, affine)), tmp_path / "near.nii.gz")
    rows = write_report(source, tmp_path / "near.nii.gz", tmp_path / f"a.{ending}")
    assert [row.voxels for row in rows] == [np.count_nonzero(found.array == row.value) for row in rows]


@pytest.mark.parametrize("kind", ["seg", "rtstruct"])
def test_labels_may_be_a_dicom_object_and_overlap(source: Path, kind: str, tmp_path: Path) -> None:
    grid = choose(source)[1]
    masks = np.zeros((4, *grid.shape), np.uint8)
    masks[0, 2:6, 2:6], masks[1, 4:9, 3:8, :3] = 1, 1
    save = medseg.save_dicom_seg if kind == "seg" else medseg.save_rtstruct
    save(Volume(masks, grid), tmp_path / "object.dcm", source=source, table=TABLE)
    rows = write_report(source, tmp_path / "object.dcm", tmp_path / "a.csv")
    assert [row.voxels for row in rows] == [masks[0].sum(), masks[1].sum()]
    assert all(row.intensity_mean is not None for row in rows)


def test_nothing_found_is_said(source: Path, labels: Path, tmp_path: Path) -> None:
    medseg.save(Volume(np.zeros((1, *choose(source)[1].shape), np.uint8), choose(source)[1]), labels)
    rows = write_report(source, labels, tmp_path / "a.json")
    assert [row["voxels"] for row in json.loads((tmp_path / "a.json").read_text())] == [0] * len(TABLE)
    write_report(source, labels, tmp_path / "a.dcm")
    assert str(pydicom.dcmread(tmp_path / "a.dcm")).count("Absent") == len(rows)


def test_an_irregular_stack(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", [0, 1, 2, 3.4, 4.4, 5.4], shape=(11, 13), **STUDY)
    (series,) = find_series(tmp_path / "ct")
    assert series.regular_grid is not None
    medseg.save(some_labels(series.regular_grid), tmp_path / "labels.nii.gz")
    assert all(row.voxels for row in write_report(tmp_path / "ct", tmp_path / "labels.nii.gz", tmp_path / "sr.dcm"))


def test_what_makes_no_sense(source: Path, labels: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="ends in .json"):
        write_report(source, labels, tmp_path / "a.txt")
    medseg.save(medseg.load(source), tmp_path / "image.nii.gz")
    with pytest.raises(UsageError, match="slices of a series"):
        write_report(tmp_path / "image.nii.gz", labels, tmp_path / "a.dcm")
    medseg.save(some_labels(Grid((5, 5, 5), np.eye(4))), labels)
    with pytest.raises(GeometryError, match="another grid"):
        write_report(source, labels, tmp_path / "a.json")


def test_command_line(
    source: Path, labels: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = source.parent / "sr.dcm"
    monkeypatch.setattr(sys, "argv", ["medseg", "report", str(source), str(labels), str(target)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert target.is_file()
    assert "left kidney" in capsys.readouterr().out
