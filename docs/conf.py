"""The site: `make site` builds it, strictly, into build/site (CONTRIBUTING.md).

Sphinx reads from the root of the repository, not from docs/, so that links between documents are the same files here
and on GitHub. Only the standard library is imported: tests/unit/test_site.py looks at these settings without Sphinx.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # mnnvl_ar, built; docstrings

project = "mnnvl_ar"
author = "the authors of mnnvl_ar"
html_title = "mnnvl_ar"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_copyright = False
smartquotes = False  # "auto" is to be typed as it stands
maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
root_doc = "docs/index"
source_suffix = {".md": "markdown"}
extensions = ["myst_parser", "sphinx.ext.autodoc"]

# The documents, by glob from the root; nothing else is looked at.
include_patterns = ["*.md", "docs/**.md", "bench/**.md", "model/**.md"]
exclude_patterns = [".*", "build", "dist", "**/__pycache__", "*.egg-info"]

# Folders whose README.md is their index: it links to each page, and here they are its subpages as well.
INDEXED = ("docs/decisions", "docs/log")

myst_heading_anchors = 4  # headings have the anchors that GitHub gives them
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"

# What signatures and base classes name, and this site does not describe: PyTorch's, and the standard library's. Their
# own sites do; linking there would need a network at each build.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|dist)\..*"),
    ("py:class", r"(Any|Callable|IntEnum|Protocol|RuntimeError|Sequence|enum\.IntEnum)"),
    ("py:class", r"(collections\.abc|typing)\..*"),
    ("py:class", r"mnnvl_ar\.memory\.group\.Comm"),  # of mpi4py and FlashInfer, as the docstring of Workspace says
]


def setup(app: Any) -> None:
    import docstrings

    known = docstrings.public_names(HERE.parent / "tests/unit/public.txt")
    app.connect("source-read", _add_subpages)
    app.connect("autodoc-process-docstring", docstrings.converter(known))
    app.connect("env-check-consistency", lambda app, env: _name_what_is_missing(env, known))
    app.connect("build-finished", _lead_to_index)


def _add_subpages(app: Any, page: str, source: list[str]) -> None:
    """An index's subpages, which on GitHub its links are enough for."""
    folder, _, name = page.rpartition("/")
    if folder in INDEXED and name == "README":
        source[0] += "\n```{toctree}\n:hidden:\n:glob:\n\n[0-9]*\n```\n"


def _name_what_is_missing(env: Any, known: set[str]) -> None:
    """A public name without a place in the API pages is a warning, and warnings are errors."""
    from sphinx.util import logging

    for name in sorted(known - set(env.get_domain("py").objects)):
        logging.getLogger(__name__).warning("%s is public, and no API page describes it", name)


def _lead_to_index(app: Any, error: Exception | None) -> None:
    """The pages lie in folders as their sources do, so the site's own address has none."""
    to = f"{root_doc}.html"
    if error is None:
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={to}"><a href="{to}">{project}</a>\n'
        (Path(app.outdir) / "index.html").write_text(page)
