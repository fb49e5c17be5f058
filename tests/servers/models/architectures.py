"""The architectures: what a model's config.json says, and which tensors it has, by the names that checkpoints have.

Weights of a layer are normal with a deviation of GAIN / sqrt(fan in): 0.02 for 4096. What is added to the residual is
smaller by sqrt(2 x layers), and embeddings are of the residual's own size, so that neither a token nor a layer is lost.
Logits have a deviation of LOGITS, which gives greedy text that depends on every layer, and margins like a model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

GAIN, LOGITS = 1.28, 2.5
FP8_SCALES = {"weight": 6 * GAIN / 448, "input": 8 / 448, "down": 24 / 448}  # weight: of a deviation of GAIN


@dataclass(frozen=True)
class Tensor:
    """deviation: of normal values around `mean`, or, with `signs`, around `mean` and its opposite, less `minus`.
    kind: "bf16", "fp8" or "fp32"."""

    shape: tuple[int, ...]
    deviation: float
    mean: float = 0.0
    signs: bool = False
    minus: float = 0.0
    kind: str = "bf16"
    scale: float = 1.0  # fp8: what a stored value is multiplied by


@dataclass(frozen=True)
class Model:
    """Sizes of a model. `head` is of one attention head; with `experts`, `inner` is of one of them."""

    architecture: str
    layers: int = 4
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head: int = 128
    inner: int = 14336
    vocabulary: int = 32000
    experts: int = 0
    chosen: int = 0
    seed: int = 1

    @property
    def name(self) -> str:
        return f"{self.architecture}-{self.layers}x{self.hidden}"

    def config(self) -> dict[str, Any]:
        return {**_common(self), **CONFIGS[self.architecture](self)}

    def tensors(self) -> dict[str, Tensor]:
        return dict(TENSORS[self.architecture](self))


def _common(m: Model) -> dict[str, Any]:
    return {
        "hidden_size": m.hidden,
        "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.kv_heads,
        "head_dim": m.head,
        "intermediate_size": m.inner,
        "vocab_size": m.vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.02,
    }


def _llama(m: Model) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}


def _llama_fp8(m: Model) -> dict[str, Any]:
    return {**_llama(m), "quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}


def _gemma(m: Model) -> dict[str, Any]:
    activation = "gelu_pytorch_tanh"
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "hidden_act": activation,
        "hidden_activation": activation,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
    }


def _qwen3(m: Model) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": m.layers,
    }


def _qwen3_moe(m: Model) -> dict[str, Any]:
    return {
        **_qwen3(m),
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": m.experts,
        "num_experts_per_tok": m.chosen,
        "moe_intermediate_size": m.inner,
        "intermediate_size": m.inner * m.chosen,  # of dense layers, of which there are none
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
    }


YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
WINDOW, SWIGLU_LIMIT, SWIGLU_ALPHA = 128, 7.0, 1.702


def _gpt_oss(m: Model) -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_local_experts": m.experts,
        "num_experts_per_tok": m.chosen,
        "experts_per_token": m.chosen,
        "sliding_window": WINDOW,
        "layer_types": [("sliding", "full")[i % 2] + "_attention" for i in range(m.layers)],
        "max_position_embeddings": 131072,
        "initial_context_length": 4096,
        "rope_theta": 150000.0,
        "rope_scaling": YARN,
        "swiglu_limit": SWIGLU_LIMIT,
        "attention_bias": True,
        "router_aux_loss_coef": 0.9,
        "eos_token_id": 2,
    }


def _eagle(m: Model) -> dict[str, Any]:
    """A one-layer drafter for a Llama of the same sizes (vLLM's EAGLE)."""
    return {**_llama(m), "num_hidden_layers": 1}


CONFIGS: dict[str, Callable[[Model], dict[str, Any]]] = {
    "llama": _llama,
    "llama_fp8": _llama_fp8,
    "gemma": _gemma,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "eagle": _eagle,
}

Named = Iterator[tuple[str, Tensor]]


def _linear(out: int, fan_in: int, gain: float = GAIN) -> Tensor:
    return Tensor((out, fan_in), gain / math.sqrt(fan_in))


def _norm(size: int, mean: float = 1.0) -> Tensor:
    return Tensor((size,), 0.1, mean)


def _onto_residual(m: Model) -> float:
    return GAIN / math.sqrt(2 * m.layers)


def _attention(m: Model, prefix: str) -> Named:
    for name, heads in (("q", m.heads), ("k", m.kv_heads), ("v", m.kv_heads)):
        yield f"{prefix}.{name}_proj.weight", _linear(heads * m.head, m.hidden)
    yield f"{prefix}.o_proj.weight", _linear(m.hidden, m.heads * m.head, _onto_residual(m))


def _mlp(m: Model, prefix: str) -> Named:
    for name in ("gate", "up"):
        yield f"{prefix}.{name}_proj.weight", _linear(m.inner, m.hidden)
    yield f"{prefix}.down_proj.weight", _linear(m.hidden, m.inner, _onto_residual(m))


def _layer(m: Model, prefix: str, norm_mean: float = 1.0) -> Named:
    yield f"{prefix}.input_layernorm.weight", _norm(m.hidden, norm_mean)
    yield from _attention(m, f"{prefix}.self_attn")
    yield f"{prefix}.post_attention_layernorm.weight", _norm(m.hidden, norm_mean)


def _ends(m: Model) -> Named:
    yield "model.embed_tokens.weight", Tensor((m.vocabulary, m.hidden), 1.0)
    yield "model.norm.weight", _norm(m.hidden)
    yield "lm_head.weight", _linear(m.vocabulary, m.hidden, LOGITS)


def _layers(m: Model) -> Iterator[str]:
    return (f"model.layers.{i}" for i in range(m.layers))


def _tensors_llama(m: Model) -> Named:
    yield from _ends(m)
    for layer in _layers(m):
        yield from _layer(m, layer)
        yield from _mlp(m, f"{layer}.mlp")


def _tensors_llama_fp8(m: Model) -> Named:
    """Static scales. Those of matrices that a server joins are equal, so that it needs not quantise them again."""
    for name, tensor in _tensors_llama(m):
        if not name.endswith("_proj.weight"):
            yield name, tensor
            continue
        base = name.removesuffix("weight")
        scale = FP8_SCALES["weight"] * tensor.deviation / GAIN
        yield name, replace(tensor, kind="fp8", scale=scale)
        yield f"{base}weight_scale", Tensor((), 0.0, scale, kind="fp32")
        kind = "down" if "down_proj" in name else "input"
        yield f"{base}input_scale", Tensor((), 0.0, FP8_SCALES[kind], kind="fp32")


def _tensors_gemma(m: Model) -> Named:
    """Norms weigh by 1 + w. The head is the embedding. The signs of the last norm keep a token from naming itself; and
    since two tokens would then name each other, layers weigh more here than the embedding."""
    deviation = LOGITS / math.sqrt(m.hidden)
    yield "model.embed_tokens.weight", Tensor((m.vocabulary, m.hidden), deviation)
    yield "model.norm.weight", Tensor((m.hidden,), 0.1, 1.0, signs=True, minus=1.0)
    for layer in _layers(m):
        for name, tensor in (*_layer(m, layer, 0.0), *_mlp(m, f"{layer}.mlp")):
            onto_residual = "o_proj" in name or "down_proj" in name
            yield name, replace(tensor, deviation=tensor.deviation * 3 * LOGITS) if onto_residual else tensor


def _tensors_qwen3(m: Model) -> Named:
    yield from _ends(m)
    for layer in _layers(m):
        yield from _layer(m, layer)
        yield from _qk_norms(m, layer)
        yield from _mlp(m, f"{layer}.mlp")


def _qk_norms(m: Model, layer: str) -> Named:
    for name in ("q_norm", "k_norm"):
        yield f"{layer}.self_attn.{name}.weight", _norm(m.head, 1.25)


def _tensors_qwen3_moe(m: Model) -> Named:
    yield from _ends(m)
    for layer in _layers(m):
        yield from _layer(m, layer)
        yield from _qk_norms(m, layer)
        yield f"{layer}.mlp.gate.weight", _linear(m.experts, m.hidden)
        for expert in range(m.experts):
            yield from _mlp(m, f"{layer}.mlp.experts.{expert}")


def _tensors_gpt_oss(m: Model) -> Named:
    yield from _ends(m)
    for layer in _layers(m):
        yield from _layer(m, layer)
        attention, experts = f"{layer}.self_attn", f"{layer}.mlp.experts"
        for name, size in (("q", m.heads * m.head), ("k", m.kv_heads * m.head), ("v", m.kv_heads * m.head)):
            yield f"{attention}.{name}_proj.bias", Tensor((size,), 0.1)
        yield f"{attention}.o_proj.bias", Tensor((m.hidden,), 0.02)
        yield f"{attention}.sinks", Tensor((m.heads,), 1.0)
        yield f"{layer}.mlp.router.weight", _linear(m.experts, m.hidden)
        yield f"{layer}.mlp.router.bias", Tensor((m.experts,), 0.1)
        # Of all experts in one, inputs before outputs, gate and up in turn.
        yield f"{experts}.gate_up_proj", Tensor((m.experts, m.hidden, 2 * m.inner), GAIN / math.sqrt(m.hidden))
        yield f"{experts}.gate_up_proj_bias", Tensor((m.experts, 2 * m.inner), 0.1)
        yield f"{experts}.down_proj", Tensor((m.experts, m.inner, m.hidden), _onto_residual(m) / math.sqrt(m.inner))
        yield f"{experts}.down_proj_bias", Tensor((m.experts, m.hidden), 0.02)


def _tensors_eagle(m: Model) -> Named:
    yield "fc.weight", _linear(m.hidden, 2 * m.hidden)
    for name, tensor in (*_layer(m, "layers.0"), *_mlp(m, "layers.0.mlp")):
        if "input_layernorm" not in name:  # its input is not normed
            yield name, tensor


TENSORS: dict[str, Callable[[Model], Named]] = {
    "llama": _tensors_llama,
    "llama_fp8": _tensors_llama_fp8,
    "gemma": _tensors_gemma,
    "qwen3": _tensors_qwen3,
    "qwen3_moe": _tensors_qwen3_moe,
    "gpt_oss": _tensors_gpt_oss,
    "eagle": _tensors_eagle,
}
_MODELS = (
    Model("llama"),
    Model("llama_fp8"),
    Model("gemma", heads=16, kv_heads=16, head=256, inner=8192),
    Model("qwen3", hidden=4096, inner=12288),
    Model("qwen3_moe", hidden=2048, kv_heads=4, inner=768, experts=32, chosen=8),
    Model("gpt_oss", hidden=2880, heads=64, head=64, inner=2880, experts=8, chosen=4),
    Model("eagle", layers=1, seed=2),
)
MODELS = {model.architecture: model for model in _MODELS}


def tiny(architecture: str) -> Model:
    """The same in small, for a CPU. The heads are still dealt to two ranks."""
    full = MODELS[architecture]
    experts = {"experts": 4, "chosen": 2} if full.experts else {}
    layers = min(full.layers, 2)
    kv_heads = 4 if full.heads == full.kv_heads else 2
    return replace(
        full, layers=layers, hidden=64, heads=4, kv_heads=kv_heads, head=16, inner=96, vocabulary=512, **experts
    )
