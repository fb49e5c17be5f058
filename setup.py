"""Builds `mnnvl_ar/_C.so`, or one of its test variants, with ninja. What is built is chosen by the environment:

MNNVL_AR_ARCHS         GPU code, default "90a;100f;ptx"; never guessed from the GPU at hand
MNNVL_AR_CUDA=0        leave the CUDA transport out even where there is an nvcc
MNNVL_AR_TEST_BUILD=1  -> tests/_C_test.so, in which tests can switch guards off (negative controls)
MNNVL_AR_BARE=1        -> tests/_C_bare.so, without what ends a wait or notices a mistake; tools/safety_cost.py times it
MNNVL_AR_SANITIZE      thread -> tests/_C_tsan.so, address -> tests/_C_asan.so; host transport only
CXX, CUDA_HOME, MAX_JOBS as usual

`setup.py build_ext --inplace` builds that; `setup.py build_protocol` builds the unit tests' pybind11 module
tests/_protocol.<abi>.so; `setup.py find_nvcc` fails where an nvcc is still to be installed.
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
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
env = os.environ.get
ARCHS = [arch for arch in env("MNNVL_AR_ARCHS", "90a;100f;ptx").split(";") if arch]
SANITIZE = env("MNNVL_AR_SANITIZE", "")
PLAIN = "bare" if env("MNNVL_AR_BARE") == "1" else "test" if env("MNNVL_AR_TEST_BUILD") == "1" else "release"
VARIANT = {"thread": "tsan", "address": "asan", "": PLAIN}[SANITIZE]
CUDA_WANTED = env("MNNVL_AR_CUDA") != "0" and not SANITIZE
GPUS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvgpu")  # as in the Makefile
CXX_FLAGS = "-std=c++20 -O3 -ffp-contract=off -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas -Icsrc"
NVCC_FLAGS = (
    "-std=c++20 -O3 -t 1 -fmad=false -ftz=false -prec-div=true -prec-sqrt=true --expt-relaxed-constexpr"
    " -Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wno-unknown-pragmas -Xptxas -v"
    " --compress-mode=size -Icsrc"
)
# The rooms of csrc and how each is compiled: "cuda" by nvcc, "host" by the C++ compiler, "torch" with LibTorch's
# headers as well; None holds headers only. A file in no room, or of a kind that its room does not compile, ends the
# build.
ROOMS = {
    "protocol": None,
    "kernels": None,
    "epilogues": "cuda",
    "launch": "host",
    "host": None,
    "diagnosis": "host",
    "torch": "torch",
    "torch/ops": "torch",
}
HEADERS, SOURCES = (".h", ".cuh"), {"cuda": ".cu", "host": ".cpp", "torch": ".cpp"}
RULES = """
rule cxx
  command = $cxx -MMD -MF $out.d $flags -c $in -o $out
  description = C++ $in
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $nvcc -MD -MF $out.d $flags -c $in -o $out 2> $out.log; s=$$?; $
    grep -vE 'ptxas info|bytes stack frame' $out.log >&2; exit $$s
  description = CUDA $in
  depfile = $out.d
  deps = gcc
rule gather
  command = cat $in > $out
  description = gather $out
rule link
  command = $cxx -shared $in $flags -o $out
  description = link $out
