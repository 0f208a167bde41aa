"""Files that were changed at random: whatever reads them gives a result, or an error of medseg, in bounded memory.

The changes are drawn from a seed, so that what fails here fails again. `--slow` draws twenty times as many.
"""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import monai_files
import nnunet_files
import numpy as np
import pytest
from datasets import make_balls
from dicom_files import TABLE, some_labels, write_source
from models import tiny_model
from pydicom.fileset import FileSet
from studies import write_pipeline

import medseg
from medseg.errors import MedsegError
from medseg.model.segmenter import Model
from medseg.model.weights import save_weights
from medseg.study.archive import opened
from medseg.study.find import find_studies
from medseg.study.pipeline import load_pipeline
from medseg.train.dataset import read_dataset
from medseg.volume import Grid, Volume

MOST_BYTES = 2**30
"""Memory that all changes of one kind of file may take, beyond what the process had: files have some kilobytes."""

TOKENS = (
    *(b"0", b"-1", b"1e999", b"nan", b"null", b"[]", b"{}", b'""', b"99999999999999999999", b"true", b"[[[[", b"\xff"),
    *(
        b"\0" * 8,
        b"\xff" * 8,
        b"\x7f\xff\xff\xff",
        b"../x",
        b"\xff\xfe\0\xe0\xff\xff\xff\xff",
        b"SQ",
        b"\\",
        b"\n",
        b":",
    ),
)

LISTED = ("studies", "dicomdir")
"""Whose problems are listed, and not raised."""

Kind = tuple[Callable[[Path], Path], Callable[[Path], object]]
"""What makes a file in a folder and returns which of its files is changed, and what reads the changed file."""


Change = Callable[[bytearray, random.Random], tuple[int, int, bytes]]
"""From content to what of it is replaced, and by what."""


def a_byte(data: bytearray, chance: random.Random) -> tuple[int, int, bytes]:
    at = chance.randrange(len(data) + 1)
    return at, at + 1, bytes([chance.randrange(256)])


def a_bit(data: bytearray, chance: random.Random) -> tuple[int, int, bytes]:
    at = chance.randrange(max(1, len(data)))
    return at, at + 1, bytes([one ^ 1 << chance.randrange(8) for one in data[at : at + 1]])


def a_token(data: bytearray, chance: random.Random) -> tuple[int, int, bytes]:
    at, token = chance.randrange(len(data) + 1), chance.choice(TOKENS)
    return at, at + chance.choice((0, len(token))), token


def a_number(data: bytearray, chance: random.Random) -> tuple[int, int, bytes]:
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data[: 2**16]))
    return (*(chance.choice(numbers).span() if numbers else (0, 0)), chance.choice(TOKENS))


def a_part(data: bytearray, chance: random.Random) -> tuple[int, int, bytes]:
    """Cut a part out, or put it in somewhere else once more."""
    at, other = (chance.randrange(len(data) + 1) for _ in range(2))
    size = chance.choice((1, 2, 4, 16, 200))
    return (at, at + size, b"") if chance.random() < 0.5 else (other, other, bytes(data[at : at + size]))


def the_end(data: bytearray, chance: random.Random) -> tuple[int, int, bytes]:
    return (chance.randrange(len(data) + 1) if chance.random() < 0.3 else len(data)), len(data), b""


CHANGES: tuple[Change, ...] = (a_byte, a_bit, a_token, a_token, a_number, a_number, a_part, a_part, the_end)


