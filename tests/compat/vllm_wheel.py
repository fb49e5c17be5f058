"""vLLM's communicator and pass manager, as they are in a wheel, and our classes on them; the rest of vLLM is stubbed.

with in_place(Texts.of("0.33.0"), world_size=2) as stage:
    stage.platform, stage.classes    # our modules, freshly loaded on this release
    stage.config                     # as much of a VllmConfig as they read
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.custom_graph_pass  # not while `sys.modules` is patched, which would take it away again

from compat import vllm_ops
from compat.wheels import text_of

BASE = "vllm.distributed.device_communicators.base_device_communicator"
COMMUNICATOR = "vllm.distributed.device_communicators.cuda_communicator"
INDUCTOR_PASS = "vllm.compilation.passes.inductor_pass"
PASSES = "vllm.compilation.passes.pass_manager"
EXECUTED = (BASE, COMMUNICATOR, INDUCTOR_PASS, PASSES)  # in this order
OURS = ("mnnvl_ar.compat.vllm_platform", "mnnvl_ar.compat.vllm_classes")


@dataclass(frozen=True)
class Texts:
    """The wheel's files, by module; whether its IR has the norm of a sum and a residual."""

    files: dict[str, str]
    adds: bool

    @staticmethod
    def of(version: str) -> Texts:
        files = {name: text_of("vllm", version, f"{name.replace('.', '/')}.py") for name in EXECUTED}
        return Texts(files, "def fused_add_rms_norm(" in text_of("vllm", version, "vllm/ir/ops/layernorm.py"))


class Stage(SimpleNamespace):
    root: Any  # of the stubs
    platform: Any
    classes: Any
    config: Any


class Theirs:
    """One of vLLM's passes, which does nothing."""

    def __init__(self, config: Any) -> None: ...

    def __call__(self, graph: Any) -> None: ...

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        return True

    def uuid(self) -> str:
        return "theirs"

    @staticmethod
    def log_match_summary() -> None: ...


class CudaPlatform:
    """As much of vLLM's as ours calls."""

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return f"{COMMUNICATOR}.CudaCommunicator"

    @classmethod
    def get_pass_manager_cls(cls) -> str:
        return f"{PASSES}.PostGradPassManager"

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None: ...


class PassConfig:
    """The passes that are switched on have a name here."""

    eliminate_noops = fuse_norm_quant = fuse_allreduce_rms = True

    def __init__(self, max_size: int | None = None) -> None:
        self.max_size = max_size

    def __getattr__(self, name: str) -> bool:
        if name.startswith(("fuse_", "enable_")):
            return False
        raise AttributeError(name)

    def flashinfer_max_size(self, world_size: int) -> int | None:
        return self.max_size

    def compute_hash(self) -> str:
        return ""


def config(world_size: int, hidden: int, *, max_tokens: int, max_size: int | None) -> Any:
    model = SimpleNamespace(
        get_hidden_size=lambda: hidden, dtype=torch.bfloat16, using_transformers_backend=lambda: False
    )
    compilation = SimpleNamespace(pass_config=PassConfig(max_size), custom_ops=["none"], compile_ranges_endpoints=None)
    return SimpleNamespace(
        model_config=model,
        speculative_config=None,
        parallel_config=SimpleNamespace(
            tensor_parallel_size=world_size,
            data_parallel_size=1,
            all2all_backend="",
            enable_expert_parallel=False,
            use_sequence_parallel_moe=False,
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=max_tokens),
        compilation_config=compilation,
        additional_config={},
        use_cumem_cudagraph_pool=False,
    )


def _stub(files: dict[str, str], root: Any) -> dict[str, Any]:
    """Mocks of what the files import of vLLM, `from . import` included; the modules by name."""
    modules: dict[str, Any] = {"vllm": root}

    def add(name: str) -> None:
        parts = name.split(".")
        for length in range(2, len(parts) + 1):
            full = ".".join(parts[:length])
            if full not in modules:
                modules[full] = getattr(modules[full.rpartition(".")[0]], parts[length - 1])

    for name, text in files.items():
        add(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found = [each.name for each in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = ".".join(name.split(".")[: -node.level]) if node.level else ""
                found = [".".join(filter(None, (package, node.module)))]
            else:
                continue
            for each in found:
                if each.startswith("vllm."):
                    add(each)
    for each in ("vllm.platforms.cuda", "vllm.config.compilation", "vllm.ir.ops", "vllm.distributed.parallel_state"):
        add(each)
    return modules


@contextlib.contextmanager
def in_place(
    texts: Texts, world_size: int, hidden: int = 64, *, max_tokens: int = 64, max_size: int | None = None
) -> Iterator[Stage]:
    vllm_ops.register()
    root = mock.MagicMock(name="vllm")
    modules = _stub(texts.files, root)
    stage = Stage(root=root, config=config(world_size, hidden, max_tokens=max_tokens, max_size=max_size))
    root.envs.VLLM_BATCH_INVARIANT = False
    root.envs.VLLM_PATTERN_MATCH_DEBUG = None
    for name in ("VLLM_ALLREDUCE_USE_FLASHINFER", "VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC"):
        setattr(root.envs, name, False)
    root._aiter_ops.rocm_aiter_ops.is_enabled.return_value = False
    root._aiter_ops.rocm_aiter_ops.is_rdna_aiter_enabled.return_value = False
    root._aiter_ops.rocm_aiter_ops.is_custom_all_reduce_enabled.return_value = False
    utilities = root.distributed.device_communicators.all_reduce_utils
    utilities.should_nccl_symm_mem_allreduce.return_value = False
    utilities.NCCL_SYMM_MEM_ALL_REDUCE_CONFIG = {
        "min_world_size": 4, "custom_ar_preferred_ranges": {}, "always_use_above_world_size": 8
    }  # fmt: skip
    root.platforms.current_platform.is_rocm.return_value = False
    root.config.get_current_vllm_config_or_none = lambda: stage.config
    root.config.compilation.PassConfig = PassConfig
    root.platforms.cuda.CudaPlatform = CudaPlatform
    if not texts.adds:
        root.ir.ops = SimpleNamespace()
        modules["vllm.ir.ops"] = root.ir.ops
    theirs = {**modules, "vllm.config": root.config, "vllm.envs": root.envs}
    with mock.patch.dict(sys.modules, theirs):
        for name in EXECUTED:
            module = ModuleType(name)
            module.__package__ = name.rpartition(".")[0]
            sys.modules[name] = module
            setattr(sys.modules[module.__package__], name.rpartition(".")[2], module)
            exec(compile(texts.files[name], name, "exec"), vars(module))
        passes = sys.modules[PASSES]
        for name, value in list(vars(passes).items()):  # passes that are stubs
            if name.endswith("Pass") and isinstance(value, mock.MagicMock):
                setattr(passes, name, type(name, (Theirs,), {}))
        for name in OURS:
            sys.modules.pop(name, None)
        try:
            stage.platform, stage.classes = (importlib.import_module(name) for name in OURS)
            yield stage
        finally:
            for name in OURS:
                sys.modules.pop(name, None)
