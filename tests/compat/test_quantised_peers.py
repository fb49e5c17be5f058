"""The reference's quantised outputs beside those of others, by their own code out of their wheels, on the CPU: bit for
bit wherever both define the same. torchao's MXFP8 and NVFP4, vLLM's references of static FP8, FP8 by groups, MXFP8 and
NVFP4, and DeepGEMM's cast.

Norms are finite and of ordinary size: what peers do with NaN, infinity and next to nothing differs among them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compat.wheels import define, executed, text_of
from mnnvl_ar import reference
from mnnvl_ar.reference import codes, layouts

FP8, BYTES = torch.float8_e4m3fn, torch.uint8
ROWS, HIDDEN = 130, 1152  # 9 groups of 128, 36 blocks of 32, 72 of 16; more rows than a tile
AO, VLLM = "torchao/prototype/", "vllm/model_executor/layers/quantization/"
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def norm_of(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows of many sizes."""
    generator = torch.Generator().manual_seed(1)
    sizes = codes.power_of_two(torch.randint(-6, 7, (ROWS, 1), generator=generator))
    return (torch.randn(ROWS, HIDDEN, generator=generator) * sizes).to(dtype)


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """As bytes, row by row."""
    return torch.equal(got.contiguous().view(BYTES).flatten(), want.contiguous().view(BYTES).flatten())


def differ(got: torch.Tensor, want: torch.Tensor) -> float:
    """The share of codes that are not the same. None is off by more than one."""
    a, b = (each.contiguous().view(torch.int8).to(torch.int32).flatten() for each in (got, want))
    assert int((a - b).abs().max()) <= 1
    return float((a != b).float().mean())


# ---- torchao


def torchao(path: str) -> str:
    return text_of("torchao", "0.17.0", f"{AO}{path}")


def test_mxfp8_is_torchaos() -> None:
    """Its RCEIL scales; the others that it has are other scales."""
    ceiling = define(torchao("mx_formats/mx_tensor.py"), "_to_mx_rceil", {"torch": torch, "E8M0_EXPONENT_BIAS": 127})
    norm = norm_of()
    blocks = norm.float().view(ROWS, -1, 32)
    exponent, elements = ceiling(blocks, blocks.abs().amax(-1, keepdim=True), 448.0)
    got, scale = reference.mxfp8(norm, "linear")
    assert same(scale, exponent)
    assert same(got, elements.to(FP8))
    floored = exponent - 1
    assert not same(scale, floored), "the control"


def test_tiles_are_torchaos() -> None:
    text = torchao("mx_formats/utils.py")
    space: dict[str, Any] = {"torch": torch}
    define(text, "ceil_div", space)
    blocked = define(text, "to_blocked", space)
    for columns in (4, 36, 9):
        scales = torch.arange(ROWS * columns).remainder(251).to(BYTES).view(ROWS, columns)
        assert same(layouts.swizzled(scales), blocked(scales))
        assert not same(layouts.swizzled(scales), blocked(scales.roll(1, 0))), "the control"


def test_nvfp4_is_torchaos() -> None:
    """By a scale a tensor, the reciprocal of ours, that is a power of two: it divides by 6 and by the scale."""
    floats = executed(torchao("custom_fp_utils.py"), "custom_fp_utils")
    space: dict[str, Any] = {"torch": torch, "F4_E2M1_MAX": 6.0, "F8E4M3_MAX": 448.0, "E4M3_EPS": 2.0**-6}
    space["f32_to_f4_unpacked"] = lambda x: floats._f32_to_floatx_unpacked(x, 2, 1)
    space["pack_uint4"] = lambda x: x[..., ::2] | x[..., 1::2] << 4
    quantize = define(torchao("mx_formats/nvfp4_tensor.py"), "nvfp4_quantize", space)
    norm = norm_of()
    for exponent in (0, 3):
        scale, elements = quantize(norm, 16, torch.tensor(2.0**-exponent))
        got, want = reference.nvfp4(norm, 2.0**exponent, "linear")
        ordinary = want.float() >= 2**-6  # below, it takes 2^-6
        assert ordinary.float().mean() > 0.7
        assert same(want[ordinary], scale.flatten()[ordinary])
        blocks = got.view(-1, 8)[ordinary]
        assert same(blocks, elements.reshape(-1, 8)[ordinary])
        assert not same(blocks, elements.reshape(-1, 8)[ordinary] ^ 1), "the control"


# ---- vLLM


