"""Facts of FlashInfer, vLLM and SGLang: how they are read, how a move is named, and that the committed ones say what
the front relies on. Nothing here needs the network."""

import contextlib
import json
import re
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tools import ROOT
from tools.contracts import facts, record
from tools.contracts.__main__ import release, renew
from tools.contracts.facts import Wanted
from tools.contracts.projects import PROJECTS, Project
from tools.contracts.wheel import CHUNK, Wheel, joined

COMMITTED = {name: record.load(name) for name in PROJECTS}

# ---- reading: for each kind of fact a source, the fact, and a change of the source that has to be reported

WANTED = Wanted(
    files=("*",),
    functions=("create",),
    bodies=("choose",),
    classes=("Workspace",),
    enums=("Pattern",),
    constants=("SIZES*", "m.py:LIMIT", "self.group"),
    entries=("USE_IT",),
    calls=("*.fuse", "*create_workspace"),
    holders=("*workspace",),
    imports=("flashinfer.comm", "flashinfer.comm.*"),
    exports=("m.py:fuse",),
    branches=(("dispatch", "workspace", "Pattern"),),
    pins=("torch", "flashinfer-*"),
)
KINDS: list[tuple[str, str, str, Any, str, str]] = [
    (
        "m.py",
        "def create(a, /, b: int = 2 * 3, *, key=None, **rest): ...",
        "function create in m.py",
        ["a", "/", "b=2 * 3", "*", "key=None", "**rest"],
        "key=None",
        "key=0",
    ),
    ("m.py", "class A:\n def create(self, *many): ...", "function A.create in m.py", ["self", "*many"], "many", "all"),
    (
        "m.py",
        "def choose(a):\n '''Why.'''\n if a: return 'mnnvl'  # now\n return 'trtllm'",
        "body choose in m.py",
        {"constants": ["'mnnvl'", "'trtllm'"], "digest": "134a4b17", "names": ["a"]},
        "'mnnvl'",
        "'auto'",
    ),
    (
        "m.py",
        "class Workspace(Base):\n SIZE = 1\n @property\n def backend(self): ...\n"
        " def destroy(self, now=True): self.mc_ptr = 0; self._gone = other.field\n def _hidden(self): ...",
        "class Workspace in m.py",
        {
            "bases": ["Base"],
            "methods": {"backend": "@property (self)", "destroy": "(self, now=True)"},
            "attributes": ["SIZE", "mc_ptr"],
        },
        "mc_ptr",
        "pointer",
    ),
    ("m.py", "class Pattern:\n kA = 0\n kB = 1 << 3\n _c = 2", "enum Pattern in m.py", {"kA": 0, "kB": 8}, "kB", "kC"),
    (
        "m.py",
        "MiB = 1024 * 1024\nSIZES = {90: {2: 2 * MiB, 4: 0.5}, (100, 8): {8, 4}, 'x': other}",
        "constant SIZES in m.py",
        {"90": {"2": 2097152, "4": 0.5}, "100 8": [4, 8], "x": "other"},
        "4: 0.5",
        "4: 2",
    ),
    ("m.py", "def f(self):\n self.group = a().b", "constant f.self.group in m.py", "a().b", "a().b", "a().c"),
    ("m.py", "LIMIT: int = ~0 & 7", "constant LIMIT in m.py", 7, "7", "3"),
    ("m.py", "env = {'USE_IT': lambda: True}", "entry USE_IT in m.py", "lambda: True", "True", "False"),
    (
        "m.py",
        "class C:\n def run(self):\n  comm.fuse(x, pattern=P.kA, early=n > 16)",
        "call comm.fuse in m.py:C.run",
        {"0": "x", "pattern": "P.kA", "early": "n > 16"},
        "n > 16",
        "n > 8",
    ),
    (
        "m.py",
        "def run():\n kw = dict(a=1)\n if new: kw['group'] = g\n other['b'] = 2\n _create_workspace(**kw, c=3)",
        "call _create_workspace in m.py:run",
        {"a": "1", "group?": "g", "c": "3"},
        "kw['group'] = g",
        "pass",
    ),
    (
        "m.py",
        "import flashinfer.comm as comm\ndef f():\n from flashinfer.comm.mnnvl import A, B",
        "imports in m.py",
        ["flashinfer.comm", "flashinfer.comm.mnnvl: A", "flashinfer.comm.mnnvl: B"],
        "A, B",
        "A",
    ),
    (
        "m.py",
        "try:\n import flashinfer.comm as _comm\n if hasattr(_comm, 'new'): comm = _comm\nexcept ImportError: pass\n"
        "x = comm.Pattern.kA, _comm.fuse, other.thing",
        "uses in m.py",
        ["Pattern.kA", "fuse", "new"],
        "kA",
        "kB",
    ),
    (
        "m.py",
        "if getattr(workspace, 'mc_ptr', 0) and self.my_workspace.backend: workspace.destroy()\nroom.size",
        "workspaces in m.py",
        ["backend", "destroy", "mc_ptr"],
        "'mc_ptr'",
        "'ptr'",
    ),
    ("m.py", "try:\n from .a import fuse\nexcept E: pass", "exports in m.py", ["fuse"], "fuse", "fuse as melt"),
    (
        "m.py",
        "def dispatch(workspace, p):\n if isinstance(workspace, Ours):\n  if p in (Pattern.kA, Pattern.kB): pass\n"
        " elif isinstance(workspace, Theirs): Pattern.kC",
        "branches dispatch in m.py",
        {"Ours": ["kA", "kB"], "Theirs": ["kC"]},
        "Pattern.kB",
        "Pattern.kD",
    ),
    (
        "a-1.dist-info/METADATA",
        "Name: a\nRequires-Dist: torch==2.11.0\nRequires-Dist: flashinfer_python[cu13]==0.7.2\nRequires-Dist: numpy\n",
        "requirement flashinfer-python",
        ["[cu13]==0.7.2"],
        "0.7.2",
        "0.7.4",
    ),
    (
        "a-1.dist-info/entry_points.txt",
        "[x.general_plugins]\nB = a:b\na = c:d\n",
        "entry points x.general_plugins",
        ["B", "a"],
        "B =",
        "C =",
    ),
]
IDS = [fact.split(" in ")[0] for _, _, fact, *_ in KINDS]


