"""Real series of many scanners: each is read as dcm2niix reads it, or refused with the right reason."""

from __future__ import annotations

import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_files import assert_every_pixel_in_place

from medseg.errors import SeriesRefused
from medseg.io.dicom_pixels import read_pixels
from medseg.io.dicom_series import find_series, read
from medseg.io.dicom_slice import read_headers
from medseg.volume import Grid, Volume

pytestmark = pytest.mark.realdata

TOLERANCE_MM = 0.01
"""dcm2niix computes slice distances in float32, which adds up to 0.002 mm over a stack."""

GEOMETRY = "dicom/geometry"
PROSTATE = "dicom/oblique_mr/ProstateX-0001/07-08-2011"

HIPPOCAMPUS = "dicom/brain_mr_study/13_HCropVolume"
AGREED = [
    HIPPOCAMPUS,
    f"{GEOMETRY}/vendors/anatomical/001_implicit",
    f"{GEOMETRY}/vendors/generic/anatomical/002_non_isotropic",
    f"{GEOMETRY}/vendors/generic/compressed_rle/001",
    "dicom/rtstruct/STS_002/CT/image",
    "dicom/rtstruct/STS_002/PET/image",
    "dicom/brain_mr_study/12-T1post-05670",
    "dicom/brain_mr_study/36459-FLAIRreg-76244",
    f"{GEOMETRY}/irregular/slicecount/001",
    f"{GEOMETRY}/vendors/anatomical/001",
    f"{GEOMETRY}/vendors/ge/anatomical/001",
    f"{GEOMETRY}/vendors/generic/anatomical/001",
    "dicom/seg/dcmqi/23x38x3/multiframe",
    f"{GEOMETRY}/vendors/generic/compressed/001",
    f"{GEOMETRY}/vendors/generic/compressed_j2k/001",
    f"{GEOMETRY}/vendors/siemens/anatomical/001",
    f"{PROSTATE}/4.000000-t2tsesag-22089",
    f"{PROSTATE}/5.000000-t2tsecor-26539",
    f"{PROSTATE}/6.000000-t2tsetra-76610",
    f"{PROSTATE}/8.000000-ep2ddifftraDYNDISTMIXADC-33954",
    f"{PROSTATE}/10.000000-t2tsetra-17541",
    "dicom/rtstruct/STS_002/MR_T1/image",
    "dicom/seg/dcmqi/23x38x3/image",
    "dicom/seg/dcmqi/24x38x3/image",
    "dicom/seg/dcmqi/ct-3slice",
    "trunk_ct_mr/example_ct_dicom",
]
REFUSED = {
    f"{GEOMETRY}/ct_ge_tilt_and_gaps": ("irregular_spacing", r"1\.08 to 7\.00 mm apart, and one lies 22\.78 mm"),
    f"{GEOMETRY}/irregular/missing_slice": ("missing_slice", r"1 of 19 slices .* 3\.00 mm apart, but 6\.00 mm"),
    f"{GEOMETRY}/irregular/sliceincrement/001": ("missing_slice", r"1 of 5 slices .* 5\.00 mm apart, but 10\.00 mm"),
    f"{GEOMETRY}/irregular/sliceincrement/002": ("missing_slice", r"1 of 5 slices .* 0\.75 mm apart, but 1\.50 mm"),
    f"{GEOMETRY}/mr_12bit/In": ("mosaic", "mosaic"),
    f"{GEOMETRY}/mr_enhanced_multiframe/In/Philips": ("duplicate_positions", r"ImageType .*, EchoTime"),
    f"{GEOMETRY}/mr_enhanced_multiframe/In/Siemens": ("duplicate_positions", "AcquisitionNumber"),
    f"{GEOMETRY}/vendors/ge/anatomical/001_single_slice": ("single_slice", "one slice"),
    f"{GEOMETRY}/vendors/generic/rgb": ("color", "color picture"),
    f"{GEOMETRY}/vendors/philips_enhanced/dti": ("duplicate_positions", "DiffusionBValue"),
    f"{GEOMETRY}/vendors/philips_enhanced/fmri": ("duplicate_positions", "TemporalPositionIdentifier"),
    "dicom/rtstruct/STS_002/CT/mask": ("not_an_image", "no scan"),
    "dicom/seg/dcmqi/23x38x3/seg": ("not_an_image", "no scan"),
    "dicom/brain_mr_study": ("several_series", "found 3, of which 3 can be read"),
    PROSTATE: ("several_series", "found 5, of which 5 can be read"),
}
NEEDS_A_DECODER = {
    f"{GEOMETRY}/vendors/generic/compressed_jpeg": "JPEG Lossless",
    f"{GEOMETRY}/vendors/generic/compressed_jpegls": "JPEG-LS",
}


