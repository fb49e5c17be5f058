"""A written model's forward in plain PyTorch, every product, sum and norm in fp32: what both servers approximate.

    logprobs = Reference(folder, "cuda").logprobs(sequences)      # of each: [its length, vocabulary], fp32

Weights are those of the folder, as stored. Static FP8 belongs to the model: activations are rounded to it as well. One
layer's weights are on the device at a time, and all sequences pass it, so a large model needs little memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from servers.models.architectures import SWIGLU_ALPHA
from servers.models.tensors import read


class Reference:
    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._stored = {name: each for file in folder.glob("*.safetensors") for name, each in read(file).items()}
        self._device = torch.device(device)
        self.kind: str = self.config["model_type"]

    @torch.inference_mode()
    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            states = self._states(sequences)
            norm = self._weight("model.norm.weight")
            tied = self.config["tie_word_embeddings"]
            head = self._weight("model.embed_tokens.weight" if tied else "lm_head.weight")
            return [F.linear(self._norm(x, norm), head).log_softmax(-1) for x in states]
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    def _states(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        table = self._stored["model.embed_tokens.weight"]
        factor = math.sqrt(self.config["hidden_size"]) if self.kind == "gemma" else 1.0
        states = [table[torch.tensor(list(each))].to(self._device, torch.float32) * factor for each in sequences]
        for number in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{number}."
            weights = {
                name.removeprefix(prefix): self._weight(name) for name in self._stored if name.startswith(prefix)
            }
            states = [self._layer(x, weights, number) for x in states]
        return states

    def _layer(self, x: torch.Tensor, w: dict[str, torch.Tensor], number: int) -> torch.Tensor:
        x = x + self._attention(self._norm(x, w["input_layernorm.weight"]), w, number)
        return x + self._mlp(self._norm(x, w["post_attention_layernorm.weight"]), w)

    def _weight(self, name: str) -> torch.Tensor:
        """As fp32, and dequantised."""
        weight = self._stored[name].to(self._device).float()
        scale = self._stored.get(name.removesuffix("weight") + "weight_scale") if name.endswith("weight") else None
        return weight if scale is None else weight * scale.to(self._device)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return normed * (weight + 1.0 if self.kind == "gemma" and weight.numel() == x.shape[-1] else weight)

    def _linear(self, x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        scale = w.get(f"{name}.input_scale")
        if scale is not None:
            x = (x / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float() * scale
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def _attention(self, x: torch.Tensor, w: dict[str, torch.Tensor], number: int) -> torch.Tensor:
        c, tokens = self.config, x.shape[0]
        heads, kv_heads, size = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        q, k, v = (self._linear(x, w, f"self_attn.{name}_proj").view(tokens, -1, size) for name in "qkv")
        if "self_attn.q_norm.weight" in w:
            q, k = self._norm(q, w["self_attn.q_norm.weight"]), self._norm(k, w["self_attn.k_norm.weight"])
        cosine, sine = self._rotation(tokens, size)
        q, k = ((each * cosine + _half_turned(each) * sine).transpose(0, 1) for each in (q, k))
        k, v = (each.repeat_interleave(heads // kv_heads, 0) for each in (k, v.transpose(0, 1)))
        scores = q @ k.transpose(1, 2) / math.sqrt(size)
        age = torch.arange(tokens, device=x.device)[:, None] - torch.arange(tokens, device=x.device)
        hidden = age < 0
        if c.get("layer_types", ["full_attention"] * (number + 1))[number] == "sliding_attention":
            hidden = hidden | (age >= c["sliding_window"])
        scores = scores.masked_fill(hidden, -math.inf)
        if "self_attn.sinks" in w:
            sink = w["self_attn.sinks"].view(-1, 1, 1).expand(-1, tokens, 1)
            scores = torch.cat([scores, sink], -1)
        shares = scores.softmax(-1)[..., :tokens]
        return self._linear((shares @ v).transpose(0, 1).reshape(tokens, -1), w, "self_attn.o_proj")

    def _rotation(self, tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, [tokens, 1, size]."""
        c, place = self.config, self._device
        turns = c["rope_theta"] ** (-torch.arange(0, size, 2, device=place, dtype=torch.float32) / size)
        factor = 1.0
        if scaling := c.get("rope_scaling"):
            turns, factor = _yarn(turns, scaling, c["rope_theta"], size)
        angles = torch.arange(tokens, device=place, dtype=torch.float32)[:, None] * turns
        angles = torch.cat([angles, angles], -1)[:, None]
        return angles.cos() * factor, angles.sin() * factor

    def _mlp(self, x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.kind == "gpt_oss":
            return self._gpt_oss_experts(x, w)
        if self.kind == "qwen3_moe":
            return self._qwen3_experts(x, w)
        return self._dense(x, w, "mlp")

    def _dense(self, x: torch.Tensor, w: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
        gate, up = (self._linear(x, w, f"{prefix}.{name}_proj") for name in ("gate", "up"))
        activated = F.gelu(gate, approximate="tanh") if self.kind == "gemma" else F.silu(gate)
        return self._linear(activated * up, w, f"{prefix}.down_proj")

    def _qwen3_experts(self, x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
        shares, chosen = self._linear(x, w, "mlp.gate").softmax(-1).topk(self.config["num_experts_per_tok"], -1)
        shares = shares / shares.sum(-1, keepdim=True)
        return self._of_experts(x, shares, chosen, lambda rows, e: self._dense(rows, w, f"mlp.experts.{e}"))

    def _gpt_oss_experts(self, x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
        best, chosen = self._linear(x, w, "mlp.router").topk(self.config["num_experts_per_tok"], -1)
        limit = self.config["swiglu_limit"]

        def expert(rows: torch.Tensor, e: int) -> torch.Tensor:
            both = rows @ w["mlp.experts.gate_up_proj"][e] + w["mlp.experts.gate_up_proj_bias"][e]
            gate, up = both[:, ::2].clamp(max=limit), both[:, 1::2].clamp(-limit, limit)
            inner = (up + 1) * gate * torch.sigmoid(SWIGLU_ALPHA * gate)
            return inner @ w["mlp.experts.down_proj"][e] + w["mlp.experts.down_proj_bias"][e]

        return self._of_experts(x, best.softmax(-1), chosen, expert)

    def _of_experts(self, x: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor, expert: Any) -> torch.Tensor:
        total = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            rows, place = (chosen == number).nonzero(as_tuple=True)
            total[rows] += expert(x[rows], number) * shares[rows, place, None]
        return total


def _half_turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _yarn(turns: torch.Tensor, scaling: dict[str, Any], theta: float, size: int) -> tuple[torch.Tensor, float]:
    """Slow turns are slowed by the factor, quick ones stay, those between are mixed; and the factor of cosine and
    sine."""
    original = scaling["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(dimension(scaling["beta_fast"]), 0.0), min(dimension(scaling["beta_slow"]), size - 1.0)
    ramp = (torch.arange(size // 2, device=turns.device, dtype=torch.float32) - low) / max(high - low, 0.001)
    slowed = ramp.clamp(0, 1)
    factor = scaling["factor"]
    return turns / factor * slowed + turns * (1 - slowed), 0.1 * math.log(factor) + 1.0