@pytest.mark.parametrize(("path", "source", "fact", "value", "old", "new"), KINDS, ids=IDS)
def test_a_fact_is_read_and_its_move_is_named(
    path: str, source: str, fact: str, value: Any, old: str, new: str
) -> None:
    before = facts.of_release({path: source}, WANTED)
    assert before[fact] == value
    assert old in source
    after = facts.of_release({path: source.replace(old, new)}, WANTED)
    moved = record.moved({"1.0": before}, {"1.0": after})
    assert any(line.startswith(f"1.0: {fact}: ") for line in moved), moved
    gone = record.moved({"1.0": before}, {"1.0": facts.of_release({}, WANTED)})
    assert any(line.startswith(f"1.0: {fact}: removed, was ") for line in gone), gone


def test_what_is_no_fact_may_move() -> None:
    source = "\n".join(source for path, source, *_ in KINDS if path == "m.py")
    moved = f'"""Words."""\n\n\n{source}\n\ndef another(a): ...\nUNASKED = 1  # and why\n'.replace("b: int", "b: float")
    assert moved.count("float") == 1
    assert facts.of_python("m.py", source, WANTED) == facts.of_python("m.py", moved, WANTED)


A2A = "sglang/srt/layers/moe/utils.py"
A2A_SOURCE = """
class MoeA2ABackend(Enum):
    NONE = "none"
    ONE = "one"
    def is_none(self): return self.name == "NONE"
class Another:
    def is_some(self): ...
def get_moe_a2a_backend(): return chosen or MoeA2ABackend.NONE
"""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("def get_moe", "def moe", f"function get_moe_a2a_backend in {A2A}: removed, was []"),
        ("backend()", "backend(layer)", f'function get_moe_a2a_backend in {A2A}: changed, with ["layer"]'),
        ("chosen or", "chosen()[0] or", f"body get_moe_a2a_backend in {A2A}: "),
        ('ONE = "one"', 'ONE = "one"; TWO = "two"', f'enum MoeA2ABackend in {A2A}: TWO added, "two"'),
        ("is_none", "none", f'function MoeA2ABackend.is_none in {A2A}: removed, was ["self"]'),
        ("self.name ==", "self.name !=", f"body MoeA2ABackend.is_none in {A2A}: digest changed, "),
    ],
)
def test_a_move_of_sglangs_expert_all_to_all_is_named(old: str, new: str, says: str) -> None:
    """The controls of what is wanted of SGLang: `sglang_layer` asks it whether rows are complete."""
    wanted = PROJECTS["sglang"].wanted
    assert facts.matches(A2A, wanted.files)
    assert old in A2A_SOURCE
    before, after = (facts.of_release({A2A: each}, wanted) for each in (A2A_SOURCE, A2A_SOURCE.replace(old, new)))
    assert not [name for name in before if "Another" in name or "is_some" in name]
    moved = record.moved({"1": before}, {"1": after})
    assert any(line.startswith(f"1: {says}") for line in moved), moved


