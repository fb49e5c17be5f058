"""Files that others read while they are written: whole as they were, or whole as they are now."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def write(file: Path, text: str) -> None:
    """Puts `text` in the place of what was there. Its folder is made if there is none; other hosts may share it, and
    write the same file, from processes of the same number."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(file)
