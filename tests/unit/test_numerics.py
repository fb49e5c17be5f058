"""csrc/protocol/numerics.h on the host: conversions equal PyTorch's, steps mnnvl_ar.reference's, bit for bit.

And the claims of docs/numerics.md that the protocol rests on: a sum is never -0, so sanitising is seen in no result.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.cases.rules import flushing, rounding
from mnnvl_ar import reference

protocol = pytest.importorskip("_protocol", reason="tests/_protocol is not built: `make test-build`")

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HALF = ["bfloat16", "float16"]
DTYPES = list(TORCH)
PER_VECTOR = {"bfloat16": 8, "float16": 8, "float32": 4}
ALL_HALVES = np.arange(1 << 16, dtype=np.uint16)

# Zeros, subnormals, the ends of every range and NaN; for fp32 what bf16 and fp16 call special, too.
SPECIAL_HALVES = np.array(
    [
        0,
        1,
        2,
        0x7F,
        0x80,
        0x81,
        0x3FF,
        0x400,
        0x3C00,
        0x3F80,
        0x3F81,
        0x7BFF,
        0x7C00,
        0x7C01,
        0x7E00,
        0x7F7F,
        0x7F80,
        0x7FC0,
    ],
    dtype=np.uint16,
)
SPECIAL_HALVES = np.concatenate([SPECIAL_HALVES, SPECIAL_HALVES | 0x8000])
SPECIAL_WORDS = np.concatenate(
    [
        SPECIAL_HALVES.astype(np.uint32) << 16,
        (SPECIAL_HALVES.astype(np.uint32) << 16) + 1,
        SPECIAL_HALVES.astype(np.uint32),
    ]
)


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    return (
        tensor.contiguous()
        .view(torch.int16 if tensor.element_size() == 2 else torch.int32)
        .numpy()
        .view(np.uint16 if tensor.element_size() == 2 else np.uint32)
    )


def tensor_of(bits: np.ndarray, dtype: str) -> torch.Tensor:
    signed = np.ascontiguousarray(bits).view(np.int16 if dtype in HALF else np.int32)
    return torch.from_numpy(signed.copy()).view(TORCH[dtype])


def vectors_of(tensor: torch.Tensor) -> np.ndarray:
    """[..., hidden] -> uint32 [..., hidden / kPerVector, 4]."""
    rows = bits_of(tensor)
    return np.ascontiguousarray(rows).view(np.uint32).reshape(*rows.shape[:-1], -1, 4)


def random_bits(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Mostly of moderate size, as activations are; one in eight special; one in eight any bits."""
    rng = np.random.default_rng(seed)
    normal = torch.from_numpy(rng.standard_normal(shape)).float() * 2.0 ** int(rng.integers(-20, 20))
    bits = bits_of(normal.to(TORCH[dtype])).copy()
    kind = rng.integers(0, 8, shape)
    specials = SPECIAL_HALVES if dtype in HALF else SPECIAL_WORDS
    bits[kind == 0] = rng.choice(specials, shape)[kind == 0]
    bits[kind == 1] = rng.integers(0, 2 ** (16 if dtype in HALF else 32), shape).astype(bits.dtype)[kind == 1]
    return bits


