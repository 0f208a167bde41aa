"""Results without a word on whose they are, for research: what medseg wrote, with names, numbers and dates removed.

Label maps, measurements and manifests never carry any. DICOM objects do, and lose it here as the Basic Application
Level Confidentiality Profile asks (PS3.15 E.1): the patient is the study's keyed name, dates are one and the same, and
each UID that is not in the standard's list (PS3.6 A) becomes one made of its keyed hash. So objects of one batch still
refer to one another, and no one without the key can say to which scan.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.errors import UsageError
from medseg.io.dicom_header import parsing
from medseg.io.files import written_whole
from medseg.study.pipeline import Pipeline

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset

BLANK = ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "AccessionNumber")
"""What every object must have and may leave empty."""

NO_MOMENT = {"DA": "19000101", "TM": "000000", "DT": "19000101000000"}
"""What stands where a date or a time must be."""

METHOD = "PS3.15 Basic Profile by medseg, objects of its own"


def check_deidentified(pipeline: Pipeline) -> None:
    """Raise UsageError for a pipeline with an output that cannot be made free of identifiers."""
    if "picture" in pipeline.outputs:
        raise UsageError(
            "A picture shows the scan itself, into which a name may be burned. Leave it out of the pipeline's outputs."
        )


def deidentify(path: Path, study: str, key: bytes) -> None:
    """Take out of a DICOM object that medseg wrote what says whose it is; `study` becomes the patient's name.

    Raises OutputError.
    """
    from pydicom import dcmread
    from pydicom.sr.codedict import codes

    def anonymous(_: Dataset, element: DataElement) -> None:
        if element.VR == "UI" and element.value:
            element.value = [_hashed(uid, key) for uid in _listed(element)]
        elif element.VR in NO_MOMENT and element.value:
            element.value = NO_MOMENT[element.VR]
        elif element.VR == "PN":
            element.value = ""

    with parsing(path):
        data = dcmread(path)
        data.walk(anonymous)
        for name in BLANK:
            setattr(data, name, "")
        data.PatientName = data.PatientID = study
        data.PatientIdentityRemoved = "YES"
        data.DeidentificationMethod = METHOD
        data.DeidentificationMethodCodeSequence = [_code(codes.DCM.BasicApplicationConfidentialityProfile)]
        data.LongitudinalTemporalInformationModified = "REMOVED"
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    with written_whole(path) as beside:
        data.save_as(beside, enforce_file_format=True)


def _listed(element: DataElement) -> list[str]:
    return [str(uid) for uid in (element.value if element.VM > 1 else [element.value])]


def _hashed(uid: str, key: bytes) -> str:
    """Return a UID (2.25 and a number of 128 bits, PS3.5 B.2) that only the key leads to from the one given."""
    from pydicom.uid import UID_dictionary

    if uid in UID_dictionary:
        return uid
    return f"2.25.{int.from_bytes(hmac.new(key, uid.encode(), hashlib.sha256).digest()[:16], 'big')}"


def _code(concept: object) -> Dataset:
    from pydicom import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = (
        getattr(concept, name) for name in ("value", "scheme_designator", "meaning")
    )
    return item
