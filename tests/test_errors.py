"""The error tree."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from medseg import errors
from medseg.errors import InputError, MedsegError, SeriesRefused, UnreadableFile

TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MedsegError)]


def test_the_docstring_draws_every_class() -> None:
    assert errors.__doc__ is not None
    for kind in TREE:
        assert f" {kind.__name__} " in errors.__doc__


def test_every_class_has_a_reason_of_its_own() -> None:
    reasons = [kind.default_reason for kind in TREE]
    assert len(set(reasons)) == len(TREE) == 12


@pytest.mark.parametrize("kind", TREE)
def test_text_path_and_reason(kind: type[MedsegError]) -> None:
    plain = kind("It went wrong.")
    assert (str(plain), plain.path, plain.reason) == ("It went wrong.", None, kind.default_reason)
    full = kind("It went wrong.", path="folder/doe_john.nii", reason="truncated")
    assert (str(full), full.path, full.reason) == ("It went wrong.", Path("folder/doe_john.nii"), "truncated")


def test_one_except_catches_every_input() -> None:
    for kind in (UnreadableFile, SeriesRefused):
        with pytest.raises(InputError, match="no slices"):
            raise kind("There are no slices.")


def test_an_error_comes_back_whole_from_another_process() -> None:
    error = SeriesRefused("A slice is missing.", path="study", reason="missing_slice")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.path, copy.reason) == (SeriesRefused, str(error), error.path, "missing_slice")