def by_dcm2niix(folder: Path, out: Path) -> Volume:
    program = pytest.importorskip("dcm2niix").bin
    subprocess.run([program, "-z", "n", "-b", "n", "-f", "volume", "-o", out, folder], check=True, capture_output=True)
    image = nib.load(out / "volume.nii")
    array = np.asanyarray(image.dataobj)[None]
    return Volume(array, Grid(array.shape[1:], image.affine))


@pytest.mark.parametrize("name", AGREED)
def test_agrees_with_dcm2niix(realdata: Path, tmp_path: Path, name: str) -> None:
    ours, theirs = read(realdata / name).reoriented("RAS"), by_dcm2niix(realdata / name, tmp_path).reoriented("RAS")
    assert ours.grid.matches(theirs.grid, 0.001 if name == HIPPOCAMPUS else TOLERANCE_MM)
    if ours.array.dtype.kind == "i":
        np.testing.assert_array_equal(ours.array, theirs.array)
    else:
        np.testing.assert_allclose(ours.array, theirs.array, rtol=3e-7)


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_with_its_reason(realdata: Path, name: str) -> None:
    reason, text = REFUSED[name]
    with pytest.raises(SeriesRefused, match=text) as caught:
        read(realdata / name)
    assert caught.value.reason == reason


@pytest.mark.parametrize("name", NEEDS_A_DECODER)
def test_is_refused_where_no_decoder_is_installed(realdata: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.is_available", False)
    with pytest.raises(SeriesRefused, match=NEEDS_A_DECODER[name]) as caught:
        read(realdata / name)
    assert caught.value.reason == "compressed_no_codec"


def test_tilted_stack_is_a_sheared_grid(realdata: Path) -> None:
    # dcm2niix is no judge here: its affine leaves the tilt out, which moves the last slice by 0.45 mm.
    folder = realdata / f"{GEOMETRY}/irregular/gantrytilting/001"
    volume = read(folder)
    assert_every_pixel_in_place(volume, folder)
    along_column, step = volume.grid.affine[:3, 1], volume.grid.affine[:3, 2]
    sine = along_column @ step / np.linalg.norm(along_column) / np.linalg.norm(step)
    assert np.degrees(np.arcsin(sine)) == pytest.approx(-14)


@pytest.mark.parametrize(
    ("name", "reference"), [("12bitUnsigned", 2), ("12bitUnsigned_0x0F0F", 3), ("12bitSigned_0x0F0F", 4)]
)
def test_twelve_bits_of_sixteen(realdata: Path, name: str, reference: int) -> None:
    folder = realdata / GEOMETRY / "mr_12bit"
    path = folder / "In" / f"{name}.dcm"
    assert [part.frame for part in read_headers(path)] == [0]
    # A mosaic of 6 x 6 tiles of 64 x 64 pixels; the reference numbers rows upwards.
    tiles = read_pixels(path)[0].reshape(6, 64, 6, 64).swapaxes(1, 2).reshape(36, 64, 64)
    expected = np.asanyarray(nib.load(folder / "Ref" / f"{reference}.nii").dataobj)
    np.testing.assert_array_equal(tiles[:35, ::-1].transpose(2, 1, 0), expected)


def test_find_series_lists_a_whole_study(realdata: Path) -> None:
    found = find_series(realdata / "dicom/rtstruct/STS_002")
    verdicts = sorted((series.modality, series.n_slices, series.refusal is None) for series in found)
    assert verdicts == [("CT", 48, True), ("MR", 35, True), ("PT", 48, True), *[("RTSTRUCT", 1, False)] * 3]
    assert len({series.frame_of_reference_uid for series in found}) == 1
