"""Files of released wheels, read from the package index as `make contracts` does, once a session; a test that needs one
is skipped where it cannot be had. What they import of their own project is stubbed.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

PATIENCE = {"PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "10"}  # where there is no network, say so soon


@functools.cache
def _read(project: str, version: str, path: str) -> tuple[str, str]:
    """The file's text; or why it is not to be had."""
    try:
        with _index(project).wheel(version) as wheel:
            return wheel.read([path])[path], ""
    except Exception as error:
        why = "not on the package index, or that is out of reach" if isinstance(error, KeyError) else str(error)
        return "", f"{type(error).__name__}: {why}"


@functools.cache
def _index(project: str) -> Any:
    importlib.import_module("setuptools")
    # Importing pip has setuptools' hook take its distutils out, for Python's own: no setup.py could run here any more.
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "distutils"}
    with mock.patch.dict(os.environ, PATIENCE):
        from tools.contracts.index import Index

        sys.modules.update(kept)
        return Index(project)


def text_of(project: str, version: str, path: str) -> str:
    text, why_not = _read(project, version, path)
    if why_not:
        pytest.skip(f"no wheel of {project} {version} to be had: {why_not}")
    return text


def executed(text: str, name: str) -> Any:
    """The module of this text, in `sys.modules` as `name` while it is executed."""
    module = ModuleType(name)
    with mock.patch.dict(sys.modules, {name: module}):
        exec(compile(text, name, "exec"), vars(module))
    return module


@contextlib.contextmanager
def stubbed(text: str, project: str) -> Iterator[Any]:
    """What the text imports of `project`, as mocks: the root of them."""
    root = mock.MagicMock(name=project)
    modules = {project: root}
    for node in ast.walk(ast.parse(text)):
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        for name in names:
            if name.startswith(f"{project}."):
                modules[name] = functools.reduce(getattr, name.split(".")[1:], root)
    with mock.patch.dict(sys.modules, modules):
        yield root


def define(text: str, name: str, space: dict[str, Any]) -> Any:
    """A function of the text, wherever in it that is, with `space` as its module. Its body is as it stands; decorators
    and annotations, which name what is not there, are left out."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            node.decorator_list, node.returns = [], None
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
            exec(compile(ast.Module([node], []), name, "exec"), space)
            return space[name]
    raise LookupError(f"no function {name}")
