"""Studies: finding them, reading a series beside peers, and what a batch costs over the bare engine.

    python benchmarks/batch.py [scan] [read] [overhead] [workers] [--results DIR]

Everything is generated. Each part prints its figures and leaves one JSON file. Figures are medians of REPEATS runs with
warm file caches, peers and medseg in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dcm2niix
import numpy as np
import SimpleITK as sitk  # noqa: N813
from monai.transforms import LoadImage
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

import medseg
from medseg.report.measurements import measure
from medseg.study.batch import Options, Progress, run_batch
from medseg.study.cohort import find_cohort
from medseg.study.find import find_studies

REPEATS = 3
Shape = tuple[int, int, int]


def write_series(folder: Path, shape: Shape, modality: str = "CT", seed: int = 0, **tags: Any) -> None:
    """Write a series of smooth noise (columns, rows, slices) at 1 mm."""
    folder.mkdir(parents=True)
    columns, rows, count = shape
    rng = np.random.default_rng(seed)
    across = rng.normal(0, 1, (rows, columns)).cumsum(0).cumsum(1)
    plane = (100 * across / np.abs(across).max()).astype(np.int16)
    series, frame, study = generate_uid(), generate_uid(), generate_uid()
    for k in range(count):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
        data.SOPInstanceUID = generate_uid()
        data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = (
            data.SOPClassUID, data.SOPInstanceUID,
        )  # fmt: skip
        elements = {
            "StudyInstanceUID": study, "SeriesInstanceUID": series, "FrameOfReferenceUID": frame, "SeriesNumber": 1,
            "PatientName": "Phantom", "PatientID": "0", "StudyID": "1", "InstanceNumber": k + 1, "Modality": modality,
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "ImagePositionPatient": [0, 0, k],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [1, 1], "SliceThickness": 1,
            "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "Rows": rows, "Columns": columns,
            "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1,
            "PixelData": np.roll(plane, k, axis=0).tobytes(),
        }  # fmt: skip
        if modality == "CT":
            elements |= {"RescaleSlope": 1, "RescaleIntercept": -1024}
        for name, value in (elements | tags).items():
            setattr(data, name, value)
        data.save_as(folder / f"{k:05d}", enforce_file_format=True)


def median(do: Callable[[], object]) -> float:
    """Return the median time of a call in seconds."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        do()
        times.append(time.perf_counter() - began)
    return round(statistics.median(times), 3)


def both(name: str, do: Callable[[], object]) -> dict[str, float]:
    """Return the median time of a call, and of the processor time that it and the programs it starts take."""
    do()
    walls, processors = [], []
    for _ in range(REPEATS):
        began, used = time.perf_counter(), sum(os.times()[:4])
        do()
        walls.append(time.perf_counter() - began)
        processors.append(sum(os.times()[:4]) - used)
    return {
        f"{name}_s": round(statistics.median(walls), 3),
        f"{name}_processor_s": round(statistics.median(processors), 3),
    }


def scan(work: Path, count: int = 20_000) -> dict[str, Any]:
    """Find the studies among `count` small files: 200 series of 100 slices."""
    for number in range(count // 100):
        write_series(work / f"{number:03d}", (16, 16, 100), seed=number)
    files = [path for path in work.rglob("*") if path.is_file()]

    def read_heads() -> None:
        for path in files:
            with path.open("rb") as file:
                file.read(1 << 16)

    return {
        "files": len(files),
        "find_studies_s": median(lambda: find_studies(work)),
        "find_cohort_s": median(lambda: find_cohort(work)),
        "read_first_64_kB_s": median(read_heads),
    }


def read(work: Path, slices: int = 300) -> dict[str, Any]:
    """Read one CT series of 512 x 512; dcm2niix is a program that starts, reads, and writes an uncompressed NIfTI."""
    series, out = work / "series", work / "out"
    write_series(series, (512, 512, slices))
    out.mkdir()

    def by_sitk() -> object:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series)))
        return reader.Execute()

    def by_dcm2niix() -> object:
        command = [dcm2niix.bin, "-z", "n", "-b", "n", "-w", "1", "-f", "x", "-o", out, series]
        return subprocess.run(command, check=True, capture_output=True)

    monai = LoadImage(reader="PydicomReader", image_only=True)
    ours = medseg.load(series).array
    theirs = sitk.GetArrayFromImage(by_sitk())
    same = bool((ours[0].transpose(2, 1, 0) == theirs).all())
    return {
        "slices": slices,
        "same_values_as_simpleitk": same,
        **both("medseg", lambda: medseg.load(series)),
        **both("simpleitk", by_sitk),
        **both("dcm2niix", by_dcm2niix),
        **both("monai_pydicom", lambda: monai(series)),
    }


