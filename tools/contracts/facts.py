"""The facts that a Python file states about the interface of FlashInfer and its callers, read without importing it.

    facts = of_python("vllm/x.py", source, wanted)

A fact is a name, such as "function create_allreduce_fusion_workspace in flashinfer/comm/allreduce.py", and a value that
JSON can hold. Line numbers, annotations, comments and docstrings are no facts: they may move freely. Values of
expressions are numbers, strings and lists where they can be computed from the file alone, else the expression's text.
"""

from __future__ import annotations

import ast
import configparser
import fnmatch
import functools
import operator
import re
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

Facts: TypeAlias = dict[str, Any]
Function: TypeAlias = "ast.FunctionDef | ast.AsyncFunctionDef"
OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.BitAnd: operator.and_,
    ast.FloorDiv: operator.floordiv,
    ast.Invert: operator.invert,
    ast.LShift: operator.lshift,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
    ast.Sub: operator.sub,
    ast.USub: operator.neg,
}


class Files(Protocol):
    """A release's files by path, wherever they are."""

    def names(self) -> list[str]: ...

    def read(self, names: Iterable[str]) -> dict[str, str]: ...


@dataclass(frozen=True)
class Wanted:
    """What to look for: patterns as fnmatch takes them. Of names, "NAME" or "PATH:NAME"; `files` of paths, `imports` of
    modules, `pins` of projects, `entries` of keys."""

    files: tuple[str, ...]
    functions: tuple[str, ...] = ()  # their parameters
    bodies: tuple[str, ...] = ()  # functions that make a choice: what it depends on is the fact
    classes: tuple[str, ...] = ()  # bases, methods with their parameters, public attributes
    enums: tuple[str, ...] = ()  # classes of numbered names
    constants: tuple[str, ...] = ()  # what a name is given, "self.name" too
    entries: tuple[str, ...] = ()  # values of dictionaries under these keys
    calls: tuple[str, ...] = ()  # what is called, as written: "*.allreduce_fusion"
    holders: tuple[str, ...] = ()  # names of variables whose attributes count: "*workspace"
    imports: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()  # names that a module lets others import
    branches: tuple[tuple[str, str, str], ...] = ()  # (function, variable, enum): see `_branches`
    pins: tuple[str, ...] = ()  # required versions of these projects


def of_release(files: dict[str, str], wanted: Wanted) -> Facts:
    """Facts of a release's files, by name, sorted."""
    facts: Facts = {}
    for path, text in files.items():
        if path.endswith(".py"):
            facts |= of_python(path, text, wanted)
        elif path.endswith("/METADATA"):
            facts |= of_requirements(text, wanted)
        elif path.endswith("/entry_points.txt"):
            facts |= of_entry_points(text)
    return dict(sorted(facts.items()))


def of_python(path: str, text: str, wanted: Wanted) -> Facts:
    tree = ast.parse(text)
    known = _known(tree)
    facts: Facts = {}

    def found(kind: str, name: str, place: str, value: Any) -> None:
        """A second one of the same name gets a number."""
        fact, number = f"{kind} {name} in {place}", 1
        while fact in facts:
            number += 1
            fact = f"{kind} {name} ({number}) in {place}"
        facts[fact] = value

    def match(name: str, patterns: tuple[str, ...]) -> bool:
        return bool(name) and (matches(name, patterns) or matches(f"{path}:{name}", patterns))

    for owner, node in _scopes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if match(node.name, wanted.functions):
                found("function", owner + node.name, path, parameters(node))
            if match(node.name, wanted.bodies):
                found("body", owner + node.name, path, mentions(_statements(node)))
            for function, variable, enum in wanted.branches:
                if node.name == function:
                    found("branches", owner + function, path, _branches(node, variable, enum))
        elif isinstance(node, ast.ClassDef):
            if match(node.name, wanted.classes):
                found("class", node.name, path, _members(node))
            if match(node.name, wanted.enums):
                names = {name: _value(value, known) for name, value in _assigned(node.body) if name[0] != "_"}
                found("enum", node.name, path, names)
        elif isinstance(node, ast.Call) and match(_dotted(node.func), wanted.calls):
            place = f"{path}:{owner.rstrip('.') or 'module'}"
            found("call", _dotted(node.func), place, _arguments(node, _function_of(tree, node)))
        elif isinstance(node, ast.Dict):
            for key, entry in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str) and match(key.value, wanted.entries):
                    found("entry", key.value, path, ast.unparse(entry))
        for name, value in _assigned([node]):
            if match(name, wanted.constants):
                found("constant", owner + name, path, _value(value, known))
    facts |= {
        f"{kind} in {path}": sorted(names)
        for kind, names in (
            ("imports", _imports(tree, wanted.imports)),
            ("uses", _uses(tree, wanted.imports)),
            ("workspaces", _attributes(tree, lambda name: match(name, wanted.holders))),
            ("exports", {name for name in _bound(tree) if match(name, wanted.exports)}),
        )
        if names
    }
    return facts