"""


def stop(why: str) -> str:
    sys.exit(f"mnnvl_ar: {why}")


def package_folder(name: str) -> str:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    folders = spec and spec.submodule_search_locations
    return folders[0] if folders else stop(f"{name} is needed to build: pip install it, use --no-build-isolation")


def find_cxx() -> str:
    """The C++ compiler; it must know C++20's std::atomic_ref."""
    cxx = env("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), "g++")
    probe = "#include <atomic>\nint f(int i) { return std::atomic_ref<int>(i).load(); }\n"
    command = f"{cxx} -std=c++20 -fsyntax-only -x c++ -"
    got = subprocess.run(command, shell=True, input=probe, text=True, capture_output=True)
    first = got.stderr.partition("\n")[0]
    return stop(f"no C++20 compiler ({first}): install g++ 10 or later, or set CXX") if got.returncode else cxx


def release_of(nvcc: str) -> tuple[int, int]:
    """nvcc's version; (0, 0) if it does not say."""
    said = subprocess.run([nvcc, "--version"], text=True, capture_output=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    return (int(release[1]), int(release[2])) if release else (0, 0)


def find_nvcc() -> str | None:
    """The first nvcc new enough: of $CUDA_HOME, of pip's cuda-toolkit[nvcc,cccl,cudart], on PATH. None, and a line to
    say so, where there is none; but where all are too old and there is a GPU, an error: it would be left unused.
    """
    if not CUDA_WANTED:
        print("mnnvl_ar: CUDA not wanted: host transport only", flush=True)
        return None
    pip = importlib.util.find_spec("nvidia")
    folders = (pip and pip.submodule_search_locations) or ()
    places = [f"{env('CUDA_HOME') or '/none'}/bin", *(str(bin) for f in folders for bin in Path(f).glob("cu*/bin"))]
    old = []
    for nvcc in (shutil.which("nvcc", path=place) for place in [*places, *env("PATH", os.defpath).split(os.pathsep)]):
        release = release_of(nvcc) if nvcc else (0, 0)
        if release >= (12, 9):  # the first that knows sm_100f
            return nvcc
        if nvcc:
            old.append(f"nvcc {release[0]}.{release[1]} at {nvcc} is too old (12.9 needed)")
    if old and any(map(os.path.exists, GPUS)):
        stop(f"{old[0]}: set CUDA_HOME to a newer one, or MNNVL_AR_CUDA=0 to go without")
    print(f"mnnvl_ar: {old[0] if old else 'no nvcc'}: host transport only", flush=True)
    return None


def toolkit_folders(nvcc: str) -> tuple[list[str], list[str]]:
    """nvcc's include and library folders, as nvcc itself says: the one on PATH may be a script far from its toolkit."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], text=True, capture_output=True).stderr
    words = [word for line in re.findall(r"(?:INCLUDES|LIBRARIES)=(.*)", said) for word in shlex.split(line)]
    libraries = [os.path.normpath(word[2:]) for word in words if word.startswith("-L")]
    includes = [word.removeprefix("-I") for word in words if not word.startswith("-L") and word != "-isystem"]
    return [os.path.normpath(folder) for folder in includes], libraries


def sources(csrc: Path) -> list[tuple[Path, str]]:
    """Every file to be compiled, with the way of its room."""
    found = []
    for file in sorted(path for path in csrc.rglob("*") if path.is_file()):
        room = str(file.parent.relative_to(csrc))
        if room not in ROOMS:
            stop(f"csrc/{file.relative_to(csrc)}: no such room: say in ROOMS of setup.py how csrc/{room} is compiled")
        way = ROOMS[room]
        if way and file.suffix == SOURCES[way]:
            found.append((file, way))
        elif file.suffix not in HEADERS:
            stop(f"csrc/{file.relative_to(csrc)}: csrc/{room} compiles {SOURCES[way] if way else 'nothing'}")
    return found


def run_ninja(variant: str, variables: dict[str, str], edges: list[str], target: Path) -> None:
    """Builds build/<variant>/out.so and puts it at `target`. One build of a variant at a time."""
    folder = ROOT / "build" / variant
    folder.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([sysconfig.get_path("scripts"), env("PATH", os.defpath)])
    ninja = shutil.which("ninja", path=path) or stop("ninja is needed to build: pip install ninja")
    jobs = env("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = "".join(f"{name} = {value}\n" for name, value in {"builddir": f"build/{variant}", **variables}.items())
        (folder / "build.ninja").write_text(text + RULES + "\n".join(edges) + "\n")
        if subprocess.run([ninja, "-f", folder / "build.ninja", "-j", jobs], cwd=ROOT).returncode:
            stop(f"the build failed; its commands are in build/{variant}/build.ninja")
        built, new = folder / "out.so", target.with_suffix(".new")
        if not target.exists() or target.read_bytes() != built.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built, new)
            os.replace(new, target)  # a new inode, so that a process which has the old one loaded keeps it


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:  # no Python version in the name
        return "mnnvl_ar/_C.so" if "." in fullname else "_C.so"

    def run(self) -> None:
        target = ROOT / ("mnnvl_ar/_C.so" if VARIANT == "release" else f"tests/_C_{VARIANT}.so")
        cxx, nvcc, torch = find_cxx(), find_nvcc(), package_folder("torch")
        includes, libraries = toolkit_folders(nvcc) if nvcc else ([], [])
        defines = f"-DMNNVL_AR_CUDA={int(nvcc is not None)}" + {"release": "", "bare": " -DMNNVL_AR_BARE"}.get(
            VARIANT, " -DMNNVL_AR_TEST_BUILD"
        )
        sanitize = f" -g -fno-omit-frame-pointer -fsanitize={SANITIZE}" if SANITIZE else ""
        host = f"{CXX_FLAGS} {defines}{sanitize}" + "".join(f" -isystem {folder}" for folder in includes)
        stable = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # PyTorch 2.10
        flags = {"host": host, "torch": f"{host} -isystem {torch}/include -ffile-prefix-map={torch}=torch {stable}"}
        codes = ("compute_90,code=compute_90" if arch == "ptx" else f"compute_{arch},code=sm_{arch}" for arch in ARCHS)
        ccbin = [word for word in cxx.split() if not word.startswith("-")][-1]
        lines = "" if VARIANT == "release" else " -lineinfo"  # for sanitizers and profilers; two thirds of a library
        flags["cuda"] = f"-ccbin {ccbin} {NVCC_FLAGS}{lines} {defines}" + "".join(
            f" -gencode=arch={code}" for code in codes
        )
        edges, objects, logs = [], [], []
        for source, way in sources(ROOT / "csrc"):
            if way == "cuda" and not nvcc:
                continue
            file = source.relative_to(ROOT / "csrc")
            objects.append(f"build/{VARIANT}/{file.with_suffix('.o')}")
            log, rule = (f" | {objects[-1]}.log", "nvcc") if way == "cuda" else ("", "cxx")
            logs += [f"{objects[-1]}.log"] if log else []
            edges.append(f"build {objects[-1]}{log}: {rule} csrc/{file}\n  flags = {flags[way]}")
        ptxas = "build/ptxas.log" if VARIANT == "release" else f"build/{VARIANT}/ptxas.log"
        edges.append(f"build {ptxas}: gather {' '.join(logs) or '/dev/null'}")
        link = f"-L{torch}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -Wl,--as-needed -Wl,--exclude-libs,ALL"
        link += "".join(f" -L{folder}" for folder in libraries) + " -lcudart_static" * (nvcc is not None)
        link += " -lrt -ldl -lpthread" + (sanitize or " -Wl,-z,defs")
        edges.append(f"build build/{VARIANT}/out.so: link {' '.join(objects)}\n  flags = {link}")
        run_ninja(VARIANT, {"cxx": cxx, "nvcc": nvcc or ""}, edges, target)
        config = {
            "cuda": nvcc is not None,
            "wanted": env("MNNVL_AR_ARCHS"),
            "archs": ARCHS if nvcc else [],
            "ptxas": ptxas,
        }
        (ROOT / "build" / VARIANT / "config.json").write_text(json.dumps(config))
        if not self.inplace and not self.editable_mode:
            copy = self.get_ext_fullpath("mnnvl_ar._C")
            self.mkpath(os.path.dirname(copy))
            self.copy_file(str(target), copy)


class BuildProtocol(build_ext):
    def run(self) -> None:
        python = sysconfig.get_path("include")
        target = ROOT / "tests" / f"_protocol{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not Path(python, "Python.h").exists():
            target.unlink(missing_ok=True)
            print("mnnvl_ar: no Python.h (apt-get install python3-dev): csrc/protocol's tests are skipped", flush=True)
            return
        flags = f"{CXX_FLAGS} -isystem {python} -isystem {package_folder('pybind11')}/include"
        names = ("protocol", "quantised")
        edges = [f"build build/protocol/{name}.o: cxx tests/native/{name}.cpp\n  flags = {flags}" for name in names]
        edges.append(f"build build/protocol/out.so: link {' '.join(f'build/protocol/{name}.o' for name in names)}")
        run_ninja("protocol", {"cxx": find_cxx()}, edges, target)


class FindNvcc(Command):
    """Fails if CUDA is wanted and there is no nvcc for it, so that the Makefile can install pip's."""

    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        sys.exit(CUDA_WANTED and find_nvcc() is None)


class OneWheel(bdist_wheel):
    """One wheel for every Python: `_C.so` has no PyInit and is loaded by torch.ops.load_library."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("mnnvl_ar._C", sources=[])],
    cmdclass={
        "build_ext": BuildLibrary,
        "build_protocol": BuildProtocol,
        "find_nvcc": FindNvcc,
        "bdist_wheel": OneWheel,
    },
)
