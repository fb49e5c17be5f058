"""Which facts of which releases our front rests on: of FlashInfer what it replaces, of the servers how they use it."""

from __future__ import annotations

from dataclasses import dataclass

from tools.contracts.facts import Wanted

CALLS = (
    "*.allreduce_fusion",
    "*._allreduce_fusion",
    "allreduce_fusion",
    "*create_allreduce_fusion_workspace",
    "*workspace.is_buffer_size_sufficient",
    "*workspace.checkpoint_prepare",
    "*workspace.checkpoint_restore",
    "*TorchDistBackend",
)


@dataclass(frozen=True)
class Project:
    index_name: str
    oldest: str  # every final release from this one on
    wanted: Wanted
    words: str  # a Python file of the newest release that holds one of these has to be among the files read
    others: tuple[str, ...] = ()  # unless it is one of these


FLASHINFER = Project(
    "flashinfer-python",
    "0.6.8.post1",
    Wanted(
        files=(
            "flashinfer/comm/__init__.py",
            "flashinfer/comm/abstractions.py",
            "flashinfer/comm/allreduce.py",
            "flashinfer/comm/comm_backend.py",
            "flashinfer/comm/mnnvl.py",
            "flashinfer/comm/mnnvl_cutedsl_ar.py",
            "flashinfer/comm/trtllm_ar.py",
            "flashinfer/comm/trtllm_mnnvl_ar.py",
            "flashinfer/comm/workspace_base.py",
            "*.dist-info/METADATA",
        ),
        functions=(
            "create_allreduce_fusion_workspace",
            "allreduce_fusion",
            "is_mnnvl_fabric_supported",
            "trtllm_mnnvl_allreduce",
            "trtllm_mnnvl_fused_allreduce_add_rmsnorm*",
        ),
        bodies=("_workspace_creation_heuristic", "select_strategy"),
        classes=("*AllReduceFusionWorkspace", "CommBackend", "TorchDistBackend"),
        enums=("AllReduceFusionPattern", "QuantizationSFLayout", "MNNVLQuantType", "*AllreduceFusionStrategy"),
        constants=(
            "*/allreduce.py:[A-Z][A-Z]*",
            "*/trtllm_ar.py:MAX_COMM_SIZE",
            "*/trtllm_ar.py:OneShot*",
            "*/trtllm_mnnvl_ar.py:[A-Z][A-Z]*_*",
            "*/workspace_base.py:[A-Z][A-Z]*",
        ),
        exports=(
            "flashinfer/comm/__init__.py:*llreduce_fusion*",
            "flashinfer/comm/__init__.py:*AllReduceFusion*",
            "flashinfer/comm/__init__.py:QuantizationSFLayout",
            "flashinfer/comm/mnnvl.py:*Backend",
            "flashinfer/comm/mnnvl.py:McastGPUBuffer",
            "flashinfer/comm/mnnvl.py:is_mnnvl_fabric_supported",
        ),
        branches=(("allreduce_fusion", "workspace", "AllReduceFusionPattern"),),
        pins=("torch", "apache-tvm-ffi"),
    ),
    r"def (create_)?allreduce_fusion\b|class \w+\(AllReduceFusionWorkspace\)"
    r"|class (AllReduceFusionPattern|QuantizationSFLayout|CommBackend|TorchDistBackend)\b",
)

