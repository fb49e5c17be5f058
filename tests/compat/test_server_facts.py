"""What our policy and the way without FlashInfer rest on in the servers, from the committed facts of every release."""

from __future__ import annotations

import inspect
import re

import pytest

from compat.stand_in import COMMITTED
from mnnvl_ar.compat import policy, servers, sglang_layer
from tools.contracts.projects import PROJECTS

BOTH = [(server, version) for server in ("vllm", "sglang") for version in COMMITTED[server]]
COMMUNICATORS = "vllm/distributed/device_communicators/cuda_communicator.py"
PASSES = "vllm/compilation/passes"


def path(module: str) -> str:
    return f"{module.replace('.', '/')}.py"


@pytest.mark.parametrize(("server", "version"), BOTH)
def test_the_method_that_says_when_a_server_serves(server: str, version: str) -> None:
    module, name, method = policy.MOMENTS[server]
    facts = COMMITTED[server][version]
    assert facts[f"function {name}.{method} in {path(module)}"][0] == "self"
    if server == "sglang":
        calls = [fact for fact in facts if fact.startswith(f"call self.{method} ") and "event_loop_overlap" in fact]
        assert calls


@pytest.mark.parametrize(("server", "version"), BOTH)
def test_the_limit_of_a_step(server: str, version: str) -> None:
    facts = COMMITTED[server][version]
    if server == "vllm":
        assert facts["constant VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS in vllm/envs.py"] == 300
        return
    newer = "function get_device in sglang/srt/runtime_context.py" in facts
    assert newer or facts["function get_global_server_args in sglang/srt/server_args.py"] == []
    assert 300 in [value for fact, value in facts.items() if "constant" in fact and ".watchdog_timeout" in fact]


@pytest.mark.parametrize("version", COMMITTED["vllm"])
def test_vllms_platform_and_classes(version: str) -> None:
    facts = COMMITTED["vllm"][version]
    assert facts["constant PLATFORM_PLUGINS_GROUP in vllm/plugins/__init__.py"] == servers.PLATFORMS
    assert facts["function cuda_platform_plugin in vllm/platforms/__init__.py"] == []
    assert "constant CudaPlatform in vllm/platforms/cuda.py" in facts
    for name, parameters in {
        "Platform.get_pass_manager_cls in vllm/platforms/interface.py": ["cls"],
        "CudaPlatformBase.get_device_communicator_cls in vllm/platforms/cuda.py": ["cls"],
        f"CudaCommunicator.all_reduce in {COMMUNICATORS}": ["self", "input_"],
        f"CudaCommunicator.destroy in {COMMUNICATORS}": ["self"],
        f"PostGradPassManager.configure in {PASSES}/pass_manager.py": ["self", "config"],
        f"InductorPass.is_applicable_for_range in {PASSES}/inductor_pass.py": ["self", "compile_range"],
        f"InductorPass.uuid in {PASSES}/inductor_pass.py": ["self"],
        f"get_pass_context in {PASSES}/inductor_pass.py": [],
        "get_current_vllm_config_or_none in vllm/config/vllm.py": [],
        "get_tp_group in vllm/distributed/parallel_state.py": [],
        "all_reduce in vllm/distributed/parallel_state.py": ["tensor", "group_name"],
        "PassConfig.flashinfer_max_size in vllm/config/compilation.py": ["self", "world_size"],
        "rms_norm in vllm/ir/ops/layernorm.py": ["x", "weight", "epsilon", "variance_size=None"],
    }.items():
        assert facts[f"function {name}"] == parameters
    assert {"cpu_group", "unique_name=''"} <= {*facts[f"function CudaCommunicator.__init__ in {COMMUNICATORS}"]}
    assert facts[f"constant PostGradPassManager.__init__.self.passes in {PASSES}/pass_manager.py"] == []
    assert facts["constant VllmConfig.additional_config in vllm/config/vllm.py"] == "Field(default_factory=dict)"
    assert facts["function ModelConfig.using_transformers_backend in vllm/config/model.py"] == ["self"]
    assert facts["function set_current_vllm_config in vllm/config/vllm.py"][1] == "check_compile=False"
    apart = facts.get(f"class AddRMSNormFusionPass in {PASSES}/fusion/add_rms_fusion.py")
    assert apart is None or apart["methods"] == {"__init__": "(self, config)"}
    assert (apart is None) == (version < "0.27")
    adds = facts.get("function fused_add_rms_norm in vllm/ir/ops/layernorm.py")
    assert adds == (
        None if version.startswith("0.20.") else ["x", "x_residual", "weight", "epsilon", "variance_size=None"]
    )


