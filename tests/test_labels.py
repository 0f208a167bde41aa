"""The label table."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from pydicom.sr.codedict import codes

from medseg.labels import PALETTE, Label, SnomedCode, complete, make_labels
from medseg.snomed import CODES


def test_a_table_is_sorted_by_value_and_leaves_background_out() -> None:
    table = make_labels([(2, "posterior"), (0, "background"), (1, "anterior")])
    assert [(label.value, label.name, label.color) for label in table] == [
        (1, "anterior", PALETTE[0]),
        (2, "posterior", PALETTE[1]),
    ]
    assert make_labels([]) == ()


def test_colors_differ_until_they_repeat() -> None:
    assert len(set(PALETTE)) == len(PALETTE) == 20
    table = make_labels((value, f"label {value}") for value in range(1, 22))
    assert len({label.color for label in table[:20]}) == 20
    assert table[20].color == table[0].color


def test_a_label_survives_json() -> None:
    label = Label(value=3, name="left kidney", color="#00ff7f", snomed=SnomedCode(value="64033007", meaning="Kidney"))
    assert Label.model_validate_json(label.model_dump_json()) == label


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"value": 0}, "greater than or equal to 1"),
        ({"value": 1.5}, "valid integer"),
        ({"color": "red"}, "match pattern"),
        ({"color": "#FF0000"}, "match pattern"),
        ({"colour": "#ff0000"}, "Extra inputs are not permitted"),
        ({"snomed": {"value": "64033007"}}, "Field required"),
    ],
)
def test_a_label_that_makes_no_sense_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Label.model_validate({"value": 1, "name": "kidney", "color": "#ff0000"} | change)


def test_a_label_cannot_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_labels([(1, "kidney")])[0].name = "liver"  # type: ignore[misc]


def test_values_that_the_table_lacks_are_numbered() -> None:
    table = make_labels([(2, "two"), (4, "four")])
    assert [(label.value, label.name) for label in complete(table, [0, 3, 4, 70000])] == [
        (2, "two"),
        (3, "label 3"),
        (4, "four"),
        (70000, "label 70000"),
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("liver", ("10200004", "Liver", None)),
        ("kidney_left", ("64033007", "Kidney", "left")),
        ("Right Kidney", ("64033007", "Kidney", "right")),
        ("RightParotid", ("45289007", "Parotid gland", "right")),
        ("vertebrae_L1", ("66794005", "L1 vertebra", None)),
        ("rib_right_12", ("113197003", "Rib", "right")),
        # These have the side in the code itself.
        ("heart_atrium_left", ("82471001", "Left atrium", None)),
        ("lung_middle_lobe_right", ("72481006", "Middle lobe of right lung", None)),
    ],
)
def test_known_names_have_their_code(name: str, expected: tuple[str, str, str | None]) -> None:
    (label,) = make_labels([(1, name)])
    value, meaning, laterality = expected
    assert label.snomed == SnomedCode(value=value, meaning=meaning, laterality=laterality)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["left", "liver_tumor", "lung_vessels", "kidneys left right", "label 3", "", "Leber"])
def test_other_names_have_none(name: str) -> None:
    assert make_labels([(1, name)])[0].snomed is None


def test_all_codes_stand_in_the_dictionary_of_dicom() -> None:
    known: dict[str, set[str]] = {}
    for code in codes.SCT.concepts.values():
        known.setdefault(code.value, set()).update(word[:4] for word in code.meaning.lower().split())
    for value, meaning in CODES.values():
        words = {word[:4] for word in meaning.lower().split()} - {"left", "righ", "of", "lens"}
        assert words & known[value], (value, meaning, known[value])
