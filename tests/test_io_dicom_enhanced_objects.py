"""Labels of enhanced multi-frame series as DICOM objects: references name frames, and voxels come back."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import STUDY, errors_of_dciodvfy, some_labels, write_source
from multiframe_files import write_enhanced
from pydicom.uid import generate_uid
from test_io_dicom_objects_realdata import blobs
from test_io_dicom_seg import assert_dcmqi_agrees

import medseg
from medseg.errors import OutputError
from medseg.io.dicom_seg import load_dicom_seg, save_dicom_seg
from medseg.io.dicom_series import choose, find_series, make_series
from medseg.io.rtstruct import load_rtstruct, save_rtstruct
from medseg.report.dicom_sr import save_dicom_sr
from medseg.report.measurements import measure
from medseg.volume import Volume


def enhanced_source(folder: Path) -> Path:
    write_enhanced(write_source(folder / "single", "oblique"), folder / "ct")
    (path,) = (folder / "ct").iterdir()
    data = pydicom.dcmread(path)
    for name, value in STUDY.items():
        setattr(data, name, value)
    data.save_as(path)
    return folder / "ct"


@pytest.mark.parametrize("labelmap", [False, True], ids=["binary", "labelmap"])
def test_seg(tmp_path: Path, labelmap: bool) -> None:
    source = enhanced_source(tmp_path)
    labels = some_labels(choose(source)[1], (1, 2))
    path = tmp_path / "seg.dcm"
    save_dicom_seg(labels, path, source=source, labelmap=labelmap)
    np.testing.assert_array_equal(load_dicom_seg(path, source=source)[0].array, labels.array)
    assert_dcmqi_agrees(path, labels, tmp_path / "dcmqi")
    positions = {
        number: frame.PlanePositionSequence[0].ImagePositionPatient
        for number, frame in enumerate(
            pydicom.dcmread(next(source.iterdir())).PerFrameFunctionalGroupsSequence, start=1
        )
    }
    for frame in pydicom.dcmread(path).PerFrameFunctionalGroupsSequence:
        (image,) = frame.DerivationImageSequence[0].SourceImageSequence
        expected = positions[image.ReferencedFrameNumber]
        np.testing.assert_allclose(frame.PlanePositionSequence[0].ImagePositionPatient, expected, atol=1e-6)


def test_rtstruct_and_report(tmp_path: Path) -> None:
    source = enhanced_source(tmp_path)
    labels = some_labels(choose(source)[1])
    path = tmp_path / "rt.dcm"
    save_rtstruct(labels, path, source=source)
    np.testing.assert_array_equal(load_rtstruct(path, source=source)[0].array, labels.array)
    numbers = {part.frame + 1 for k, part in enumerate(choose(source)[0].slices) if k != 1}
    contours = [contour for one in pydicom.dcmread(path).ROIContourSequence for contour in one.ContourSequence]
    assert {contour.ContourImageSequence[0].ReferencedFrameNumber for contour in contours} == numbers
    report = save_dicom_sr(measure(labels, ()), tmp_path / "sr.dcm", source=source)
    evidence = pydicom.dcmread(report).CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    assert len(evidence.ReferencedSOPSequence) == 1
    assert errors_of_dciodvfy(path) == errors_of_dciodvfy(report) == []


def test_frames_in_several_files_are_refused(tmp_path: Path) -> None:
    source = enhanced_source(tmp_path)
    (path,) = source.iterdir()
    shutil.copy(path, source / "other")
    data = pydicom.dcmread(source / "other")
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    for frame in data.PerFrameFunctionalGroupsSequence:
        position = frame.PlanePositionSequence[0]
        step = 5 * 2.5 * np.cross(*np.reshape(frame.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)))
        position.ImagePositionPatient = [*np.round(np.array(position.ImagePositionPatient, float) + step, 6)]
    data.save_as(source / "other")
    labels = some_labels(choose(source)[1])
    with pytest.raises(OutputError, match="lie in several enhanced files") as caught:
        save_dicom_seg(labels, tmp_path / "seg.dcm", source=source)
    assert caught.value.reason == "unreferable_source"
    save_rtstruct(labels, tmp_path / "rt.dcm", source=source)
    np.testing.assert_array_equal(load_rtstruct(tmp_path / "rt.dcm", source=source)[0].array, labels.array)


@pytest.mark.realdata
def test_one_of_several_stacks_in_a_real_file(realdata: Path, tmp_path: Path) -> None:
    (series, *_) = (
        one
        for one in find_series(realdata / "dicom/geometry/mr_enhanced_multiframe/In")
        if one.frame_of_reference_uid and one.n_slices == 64
    )
    stacks = defaultdict(list)
    for part in series.slices:
        stacks[part.variants].append(part)
    assert len(stacks) == 2
    for place, slices in enumerate(stacks.values()):
        stack = make_series(slices)
        assert stack.grid is not None
        labels = blobs(Volume(np.zeros((1, *stack.grid.shape), np.uint8), stack.grid))
        save_dicom_seg(labels, tmp_path / f"{place}.dcm", source=stack, labelmap=True)
        np.testing.assert_array_equal(load_dicom_seg(tmp_path / f"{place}.dcm", source=stack)[0].array, labels.array)
        save_rtstruct(labels, tmp_path / "rt.dcm", source=stack)
        assert medseg.load_rtstruct(tmp_path / "rt.dcm", source=stack)[0].array.sum() == labels.array.sum()
        assert errors_of_dciodvfy(tmp_path / "rt.dcm") == []
