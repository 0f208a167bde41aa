"""Whether labels tell left from right: then no patch may be mirrored, as a left kidney would be taught as a right one.

What labels are called or where they lie speaks for it, and one is enough: a side that is taught wrong costs far more.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from medseg.labels import Label
from medseg.volume import Grid

SIDED = re.compile(
    r"(?<!\bc)left(?! ?over)|(?<!\bb)(?<!\bup)(?<!\bcopy)(?<!\bf)right|[左右]|왼쪽|오른쪽|좌측|우측|שמאל|ימין|"
    r"يسار|يمين|ايسر|ايمن|يسرى|يمنى|(links|rechts)\b|"
    r"\b(links|linke|rechts|rechte|gauche|droit|izquierd|derech|sinist|dexter|dextr|destr[ao]\b|esquerr|dret\b|"
    r"esquerd|direit|dereit|venstre|h[øo]jre|høyre|vanster|vanstra|hoger|hogra|vinstri|haegri|kiri\b|kanan|"
    r"лев|лив[аеиоу]|прав|αριστερ|δεξι)"
)
"""Words that say a side by themselves, in names without accents, in small letters and with spaces between words."""

LEFT = frozenset({
    "l", "lt", "lft", "lh", "li", "g", "s", "sx", "sin", "sn", "izq", "izda", "izdo", "esq", "lewy", "lewa", "lewe",
    "levy", "leva", "leve", "lavy", "lava", "lave", "lijevi", "lijeva", "levi", "sol", "stang", "stanga", "bal",
    "vasen", "gch", "gche", "os", "좌",
})  # fmt: skip
RIGHT = frozenset({
    "r", "rt", "rgt", "rh", "re", "d", "dx", "dxt", "dex", "dext", "der", "dcha", "dcho", "dir", "prawy", "prawa",
    "prawe", "pravy", "prava", "prave", "desni", "desna", "sag", "drept", "dreapta", "jobb", "oikea", "p", "dt", "dte",
    "drt", "des", "od", "우",
})  # fmt: skip
"""Words and letters that say a side where another label differs from it in such a word alone."""

ALONE = frozenset({"l", "r", "lt", "rt", "lh", "rh"})
"""Those that say a side as the first or last word of a name of several, as in TG-263, though no other has its twin."""

MOST = 0.9
"""Share of the cases in which labels lie on one side that makes it a rule: contours have errors."""


class LabelPlace(BaseModel):
    """Where a label lies in a case, in mm from the center of the image along the axes of RAS: right, front, head.

    `center_mm` is the mean of its voxels, `across_mm` where it begins and ends from left to right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    center_mm: tuple[float, float, float]
    across_mm: tuple[float, float]


def places_of(values: NDArray[np.integer], grid: Grid, members: Mapping[int, Sequence[int]]) -> dict[int, LabelPlace]:
    """Return where each label is that a label map (I, J, K) has; `members` are the values that it is made of."""
    wanted = sorted({value for some in members.values() for value in some})
    marked = np.flatnonzero(values)
    found = values.ravel()[marked]
    rows = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
    known = np.asarray(wanted)[rows] == found
    marked, rows = marked[known], rows[known]
    counts = []  # (value, index) for each axis: voxels of a value in a slice
    for axis, size in enumerate(values.shape):
        index = marked // int(np.prod(values.shape[axis + 1 :])) % size
        counts.append(np.bincount(rows * size + index, minlength=len(wanted) * size).reshape(-1, size))
    places = {}
    for label, some in members.items():
        slices = [part[[wanted.index(value) for value in some]].sum(axis=0) for part in counts]
        if slices[0].any():
            places[label] = _place(slices, grid)
    return places


def _place(slices: Sequence[NDArray[np.int_]], grid: Grid) -> LabelPlace:
    """Return the place of voxels of which so many are in each slice along each axis."""
    canonical = grid.reoriented("RAS")
    center = [np.average(np.arange(len(counts)), weights=counts) for counts in slices]
    box = [[np.flatnonzero(counts)[end] for counts in slices] for end in (0, -1)]
    index = canonical.to_index(grid.to_world(np.asarray([center, *box], dtype=np.float64)))
    middle, low, high = (index - (np.asarray(canonical.shape) - 1) / 2) * canonical.spacing_mm
    across = sorted((float(low[0]), float(high[0])))
    return LabelPlace(
        center_mm=(float(middle[0]), float(middle[1]), float(middle[2])), across_mm=(across[0], across[1])
    )


