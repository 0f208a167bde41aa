"""Enhanced multi-frame objects for tests, made of the single slices of a folder."""

from __future__ import annotations

import random
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedCTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid


def _item(**elements: object) -> list[Dataset]:
    item = Dataset()
    for name, value in elements.items():
        setattr(item, name, value)
    return [item]


def write_enhanced(single: Path, folder: Path, *, modality: str = "MR", syntax: str = ExplicitVRLittleEndian) -> None:
    """Write the slices of `single` as frames of one file, in an order and with a thickness that say nothing."""
    slices = [pydicom.dcmread(path) for path in sorted(single.iterdir())]
    random.Random(3).shuffle(slices)
    first = slices[0]
    data = Dataset()
    for name in ("SeriesInstanceUID", "FrameOfReferenceUID", "PatientName", "SamplesPerPixel", "Rows", "Columns"):
        setattr(data, name, first[name].value)
    for name in ("PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        setattr(data, name, first[name].value)
    data.Modality, data.SOPInstanceUID = modality, generate_uid()
    data.SOPClassUID = EnhancedMRImageStorage if modality == "MR" else EnhancedCTImageStorage
    data.ImageType = ["ORIGINAL", "PRIMARY", "T1", "NONE"]
    data.NumberOfFrames = len(slices)
    measures = _item(PixelSpacing=first.PixelSpacing, SliceThickness=9)
    data.SharedFunctionalGroupsSequence = _item(PixelMeasuresSequence=measures)
    frames = []
    for part in slices:
        (frame,) = _item(
            PlanePositionSequence=_item(ImagePositionPatient=part.ImagePositionPatient),
            PlaneOrientationSequence=_item(ImageOrientationPatient=part.ImageOrientationPatient),
        )
        if "RescaleSlope" in part:
            frame.PixelValueTransformationSequence = _item(
                RescaleSlope=part.RescaleSlope, RescaleIntercept=part.RescaleIntercept
            )
        if "EchoTime" in part:
            frame.MREchoSequence = _item(EffectiveEchoTime=float(part.EchoTime))
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = frames
    data.PixelData = b"".join(part.PixelData for part in slices)
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    folder.mkdir()
    data.save_as(folder / "enhanced", enforce_file_format=True)
