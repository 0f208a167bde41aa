"""Pipelines: YAML files that say which series a model segments, how the labels are tidied up, and what is written."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from medseg.errors import UsageError
from medseg.io.files import reading
from medseg.io.text import read_yaml
from medseg.model.crf import CRF
from medseg.problems import listed_problems

SHIPPED = (Path(__file__).parents[1] / "pipelines", Path(__file__).parents[2] / "pipelines")
"""Where the pipelines are that ship: in an installed package, and beside the package in a source tree."""


def _compiles(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError("this is no regular expression") from error
    return text


def _ordered(ends: tuple[float, float]) -> tuple[float, float]:
    if not ends[0] <= ends[1]:
        raise ValueError("a range is its lower end and its upper end")
    return ends


Pattern = Annotated[str, AfterValidator(_compiles)]
Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
Content = TypeVar("Content", bound=BaseModel)
Preference = Literal["thin_slices", "fine_pixels", "more_slices", "contrast", "no_contrast", "original", "accepted"]


class Strict(BaseModel):
    """A frozen record that takes no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Wanted(Strict):
    """A preference for series whose description matches a regular expression."""

    description: Pattern


class Rule(Strict):
    """Which series becomes a channel. What is left away does not count; of those that fit, `prefer` decides in order.

    Patterns are regular expressions that may match anywhere, in upper or lower case. Ranges are the lower and the upper
    end, both allowed. `in_plane_mm` is the larger side of a pixel, `slice_mm` the distance between slices,
    `orientation` the plane that slices are closest to. `repaired` allows series with irregular steps.
    """

    name: str
    modality: tuple[str, ...] = Field(min_length=1)
    description: Pattern | None = None
    not_description: Pattern | None = None
    orientation: tuple[Literal["axial", "coronal", "sagittal"], ...] = ()
    in_plane_mm: Range | None = None
    slice_mm: Range | None = None
    slices: Range | None = None
    contrast: bool | None = None
    repaired: bool = True
    prefer: tuple[Preference | Wanted, ...] = ()


class Cleanup(Strict):
    """What is done to the labels named, or to all: largest piece, holes, smallest volume, in this order."""

    labels: tuple[str, ...] = ()
    keep_largest: bool = False
    fill_holes: bool = False
    minimal_ml: float | None = Field(default=None, gt=0)


class Localizer(Strict):
    """A first model: the box around what it finds, and `margin_mm` beyond, is all that the pipeline's model sees.

    `labels` are the labels of it that count, `channels` the pipeline's channels that it is given; by default all.
    """

    model: str
    labels: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    margin_mm: float = Field(default=20.0, ge=0)


class Pipeline(Strict):
    """Everything that is decided before a batch starts. `roi` is two opposite corners in mm of RAS+ world space.

    `registration` "rigid" brings channels in another frame of reference than the first into its space; without, they
    are refused. `crf` is that of `Model.segment`: settings of a CRF, true or false; by default as the model says.
    `anyway` takes series of another modality than the model's channels.
    """

    format: Literal[1]
    name: str
    model: str
    channels: tuple[Rule, ...] = Field(min_length=1)
    roi: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None
    localizer: Localizer | None = None
    registration: Literal["rigid"] | None = None
    mirror: bool = False
    crf: CRF | bool | None = None
    anyway: bool = False
    cleanup: tuple[Cleanup, ...] = ()
    outputs: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_box(self) -> Pipeline:
        if self.localizer is None:
            return self
        if self.roi is not None:
            raise ValueError("roi and localizer both say where to look; leave one away")
        if unknown := set(self.localizer.channels) - {rule.name for rule in self.channels}:
            raise ValueError(f"the localizer asks for channels that are not there: {', '.join(sorted(unknown))}")
        return self

    @property
    def digest(self) -> str:
        """Return a SHA-256 of all decisions; the content of models has its own."""
        left_out: dict[str, Any] = {"model": True, "localizer": {"model"} if self.localizer else True}
        # What was done before there were such words stays done.
        left_out |= {"anyway": True} if not self.anyway else {}
        left_out |= {"crf": True} if self.crf is None else {}
        return hashlib.sha256(self.model_dump_json(exclude=left_out).encode()).hexdigest()

    def with_models(self, placed: Callable[[str], str]) -> Pipeline:
        """Return the pipeline with each of its models called what `placed` makes of its name."""
        localizer = self.localizer
        if localizer is not None:
            localizer = localizer.model_copy(update={"model": placed(localizer.model)})
        return self.model_copy(update={"model": placed(self.model), "localizer": localizer})


def read_record(path: Path, kind: type[Content], what: str) -> Content:
    """Return what a YAML file holds as a record of this kind; `what` is what to call it in errors.

    Raises UsageError where it is missing, is not YAML, or says what no such record can.
    """
    content = read_yaml(path, what, UsageError)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{what} has {listed_problems(error)}.", path=path) from error


def load_pipeline(name: str | PathLike[str]) -> Pipeline:
    """Return the pipeline in a YAML file, or the shipped one of that name; models beside the file are found from there.

    Raises UsageError where there is none, or the file says what no pipeline can, and UnreadableFile where it cannot be
    read.
    """
    path = _find(name)
    pipeline = read_record(path, Pipeline, "The pipeline")
    return pipeline.with_models(lambda name: str(path.parent / name) if (path.parent / name).is_dir() else name)


def _find(name: str | PathLike[str]) -> Path:
    path = Path(name)
    with reading(path):
        if path.is_file():
            return path
    shipped = [file for folder in SHIPPED for file in sorted(folder.glob("*.yaml"))]
    found = next((file for file in shipped if file.stem == str(name)), None)
    if found is None:
        names = ", ".join(dict.fromkeys(file.stem for file in shipped))
        raise UsageError(f"No pipeline is there: neither a YAML file nor one that medseg ships ({names}).", path=path)
    return found