def side_by_name(labels: Sequence[Label]) -> str | None:
    """Return why names of labels speak of sides: "left" or "_L" in one, or two that differ in a side alone."""
    words = {label.name: _words(label.name) for label in labels}
    sided = next((name for name, some in words.items() if SIDED.search(" ".join(some))), None)
    if sided:
        return f"{sided} says a side"
    seen: dict[tuple[str, ...], tuple[str, bool]] = {}
    for name, some in words.items():
        for rest, is_left in _readings(some):
            twin, other = seen.setdefault(rest, (name, is_left))
            if other != is_left:
                return f"{twin} and {name} differ in the side alone"
    alone = next((name for name, some in words.items() if _ends_in_a_side(some)), None)
    return f"{alone} says a side" if alone else None


def _ends_in_a_side(words: Sequence[str]) -> bool:
    if len(words) < 2:
        return False
    return words[-1] in ALONE or (words[0] in ALONE and words[1].isalpha())  # L1 is a vertebra


def _words(name: str) -> list[str]:
    """Return the words and numbers of a name, in small letters and without accents."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    plain = "".join(one for one in unicodedata.normalize("NFKD", spaced) if not unicodedata.combining(one))
    return re.findall(r"[^\W\d_]+|\d+", unicodedata.normalize("NFKC", plain).casefold())


def _readings(words: Sequence[str]) -> Iterable[tuple[tuple[str, ...], bool]]:
    """Yield what a name is without its side, and whether that is left, for each way to read a side in it."""
    for place, word in enumerate(words):
        if word in LEFT or word in RIGHT:
            yield (*words[:place], "*", *words[place + 1 :]), word in LEFT
        elif len(word) > 1:  # "lkidney", "kidneyl"
            for side, rest in ((word[0], f"* {word[1:]}"), (word[-1], f"{word[:-1]} *")):
                if side in "lr":
                    yield (*words[:place], rest, *words[place + 1 :]), side == "l"


def side_by_place(labels: Sequence[Label], cases: Sequence[Mapping[int, LabelPlace]]) -> str | None:
    """Return why the places of labels speak of sides, or leave it open; None where labels have no side.

    Two labels lie beside each other, or are never in one image and could be the two sides. Or one does not reach the
    middle of the image: it may have a twin on the other side that nobody drew, and mirrored, that would be taught.
    """
    for place, label in enumerate(labels):
        for other in labels[:place]:
            one, two = ([case for case in cases if some.value in case] for some in (other, label))
            sides = [_beside(case[other.value], case[label.value]) for case in one if label.value in case]
            count = _same_side(sides)
            if count:
                return f"{other.name} and {label.name} lie beside each other, the same in {count} of {len(sides)} cases"
            if one and two and not sides:
                return f"{other.name} and {label.name} are never in one case, and could be the sides of one structure"
    for label in labels:
        sides = [_alone(case[label.value]) for case in cases if label.value in case]
        count = _same_side(sides)
        if count:
            return f"{label.name} lies on one side of the middle in {count} of {len(sides)} cases"
    return None


def _same_side(sides: Sequence[int]) -> int:
    """Return in how many cases the side is the more frequent one, where that is a rule; else 0."""
    count = max(sides.count(1), sides.count(-1))
    return count if sides and count >= MOST * len(sides) else 0


def _beside(one: LabelPlace, other: LabelPlace) -> int:
    """Return 1 or -1 where the second label lies to the right or left of the first more than along other axes."""
    apart = np.subtract(other.center_mm, one.center_mm)
    return int(np.sign(apart[0])) if abs(apart[0]) > max(abs(apart[1]), abs(apart[2])) else 0


def _alone(place: LabelPlace) -> int:
    """Return 1 or -1 where all of a label lies to the right or left of the middle of the image."""
    low, high = place.across_mm
    return 1 if low > 0 else -1 if high < 0 else 0
