"""The servers' and FlashInfer's own code, as it is in the wheels, on the host transport. What it needs of its server is
stubbed: platform, process groups, environment, registration of ops.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from common.ranks import Rank, rank_pool
from compat.front import HIDDEN, TOKENS, create, installed, rows
from compat.stand_in import COMMITTED
from compat.wheels import define, executed, stubbed, text_of
from mnnvl_ar import reference
from mnnvl_ar.compat import flashinfer
from mnnvl_ar.compat.workspace import FusionWorkspace

EPS = 1e-5
FI_AR = "vllm/distributed/device_communicators/flashinfer_all_reduce.py"
PASS = "vllm/compilation/passes/fusion/allreduce_rms_fusion.py"
SGLANG = "sglang/srt/layers/flashinfer_comm_fusion.py"


def pin(server: str, version: str) -> str:
    """The FlashInfer that this release of a server asks for."""
    asked: list[str] = COMMITTED[server][version]["requirement flashinfer-python"]
    return asked[0].rpartition("==")[2]


def vllm(rank: Rank, version: str, creates: str, calls: str) -> None:
    """vLLM's own creation, its standalone all-reduce, and its fused op with the aliasing that its graphs have."""
    with installed(pin("vllm", version)) as comm, stubbed(creates, "vllm") as root:
        root.envs.VLLM_FLASHINFER_ALLREDUCE_BACKEND = "mnnvl"
        root.envs.VLLM_ALLREDUCE_USE_FLASHINFER = False
        root.distributed.parallel_state._node_count.return_value = 1
        root.distributed.parallel_state.get_node_count.return_value = 1
        module = executed(creates, "flashinfer_all_reduce")
        assert module.fi_ar_available
        given = (rank.world_size, rank.rank, TOKENS, HIDDEN, torch.bfloat16, rank.group)
        workspace = module.get_fi_ar_workspace(*given)
        assert isinstance(workspace, FusionWorkspace), module.logger.mock_calls
        assert module.get_fi_ar_workspace(*given) is workspace

        plain = object.__new__(module.FlashInferAllReduce)  # as its __init__ leaves it, which asks for a CUDA platform
        vars(plain).update(
            group=rank.group, rank=rank.rank, world_size=rank.world_size, disabled=False,
            max_workspace_size=workspace.promised, max_num_tokens=0,
        )  # fmt: skip
        assert plain._ensure_workspace(HIDDEN, torch.bfloat16)
        for tokens in (1, TOKENS):
            xs = [rows(each, tokens) for each in range(rank.world_size)]
            assert reference.same_bits(plain.all_reduce(xs[rank.rank]), reference.all_reduce(xs))

        tp = mock.MagicMock(cpu_group=rank.group, device_group=rank.group)
        space: dict[str, Any] = {
            "torch": torch,
            "flashinfer_comm": comm,
            "ar_fusion_patterns": comm.AllReduceFusionPattern,
            "get_fi_ar_workspace": module.get_fi_ar_workspace,
            "get_fi_ar_quant_workspace": None,
            "get_tp_group": lambda: tp,
            "get_tensor_model_parallel_rank": lambda: rank.rank,
            "current_platform": mock.MagicMock(get_device_capability=lambda: None),
            "_FI_ALLREDUCE_ONE_SHOT_MAX_SIZES_MB": {},
            "PDL_ADVANCE_LAUNCH_TOKENS": 16,
            "MiB": 1 << 20,
        }
        if "def _select_flashinfer_allreduce_use_oneshot" in calls:
            define(calls, "_select_flashinfer_allreduce_use_oneshot", space)
        fused = define(calls, "call_trtllm_fused_allreduce_norm", space)
        weight, residual = 1 + rows(9, 1)[0], rows(77, 5)
        xs = [rows(each, 5) for each in range(rank.world_size)]
        rest = {
            "rms_gamma": weight, "rms_eps": EPS, "world_size": rank.world_size, "launch_with_pdl": True,
            "fp32_acc": True, "max_token_num": TOKENS, "pattern_code": comm.AllReduceFusionPattern.kARResidualRMSNorm,
        }  # fmt: skip
        x, r = xs[rank.rank].clone(), residual.clone()
        fused(x, r, **rest)  # in place, as between layers
        norm, total = reference.all_reduce_rms_norm(xs, residual, weight, EPS)
        assert reference.same_bits(x, norm)
        assert reference.same_bits(r, total)
        x, r, out = xs[rank.rank].clone(), torch.zeros_like(residual), torch.empty_like(residual)
        shape = (1, 5, HIDDEN) if "allreduce_in.dim()" in calls else (5, HIDDEN)  # later ones take an outer batch
        fused(x.view(shape), r.view(shape), **rest, norm_out=out.view(shape))  # in the first layer
        norm, total = reference.all_reduce_rms_norm(xs, torch.zeros_like(residual), weight, EPS)
        assert reference.same_bits(out, norm)
        assert reference.same_bits(x, total)
        assert not r.any()

        if hasattr(module, "checkpoint_prepare_fi_ar_workspaces"):  # from 0.27 on
            module.checkpoint_prepare_fi_ar_workspaces(rank.group)
            module.checkpoint_restore_fi_ar_workspaces(rank.group)
            assert reference.same_bits(plain.all_reduce(xs[rank.rank]), reference.all_reduce(xs))
        module.destroy_fi_ar_workspace()
        assert workspace.handle == 0
        assert comm.calls == []
        again = module.get_fi_ar_workspace(*given)  # a pass object died, and another one asks
        assert again is not workspace
        module.destroy_fi_ar_workspace()
        module.atexit.unregister(module.destroy_fi_ar_workspace)


