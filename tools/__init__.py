"""Programs around the library that are no tests: the GPU campaign and its record, fault runs, replays, sanitizer runs.

Run them from the root of the repository, by name: `python -m tools.faults.run --help`. Tests and bench import them by
name too. They share input rows and calls with the tests: `common` is tests/common.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
