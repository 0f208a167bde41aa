"""What of a header may be shown: codes and numbers that the standard defines, and no text that somebody typed."""

from __future__ import annotations

import re

MODALITIES = frozenset({
    "ANN", "AR", "ASMT", "AU", "BDUS", "BI", "BMD", "CFM", "CR", "CT", "CTPROTOCOL", "DMS", "DG", "DOC", "DX", "ECG",
    "EEG", "EMG", "EOG", "EPS", "ES", "FID", "GM", "HC", "HD", "IO", "IOL", "IVOCT", "IVUS", "KER", "KO", "LEN", "LS",
    "M3D", "MG", "MR", "NM", "OAM", "OCT", "OP", "OPM", "OPT", "OPTBSV", "OPTENF", "OPV", "OSS", "OT", "PA", "PLAN",
    "POS", "PR", "PT", "PX", "REG", "RESP", "RF", "RG", "RTDOSE", "RTIMAGE", "RTINTENT", "RTPLAN", "RTRAD", "RTRECORD",
    "RTSEGANN", "RTSTRUCT", "RWV", "SEG", "SM", "SMR", "SR", "SRF", "STAIN", "TEXTUREMAP", "TG", "US", "VA", "XA",
    "XAPROTOCOL", "XC",
    # retired, and still in archives
    "AS", "CD", "CF", "CP", "CS", "DD", "DF", "DM", "DS", "EC", "FA", "FS", "LP", "MA", "MS", "OPR", "ST", "TS", "VF",
})  # fmt: skip
"""Defined terms of Modality (0008,0060), PS3.3 C.7.3.1.1.1."""

UNKNOWN = "?"

LARGEST = 2**31
"""Whole numbers of the standard (IS) are smaller, PS3.5 6.2."""


def shown_modality(text: str) -> str:
    """Return a modality that the standard defines, "" for a blank one, and a question mark for any other text."""
    return text if text in MODALITIES or not text else UNKNOWN


def shown_number(text: str) -> str:
    """Return a number that the standard allows, "" for a blank one, and a question mark for any other text."""
    if not text:
        return ""
    is_number = re.fullmatch(r"[+-]?[0-9]{1,11}", text) and -LARGEST <= int(text) < LARGEST
    return str(int(text)) if is_number else UNKNOWN