def test_every_kind_is_tried() -> None:
    """Of the fields of Wanted, each has a case above, and of the committed facts, each is of a kind above."""
    tried = {name.split()[0] for name in IDS}
    assert {fact.split()[0] for each in COMMITTED.values() for known in each.values() for fact in known} <= tried
    assert len(tried) == len(Wanted.__dataclass_fields__)  # but for `files`, and with "uses" and "entry points" on top


def test_two_of_one_name_are_told_apart() -> None:
    source = "def f():\n a.fuse(x=1)\n a.fuse(x=2)\n\ndef g():\n a.fuse(x=3)\n"
    assert facts.of_python("m.py", source, WANTED) == {
        "call a.fuse in m.py:f": {"x": "1"},
        "call a.fuse (2) in m.py:f": {"x": "2"},
        "call a.fuse in m.py:g": {"x": "3"},
    }


# ---- what moved, and the file


def test_what_moved_is_named_with_its_versions() -> None:
    before: record.ByVersion = {
        "1": {"same": 1, "gone": [1], "list": ["a", "b"], "call": {"x": "1", "y": "2"}},
        "2": {"same": 1, "gone": [1], "list": ["a", "b"], "call": {"x": "1", "y": "2"}},
        "3": {"same": 1},
    }
    after: record.ByVersion = {
        "1": {"same": 1, "list": ["b", "c"], "call": {"x": "1", "z": "3"}},
        "2": {"same": 1, "list": ["b", "c"], "call": {"x": "1", "y": "2"}},
        "2.post1": {"same": 2, "list": ["b", "c"], "call": {"x": "1", "y": "2"}, "come": None},
    }
    assert record.moved(before, after) == [
        "3: no longer there",
        "2.post1: a new release",
        '1: call: y removed, was "2"; z added, "3"',
        "1..2: gone: removed, was [1]",
        '1..2: list: changed, without ["a"], with ["c"]',
        "2.post1: come: added, null",
        "2.post1: same: changed, 1 to 2",
    ]
    assert record.moved(before, before) == []
    assert record.moved({}, {"1": {"a": 1}}) == ["1: a new release"]
    assert record.moved({"1": {"a": [1, 2]}}, {"1": {"a": [2, 1]}}) == ["1: a: changed, order"]


def test_versions_of_equal_facts_share_an_entry(tmp_path: Path) -> None:
    by_version = {"0.9": {"a": 1, "b": 0}, "0.10": {"a": 1}, "0.10.post1": {"a": 1.0, "b": 0}, "1": {}, "2": {"a": 1}}
    record.save("x", by_version, tmp_path)
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "project": "x",
        "versions": ["0.9", "0.10", "0.10.post1", "1", "2"],
        "facts": {
            "a": {"0.9 .. 0.10": 1, "0.10.post1": 1.0, "2": 1},
            "b": {"0.9": 0, "0.10.post1": 0},
        },
    }
    assert record.load("x", tmp_path) == by_version
    assert record.load("y", tmp_path) == {}


