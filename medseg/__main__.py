"""`python -m medseg` is the command `medseg`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts the working folder first, where anything that is called like a package would be run. It stays where
    # medseg itself lies in it.
    if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
        del sys.path[0]
    from medseg.cli import main

    main()
