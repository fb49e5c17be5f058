"""Builds `mnnvl_ar/_C.so` and its test variants with ninja. Nothing is imported from torch; what is built is chosen by the environment.

MNNVL_AR_ARCHS         GPU code, default "90a;100f;ptx"; never guessed from the GPU at hand
MNNVL_AR_CUDA=0        leave the CUDA transport out even where there is an nvcc
MNNVL_AR_TEST_BUILD=1  -> tests/_C_test.so: guards can be switched off in it (negative controls)
MNNVL_AR_SANITIZE      thread | address -> tests/_C_tsan.so | tests/_C_asan.so, host transport only
CXX, CUDA_HOME, MAX_JOBS as usual

`python setup.py build_ext --inplace` builds one of the above, `python setup.py build_protocol` the pybind11 module of the unit tests.
"""

import fcntl
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
env = os.environ.get
ARCHS = [arch for arch in env("MNNVL_AR_ARCHS", "90a;100f;ptx").split(";") if arch]
SANITIZE = env("MNNVL_AR_SANITIZE", "")
VARIANT = {"thread": "tsan", "address": "asan"}[SANITIZE] if SANITIZE else "test" if env("MNNVL_AR_TEST_BUILD") == "1" else "release"
NVCC_OLDEST = (12, 9)  # the first with family architectures such as 100f
CXX_FLAGS = "-std=c++20 -O3 -ffp-contract=off -fPIC -fvisibility=hidden -Wall -Wextra -Icsrc"
NVCC_FLAGS = (
    "-std=c++20 -O3 -lineinfo -t 1 -fmad=false -ftz=false -prec-div=true -prec-sqrt=true -cudart static"
    " --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall -Xptxas -v -Icsrc"
)
RULES = """
rule cxx
  command = $cxx -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = g++ $in
rule nvcc
  command = $nvcc -MD -MF $out.d $flags -c $in -o $out 2> $out.log; s=$$?; grep -vE 'ptxas info|bytes stack frame' $out.log >&2; exit $$s
  depfile = $out.d
  deps = gcc
  description = nvcc $in
rule concatenate
  command = cat $in > $out
  description = gather $out
rule link
  command = $cxx -shared $in $flags -o $out
  description = link $out
"""


def package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"mnnvl_ar: {name} is needed to build; `pip install {name}` and build with --no-build-isolation")
    return Path(spec.submodule_search_locations[0])


def find_cxx() -> str:
    """The C++ compiler; it must know C++20's std::atomic_ref (GCC 10, Clang 18 with its own library)."""
    cxx = env("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if cxx is None:
        sys.exit("mnnvl_ar: no C++ compiler: install g++ 10 or later (apt-get install g++), or set CXX")
    probe = "#include <atomic>\nint main() { int i = 0; return std::atomic_ref<int>(i).load(); }\n"
    command = [*shlex.split(cxx), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    if not shutil.which(command[0]) or (got := subprocess.run(command, input=probe, text=True, capture_output=True)).returncode:
        why = got.stderr.strip().splitlines()[0] if shutil.which(command[0]) else "not found"
        sys.exit(f"mnnvl_ar: the C++ compiler `{cxx}` cannot compile C++20's std::atomic_ref ({why}); install g++ 10 or later, or set CXX")
    return cxx


def find_nvcc() -> str | None:
    """nvcc of $CUDA_HOME, of the pip packages (cuda-toolkit[nvcc,cccl,cudart]), or on PATH; None where there is none."""
    if env("MNNVL_AR_CUDA") == "0" or SANITIZE:
        return None
    pip = importlib.util.find_spec("nvidia")
    places = [Path(env("CUDA_HOME", "/none"), "bin")]
    places += [bin for folder in (pip and pip.submodule_search_locations) or () for bin in sorted(Path(folder).glob("cu*/bin"))]
    nvcc = next(filter(None, (shutil.which("nvcc", path=place) for place in [*places, env("PATH")])), None)
    if nvcc is None:
        return None
    release = re.search(r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], text=True, capture_output=True).stdout)
    if release is None or tuple(map(int, release.groups())) < NVCC_OLDEST:
        found = release[0] if release else "unknown"
        sys.exit(f"mnnvl_ar: {nvcc} is too old ({found}); 12.9 or later is needed. Set CUDA_HOME, or MNNVL_AR_CUDA=0 for no CUDA")
    return nvcc


