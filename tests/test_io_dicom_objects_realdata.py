"""Labels of real series as DICOM objects, and objects made by others: voxel for voxel, and by outside judges."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import errors_of_dciodvfy
from pydicom.data import get_testdata_file
from scipy.ndimage import gaussian_filter
from test_io_dicom_seg import assert_dcmqi_agrees
from test_io_rtstruct import assert_plastimatch_agrees

import medseg
from medseg.errors import GeometryError, OutputError
from medseg.io.dicom_seg import load_dicom_seg, save_dicom_seg
from medseg.io.rtstruct import load_rtstruct, save_rtstruct
from medseg.labels import Label
from medseg.report.dicom_sr import save_dicom_sr
from medseg.report.measurements import measure
from medseg.volume import Volume

pytestmark = pytest.mark.realdata

PROSTATE = "dicom/oblique_mr/ProstateX-0001/07-08-2011"
STS = "dicom/rtstruct/STS_002"
SERIES = {
    "CT": f"{STS}/CT/image",
    "PET": f"{STS}/PET/image",
    "sagittal MR": f"{PROSTATE}/4.000000-t2tsesag-22089",
    "coronal MR": f"{PROSTATE}/5.000000-t2tsecor-26539",
    "oblique MR": f"{PROSTATE}/8.000000-ep2ddifftraDYNDISTMIXADC-33954",
}
JUDGED = {"CT", "PET", "coronal MR", "oblique MR"}
"""Of points that differ from the one before in z alone, as in the sagittal series, plastimatch drops the second."""

TABLE = (
    Label(value=1, name="Füße", color="#ff0000"),
    Label(value=2, name="left kidney", color="#00ff7f"),
    Label(value=5, name="liver", color="#0a141e"),
)

each_series = pytest.mark.parametrize("name", SERIES)


def blobs(image: Volume, size: float = 3) -> Volume:
    """Return three labels of many islands and holes, and slices without any."""
    noise = gaussian_filter(np.random.default_rng(4).normal(size=image.grid.shape), size)
    labels = np.digitize(noise / noise.std(), [0.5, 1.0, 1.5]).astype(np.uint8)
    labels[:, :, :2] = 0
    return image.with_array(np.array([0, 1, 2, 5], np.uint8)[labels][None])


@each_series
@pytest.mark.parametrize("labelmap", [False, True])
def test_seg_and_report(realdata: Path, tmp_path: Path, name: str, labelmap: bool) -> None:
    source = realdata / SERIES[name]
    image = medseg.load(source)
    labels = blobs(image)
    save_dicom_seg(labels, tmp_path / "seg.dcm", source=source, table=TABLE, labelmap=labelmap)
    expected = labels if labelmap else labels.with_array(np.array([0, 1, 2, 0, 0, 3], np.uint8)[labels.array])
    np.testing.assert_array_equal(load_dicom_seg(tmp_path / "seg.dcm", source=source)[0].array, expected.array)
    assert_dcmqi_agrees(tmp_path / "seg.dcm", expected, tmp_path / "dcmqi")
    rows = measure(labels, TABLE, image)
    save_dicom_sr(rows, tmp_path / "sr.dcm", source=source, table=TABLE, segmentation=tmp_path / "seg.dcm")
    if not labelmap:  # dciodvfy is older than label maps, and than reports that refer to them
        assert errors_of_dciodvfy(tmp_path / "seg.dcm") == []
        assert errors_of_dciodvfy(tmp_path / "sr.dcm") == []


@each_series
def test_rtstruct(realdata: Path, tmp_path: Path, name: str) -> None:
    source = realdata / SERIES[name]
    labels = blobs(medseg.load(source), size=6)  # thousands of contours, not tens of thousands
    save_rtstruct(labels, tmp_path / "rt.dcm", source=source, table=TABLE)
    np.testing.assert_array_equal(load_rtstruct(tmp_path / "rt.dcm", source=source)[0].array, labels.array)
    assert errors_of_dciodvfy(tmp_path / "rt.dcm") == []
    if name in JUDGED:
        assert_plastimatch_agrees(tmp_path / "rt.dcm", labels, source, tmp_path / "plastimatch")


@pytest.mark.parametrize("modality", ["CT", "MR_T1", "PET"])
def test_contours_of_a_hospital_give_the_masks_that_others_made_of_them(realdata: Path, modality: str) -> None:
    labels, (label,) = load_rtstruct(
        realdata / STS / modality / "mask/RS.dcm", source=realdata / STS / modality / "image"
    )
    theirs = medseg.load(realdata / f"dicom/rtstruct/nifti/STS_002/{modality}_mask.nii.gz")
    assert label.name == f"GTV_Mass_{modality}"
    assert theirs.grid.matches(labels.grid, 0.02)
    np.testing.assert_array_equal(labels.array, theirs.array)


DCMQI = "dicom/seg/dcmqi"


@pytest.mark.parametrize(
    ("seg", "source", "references"),
    [
        ("liver.dcm", "ct-3slice", ["liver_seg.nrrd"]),
        ("partial_overlaps.dcm", "ct-3slice", [f"partial_overlaps-{n}.nrrd" for n in (1, 2, 3)]),
        ("sparse-labelmap-noppv.dcm", "24x38x3/image", ["sparse_labelmap_noppv_seg.nrrd"]),
        ("sparse-labelmap-ppv5.dcm", "24x38x3/image", ["sparse_labelmap_ppv5_seg.nrrd"]),
        ("23x38x3/seg/label.seg", "23x38x3/image", ["23x38x3/nrrd/label.nrrd"]),
        ("24x38x3/seg/label.seg", "24x38x3/image", ["24x38x3/nrrd/label.nrrd"]),
    ],
)
def test_seg_objects_of_others(realdata: Path, seg: str, source: str, references: list[str]) -> None:
    folder = realdata / DCMQI
    labels, table = load_dicom_seg(folder / seg, source=folder / source)
    masks = labels.array if len(table) == len(labels.array) > 1 else [labels.array[0] == one.value for one in table]
    expected = np.zeros((len(table), *labels.grid.shape), bool)
    for reference in references:
        theirs = medseg.load(folder / reference)
        # On slices that a sparse SEG leaves out, dcmqi writes its padding value, which is no segment.
        inside = np.argwhere(np.isin(theirs.array[0], [one.value for one in table]))
        index = np.round(labels.grid.to_index(theirs.grid.to_world(inside))).astype(int)
        numbers = np.searchsorted([one.value for one in table], theirs.array[0][tuple(inside.T)])
        expected[(numbers, *index.T)] = True
    np.testing.assert_array_equal(np.array(masks, bool), expected)


HIGHDICOM = "dicom/seg/highdicom/test_files"


@pytest.fixture
def three_slices(tmp_path: Path) -> Path:
    """Return the series that most SEG objects of highdicom's tests refer to, but for one slice 200 mm away."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("17136", "17166", "17196"):
        shutil.copy(get_testdata_file(f"dicomdirtests/77654033/CT2/{name}"), folder)
    return folder


