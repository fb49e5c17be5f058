"""setup.py finds the compilers that fit, and says what is wrong in words that tell what to do."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from setuptools import Distribution, Extension

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """setup.py's functions, under these variables, on a machine that has no compiler, nvcc or GPU but those given."""

    def load(gpu: bool = False, **variables: str) -> dict[str, Any]:
        for name in ("CXX", "CUDA_HOME", "PATH", "MNNVL_AR_CUDA", "MNNVL_AR_ARCHS", "MNNVL_AR_SANITIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"PATH": "", **variables}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
        monkeypatch.chdir(ROOT)
        found = runpy.run_path("setup.py")
        pip = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
        monkeypatch.setattr(importlib.util, "find_spec", {"nvidia": pip}.get)
        monkeypatch.setitem(found["find_nvcc"].__globals__, "GPUS", (str(ROOT),) if gpu else ())
        return found

    return load


def nvcc(folder: Path, release: str) -> str:
    """A stand-in for nvcc in `folder`/bin; its path."""
    program = folder / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1\n")
    program.chmod(0o755)
    return str(program)


# ---- the C++ compiler


def test_no_compiler(load: Any) -> None:
    with pytest.raises(SystemExit, match=r"no C\+\+20 compiler \(.*g\+\+.*\): install g\+\+ 10 or later, or set CXX"):
        load()["find_cxx"]()


def test_a_compiler_of_ones_own_that_is_not_there(load: Any) -> None:
    with pytest.raises(SystemExit, match=r"no C\+\+20 compiler \(.*nosuch\+\+.*\)"):
        load(CXX="nosuch++")["find_cxx"]()


def test_a_compiler_too_old(load: Any, tmp_path: Path) -> None:
    old = tmp_path / "g++"
    old.write_text("#!/bin/sh\necho unknown option -std=c++20 >&2\nexit 1\n")
    old.chmod(0o755)
    with pytest.raises(SystemExit, match=r"no C\+\+20 compiler \(unknown option"):
        load(PATH=str(tmp_path))["find_cxx"]()


# ---- nvcc


def test_no_nvcc(load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for gpu in (False, True):  # one without nvcc may do without CUDA, GPU or not
        assert load(gpu, CUDA_HOME="")["find_nvcc"]() is None
        assert "mnnvl_ar: no nvcc: host transport only\n" in capsys.readouterr().out


@pytest.mark.parametrize("variables", [{"MNNVL_AR_CUDA": "0"}, {"MNNVL_AR_SANITIZE": "thread"}])
def test_cuda_not_wanted(
    load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], variables: dict[str, str]
) -> None:
    nvcc(tmp_path, "13.0")
    assert load(CUDA_HOME=str(tmp_path), **variables)["find_nvcc"]() is None
    assert "mnnvl_ar: CUDA not wanted: host transport only\n" in capsys.readouterr().out


@pytest.mark.parametrize(("release", "enough"), [("12.8", False), ("12.9", True), ("13.0", True), ("14.1", True)])
def test_how_new_an_nvcc_must_be(load: Any, tmp_path: Path, release: str, enough: bool) -> None:
    program = nvcc(tmp_path, release)
    assert load(CUDA_HOME=str(tmp_path))["find_nvcc"]() == (program if enough else None)


def test_an_nvcc_too_old_is_told_and_done_without(
    load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = nvcc(tmp_path, "12.4")
    assert load(PATH=f"/none:{tmp_path}/bin")["find_nvcc"]() is None
    told = f"mnnvl_ar: nvcc 12.4 at {program} is too old (12.9 needed): host transport only\n"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(("release", "says"), [("", "no nvcc"), ("12.4", "nvcc 12.4 at .* is too old")])
def test_cuda_that_was_asked_for_is_not_left_out(load: Any, tmp_path: Path, release: str, says: str) -> None:
    if release:
        nvcc(tmp_path, release)
    with pytest.raises(SystemExit, match=rf"{says}.*: set CUDA_HOME to a newer one, or MNNVL_AR_CUDA=0"):
        load(PATH=f"{tmp_path}/bin", MNNVL_AR_CUDA="1")["find_nvcc"]()


def test_an_nvcc_too_old_beside_a_gpu_is_an_error(load: Any, tmp_path: Path) -> None:
    program = nvcc(tmp_path, "12.4")
    with pytest.raises(SystemExit, match=rf"nvcc 12.4 at {program} is too old \(12.9 needed\): set CUDA_HOME .*CUDA=0"):
        load(gpu=True, PATH=f"{tmp_path}/bin")["find_nvcc"]()


@pytest.mark.parametrize("good", ["home", "nvidia/cu13", "first", "last"])
def test_an_nvcc_too_old_hides_no_good_one(load: Any, tmp_path: Path, good: str) -> None:
    """Wherever it is: $CUDA_HOME, pip's toolkit, or further along PATH."""
    places = {good, "home", "first"}
    found = {place: nvcc(tmp_path / place, "13.0" if place == good else "12.4") for place in places}
    path = f"{tmp_path}/first/bin:{tmp_path}/last/bin"
    assert load(gpu=True, CUDA_HOME=f"{tmp_path}/home", PATH=path)["find_nvcc"]() == found[good]


def test_the_order_of_places(load: Any, tmp_path: Path) -> None:
    for place in ("path", "nvidia/cu13", "home"):
        program = nvcc(tmp_path / place, "13.0")
        assert load(CUDA_HOME=f"{tmp_path}/home", PATH=f"{tmp_path}/path/bin")["find_nvcc"]() == program


@pytest.mark.parametrize(
    ("release", "variables", "status"), [("13.0", {}, 0), ("12.4", {}, 1), ("12.4", {"MNNVL_AR_CUDA": "0"}, 0)]
)
def test_the_makefiles_question(
    load: Any, tmp_path: Path, release: str, variables: dict[str, str], status: int
) -> None:
    """`setup.py find_nvcc` fails where one is to be installed."""
    nvcc(tmp_path, release)
    with pytest.raises(SystemExit) as ended:
        load(PATH=f"{tmp_path}/bin", **variables)["FindNvcc"](Distribution()).run()
    assert int(ended.value.code) == status


def test_the_default_architectures(load: Any) -> None:
    assert load()["ARCHS"] == ["90a", "100f", "ptx"]


# ---- the build


def test_a_build_that_is_not_in_place(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain `setup.py build_ext` makes the folder that it copies the library to."""
    found = load()

    def run_ninja(variant: str, variables: dict[str, str], edges: list[str], target: Path) -> None:
        (tmp_path / "build" / variant).mkdir(parents=True)
        target.parent.mkdir()
        target.write_bytes(b"built")

    stand_ins = {"ROOT": tmp_path, "run_ninja": run_ninja, "find_cxx": lambda: "g++", "package_folder": str}
    for name, value in stand_ins.items():
        monkeypatch.setitem(found["find_nvcc"].__globals__, name, value)
    command = found["BuildLibrary"](Distribution({"name": "mnnvl_ar", "ext_modules": [Extension("mnnvl_ar._C", [])]}))
    command.build_lib = str(tmp_path / "lib")
    command.ensure_finalized()
    command.run()
    assert (tmp_path / "lib/mnnvl_ar/_C.so").read_bytes() == b"built"


def test_nvcc_is_asked_about_the_machine_that_is_built_for(load: Any, tmp_path: Path) -> None:
    program = Path(nvcc(tmp_path, "13.0"))
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in *"-ccbin cross-g++ "*) t=other;; *) t=this;; esac\n'
        'echo "#$ INCLUDES=-I/$t/include" >&2; echo "#$ LIBRARIES=-L/$t/lib64" >&2\n'
    )
    folders = load()["toolkit_folders"]
    assert folders(str(program), "cross-g++") == (["/other/include"], ["/other/lib64", "/other/lib"])
    assert folders(str(program), "g++")[0] == ["/this/include"]


def test_names_of_libstdcxx_keep_their_versions(load: Any, tmp_path: Path) -> None:
    """Against a PyTorch that exports them without; and the control, in which it comes first."""
    path = os.environ["PATH"]
    link = load(PATH=path)["link_flags"](str(tmp_path), [], False)
    name = "_ZNSt13runtime_errorC1ERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
    (tmp_path / "lib").mkdir()
    for library, text in (("torch", f"void {name}(void) {{}}"), ("torch_cpu", "")):
        (tmp_path / "a.c").write_text(text)
        build(tmp_path, f"gcc -shared -fPIC a.c -o lib/lib{library}.so")
    (tmp_path / "a.cpp").write_text(
        "#include <stdexcept>\nvoid f(const std::string& s) { throw std::runtime_error(s); }"
    )
    found = []
    for flags in (link, link.replace("-lstdc++ ", "")):
        build(tmp_path, f"g++ -shared -fPIC a.cpp {flags} -o a.so")
        found.append(re.findall(rf"U {name}(\S*)", build(tmp_path, "nm -D a.so")))
    assert found == [["@GLIBCXX_3.4.21"], [""]]


def build(folder: Path, command: str) -> str:
    return subprocess.run(command.split(), cwd=folder, check=True, text=True, stdout=subprocess.PIPE).stdout


# ---- wheels

KERNEL = """#include "k/sum.h"
namespace { __device__ __noinline__ int local(int x) { return sum(x, x ^ 7); } }
__global__ void kernel(int* p) { p[threadIdx.x] = local(p[1]); }
void launch(int* p) { kernel<<<1, 32>>>(p); }
"""


def test_the_folder_does_not_change_the_bytes(load: Any, tmp_path: Path) -> None:
    """And the control: with the plain rule it does."""
    found = load(PATH=os.environ["PATH"], CUDA_HOME=os.environ.get("CUDA_HOME", ""))
    compiler = found["find_nvcc"]()
    if compiler is None:
        pytest.skip("no nvcc on this machine")
    space = found["run_ninja"].__globals__
    plain = space["RULES"].replace(" -Xcudafe --orig_src_path_name,$in", "")
    assert plain != space["RULES"]
    flags = f"{found['NVCC_FLAGS']} -gencode=arch=compute_90a,code=sm_90a"
    _, libraries = found["toolkit_folders"](compiler, "g++")
    link = " ".join(f"-L{each}" for each in libraries) + f" -lcudart_static -lrt -ldl -lpthread {found['ALIKE']}"
    edges = [
        f"build build/test/a.o | build/test/a.o.log: nvcc csrc/k/a.cu\n  flags = {flags}",
        f"build build/test/out.so: link build/test/a.o\n  flags = {link}",
    ]
    made = []
    for rules, folder in ((space["RULES"], "one"), (space["RULES"], "the/other"), (plain, "the/plain")):
        root = tmp_path / folder
        (root / "csrc/k").mkdir(parents=True)
        (root / "csrc/k/sum.h").write_text("__device__ __noinline__ static int sum(int x, int y) { return x + y; }\n")
        (root / "csrc/k/a.cu").write_text(KERNEL)
        space.update(ROOT=root, RULES=rules)
        found["run_ninja"]("test", {"cxx": "g++", "nvcc": compiler}, edges, root / "out.so")
        made.append((root / "out.so").read_bytes())
    assert made[0] == made[1]
    assert made[0] != made[2]


@pytest.mark.parametrize(("variables", "version"), [({}, "1.2"), ({"MNNVL_AR_CUDA": "0"}, "1.2+host")])
def test_a_host_only_wheel_says_so_in_its_version(
    load: Any, tmp_path: Path, variables: dict[str, str], version: str
) -> None:
    nvcc(tmp_path, "13.0")
    found, distribution = load(PATH=f"{tmp_path}/bin", **variables), Distribution({"name": "x", "version": "1.2"})
    for _ in range(2):  # by each command of a build
        found["mark_host_only"](distribution)
    assert distribution.metadata.version == version


TEXT = "[page](docs/a.md#b) ![curve](docs/c.png) [there](https://d.e/f) [above](#g)"


@pytest.mark.parametrize(
    ("repository", "links"),
    [
        ("https://h.i/j", "[page](https://h.i/j/blob/main/docs/a.md#b) ![curve](https://h.i/j/raw/main/docs/c.png)"),
        (None, "page "),
    ],
)
def test_no_link_of_the_description_is_relative(load: Any, repository: str | None, links: str) -> None:
    absolute_links = load()["absolute_links"]
    assert absolute_links(TEXT, repository) == f"{links} [there](https://d.e/f) [above](#g)"
    readme = absolute_links((ROOT / "README.md").read_text(), repository)
    assert re.findall(r"\]\((?![a-z]+:|#)[^)]*\)", readme) == []


def test_a_setuptools_too_old_is_named(tmp_path: Path) -> None:
    old = tmp_path / "setuptools"
    (old / "command").mkdir(parents=True)
    (old / "__init__.py").write_text("__version__ = '65.5.0'\nCommand = Distribution = Extension = setup = object\n")
    for command in ("build_ext", "egg_info"):
        (old / "command" / f"{command}.py").write_text(f"{command} = object\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    got = subprocess.run([sys.executable, "setup.py"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert got.returncode == 1
    wanted = "mnnvl_ar: setuptools 65.5.0 is too old, 77 or later is needed: pip install -U 'setuptools>=77'"
    assert got.stderr.startswith(wanted)
    assert "Traceback" not in got.stderr


# ---- the rooms of csrc


def test_every_source_has_a_room(load: Any) -> None:
    found = load()["sources"](ROOT / "csrc")
    assert {way for _, way in found} == {"cuda", "host", "torch"}
    assert ROOT / "csrc" / "epilogues" / "rms_norm.cu" in [file for file, _ in found]


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("quant/fp8.cpp", "csrc/quant/fp8.cpp: no such room: say in ROOMS of setup.py"),
        ("kernels/one_shot.cu", "csrc/kernels/one_shot.cu: csrc/kernels compiles nothing"),
        ("epilogues/fp8.cpp", r"csrc/epilogues/fp8.cpp: csrc/epilogues compiles \.cu"),
    ],
)
def test_a_source_that_no_room_compiles_ends_the_build(load: Any, tmp_path: Path, file: str, says: str) -> None:
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text("")
    with pytest.raises(SystemExit, match=says):
        load()["sources"](tmp_path)