def toolkit_folders(nvcc: str) -> tuple[list[str], list[str]]:
    """nvcc's own include and library folders. Asked of nvcc, as an nvcc on PATH may be a wrapper script far from its toolkit."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], text=True, capture_output=True).stderr
    words = [word for line in re.findall(r"(?:INCLUDES|LIBRARIES)=(.*)", said) for word in shlex.split(line)]
    folders = [(word[:2], os.path.normpath(word.removeprefix("-I").removeprefix("-L"))) for word in words if word != "-isystem"]
    return [f for kind, f in folders if kind != "-L"], [f for kind, f in folders if kind == "-L" and not f.endswith("stubs")]


def gencode(arch: str) -> str:
    return "-gencode=arch=compute_90,code=compute_90" if arch == "ptx" else f"-gencode=arch=compute_{arch},code=sm_{arch}"


def ninja(variant: str, variables: dict[str, str], edges: list[str], target: Path) -> None:
    """Writes build/<variant>/build.ninja and runs it; one build of a variant at a time."""
    folder = ROOT / "build" / variant
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = "".join(f"{name} = {value}\n" for name, value in {"builddir": f"build/{variant}", **variables}.items())
        (folder / "build.ninja").write_text(text + RULES + "\n".join(edges) + "\n")
        program = shutil.which("ninja", path=os.pathsep.join([sysconfig.get_path("scripts"), env("PATH", os.defpath)]))
        if program is None:
            sys.exit("mnnvl_ar: ninja is needed to build: pip install ninja")
        jobs = env("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        if subprocess.run([program, "-f", f"build/{variant}/build.ninja", "-j", jobs], cwd=ROOT).returncode:
            sys.exit(f"mnnvl_ar: the build failed; its commands are in build/{variant}/build.ninja")
        target.parent.mkdir(parents=True, exist_ok=True)
        built = folder / "out.so"
        if not target.exists() or target.read_bytes() != built.read_bytes():  # a new inode: whoever has the old file loaded keeps it
            shutil.copy2(built, target.with_suffix(".tmp"))
            os.replace(target.with_suffix(".tmp"), target)


def build_library(variant: str, target: Path) -> None:
    cxx, nvcc, torch = find_cxx(), find_nvcc(), package_folder("torch")
    includes, libraries = toolkit_folders(nvcc) if nvcc else ([], [])
    if nvcc is None:
        print("mnnvl_ar: " + ("host transport only, as asked" if env("MNNVL_AR_CUDA") == "0" or SANITIZE else "no nvcc: host transport only"))
    defines = f"-DMNNVL_AR_CUDA={int(nvcc is not None)}" + (" -DMNNVL_AR_TEST_BUILD" if variant != "release" else "")
    sanitize = f" -fsanitize={SANITIZE} -g -fno-omit-frame-pointer" if SANITIZE else ""
    cxx_flags = f"{CXX_FLAGS} {defines}{sanitize} " + " ".join(f"-isystem {folder}" for folder in includes)
    torch_flags = f"{cxx_flags} -isystem {torch}/include -DTORCH_TARGET_VERSION=0x020a000000000000"
    nvcc_flags = f"-ccbin {shlex.split(cxx)[-1]} {NVCC_FLAGS} {defines} " + " ".join(map(gencode, ARCHS))
    edges, objects, logs = [], [], []
    for pattern, rule, flags in (
        ("host/*.cpp", "cxx", cxx_flags),
        ("torch/*.cpp", "cxx", torch_flags),
        ("cuda/*.cu", "nvcc", nvcc_flags),
    ):
        for source in sorted((ROOT / "csrc").glob(pattern)) if rule == "cxx" or nvcc else ():
            object = f"build/{variant}/{source.parent.name}/{source.stem}.o"
            log = f" | {object}.log" if rule == "nvcc" else ""
            edges.append(f"build {object}{log}: {rule} {source.relative_to(ROOT)}\n  flags = {flags}")
            objects.append(object)
            logs += [f"{object}.log"] if log else []
    ptxas = "build/ptxas.log" if variant == "release" else f"build/{variant}/ptxas.log"
    edges += [f"build {ptxas}: concatenate {' '.join(logs)}"] if logs else []
    link = f"-L{torch}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -Wl,--as-needed -Wl,--exclude-libs,ALL{sanitize}"
    link += "" if SANITIZE else " -Wl,-z,defs"
    link += "".join(f" -L{folder}" for folder in libraries) + (" -lcudart_static" if nvcc else "") + " -lrt -ldl -lpthread"
    edges.append(f"build build/{variant}/out.so: link {' '.join(objects)}\n  flags = {link}")
    ninja(variant, {"cxx": cxx, "nvcc": nvcc or ""}, edges, target)
    config = {"cuda": nvcc is not None, "archs": ARCHS if nvcc else [], "ptxas": ptxas if logs else None, "nvcc": nvcc}
    (ROOT / "build" / variant / "config.json").write_text(json.dumps(config))


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return "mnnvl_ar/_C.so" if VARIANT == "release" else f"tests/_C_{VARIANT}.so"

    def build_extension(self, ext: Extension) -> None:
        build_library(VARIANT, Path(self.get_ext_fullpath(ext.name)))

    def copy_extensions_to_source(self) -> None:  # --inplace and editable installs
        build_library(VARIANT, ROOT / self.get_ext_filename(""))


class BuildProtocol(Command):
    """tests/_protocol.<abi>.so: csrc/protocol for Python tests. Needs pybind11 and Python's headers; never shipped."""

    user_options: list[tuple[str, str, str]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        python = sysconfig.get_path("include")
        if not Path(python, "Python.h").exists():
            sys.exit(f"mnnvl_ar: no {python}/Python.h for the test module; install your Python's headers (apt-get install python3-dev)")
        flags = f"{CXX_FLAGS} -isystem {python} -isystem {package_folder('pybind11')}/include"
        edges = [
            f"build build/protocol/protocol.o: cxx tests/native/protocol.cpp\n  flags = {flags}",
            "build build/protocol/out.so: link build/protocol/protocol.o\n  flags = -Wl,--exclude-libs,ALL",
        ]
        ninja("protocol", {"cxx": find_cxx()}, edges, ROOT / "tests" / f"_protocol{sysconfig.get_config_var('EXT_SUFFIX')}")


class OneWheel(bdist_wheel):
    """One wheel for every Python: `_C.so` has no PyInit and is loaded by torch.ops.load_library."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("mnnvl_ar._C", sources=[])],
    cmdclass={"build_ext": BuildLibrary, "build_protocol": BuildProtocol, "bdist_wheel": OneWheel},
)
