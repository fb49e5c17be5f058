"""vLLM's own communicator and pass manager with our platform, on the host transport: what is ours, what is theirs."""

from __future__ import annotations

import math
import operator
import os
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from common.ranks import Rank, rank_pool
from compat.front import HIDDEN, rows
from compat.test_fusion import EPS, GROUP, NORMED, PATIENCE, graph_of, later_layer, names
from compat.vllm_wheel import Stage, Texts, Theirs, in_place
from mnnvl_ar import reference

VERSIONS = ["0.20.2", "0.26.0", "0.33.0"]
LIMIT = 16 * HIDDEN * 2  # bytes: 16 rows
ENVIRONMENT = {"MNNVL_AR": "1", "MNNVL_AR_THROUGH": "ops", "MNNVL_AR_TIMEOUT": "20"}


def communicator(stage: Stage, rank: Rank, name: str = GROUP) -> Any:
    return stage.classes.Communicator(
        cpu_group=rank.group, device=torch.device("cpu"), device_group=rank.group, unique_name=name
    )


def passes(stage: Stage, made: Any) -> Any:
    stage.classes.get_tp_group = lambda: SimpleNamespace(device_communicator=made, unique_name=GROUP)
    manager = stage.classes.Passes()
    manager.configure(stage.config)
    return manager


def run_on(stage: Stage, manager: Any, end: int, layer: Any = later_layer) -> torch.fx.GraphModule:
    """A layer's graph after vLLM's own pass manager, compiled for up to `end` rows."""
    module = graph_of(layer, *NORMED)
    with stage.platform._named("vllm.compilation.passes.inductor_pass.pass_context")(SimpleNamespace(start=1, end=end)):
        manager(module.graph)
        manager.uuid()
    module.recompile()
    return module


def served(rank: Rank, texts: Texts) -> None:
    with mock.patch.dict(os.environ, ENVIRONMENT), in_place(texts, rank.world_size, max_size=LIMIT) as stage:
        platform, config = stage.platform, stage.config
        assert platform.problems() == ()
        platform.Platform.check_and_update_config(config)
        platform.Platform.check_and_update_config(config)  # a copy for a draft model
        assert not config.compilation_config.pass_config.fuse_allreduce_rms
        assert config.compilation_config.compile_ranges_endpoints == [16]
        assert config.compilation_config.custom_ops == ["none"] + ([] if texts.adds else ["+rms_norm"])
        assert platform.Platform.get_device_communicator_cls() == "mnnvl_ar.compat.vllm_classes.Communicator"
        assert platform.Platform.get_pass_manager_cls() == "mnnvl_ar.compat.vllm_classes.Passes"

        other = communicator(stage, rank, "ep:0")
        assert other.mnnvl_ar is None
        assert config.additional_config == {}
        made = communicator(stage, rank)
        workspace = made.mnnvl_ar.workspace
        assert isinstance(made, stage.platform._named(platform.COMMUNICATOR))
        assert (workspace.promised, made.mnnvl_ar.most_bytes) == (LIMIT, LIMIT)
        assert f" {workspace.handle} " in config.additional_config["mnnvl_ar"]

        xs = [rows(each, 16) for each in range(rank.world_size)]
        assert reference.same_bits(made.all_reduce(xs[rank.rank]), reference.all_reduce(xs))
        for declined in (rows(0, 17), rows(0).double(), rows(0, 8).t(), torch.ones(3, dtype=torch.bfloat16)):
            assert isinstance(made.all_reduce(declined), mock.MagicMock)  # one of theirs

        manager = passes(stage, made)
        kinds = [type(each).__name__ for each in manager.passes]
        assert kinds.index("NoOpEliminationPass") < kinds.index("Fusion") < kinds.index("RMSNormQuantFusionPass")
        assert "AllReduceFusionPass" not in kinds
        ours = next(each for each in manager.passes if type(each).__name__ == "Fusion")
        assert "mnnvl_ar::all_reduce_rms_norm" not in names(run_on(stage, manager, 17))
        module = run_on(stage, manager, 16)
        assert (ours.fused, names(module).count("mnnvl_ar::all_reduce_rms_norm")) == (1, 1)
        weight, residual = 1 + rows(9, 1)[0], rows(77, 16)
        got = module(xs[rank.rank], residual, weight)
        assert all(map(reference.same_bits, got, reference.all_reduce_rms_norm(xs, residual, weight, EPS)))

        if hasattr(stage.platform._named(platform.COMMUNICATOR), "checkpoint_prepare"):  # later releases
            made.checkpoint_prepare()
            made.checkpoint_restore()
            assert reference.same_bits(made.all_reduce(xs[rank.rank]), reference.all_reduce(xs))
        made.destroy()
        assert (made.mnnvl_ar, workspace.handle) == (None, 0)
        assert "Fusion" not in [type(each).__name__ for each in passes(stage, made).passes]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_ours_and_what_is_theirs(version: str) -> None:
    rank_pool(2).run(served, Texts.of(version), timeout=PATIENCE)