class Folder:
    """A release whose files are in a dictionary; what was read is remembered."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files, self.got = files, list[str]()

    def names(self) -> list[str]:
        return sorted(self.files)

    def read(self, names: Any) -> dict[str, str]:
        self.got += names
        return {name: self.files[name] for name in names}


def test_a_call_in_a_file_that_is_not_read_is_named() -> None:
    project = Project("x", "1", Wanted(files=("x/a.py",), calls=("*.fuse",)), r"\bfuse\(", others=("x/bench/*",))
    calls = dict.fromkeys(("x/a.py", "x/b.py", "x/bench/c.py", "x/e.so"), "c.fuse()")
    folder = Folder({**calls, "x/d.py": ""})
    assert release(project, folder, everywhere=True) == ({"call c.fuse in x/a.py:module": {}}, ["x/b.py"])
    assert folder.got == ["x/a.py", "x/b.py", "x/d.py"]
    folder.got.clear()
    assert release(project, folder, everywhere=False) == ({"call c.fuse in x/a.py:module": {}}, [])
    assert folder.got == ["x/a.py"]


class Reads(BytesIO):
    """Remembers where it was read, and how much."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.spans = list[tuple[int, int]]()

    def read(self, size: int | None = -1) -> bytes:
        start = self.tell()
        data = super().read(size)
        self.spans.append((start, start + len(data)))
        return data


def test_renew_names_what_moved_until_it_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    releases = {"1": Folder({"m.py": "c.fuse(a=1)"}), "2": Folder({"m.py": "c.fuse(a=1, b=2)", "n.py": "c.fuse()"})}

    class Index:
        def __init__(self, project: str) -> None:
            assert project == "x-python"

        def versions(self, oldest: str) -> list[str]:
            return [*releases]

        def wheel(self, version: str) -> Any:
            return contextlib.nullcontext(releases[version])

    monkeypatch.setitem(sys.modules, "tools.contracts.index", SimpleNamespace(Index=Index))
    project = Project("x-python", "1", Wanted(files=("m.py",), calls=("*.fuse",)), r"\bfuse\(")
    monkeypatch.setitem(PROJECTS, "x", project)
    unread = "x 2: n.py: mentions what is looked for and is not read"
    assert renew(["x"], False, False, tmp_path) == [
        unread,
        "x 1: a new release",
        "x 2: a new release",
        'x 2: call c.fuse in m.py:module: b added, "2"',
    ]
    assert renew(["x"], True, False, tmp_path) == [unread]
    assert renew(["x"], False, False, tmp_path) == [unread]
    releases["2"].files["m.py"] = "c.fuse(a=1, c=2)"
    assert renew(["x"], False, False, tmp_path)[1:] == [
        'x 2: call c.fuse in m.py:module: b removed, was "2"; c added, "2"'
    ]


def test_neighbours_in_a_wheel_come_with_one_read() -> None:
    """After it, whatever zipfile reads of them lies within."""
    file = Reads(b"")
    with zipfile.ZipFile(file, "w") as written:
        for name, size in (("a.py", 1000), ("b.py", 10), ("big.so", 4 * CHUNK), ("c.py", 10), ("d/", 0)):
            written.writestr(name, "#" * size)
    wheel = Wheel(file)
    assert wheel.names() == ["a.py", "b.py", "big.so", "c.py"]
    file.spans.clear()
    assert wheel.read(["c.py", "b.py", "a.py"]) == {"a.py": "#" * 1000, "b.py": "#" * 10, "c.py": "#" * 10}
    first, second, *others = file.spans
    assert first[1] < second[0]
    assert others
    assert all(any(start <= each[0] and each[1] <= end for start, end in (first, second)) for each in others)
    assert joined([(0, 10), (20, 30), (25, 28), (30 + CHUNK, 40 + CHUNK)]) == [(0, 30), (30 + CHUNK, 40 + CHUNK)]


# ---- what is committed