def changed(content: bytes, chance: random.Random) -> bytes:
    """Return content with one to four changes: bytes, tokens, parts that are cut out, doubled or moved."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        start, stop, new = chance.choice(CHANGES)(data, chance)
        data[start:stop] = new
    return bytes(data)


def volume() -> Volume:
    affine = np.diag([-0.5, -1.0, 2.0, 1.0])
    return Volume(np.arange(210, dtype=np.int16).reshape(1, 5, 6, 7), Grid((5, 6, 7), affine))


def image(name: str) -> Kind:
    def make(folder: Path) -> Path:
        medseg.save(volume(), folder / name)
        return folder / name

    return make, medseg.load


def detached(folder: Path) -> Path:
    medseg.save(volume(), folder / "whole.nrrd")
    lines = (folder / "whole.nrrd").read_bytes().split(b"\n\n")[0].replace(b"encoding: gzip", b"encoding: raw")
    (folder / "a.raw").write_bytes(bytes(420))
    (folder / "a.nhdr").write_bytes(lines + b"\ndata file: a.raw\n\n")
    return folder / "a.nhdr"


def a_slice(folder: Path) -> Path:
    return sorted(write_source(folder / "series").iterdir())[1]


def labels_of(folder: Path) -> tuple[Volume, Path]:
    series = write_source(folder / "series")
    return some_labels(medseg.load(series).grid), series


def a_seg(folder: Path) -> Path:
    labels, series = labels_of(folder)
    medseg.save_dicom_seg(labels, folder / "a.dcm", source=series, table=TABLE)
    return folder / "a.dcm"


def an_rtstruct(folder: Path) -> Path:
    labels, series = labels_of(folder)
    medseg.save_rtstruct(labels, folder / "a.dcm", source=series, table=TABLE)
    return folder / "a.dcm"


def a_dicomdir(folder: Path) -> Path:
    files = FileSet()
    for file in write_source(
        folder / "series", StudyDate="20200101", StudyTime="10", StudyID="1", SeriesNumber=1
    ).iterdir():
        files.add(file)
    files.write(folder / "cd")
    files._stage["t"].cleanup()  # pydicom leaves this folder to the garbage collector, whose warning fails another test
    return folder / "cd" / "DICOMDIR"


def an_archive(folder: Path) -> Path:
    series = write_source(folder / "series")
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(series.iterdir())[:3]:
            archive.write(file, f"a/{file.name}")
    return folder / "a.zip"


def read_archive(path: Path) -> object:
    with opened(path, path.parent) as folder:
        return find_studies(folder)


def a_model(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        model = tiny_model()
        model.plan.save(folder / "plan.json")
        save_weights(model.networks[0], folder / "fold_0.safetensors")
        return folder / name

    return make


def nnunet(name: str) -> Callable[[Path], Path]:
    return lambda folder: nnunet_files.write_model(folder / "source") / name


def bundle(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        monai_files.write_bundle(folder / "source", monai_files.inference(), monai_files.metadata())
        if name.endswith(".yaml"):
            (folder / "source/configs/inference.json").rename(folder / "source" / name)
        return folder / "source" / name

    return make


def read_foreign(path: Path) -> object:
    source = next(folder for folder in path.parents if folder.name == "source")
    shutil.rmtree(source.parent / "model", ignore_errors=True)
    return medseg.import_model(source, source.parent / "model")


def a_dataset(folder: Path) -> Path:
    return make_balls(folder / "balls", cases=2, shape=(8, 8, 8)) / "dataset.json"


def a_case_list(folder: Path) -> Path:
    path = a_dataset(folder).with_name("cases.json")
    path.write_text(json.dumps([{"case": "case_0", "group": "a"}, {"case": "case_1", "structures": ["ball"]}]))
    return path


def read_folder(path: Path) -> object:
    return read_dataset(path.parent)


def load_model(path: Path) -> object:
    return Model.load(path.parent, device="cpu", runtime="torch")


KINDS: dict[str, tuple[Kind, int]] = {
    "nifti": (image("a.nii"), 60),
    "nifti_gz": (image("a.nii.gz"), 40),
    "nrrd": (image("a.nrrd"), 60),
    "mha": (image("a.mha"), 60),
    "nhdr": ((detached, medseg.load), 60),
    "slice": ((a_slice, lambda path: medseg.load(path.parent)), 80),
    "studies": ((a_slice, lambda path: find_studies(path.parent)), 40),
    "seg": ((a_seg, lambda path: medseg.load_dicom_seg(path, source=path.parent / "series")), 60),
    "rtstruct": ((an_rtstruct, lambda path: medseg.load_rtstruct(path, source=path.parent / "series")), 60),
    "dicomdir": ((a_dicomdir, find_studies), 40),
    "zip": ((an_archive, read_archive), 60),
    "plan": ((a_model("plan.json"), load_model), 80),
    "weights": ((a_model("fold_0.safetensors"), load_model), 40),
    "dataset": ((a_dataset, read_folder), 60),
    "cases": ((a_case_list, read_folder), 30),
    "pipeline": ((lambda folder: write_pipeline(folder / "pipeline"), load_pipeline), 60),
    "nnunet_plans": ((nnunet("plans.json"), read_foreign), 50),
    "nnunet_dataset": ((nnunet("dataset.json"), read_foreign), 30),
    "nnunet_weights": ((nnunet("fold_0/checkpoint_final.pth"), read_foreign), 30),
    "monai": ((bundle("configs/inference.json"), read_foreign), 50),
    "monai_yaml": ((bundle("configs/inference.yaml"), read_foreign), 30),
    "monai_metadata": ((bundle("configs/metadata.json"), read_foreign), 20),
    "monai_weights": ((bundle("models/model.pt"), read_foreign), 20),
}


def peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def fuzz(kind: str, folder: Path, seed: int, count: int) -> int:
    """Return how many changed files were refused."""
    make, read = KINDS[kind][0]
    path = make(folder)
    content, chance, refused = path.read_bytes(), random.Random(f"{kind} {seed}"), 0
    read(path)  # as it is, it is read
    before = peak_bytes()
    for number in range(count):
        path.write_bytes(changed(content, chance))
        try:
            read(path)
        except MedsegError as error:
            refused += 1
            assert "\n" not in str(error) or kind in ("dataset", "cases"), f"change {number} is told on several lines"
        except Exception as error:
            path.write_bytes(content)
            raise AssertionError(f"change {number} of {kind}, seed {seed}: {type(error).__name__}: {error}") from error
    path.write_bytes(content)  # what the tests leave is looked at
    assert peak_bytes() - before < MOST_BYTES
    return refused


@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_end_in_a_result_or_an_error_of_medseg(tmp_path, capfd, kind):
    with warnings.catch_warnings(action="ignore"):
        refused = fuzz(kind, tmp_path, 0, KINDS[kind][1])
    assert refused or kind in LISTED


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_changed_files(tmp_path, capfd, kind):
    with warnings.catch_warnings(action="ignore"):
        refused = fuzz(kind, tmp_path, 1, 20 * KINDS[kind][1])
    assert refused or kind in LISTED