def finite_bits(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """No NaN or infinity, so that a difference anywhere shows; zeros of both signs and subnormals among them."""
    bits = random_bits(dtype, shape, seed)
    huge = (
        ~torch.isfinite(tensor_of(bits, dtype).float()).numpy() | (tensor_of(bits, dtype).float().abs() > 100).numpy()
    )
    bits[huge] = bits.dtype.type(1 << (15 if dtype in HALF else 31))
    return bits


def assert_same(got: np.ndarray, want: torch.Tensor, dtype: str = "float32") -> None:
    """Bit for bit, NaN equal to NaN. got: the bits of `dtype`, of any shape of the same size."""
    tensor = tensor_of(np.ascontiguousarray(got).view(np.uint16 if dtype in HALF else np.uint32), dtype).reshape(
        want.shape
    )
    assert reference.same_bits(tensor, want)


# ---- conversions


@pytest.mark.parametrize("dtype", HALF)
def test_every_half_is_loaded_as_pytorch_does_and_rounds_to_itself(dtype: str) -> None:
    loaded = protocol.unpack(dtype, ALL_HALVES.view(np.uint32).reshape(-1, 4)).reshape(-1)
    assert_same(loaded, tensor_of(ALL_HALVES, dtype).float())
    is_nan = torch.isnan(tensor_of(ALL_HALVES, dtype)).numpy()
    back = protocol.round_halves(dtype, loaded)
    assert np.array_equal(back[~is_nan], ALL_HALVES[~is_nan])
    assert torch.isnan(tensor_of(back[is_nan], dtype)).all()


def boundary_words(dtype: str) -> np.ndarray:
    """Every fp32 word at which rounding to `dtype` changes its answer, and its neighbours: each half and each tie."""
    halves = tensor_of(ALL_HALVES, dtype)
    finite = torch.sort(halves[torch.isfinite(halves)].double())[0].numpy()
    beyond = 2 * finite[-1] - finite[-2]  # where the next half would be: the tie with it is where infinity begins
    points = np.concatenate([[-beyond], finite, [beyond]])
    ties = (points[1:] + points[:-1]) / 2
    exact = np.concatenate([finite, ties])
    values = exact.astype(np.float32)
    assert np.array_equal(values.astype(np.float64), exact), "all of them are fp32 values"
    words = values.view(np.uint32).astype(np.int64)
    words = np.concatenate([words - 1, words, words + 1]) % 2**32
    ends = np.array(
        [0, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7F80FFFF, 0x7FC00000, 0x7FFFFFFF]
    )
    return np.concatenate([words, ends, ends | 1 << 31]).astype(np.uint32)


def assert_rounds_as_pytorch(dtype: str, words: np.ndarray) -> None:
    want = tensor_of(words, "float32").to(TORCH[dtype])
    assert_same(protocol.round_halves(dtype, words), want, dtype)
    if words.size % 8 == 0:  # by way of vectors
        assert_same(protocol.pack(dtype, words.reshape(-1, 8)), want, dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_where_it_changes_its_answer(dtype: str) -> None:
    words = boundary_words(dtype)
    assert_rounds_as_pytorch(dtype, np.resize(words, -(-words.size // 8) * 8))


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_of_a_dense_sample(dtype: str) -> None:
    """Every word, against the GPU's conversions: tests/gpu/test_exhaustive.py."""
    stride = 211  # a prime, so that all low halves are met
    assert_rounds_as_pytorch(dtype, np.arange(0, 2**32, stride, dtype=np.uint64).astype(np.uint32))


@pytest.mark.parametrize("dtype", HALF)
def test_a_nan_stays_one(dtype: str) -> None:
    payloads = np.concatenate([np.arange(1, 1 << 16), np.arange(1, 1 << 23, 127), 2 ** np.arange(23)]).astype(np.uint32)
    for sign in (0, 1 << 31):
        halves = protocol.round_halves(dtype, payloads | np.uint32(0x7F800000 | sign))
        assert torch.isnan(tensor_of(halves, dtype)).all()
    assert torch.isnan(tensor_of(np.array([protocol.POISON], dtype=np.uint32), "float32")).all()


def test_fp32_vectors_cross_unchanged() -> None:
    words = np.concatenate([SPECIAL_WORDS, np.arange(0, 2**32, 65537 * 3, dtype=np.uint64).astype(np.uint32)])
    words = np.resize(words, -(-words.size // 4) * 4).reshape(-1, 4)
    assert np.array_equal(protocol.unpack("float32", words), words)
    assert np.array_equal(protocol.pack("float32", words), words)


# ---- the steps, against the reference

sizes = {"rows": st.integers(1, 3), "ranks": st.integers(1, 9), "seed": st.integers(0, 2**32 - 1)}
hidden = st.sampled_from([8, 64, 248, 256, 264, 512, 2880])  # less than a group, one, more, a ragged last one


def sum_of_ranks(dtype: str, inputs: np.ndarray) -> np.ndarray:
    """[ranks, rows, hidden] bits -> s as vectors [rows * vectors, 4]."""
    vectors = np.ascontiguousarray(inputs).view(np.uint32).reshape(inputs.shape[0], -1, 4)
    packed: np.ndarray = protocol.pack(dtype, protocol.sum_of_ranks(dtype, vectors))
    return packed


@pytest.mark.parametrize("dtype", DTYPES)
@given(hidden=hidden, **sizes)
@settings(max_examples=30)
def test_the_sum_is_the_references(dtype: str, hidden: int, rows: int, ranks: int, seed: int) -> None:
    inputs = random_bits(dtype, (ranks, rows, hidden), seed)
    want = reference.all_reduce(list(tensor_of(inputs, dtype)))
    assert_same(sum_of_ranks(dtype, inputs), want, dtype)


def by_protocol(
    dtype: str, inputs: np.ndarray, residual: np.ndarray, weight: torch.Tensor, eps: float, bias: float
) -> tuple[np.ndarray, np.ndarray]:
    """The fused call composed of the protocol's functions, (norm, residual_out) as vectors."""
    _, rows, row = inputs.shape
    per, vectors = PER_VECTOR[dtype], row // PER_VECTOR[dtype]
    z = protocol.add_residual(dtype, sum_of_ranks(dtype, inputs), residual.view(np.uint32).reshape(-1, 4))
    squares = np.zeros((rows, -(-vectors // protocol.GROUP) * protocol.GROUP), dtype=np.uint32)
    squares[:, :vectors] = protocol.square_sum(dtype, z).reshape(rows, vectors)
    groups = protocol.reduce_group(squares.reshape(rows, -1, protocol.GROUP)).view(np.float32).reshape(rows, -1)
    sums = np.zeros((4, rows), dtype=np.float32)
    with np.errstate(all="ignore"):
        for group in range(groups.shape[1]):
            sums[group % 4] += groups[:, group]
        total = (sums[0] + sums[1]) + (sums[2] + sums[3])
    rstd = protocol.reciprocal_root(total.view(np.uint32), float(row), eps)
    factors = np.tile(bits_of(weight.float()).reshape(-1, per), (rows, 1))
    return protocol.normalize(dtype, z, np.repeat(rstd, vectors), factors, bias), z


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [random_bits, finite_bits])
@given(
    hidden=hidden,
    eps=st.sampled_from([1e-6, 1e-5, 0.0, 1.0]),
    bias=st.sampled_from([0.0, 1.0, -0.5]),
    fp32_weight=st.booleans(),
    **sizes,
)
@settings(max_examples=30)
def test_the_fused_call_is_the_references(
    dtype: str,
    make: Callable[[str, tuple[int, ...], int], np.ndarray],
    hidden: int,
    rows: int,
    ranks: int,
    seed: int,
    eps: float,
    bias: float,
    fp32_weight: bool,
) -> None:
    inputs, residual = make(dtype, (ranks, rows, hidden), seed), make(dtype, (rows, hidden), seed ^ 1)
    weight_dtype = "float32" if fp32_weight else dtype
    weight = tensor_of(finite_bits(weight_dtype, (hidden,), seed ^ 2), weight_dtype)
    norm, z = by_protocol(dtype, inputs, residual, weight, eps, bias)
    want_norm, want_z = reference.all_reduce_rms_norm(
        list(tensor_of(inputs, dtype)), tensor_of(residual, dtype), weight, eps, bias
    )
    assert_same(z, want_z, dtype)
    assert_same(norm, want_norm, dtype)


def test_a_fused_multiply_add_or_another_order_would_show() -> None:
    """The control for the tests above: their data tell our order from a contracted one and from others."""
    wide = tensor_of(finite_bits("float32", (8, 64, 2880), 6), "float32")
    x = wide[0].unflatten(-1, (-1, 4))
    ours, contracted = torch.zeros(64, 720), torch.zeros(64, 720)
    for i in range(4):
        ours = ours + x[..., i] * x[..., i]
        contracted = (contracted.double() + x[..., i].double() ** 2).float()  # the product is exact in fp64
    got = protocol.square_sum("float32", vectors_of(wide[0]).reshape(-1, 4))
    assert_same(got, ours)
    assert not torch.equal(ours, contracted), "an fma"
    assert not torch.equal(reference.square_sum(wide[0]), (wide[0] * wide[0]).sum(-1)), "PyTorch's order"
    assert not torch.equal(reference.all_reduce(list(wide)), reference.all_reduce(list(wide.flip(0)))), (
        "another order of ranks"
    )
    halves = tensor_of(finite_bits("bfloat16", (8, 64, 2880), 6), "bfloat16")
    one_by_one = halves[0]
    for rank in range(1, 8):
        one_by_one = one_by_one + halves[rank]
    assert not torch.equal(reference.all_reduce(list(halves)), one_by_one), "a sum rounded at each rank"


@pytest.mark.parametrize("dtype", HALF)
def test_squares_of_halves_are_exact(dtype: str) -> None:
    """So for 16-bit rows a contraction could show only where a square is subnormal. For fp32 rows it does: above."""
    halves = tensor_of(ALL_HALVES, dtype)
    value = halves[torch.isfinite(halves) & (halves.float().abs() > 1e-15) & (halves.float().abs() < 1e18)]
    assert torch.equal((value.float() * value.float()).double(), value.double() * value.double())


def test_reciprocal_roots_are_correctly_rounded() -> None:
    """By way of fp64, as the reference does it: of an fp32 value the fp64 root, rounded to fp32, is the fp32 root."""
    words = np.concatenate([np.arange(0, 0x7F800000, 4093), SPECIAL_WORDS & 0x7FFFFFFF]).astype(np.uint32)
    mean = tensor_of(words, "float32")
    want = torch.ones(()) / torch.sqrt(mean.double()).float()
    assert_same(protocol.reciprocal_root(words, 1.0, 0.0), want)
    with np.errstate(all="ignore"):
        assert_same((np.float32(1) / np.sqrt(words.view(np.float32))).view(np.uint32), want)


# ---- the claims


@pytest.mark.parametrize("dtype", HALF)
def test_halves_are_multiples_of_the_least_one(dtype: str) -> None:
    """So is their fp32 sum, which is therefore zero or no smaller than that: rounding it makes no zero, nor a -0."""
    halves = tensor_of(ALL_HALVES, dtype).double()
    finite = halves[torch.isfinite(halves)]
    least = finite[finite > 0].min()
    assert torch.equal(finite / least, torch.round(finite / least))


def is_negative_zero(bits: np.ndarray) -> np.ndarray:
    found: np.ndarray = bits == bits.dtype.type(1 << (8 * bits.dtype.itemsize - 1))
    return found


def all_pairs(dtype: str) -> np.ndarray:
    """[2 ranks, n] bits: every half beside each special one in both orders; of fp32, every special word beside each."""
    if dtype in HALF:
        a, b = np.meshgrid(ALL_HALVES, SPECIAL_HALVES)
    else:
        near_zero = np.concatenate([np.arange(600), np.arange(0x7FFF00, 0x800100)])
        words = np.concatenate([SPECIAL_WORDS, near_zero, near_zero | 1 << 31]).astype(np.uint32)
        a, b = np.meshgrid(words, words)
    a, b = a.reshape(-1), b.reshape(-1)
    pairs = np.stack([np.concatenate([a, b]), np.concatenate([b, a])])
    return np.pad(pairs, ((0, 0), (0, -pairs.shape[1] % 8)))


def check_sums(dtype: str, inputs: np.ndarray) -> None:
    """inputs: [ranks, n] bits. No sum is -0, before or after rounding, and sanitising what is sent changes none."""
    vectors = np.ascontiguousarray(inputs).view(np.uint32).reshape(inputs.shape[0], -1, 4)
    total = protocol.sum_of_ranks(dtype, vectors)
    assert not is_negative_zero(total).any()
    s = protocol.pack(dtype, total)
    elements = s.view(np.uint16) if dtype in HALF else s
    assert not is_negative_zero(elements).any(), "so sanitising stage 2 of two-shot changes nothing"
    assert not np.any(s == protocol.SENTINEL)
    sent, arrived = protocol.wire("integer", True, vectors.reshape(-1, 4))
    assert arrived.all()
    again = protocol.sum_of_ranks(dtype, sent.reshape(vectors.shape))
    assert_same(again, tensor_of(total, "float32"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_all_pairs(dtype: str) -> None:
    check_sums(dtype, all_pairs(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", [1, 2])
def test_sums_of_the_sentinels_own_bits(dtype: str, world: int) -> None:
    check_sums(
        dtype, np.full((world, 32), protocol.SENTINEL, dtype=np.uint32).view(np.uint16 if dtype in HALF else np.uint32)
    )
    check_sums(dtype, np.full((world, 32), 0x80008000, dtype=np.uint32).view(np.uint16 if dtype in HALF else np.uint32))


@pytest.mark.parametrize("dtype", DTYPES)
@given(world=st.integers(1, 72), seed=st.integers(0, 2**32 - 1))
@example(world=72, seed=0)
@settings(max_examples=30)
def test_sums_of_any_ranks(dtype: str, world: int, seed: int) -> None:
    check_sums(dtype, random_bits(dtype, (world, 1024), seed))


def test_without_the_positive_start_a_zero_would_keep_the_wires_sign() -> None:
    """The control: a sum that starts from the first rank's value is -0 for -0 from all; sanitising would show."""
    zeros = [torch.full((8,), -0.0) for _ in range(4)]
    assert torch.signbit(zeros[0] + zeros[1]).all()
    assert not torch.signbit(reference.all_reduce(zeros)).any()


# ---- numbers of a norm: doubles as floats (csrc/protocol/nearest_float.h)

DOUBLES = np.array(
    [0.0, 0.1, 1e-6, 1.0, 3.4028235677973366e38, 3.5e38, 1e-45, 7e-46, 2.0**-150, 1e-300, 5e-324, np.inf]
)


def floats_of(values: np.ndarray) -> np.ndarray:
    return np.array([protocol.nearest_float(float(value)) for value in values], dtype=np.uint32)


def doubles_near_ties() -> np.ndarray:
    """Halfway between two floats, and the doubles beside that, over all exponents of floats and some beyond."""
    draw = np.random.default_rng(5)
    words = draw.integers(0, 0x7F800000, 2000, dtype=np.uint32)
    words = np.concatenate([words, np.arange(64, dtype=np.uint32), 0x7F7FFFC0 + np.arange(64, dtype=np.uint32)])
    here = words.view(np.float32).astype(np.float64)
    above = np.minimum(words + 1, 0x7F7FFFFF).astype(np.uint32).view(np.float32).astype(np.float64)
    ties = (here + above) / 2
    return np.concatenate([here, ties, np.nextafter(ties, 0), np.nextafter(ties, np.inf)])


def test_a_double_is_the_nearest_float() -> None:
    values = np.concatenate([DOUBLES, doubles_near_ties(), np.random.default_rng(6).normal(size=2000)])
    values = np.concatenate([values, -values])
    with np.errstate(over="ignore", under="ignore"):
        assert (floats_of(values) == values.astype(np.float32).view(np.uint32)).all()
    assert np.isnan(np.array([protocol.nearest_float(float("nan"))], dtype=np.uint32).view(np.float32))[0]


@pytest.mark.parametrize("way", ["down", "up", "to zero", "flush"])
def test_a_double_is_the_nearest_float_in_every_mode(way: str) -> None:
    """The control: a plain conversion is another one there."""
    values = np.concatenate([DOUBLES[:3], DOUBLES[6:7], doubles_near_ties()[::7]])
    with np.errstate(all="ignore"):
        wanted = values.astype(np.float32).view(np.uint32)
        with (flushing if way == "flush" else rounding(way))():
            found, plain = floats_of(values), values.astype(np.float32).view(np.uint32)
    assert (found == wanted).all()
    assert (plain != wanted).any()
