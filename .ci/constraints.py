"""Print pip constraints that hold every requirement of setup.cfg at its lowest version.

torch is left out, since older versions come as CUDA builds of gigabytes alone: it is the one that `make` installs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

BOUND = re.compile(r"([\w.-]+)[>~]=([\w.]+)$", re.MULTILINE)


def constraints(path: Path) -> Iterator[str]:
    """Yield `name==version` for each requirement with a lower bound, of medseg itself and of its extras."""
    setup = ConfigParser(interpolation=None)
    setup.read(path, encoding="utf-8")
    for text in (setup["options"]["install_requires"], *setup["options.extras_require"].values()):
        for name, version in BOUND.findall(text):
            if name != "torch":
                yield f"{name}=={version}"


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in constraints(Path(__file__).parents[1] / "setup.cfg"))
