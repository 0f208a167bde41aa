"""DICOM series for tests, written and read back by pydicom alone."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from conftest import rotation
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid
from pydicom.valuerep import DS

from medseg.labels import Label, SnomedCode
from medseg.volume import Grid, Volume

TABLE = (
    Label(value=1, name="Füße", color="#ff0000"),
    Label(value=2, name="left kidney", color="#00ff7f", snomed=SnomedCode(value="64033007", meaning="Kidney")),
    Label(value=5, name="liver", color="#0a141e"),
    Label(value=7, name="not there", color="#ffffff"),
)
"""Labels of which one has a code and one is in no map."""

PATIENT = "Doe^Jane"
FRAME = "1.2.826.0.1.3680043.8.498.7"
STUDY = {
    "SpecificCharacterSet": "ISO_IR 100",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.8",
    "PatientName": "Müller^Jörg",
    "PatientID": "PID-4711",
    "PatientBirthDate": "19550321",
    "PatientSex": "M",
    "PatientAge": "070Y",
    "StudyDate": "20261122",
    "StudyTime": "101112",
    "StudyID": "S1",
    "AccessionNumber": "A-0815",
    "ReferringPhysicianName": "House^Gregory",
    "StudyDescription": "secret",
    "SliceThickness": "2.5",
    "RescaleSlope": "1",
    "RescaleIntercept": "0",
}
"""What a series needs, so that objects can refer to it, and some that they should not repeat."""

AXIAL = [1, 0, 0, 0, 1, 0]
ORIENTATIONS = {
    "axial": AXIAL,
    "negated": [1, 0, 0, 0, -1, 0],
    "sagittal": [0, 1, 0, 0, 0, -1],
    "coronal": [1, 0, 0, 0, 0, -1],
    "oblique": rotation((11, -23, 37))[:, :2].T.ravel().tolist(),
}

TILTED = [0, 0.5, 2.4]
"""A step of the axial stack that is no normal: a gantry tilt."""

SOURCES: dict[str, dict[str, Any]] = {
    **{name: {"orientation": orientation} for name, orientation in ORIENTATIONS.items()},
    "tilted": {"step_mm": TILTED},
    "reversed": {"step_mm": [0, 0, -2.5]},
    "one slice": {"slices": [0]},
}
"""What differs between kinds of series, as `write_series` takes it."""

Each = Callable[[float], dict[str, Any]]


def normal_of(orientation: Iterable[float]) -> np.ndarray:
    along_row, along_column = np.reshape(list(orientation), (2, 3))
    return np.cross(along_row, along_column)


def decimals(values: Iterable[float]) -> list[DS]:
    return [DS(float(value), auto_format=True) for value in values]


def write_series(
    folder: Path,
    slices: Sequence[float] = range(5),
    *,
    orientation: Iterable[float] = AXIAL,
    step_mm: Iterable[float] | None = None,
    syntax: str = ExplicitVRLittleEndian,
    shape: tuple[int, int] = (4, 6),
    each: Each = lambda k: {},
    **tags: Any,
) -> None:
    """Write a file for each k of `slices`, k steps away from one position, in no order of names or numbers.

    `tags` and `each(k)` replace elements or, by None, leave them out. Pixels are 0.75 mm high and 1.25 mm wide.
    """
    folder.mkdir(parents=True, exist_ok=True)
    step = 2.5 * normal_of(orientation) if step_mm is None else np.array([*step_mm])
    uid = generate_uid()
    names = random.Random(5).sample(range(1000, 10000), len(slices))
    for name, k in zip(names, slices, strict=True):
        values = np.random.default_rng(name).integers(-1000, 1000, shape).astype(np.int16)
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        fields = {
            "SOPClassUID": CTImageStorage,
            "SOPInstanceUID": data.file_meta.MediaStorageSOPInstanceUID,
            "SeriesInstanceUID": uid,
            "FrameOfReferenceUID": FRAME,
            "PatientName": PATIENT,
            "Modality": "CT",
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
            "InstanceNumber": name,
            "ImagePositionPatient": decimals(np.array([-30.5, 41.25, 7]) + k * step),
            "ImageOrientationPatient": decimals(orientation),
            "PixelSpacing": [0.75, 1.25],
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "Rows": shape[0],
            "Columns": shape[1],
            "BitsAllocated": 16,
            "BitsStored": 16,
            "HighBit": 15,
            "PixelRepresentation": 1,
            "PixelData": values.tobytes(),
        }
        for keyword, value in (fields | tags | each(k)).items():
            if value is not None:
                setattr(data, keyword, value)
        if syntax == RLELossless:
            data.compress(RLELossless)
        data.file_meta.TransferSyntaxUID = syntax
        data.save_as(folder / str(name), enforce_file_format=True)


def write_source(folder: Path, kind: str = "axial", **tags: Any) -> Path:
    """Write a series that objects can refer to, and return its folder."""
    write_series(folder, **{"shape": (11, 13), **SOURCES[kind], **STUDY, **tags})
    return folder


def judge(program: str, package: str) -> str:
    """Return the path of an outside program that judges our files; skips the test where it is not installed."""
    found = shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{program} is not installed; it comes with {package}")
    return found


EXPLAINED = (
    "Dicom dataset contains invalid data values",  # a summary of lines that say which
    "Study ID",  # the source's, which goes on as it is
)
"""What dciodvfy calls an error that is none of ours."""


def errors_of_dciodvfy(path: Path, explained: Sequence[str] = EXPLAINED) -> list[str]:
    """Return the errors that dciodvfy finds in a file, but for those that are explained."""
    program = judge("dciodvfy", "the Debian package dicom3tools")
    done = subprocess.run([program, path], capture_output=True, text=True, check=False, errors="replace")
    lines = (done.stdout + done.stderr).splitlines()
    assert any(line and not line.startswith(("Warning", "Error", "Abort")) for line in lines), "no IOD was recognized"
    return [line for line in lines if line.startswith("Error") and not any(reason in line for reason in explained)]


def some_labels(grid: Grid, values: Sequence[int] = (1, 2, 5)) -> Volume:
    """Return labels with islands, holes, touching corners and voxels at the border; one slice stays empty."""
    chosen = np.random.default_rng(3).choice([0, *values], size=(1, *grid.shape))
    if grid.shape[2] > 2:
        chosen[..., 1] = 0
    return Volume(chosen.astype(np.uint8), grid)


def pixels_in_space(folder: Path) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Yield the world positions in RAS+ mm and the rescaled values of all pixels of a slice, by pydicom alone."""
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        orientation = [float(value) for value in data.ImageOrientationPatient]
        position = [float(value) for value in data.ImagePositionPatient]
        row, column = np.indices((data.Rows, data.Columns))[..., None]
        lps = position + row * float(data.PixelSpacing[0]) * np.array(orientation[3:])
        lps = lps + column * float(data.PixelSpacing[1]) * np.array(orientation[:3])
        slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
        yield lps * (-1, -1, 1), data.pixel_array * slope + intercept


def assert_every_pixel_in_place(volume: Volume, folder: Path) -> None:
    """Check by headers alone that each pixel lies in the volume where its file says, and nothing else."""
    count = 0
    for world_mm, values in pixels_in_space(folder):
        index = volume.grid.to_index(world_mm)
        nearest = np.round(index).astype(int)
        assert np.abs(volume.grid.to_world(nearest) - world_mm).max() < 1e-6
        np.testing.assert_array_equal(volume.array[0][tuple(nearest.reshape(-1, 3).T)], values.ravel())
        count += values.size
    assert count == volume.array.size
