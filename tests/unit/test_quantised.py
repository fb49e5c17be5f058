"""Quantised outputs as functions of norm: csrc/protocol against mnnvl_ar.reference, bit for bit; both against what a
consumer makes of them, and against figures that can be worked out by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mnnvl_ar import reference
from mnnvl_ar.reference import codes, layouts

protocol = pytest.importorskip("_protocol", reason="tests/_protocol is not built: `make test-build`")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
E4M3_NAN = 0x7F
INF, NAN = float("inf"), float("nan")


def halves(norm: torch.Tensor) -> np.ndarray:
    bits: np.ndarray = norm.contiguous().view(torch.int16).numpy().view(np.uint16)
    return bits


def word(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def rows(dtype: str, shape: tuple[int, int], seed: int, special: int = 64, block: int = 16) -> torch.Tensor:
    """Norms of many sizes, block by block; one element in `special` is any half, often NaN or infinite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    sizes = torch.randint(-20, 15, (shape[0], shape[1] // block), generator=generator).repeat_interleave(block, 1)
    sizes[torch.rand(sizes.shape, generator=generator) < 0.5] = 0
    x = (x * codes.power_of_two(sizes)).to(DTYPES[dtype])
    bits = torch.randint(-(1 << 15), 1 << 15, shape, generator=generator).to(torch.int16)
    any_half = bits.view(DTYPES[dtype])
    any_half = torch.where(bits % 16 == 1, torch.nan, torch.where(bits % 16 == 2, torch.inf, any_half))
    return torch.where(torch.randint(0, special, shape, generator=generator) == 0, any_half, x)


def every_half(dtype: str, block: int) -> torch.Tensor:
    """[65536, block]: each half as the largest of a block, beside its own fractions: every `most` there is."""
    each = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    part = torch.linspace(-1, 1, block).to(DTYPES[dtype])
    part[-1] = 1
    return each.unsqueeze(-1) * part


# ---- the same from both, by kind: (codes, scales), each as bytes or fp32


def unswizzled(flat: torch.Tensor, count: int, columns: int) -> torch.Tensor:
    """[rows, columns] out of tiles, by the offset that consumers publish."""
    m, k = torch.arange(count).unsqueeze(-1), torch.arange(columns)
    tile = m // 128 * -(-columns // 4) + k // 4
    return flat.view(torch.uint8)[tile * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4]


def fp32(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(words.view(np.float32).copy())


Pair = tuple[torch.Tensor, torch.Tensor]
KINDS: dict[str, tuple[int, Callable[[str, torch.Tensor], Any], Callable[[torch.Tensor], Any]]] = {
    # name: elements that share a scale (0: a row), ours, the reference's
    "per token": (0, lambda d, n: protocol.per_token_fp8(d, halves(n)), reference.per_token_fp8),
    "per group": (128, lambda d, n: protocol.per_token_group_fp8(d, halves(n), False), reference.per_token_group_fp8),
    "per group, power of two": (
        128,
        lambda d, n: protocol.per_token_group_fp8(d, halves(n), True),
        lambda n: reference.per_token_group_fp8(n, "power_of_two"),
    ),
    "mxfp8": (32, lambda d, n: protocol.mxfp8(d, halves(n)), lambda n: reference.mxfp8(n, "linear")),
}
GLOBALS = [1.0, 0.37, 896.0, 2.0**-9, 448 * 6 / 3.1, -3.0, 0.0, -0.0, 1e-40, 3e38, INF, -INF, NAN]


def both(kind: str, dtype: str, norm: torch.Tensor) -> tuple[Pair, Pair]:
    _, ours, theirs = KINDS[kind]
    code, scale = ours(dtype, norm)
    want_code, want_scale = theirs(norm)
    got_scale = fp32(scale) if scale.dtype == np.uint32 else torch.from_numpy(scale)
    return (torch.from_numpy(code), got_scale.reshape(want_scale.shape)), (want_code.view(torch.uint8), want_scale)


def assert_same(kind: str, dtype: str, norm: torch.Tensor) -> None:
    (code, scale), (want_code, want_scale) = both(kind, dtype, norm)
    assert reference.same_bits(scale, want_scale), kind
    assert torch.equal(code, want_code), kind


def assert_same_static(dtype: str, norm: torch.Tensor, scale: float) -> None:
    got = torch.from_numpy(protocol.static_fp8(dtype, halves(norm), word(scale)))
    assert torch.equal(got, reference.static_fp8(norm, scale).view(torch.uint8)), scale


def assert_same_nvfp4(dtype: str, norm: torch.Tensor, scale: float) -> None:
    code, block = protocol.nvfp4(dtype, halves(norm), word(scale))
    want_code, want_block = reference.nvfp4(norm, scale, "linear")
    assert torch.equal(torch.from_numpy(block).reshape(-1), want_block.view(torch.uint8)), scale
    assert torch.equal(torch.from_numpy(code), want_code), scale


sizes = {"count": st.integers(1, 4), "groups": st.sampled_from([1, 2, 3, 5]), "seed": st.integers(0, 2**32 - 1)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@given(special=st.sampled_from([4, 64, 100_000]), **sizes)
@settings(max_examples=30)
def test_ours_is_the_references(kind: str, dtype: str, count: int, groups: int, seed: int, special: int) -> None:
    assert_same(kind, dtype, rows(dtype, (count, 128 * groups), seed, special))


@pytest.mark.parametrize("dtype", DTYPES)
@given(scale=st.one_of(st.sampled_from(GLOBALS), st.floats(width=32)), **sizes)
@settings(max_examples=60)
def test_static_is_the_references(dtype: str, count: int, groups: int, seed: int, scale: float) -> None:
    assert_same_static(dtype, rows(dtype, (count, 128 * groups), seed), scale)


@pytest.mark.parametrize("dtype", DTYPES)
@given(scale=st.one_of(st.sampled_from(GLOBALS), st.floats(width=32)), **sizes)
@example(scale=1e-40, count=4, groups=5, seed=0)
@settings(max_examples=60)
def test_nvfp4_is_the_references(dtype: str, count: int, groups: int, seed: int, scale: float) -> None:
    assert_same_nvfp4(dtype, rows(dtype, (count, 128 * groups), seed), scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_largest_magnitude(kind: str, dtype: str) -> None:
    assert_same(kind, dtype, every_half(dtype, KINDS[kind][0] or 32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", GLOBALS)
def test_every_largest_magnitude_of_nvfp4_and_static(dtype: str, scale: float) -> None:
    norm = every_half(dtype, 16)
    assert_same_nvfp4(dtype, norm, scale)
    assert_same_static(dtype, norm, scale)


# ---- other arithmetic would show


def plain(dtype: str) -> torch.Tensor:
    return torch.randn((256, 2048), generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_arithmetic_would_show(dtype: str) -> None:
    """The control: what peers do instead changes bits on rows like these."""
    norm = plain(dtype)
    x = norm.float()
    code, scale = reference.per_token_fp8(norm)
    assert not torch.equal(code.view(torch.uint8), codes.e4m3(x * (1 / scale)).view(torch.uint8)), "reciprocals"
    _, scale = reference.per_token_group_fp8(norm)
    by_factor = x.view(256, -1, 128).abs().amax(-1) * torch.tensor(1 / 448, dtype=torch.float32)
    assert not torch.equal(scale, by_factor), "a product with fl(1 / 448)"
    for g in (896.0, 1024.0):
        code, block = reference.nvfp4(norm, g, "linear")
        quotient = (g / block.float().view(256, -1, 1)) * x.view(256, -1, 16)
        other = codes.e2m1(quotient).view(256, -1, 2)
        same = torch.equal(code, other[..., 0] | other[..., 1] << 4)
        assert same == (g == 1024.0), "a quotient in place of two reciprocals; alike where g is a power of two"
    ulp = torch.nextafter(torch.tensor(0.25), torch.tensor(1.0))
    assert not torch.equal(*(reference.static_fp8(norm, s).view(torch.uint8) for s in (torch.tensor(0.25), ulp)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_bit_is_seen(kind: str) -> None:
    norm = plain("bfloat16")[:2]
    wrong = norm.clone()
    wrong[1, 5] = -wrong[1, 5]
    (code, _), _ = both(kind, "bfloat16", wrong)
    _, (want, _) = both(kind, "bfloat16", norm)
    assert not torch.equal(code, want)


# ---- what a consumer makes of them


def assert_close(x: torch.Tensor, back: torch.Tensor, relative: float, step: torch.Tensor) -> None:
    """`back` is x but for half a step of a code: relative to x, or to the scale where codes are subnormal."""
    slack = 1 + 2.0**-18
    assert bool(((x - back).abs() <= torch.maximum(relative * x.abs(), step) * slack).all())


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_consumers_get_the_norm_back(dtype: str, seed: int) -> None:
    norm = (torch.randn((5, 512), generator=torch.Generator().manual_seed(seed)) * 2.0 ** (seed % 17 - 8)).to(
        DTYPES[dtype]
    )
    x = norm.float()
    amax = x.abs().amax()
    scale = amax / 448
    assert_close(x, reference.static_fp8(norm, scale).float() * scale, 2**-4, scale * 2**-10)
    code, scale = reference.per_token_fp8(norm)
    assert_close(x, code.float() * scale, 2**-4, scale * 2**-10)
    for kind in ("fp32", "power_of_two"):
        code, scale = reference.per_token_group_fp8(norm, kind)
        wide = scale.repeat_interleave(128, -1)
        assert_close(x, code.float() * wide, 2**-4, wide * 2**-10)
    code, packed = reference.per_token_group_fp8(norm, "ue8m0", "tma_aligned")
    exponent = torch.stack([packed >> 8 * byte & 0xFF for byte in range(4)], -1).view(5, -1)[:, :4]
    wide = codes.power_of_two(exponent - 127).repeat_interleave(128, -1)
    assert_close(x, code.float() * wide, 2**-4, wide * 2**-10)
    code, flat = reference.mxfp8(norm)
    wide = codes.power_of_two(unswizzled(flat, 5, 16).to(torch.int32) - 127).repeat_interleave(32, -1)
    assert_close(x, code.float() * wide, 2**-4, wide * 2**-10)
    g = 448 * 6 / amax
    code, flat = reference.nvfp4(norm, g)
    sf = unswizzled(flat, 5, 32).view(torch.float8_e4m3fn).float()
    wide = (sf / g).repeat_interleave(16, -1)
    value = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = torch.stack([code & 15, code >> 4], -1).view(5, 512).long()
    back = value[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0) * wide
    ordinary = wide * g >= 2**-6  # a subnormal scale is off by more than a sixteenth
    assert_close(x[ordinary], back[ordinary], 0.2, wide[ordinary] * 0.25)


# ---- figures


def one_row(*values: float, width: int = 128, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    row = torch.zeros(1, width, dtype=dtype)
    row[0, : len(values)] = torch.tensor(values, dtype=dtype)
    return row


def test_rows_of_zeros() -> None:
    zero = one_row()
    assert reference.per_token_fp8(zero)[1].view(torch.int32).item() == 0x36924925
    assert reference.per_token_group_fp8(zero)[1].view(torch.int32).item() == 0x2A7B5123
    assert reference.per_token_group_fp8(zero, "ue8m0", "tma_aligned")[1].item() == 0x5E
    assert reference.per_token_group_fp8(zero, "power_of_two")[1].item() == 2.0 ** (0x5E - 127)
    assert set(reference.mxfp8(zero, "linear")[1].tolist()) == {0}
    code, scale = reference.nvfp4(zero, 2.0, "linear")
    assert not code.any()
    assert not scale.view(torch.uint8).any()


def test_infinities() -> None:
    row = one_row(INF, 1.0, -2.0)
    for code, scale in (reference.per_token_fp8(row), reference.per_token_group_fp8(row)):
        assert code.view(torch.uint8)[0, :3].tolist() == [E4M3_NAN, 0, 0x80]
        assert scale.item() == INF
    assert reference.per_token_group_fp8(row, "ue8m0", "tma_aligned")[1].item() == 0xFF
    code, scale = reference.mxfp8(row, "linear")
    assert code.view(torch.uint8)[0, :3].tolist() == [E4M3_NAN, 0, 0x80]
    assert scale[0].item() == 254
    code, scale = reference.nvfp4(row, 1.0, "linear")
    assert code[0, :2].tolist() == [0x07, 0x08]
    assert scale.view(torch.uint8)[0].item() == 0x7E
    assert reference.static_fp8(row, 1.0).view(torch.uint8)[0, :2].tolist() == [0x7E, 0x38]


def test_static_scales_that_are_no_scales() -> None:
    row = one_row(0.0, 1.0, -1.0)
    want = {
        0.0: [0x7F, 0x7E, 0xFE],
        1e-40: [0x7F, 0x7E, 0xFE],
        INF: [0, 0, 0x80],
        NAN: [0x7F] * 3,
        -1.0: [0x80, 0xB8, 0x38],
    }
    for scale, code in want.items():
        assert reference.static_fp8(row, scale).view(torch.uint8)[0, :3].tolist() == code, scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", GLOBALS)
def test_a_nan_never_becomes_a_number(dtype: str, scale: float) -> None:
    """Wherever norm is NaN, its element is, by its code or by its scale; with it all that share a scale."""
    norm = rows(dtype, (16, 256), 3, special=40)
    nan = norm.isnan()
    assert nan.any()
    assert not nan.view(16, -1, 128).any(-1).all()
    assert bool((reference.static_fp8(norm, scale).view(torch.uint8)[nan] == E4M3_NAN).all())
    for kind, (block, _, _) in KINDS.items():
        _, (code, got) = both(kind, dtype, norm)
        shared = nan.view(16, -1, block or 256).any(-1)
        lost = got.isnan() if got.is_floating_point() else got == 0xFF
        assert torch.equal(lost.view(shared.shape), shared), kind
        assert bool((code.view(16, -1, block or 256)[shared] == E4M3_NAN).all()), kind
    _, got = reference.nvfp4(norm, scale, "linear")
    lost, shared = got.float().isnan().view(16, -1), nan.view(16, -1, 16).any(-1)
    assert bool((lost | ~shared).all())
    if scale in (1.0, 0.37, 896.0, 2.0**-9, -3.0):
        assert torch.equal(lost, shared)


@pytest.mark.parametrize("scale", GLOBALS)
def test_nvfp4_has_no_code_of_an_undefined_product(scale: float) -> None:
    """Where norm * factor would be NaN, as 0 * infinity is, the scale says so: e2m1 could not."""
    norm = every_half("bfloat16", 16)
    code, flat = reference.nvfp4(norm, scale, "linear")
    undefined = torch.stack([code & 15, code >> 4], -1).view(norm.shape).eq(7) & norm.float().eq(0)
    assert bool(flat.float().isnan()[undefined.any(-1)].all())


# ---- layouts


def padded_bytes(count: int, columns: int) -> torch.Tensor:
    return torch.arange(1, count * columns + 1).remainder(251).add(1).to(torch.uint8).view(count, columns)


@given(count=st.integers(0, 300), columns=st.integers(1, 40))
@example(count=128, columns=4)
@example(count=129, columns=5)
@settings(max_examples=60)
def test_layouts(count: int, columns: int) -> None:
    scales = padded_bytes(count, columns)
    flat = layouts.swizzled(scales)
    assert flat.numel() == -(-count // 128) * 128 * (-(-columns // 4) * 4)
    assert torch.equal(unswizzled(flat, count, columns) if count else scales, scales)
    assert int(flat.ne(0).sum()) == scales.numel(), "padding is 0, and no scale is"
    assert torch.equal(torch.from_numpy(protocol.swizzled(scales.numpy(), 0)), flat)
    assert torch.equal(torch.from_numpy(protocol.linear(scales.numpy(), 9)), layouts.linear(scales))

    packed = layouts.packed(scales)
    aligned = -(-count // 4) * 4
    assert packed.shape == (count, -(-columns // 4))
    assert count == 0 or packed.stride() == (1, aligned)
    assert count == 0 or packed.untyped_storage().nbytes() == 4 * (count + (-(-columns // 4) - 1) * aligned)
    memory = torch.tensor([], dtype=torch.uint8).set_(packed.untyped_storage())
    assert torch.equal(torch.from_numpy(protocol.packed(scales.numpy(), 0)), memory)
    for column in range(columns):
        word = packed[:, column // 4] >> 8 * (column % 4) & 0xFF
        assert torch.equal(word.to(torch.uint8), scales[:, column])


def test_another_padding_or_layout_is_seen() -> None:
    """The control."""
    scales = padded_bytes(5, 6)
    assert not torch.equal(torch.from_numpy(protocol.swizzled(scales.numpy(), 1)), layouts.swizzled(scales))
    assert not torch.equal(layouts.swizzled(scales)[:30], layouts.linear(scales))
    assert layouts.packed(scales).stride() != layouts.packed(scales).contiguous().stride()


@given(
    in_tiles=st.booleans(),
    count=st.integers(1, 300),
    columns=st.integers(1, 70),
    cut=st.integers(0, 300),
    workers=st.sampled_from([1, 32, 64, 96, 1024]),
)
@example(in_tiles=True, count=1, columns=64, cut=0, workers=64)
@example(in_tiles=True, count=40, columns=5, cut=39, workers=96)
@settings(max_examples=80)
def test_padding_is_stored_once(in_tiles: bool, count: int, columns: int, cut: int, workers: int) -> None:
    """Every byte that is no scale, by one of the threads of one of the launches, and no other byte."""
    lay_out = protocol.swizzled if in_tiles else protocol.packed
    is_scale = torch.from_numpy(lay_out(torch.ones(count, columns, dtype=torch.uint8).numpy(), 0))
    launches = [(0, cut), (cut, count - cut)] if cut < count else [(0, count)]
    stored = sum(
        torch.from_numpy(protocol.padded(in_tiles, count, columns, first, rows, workers).astype("int64"))
        for first, rows in launches
        if rows
    )
    assert torch.equal(stored, 1 - is_scale.to(torch.int64))


def test_fp32_layouts_hold_the_same_scales() -> None:
    norm = plain("bfloat16")[:5]
    want_code, want = reference.per_token_group_fp8(norm)
    for layout, stride in (("column_major", (1, 5)), ("tma_aligned", (1, 8))):
        code, scale = reference.per_token_group_fp8(norm, "fp32", layout)
        assert scale.stride() == stride
        assert torch.equal(scale, want)
        assert torch.equal(code.view(torch.uint8), want_code.view(torch.uint8))
    assert protocol.tma_stride(5) == 8


def test_shapes_and_dtypes() -> None:
    norm = plain("float16")[:6].view(2, 3, 2048)
    assert reference.static_fp8(norm, 1.0).shape == norm.shape
    code, scale = reference.per_token_fp8(norm)
    assert (code.dtype, code.shape, scale.dtype, scale.shape) == (
        torch.float8_e4m3fn,
        norm.shape,
        torch.float32,
        (6, 1),
    )
    code, scale = reference.per_token_group_fp8(norm, "ue8m0", "tma_aligned")
    assert (scale.dtype, scale.shape) == (torch.int32, (6, 4))
    code, scale = reference.nvfp4(norm, 1.0)
    assert (code.dtype, code.shape) == (torch.uint8, (2, 3, 1024))
    assert (scale.dtype, scale.shape) == (torch.float8_e4m3fn, (128 * 128,))
    none = reference.per_token_fp8(norm[:0])
    assert (none[0].shape, none[1].shape) == ((0, 3, 2048), (0, 1))


def test_refusals() -> None:
    norm = plain("bfloat16")[:1, :144]
    for call, says in (
        (lambda: reference.static_fp8(norm.float(), 1.0), "norm: is torch.float32, wanted"),
        (lambda: reference.per_token_group_fp8(norm), "norm: rows of 144 elements, wanted a multiple of 128"),
        (lambda: reference.mxfp8(norm), "wanted a multiple of 32"),
        (lambda: reference.nvfp4(norm[:, :24], 1.0), "wanted a multiple of 16"),
        (lambda: reference.mxfp8(norm[:, :128], "8x4"), "layout: is '8x4', wanted swizzled or linear"),
        (lambda: reference.per_token_group_fp8(norm[:, :128], "e5m2"), "scales: is 'e5m2', wanted"),
        (lambda: reference.per_token_group_fp8(norm[:, :128], "ue8m0"), "wanted tma_aligned, the only one"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
