"""Every stack found in real studies is one of those that dcm2niix finds, in place and value, or has a reason."""

from __future__ import annotations

import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg.io.dicom_series import read_series
from medseg.study.find import find_studies
from medseg.volume import Grid, Volume

pytestmark = pytest.mark.realdata

TOLERANCE_MM = 0.01
GEOMETRY = "dicom/geometry"
STACKS = {
    f"{GEOMETRY}/mr_enhanced_multiframe/In/Philips": 2,
    f"{GEOMETRY}/mr_enhanced_multiframe/In/Siemens": 4,
    f"{GEOMETRY}/vendors/philips_enhanced/anatomical": 1,
    f"{GEOMETRY}/vendors/philips_enhanced/dti": 4,
    f"{GEOMETRY}/vendors/philips_enhanced/fmri": 4,
    "dicom/seg/dcmqi/23x38x3/multiframe": 1,
    "dicom/seg/dcmqi/24x38x3/multiframe": 1,
    "dicom/brain_mr_study": 3,
    "dicom/oblique_mr": 5,
    "dicom/rtstruct/STS_002": 3,
    "trunk_ct_mr/example_ct_dicom": 1,
    f"{GEOMETRY}/vendors/generic/compressed_jpeg": 1,
    f"{GEOMETRY}/vendors/generic/compressed_jpegls": 1,
}
"""How many stacks there are to read; the series of single frames are compared one by one elsewhere."""

REFUSED = {
    f"{GEOMETRY}/ct_ge_tilt_and_gaps": "irregular_spacing",
    f"{GEOMETRY}/irregular/missing_slice": "missing_slice",
    f"{GEOMETRY}/irregular/sliceincrement/001": "missing_slice",
    f"{GEOMETRY}/irregular/sliceincrement/002": "missing_slice",
    f"{GEOMETRY}/mr_12bit/In": "mosaic",
    f"{GEOMETRY}/vendors/ge/anatomical/001_single_slice": "single_slice",
    f"{GEOMETRY}/vendors/generic/rgb": "color",
    f"{GEOMETRY}/vendors/generic": "duplicate_instances",  # the same slices in several encodings
    "dicom/seg/dcmqi/23x38x3/seg": "not_an_image",
    "dicom/rtstruct/STS_002/CT/mask": "not_an_image",
}


def by_dcm2niix(folder: Path, out: Path, scale: str) -> list[Volume]:
    """Return every volume that dcm2niix makes of the scanned slices; what it interpolates does not count.

    `scale` "n" ignores slopes that vary by slice, "y" takes Philips' private scale: other units of the same values.
    """
    program = pytest.importorskip("dcm2niix").bin
    out.mkdir()
    command = [program, "-p", scale, "-z", "n", "-b", "n", "-f", "%s_%d", "-o", out, folder]
    subprocess.run(command, check=True, capture_output=True)
    volumes = []
    for file in out.glob("*.nii"):
        if "_Eq" in file.name or "_Tilt" in file.name:
            continue
        image = nib.load(file)
        array = np.asanyarray(image.dataobj)
        frames = np.moveaxis(array[..., None] if array.ndim == 3 else array, 3, 0)
        volumes += [Volume(frame[None], Grid(frame.shape, image.affine)) for frame in frames]
    return [volume.reoriented("RAS") for volume in volumes]


def same(ours: Volume, theirs: Volume) -> bool:
    if not ours.grid.matches(theirs.grid, TOLERANCE_MM):
        return False
    if ours.array.dtype.kind == theirs.array.dtype.kind == "i":
        return bool((ours.array == theirs.array).all())
    return bool(np.allclose(ours.array, theirs.array, rtol=1e-6, atol=1e-6 * float(np.abs(ours.array).max())))


@pytest.mark.parametrize("name", STACKS)
def test_each_stack_is_one_of_dcm2niix(realdata: Path, tmp_path: Path, name: str) -> None:
    series = [one for study in find_studies(realdata / name) for one in study.series if one.verdict != "refused"]
    theirs = [volume for scale in "yn" for volume in by_dcm2niix(realdata / name, tmp_path / scale, scale)]
    assert len(series) == STACKS[name]
    assert {one.verdict for one in series} == {"accepted"}
    for one in series:
        ours = read_series(one).reoriented("RAS")
        assert any(same(ours, volume) for volume in theirs)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_its_reason(realdata: Path, name: str) -> None:
    series = [one for study in find_studies(realdata / name) for one in study.series]
    assert REFUSED[name] in {one.refusal.reason for one in series if one.verdict == "refused" and one.refusal}
