"""Rules for the whole project that no linter knows."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import medseg
from medseg import errors

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "medseg").rglob("*.py"))
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60

each_module = pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text(encoding="utf-8")))


def run_python(code: str, *arguments: str) -> None:
    """Run code in a Python of its own, which has imported nothing yet; a warning is an error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@each_module
def test_files_are_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_A_FILE


@each_module
def test_functions_are_short(file: Path) -> None:
    for node in nodes(file):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MOST_LINES_OF_A_FUNCTION, f"{node.name} is too long"


@each_module
def test_only_the_command_line_prints(file: Path) -> None:
    if file != ROOT / "medseg" / "cli.py":
        assert not [node for node in nodes(file) if isinstance(node, ast.Name) and node.id == "print"]


@each_module
def test_no_error_text_names_a_path(file: Path) -> None:
    """The name of a file can name a patient: it goes into `path=`, and the text is a sentence without it."""
    for call in (node.exc for node in nodes(file) if isinstance(node, ast.Raise)):
        if not isinstance(call, ast.Call) or not hasattr(errors, getattr(call.func, "id", "")):
            continue
        assert len(call.args) == 1, f"line {call.lineno}: an error takes its text, and path and reason by name"
        names = {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(call.args[0])}
        assert not [
            name for name in names if name in {"path", "file", "folder", "filename"} or name.endswith("_path")
        ], f"line {call.lineno}: the text shows a path"


def test_public_names_are_sorted_and_there() -> None:
    assert list(medseg.__all__) == sorted(medseg.__all__)
    for name in medseg.__all__:
        assert getattr(medseg, name) is not None
    assert set(medseg.__all__) <= set(dir(medseg))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'unknown'"):
        _ = medseg.unknown


def test_import_is_light() -> None:
    run_python(
        "import sys, medseg\n"
        "heavy = {'torch', 'monai', 'SimpleITK', 'scipy', 'pydicom', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )


def test_files_and_reports_need_no_torch(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["torch"] = None
sys.modules["monai"] = None
import importlib, pkgutil
import numpy as np
import medseg.io, medseg.report
for room in (medseg.io, medseg.report):
    for module in pkgutil.iter_modules(room.__path__, room.__name__ + "."):
        importlib.import_module(module.name)
assert "matplotlib" not in sys.modules

from medseg.labels import make_labels
from medseg.report.metrics import compare_labels
from medseg.report.pictures import draw_overlay
labels = medseg.Volume(np.arange(24, dtype=np.uint8).reshape(1, 2, 3, 4) % 3, medseg.Grid((2, 3, 4), np.eye(4)))
table = make_labels([(1, "one"), (2, "two")])
for ending in ("nii.gz", "nrrd"):
    path = f"{sys.argv[1]}/labels.{ending}"
    medseg.save(labels, path)
    assert [score.dice for score in compare_labels(medseg.load(path), labels, table)] == [1, 1]
draw_overlay(labels, labels, table, f"{sys.argv[1]}/picture.png")
assert "matplotlib.pyplot" not in sys.modules  # it keeps every figure, and picks a window system
"""
    run_python(code, str(tmp_path))


def test_whoever_starts_a_batch_needs_no_torch() -> None:
    """Only the workers of a batch hold a network: its own start and memory are small."""
    run_python("import sys; import medseg.study.batch; assert not {'torch', 'monai', 'matplotlib'} & set(sys.modules)")


def test_loading_a_model_starts_no_compiler() -> None:
    """They come in by the back door and take two seconds: of random numbers without memory, for instance."""
    run_python(
        "import sys; from medseg.model.segmenter import Model\n"
        "Model.load('hippocampus', device='cpu', runtime='torch').runtime\n"
        "assert not {'sympy', 'torch._dynamo', 'torch._inductor'} & set(sys.modules)"
    )


def test_no_text_names_a_place_on_some_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    )  # fmt: skip
    places = [f"/{name}/".encode() for name in ("work", "root")] + [b"/tmp/" + b"bash"]
    files = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert ROOT / "setup.cfg" in files
    for file in files:
        content = file.read_bytes()
        if b"\0" not in content:
            assert not [place for place in places if place in content], file