def of_requirements(text: str, wanted: Wanted) -> Facts:
    """Requirements of the projects in `pins`, as they are pinned; those of an extra too."""
    found = re.findall(r"^Requires-Dist: *([A-Za-z0-9._-]+)(.*)$", text, re.MULTILINE)
    pins: dict[str, list[str]] = {}
    for name, rest in found:
        name = re.sub(r"[-_.]+", "-", name).lower()
        if matches(name, wanted.pins):
            pins.setdefault(f"requirement {name}", []).append(" ".join(rest.split()))
    return {name: sorted(each) for name, each in pins.items()}


def of_entry_points(text: str) -> Facts:
    """Names registered by the release itself, by group."""
    parser = configparser.ConfigParser(delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # as they are, not in lower case
    parser.read_string(text)
    return {f"entry points {group}": sorted(parser[group]) for group in parser.sections()}


def parameters(function: Function) -> list[str]:
    """In order: "name" or "name=default", with "/" and "*" where Python has them, "*args" and "**kwargs"."""
    args = function.args
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + [*args.defaults]
    words = [_parameter(arg, default) for arg, default in zip(positional, defaults, strict=True)]
    if args.posonlyargs:
        words.insert(len(args.posonlyargs), "/")
    if args.vararg:
        words.append(f"*{args.vararg.arg}")
    elif args.kwonlyargs:
        words.append("*")
    words += [_parameter(arg, default) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return words + ([f"**{args.kwarg.arg}"] if args.kwarg else [])


def _parameter(arg: ast.arg, default: ast.expr | None) -> str:
    return arg.arg if default is None else f"{arg.arg}={ast.unparse(default)}"


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the patterns, as fnmatch takes them, fits."""
    return bool(patterns) and _union(patterns).match(name) is not None


@functools.cache
def _union(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(fnmatch.translate, patterns)))


def _dotted(node: ast.expr) -> str:
    """Text of a name such as `self.workspace.backend`; empty for anything else. `ast.unparse` is ten times as slow."""
    if isinstance(node, ast.Attribute):
        holder = _dotted(node.value)
        return f"{holder}.{node.attr}" if holder else ""
    return node.id if isinstance(node, ast.Name) else ""


def _scopes(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Every node with the classes and functions it lies in: ("FlashInferAllReduce.all_reduce.", node)."""
    for node in ast.iter_child_nodes(tree):
        yield owner, node
        named = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        yield from _scopes(node, f"{owner}{node.name}." if named else owner)  # type: ignore[attr-defined]


def _function_of(tree: ast.AST, call: ast.Call) -> ast.AST:
    """The innermost function that holds the call; the module, if none does."""
    holders = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and any(each is call for each in ast.walk(node))
    ]
    return holders[-1] if holders else tree


def _assigned(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, ast.expr]]:
    """Names, and attributes as "self.name", with what they are given."""
    for node in nodes:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, (ast.Name, ast.Attribute)):
                    yield _dotted(target), node.value


def _known(tree: ast.AST) -> dict[str, float]:
    """Numbers that the file gives a name, for the expressions that use them: MiB, SIZE = 2 * MiB."""
    known: dict[str, float] = {}
    for node in ast.walk(tree):
        for name, expression in _assigned([node]):
            arithmetic = isinstance(expression, (ast.Constant, ast.BinOp, ast.UnaryOp))
            if arithmetic and _number(value := _value(expression, known)):
                known.setdefault(name, value)
    return known