@pytest.mark.parametrize("version", ["0.20.2", "0.26.0", "0.33.0"])
def test_vllm(version: str) -> None:
    rank_pool(2).run(vllm, version, text_of("vllm", version, FI_AR), text_of("vllm", version, PASS))


class Trtllm:
    """As much of FlashInfer's workspace for trtllm as vLLM looks at: it has no mc_ptr."""

    backend, destroyed = "trtllm", False

    def destroy(self) -> None:
        self.destroyed = True


def vllm_falls_back(rank: Rank, version: str, creates: str, asked: str) -> None:
    """Rows of no whole 16 bytes, so that all ranks go to FlashInfer's trtllm, whatever was asked for."""
    with installed(pin("vllm", version)) as comm, stubbed(creates, "vllm") as root:
        flashinfer.uninstall()
        made: list[Trtllm] = []

        def original(backend: str, **_: Any) -> Trtllm:
            assert backend == "trtllm"
            made.append(Trtllm())
            return made[-1]

        comm.create_allreduce_fusion_workspace = comm.allreduce.create_allreduce_fusion_workspace = original
        with mock.patch.object(flashinfer, "wrong", return_value=[]):  # of the signature
            flashinfer.install()
        root.envs.VLLM_FLASHINFER_ALLREDUCE_BACKEND = asked
        root.envs.VLLM_ALLREDUCE_USE_FLASHINFER = False
        root.distributed.parallel_state._node_count.return_value = 1
        root.distributed.parallel_state.get_node_count.return_value = 1
        module = executed(creates, "flashinfer_all_reduce")
        got = module.get_fi_ar_workspace(rank.world_size, rank.rank, TOKENS, 60, torch.bfloat16, rank.group)
        looks = "mc_ptr" in creates  # from 0.27 on
        assert [each.destroyed for each in made] == ([True] * looks + [False] * (asked == "auto" or not looks))
        assert got is (None if looks and asked == "mnnvl" else made[-1])
        module.destroy_fi_ar_workspace()
        module.atexit.unregister(module.destroy_fi_ar_workspace)


@pytest.mark.parametrize("asked", ["mnnvl", "auto"])
@pytest.mark.parametrize("version", ["0.26.0", "0.27.0", "0.33.0"])
def test_what_vllm_makes_of_the_fallback(version: str, asked: str) -> None:
    """From 0.27 on it takes no trtllm where it asked for mnnvl: by "auto" it then asks for that itself, else it goes on
    without fusion."""
    rank_pool(2).run(vllm_falls_back, version, text_of("vllm", version, FI_AR), asked)