VLLM = Project(
    "vllm",
    "0.20.0",
    Wanted(
        files=(
            "vllm/compilation/passes/fusion/allreduce_rms_fusion.py",
            "vllm/compilation/passes/inductor_pass.py",
            "vllm/compilation/passes/pass_manager.py",
            "vllm/compilation/passes/utility/fix_functionalization.py",
            "vllm/config/compilation.py",
            "vllm/config/vllm.py",
            "vllm/distributed/device_communicators/all2all.py",
            "vllm/distributed/device_communicators/all_reduce_utils.py",
            "vllm/distributed/device_communicators/cuda_communicator.py",
            "vllm/distributed/device_communicators/flashinfer_all_reduce.py",
            "vllm/distributed/device_communicators/flashinfer_pcie_ipc_all_reduce.py",
            "vllm/distributed/device_communicators/mnnvl_compat.py",
            "vllm/distributed/parallel_state.py",
            "vllm/engine/arg_utils.py",
            "vllm/envs.py",
            "vllm/ir/ops/layernorm.py",
            "vllm/model_executor/layers/fused_allreduce_gemma_rms_norm.py",
            "vllm/model_executor/layers/fused_moe/prepare_finalize/flashinfer_nvlink_two_sided.py",
            "vllm/model_executor/models/registry.py",
            "vllm/model_executor/warmup/kernel_warmup.py",
            "vllm/model_executor/layers/fused_moe/runner/latent_moe_runner.py",
            "vllm/models/beam/nvidia/allreduce.py",
            "vllm/models/common/ops/fused_allreduce_rms_norm.py",
            "vllm/models/deepseek_v32/nvidia/fused_ops.py",
            "vllm/models/inkling/*/ops/lamport.py",
            "vllm/models/kimi_k3/nvidia/latent_moe_runner.py",
            "vllm/models/muse_spark/nvidia/model.py",
            "vllm/models/muse_spark/nvidia/muse_moe_runner.py",
            "vllm/models/muse_spark/nvidia/ops/mnnvl_fusions.py",
            "vllm/platforms/__init__.py",
            "vllm/platforms/cuda.py",
            "vllm/platforms/interface.py",
            "vllm/plugins/__init__.py",
            "vllm/utils/flashinfer.py",
            "vllm/v1/engine/core.py",
            "vllm/v1/worker/gpu_worker.py",
            "vllm/v1/worker/worker_base.py",
            "*.dist-info/METADATA",
            "*.dist-info/entry_points.txt",
        ),
        functions=(
            "call_trtllm_fused_allreduce_norm",
            "load_general_plugins",
            "*/gpu_worker.py:compile_or_warm_up_model",  # policy.MOMENTS
            *("cuda_platform_plugin", "get_device_communicator_cls", "get_pass_manager_cls", "flashinfer_max_size"),
            *("*/parallel_state.py:all_reduce", "get_tp_group", "get_pass_context", "get_current_vllm_config_or_none"),
            *("*/layernorm.py:rms_norm", "*/layernorm.py:fused_add_rms_norm"),
            *("*/cuda_communicator.py:__init__", "*/cuda_communicator.py:all_reduce", "*/cuda_communicator.py:destroy"),
            *("*/pass_manager.py:configure", "*/inductor_pass.py:is_applicable_for_range", "*/inductor_pass.py:uuid"),
        ),
        bodies=("_resolve_fi_ar_backend", "enable_allreduce_rms_fusion", "_select_flashinfer_allreduce_use_oneshot"),
        constants=(
            "*/allreduce_rms_fusion.py:self.group",
            "*/cuda_communicator.py:*use_flashinfer_allreduce",
            "*FI_*MAX_SIZE*",
            "FI_SUPPORTED_WORLD_SIZES",
            "PDL_ADVANCE_LAUNCH_TOKENS",
            "VLLM_ALLREDUCE_USE_FLASHINFER",
            "VLLM_BATCH_INVARIANT",
            "VLLM_FLASHINFER_ALLREDUCE_*",
            "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS",
            "*_PLUGINS_GROUP",
            "*/cuda.py:CudaPlatform",
            "*/inductor_pass.py:self.compile_range",
            "*/pass_manager.py:self.passes",
            "*/config/vllm.py:additional_config",
            "compile_ranges_endpoints",
        ),
        entries=("VLLM_ALLREDUCE_USE_FLASHINFER", "VLLM_BATCH_INVARIANT", "VLLM_FLASHINFER_ALLREDUCE_*"),
        calls=(
            *CALLS,
            "torch.ops.vllm.all_reduce",
            "*/allreduce_rms_fusion.py:direct_register_custom_op",
            "FlashInferAllReduce",
            "get_fi_ar_*workspace",
            "get_workspace_fn",
            "load_general_plugins",
            "load_plugins_by_group",
        ),
        holders=(
            "*/flashinfer_all_reduce.py:*workspace",
            "*/allreduce_rms_fusion.py:workspace",
            "*/fused_allreduce_*.py:workspace",
        ),
        imports=("flashinfer.comm", "flashinfer.comm.*"),
        pins=("flashinfer-*", "torch", "transformers"),
    ),
    r"\bflashinfer\.comm\b|\bload_general_plugins\(\)|\bflashinfer_trtllm_fused_allreduce_norm\b",
)

