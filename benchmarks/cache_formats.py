"""What prepared cases take on the disk and how long a patch takes to read: memory maps against compressed chunks.

python benchmarks/cache_formats.py DATASET [--cases 20] [--out FILE.json]

"first" is wall time after the files were dropped from the system's cache, "again" processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
from numpy.typing import NDArray

from medseg.train.cache import BLOCKS, CHUNKS, Chunks, Prepared, equal_parts, prepare_cases
from medseg.train.dataset import read_dataset
from medseg.train.fingerprint import fingerprint
from medseg.train.planner import make_plan

PATCHES = 400
Array = NDArray[np.generic]


def as_npy(array: Array, file: Path) -> None:
    """Write an array as numpy does."""
    np.save(file, array)


def as_half(array: Array, file: Path) -> None:
    """Write intensities in half precision, as numpy does."""
    np.save(file, array.astype(np.float16) if array.dtype.kind == "f" else array)


def as_blosc2(array: Array, file: Path, codec: blosc2.Codec = blosc2.Codec.LZ4HC, level: int = 5) -> None:
    """Write chunks as medseg keeps them."""
    chunks = equal_parts(array.shape, CHUNKS)
    blocks = equal_parts(chunks, BLOCKS)
    how = {"codec": codec, "clevel": level, "nthreads": 1}
    blosc2.asarray(np.ascontiguousarray(array), chunks=chunks, blocks=blocks, cparams=how, urlpath=str(file))


def as_zstd(array: Array, file: Path) -> None:
    """Write chunks that take longer to pack and are smaller."""
    as_blosc2(array, file, blosc2.Codec.ZSTD, 5)


def open_npy(file: Path) -> Array:
    """Return a memory map."""
    return np.load(file, mmap_mode="r")


FORMATS: dict[str, tuple[Callable[[Array, Path], None], Callable[[Path], Array | Chunks]]] = {
    "npy, float32": (as_npy, open_npy),
    "npy, float16": (as_half, open_npy),
    "blosc2, LZ4HC 5": (as_blosc2, Chunks.of),
    "blosc2, Zstandard 5": (as_zstd, Chunks.of),
}


def forget(files: list[Path]) -> None:
    """Take files out of the system's cache, as after a restart."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_patches(
    files: list[Path],
    opened: Callable[[Path], Array | Chunks],
    patch: tuple[int, ...],
    clock: Callable[[], float],
) -> float:
    """Return the milliseconds that a patch of image or target takes to read, on average."""
    random = np.random.default_rng(1)
    arrays = [opened(file) for file in files]
    began = clock()
    for _ in range(PATCHES):
        array = arrays[int(random.integers(len(arrays)))]
        start = [
            int(random.integers(max(1, size - edge + 1))) for size, edge in zip(array.shape[1:], patch, strict=True)
        ]
        np.array(array[(slice(None), *(slice(a, a + b) for a, b in zip(start, patch, strict=True)))])
    return (clock() - began) / PATCHES * 1000


def measure(prepared: list[Prepared], patch: tuple[int, ...], folder: Path) -> list[dict[str, float | str]]:
    """Return a row of sizes and times for each format."""
    rows: list[dict[str, float | str]] = []
    for name, (write, opened) in FORMATS.items():
        files = {
            part: [folder / f"{len(rows)}_{n}_{part}" for n in range(len(prepared))] for part in ("image", "target")
        }
        ending = ".npy" if name.startswith("npy") else ".b2nd"
        files = {part: [file.with_suffix(ending) for file in some] for part, some in files.items()}
        began = time.process_time()
        for case, image, target in zip(prepared, files["image"], files["target"], strict=True):
            write(case.image[:], image)
            write(case.target[:][None], target)
        row: dict[str, float | str] = {"format": name, "write_s": time.process_time() - began}
        for part, some in files.items():
            row[f"{part}_mb"] = sum(file.stat().st_size for file in some) / 1e6
            forget(some)
            row[f"{part}_first_ms"] = read_patches(some, opened, patch, time.perf_counter)
            row[f"{part}_again_ms"] = read_patches(some, opened, patch, time.process_time)
        rows.append(row)
    return rows


def main() -> None:
    """Measure the formats on some cases of a dataset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    dataset = read_dataset(arguments.dataset)
    plan = make_plan(fingerprint(dataset))
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_cases(dataset.cases[: arguments.cases], plan, Path(folder) / "cache")
        rows = measure(prepared, plan.patch, Path(folder))
    for row in rows:
        print(
            "  ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{value:20}" for key, value in row.items())
        )
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"dataset": dataset.name, "patch": plan.patch, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
