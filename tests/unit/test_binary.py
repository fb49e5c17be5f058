"""`_C.so` is what it has to be to load under any PyTorch from 2.10, any Python, with or without CUDA.

Each check is a function of a tool's output that returns what is wrong, so that a negative control can feed it something
wrong.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LIBRARY = ROOT / "mnnvl_ar" / "_C.so"
CONFIG = ROOT / "build" / "release" / "config.json"

# LibTorch's functions that are called. A name to be added must be part of the stable C shim as of 2.10: declared in
# PyTorch 2.10's aoti_torch/c/shim.h or stable/c/shim.h, outside of USE_CUDA and of any TORCH_FEATURE_VERSION above
# 2.10. Any other undefined symbol must carry a system library's version.
STRONG = {
    "aoti_torch_abi_version",
    "aoti_torch_delete_library_object",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_device_type_cpu",
    "aoti_torch_device_type_cuda",
    "aoti_torch_dtype_bfloat16",
    "aoti_torch_dtype_float16",
    "aoti_torch_dtype_float32",
    "aoti_torch_dtype_float64",
    "aoti_torch_dtype_float8_e4m3fn",
    "aoti_torch_dtype_int64",
    "aoti_torch_dtype_int32",
    "aoti_torch_dtype_int8",
    "aoti_torch_dtype_uint8",
    "aoti_torch_empty_strided",
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_device_index",
    "aoti_torch_get_device_type",
    "aoti_torch_get_dim",
    "aoti_torch_get_dtype",
    "aoti_torch_get_numel",
    "aoti_torch_get_size",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_is_contiguous",
    "aoti_torch_library_def",
    "aoti_torch_library_init_def",
    "aoti_torch_library_init_fragment",
    "aoti_torch_library_init_impl",
    "aoti_torch_new_tensor_handle",
    "torch_delete_list",
    "torch_library_impl",
    "torch_list_get_item",
    "torch_list_push_back",
    "torch_list_size",
    "torch_new_list_reserve_size",
    "torch_new_string_handle",
}
# Weak symbols read as null where absent: the CUDA stream's under a PyTorch without CUDA, what a call failed of under an
# old one, the compiler's own hooks.
WEAK = {"aoti_torch_get_current_cuda_stream", "torch_exception_get_what_without_backtrace"}
WEAK |= {"__cxa_finalize", "__gmon_start__", "__pthread_key_create"}
# Of Python's stable ABI: csrc/host/interrupt.h.
WEAK |= {"PyGILState_Ensure", "PyGILState_Release", "PyErr_CheckSignals", "PyErr_Fetch", "PyErr_Restore"}
WEAK |= {"Py_AddPendingCall"}
WEAK |= {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
# For mnnvl_ar/bound.py, by ctypes.
OURS = {"mnnvl_ar_run_bound"}
# Ubuntu 22.04, Debian 12; RHEL 9 with the libstdc++ of GCC 12.
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (7, 0, 0)}
NEEDED = re.compile(r"libtorch\.so|libtorch_cpu\.so|lib(stdc\+\+|m|c|gcc_s|rt|dl|pthread|atomic)\.so\.\d+|ld-linux.*")
# setup.py's default, once more: what is shipped must not change by a slip there.
ARCHS = ["90a", "100f", "ptx"]
# Bytes of stack frame that are accepted, by a part of the kernel's mangled name; say why beside each.
STACK_ALLOWED: dict[str, int] = {}
MAX_BYTES = 10 * 2**20


# ---- what is wrong, given a tool's output


def wrong_undefined(nm: str) -> list[str]:
    """Undefined symbols (`nm -D --undefined-only`) that are neither a system library's nor named in STRONG or WEAK."""
    wrong = []
    for kind, name, version in re.findall(r"^\s*([UwvV]) ([^@\s]+)(@\S+)?$", nm, re.MULTILINE):
        system = re.match(r"@@?(GLIBC|GLIBCXX|CXXABI|GCC)_", version)
        if not system and name not in (STRONG if kind == "U" else WEAK):
            wrong.append(f"{kind} {name}{version}")
    return wrong


def too_new(nm: str) -> list[str]:
    """Symbols whose version is newer than the oldest systems supported have."""
    found = re.findall(r"(\S+)@@?(GLIBCXX|GLIBC|CXXABI|GCC)_([\d.]+)", nm)
    return [f"{name}@{lib}_{v}" for name, lib, v in found if tuple(map(int, v.split("."))) > NEWEST[lib]]


