"""MONAI bundles, read into plans and weights of medseg.

A bundle's configuration is a program: it names classes, and text that begins with `$` is Python. Here it is data. The
parts that segmenting needs are compared with what is listed below; the rest is not looked at, and nothing is evaluated.
Of text that begins with `$`, `monai_text` says what is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from medseg.errors import ModelError
from medseg.io.text import read_json, read_yaml
from medseg.labels import make_labels
from medseg.model import monai_steps as steps
from medseg.model.imported import DESCRIBED, Imported, unsupported
from medseg.model.monai_text import Unreadable, read_text
from medseg.model.plan import Channel, Plan, Region
from medseg.model.untrusted import checksum, read_checkpoint, weights_in
from medseg.networks.monai_kinds import MonaiDynUNet, MonaiNetwork, MonaiSegResNet, MonaiSwinUNETR, MonaiUNet
from medseg.problems import first_problem

INFERENCE = ("configs/inference.json", "configs/inference.yaml", "configs/inference.yml")
WEIGHTS = "models/*.pt"
SCRIPTS = "models/*.ts"

NETWORKS: dict[str, type[MonaiNetwork]] = {
    "UNet": MonaiUNet,
    "SegResNet": MonaiSegResNet,
    "DynUNet": MonaiDynUNet,
    "SwinUNETR": MonaiSwinUNETR,
}

IGNORED = {"_desc_", "_disabled_", "device", "sw_device", "img_size"}
"""Keywords that change no result; img_size of SwinUNETR is gone since MONAI 1.5."""

MOST_VALUES, DEEPEST = 10_000, 50
"""How many values are read, and how deep they may be nested: references to each other may be made to have no end."""

SHORT, LONG = 80, 500
"""Letters of names and of descriptions that are taken over from a bundle."""


def is_bundle(folder: Path) -> bool:
    """Return whether a folder holds a MONAI bundle for inference."""
    return any((folder / name).is_file() for name in INFERENCE)


def read_bundle(folder: Path, *, orientation: str | None = None) -> Imported:
    """Return the model in a MONAI bundle.

    `orientation` is that of the training images, where the bundle itself turns images to none.
    Raises ModelError for files that are missing, damaged or unsafe, and for what medseg does not have, by its name.
    """
    file = next(folder / name for name in INFERENCE if (folder / name).is_file())
    content = (read_json if file.suffix == ".json" else read_yaml)(file, DESCRIBED, ModelError)
    described = [folder / name for name in ("configs/metadata.json", "metadata.json") if (folder / name).is_file()]
    metadata = read_json(described[0], DESCRIBED, ModelError) if described else {}
    if not isinstance(content, dict) or not isinstance(metadata, dict):
        raise ModelError("The files of the model do not fit together, or are not those of a MONAI bundle.", path=folder)
    try:
        plan = _plan(_Config(content), metadata, orientation)
    except ValidationError as error:
        raise ModelError(f"The bundle is not supported: {first_problem(error)}.", path=folder) from error
    except ModelError as error:
        raise ModelError(str(error), path=folder, reason=error.reason) from error
    weights = _weights_file(folder)
    state = read_checkpoint(weights)
    inner = [
        state[key] for key in ("model", "state_dict") if isinstance(state, dict) and isinstance(state.get(key), dict)
    ]
    facts = (f"MONAI bundle, {plan.name}, SHA-256 of the weights {checksum(weights)}", *_facts(metadata))
    return Imported(plan, {0: weights_in(inner[0] if inner else state, _renamed)}, facts)


@dataclass
class _Config:
    """A bundle's configuration, from which values are taken out one by one."""

    content: dict[str, Any]
    left: int = MOST_VALUES
    within: int = 0
    """How many references are being followed, each out of the one before."""

    def literal(self, value: Any, place: str, depth: int = 0) -> Any:
        """Return a value with references to other values replaced. Raises ModelError for whatever is no plain value."""
        self.left -= 1
        if self.left < 0 or depth > DEEPEST:
            raise ModelError("The configuration of the bundle is too large, or refers to itself.", reason="unsafe")
        if isinstance(value, dict):
            kept = {str(key): part for key, part in value.items() if key not in IGNORED}
            return {key: self.literal(part, f"{place}#{key}", depth + 1) for key, part in kept.items()}
        if isinstance(value, list):
            return [self.literal(part, f"{place}#{number}", depth + 1) for number, part in enumerate(value)]
        if _points(value):
            return self.literal(self._referred(value, place), place, depth + 1)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise unsupported("kind of value in its configuration", place)

    def component(self, value: Any, place: str) -> tuple[str, dict[str, Any]]:
        """Return the name of a class of MONAI that a value describes, and its keywords, not yet looked at."""
        value = self._followed(value, place)
        target = value.get("_target_") if isinstance(value, dict) else None
        if not isinstance(target, str):
            raise ModelError(f"The configuration of the bundle has no component at {place}.", reason="unsupported")
        home, _, name = target.rpartition(".")
        if not re.fullmatch(r"(monai(\.\w+)*)?", home) or not re.fullmatch(r"\w+", name):
            raise unsupported(f"component at {place}", target[:SHORT])
        return name, {str(key): part for key, part in value.items() if key != "_target_"}

    def transforms(self, key: str) -> list[tuple[str, dict[str, Any], str]]:
        """Return name, keywords and place of each transform of a Compose that is not disabled."""
        name, keywords = self.component(self.content.get(key), key)
        listed = self._followed(keywords.pop("transforms", None), key)
        if name != "Compose" or not isinstance(listed, list) or set(keywords) - IGNORED:
            raise unsupported(f"component at {key}", name)
        found = []
        for number, value in enumerate(listed):
            place = f"{key}#transforms#{number}"
            step, settings = self.component(value, place)
            if self.literal(settings.get("_disabled_", False), place) is not True:
                found.append((re.sub("(d|D|Dict)$", "", step), settings, f"{step} at {place}"))
        return found

    def _followed(self, value: Any, place: str) -> Any:
        """Return a value or, of a reference, what it points at in the end."""
        for _ in range(DEEPEST):
            if not _points(value):
                return value
            value = self._referred(value, place)
        raise ModelError("The configuration of the bundle refers to itself.", reason="unsafe")

    def _referred(self, text: str, place: str) -> Any:
        """Return what a text that begins with @ or $ stands for. Raises ModelError where that is no plain value."""
        if self.within >= DEEPEST:
            raise ModelError("The configuration of the bundle refers to itself.", reason="unsafe")
        self.within += 1
        try:
            return read_text(text, lambda reference: self._at(reference, place))
        except (Unreadable, LookupError, TypeError, ValueError, RecursionError) as error:
            raise ModelError(
                f"The configuration of the bundle has an expression at {place}, which medseg never evaluates. "
                "Plain values, and references to them, are read.",
                reason="unsafe",
            ) from error
        finally:
            self.within -= 1

    def _at(self, reference: str, place: str) -> Any:
        """Return the value that a reference such as "@a#b" points at. Raises LookupError where there is none."""
        self.left -= 1
        if self.left < 0:
            raise ModelError("The configuration of the bundle is too large, or refers to itself.", reason="unsafe")
        value: Any = self.content
        for part in re.split("#|::", reference[1:]):
            value = value[int(part)] if isinstance(value, list) and part.isdecimal() else dict(value or {})[part]
        return self._followed(value, place)