def vllm(path: str) -> str:
    return text_of("vllm", "0.33.0", f"{VLLM}{path}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["linear", "swizzled"])
def test_mxfp8_is_vllms(dtype: torch.dtype, layout: str) -> None:
    text = vllm("utils/mxfp8_utils.py")
    space: dict[str, Any] = {"torch": torch, "MXFP8_BLOCK_SIZE": 32, "MXFP8_VALUE_DTYPE": FP8}
    define(text, "swizzle_mxfp8_scale", space)
    norm = norm_of(dtype)
    elements, scale = define(text, "_mxfp8_e4m3_quantize_torch", space)(norm, layout == "swizzled")
    got, want = reference.mxfp8(norm, layout)
    assert same(got, elements)
    assert same(want, scale)
    assert not same(want, reference.mxfp8(-2 * norm, layout)[1]), "the control"


@pytest.mark.parametrize("scale", [1.0, 0.37, 896.0, 448 * 6 / 17.0])
def test_nvfp4_is_vllms(scale: float) -> None:
    """Values and scales of its reference; its kernels take approximate reciprocals."""
    text = vllm("utils/nvfp4_emulation_utils.py")
    space: dict[str, Any] = {"torch": torch, "FLOAT4_E2M1_MAX_RECIPROCAL": 1 / 6.0}
    for name in ("get_reciprocal", "cast_to_fp4"):
        define(text, name, space)
    norm = norm_of()
    values, block = define(text, "ref_nvfp4_quant", space)(norm, torch.tensor(scale), 16)
    got, want = reference.nvfp4(norm, scale, "linear")
    assert torch.equal(want.float(), block.flatten())
    nibbles = torch.stack([got & 15, got >> 4], -1).flatten().long()
    ours = VALUES[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
    assert torch.equal(ours, values.flatten())
    assert not torch.equal(ours, values.flatten().roll(1)), "the control"


def native(name: str, **settings: Any) -> Any:
    """A method of `QuantFP8` as its `forward_native` or what that calls, of an instance with these settings."""
    space: dict[str, Any] = {
        "torch": torch, "F": torch.nn.functional, "_FP8_DTYPE": FP8, "_FP8_MIN": -448.0, "_FP8_MAX": 448.0,
        "_FP8_MIN_SCALING_FACTOR": 1.0 / (448.0 * 512.0), "GroupShape": SimpleNamespace(PER_TOKEN="per token"),
        "prep_scale_for_group_broadcast": lambda scale, *_: scale, "group_broadcast": lambda scale, _: scale,
    }  # fmt: skip
    method = define(vllm("input_quant_fp8.py"), name, space)
    return lambda *given: method(SimpleNamespace(num_token_padding=None, is_group_quant=False, **settings), *given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_is_vllms(dtype: torch.dtype) -> None:
    """Static FP8, and the scales of each row; their codes are products with a reciprocal there."""
    norm = norm_of(dtype)
    for scale in (0.37, 3e-3, 2.0):
        elements, _ = native("forward_native", static=True, group_shape=None)(norm, torch.tensor(scale))
        assert same(reference.static_fp8(norm, scale), elements)
        assert not same(reference.static_fp8(norm, scale * 1.5), elements), "the control"
    got, want = reference.per_token_fp8(norm)
    elements, scales = native("forward_native", static=False, group_shape="per token")(norm)
    assert same(want, scales)
    assert 0 < differ(got, elements) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", ["fp32", "power_of_two"])
@pytest.mark.parametrize("layout", ["row_major", "column_major"])
def test_fp8_by_groups_is_vllms(dtype: torch.dtype, scales: str, layout: str) -> None:
    is_power, is_column_major = scales == "power_of_two", layout == "column_major"
    quantize = native("_quantize_group_native", group_size=128, use_ue8m0=is_power, column_major_scales=is_column_major)
    norm = norm_of(dtype)
    elements, scale = quantize(norm)
    got, want = reference.per_token_group_fp8(norm, scales, layout)
    assert same(got, elements)
    assert same(want, scale)
    assert want.stride() == scale.stride()
    other = reference.per_token_group_fp8(norm, "fp32" if is_power else "power_of_two", layout)
    assert not same(other[1], scale), "the control"


def test_packed_exponents_are_deepgemms() -> None:
    text = text_of("vllm", "0.33.0", "vllm/third_party/deep_gemm/utils/math.py")
    space: dict[str, Any] = {"torch": torch}
    for name in ("ceil_div", "align", "ceil_to_ue8m0", "pack_ue8m0_to_int"):
        define(text, name, space)
    cast = define(text, "per_token_cast_to_fp8", space)
    norm = norm_of()
    elements, packed = cast(norm, True, 128, True)
    got, want = reference.per_token_group_fp8(norm, "ue8m0", "tma_aligned")
    assert same(got, elements)
    assert torch.equal(want[:, :2], packed[:, :2])
    assert torch.equal(want[:, 2] & 0xFF, packed[:, 2] & 0xFF), "it pads the last word with ones"
    _, power = reference.per_token_group_fp8(norm, "power_of_two")
    assert same(power, cast(norm, True)[1])
    assert not same(power, cast(norm, False)[1]), "the control"
