"""Twins with one rule broken each, for the tests of the twin on a GPU: what must then fail, and with which words.

    python tests/common/wrong_twins.py [--archs sm_90a]      builds them into build/dsl/wrong; `make dsl` does

Each is built from a copy of the sources with one line changed, and listed as if it were of the sources that are here,
or the launcher would not take it. Nothing but a test that names its folder ever does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES, FOLDER = ROOT / "mnnvl_ar" / "dsl", ROOT / "build" / "dsl" / "wrong"


Edit = tuple[str, str, str]  # in this file, this text is that


@dataclass(frozen=True)
class Wrong:
    """On so many ranks, with the twin on this side, the check of that name in common.cases.twin then fails and says one
    of these words; it passes if there are none."""

    edits: tuple[Edit, ...]
    check: str
    says: str
    ranks: int = 2
    side: str = "both"
    arguments: tuple[Any, ...] = ()


# No rule is broken: CTAs sleep between reading the state and counting themselves in, so that two calls do overlap.
SLOW = ("one_shot.py", "ok = count_in(", "ptx.sleep_ns(Uint32(200000))\n                    ok = count_in(")

WRONG = {
    "clear": Wrong((("one_shot.py", "while i < dirty:", "while i < dirty * Uint32(0):"),), "check_rest", "cleared by"),
    "sanitize": Wrong(
        (("one_shot.py", "mine[column] = sanitize(ptx.load(x + at))", "mine[column] = ptx.load(x + at)"),),
        "check_sentinels",
        "differs in",
    ),
    "every_word": Wrong((("one_shot.py", "for word in v[1:]:", "for word in v[1:1]:"),), "check_torn", "missing word"),
    "rank_order": Wrong(
        (("one_shot.py", "for i in range(len(v) + 1):", "for i in reversed(range(len(v) + 1)):"),),
        "check_some_kinds",
        "differs in",
        ranks=4,
    ),
    "epoch_unsigned": Wrong(
        (("one_shot.py", "slot = epoch % Uint32(c.SLOTS)", "slot = (epoch & Uint32(0x7FFFFFFF)) % Uint32(c.SLOTS)"),),
        "check_epochs",
        "differs in",
        side="one",
        arguments=(2**31 - 2**31 % 3 - 3, 12),
    ),
    "signature": Wrong(
        (
            (
                "ring.py",
                "differs = is_there & ((seen[1] != signed[1]) | (seen[3] != signed[3]))",
                "differs = is_there & (seen[1] != seen[1])",
            ),
        ),
        "check_tag",
        "AssertionError",
    ),
    "quiescence": Wrong(
        (("ring.py", "return progress[0] - state[1] < Uint32(0x80000000)", "return progress[0] == progress[0]"),),
        "check_overlapping",
        "differs in",
        ranks=4,
    ),
    "two_at_once": Wrong(
        (
            SLOW,
            ("ring.py", "alone = (before == count * mine) & (count < ctas)", "alone = count == count"),
            ("ring.py", "alone = (was[0] == epoch) & (was[1] == launched)", "alone = was[0] == was[0]"),
        ),
        "check_two_at_once",
        "differs in|waited|did not end within",
        arguments=(True,),
    ),
    "none, but slow": Wrong((SLOW,), "check_two_at_once", "", arguments=(True,)),
}


def folder_of(name: str) -> Path:
    return FOLDER / name.replace(", ", "-").replace(" ", "-")


def build(name: str, archs: str) -> None:
    wrong = WRONG[name]
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "mnnvl_ar" / "dsl"
        shutil.copytree(SOURCES, copy)
        for file, old, new in wrong.edits:
            text = (copy / file).read_text()
            assert text.count(old) == 1, (name, old)
            (copy / file).write_text(text.replace(old, new))
        out = folder_of(name)
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, copy / "build.py", "--ranks", str(wrong.ranks), "--archs", archs, "--out", out]
        subprocess.run(command, check=True, cwd=scratch, env={**os.environ, "PYTHONPATH": scratch})
    listed = json.loads((out / "kernels.json").read_text())
    for entry in listed.values():
        entry["sources"] = digest_of_the_right_ones()
    (out / "kernels.json").write_text(json.dumps(listed))


def digest_of_the_right_ones() -> str:
    if importlib.util.find_spec("torch") is None:  # which the package itself imports
        package = ModuleType("mnnvl_ar")
        package.__path__ = [str(ROOT / "mnnvl_ar")]
        sys.modules["mnnvl_ar"] = package
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from mnnvl_ar.dsl import cubins

    return cubins.digest("")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default="sm_90a,sm_100a")
    options = parser.parse_args()
    for name in WRONG:
        build(name, options.archs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
