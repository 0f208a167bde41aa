"""Which series of a study become the channels of a model, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import numpy as np

from medseg.errors import GeometryError, InputError, MedsegError
from medseg.io.dicom_series import Series
from medseg.io.dicom_slice import VARIANTS
from medseg.study.patterns import matches
from medseg.study.pipeline import Range, Rule, Wanted
from medseg.study.shown import shown_modality
from medseg.volume import Grid

PLANES = ("sagittal", "coronal", "axial")
"""The plane across each axis of world space."""

SAME_LENGTH_MM = 0.01
"""Spacings that differ by no more are no reason to prefer one: 0.625 and 0.6249 mm."""

ROUNDING_MM = 1e-3
"""How far a length may lie beyond the end of a range that a rule states."""

Preferred = Callable[[Series], float]


@dataclass(frozen=True)
class Choice:
    """What was chosen for one channel: the series, or None, and a sentence on every series of the study, in order."""

    channel: str
    series: Series | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """The choices for all channels, and the refusal where they do not make an input."""

    choices: tuple[Choice, ...]
    refusal: MedsegError | None = None

    @property
    def series(self) -> tuple[Series, ...]:
        """Return the chosen series in the order of the channels."""
        return tuple(choice.series for choice in self.choices if choice.series is not None)


def choose(
    series: Sequence[Series], rules: Sequence[Rule], *, register: bool = False, first: Container[Series] | None = None
) -> Selection:
    """Return one series for every rule, each with the reasons; a series serves one channel.

    `first` are those that the first rule may take, by default all. The refusal has the reason `no_series`, that of the
    only series that would fit had it not been refused, or `frame_of_reference` where the headers do not say that the
    channels lie in one space and none will be registered.
    """
    choices: list[Choice] = []
    for rule in rules:
        taken = [choice.series for choice in choices]
        allowed = first if first is not None and not taken else series
        choice, refusal = _choose(series, rule, taken, allowed)
        choices.append(choice)
        if refusal is not None:
            return Selection(tuple(choices), refusal)
    selection = Selection(tuple(choices))
    return selection if register else Selection(selection.choices, _frame_problem(selection.series))


def _choose(
    series: Sequence[Series], rule: Rule, taken: Sequence[Series | None], allowed: Container[Series]
) -> tuple[Choice, MedsegError | None]:
    reasons, fitting, would_fit = [], [], []
    for one in series:
        misfit = "serves another channel" if one in taken else _misfit(one, rule)
        if misfit is None and one not in allowed:
            misfit = "no contours refer to it"
        if misfit is None and one.verdict == "refused" and one.refusal is not None:
            would_fit.append(one.refusal)
            misfit = f"refused: {one.refusal.reason}"
        elif misfit is None:
            misfit = _misplaced(one, rule)
        if misfit is None:
            fitting.append(one)
        reasons.append(f"not taken: {misfit}" if misfit else "")
    if not fitting:
        return Choice(rule.name, None, tuple(reasons)), _no_series(rule, reasons, would_fit)
    ranks = _ranks(fitting, rule)
    best = min(range(len(fitting)), key=lambda place: (*ranks[place], _number(fitting[place])))
    for one, rank in zip(fitting, ranks, strict=True):
        why = "taken" if one is fitting[best] else f"not taken: {_why_not(ranks[best], rank, rule)}"
        reasons[series.index(one)] = why
    return Choice(rule.name, fitting[best], tuple(reasons)), None


def _misfit(series: Series, rule: Rule) -> str | None:
    """Return which condition on the header a series does not meet."""
    checks = (
        (series.modality in rule.modality, f"its modality is {shown_modality(series.modality) or 'blank'}"),
        (rule.description is None or _matches(rule.description, series), "its description does not match"),
        (
            rule.not_description is None or not _matches(rule.not_description, series),
            "its description matches not_description",
        ),
        (rule.contrast in {None, series.contrast}, f"it has {'' if series.contrast else 'no '}contrast agent"),
        (_within(series.n_slices, rule.slices), f"it has {series.n_slices} slices"),
    )
    return next((text for passed, text in checks if not passed), None)


def _misplaced(series: Series, rule: Rule) -> str | None:
    """Return which condition on its place a series does not meet."""
    grid = _grid(series)
    in_plane, step = max(grid.spacing_mm[:2]), grid.spacing_mm[2]
    plane = plane_of(grid)
    checks = (
        (series.verdict == "accepted" or rule.repaired, "its steps are irregular and repaired is false"),
        (not rule.orientation or plane in rule.orientation, f"its slices are {plane}"),
        (_within(in_plane, rule.in_plane_mm), f"its pixels have {in_plane:.2f} mm"),
        (_within(step, rule.slice_mm), f"its slices lie {step:.2f} mm apart"),
    )
    return next((text for passed, text in checks if not passed), None)


def plane_of(grid: Grid) -> str:
    """Return the plane that the slices of a grid are closest to: axial, coronal or sagittal."""
    normal = np.cross(grid.affine[:3, 0], grid.affine[:3, 1])
    return PLANES[int(np.abs(normal).argmax())]


def _ranks(fitting: Sequence[Series], rule: Rule) -> list[tuple[int, ...]]:
    """Return for each series how well it meets each preference, 0 best; lengths that nearly agree rank the same."""
    columns = [_levels([_key(preference)(one) for one in fitting]) for preference in rule.prefer]
    return [tuple(column[place] for column in columns) for place in range(len(fitting))]


def _levels(values: Sequence[float]) -> list[int]:
    ends: list[float] = []
    for value in sorted(values):
        if not ends or value > ends[-1]:
            ends.append(value + SAME_LENGTH_MM)
    return [sum(value > end for end in ends) for value in values]


def _key(preference: str | Wanted) -> Preferred:
    """Return what sorts the preferred series first."""
    if isinstance(preference, Wanted):
        pattern = preference.description
        return lambda one: not _matches(pattern, one)
    keys: dict[str, Preferred] = {
        "thin_slices": lambda one: _grid(one).spacing_mm[2],
        "fine_pixels": lambda one: max(_grid(one).spacing_mm[:2]),
        "more_slices": lambda one: -one.n_slices,
        "contrast": lambda one: not one.contrast,
        "no_contrast": lambda one: one.contrast,
        "original": lambda one: not _image_type(one).startswith("ORIGINAL"),
        "accepted": lambda one: one.verdict != "accepted",
    }
    return keys[preference]


def _why_not(winner: Sequence[int], other: Sequence[int], rule: Rule) -> str:
    for preference, best, own in zip(rule.prefer, winner, other, strict=True):
        if best < own:
            name = preference if isinstance(preference, str) else "a description"
            return f"another fits better by {name.replace('_', ' ')}"
    return "another fits as well and has the lower series number, or comes first"


def _no_series(rule: Rule, reasons: Sequence[str], would_fit: Sequence[MedsegError]) -> MedsegError:
    if would_fit:
        return would_fit[0]
    counts = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
    found = "; ".join(f"{count} {reason}" for reason, count in counts.items()) or "the study has no series"
    return InputError(f"No series fits the channel {rule.name}: {found}.", reason="no_series")


def _frame_problem(series: Sequence[Series]) -> MedsegError | None:
    if all(share_space(series[0], other) for other in series[1:]):
        return None
    return GeometryError(
        "The series chosen for the channels lie in different frames of reference, or do not say that they share one. "
        'Choose others, or let the pipeline register them with "registration: rigid".',
        reason="frame_of_reference",
    )


def share_space(first: Series, other: Series) -> bool:
    """Return whether the headers say that two series lie in one space: by frame of reference, else by equal grids."""
    if first.frame_of_reference_uid and other.frame_of_reference_uid:
        return first.frame_of_reference_uid == other.frame_of_reference_uid
    return _grid(first).matches(_grid(other))


def _matches(pattern: str, series: Series) -> bool:
    return matches(pattern, series.description)


def _within(value: float, ends: Range | None) -> bool:
    return ends is None or ends[0] - ROUNDING_MM <= value <= ends[1] + ROUNDING_MM


def _grid(series: Series) -> Grid:
    grid = series.grid or series.regular_grid
    if grid is None:
        raise series.refusal or InputError("The series has no place.")
    return grid


def _image_type(series: Series) -> str:
    return series.slices[0].variants[VARIANTS.index("ImageType")]


def _number(series: Series) -> float:
    return float(series.number) if series.number.isdecimal() else float("inf")
