"""What `--deidentify` writes says of nobody whose it is, and still belongs together."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import nibabel
import pydicom
import pytest
from dicom_files import STUDY, errors_of_dciodvfy, some_labels, write_source
from leaks import leaks
from studies import write_pipeline

import medseg
from medseg import cli
from medseg.errors import UsageError
from medseg.study import worker
from medseg.study.batch import Options, run_batch
from medseg.study.ledger import Ledger
from medseg.study.pipeline import load_pipeline
from medseg.study.worker import Start, model_digests

TORCH = Options(runtime="torch", threads=1, deidentify=True)
OUTPUTS = ["nifti", "json", "csv", "seg", "seg_labelmap", "rtstruct", "sr"]
MADE_UP = {"19000101", "000000", "19000101000000"}


def elements(data: pydicom.Dataset) -> list[pydicom.DataElement]:
    found: list[pydicom.DataElement] = []
    data.walk(lambda _, element: found.append(element))
    return found


def uids(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, pydicom.multival.MultiValue) else [str(value)]


def test_a_batch_without_identifiers(tmp_path, capsys, monkeypatch):
    studies, out = tmp_path / "doe" / "studies", tmp_path / "out"
    pipeline = write_pipeline(tmp_path / "pipeline", outputs=OUTPUTS)
    write_source(studies / "a")
    source = [pydicom.dcmread(path) for path in (studies / "a").iterdir()]
    arguments = ["medseg", "batch", str(pipeline), str(studies), str(out), "--deidentify", "--runtime", "torch"]
    monkeypatch.setattr("sys.argv", arguments)
    cli.app(arguments[1:], standalone_mode=False)
    shown = capsys.readouterr()
    private = tmp_path / "out.private"
    study = [path.name for path in out.iterdir() if (path / "manifest.json").exists()]
    assert {path.name for path in out.iterdir()} == {".claims", ".work", "summary.csv", "summary.json", *study}
    for path in (private / "key", private / "studies.csv"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = (private / "key").read_text()

    texts = [path.read_bytes().decode("latin-1") for path in out.rglob("*") if path.is_file()]
    dates = {str(one[name].value) for one in source for name in ("StudyDate", "StudyTime", "PatientBirthDate")}
    source_uids = {str(element.value) for one in source for element in elements(one) if element.VR == "UI"}
    own = {uid for uid in source_uids if not uid.startswith("1.2.840.10008.")}
    assert len(own) >= len(source) + 3
    for secret in (*own, *dates, key, str(tmp_path), STUDY["StudyDescription"], "A-0815", "M\xfcller"):
        assert not [text for text in [*texts, *shown] if secret in text], secret
    assert not leaks([*texts, *shown])

    objects = {path.name: pydicom.dcmread(path) for path in (out / study[0]).glob("*.dcm")}
    assert len(objects) == 4
    for name, data in objects.items():
        assert str(data.PatientName) == data.PatientID == study[0]
        assert (data.PatientIdentityRemoved, data.PatientBirthDate, data.StudyDate) == ("YES", "", "")
        assert data.DeidentificationMethodCodeSequence[0].CodeValue == "113100"
        moments = {str(one.value) for one in elements(data) if one.VR in {"DA", "TM", "DT"} and one.value}
        assert moments <= MADE_UP
        assert data.file_meta.MediaStorageSOPInstanceUID == data.SOPInstanceUID
        for element in elements(data):
            if element.VR == "UI":
                assert all(uid.startswith(("1.2.840.10008.", "2.25.")) for uid in uids(element.value)), name
    assert len({(one.StudyInstanceUID, one.FrameOfReferenceUID) for one in objects.values() if "Rows" in one}) == 1
    assert len({one.StudyInstanceUID for one in objects.values()}) == 1
    seg = objects["labels.seg.dcm"].SOPInstanceUID
    assert seg in {str(one.value) for one in elements(objects["measurements.sr.dcm"]) if one.VR == "UI"}
    for name in ("labels.seg.dcm", "labels.rtstruct.dcm", "measurements.sr.dcm"):
        assert errors_of_dciodvfy(out / study[0] / name) == []


def test_no_text_of_the_source_stays_whatever_element_it_hides_in(tmp_path):
    """Free text, and identifiers that begin as the standard's own or are no identifiers at all."""
    secret = {
        "PositionReferenceIndicator": "HIDDEN 1955",
        "FrameOfReferenceUID": "1.2.840.10008.19550321",
        "StudyInstanceUID": "1.2.840.10008.1.4.1.1.19550321",
        "SeriesInstanceUID": "1.2.840.10008.5.19550321.7",
        "StudyDate": "20200102", "StudyTime": "111213.25", "StudyID": "HIDDEN-S", "AccessionNumber": "HIDDEN-A",
        "PatientName": "HIDDEN^N", "PatientID": "HIDDEN-P", "PatientSex": "O", "ReferringPhysicianName": "HIDDEN^R",
        "SeriesDescription": "HIDDEN T1", "Laterality": "L", "PatientComments": "HIDDEN", "ImageComments": "HIDDEN",
        "InstitutionName": "HIDDEN", "ProtocolName": "HIDDEN",
        "OperatorsName": "HIDDEN^O", "ManufacturerModelName": "HIDDEN", "DeviceSerialNumber": "HIDDEN",
    }  # fmt: skip
    studies, out = tmp_path / "studies", tmp_path / "out"
    pipeline = write_pipeline(tmp_path / "pipeline", outputs=OUTPUTS)
    write_source(studies / "a", **secret)
    (done,) = run_batch(pipeline, studies, out, TORCH)
    texts = {path.name: path.read_bytes() for path in (out / done.study).iterdir()}
    assert {"labels.seg.dcm", "labels.rtstruct.dcm", "measurements.sr.dcm"} <= texts.keys()
    for name, text in texts.items():
        for word in (b"HIDDEN", b"19550321", b"20200102", b"111213"):
            assert word not in text, (name, word)