def wrong_exports(nm: str) -> list[str]:
    """Symbols given to others (`nm -D --defined-only`) that belong to one Python or that others could bind to."""
    names = [line.split()[-1] for line in nm.splitlines() if line.strip()]
    return [name for name in names if name.startswith(("PyInit", "cuda")) or ("mnnvl_ar" in name and name not in OURS)]


def wrong_needed(readelf: str) -> list[str]:
    """Libraries needed (`readelf -d`) other than LibTorch's two and the system's; and those two where they are not."""
    names = re.findall(r"\(NEEDED\).*\[(.*)\]", readelf)
    missing = [f"no {name}" for name in ("libtorch.so", "libtorch_cpu.so") if name not in names]
    return missing + [name for name in names if not NEEDED.fullmatch(name)]


def wrong_archs(listing: str, archs: list[str]) -> list[str]:
    """Differences between the code listed by `cuobjdump --list-elf`, `--list-ptx` and that configured.

    cuobjdump names family code (100f) by its first member (100); ptxas's log tells the two apart.
    """
    found = {f"{kind} {arch}".removesuffix("f") for kind, arch in re.findall(r"(ELF|PTX) file.*\.(sm_\w+)\.", listing)}
    wanted = {"PTX sm_90" if arch == "ptx" else f"ELF sm_{arch}".removesuffix("f") for arch in archs}
    return [f"no {code}" for code in sorted(wanted - found)] + [f"unwanted {code}" for code in sorted(found - wanted)]


def wrong_kernels(ptxas: str) -> list[str]:
    """Functions in ptxas's log that spill or use more stack than accepted."""
    wrong = []
    figures_of = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    for name, *figures in re.findall(rf"Function properties for (\S+)\s+{figures_of}", ptxas):
        stack, stores, loads = map(int, figures)
        accepted = max([size for part, size in STACK_ALLOWED.items() if part in name], default=0)
        if stores or loads or stack > accepted:
            wrong.append(f"{name}: {stack} bytes of stack, {stores} of spill stores, {loads} of spill loads")
    return wrong


# ---- the library


def output_of(tool: str, *arguments: str) -> str:
    places = [os.environ.get("PATH", ""), os.environ.get("CUDA_HOME", "/none") + "/bin"]
    nvidia = importlib.util.find_spec("nvidia")
    folders = (nvidia and nvidia.submodule_search_locations) or ()
    places += [str(bin) for folder in folders for bin in Path(folder).glob("cu*/bin")]
    program = shutil.which(tool, path=os.pathsep.join(places))
    if program is None:
        pytest.skip(f"no {tool} on this machine")
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def library() -> str:
    assert LIBRARY.exists(), "not built; run `make build`"
    return str(LIBRARY)


@pytest.fixture(scope="module")
def config() -> dict:
    if not CONFIG.exists():
        pytest.skip("not built in this tree: no build/release/config.json to compare with")
    got: dict = json.loads(CONFIG.read_text())
    return got


@pytest.fixture(scope="module")
def cuda_config(config: dict) -> dict:
    if not config["cuda"]:
        pytest.skip("built without nvcc: host transport only")
    return config


def test_undefined_symbols(library: str) -> None:
    wrong = wrong_undefined(output_of("nm", "-D", "--undefined-only", library))
    assert not wrong, f"a name of PyTorch 2.10's stable C shim (see STRONG) may be added there; no other: {wrong}"


def test_symbol_versions(library: str) -> None:
    name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "other 0.0").split()
    wrong = too_new(output_of("nm", "-D", "--undefined-only", library))
    if wrong and (name != "glibc" or tuple(map(int, version.split("."))) > (2, 36)):
        pytest.skip(f"built against {name} {version}, so not for older systems: {', '.join(wrong[:5])}")
    assert wrong == []


def test_exports(library: str) -> None:
    assert wrong_exports(output_of("nm", "-D", "--defined-only", library)) == []


def test_needed_libraries(library: str) -> None:
    assert wrong_needed(output_of("readelf", "-d", library)) == []


def test_size(library: str) -> None:
    assert os.path.getsize(library) <= MAX_BYTES


def test_architectures(library: str, cuda_config: dict) -> None:
    listing = output_of("cuobjdump", "--list-elf", library) + output_of("cuobjdump", "--list-ptx", library)
    assert wrong_archs(listing, cuda_config["archs"]) == []
    log = (ROOT / cuda_config["ptxas"]).read_text()
    compiled = set(re.findall(r"Compiling entry function '\S+' for 'sm_(\w+)'", log))
    assert compiled == set(cuda_config["archs"]) - {"ptx"}


