"""Compiles the twin's kernels, for any of its architectures, without a GPU.

    python -m mnnvl_ar.dsl.build [--epilogue module:function] [--ranks 2,4,8] [--archs sm_90a,sm_100a] [--out FOLDER]
    python mnnvl_ar/dsl/build.py ...        the same, where there is the DSL but no PyTorch

Contract
  * compile_kernel() gives the cubin of one kernel, the same bytes each time. A raw cubin, and not the DSL's own object
    file: its parameters are plain numbers, so it is launched as any other kernel is, with our attributes, by a process
    that has no DSL.
  * Only the version of the DSL that the extra pins is used. `DslMissing` says what is there, and what is wanted.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":
    if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:  # run as a file: what lies here is no module
        sys.path[0] = ""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("mnnvl_ar") is None:
        package = ModuleType("mnnvl_ar")  # without what its own __init__ imports
        package.__path__ = [str(Path(__file__).resolve().parent.parent)]
        sys.modules["mnnvl_ar"] = package

from mnnvl_ar.dsl import constants, cubins

WANTED = f"wanted nvidia-cutlass-dsl=={constants.DSL} (pip install 'mnnvl-ar[dsl]')"


class DslMissing(RuntimeError):
    """There is no DSL, or not the one that this was made with."""


def check_dsl() -> None:
    try:
        version = importlib.metadata.version("nvidia-cutlass-dsl")
    except importlib.metadata.PackageNotFoundError:
        raise DslMissing(f"nvidia-cutlass-dsl: is not installed, {WANTED}") from None
    if version != constants.DSL:
        raise DslMissing(f"nvidia-cutlass-dsl: is {version}, {WANTED}")


def compile_kernel(ranks: int, architecture: str, epilogue: str = "") -> cubins.Built:
    """ranks: 2, 4 or 8; architecture: of `constants.ARCHITECTURES`; epilogue: "module:function", or "" for the norm
    alone. Errors: `ValueError` naming argument, got and wanted; `DslMissing`."""
    if ranks not in constants.WORLD_SIZES:
        raise ValueError(f"ranks: is {ranks}, wanted one of {', '.join(map(str, constants.WORLD_SIZES))}")
    if architecture not in constants.ARCHITECTURES.values():
        wanted = ", ".join(constants.ARCHITECTURES.values())
        raise ValueError(f"architecture: is {architecture!r}, wanted one of {wanted}")
    check_dsl()
    from cutlass import Uint32, Uint64, cute
    from cutlass.base_dsl import compiler

    from mnnvl_ar.dsl import one_shot

    function = one_shot.rms_norm
    if epilogue:
        module, _, name = epilogue.partition(":")
        function = getattr(importlib.import_module(module), name)
    with tempfile.TemporaryDirectory() as scratch:
        options = (
            compiler.GPUArch(architecture),
            compiler.KeepCUBIN(True),
            compiler.DumpDir(scratch),
        )
        arguments = [*[Uint64(0)] * 16, *[Uint32(0)] * 13]
        compiled = cute.compile[options](one_shot.launch_one_shot, *arguments, ranks, function)
        (kernel,) = compiled.kernel_info
        cubin = compiled.__cubin__
    if not isinstance(cubin, bytes):
        raise DslMissing(f"nvidia-cutlass-dsl {constants.DSL}: kept no cubin")
    return cubins.Built(cubin, kernel)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epilogue", default="", help="module:function; without, the norm alone")
    parser.add_argument("--ranks", default=",".join(map(str, constants.WORLD_SIZES)))
    parser.add_argument("--archs", default=",".join(constants.ARCHITECTURES.values()))
    parser.add_argument("--out", type=Path, default=cubins.FOLDER)
    options = parser.parse_args()
    if "" not in sys.path:
        sys.path.insert(0, "")  # epilogues of the current folder
    for architecture in options.archs.split(","):
        for ranks in map(int, options.ranks.split(",")):
            built = compile_kernel(ranks, architecture, options.epilogue)
            file = cubins.keep(built, ranks, architecture, options.epilogue, options.out)
            print(f"{file}: {len(built.cubin)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