def _points(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("$", "@", "%"))


def _plan(config: _Config, metadata: dict[str, Any], orientation: str | None) -> Plan:
    kind, keywords = config.component(config.content.get("network_def", config.content.get("network")), "network_def")
    if kind not in NETWORKS:
        raise unsupported("network", kind)
    settings = config.literal(keywords, "network_def")
    ends = steps.Ends.model_validate({key: settings.pop(key) for key in steps.Ends.model_fields if key in settings})
    before = steps.preprocessing(_read(config, "preprocessing", steps.BEFORE), ends.in_channels)
    after = steps.postprocessing(_read(config, "postprocessing", steps.AFTER))
    name, keywords = config.component(config.content.get("inferer"), "inferer")
    if name != "SlidingWindowInferer":
        raise unsupported("inferer", name)
    kept = {key: value for key, value in keywords.items() if key not in steps.SPEED}
    window = steps.SlidingWindow.model_validate(config.literal(kept, "inferer"))
    resampling = before.resampling
    if resampling and after.nearest:
        resampling = resampling.model_copy(update={"nearest_scores": True})
    names = _channels(metadata, "outputs", "pred", ends.out_channels)
    labels = list(enumerate(names, 1)) if after.regions else list(enumerate(names))[1:]
    return Plan(
        name=_line(metadata.get("name"), SHORT) or "MONAI bundle",
        channels=tuple(
            Channel(name=channel, normalization=normalization)
            for channel, normalization in zip(
                _channels(metadata, "inputs", "image", ends.in_channels), before.normalizations, strict=True
            )
        ),
        labels=make_labels(labels),
        regions=tuple(Region(name=label, members=(value,), value=value) for value, label in labels)
        if after.regions
        else (),
        orientation=orientation or before.orientation or "as_stored",
        spacing_mm=before.spacing_mm,
        patch=window.patch,
        resampling=resampling,
        normalize_first=before.normalize_first,
        tiling=window.tiling,
        activation=after.activation,
        network=NETWORKS[kind].model_validate(settings),
    )