VLLM = "0.20.0 0.20.1 0.20.2 0.21.0 0.22.0 0.22.1 0.23.0 0.24.0 0.25.0 0.25.1 0.26.0 0.27.0 0.27.1 0.28.0 0.29.0 0.30.0"
SGLANG = "0.5.11 0.5.12 0.5.12.post1 0.5.13 0.5.13.post1 0.5.14 0.5.15 0.5.15.post1 0.5.16 0.5.17 0.5.18 0.5.19 0.5.20"
FLASHINFER = (
    "0.6.8.post1 0.6.11.post1 0.6.11.post2 0.6.12 0.6.13 0.6.14 0.6.15.post1 0.6.16.post3 0.6.17 0.6.18 0.6.18.post1"
)
SUPPORTED = {
    "vllm": f"{VLLM} 0.31.0 0.32.0 0.33.0".split(),
    "sglang": f"{SGLANG} 0.5.21 0.5.22 0.5.23".split(),
    "flashinfer": f"{FLASHINFER} 0.7.0.post1 0.7.1 0.7.2 0.7.2.post1 0.7.4".split(),
}


@pytest.mark.parametrize("name", PROJECTS)
def test_every_supported_version_is_covered(name: str) -> None:
    assert [version for version in SUPPORTED[name] if not COMMITTED[name].get(version)] == []
    assert next(iter(COMMITTED[name])) == PROJECTS[name].oldest


@pytest.mark.parametrize("name", PROJECTS)
def test_the_file_is_as_it_would_be_written(name: str, tmp_path: Path) -> None:
    record.save(name, COMMITTED[name], tmp_path)
    text = (tmp_path / f"{name}.json").read_text()
    assert (ROOT / f"tools/contracts/{name}.json").read_text() == text
    names = [*json.loads(text)["facts"]]
    assert names == sorted(names)
    assert not re.search(r"https?:|/root/|/home/|/tmp/|/work/", text)


def fact(project: str, version: str, name: str) -> Any:
    """The one fact whose name begins so."""
    known = COMMITTED[project][version]
    found = [each for each in known if each == name or each.startswith((f"{name} in ", f"{name}:"))]
    assert len(found) == 1, found
    return known[found[0]]


def versions(project: str, oldest: str, newest: str) -> list[str]:
    known = [*COMMITTED[project]]
    return known[known.index(oldest) : known.index(newest) + 1]


def called(project: str, version: str, function: str) -> list[dict[str, str]]:
    """Arguments of every call of a function, under whatever name the module has it."""
    pattern = re.compile(rf"call (\w+\.)*_?{function} ")
    return [value for name, value in COMMITTED[project][version].items() if pattern.match(name)]


CREATE = (
    *("backend", "world_size", "rank", "max_token_num", "hidden_dim", "dtype", "gpus_per_node", "comm_backend"),
    *("force_oneshot_support", "group"),
)
FUSE = (
    *("input", "workspace", "pattern", "launch_with_pdl", "trigger_completion_at_end"),
    *("output", "residual_out", "norm_out", "quant_out", "scale_out"),
    *("residual_in", "rms_gamma", "rms_eps", "scale_factor", "layout_code", "use_oneshot", "fp32_acc"),
    *("moe_reduction_device_num_experts", "moe_reduction_scale_input", "moe_reduction_active_experts_token_input"),
    *("moe_reduction_token_input", "expanded_idx_to_permuted_idx", "expert_scale_factor", "shared_expert_output"),
    *("block_quant_group_size", "weight_bias"),
)
FI_AR = "vllm/distributed/device_communicators/flashinfer_all_reduce.py"
CREATED = "create(_allreduce_fusion)?_workspace"  # SGLang gives it shorter names


def names(parameters: list[str]) -> list[str]:
    return [each.partition("=")[0] for each in parameters]


@pytest.mark.parametrize("version", COMMITTED["flashinfer"])
def test_flashinfers_signatures_only_grew(version: str) -> None:
    """Each version's positional parameters are the first of these, in this order, and the rest is by keyword alone."""
    for function, longest in (("create_allreduce_fusion_workspace", CREATE), ("allreduce_fusion", FUSE)):
        parameters = names(fact("flashinfer", version, f"function {function}"))
        positional = parameters[: parameters.index("*")] if "*" in parameters else parameters
        assert tuple(positional) == longest[: len(positional)]
        assert not any(len(each) > 1 and each[0] == "*" for each in parameters)


