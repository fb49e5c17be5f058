"""`make wheel`: the sdist, and from it a wheel for x86-64 and one for aarch64, as they are given away.

    python -m tools.wheels [MACHINE...] [--out dist] [--work build/wheel] [--twice]

Each wheel is built from the unpacked sdist, so that nothing of the working tree gets in that the sdist has not, by the
CUDA of COMPILER and TARGET, whatever else is installed, and by g++ or, for the other machine, its cross compiler
(apt-get install g++-aarch64-linux-gnu). auditwheel then names the oldest system that it installs on; PyTorch's
libraries come from the PyTorch that is there, the driver's are opened when they are needed. Says each wheel's digest:
another folder gives the same, which `--twice` checks. `--work` keeps the objects for the next time. MNNVL_AR_CUDA=0:
host transport only.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from tools import ROOT

MACHINES = ("x86_64", "aarch64")
EPOCH = "315532800"  # for auditwheel, as in setup.py: it packs the wheel anew
# 13.0 and not later: what its compiler makes runs under the oldest driver of CUDA 13.
COMPILER = ("nvidia-cuda-nvcc==13.0.88", "nvidia-nvvm==13.0.88")
TARGET = ("nvidia-cuda-crt==13.0.88", "nvidia-cuda-cccl==13.0.85", "nvidia-cuda-runtime==13.0.96")


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {"SOURCE_DATE_EPOCH": EPOCH, **os.environ, "PATH": path, **variables}
    got = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE)
    if got.returncode:
        sys.exit(f"{got.stdout}tools.wheels: {' '.join(map(str, command))}: status {got.returncode}")
    return got.stdout


def make_sdist(out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as egg, tempfile.TemporaryDirectory() as made:
        run(sys.executable, "setup.py", "-q", "egg_info", "-e", egg, "sdist", "-d", made)
        (sdist,) = Path(made).iterdir()
        return Path(shutil.copy2(sdist, out))


def unpack(sdist: Path, folder: Path) -> None:
    """Into `folder`, in which nothing else is left but the objects of the last build."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("build/lib*"), *folder.glob("build/bdist*"), *folder.iterdir()):
        if old.name != "build":
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    with tempfile.TemporaryDirectory(dir=folder.parent) as place, tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
        (top,) = Path(place).iterdir()
        for each in top.rglob("*"):  # whatever the umask was where the sdist was made
            each.chmod(0o755 if each.is_dir() or each.stat().st_mode & 0o100 else 0o644)
        for each in top.iterdir():
            each.rename(folder / each.name)


def unpack_cuda(folder: Path, machine: str) -> None:
    """A toolkit: compilers for the machine at hand, headers and the static runtime for `machine`."""
    pins = " ".join((*COMPILER, *TARGET, machine))
    if (folder / "pins").exists() and (folder / "pins").read_text() == pins:
        return
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as wheels:
        for packages, arch in ((COMPILER, platform.machine()), (TARGET, machine)):
            tags = [f"--platform={tag}_{arch}" for tag in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")]
            pip = (sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--only-binary=:all:")
            run(*pip, *tags, "-d", wheels, *packages)
        for wheel in Path(wheels).iterdir():
            zipfile.ZipFile(wheel).extractall(folder)
    for program in folder.rglob("bin/*"):
        program.chmod(0o755)
    (folder / "pins").write_text(pins)


def make_torch_stubs(folder: Path, compiler: str) -> None:
    """libtorch.so and libtorch_cpu.so as far as a linker needs them: the C shim's names, alike on all machines."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        sys.exit("tools.wheels: torch is needed to build")
    symbols = run("nm", "-D", "--defined-only", Path(torch.origin).parent / "lib" / "libtorch_cpu.so")
    names = re.findall(r" T ((?:aoti_)?torch_\w+)$", symbols, re.MULTILINE)
    folder.mkdir(parents=True, exist_ok=True)
    for library, defined in (("libtorch.so", []), ("libtorch_cpu.so", names)):
        (folder / "stub.c").write_text("".join(f"void {name}(void) {{}}\n" for name in defined))
        flags = ("-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{library}")
        run(compiler, "-x", "c", "stub.c", *flags, "-o", library, cwd=folder)


def make_wheel(sdist: Path, machine: str, out: Path, work: Path) -> Path:
    source = work / machine
    unpack(sdist, source)
    variables = {"MNNVL_AR_CUDA": os.environ.get("MNNVL_AR_CUDA", "1"), "_PYTHON_HOST_PLATFORM": f"linux-{machine}"}
    if variables["MNNVL_AR_CUDA"] != "0":
        unpack_cuda(source / "build" / "cuda", machine)
        variables["CUDA_HOME"] = str(source / "build/cuda/nvidia/cu13")
    if machine != platform.machine():
        compiler = f"{machine}-linux-gnu-g++"
        if shutil.which(compiler) is None:
            sys.exit(f"tools.wheels: no {compiler}: apt-get install {compiler.replace('x86_64', 'x86-64')}")
        make_torch_stubs(source / "build" / "torch", compiler)
        variables["CXX"] = f"{compiler} -Lbuild/torch"  # ld passes over the libraries of another machine
    run(sys.executable, "setup.py", "-q", "bdist_wheel", "-d", "dist", cwd=source, **variables)
    (built,) = (source / "dist").iterdir()
    with tempfile.TemporaryDirectory() as repaired:
        excluded = ("--exclude", "libtorch.so", "--exclude", "libtorch_cpu.so")
        run(sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", repaired, built)
        (wheel,) = Path(repaired).iterdir()
        return Path(shutil.copy2(wheel, out))


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds the sdist and the wheels that are given away.")
    parser.add_argument("machines", nargs="*", metavar="MACHINE", help=f"by default {' and '.join(MACHINES)}")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "wheel")
    parser.add_argument("--twice", action="store_true", help="build once more in another folder, and compare")
    args = parser.parse_args()
    os.umask(0o022)  # modes are in a wheel
    made = [make_sdist(args.out.resolve())]
    for machine in args.machines or MACHINES:
        made.append(make_wheel(made[0], machine, args.out.resolve(), args.work.resolve()))
        print(run(sys.executable, "-m", "auditwheel", "show", made[-1]), flush=True)
        with tempfile.TemporaryDirectory() as other:
            again = make_wheel(made[0], machine, Path(other), Path(other, "work")) if args.twice else made[-1]
            if again.read_bytes() != made[-1].read_bytes():
                sys.exit(f"tools.wheels: {again.name}: another folder gives other bytes")
    print(run(sys.executable, "-m", "twine", "check", "--strict", *made), end="")
    for each in made[1:]:
        print(f"{hashlib.sha256(each.read_bytes()).hexdigest()}  {each.name}")


if __name__ == "__main__":
    main()
