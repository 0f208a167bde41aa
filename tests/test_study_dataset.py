"""Training folders made of studies and the contours in them: what is taken, what is refused, and what is never told."""

from __future__ import annotations

import gzip
import json
import os
import stat
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import yaml
from dicom_files import FRAME, STUDY, write_series, write_source

import medseg
from medseg import cli
from medseg.errors import DatasetError, OutputError, UnreadableFile, UsageError
from medseg.io.dicom_seg import save_dicom_seg
from medseg.io.dicom_series import choose, find_series, read_series
from medseg.io.rtstruct import save_rtstruct
from medseg.labels import make_labels
from medseg.study.dataset import CaseOutcome, make_dataset
from medseg.study.dataset_folder import untaken
from medseg.study.rules import load_rules
from medseg.train.dataset import read_dataset
from medseg.volume import Volume

RULES: dict[str, Any] = {
    "format": 1,
    "name": "organs",
    "channels": [{"name": "CT", "modality": ["CT"]}],
    "labels": [{"name": "liver", "match": ["liver", "hepar.*"]}, {"name": "kidney", "match": ["kidney [lr]"]}],
}
BOXES = {"liver": np.s_[2:5, 2:5], "kidney": np.s_[7:9, 1:4], "PTV": np.s_[1:9, 1:9], "other": np.s_[9:12, 7:10]}
"""Where structures lie, by the start of their names: in columns and rows, on slices 1 to 3."""


def study(folder: Path, number: int, structures: dict[str, str], kind: str = "rt", **tags: Any) -> Path:
    """Write a study of one CT, and an object with structures (name -> box), and return the folder of the CT."""
    own = {"StudyInstanceUID": f"1.2.3.{number}", "PatientID": f"SECRET-{number}", "FrameOfReferenceUID": f"{FRAME}.1"}
    source = write_source(folder / f"MUELLER_{number}" / "ct", **own | tags)
    write_object(source, source.parent / f"{kind}.dcm", structures, kind)
    return source


def write_object(source: Path, path: Path, structures: dict[str, str], kind: str = "rt") -> None:
    grid = choose(source)[1]
    masks = np.zeros((len(structures), *grid.shape), np.uint8)
    for mask, box in zip(masks, structures.values(), strict=True):
        mask[(*BOXES[box], slice(1, 4))] = 1
    table = make_labels(enumerate(structures, start=1))
    save = save_rtstruct if kind == "rt" else save_dicom_seg
    if len(masks) == 1:
        masks = masks * np.uint8(table[0].value)
    save(Volume(masks, grid), path, source=source, table=table)


def rules(folder: Path, **changes: Any) -> Path:
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump(RULES | changes), encoding="utf-8")
    return path


def made(tmp_path: Path, **changes: Any) -> list[CaseOutcome]:
    return make_dataset(tmp_path / "studies", tmp_path / "out", rules(tmp_path, **changes))


def labels_of(tmp_path: Path, outcome: CaseOutcome) -> Volume:
    return medseg.load(tmp_path / "out" / "labels" / f"{outcome.case}.nii.gz")


def test_a_folder_that_can_be_trained_on(tmp_path: Path) -> None:
    first = study(tmp_path / "studies", 1, {"Hepar, links": "liver", "KIDNEY L": "kidney", "Müller": "PTV"})
    study(tmp_path / "studies", 2, {" LIVER": "liver"}, kind="seg", PatientID="SECRET-1")
    study(tmp_path / "studies", 3, {"PTV": "PTV"})
    write_source(tmp_path / "studies" / "bare", StudyInstanceUID="1.2.3.4")
    outcomes = made(tmp_path)
    assert [(one.status, one.reason) for one in outcomes] == [
        ("taken", None), ("taken", None), ("refused", "no_structures"), ("refused", "no_structures")
    ]  # fmt: skip
    assert "None of the 1 structures" in str(outcomes[2].text)
    assert "no RTSTRUCT or SEG" in str(outcomes[3].text)
    assert untaken(outcomes) == [("Müller", 1), ("PTV", 1)]
    dataset = read_dataset(tmp_path / "out")
    assert [label.name for label in dataset.labels] == ["liver", "kidney"]
    assert [case.name for case in dataset] == sorted(one.case for one in outcomes[:2])
    assert len({case.group for case in dataset}) == 1  # one patient
    assert {case.name: case.undrawn for case in dataset} == {
        outcomes[0].case: frozenset(), outcomes[1].case: frozenset({2})
    }  # fmt: skip
    image = medseg.load(first)
    expected = np.zeros(image.grid.shape)
    expected[(*BOXES["liver"], slice(1, 4))], expected[(*BOXES["kidney"], slice(1, 4))] = 1, 2
    labels = labels_of(tmp_path, outcomes[0])
    assert labels.grid.matches(image.grid)
    np.testing.assert_array_equal(labels.array[0], expected)
    stored = medseg.load(tmp_path / "out" / "images" / f"{outcomes[0].case}.nii.gz")
    np.testing.assert_array_equal(stored.array, image.array)