def test_when_a_parameter_came() -> None:
    def oldest(function: str, parameter: str) -> str:
        known = COMMITTED["flashinfer"]
        return next(each for each in known if parameter in names(fact("flashinfer", each, f"function {function}")))

    create, fuse = "create_allreduce_fusion_workspace", "allreduce_fusion"
    assert oldest(create, "force_oneshot_support") == oldest(fuse, "shared_expert_output") == "0.6.8.post1"
    assert oldest(create, "group") == "0.6.10.post1"
    assert oldest(fuse, "block_quant_group_size") == "0.6.11"
    assert oldest(fuse, "weight_bias") == "0.6.12"
    assert oldest(fuse, "moe_finalize_backend") == "0.7.1"
    assert oldest(create, "config") == "0.7.2.post1"
    assert len(fact("flashinfer", "0.7.4", f"function {create}")) == len(CREATE) + 1 + 12


@pytest.mark.parametrize("version", COMMITTED["flashinfer"])
def test_codes_keep_their_values(version: str) -> None:
    newest = fact("flashinfer", [*COMMITTED["flashinfer"]][-1], "enum AllReduceFusionPattern")
    codes = fact("flashinfer", version, "enum AllReduceFusionPattern")
    assert codes.items() <= newest.items()
    assert sorted(codes.values()) == list(range(len(codes)))
    assert [codes[name] for name in ("kAllReduce", "kARResidualRMSNorm", "kARResidualRMSNormFP8Quant")] == [0, 1, 2]
    assert fact("flashinfer", version, "enum QuantizationSFLayout") == {
        "SWIZZLED_128x4": 0,
        "SWIZZLED_8x4": 1,
        "LINEAR": 2,
    }


@pytest.mark.parametrize(
    ("oldest", "newest", "codes"),
    [
        ("0.6.8.post1", "0.6.12", {0, 1}),
        ("0.6.13", "0.6.14", {0, 1, 2, 3, 4, 5}),
        ("0.6.15", "0.7.2.post1", {0, 1, 2, 3, 4, 5, 10, 11}),
        ("0.7.4", "0.7.4", {0, 1, 2, 3, 4, 5, 10, 11, 13, 14}),
    ],
)
def test_patterns_of_the_mnnvl_backend(oldest: str, newest: str, codes: set[int]) -> None:
    for version in versions("flashinfer", oldest, newest):
        enum = fact("flashinfer", version, "enum AllReduceFusionPattern")
        branches = fact("flashinfer", version, "branches allreduce_fusion")
        assert {enum[name] for name in branches["MNNVLAllReduceFusionWorkspace"]} == codes


@pytest.mark.parametrize("version", COMMITTED["flashinfer"])
def test_the_abstract_workspace(version: str) -> None:
    base = fact("flashinfer", version, "class AllReduceFusionWorkspace")
    size = "(self, tp_size, num_tokens, hidden_dim, dtype, use_oneshot=None)"
    assert base["bases"] == ["ABC"]
    assert base["methods"] == {
        "__del__": "(self)",
        "__init__": "(self, world_size, rank)",
        "backend": "@property @abstractmethod (self)",
        "destroy": "@abstractmethod (self)",
        "is_buffer_size_sufficient": f"@abstractmethod {size}",
    }
    mnnvl = fact("flashinfer", version, "class MNNVLAllReduceFusionWorkspace")
    trtllm = fact("flashinfer", version, "class TRTLLMAllReduceFusionWorkspace")
    assert trtllm["methods"]["is_buffer_size_sufficient"] == size
    assert "strategy=MNNVLAllreduceFusionStrategy.AUTO" in mnnvl["methods"]["is_buffer_size_sufficient"]
    assert {"mc_ptr", "buffer_size_bytes"} <= {*mnnvl["attributes"]}
    assert "metadata" in trtllm["attributes"]
    for workspace in (mnnvl, trtllm):
        checkpoints = {"checkpoint_prepare", "checkpoint_restore"} & {*workspace["methods"]}
        assert len(checkpoints) == (2 if version in versions("flashinfer", "0.6.15", "0.7.4") else 0)


