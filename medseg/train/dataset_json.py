"""dataset.json: what the channels of a dataset's images and the values of its label files mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg.errors import DatasetError, InputError
from medseg.io.label_table import read_table
from medseg.io.text import read_json
from medseg.labels import Label, make_labels
from medseg.model.plan import Plan, Region

MOST_DIGITS = 9
"""Of the value of a label: medseg stores values in 32 bits."""

IGNORE = "ignore"
"""What a dataset calls the value of voxels that nobody looked at, as in nnU-Net."""


@dataclass(frozen=True)
class Meaning:
    """What values in label files mean: structures, or regions that overlap, and the value to be ignored.

    With `regions` each label of the table is one of them, under the value that it is painted with.
    """

    labels: tuple[Label, ...]
    regions: tuple[Region, ...] = ()
    ignore: int | None = None

    @property
    def values(self) -> tuple[int, ...]:
        """The values that mark something, ascending: those of the labels, or all that are in some region."""
        return values_of(self.labels, self.regions)

    @property
    def members(self) -> dict[int, tuple[int, ...]]:
        """The values in label files that make up each label of the table."""
        return members_of(self.labels, self.regions)


@dataclass(frozen=True)
class Description:
    """What dataset.json says: a name, the channels, what labels mean, and all fields as they stand there."""

    name: str
    channels: tuple[str, ...]
    meaning: Meaning
    fields: Mapping[str, Any] = field(repr=False)


def values_of(labels: tuple[Label, ...], regions: tuple[Region, ...]) -> tuple[int, ...]:
    """Return the values that mark something in label files, ascending."""
    return tuple(sorted({value for values in members_of(labels, regions).values() for value in values}))


def members_of(labels: tuple[Label, ...], regions: tuple[Region, ...]) -> dict[int, tuple[int, ...]]:
    """Return for each label of a table, by its value, the values in label files that it is made of."""
    if regions:
        return {region.value: region.members for region in regions}
    return {label.value: (label.value,) for label in labels}


def read_description(root: Path) -> Description:
    """Return what the dataset.json of a folder says.

    Raises DatasetError that names the field that is missing or makes no sense.
    """
    content = _read_json(root / "dataset.json")
    name = str(content.get("name", root.resolve().name))
    channels = _names(content.get("channel_names", content.get("modality")), root)
    return Description(name, channels, _meaning(content, root / "dataset.json"), content)


def read_meaning(path: Path) -> Meaning:
    """Return what a file says of the values in label files: a dataset.json, a plan.json or a label table.

    Raises DatasetError or ModelError for what is missing or makes no sense in it, InputError for anything else.
    """
    content = read_json(path, "The file that names the labels", InputError)
    if isinstance(content, dict) and "network" in content:
        plan = Plan.load(path)
        return Meaning(plan.labels, plan.regions)
    if isinstance(content, dict) and isinstance(content.get("labels"), dict):
        return _meaning(content, path)
    return Meaning(read_table(path))


def _read_json(path: Path) -> dict[str, Any]:
    content = read_json(path, "The file dataset.json of the dataset", DatasetError)
    if not isinstance(content, dict):
        raise DatasetError("The file dataset.json must hold one object with channel_names and labels.", path=path)
    return content


def _names(channels: object, root: Path) -> tuple[str, ...]:
    if not isinstance(channels, Mapping) or sorted(channels) != sorted(str(place) for place in range(len(channels))):
        raise DatasetError(
            'The field "channel_names" (or "modality") must name every channel, as in {"0": "CT"}.',
            path=root / "dataset.json",
        )
    return tuple(str(channels[str(place)]) for place in range(len(channels)))


def _meaning(content: Mapping[str, Any], path: Path) -> Meaning:
    given = _numbers(content.get("labels"), path)
    ignored = given.pop(IGNORE, None)
    used = {value for values in given.values() for value in values}
    if ignored is not None and (len(ignored) != 1 or ignored[0] == 0 or ignored[0] in used):
        raise DatasetError(
            'The label "ignore" must have one value of its own above 0; by custom it is the highest.',
            path=path,
            reason="labels",
        )
    ignore = None if ignored is None else ignored[0]
    named = {name: values for name, values in given.items() if values != (0,)}
    if any(len(values) > 1 for values in named.values()):
        regions = _regions(named, content.get("regions_class_order"), path)
        return Meaning(make_labels((region.value, region.name) for region in regions), regions, ignore)
    numbers = [values[0] for values in named.values()]
    if not numbers or len(set(numbers)) < len(numbers) or len(named) + 1 < len(given):
        raise DatasetError(
            'The field "labels" must give each structure a value of its own above 0, as in {"liver": 1}.',
            path=path,
            reason="labels",
        )
    return Meaning(make_labels((values[0], name) for name, values in named.items()), (), ignore)


def _numbers(labels: object, path: Path) -> dict[str, tuple[int, ...]]:
    """Return the values of each name; nnU-Net writes {"liver": 1} or {"all": [1, 2]}, the decathlon {"1": "liver"}.

    Which it is, the type of what stands behind a key says: a name may be a number, as that of a tooth.
    """
    rows = list(labels.items()) if isinstance(labels, Mapping) else []
    value_first = all(key.isdecimal() for key, text in rows if isinstance(text, str))
    numbers: dict[str, tuple[int, ...]] = {}
    for key, content in rows:
        name, given = (content, key) if value_first and isinstance(content, str) else (key, content)
        values = given if isinstance(given, list) else [given]
        if (
            not values
            or not all(str(one).isdecimal() and len(str(one)) <= MOST_DIGITS for one in values)
            or name in numbers
        ):
            raise DatasetError(
                f"The label {name!r} needs one whole number from 0, or a list of them for a region, and a name of its "
                "own.",
                path=path,
                reason="labels",
            )
        numbers[name] = tuple(sorted({int(one) for one in values}))
    return numbers


def _regions(named: Mapping[str, tuple[int, ...]], order: object, path: Path) -> tuple[Region, ...]:
    painted = [int(one) for one in order if str(one).isdecimal()] if isinstance(order, list) else []
    right = len(painted) == len(set(painted)) == len(named)
    if not right or not all(
        value in values and 0 not in values for value, values in zip(painted, named.values(), strict=True)
    ):
        raise DatasetError(
            "Where labels are lists of values, regions_class_order must give for each label in turn one value to paint "
            "it with: one of its own, above 0, and another one for each.",
            path=path,
            reason="labels",
        )
    pairs = zip(named.items(), painted, strict=True)
    return tuple(Region(name=name, members=values, value=value) for (name, values), value in pairs)
