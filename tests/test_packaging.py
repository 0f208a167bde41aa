"""What the package says of itself: the licenses of its code and of the weights that it ships."""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent


def metadata() -> dict[str, str]:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return dict(config["metadata"])


def test_both_licenses_are_named_and_their_texts_go_along():
    assert metadata()["license_expression"] == "Apache-2.0 AND CC-BY-SA-4.0"
    texts = [(ROOT / file).read_text(encoding="utf-8") for file in metadata()["license_files"].split()]
    assert [text.split("\n", 1)[0].strip() for text in texts] == [
        "Apache License",
        "Attribution-ShareAlike 4.0 International",
    ]
    assert "Section 8" in texts[1]


def test_each_model_that_ships_has_its_license_beside_it():
    for model in (ROOT / "medseg/models").iterdir():
        assert f"medseg/models/{model.name}/LICENSE" in metadata()["license_files"].split()
        assert "CC BY-SA 4.0" in (model / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_each_folder_of_code_is_in_the_package():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "medseg").rglob("__init__.py")}
    assert found <= set(config["options"]["packages"].split())