@pytest.mark.parametrize("version", COMMITTED["sglang"])
def test_sglangs_layer_and_gate(version: str) -> None:
    facts = COMMITTED["sglang"][version]
    gates = [facts[name] for each in sglang_layer.GATES if (name := f"function {each[1]} in {path(each[0])}") in facts]
    assert gates == [["batch_size"]]
    layer = facts[f"function {sglang_layer.FUSED} in {path(sglang_layer.LAYER)}"]
    assert {name.partition("=")[0] for name in layer} <= {*inspect.signature(sglang_layer.fused).parameters}
    assert layer[:3] == ["input_tensor", "residual", "weight"]
    for module, name in sglang_layer.NEEDED:
        assert facts[f"function {name} in {path(module)}"] == []
    limits = {value for fact, value in facts.items() if fact.startswith("constant FUSE_ALLREDUCE_MAX_BATCH_SIZE in ")}
    assert limits == {sglang_layer.MOST_ROWS}


@pytest.mark.parametrize("version", COMMITTED["sglang"])
def test_where_sglangs_layers_leave_complete_rows(version: str) -> None:
    """Behind an expert all-to-all of any kind but one, and in dense layers that are whole on each rank."""
    facts, experts = COMMITTED["sglang"][version], path(sglang_layer.EXPERTS)
    assert facts[f"enum MoeA2ABackend in {experts}"]["NONE"] == "none"
    assert facts[f"function MoeA2ABackend.is_none in {experts}"] == ["self"]
    is_none = {"constants": [], "digest": "fe2ca737", "names": ["MoeA2ABackend.NONE", "self"]}  # whether they are equal
    assert facts[f"body MoeA2ABackend.is_none in {experts}"] == is_none
    chosen = facts[f"body get_moe_a2a_backend in {experts}"]["names"]
    assert "MoeA2ABackend.NONE" in chosen  # where none was chosen
    assert {"MOE_A2A_BACKEND", "moe.a2a_backend"} & {*chosen}  # of the process: a draft model's replaces it meanwhile
    dense = [f"{name} in {path(module)}" for module, name in sglang_layer.DENSE]
    [place] = [each for each in dense if f"function {each}" in facts]
    assert facts[f"function {place}"] == []
    assert facts[f"body {place}"]["constants"] == ["1"]
    assert any(name.endswith(".moe_dense_tp_size") for name in facts[f"body {place}"]["names"])


@pytest.mark.parametrize("version", COMMITTED["sglang"])
def test_who_asks_sglangs_gate(version: str) -> None:
    """With a number of rows, and in these files alone: who leaves a sum to the layer call, and who makes that."""
    names = {name for _, name in sglang_layer.GATES}
    asked = {
        fact.partition(" in ")[2]: given
        for fact, given in COMMITTED["sglang"][version].items()
        if fact.startswith("call ") and fact.split()[1] in names
    }
    assert len(asked) >= 3
    for given in asked.values():
        assert [*given] == ["0"]
        assert given["0"] == "batch_size" or given["0"].endswith(".shape[0]")
    boundary = "sglang/srt/layers/layer_boundary"
    older = {"sglang/srt/layers/communicator.py", "sglang/srt/models/nemotron_h_utils.py"}
    files = {place.partition(":")[0] for place in asked}
    assert files == {f"{boundary}/exit.py", f"{boundary}/fusions/allreduce.py"} or files <= older


@pytest.mark.parametrize("name", sorted({sglang_layer.FUSED, *(name for _, name in sglang_layer.GATES)}))
def test_who_else_calls_what_we_replace_is_looked_for(name: str) -> None:
    """In every file of the newest release."""
    words = PROJECTS["sglang"].words
    assert re.search(words, f"if {name}(rows):")
    assert not re.search(words, f"if {name[1:]}(rows): return {name}")


def test_who_makes_multicast_by_flashinfer_past_the_front() -> None:
    """FlashInfer's memory with multicast, which knows no switch: two models of vLLM, the second across nodes alone."""
    makers = {
        server: {
            version: [
                fact.partition(" in ")[2]
                for fact, names in facts.items()
                if fact.startswith("imports in ") and any(name.endswith(": McastGPUBuffer") for name in names)
            ]
            for version, facts in COMMITTED[server].items()
        }
        for server in ("vllm", "sglang")
    }
    models = ["vllm/models/beam/nvidia/allreduce.py", "vllm/models/inkling/nvidia/ops/lamport.py"]
    assert makers["vllm"]["0.33.0"] == models
    assert [version for version, files in makers["vllm"].items() if models[0] in files] == ["0.33.0"]
    assert not any(files for version, files in makers["vllm"].items() if version < "0.26")
    assert not any(makers["sglang"].values())