@pytest.mark.parametrize(
    ("seg", "threshold", "voxels"),
    [
        ("seg_image_ct_binary.dcm", 0.5, None),
        ("seg_image_ct_binary_fractional.dcm", 0.5, None),
        ("seg_image_ct_true_fractional.dcm", 0.2, None),
        ("seg_image_ct_true_fractional.dcm", 0.5, None),
        ("seg_image_ct_true_fractional.dcm", 0.51, 0),
    ],
)
def test_fractions_of_others(
    realdata: Path, three_slices: Path, seg: str, threshold: float, voxels: int | None
) -> None:
    path = realdata / HIGHDICOM / seg
    told = pytest.warns(UserWarning, match="cover no voxel: label 1") if voxels == 0 else nullcontext()
    with told:
        labels, (label,) = load_dicom_seg(path, source=three_slices, threshold=threshold)
    data = pydicom.dcmread(path)
    stored = data.pixel_array / float(data.get("MaximumFractionalValue", 1))
    (row_mm, column_mm), count = data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing, 0
    for frame, group in zip(stored, data.PerFrameFunctionalGroupsSequence, strict=True):
        x, y, z = map(float, group.PlanePositionSequence[0].ImagePositionPatient)
        for row, column in np.argwhere(frame >= threshold):
            place = (-x - column * float(column_mm), -y - row * float(row_mm), z)
            index = np.round(labels.grid.to_index(place)).astype(int)
            np.testing.assert_allclose(labels.grid.to_world(index), place, atol=1e-4)
            assert labels.array[0][tuple(index)] == label.value
            count += 1
    assert np.count_nonzero(labels.array) == count
    assert count == voxels if voxels is not None else count > 0


def test_frames_of_others_that_the_source_lacks_and_one_frame_alone(realdata: Path, three_slices: Path) -> None:
    with pytest.raises(GeometryError, match="outside the source"):
        load_dicom_seg(realdata / HIGHDICOM / "seg_image_ct_binary_overlap.dcm", source=three_slices)
    alone = realdata / HIGHDICOM / "seg_image_ct_binary_single_frame.dcm"
    labels, _ = load_dicom_seg(alone, source=realdata / HIGHDICOM / "ct_image.dcm")
    np.testing.assert_array_equal(labels.array[0, :, :, 0], pydicom.dcmread(alone).pixel_array.T)


def test_a_source_that_cannot_be_referred_to(realdata: Path, tmp_path: Path) -> None:
    source = realdata / "trunk_ct_mr/example_ct_dicom"
    labels = blobs(medseg.load(source))
    with pytest.raises(OutputError, match="does not state its SOPClassUID") as caught:
        save_dicom_seg(labels, tmp_path / "seg.dcm", source=source)
    assert caught.value.reason == "unreferable_source"
