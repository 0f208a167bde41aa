"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings

from medseg.volume import Grid, Volume

if TYPE_CHECKING:
    from medseg.train.dataset import Dataset

pytest_plugins = ("leaks",)

# A busy machine is no bug: examples may take as long as they like.
settings.register_profile("medseg", deadline=None)
settings.load_profile("medseg")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--realdata", metavar="DIR", help="folder of the real scans that tests marked `realdata` read")
    parser.addoption("--slow", action="store_true", help="also run the tests marked `slow`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Compute on the CPU, in what a test starts, too, whatever the machine has, unless the test is marked `gpu`.

    What the command line tells the processes that it starts is forgotten after each test.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONSAFEPATH", "")
        if "gpu" not in item.keywords:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setattr("torch.cuda.is_available", lambda: False)
            patch.setattr("torch.backends.mps.is_available", lambda: False)
        return (yield)


@pytest.fixture
def realdata(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--realdata")
    if folder is None:
        pytest.skip("reads real scans that are not part of the project; pass their folder with --realdata=DIR")
    return Path(folder).resolve()


@pytest.fixture(autouse=True, scope="session")
def cache_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep compiled networks out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def rotation(degrees: tuple[float, float, float]) -> np.ndarray:
    """Return the rotation about x, then y, then z."""
    result = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        turn = np.eye(3)
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        result = turn @ result
    return result


def make_grid(kind: str, shape: tuple[int, int, int] = (7, 9, 5)) -> Grid:
    """Return a grid of 0.9 x 1.1 x 2.5 mm voxels, stored as RAS, LAS, LPS or PIR, or turned away from the axes."""
    affine = np.diag([0.9, 1.1, 2.5, 1.0])
    affine[:3, 3] = (-12.25, 31.5, 7.75)
    if kind == "oblique":
        affine[:3, :3] = rotation((11, -23, 37)) @ affine[:3, :3]
        return Grid(shape, affine)
    return Grid(shape, affine).reoriented(kind)


@pytest.fixture(params=["RAS", "LAS", "LPS", "PIR", "oblique"])
def grid(request: pytest.FixtureRequest) -> Grid:
    return make_grid(request.param)


@pytest.fixture
def volume(grid: Grid) -> Volume:
    voxels = np.random.default_rng(7).integers(-1000, 1000, size=(1, *grid.shape)).astype(np.int16)
    return Volume(voxels, grid)


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A dataset that a network learns in a moment; torch is loaded for the tests that ask for it alone."""
    from datasets import make_balls

    from medseg.train.dataset import read_dataset

    return read_dataset(make_balls(tmp_path_factory.mktemp("data") / "balls", shape=(16, 18, 14)))
