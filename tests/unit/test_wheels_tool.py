"""tools/wheels.py: what does not depend on who builds."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from tools import wheels


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_modes_do_not_depend_on_the_umask_where_the_sdist_was_made(tmp_path: Path, umask: int) -> None:
    """A wheel holds the modes of its files, and is promised byte for byte."""
    sdist = tmp_path / "a.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name, mode in (("a-1/setup.py", 0o666), ("a-1/tests/run.sh", 0o777)):
            entry = tarfile.TarInfo(name)
            entry.mode = mode & ~umask
            archive.addfile(entry, io.BytesIO())
    folder = tmp_path / "work"
    wheels.unpack(sdist, folder)
    modes = {str(each.relative_to(folder)): oct(each.stat().st_mode & 0o777) for each in folder.rglob("*")}
    assert modes == {"setup.py": "0o644", "tests": "0o755", "tests/run.sh": "0o755"}