def test_a_frame_of_reference_of_the_standard_stays(tmp_path):
    """The Talairach brain atlas is nobody's, and says where the voxels lie."""
    from medseg.study.deidentify import deidentify

    talairach = "1.2.840.10008.1.4.1.1"
    source = write_source(tmp_path / "a", FrameOfReferenceUID=talairach)
    path = medseg.save_dicom_seg(some_labels(medseg.load(source).grid), tmp_path / "seg.dcm", source=source)
    assert path is not None
    deidentify(path, "study", b"key")
    assert pydicom.dcmread(path).FrameOfReferenceUID == talairach


def test_what_verifies_is_kept_and_inputs_are_known_by_a_keyed_hash(tmp_path):
    studies, out = tmp_path / "studies", tmp_path / "out"
    pipeline = write_pipeline(tmp_path / "pipeline", outputs=["nifti"])
    write_source(studies / "a")
    (first,) = run_batch(pipeline, studies, out, TORCH)
    (plain,) = run_batch(pipeline, studies, tmp_path / "plain", Options(runtime="torch", threads=1))
    hidden = json.loads((out / first.study / "manifest.json").read_text())
    open_ = json.loads((tmp_path / "plain" / plain.study / "manifest.json").read_text())
    assert hidden["inputs"]["sha256"] != open_["inputs"]["sha256"]
    assert (hidden["deidentified"], open_["deidentified"]) == (True, False)
    (again,) = run_batch(pipeline, studies, out, Options(runtime="torch", threads=1, deidentify=True, verify="full"))
    assert again.kept


def test_a_kill_leaves_nothing_in_the_outputs_that_leads_back(tmp_path, monkeypatch):
    """What is there while a study is read from its archive, and before its objects lose their identifiers."""
    studies, out = tmp_path / "studies", tmp_path / "out"
    write_source(tmp_path / "a")
    shutil.make_archive(studies / "a", "zip", tmp_path / "a")
    pipeline = load_pipeline(write_pipeline(tmp_path / "pipeline", outputs=["nifti", "seg"]))
    ledger = Ledger.open(out, deidentify=True)
    start = Start(
        pipeline=pipeline.model_dump(mode="json"), studies=str(studies), out=str(out), check=ledger.check, token="t",
        manifest=model_digests(pipeline), runtime="torch", deidentify=True,
    )  # fmt: skip
    seen: list[tuple[int, list[str]]] = []

    def look(name, real):
        def looked(*arguments):
            identified = [path for path in (tmp_path / "out.private/work").rglob("*") if path.is_file()]
            seen.append((len(identified), [path.name for path in out.rglob("*") if path.is_file()]))
            return real(*arguments)

        monkeypatch.setattr(worker, name, looked)

    look("read_job", worker.read_job)
    look("deidentify", worker.deidentify)
    runner = worker.Runner(start, lambda _: None)
    running = runner.read(worker.Task("study", {str(studies / "a.zip"): "a"}, "s"))
    runner.segment(running)
    assert runner.finish(running)["manifest"]["status"] == "done", running.error
    assert [count for count, _ in seen] == [5, 6]  # the slices, and the SEG beside them
    assert not [name for _, names in seen for name in names if name not in {"labels.nii.gz", "labels.labels.json"}]
    assert (out / "study" / "labels.seg.dcm").is_file()
    assert not [*(tmp_path / "out.private/work").iterdir()]

    killed = ledger.private_folder("study", "other")
    ledger.sweep("study")
    assert not killed.exists()


def test_nifti_headers_say_nothing_of_the_source(tmp_path):
    pipeline = write_pipeline(tmp_path / "pipeline", outputs=["nifti"])
    write_source(tmp_path / "studies" / "a")
    (one,) = run_batch(pipeline, tmp_path / "studies", tmp_path / "out", Options(runtime="torch", threads=1))
    image = nibabel.load(tmp_path / "out" / one.study / "labels.nii.gz")
    for name in ("descrip", "aux_file", "db_name", "intent_name"):
        assert bytes(image.header[name]).strip(b"\0") in {b"", b"medseg"}, name
    assert not image.header.extensions


def test_outputs_with_and_without_identifiers_do_not_mix(tmp_path):
    Ledger.open(tmp_path / "a")
    with pytest.raises(UsageError, match="the other choice"):
        Ledger.open(tmp_path / "a", deidentify=True)
    Ledger.open(tmp_path / "b", deidentify=True)
    with pytest.raises(UsageError, match="the other choice"):
        Ledger.open(tmp_path / "b")
    pipeline = write_pipeline(tmp_path / "pipeline", outputs=["picture"])
    (tmp_path / "studies").mkdir()
    with pytest.raises(UsageError, match="name may be burned"):
        run_batch(pipeline, tmp_path / "studies", tmp_path / "c", TORCH)


def test_the_folder_here_has_a_name_too(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert Ledger.open(Path(), deidentify=True).private == tmp_path / "here.private"