def sglang(rank: Rank, version: str, text: str, hooks: str, backend: str) -> None:
    """SGLang's own manager of workspaces and fused call; its module is imported before the plugins are loaded, and its
    own registry puts ours in place."""
    name = "flashinfer_comm_fusion"
    with installed(pin("sglang", version)) as comm, stubbed(text, "sglang") as root:
        flashinfer.uninstall()
        root.srt.utils.custom_op.register_custom_op = lambda *_, **__: lambda function: function
        root.srt.utils.is_flashinfer_available.return_value = True
        root.srt.distributed.parallel_state.in_the_same_node_as = lambda group, source_rank: [True] * group.size()
        module: Any = ModuleType(name)
        registry = executed(hooks, "hook_registry")
        with mock.patch.dict(sys.modules, {name: module}):
            exec(compile(text, name, "exec"), vars(module))
            for target, around in flashinfer.REPLACEMENTS.items():
                registry.HookRegistry.register(f"flashinfer.comm.{target}", around, registry.HookType.AROUND)
            registry.HookRegistry.apply_hooks()
        manager = module.FlashInferWorkspaceManager()
        vars(module).update(
            _preflight_check_workspace_memory=lambda **_: True,
            _get_workspace_manager=lambda *_: manager,
            resolve_fusion_world_size=lambda **_: rank.world_size,
            get_parallel=lambda: mock.MagicMock(attn_tp_size=rank.world_size),  # of older releases
        )
        initialize = functools.partial(
            manager.initialize, rank.world_size, rank.rank, hidden_dim=HIDDEN, backend=backend, dtype=torch.bfloat16,
            group=rank.group, device_group=rank.group, cpu_group=rank.group,
        )  # fmt: skip
        initialize(max_token_num=TOKENS)
        first = manager.workspace
        assert isinstance(first, FusionWorkspace)
        assert (first.backend, manager.initialized) == (backend, True)
        initialize(max_token_num=TOKENS // 2)
        assert manager.workspace is first  # by its own size check
        initialize(max_token_num=4 * TOKENS)  # a wider draft model: destroys, then makes a larger one
        assert manager.workspace is not first
        assert first.handle == 0
        module.ensure_workspace_initialized = lambda **_: True

        xs, residual = [rows(each, 5) for each in range(rank.world_size)], rows(77, 5)
        weight = 1 + rows(9, 1)[0]
        x, r = xs[rank.rank].clone(), residual.clone()
        got = module.flashinfer_allreduce_residual_rmsnorm(x, r, weight, EPS)
        for mine, wanted in zip(got, reference.all_reduce_rms_norm(xs, residual, weight, EPS), strict=True):
            assert reference.same_bits(mine, wanted)
        assert reference.same_bits(x, xs[rank.rank])
        assert reference.same_bits(r, residual)
        manager.cleanup()
        assert comm.calls == []


@pytest.mark.parametrize(("version", "backend"), [("0.5.17", "trtllm"), ("0.5.23", "mnnvl")])
def test_sglang(version: str, backend: str) -> None:
    hooks = text_of("sglang", version, "sglang/srt/plugins/hook_registry.py")
    rank_pool(2).run(sglang, version, text_of("sglang", version, SGLANG), hooks, backend)


def flashinfers(rank: Rank, text: str) -> None:
    """FlashInfer's own call function takes other classes' workspaces, and ours only through the front."""
    with installed("0.6.13") as comm:
        flashinfer.uninstall()
        mine = type("Other", (), {})
        space: dict[str, Any] = {
            "torch": torch,
            "AllReduceFusionPattern": comm.AllReduceFusionPattern,
            **dict.fromkeys(("TRTLLMAllReduceFusionWorkspace", "MNNVLAllReduceFusionWorkspace"), type("Known", (), {})),
        }
        comm.allreduce_fusion = comm.allreduce.allreduce_fusion = define(text, "allreduce_fusion", space)
        flashinfer.install()
        workspace = create(comm, rank)
        given = {"input": rows(rank.rank), "pattern": 0}
        assert comm.allreduce_fusion(**given, workspace=workspace) is not None
        for foreign in (mine(), None, workspace._shared.workspace):
            with pytest.raises(TypeError, match="Unknown workspace type"):
                comm.allreduce_fusion(**given, workspace=foreign)
        flashinfer.uninstall()
        with pytest.raises(TypeError, match="Unknown workspace type"):
            comm.allreduce_fusion(**given, workspace=workspace)
        workspace.destroy()


def test_flashinfers_own_function() -> None:
    rank_pool(2).run(flashinfers, text_of("flashinfer-python", "0.6.13", "flashinfer/comm/allreduce.py"))
