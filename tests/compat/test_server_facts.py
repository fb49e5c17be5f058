"""What our policy and the way without FlashInfer rest on in the servers, from the committed facts of every release."""

from __future__ import annotations

import inspect

import pytest

from compat.stand_in import COMMITTED
from mnnvl_ar.compat import policy, servers, sglang_layer

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
    for name in sglang_layer.GROUPS:
        assert facts[f"function {name} in {path(sglang_layer.STATE)}"] == []
    assert facts[f"function is_dp_attention_enabled in {path(sglang_layer.ATTENTION)}"] == []
    limits = {value for fact, value in facts.items() if fact.startswith("constant FUSE_ALLREDUCE_MAX_BATCH_SIZE in ")}
    assert limits == {sglang_layer.MOST_ROWS}