def test_the_default_is_what_was_built(library: str, cuda_config: dict) -> None:
    if cuda_config["wanted"] is not None:
        pytest.skip(f"built with MNNVL_AR_ARCHS={cuda_config['wanted']}, not as it is shipped")
    listing = output_of("cuobjdump", "--list-elf", library) + output_of("cuobjdump", "--list-ptx", library)
    assert wrong_archs(listing, ARCHS) == []


def test_no_spills(cuda_config: dict) -> None:
    log = (ROOT / cuda_config["ptxas"]).read_text()
    assert "Function properties for" in log
    assert wrong_kernels(log) == []


def test_loads_in_a_process_of_its_own(library: str) -> None:
    code = f"import torch; torch.ops.load_library({library!r}); print(len(torch.ops.mnnvl_ar.__dict__) > 0)"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert got.returncode == 0, got.stderr


# ---- negative controls: each check finds what it is for


@pytest.mark.parametrize(
    "line",
    [
        "                 U _ZN3c106detail14torchCheckFailEPKcS2_jRKSs",
        "                 U _ZNK2at6Tensor4sizeEl",
        "                 U PyObject_Call",
        "                 U _Py_Dealloc",
        "                 U cudaMalloc",
        "                 U cuMemCreate",
        "                 U cudaMalloc@libcudart.so.13",
        "                 U _ZN8mnnvl_ar6launchEv",
        "                 w torch_c10_cuda_check_msg",
        "                 U torch_c10_cuda_check_msg",
        "                 U aoti_torch_get_current_cuda_stream",
        "                 U aoti_torch_cuda_mm_out",
        "                 U torch_exception_get_what_without_backtrace",
        "                 w aoti_torch_abi_version",
    ],
)
def test_a_forbidden_symbol_is_found(line: str) -> None:
    good = "                 U aoti_torch_abi_version\n                 U malloc@GLIBC_2.2.5\n"
    good += "                 w aoti_torch_get_current_cuda_stream\n"
    assert wrong_undefined(good) == []
    assert len(wrong_undefined(good + line + "\n")) == 1


def test_a_version_too_new_is_found() -> None:
    assert too_new("U a@GLIBC_2.34\nU b@GLIBCXX_3.4.30\nU c@CXXABI_1.3\nw d@GLIBC_2.2.5\n") == []
    assert too_new("U a@GLIBC_2.38\nU b@GLIBCXX_3.4.32\n") == ["a@GLIBC_2.38", "b@GLIBCXX_3.4.32"]


@pytest.mark.parametrize("name", ["PyInit__C", "_ZN8mnnvl_ar4cuda6launchEv", "cudaMalloc"])
def test_a_forbidden_export_is_found(name: str) -> None:
    assert wrong_exports(f"0000000000001000 T {name}\n") == [name]


@pytest.mark.parametrize("name", ["libcudart.so.13", "libcuda.so.1", "libc10.so", "libpython3.so", "libtorch_cuda.so"])
def test_a_forbidden_library_is_found(name: str) -> None:
    good = "(NEEDED) Shared library: [libtorch.so]\n(NEEDED) Shared library: [libtorch_cpu.so]\n"
    assert wrong_needed(good) == []
    assert wrong_needed(good + f"(NEEDED) Shared library: [{name}]\n") == [name]


def test_a_library_without_libtorch_is_found() -> None:
    assert wrong_needed("(NEEDED) Shared library: [libtorch_cpu.so]\n") == ["no libtorch.so"]


def test_a_missing_architecture_is_found() -> None:
    listing = "ELF file    1: _C.1.sm_90a.cubin\nPTX file    1: _C.1.sm_90.ptx\n"
    assert wrong_archs(listing, ["90a", "ptx"]) == []
    assert wrong_archs(listing, ["90a", "100f"]) == ["no ELF sm_100", "unwanted PTX sm_90"]


@pytest.mark.parametrize(("figures", "wrong"), [((0, 0, 0), 0), ((8, 0, 0), 1), ((8, 4, 4), 1), ((0, 0, 4), 1)])
def test_a_spill_is_found(figures: tuple[int, int, int], wrong: int) -> None:
    line = "{} bytes stack frame, {} bytes spill stores, {} bytes spill loads".format(*figures)
    assert len(wrong_kernels(f"ptxas info    : Function properties for _Z1kv\n    {line}\n")) == wrong