def _make_studies(work: Path, count: int, shape: Shape) -> Path:
    for number in range(count):
        write_series(work / "studies" / str(number), shape, "MR", seed=number)
    return work / "studies"


def each_s(ends: Sequence[float], workers: int = 1) -> float:
    """Return the time of a study while all workers compute: from when each has ended one to the end of all."""
    return round((ends[-1] - ends[workers - 1]) / (len(ends) - workers), 3)


def _bare(studies: Path, model: medseg.Model, out: Path) -> float:
    ends = []
    for folder in sorted(studies.iterdir()):
        volume = medseg.load(folder)
        labels = model.segment(volume)
        measure(labels, model.plan.labels, volume)
        medseg.save(labels, out)
        ends.append(time.perf_counter())
    return each_s(ends)


def _batch(studies: Path, out: Path, workers: int, threads: int, scheduler: str | None = None) -> dict[str, Any]:
    """Return the time of a whole batch, and that of a study once the networks are loaded."""
    ends: list[float] = []

    def note(now: Progress) -> None:
        ends.extend([time.perf_counter()] * (now.ended.total() - len(ends)))

    began = time.perf_counter()
    options = Options(workers=workers, threads=threads)
    outcomes = run_batch("hippocampus", studies, out, options, scheduler=scheduler, progress=note)
    return {
        "statuses": sorted({outcome.status for outcome in outcomes}),
        "whole_s": round(time.perf_counter() - began, 2),
        "each_s": each_s(ends, workers),
    }


def overhead(work: Path, count: int = 5, shape: Shape = (112, 112, 80)) -> dict[str, Any]:
    """Compare a batch with the bare engine in turn: load, segment, measure and save in a loop, with the same threads.

    The bare engine does no clean-up, and writes no CSV, JSON and manifest: all that counts as overhead.
    """
    studies, threads = _make_studies(work, count, shape), os.cpu_count() or 1
    model = medseg.Model.load("hippocampus", threads=threads)
    bare, batches = [], []
    for turn in range(2):
        bare.append(_bare(studies, model, work / "labels.nii.gz"))
        batches.append(_batch(studies, work / f"out_{turn}", 1, threads))
    share = min(one["each_s"] for one in batches) / min(bare) - 1
    return {"studies": count, "bare_each_s": bare, "batches": batches, "overhead": round(share, 4)}


def workers(work: Path, count: int = 8, shape: Shape = (96, 96, 56)) -> dict[str, Any]:
    """Compare two workers of one thread with one of one, with one of two, and with two of a local Dask cluster."""
    studies = _make_studies(work, count, shape)
    own = {f"{n}_workers_{t}_threads": _batch(studies, work / f"{n}_{t}", n, t) for n, t in ((1, 1), (1, 2), (2, 1))}
    return {"studies": count, **own, "dask_2_workers_1_threads": _batch(studies, work / "dask", 2, 1, "local")}


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "scan": scan,
    "read": read,
    "overhead": overhead,
    "workers": workers,
}


def main() -> None:
    """Run the parts that are asked for, by default all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[*PARTS])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "batch")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    machine = {"cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}
    for part in options.parts:
        with tempfile.TemporaryDirectory() as work:
            figures = PARTS[part](Path(work))
        text = json.dumps({**figures, "machine": machine}, indent=1)
        print(part, text)
        (options.results / f"{part}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