class AddsNorms(Theirs):
    """As vLLM's AddRMSNormFusionPass: of a sum with a residual and its norm one op is made."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for norm in graph.find_nodes(op="call_function", target=torch.ops.vllm_ir.rms_norm.default):
            added, (weight, eps) = norm.args[0], norm.args[1:]
            with graph.inserting_before(norm):
                both = graph.call_function(torch.ops.vllm_ir.fused_add_rms_norm.default, (*added.args, weight, eps))
                for old, place in ((norm, 0), (added, 1)):
                    old.replace_all_uses_with(graph.call_function(operator.getitem, (both, place)))
                    graph.erase_node(old)


def of_transformers(rank: Rank, texts: Texts) -> None:
    """A layer's residual is added by itself: in one op with the norm before our pass comes, whatever else is on."""

    def layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        added = torch.ops.vllm.all_reduce(x, GROUP) + residual
        return torch.ops.vllm_ir.rms_norm(added, weight, EPS), added

    with mock.patch.dict(os.environ, ENVIRONMENT), in_place(texts, rank.world_size, max_size=LIMIT) as stage:
        config = stage.config
        stage.platform.Platform.check_and_update_config(config)
        made = communicator(stage, rank)
        module = sys.modules["vllm.compilation.passes.pass_manager"]
        has_it = hasattr(module, "AddRMSNormFusionPass")  # from 0.27 on
        if has_it:
            vars(module)["AddRMSNormFusionPass"] = type("AddRMSNormFusionPass", (AddsNorms,), {})
        for by_transformers in (False, True):
            config.model_config.using_transformers_backend = lambda answer=by_transformers: answer
            for quantises in (False, True):
                config.compilation_config.pass_config.fuse_norm_quant = quantises
                manager = passes(stage, made)
                kinds = [type(each).__name__ for each in manager.passes]
                there = has_it and by_transformers
                assert kinds.count("AddRMSNormFusionPass") == there
                if there:
                    first = kinds.index("AddRMSNormFusionPass")
                    assert kinds.index("NoOpEliminationPass") < first < kinds.index("Fusion")
                ours = next(each for each in manager.passes if type(each).__name__ == "Fusion")
                run_on(stage, manager, 16, layer)
                assert ours.fused == there
        made.destroy()


@pytest.mark.parametrize("version", ["0.26.0", "0.27.0", "0.33.0"])
def test_norms_of_the_transformers_backend(version: str) -> None:
    rank_pool(2).run(of_transformers, Texts.of(version), timeout=PATIENCE)


def invariant(rank: Rank, texts: Texts) -> list[list[int]]:
    """VLLM_BATCH_INVARIANT=1: bits of the sum and the norm of one row, alone and in batches larger than anything that
    the scheduler makes, in a workspace so small that they run in pieces."""
    with (
        mock.patch.dict(os.environ, ENVIRONMENT),
        mock.patch("mnnvl_ar.workspace.DEFAULT_MAX_BYTES", 1 << 14),
        in_place(texts, rank.world_size, max_size=LIMIT) as stage,
    ):
        stage.root.envs.VLLM_BATCH_INVARIANT = True
        stage.platform.Platform.check_and_update_config(stage.config)
        assert stage.config.compilation_config.compile_ranges_endpoints is None  # one range, all of it ours
        made = communicator(stage, rank)
        assert made.mnnvl_ar.most_bytes == math.inf
        module = run_on(stage, passes(stage, made), 1 << 20)
        assert "vllm::all_reduce" not in names(module)
        weight, found = 1 + rows(9, 1)[0], []
        whole, residual = rows(rank.rank, 1000), rows(77, 1000)
        for first, last in ((3, 4), (0, 5), (2, 70), (0, 1000)):
            x, r = whole[first:last].clone(), residual[first:last].clone()
            results = (made.all_reduce(x), *module(x, r, weight))
            found.append([int(each[3 - first].view(torch.int16).long().sum()) for each in results])
            found[-1] += torch.cat([each[3 - first] for each in results]).view(torch.int16).tolist()
        made.destroy()
        return found


@pytest.mark.parametrize("version", ["0.33.0"])
def test_a_rows_bits_do_not_depend_on_its_batch(version: str) -> None:
    for found in rank_pool(3).run(invariant, Texts.of(version), timeout=PATIENCE):
        assert all(each == found[0] for each in found)


def refused(rank: Rank, texts: Texts, breaks: str) -> tuple[Any, ...]:
    """With something of vLLM's missing, or a workspace that cannot be had."""
    environment = {**ENVIRONMENT, **({"MNNVL_AR_TIMEOUT": "0.5"} if breaks == "rank" else {})}
    with mock.patch.dict(os.environ, environment), in_place(texts, rank.world_size, max_size=LIMIT) as stage:
        platform, config = stage.platform, stage.config
        if breaks == "name":
            del stage.platform._named(platform.PASSES).configure
        if breaks == "import":
            platform._named = mock.Mock(side_effect=RuntimeError("no NVML"))
        if breaks == "hash":
            config.additional_config = SimpleNamespace(compute_hash=lambda: "")
        if breaks == "row":
            config.model_config.get_hidden_size = lambda: 60  # no whole 16 bytes
        platform.Platform.check_and_update_config(config)
        made = None
        if breaks not in ("name", "import"):
            made = communicator(stage, rank)
            assert made.mnnvl_ar is None
            assert isinstance(made.all_reduce(rows(0)), mock.MagicMock)
        return (
            config.compilation_config.pass_config.fuse_allreduce_rms,
            platform.Platform.get_pass_manager_cls().startswith("mnnvl_ar."),
            platform.problems(),
        )


@pytest.mark.parametrize(
    ("breaks", "wanted"),
    [
        ("name", (True, False, ("there is no vllm.compilation.passes.pass_manager.PostGradPassManager.configure",))),
        ("import", (True, False, ("RuntimeError: no NVML",))),
        ("hash", (False, True, ())),
        ("row", (False, True, ())),
    ],
)
def test_what_is_refused(breaks: str, wanted: Any) -> None:
    assert rank_pool(2).run(refused, Texts.of("0.33.0"), breaks, timeout=PATIENCE) == [wanted] * 2