@pytest.mark.parametrize("version", COMMITTED["flashinfer"])
def test_names_that_the_servers_import_are_there(version: str) -> None:
    comm = fact("flashinfer", version, "exports in flashinfer/comm/__init__.py")
    assert {"create_allreduce_fusion_workspace", "allreduce_fusion", "AllReduceFusionPattern"} <= {*comm}
    assert {"AllReduceFusionWorkspace", "QuantizationSFLayout"} <= {*comm}
    mnnvl = fact("flashinfer", version, "exports in flashinfer/comm/mnnvl.py")
    assert {"TorchDistBackend", "CommBackend", "is_mnnvl_fabric_supported"} <= {*mnnvl}
    home = "mnnvl" if version in versions("flashinfer", "0.6.8.post1", "0.6.15.post1") else "comm_backend"
    assert f"class TorchDistBackend in flashinfer/comm/{home}.py" in COMMITTED["flashinfer"][version]


@pytest.mark.parametrize(
    ("server", "version"), [(name, each) for name in ("vllm", "sglang") for each in COMMITTED[name]]
)
def test_servers_pass_only_what_their_flashinfer_takes(server: str, version: str) -> None:
    """By keyword, save what they add under a condition: SGLang asks the signature first, but for `use_fp32_lamport`."""
    pin = fact(server, version, "requirement flashinfer-python")[0].rpartition("==")[2]
    calls = {
        "create_allreduce_fusion_workspace": called(server, version, CREATED),
        "allreduce_fusion": called(server, version, "allreduce_fusion"),
    }
    for function, sites in calls.items():
        taken = {*names(fact("flashinfer", pin, f"function {function}"))}
        assert sites, function
        for site in sites:
            assert {each for each in site if not each.endswith("?")} <= taken
            assert {each.rstrip("?") for each in site} - taken <= {"use_fp32_lamport", "group"}


def test_both_servers_use_patterns_0_and_1_and_vllm_2_and_3() -> None:
    enum = fact("flashinfer", "0.7.4", "enum AllReduceFusionPattern")
    for server, codes in (("vllm", {0, 1, 2, 3}), ("sglang", {0, 1})):
        newest = [*COMMITTED[server].values()][-1]
        used = {name for fact, value in newest.items() if fact.startswith("uses in ") for name in value}
        patterns = {name.partition(".")[2] for name in used if name.startswith("AllReduceFusionPattern.")}
        assert {enum[name] for name in patterns} == codes


def test_vllms_group_is_of_nccl_up_to_0_26_and_of_gloo_after() -> None:
    for version in COMMITTED["vllm"]:
        group = fact("vllm", version, "constant AllReduceFusionPass.__init__.self.group")
        nccl = version in versions("vllm", "0.20.0", "0.26.0")
        assert group == f"get_tp_group().{'device' if nccl else 'cpu'}_group"
        workspaces = fact("vllm", version, f"workspaces in {FI_AR}")
        assert ("mc_ptr" in workspaces) == (not nccl)


def test_vllms_limits() -> None:
    sizes = fact("vllm", "0.33.0", "constant FI_ALLREDUCE_FUSION_MAX_SIZE_MB")
    assert sizes["90"] == {"2": 64, "4": 2, "8": 0.5}
    assert sizes["100"] == {"2": 64, "4": 32, "8": 1, "16": 64}
    assert sizes["103"] == {"2": 64, "4": 64, "8": 4, "16": 64}
    assert sizes["107"] == {"2": 64, "4": 64, "8": 2}
    assert not any(key.startswith("90 ") for key in fact("vllm", "0.33.0", "constant FI_MNNVL_ALLREDUCE_MAX_SIZE_MB"))
    assert fact("vllm", "0.26.0", "constant VLLM_ALLREDUCE_USE_FLASHINFER") is False
    assert fact("vllm", "0.33.0", "constant VLLM_ALLREDUCE_USE_FLASHINFER") is True


def test_vllm_says_when_the_next_kernel_may_start() -> None:
    newest = COMMITTED["vllm"]["0.33.0"]
    call = newest[f"call flashinfer_comm.allreduce_fusion in {FI_AR}:FlashInferAllReduce.all_reduce"]
    assert call["trigger_completion_at_end"] == "num_tokens > PDL_ADVANCE_LAUNCH_TOKENS"
    assert newest[f"constant PDL_ADVANCE_LAUNCH_TOKENS in {FI_AR}"] == 16
    assert "None" in fact("vllm", "0.33.0", "body _select_flashinfer_allreduce_use_oneshot")["constants"]