def test_nothing_that_is_shared_tells_who_it_is(tmp_path: Path) -> None:
    study(tmp_path / "studies", 1, {"liver": "liver", "liver of Meier": "other"})
    made(tmp_path)
    secrets = ("SECRET", "MUELLER", "Meier", STUDY["PatientName"], "1.2.3.1", "1955", str(tmp_path))
    for file in (tmp_path / "out").rglob("*"):
        content = b"" if file.is_dir() else file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        told = str(file.relative_to(tmp_path)).encode() + content
        assert not [one for one in secrets if one.encode() in told]
    private = tmp_path / "out.private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert {stat.S_IMODE((private / name).stat().st_mode) for name in ("key", "studies.csv")} == {0o600}
    assert "1.2.3.1" in (private / "studies.csv").read_text()
    assert "liver of Meier,1" in (private / "structures.csv").read_text()


@pytest.mark.parametrize(
    ("structures", "changes", "reason"),
    [
        ({"liver": "liver", "Hepar 2": "other"}, {}, "several_structures"),
        ({"kidney l": "PTV", "liver": "liver"}, {}, "overlap"),
    ],
)
def test_what_is_not_clear_is_refused(
    tmp_path: Path, structures: dict[str, str], changes: dict[str, Any], reason: str
) -> None:
    study(tmp_path / "studies", 1, structures)
    (outcome,) = made(tmp_path, **changes)
    assert (outcome.status, outcome.reason, outcome.structures) == ("refused", reason, ())
    assert not [*(tmp_path / "out" / "labels").iterdir()]
    assert json.loads((tmp_path / "out" / "cases.json").read_text()) == []


def test_rules_can_unite_structures_and_let_the_later_label_win(tmp_path: Path) -> None:
    study(tmp_path / "studies", 1, {"liver": "liver", "Hepar 2": "other", "Kidney L": "PTV"})
    labels = [RULES["labels"][1], RULES["labels"][0] | {"several": "union"}]
    (outcome,) = made(tmp_path, labels=labels, overlap="later")
    array = labels_of(tmp_path, outcome).array[0]
    assert outcome.structures == ("kidney", "liver")
    assert (array[BOXES["liver"]][..., 2] == 2).all()
    assert (array[BOXES["other"]][..., 2] == 2).all()
    assert (array == 1).sum() == 3 * (8 * 8 - 9)


def test_what_is_done_is_kept_and_what_changed_is_done_again(tmp_path: Path) -> None:
    source = study(tmp_path / "studies", 1, {"liver": "liver"})
    study(tmp_path / "studies", 2, {"PTV": "PTV"})
    first = made(tmp_path)
    assert not any(one.kept for one in first)
    again = made(tmp_path)
    assert all(one.kept for one in again)
    assert [(one.case, one.status, one.text) for one in again] == [(one.case, one.status, one.text) for one in first]
    (tmp_path / "out" / "labels" / f"{first[0].case}.nii.gz").unlink()
    assert [one.kept for one in made(tmp_path)] == [False, True]
    write_object(source, source.parent / "rt.dcm", {"liver": "other"})
    outcome = made(tmp_path)[0]
    assert not outcome.kept
    assert labels_of(tmp_path, outcome).array[0, 10, 8, 2] == 1
    changed = made(tmp_path, labels=[{"name": "PTV"}])
    assert [(one.status, one.kept) for one in changed] == [("refused", False), ("taken", False)]
    assert [file.name for file in (tmp_path / "out" / "labels").iterdir()] == [f"{changed[1].case}.nii.gz"]