def _read(config: _Config, compose: str, known: dict[str, type[BaseModel] | None]) -> list[tuple[str, Any]]:
    """Return the steps of a Compose, each checked; None stands for those of which nothing is read."""
    found = []
    for name, keywords, place in config.transforms(compose):
        if name not in known:
            raise unsupported("transform", place)
        model = known[name]
        if model is None:
            continue
        # Of what Invert undoes nothing is read: that is always all of the preprocessing.
        kept = {key: value for key, value in keywords.items() if name != "Invert" or key in model.model_fields}
        try:
            found.append((name, model.model_validate(config.literal(kept, place))))
        except ValidationError as error:
            raise ModelError(
                f"The bundle has a transform that is not supported: {place}: {first_problem(error)}."
            ) from error
    return found


def _channels(metadata: dict[str, Any], side: str, key: str, count: int) -> list[str]:
    """Return the names of the channels that go in or out. Raises ModelError where the metadata have another number."""
    part: Any = metadata
    for step in ("network_data_format", side, key, "channel_def"):
        part = part.get(step) if isinstance(part, dict) else None
    if part is None:
        return [f"{'label' if side == 'outputs' else key} {number}" for number in range(count)]
    if not isinstance(part, dict) or sorted(part) != sorted(str(number) for number in range(count)):
        raise ModelError(
            f"The metadata of the bundle do not name {count} channels of {side}, as many as its network has.",
            reason="labels",
        )
    return [_line(part[str(number)], SHORT) for number in range(count)]


def _weights_file(folder: Path) -> Path:
    """Return models/model.pt, or the one .pt file in models that has another name."""
    found = sorted(folder.glob(WEIGHTS))
    usual = [file for file in found if file.name == "model.pt"]
    if not usual and len(found) != 1:
        if not found and any(folder.glob(SCRIPTS)):
            raise ModelError(
                "The bundle has its weights as TorchScript alone, models/*.ts, which is a program. medseg reads "
                "the state dict models/model.pt.",
                path=folder,
                reason="unsupported",
            )
        raise ModelError(
            f"The bundle has {len(found)} files of weights, models/*.pt, and none is models/model.pt. Leave the one to "
            "import there.",
            path=folder,
        )
    return usual[0] if usual else found[0]


def _renamed(name: str) -> str | None:
    return None if name.endswith(("num_batches_tracked", "relative_position_index")) else name


def _facts(metadata: dict[str, Any]) -> Sequence[str]:
    keys = ("version", "description", "authors", "copyright", "license", "data_source", "intended_use", "references")
    lines = {key.replace("_", " ").capitalize(): _line(metadata.get(key), LONG) for key in keys}
    return [f"{key}: {line}" for key, line in lines.items() if line]


def _line(value: Any, most: int) -> str:
    texts = value if isinstance(value, list) else [value]
    return " ".join(" ".join(text for text in texts if isinstance(text, str)).split())[:most]