def _value(node: ast.expr, known: dict[str, float]) -> Any:
    """What the expression comes to; its text where the file alone does not say."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str, type(None))):
        return node.value
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(each, known) for each in node.elts]
    if isinstance(node, ast.Set):
        return sorted((_value(each, known) for each in node.elts), key=str)
    if isinstance(node, ast.Dict) and all(node.keys):
        keys = [_value(key, known) for key in node.keys if key]
        names = [" ".join(map(str, key)) if isinstance(key, list) else str(key) for key in keys]
        return dict(zip(names, (_value(each, known) for each in node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        inner = _value(node.operand, known)
        if _number(inner):
            return OPERATORS[type(node.op)](inner)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _value(node.left, known), _value(node.right, known)
        if _number(left) and _number(right):
            return OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.Call) and _dotted(node.func) in ("frozenset", "set", "tuple") and len(node.args) == 1:
        return _value(node.args[0], known)
    return ast.unparse(node)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def mentions(statements: str) -> dict[str, Any]:
    """What a choice depends on, without repeating how it is written: the names and constants in it, and a digest of the
    whole, so that any change shows."""
    tree = ast.parse(f"def choose():\n{textwrap.indent(statements, '  ')}")
    nodes = list(ast.walk(tree))
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    named = [node for node in nodes if isinstance(node, (ast.Name, ast.Attribute)) and id(node) not in inner]
    constants = {repr(node.value) for node in nodes if isinstance(node, ast.Constant) and len(repr(node.value)) < 40}
    return {
        "constants": sorted(constants),
        "digest": f"{zlib.crc32(statements.encode()):08x}",
        "names": sorted({ast.unparse(node) for node in named if len(ast.unparse(node)) < 60}),
    }


def _statements(function: Function) -> str:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return "\n".join(ast.unparse(node) for node in body)


def _members(node: ast.ClassDef) -> dict[str, Any]:
    """Bases, each public method and dunder with its decorators and parameters, attributes set by any of its methods."""
    methods = {}
    attributes = {name for name, _ in _assigned(node.body) if not name.startswith("_")}
    for each in node.body:
        if not isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if not each.name.startswith("_") or each.name.startswith("__"):
            signs = [f"@{ast.unparse(decorator)}" for decorator in each.decorator_list]
            methods[each.name] = " ".join([*signs, f"({', '.join(parameters(each))})"])
        for target in ast.walk(each):
            if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store):
                attributes |= {target.attr} if ast.unparse(target.value) == "self" else set()
    return {
        "bases": [ast.unparse(base) for base in node.bases],
        "methods": dict(sorted(methods.items())),
        "attributes": sorted(name for name in attributes if not name.startswith("_")),
    }


def _arguments(call: ast.Call, function: ast.AST) -> dict[str, str]:
    """Of a call, by keyword; positional ones by number. Of `**name`, what the function puts into `name`: with a
    question mark what it adds to it afterwards, which it may do under a condition."""
    found = {str(number): ast.unparse(each) for number, each in enumerate(call.args)}
    for keyword in call.keywords:
        if keyword.arg is not None:
            found[keyword.arg] = ast.unparse(keyword.value)
        elif isinstance(keyword.value, ast.Name):
            found |= _collected(keyword.value.id, function) or {f"**{keyword.value.id}": "?"}
        else:
            found["**"] = ast.unparse(keyword.value)
    return dict(sorted(found.items()))


def _collected(name: str, function: ast.AST) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in ast.walk(function):
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name) and target.id == name:
                if isinstance(node.value, ast.Dict):
                    pairs = zip(node.value.keys, node.value.values, strict=True)
                    found |= {str(key.value): ast.unparse(each) for key, each in pairs if isinstance(key, ast.Constant)}
                elif isinstance(node.value, ast.Call) and _dotted(node.value.func) == "dict":
                    found |= {each.arg: ast.unparse(each.value) for each in node.value.keywords if each.arg}
            elif isinstance(target, ast.Subscript) and _dotted(target.value) == name:
                key = target.slice.value if isinstance(target.slice, ast.Constant) else ast.unparse(target.slice)
                found[f"{key!s}?"] = ast.unparse(node.value)
    return found


def _imports(tree: ast.AST, modules: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module and matches(node.module, modules):
            found |= {f"{node.module}: {each.name}" for each in node.names}
        elif isinstance(node, ast.Import):
            found |= {each.name for each in node.names if matches(each.name, modules)}
    return found


def _uses(tree: ast.AST, modules: tuple[str, ...]) -> set[str]:
    """Attributes of modules that were imported whole, under any name that they are given, and those asked for by
    `hasattr` and `getattr`. Of `module.Enum.NAME` all of it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {each.asname or each.name for each in node.names if matches(each.name, modules)}
    if not names:
        return set()
    pairs = [(name, _dotted(value)) for node in ast.walk(tree) for name, value in _assigned([node])]
    while more := {name for name, value in pairs if value in names} - names:
        names |= more
    found: set[str] = {name for holder, name in _asked(tree) if holder in names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = _dotted(node)
            found |= {text[len(name) + 1 :] for name in names if re.fullmatch(rf"{re.escape(name)}(\.\w+)+", text)}
    return {each for each in found if not any(other.startswith(f"{each}.") for other in found)}


def _attributes(tree: ast.AST, held: Callable[[str], bool]) -> set[str]:
    """Attributes read, called or asked for, of variables and attributes by the names wanted."""
    found = {name for holder, name in _asked(tree) if held(holder.rpartition(".")[2])}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, (ast.Name, ast.Attribute)):
            holder = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            found |= {node.attr} if held(holder) else set()
    return found


def _asked(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(object, name) of each `hasattr(object, "name")` and `getattr`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _dotted(node.func) in ("getattr", "hasattr") and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield ast.unparse(node.args[0]), name.value


def _bound(tree: ast.AST) -> set[str]:
    """Names that a module has after its import: also those bound in `try` and `if`, not those within functions."""
    found: set[str] = set()
    nodes = list(ast.iter_child_nodes(tree))
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {each.asname or each.name for each in node.names}
        found |= {name for name, _ in _assigned([node])}
        nodes += ast.iter_child_nodes(node)
    return found


def _branches(function: Function, variable: str, enum: str) -> dict[str, list[str]]:
    """Class -> names of the enum in the branch of the function that is taken where `variable` is of that class."""
    found = {}
    for node in ast.walk(function):
        if isinstance(node, ast.If):
            match = re.fullmatch(rf"isinstance\({variable}, (\w+)\)", ast.unparse(node.test))
            if match:
                texts = (ast.unparse(each) for part in node.body for each in ast.walk(part))
                found[match[1]] = sorted({text.split(".")[1] for text in texts if re.fullmatch(rf"{enum}\.\w+", text)})
    return dict(sorted(found.items()))