@pytest.mark.parametrize("damage", ["key", "type", "case", "json", "pipe"])
def test_a_study_whose_record_is_damaged_is_done_again(tmp_path: Path, damage: str) -> None:
    study(tmp_path / "studies", 1, {"liver": "liver"})
    study(tmp_path / "studies", 2, {"liver": "liver"})
    first, second = made(tmp_path)
    tables = [tmp_path / "out" / name for name in ("dataset.json", "cases.json")]
    before = [table.read_text() for table in tables]
    record = tmp_path / "out.private" / "cases" / f"{first.case}.json"
    content = json.loads(record.read_text())
    record.unlink()
    if damage == "pipe":
        os.mkfifo(record)
    elif damage == "json":
        record.write_text("[" * 10**5)
    else:
        del content["group"]
        changes = {"key": {}, "type": {"group": ["a"]}, "case": {"group": "", "case": second.case}}
        record.write_text(json.dumps(content | changes[damage]))
    assert [(one.status, one.kept) for one in made(tmp_path)] == [("taken", False), ("taken", True)]
    assert [table.read_text() for table in tables] == before
    assert json.loads(record.read_text())["case"] == first.case


def test_a_dataset_that_is_being_made_cannot_be_trained_on(tmp_path: Path) -> None:
    for number in (1, 2):
        study(tmp_path / "studies", number, {"liver": "liver"})
    made(tmp_path)

    def interrupt(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    turned = rules(tmp_path, labels=RULES["labels"][::-1])  # liver is 2 now
    with pytest.raises(KeyboardInterrupt):
        make_dataset(tmp_path / "studies", tmp_path / "out", turned, progress=interrupt)
    with pytest.raises(DatasetError, match="dataset.json of the dataset is missing"):
        read_dataset(tmp_path / "out")
    make_dataset(tmp_path / "studies", tmp_path / "out", turned)
    assert [label.name for label in read_dataset(tmp_path / "out").labels] == ["kidney", "liver"]
    study(tmp_path / "more", 3, {"kidney l": "kidney"})
    study(tmp_path / "more", 4, {"kidney l": "kidney"})
    with pytest.raises(KeyboardInterrupt):  # one more case, of which cases.json does not say that it has no liver drawn
        make_dataset(tmp_path / "more", tmp_path / "out", turned, progress=interrupt)
    with pytest.raises(DatasetError, match="dataset.json of the dataset is missing"):
        read_dataset(tmp_path / "out")


def test_studies_can_be_added_from_another_folder(tmp_path: Path) -> None:
    study(tmp_path / "studies", 1, {"liver": "liver"})
    study(tmp_path / "more", 2, {"liver": "liver"})
    made(tmp_path)
    make_dataset(tmp_path / "more", tmp_path / "out", rules(tmp_path))
    assert len(read_dataset(tmp_path / "out")) == 2


def test_the_contours_say_which_series_is_meant(tmp_path: Path) -> None:
    source = study(tmp_path / "studies", 1, {"liver": "liver"}, SeriesNumber=9)
    tags = {"StudyInstanceUID": "1.2.3.1", "FrameOfReferenceUID": f"{FRAME}.1", "SeriesNumber": 1}
    write_source(source.parent / "other", **tags)
    write_source(source.parent / "mr", Modality="MR", **tags)
    (outcome,) = made(tmp_path, channels=[*RULES["channels"], {"name": "MR", "modality": ["MR"]}])
    assert outcome.status == "taken"
    (case,) = read_dataset(tmp_path / "out")
    assert [file.name for file in case.images] == [f"{case.name}_0000.nii.gz", f"{case.name}_0001.nii.gz"]
    for file, folder in zip(case.images, (source, source.parent / "mr"), strict=True):
        np.testing.assert_array_equal(medseg.load(file).array, medseg.load(folder).array)


def edited(source: Path, edit: Any) -> None:
    path = source.parent / "rt.dcm"
    data = pydicom.dcmread(path)
    edit(data)
    data.save_as(path)


@pytest.mark.parametrize("kind", ["rt", "seg"])
def test_contours_in_a_study_of_their_own_are_found_by_the_series_they_refer_to(tmp_path: Path, kind: str) -> None:
    source = study(tmp_path / "studies", 1, {"liver": "liver"}, kind)
    study(tmp_path / "studies", 2, {"liver": "other"}, kind)
    (tmp_path / "studies" / "planning").mkdir()
    moved = (source.parent / f"{kind}.dcm").rename(tmp_path / "studies" / "planning" / "x")
    data = pydicom.dcmread(moved)
    data.StudyInstanceUID = "1.2.3.99"
    data.save_as(moved)
    outcomes = made(tmp_path)
    ends = {one.case: (one.status, one.reason) for one in outcomes}
    assert [*ends.values()] == [("taken", None), ("taken", None), ("refused", "other_study")]
    expected = np.zeros(medseg.load(source).grid.shape)
    expected[(*BOXES["liver"], slice(1, 4))] = 1
    np.testing.assert_array_equal(labels_of(tmp_path, outcomes[0]).array[0], expected)
    assert [one.kept for one in made(tmp_path)] == [True] * 3
    write_object(source, moved, {"liver": "PTV"}, kind)  # drawn anew, and in the study of its series
    again = made(tmp_path)
    assert [(one.kept, one.status) for one in again] == [(False, "taken"), (True, "taken")]
    assert labels_of(tmp_path, again[0]).array.sum() > expected.sum()
    (tmp_path / "studies" / "copy").mkdir()
    data.save_as(moved)
    copied = pydicom.dcmread(next(source.iterdir()))
    copied.StudyInstanceUID, copied.SOPInstanceUID = "1.2.3.77", "1.2.3.78"
    copied.save_as(tmp_path / "studies" / "copy" / "x")  # the series is in two studies: which is meant is not guessed
    assert [one.reason for one in made(tmp_path)] == ["no_structures", None, "no_structures", "other_study"]


def test_a_structure_without_contours_counts_as_not_drawn(tmp_path: Path) -> None:
    source = study(tmp_path / "studies", 1, {"liver": "liver", "kidney r": "kidney"})
    edited(source, lambda data: data.ROIContourSequence.pop(1))
    (outcome,) = made(tmp_path)
    assert outcome.structures == ("liver",)
    assert "a structure for kidney covers no voxel" in outcome.warnings[0]
    edited(source, lambda data: data.ROIContourSequence.pop(0))
    (outcome,) = made(tmp_path)
    assert (outcome.status, outcome.reason) == ("refused", "no_structures")
    assert "cover no voxel" in str(outcome.text)


def drop_one(data: Any) -> None:
    data.ROIContourSequence[0].ContourSequence.pop(1)


def open_one(data: Any) -> None:
    data.ROIContourSequence[0].ContourSequence[0].ContourGeometricType = "OPEN_PLANAR"


def tip_one(data: Any) -> None:
    contour = data.ROIContourSequence[0].ContourSequence[-1]
    contour.ContourData = [*contour.ContourData[:2], float(contour.ContourData[2]) + 2, *contour.ContourData[3:]]


def cut_one(data: Any) -> None:
    contour = data.ROIContourSequence[0].ContourSequence[-1]
    contour.ContourData = contour.ContourData[:-1]


def add_one_of_no_structure(data: Any) -> None:
    data.ROIContourSequence.append(deepcopy(data.ROIContourSequence[0]))
    data.ROIContourSequence[-1].ReferencedROINumber = 99


def state_a_frame(data: Any) -> None:
    data.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = "1.2.3"


def test_odd_contours_are_told_or_refused(tmp_path: Path) -> None:
    source = study(tmp_path / "studies", 1, {"liver": "liver"})
    for edit, told in (
        (drop_one, "liver is not drawn on 1 slices between its ends"),
        (open_one, "1 contours are open"),
        (add_one_of_no_structure, "contours have a number that no structure has"),
        (state_a_frame, "1 structures state another frame of reference"),
    ):
        edited(source, edit)
        (outcome,) = made(tmp_path)
        assert outcome.status == "taken"
        assert told in "; ".join(outcome.warnings)
    for edit in (tip_one, cut_one):
        edited(source, edit)
        (outcome,) = made(tmp_path)
        assert (outcome.status, outcome.reason) == ("refused", "contours")


def test_irregular_steps_are_repaired_with_the_labels_of_the_nearest_slice(tmp_path: Path) -> None:
    tags = STUDY | {"StudyInstanceUID": "1.2.3.1"}
    folder = tmp_path / "studies" / "a" / "ct"
    write_series(folder, [0, 1, 2, 3.4, 4.4, 5.4], shape=(11, 13), **tags)
    (series,) = find_series(folder)
    image = read_series(series)
    box = np.zeros((1, *image.grid.shape), np.uint8)
    box[0, 2:5, 2:5, 1:5] = 1
    save_rtstruct(Volume(box, image.grid), folder.parent / "rt.dcm", source=series, table=make_labels([(1, "liver")]))
    (outcome,) = made(tmp_path)
    labels = labels_of(tmp_path, outcome)
    assert labels.grid.matches(image.grid)
    np.testing.assert_array_equal(labels.array, box)


def test_a_damaged_file_fails_its_study_alone_and_is_tried_again(tmp_path: Path) -> None:
    source = study(tmp_path / "studies", 1, {"liver": "liver"})
    study(tmp_path / "studies", 2, {"liver": "liver"})
    file = next(source.iterdir())
    whole = file.read_bytes()
    file.write_bytes(whole[:-50])
    outcomes = made(tmp_path)
    assert sorted(one.status for one in outcomes) == ["failed", "taken"]
    file.write_bytes(whole)
    assert sorted((one.status, one.kept) for one in made(tmp_path)) == [("taken", False), ("taken", True)]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"labels": []}, "labels"),
        ({"labels": [{"name": "a"}, {"name": "a"}]}, "two labels or two channels have one name"),
        ({"labels": [{"name": "background"}]}, "background is what is left"),
        ({"labels": [{"name": "ignore"}]}, "called ignore marks voxels"),
        ({"labels": [{"name": "a", "match": ["("]}]}, "no regular expression"),
        ({"overlap": "mix"}, "overlap"),
    ],
)
def test_rules_that_make_no_sense(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        load_rules(rules(tmp_path, **changes))


def test_folders_that_make_no_sense(tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    with pytest.raises(UnreadableFile, match="no DICOM file"):
        made(tmp_path)
    study(tmp_path / "studies", 1, {"liver": "liver"})
    with pytest.raises(UsageError, match="among the studies"):
        make_dataset(tmp_path / "studies", tmp_path / "studies" / "out", rules(tmp_path))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="cannot be written"):
        made(tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = study(tmp_path / "studies", 1, {"liver": "liver", "odd": "other"})
    command = ["medseg", "dataset", str(tmp_path / "studies"), str(tmp_path / "out"), "--labels", str(rules(tmp_path))]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert "1 of 1 studies are cases" in told
    assert "odd" in told
    assert "SECRET" not in told
    next(source.iterdir()).write_bytes(b"")
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in {0, 1}
    assert json.loads(capsys.readouterr().out)["cases"]


@pytest.mark.realdata
@pytest.mark.parametrize(("modality", "header"), [("CT", "CT"), ("MR_T1", "MR"), ("PET", "PT")])
def test_the_contours_of_a_hospital(realdata: Path, tmp_path: Path, modality: str, header: str) -> None:
    path = rules(
        tmp_path, channels=[{"name": "x", "modality": [header]}], labels=[{"name": "tumor", "match": ["gtv.*"]}]
    )
    (outcome,) = make_dataset(realdata / "dicom/rtstruct/STS_002", tmp_path / "out", path)
    theirs = medseg.load(realdata / f"dicom/rtstruct/nifti/STS_002/{modality}_mask.nii.gz")
    ours = labels_of(tmp_path, outcome).reoriented(theirs.grid.orientation)
    assert outcome.structures == ("tumor",)
    assert ours.grid.matches(theirs.grid, 0.02)
    np.testing.assert_array_equal(ours.array, theirs.array)