def test_vllms_op_changes_these_arguments() -> None:
    for version in COMMITTED["vllm"]:
        name = "call direct_register_custom_op in vllm/compilation/passes/fusion/allreduce_rms_fusion.py:module"
        arguments = COMMITTED["vllm"][version][name]
        assert arguments["op_name"] == "'flashinfer_trtllm_fused_allreduce_norm'"
        assert arguments["mutates_args"] == "['allreduce_in', 'residual', 'norm_out', 'quant_out', 'scale_out']"
        assert ("fake_impl" in arguments) == (version in versions("vllm", "0.20.0", "0.29.0"))


def test_plugin_groups() -> None:
    for facts_ in COMMITTED["vllm"].values():
        assert facts_["constant DEFAULT_PLUGINS_GROUP in vllm/plugins/__init__.py"] == "vllm.general_plugins"
        loaded = {name.rpartition(":")[2] for name in facts_ if name.startswith("call load_general_plugins ")}
        assert {"EngineArgs.__post_init__", "EngineCore.__init__", "WorkerWrapperBase.init_worker"} <= loaded
    for facts_ in COMMITTED["sglang"].values():
        assert facts_["constant GENERAL_PLUGINS_GROUP in sglang/srt/plugins/__init__.py"] == "sglang.srt.plugins"
        loaded = {name.rpartition(":")[2] for name in facts_ if name.startswith("call load_plugins ")}
        assert {"Engine.__init__", "run_scheduler_process"} <= loaded
        registry = facts_["class HookRegistry in sglang/srt/plugins/hook_registry.py"]["methods"]
        assert registry["register"] == "@classmethod (cls, target, hook, hook_type=HookType.AFTER, *, source=None)"
        assert facts_["enum HookType in sglang/srt/plugins/hook_registry.py"]["AROUND"] == "around"


def test_sglangs_backend_depends_on_the_generation() -> None:
    body = fact("sglang", "0.5.23", "body _resolve_backend")
    assert {"'auto'", "'mnnvl'", "'trtllm'"} <= set(body["constants"])
    assert any(name.endswith("is_sm100") for name in body["names"])
    for version in versions("sglang", "0.5.11", "0.5.13.post1"):
        assert [site["backend"] for site in called("sglang", version, CREATED)] == ["'trtllm'"]


def test_sglang_binds_creation_at_import_and_fuses_up_to_2048_tokens() -> None:
    for version in COMMITTED["sglang"]:
        bound = "constant _create_allreduce_fusion_workspace in sglang/srt/layers/flashinfer_comm_fusion.py"
        later = version in versions("sglang", "0.5.14", "0.5.23")
        assert any(name.startswith(bound.replace(" in ", " (2) in ")) for name in COMMITTED["sglang"][version]) == later
        assert fact("sglang", version, "constant FUSE_ALLREDUCE_MAX_BATCH_SIZE") == 2048


@pytest.mark.parametrize(
    ("server", "version", "torch", "flashinfer"),
    [
        ("vllm", "0.20.0", "2.11.0", "0.6.8.post1"),
        ("vllm", "0.26.0", "2.11.0", "0.6.14"),
        ("vllm", "0.28.0", "2.13.0", "0.6.16.post3"),
        ("vllm", "0.33.0", "2.14.0", "0.7.2.post1"),
        ("sglang", "0.5.11", "2.11.0", "0.6.8.post1"),
        ("sglang", "0.5.17", "2.11.0", "0.6.15.post1"),
        ("sglang", "0.5.21", "2.13.0", "0.6.18"),
        ("sglang", "0.5.23", "2.14.1", "0.7.2"),
    ],
)
def test_pins(server: str, version: str, torch: str, flashinfer: str) -> None:
    assert fact(server, version, "requirement torch") == [f"=={torch}"]
    assert fact(server, version, "requirement flashinfer-python")[0].rpartition("==")[2] == flashinfer