SGLANG = Project(
    "sglang",
    "0.5.11",
    Wanted(
        files=(
            "sglang/cli/serve.py",
            "sglang/kernels/ops/communication/mnnvl_cutedsl*.py",
            "sglang/launch_server.py",
            "sglang/srt/arg_groups/fields/device.py",
            "sglang/srt/arg_groups/fields/exec_.py",
            "sglang/srt/arg_groups/overrides.py",
            "sglang/srt/distributed/device_communicators/pcie_ipc_ar.py",
            "sglang/srt/distributed/parallel_state.py",
            "sglang/srt/entrypoints/engine.py",
            "sglang/srt/layers/attention/qsa/mqa.py",
            "sglang/srt/layers/communicator.py",
            "sglang/srt/layers/dcp/comm.py",
            "sglang/srt/layers/dp_attention.py",
            "sglang/srt/layers/flashinfer_comm_fusion.py",
            "sglang/srt/layers/flashinfer_mnnvl_cutedsl.py",
            "sglang/srt/layers/layer_boundary/__init__.py",
            "sglang/srt/layers/layer_boundary/fusions/allreduce.py",
            "sglang/srt/layers/layer_boundary/residual/*.py",
            "sglang/srt/layers/layernorm.py",
            "sglang/srt/layers/moe/token_dispatcher/deepep.py",
            "sglang/srt/layers/moe/token_dispatcher/flashinfer.py",
            "sglang/srt/layers/moe/token_dispatcher/flashinfer_utils.py",
            "sglang/srt/managers/data_parallel_controller.py",
            "sglang/srt/managers/detokenizer_manager.py",
            "sglang/srt/managers/scheduler.py",
            "sglang/srt/model_executor/model_runner.py",
            "sglang/srt/model_executor/runner/base_runner.py",
            "sglang/srt/models/beam.py",
            "sglang/srt/plugins/__init__.py",
            "sglang/srt/plugins/hook_registry.py",
            "sglang/srt/runtime_context.py",
            "sglang/srt/server_args.py",
            "*.dist-info/METADATA",
            "*.dist-info/entry_points.txt",
        ),
        functions=(
            *("flashinfer_allreduce*", "load_plugins", "resolve_fusion_group", "is_dp_attention_enabled"),
            *("apply_flashinfer_allreduce_fusion", "flashinfer_ar_fusion_applies"),
            *("get_tp_group", "get_attn_tp_group", "get_moe_ep_group", "get_moe_tp_group"),
            *("*/runtime_context.py:get_device", "get_global_server_args"),
            "*/scheduler.py:process_batch_result",  # policy.MOMENTS
        ),
        bodies=("_mnnvl_supported", "_propagate_patch", "_resolve_backend", "*flashinfer_a*_fusion*"),
        classes=("HookRegistry",),
        enums=("HookType",),
        constants=(
            "*_PLUGINS_GROUP",
            "*FLASHINFER_ALLREDUCE*",
            "FUSE_ALLREDUCE_MAX_BATCH_SIZE",
            "*/flashinfer_comm_fusion.py:_create_allreduce_fusion_workspace",
            "*/flashinfer_comm_fusion.py:_flashinfer_*_supports_*",
            "*/server_args.py:*flashinfer_allreduce_fusion*",
            "*/exec_.py:flashinfer_allreduce_fusion*",
            "*/server_args.py:watchdog_timeout",
            "*/device.py:watchdog_timeout",
        ),
        calls=(
            *CALLS,
            "*/scheduler.py:self.process_batch_result",
            "*/flashinfer_comm_fusion.py:create_workspace",
            "can_use_flashinfer_allreduce",
            "flashinfer_allreduce*",
            "pre_initialize_workspaces",
            "load_plugins",
            "HookRegistry.*",
        ),
        holders=("workspace",),
        imports=("flashinfer.comm", "flashinfer.comm.*", "sglang.srt.plugins.hook_registry"),
        pins=("flashinfer-*", "sgl-kernel", "sglang-kernel", "torch", "transformers"),
    ),
    r"\bflashinfer\.comm\b|\b(load_plugins|flashinfer_allreduce_residual_rmsnorm)\(|\bFUSE_ALLREDUCE_MAX_BATCH_SIZE\b",
    others=("sglang/*benchmark*", "sglang/multimodal_gen/*", "sglang/test/*"),
)

PROJECTS = {"flashinfer": FLASHINFER, "vllm": VLLM, "sglang": SGLANG}
