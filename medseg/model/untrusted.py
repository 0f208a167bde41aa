"""Foreign model files, which may have been made to attack: read with limits, and nothing in them is ever run."""

from __future__ import annotations

import hashlib
import lzma
import pickle
import pickletools
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg.errors import ModelError
from medseg.io.files import check_regular
from medseg.io.leftovers import temporary_folder

MOST_MEMBERS = 100_000
"""Files that an archive may hold."""

MOST_SHRINKAGE = 20
"""How many times as large as in the archive a file may be: weights shrink by a tenth, bombs a thousandfold."""

SMALL_BYTES = 2**20
"""Files up to this size may have shrunk by any factor, as long as all of them together have not."""

MOST_COPIED_BYTES = 2**28
"""What copies of the longest text in a pickle may come to: one for each call in it."""

BLANK = ("builtins bytearray", "__builtin__ bytearray")
"""What makes as many zeros as a number says."""

NUMBERS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")

DAMAGE: tuple[type[Exception], ...] = (
    AssertionError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What readers of zip files and pickles raise where these are damaged."""


def read_checkpoint(file: Path) -> Any:
    """Return what a PyTorch checkpoint holds: tensors, numbers, text, lists and dicts of them; nothing else is made.

    Tensors lie in the file until they are used. Raises ModelError for a file that is damaged, compressed, of PyTorch
    before 1.6, or that asks for anything beyond that: such a file could run code where it is simply unpickled.
    """
    try:
        check_regular(file)
        with zipfile.ZipFile(file) as archive:
            _check_pickles(archive, file)
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ModelError(
                    "The checkpoint is compressed, which PyTorch never does; it is not read.",
                    path=file,
                    reason="unsafe",
                )
        with torch.serialization.safe_globals(_numpy_scalars()):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            "The checkpoint holds more than weights, numbers and text, and could run code where it is unpickled. "
            "It is refused, and nothing of it was run.",
            path=file,
            reason="unsafe",
        ) from error
    except DAMAGE as error:
        raise ModelError("The checkpoint is damaged, or is not one of PyTorch 1.6 or later.", path=file) from error


def _check_pickles(archive: zipfile.ZipFile, file: Path) -> None:
    """Raise ModelError for a pickle that could fill memory from a few bytes: blank bytes, or copies of a long text."""
    for member in archive.infolist():
        if not member.filename.endswith(".pkl") or member.compress_type != zipfile.ZIP_STORED:
            continue
        longest, calls = 0, 0
        for operation, argument, _ in pickletools.genops(archive.read(member)):
            blank = operation.name == "GLOBAL" and argument in BLANK
            calls += operation.name in ("REDUCE", "NEWOBJ", "BUILD")
            longest = max(longest, len(argument) if isinstance(argument, str | bytes) else 0)
            if blank or calls * longest > MOST_COPIED_BYTES:
                raise ModelError(
                    "The checkpoint would unpack to far more than its size. It is refused.", path=file, reason="unsafe"
                )


def weights_in(state: Any, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint's state under new names, as float32; those renamed to None are left out.

    Raises ModelError for entries that are no plain tensors of numbers.
    """
    if not isinstance(state, Mapping):
        raise ModelError("The checkpoint has no weights where they should be.", reason="weights")
    weights = {}
    for name, tensor in state.items():
        new = rename(str(name).removeprefix("module.").removeprefix("_orig_mod."))
        if new is None:
            continue
        if not isinstance(tensor, Tensor) or not _is_plain(tensor):
            raise ModelError("The checkpoint holds something else among its weights.", reason="weights")
        weights[new] = tensor.detach().float()
    return weights


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor holds numbers, as many as its shape says: one number repeated could fill memory."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()
    return dense and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def checksum(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def unpacked(archive: Path, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """Give a folder with those files of a zip archive whose names are `wanted`; it is removed afterwards.

    Raises ModelError for an archive that is damaged, has names that lead out of a folder, links, or files that grow,
    alone or together, beyond MOST_SHRINKAGE: none of it is unpacked.
    """
    with temporary_folder() as folder:
        try:
            with zipfile.ZipFile(archive) as source:
                members = _checked(source, archive)
                for member in members:
                    if wanted(member.filename) and not member.is_dir():
                        _extract(source, member, Path(folder, member.filename))
        except DAMAGE as error:
            raise ModelError("The archive is missing, damaged, encrypted or no zip file.", path=archive) from error
        yield folder


def _checked(source: zipfile.ZipFile, archive: Path) -> list[zipfile.ZipInfo]:
    members = source.infolist()
    if len(members) > MOST_MEMBERS or len({member.filename for member in members}) < len(members):
        raise ModelError("The archive holds too many files, or one name twice.", path=archive, reason="unsafe")
    for member in members:
        parts = PurePosixPath(member.filename).parts + PureWindowsPath(member.filename).parts
        links = stat.S_ISLNK(member.external_attr >> 16)
        if (
            ".." in parts
            or PurePosixPath(member.filename).is_absolute()
            or PureWindowsPath(member.filename).anchor
            or links
        ):
            raise ModelError(
                "The archive holds names that lead out of its folder, or links. It is refused.",
                path=archive,
                reason="unsafe",
            )
    packed = archive.stat().st_size  # what members say that they take may overlap
    sizes = [(member.file_size, member.compress_size) for member in members]
    sizes.append((sum(size for size, _ in sizes), packed))
    if any(size > max(SMALL_BYTES, MOST_SHRINKAGE * stored) for size, stored in sizes):
        raise ModelError(
            f"The archive holds files that unpack to more than {MOST_SHRINKAGE} times their size, as weights never "
            "do. It is refused.",
            path=archive,
            reason="unsafe",
        )
    return members


def _extract(source: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # What a member says of its size is where reading stops, so that one that lies fails by its checksum.
    with source.open(member) as packed, target.open("xb") as plain:
        shutil.copyfileobj(packed, plain, 2**20)


def _number_type(kind: Any, *_rest: Any) -> Any:
    """Return a type of single numbers. Raises TypeError for others: one of a few letters can take gigabytes."""
    if kind not in NUMBERS:
        raise TypeError
    return np.dtype(kind, copy=True)


def _numpy_scalars() -> list[Any]:
    """Return what numpy's numbers are pickled as; nnU-Net keeps scores in its checkpoints."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in NUMBERS]
    return [
        *((scalar, f"{home}.multiarray.scalar") for home in ("numpy.core", "numpy._core")),
        (_number_type, "numpy.dtype"),
        *kinds,
    ]
