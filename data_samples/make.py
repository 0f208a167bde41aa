"""Make the samples of this folder: `python data_samples/make.py [OUT]`, half a minute, the same bytes every time."""

from __future__ import annotations

import argparse
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from phantom import head, placed_grid, render, trunk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy.ndimage import gaussian_filter

from medseg.volume import Grid, Volume

LPS_FROM_RAS = np.diag((-1.0, -1.0, 1.0))
RESCALE_INTERCEPT_HU = -1024


def main() -> None:
    """Write everything below the folder given on the command line, by default the script's own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=Path(__file__).parent)
    out = parser.parse_args().out
    write_ct_study(out / "ct_study")
    write_mr(out)
    write_training(out / "training")


@dataclass(frozen=True)
class Series:
    """What tells one CT series of the study from another. `blur_mm` is the sigma of the kernel."""

    number: int
    description: str
    image_type: str
    kernel: str
    slice_mm: float
    blur_mm: float = 0.0
    noise_hu: float = 0.0
    head_first: bool = False


def write_ct_study(folder: Path) -> None:
    """Write two axial series and a localizer of one trunk, as one DICOM study with one frame of reference."""
    soft = Series(2, "Abdomen 3.0 soft", "AXIAL", "SOFT", slice_mm=3.0, blur_mm=1.5, noise_hu=11, head_first=True)
    bone = Series(3, "Spine 2.5 bone", "AXIAL", "BONE", slice_mm=2.5, blur_mm=0.7, noise_hu=32)
    write_axial(folder / "axial_soft", soft, placed_grid((6, -8, 0), (128, 128, 40), (2.8, 2.8, 3), (0, 0, 0), "LPS"))
    write_axial(folder / "axial_bone", bone, placed_grid((4, -30, 4), (112, 112, 48), (1.9, 1.9, 2), (0, 0, 0), "LPS"))
    write_localizer(folder / "localizer")


def write_axial(folder: Path, series: Series, grid: Grid) -> None:
    """Write one file for each slice, under names that say nothing about their order."""
    rng = np.random.default_rng(series.number)
    blur = (series.blur_mm / grid.spacing_mm[0], series.blur_mm / grid.spacing_mm[1], 0)
    values, _ = render(grid, trunk(), {}, series.slice_mm)
    noise = gaussian_filter(rng.standard_normal(grid.shape), blur)
    values = gaussian_filter(values, blur) + noise * (series.noise_hu / noise.std())
    count = grid.shape[2]
    names = rng.permutation(count)
    for k in range(count):
        plane = grid.cropped((0, 0, k), (*grid.shape[:2], k + 1))
        number = count - k if series.head_first else k + 1
        write_instance(folder / f"IM{names[k]:04d}.dcm", series, number, Volume(values[None, :, :, k : k + 1], plane))


def write_localizer(folder: Path) -> None:
    """Write one frontal and one lateral projection: two images of one series that make no volume."""
    grid = placed_grid((0, -10, 20), (92, 70, 74), (4, 4, 4), (0, 0, 0), "LIP")
    values, _ = render(grid, trunk(), {})
    frontal = Volume(values[None], grid)
    for number, view in enumerate((frontal, frontal.reoriented("PIR")), start=1):
        depth_mm = view.grid.shape[2] * view.grid.spacing_mm[2]
        plane = view.grid.with_spacing((*view.grid.spacing_mm[:2], depth_mm))
        series = Series(1, "Localizer", "LOCALIZER", "SOFT", slice_mm=depth_mm)
        shadow = view.array.mean(axis=3, keepdims=True)
        write_instance(folder / f"IM{number:04d}.dcm", series, number, Volume(shadow, plane))


def write_instance(path: Path, series: Series, number: int, plane: Volume) -> None:
    """Write one CT image (PS3.3 A.3) of a one-slice volume in HU whose array axes are column, row and slice."""
    columns, rows, _ = plane.grid.shape
    axes = LPS_FROM_RAS @ (plane.grid.affine[:3, :3] / plane.grid.spacing_mm)
    stored = np.clip(np.round(plane.array[0, :, :, 0]) - RESCALE_INTERCEPT_HU, 0, 4095).astype("<i2")
    dataset = _dataset(
        **_STUDY,
        SOPClassUID=CTImageStorage,
        SOPInstanceUID=_uid("instance", series.number, number),
        SeriesInstanceUID=_uid("series", series.number),
        SeriesNumber=series.number,
        SeriesDescription=series.description,
        ImageType=["ORIGINAL", "PRIMARY", series.image_type],
        ConvolutionKernel=series.kernel,
        SliceThickness=_decimal(series.slice_mm),
        AcquisitionNumber=1 if series.image_type == "LOCALIZER" else 2,
        InstanceNumber=number,
        ImagePositionPatient=_decimal(LPS_FROM_RAS @ plane.grid.affine[:3, 3]),
        ImageOrientationPatient=_decimal(axes[:, :2].T.ravel()),
        PixelSpacing=_decimal(plane.grid.spacing_mm[1::-1]),
        Rows=rows,
        Columns=columns,
        PixelData=stored.T.tobytes(),
    )
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.ImplementationClassUID = _uid("implementation")
    dataset.file_meta.ImplementationVersionName = "MEDSEG"
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def _uid(*names: object) -> str:
    return generate_uid(entropy_srcs=["medseg data_samples", *map(str, names)])


def _decimal(millimetres: Any) -> Any:
    # Adding zero turns -0.0 into 0.0. A decimal string has 16 characters at most.
    return (np.round(millimetres, 4) + 0.0).tolist()


def _dataset(**elements: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


_STUDY = {
    "PatientName": "PHANTOM^TRUNK",
    "PatientID": "PHANTOM-TRUNK",
    "PatientBirthDate": "",
    "PatientSex": "O",
    "StudyInstanceUID": _uid("study"),
    "StudyID": "1",
    "StudyDate": "20260101",
    "StudyTime": "120000",
    "StudyDescription": "Analytic trunk phantom",
    "AccessionNumber": "",
    "ReferringPhysicianName": "",
    "Modality": "CT",
    "Manufacturer": "medseg",
    "SyntheticData": "YES",
    "BodyPartExamined": "ABDOMEN",
    "PatientPosition": "HFS",
    "FrameOfReferenceUID": _uid("frame of reference"),
    "PositionReferenceIndicator": "",
    "KVP": 120,
    "SamplesPerPixel": 1,
    "PhotometricInterpretation": "MONOCHROME2",
    "BitsAllocated": 16,
    "BitsStored": 16,
    "HighBit": 15,
    "PixelRepresentation": 1,
    "RescaleIntercept": RESCALE_INTERCEPT_HU,
    "RescaleSlope": 1,
    "WindowCenter": 50,
    "WindowWidth": 400,
}


def write_mr(folder: Path) -> None:
    """Write a thick-sliced oblique head and its labels."""
    grid = placed_grid((3, -6, 2), (176, 216, 26), (0.9, 0.9, 3.3), (-20, 0, 16), "LAS")
    label_of = {"hippocampus left": 1, "hippocampus right": 2, "ventricle": 3}
    values, labels = render(grid, head(), label_of, slice_mm=3.0)
    write_nifti(folder / "mr_oblique.nii.gz", as_mr(values, grid, seed=1), grid)
    write_nifti(folder / "mr_oblique_labels.nii.gz", labels, grid)


def write_training(folder: Path) -> None:
    """Write two heads, cut around the middle, that differ in anatomy, pose, grid, gain and storage order."""
    cases = {
        "case_1": (
            head(),
            placed_grid((1, -6, 1), (60, 62, 46), (1.4, 1.4, 1.5), (6, -4, 9), "LPS"),
            1.0,
        ),
        "case_2": (
            head(ventricle_scale=1.2, hippocampus_scale=0.92),
            placed_grid((-2, -4, 3), (64, 60, 50), (1.3, 1.4, 1.3), (-8, 5, -12), "PIR"),
            1.8,
        ),
    }
    names = {"background": 0, "ventricle": 1, "hippocampus": 2}
    label_of = {"ventricle": 1, "hippocampus left": 2, "hippocampus right": 2}
    for seed, (case, (body, grid, gain)) in enumerate(cases.items(), start=2):
        values, labels = render(grid, body, label_of)
        write_nifti(folder / "images" / f"{case}.nii.gz", as_mr(values * gain, grid, seed), grid)
        write_nifti(folder / "labels" / f"{case}.nii.gz", labels, grid)
    table = {"channel_names": {"0": "MRI"}, "labels": names, "numTraining": len(cases), "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def as_mr(values: NDArray[np.float64], grid: Grid, seed: int) -> NDArray[np.int16]:
    """Return `values` under the smooth bias field of a receive coil, with Rician noise."""
    rng = np.random.default_rng(seed)
    x, y, z = np.moveaxis(grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1)), -1, 0)
    bias = np.exp(0.20 * np.sin((x + 20) / 70) + 0.15 * np.cos((y - 60) / 80) + 0.12 * np.sin(z / 60))
    real, imaginary = 5 * rng.standard_normal((2, *grid.shape))
    return np.round(np.hypot(values * bias + real, imaginary)).astype(np.int16)


def write_nifti(path: Path, array: NDArray[Any], grid: Grid) -> None:
    """Write a NIfTI file whose sform and qform both say scanner coordinates, in mm."""
    image = nibabel.Nifti1Image(array, grid.affine)
    image.set_sform(grid.affine, code=1)
    image.set_qform(grid.affine, code=1)
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(image.to_bytes(), mtime=0))


if __name__ == "__main__":
    main()
