"""The one answer, bit for bit: csrc/protocol/numerics.h for bf16 (docs/numerics.md).

Contract
  * Everything is IEEE binary32, to nearest even, one rounding an operation, subnormals kept. A product is rounded
    before it is added.
  * A plain `a * b + c` of two Float32 is contracted by the DSL's compiler, and no option of it says otherwise. So
    no operator computes here: `add`, `mul`, `divide` and `root` do, which name their rounding.
    lint.py says where one does, here or in an epilogue of yours.
  * A vector is a tuple of four Uint32: eight bf16, the first in the low half of the first word.
"""

from cutlass import Float32, Uint32
from cutlass.cute import arch
from cutlass.cute import math as ieee

from mnnvl_ar.dsl import ptx
from mnnvl_ar.dsl.constants import POISON_PAIR

NEAREST = ieee.RoundingMode.NEAREST_EVEN


def add(a: Float32, b: Float32) -> Float32:
    return ieee.add(a, b, rounding=NEAREST)


def mul(a: Float32, b: Float32) -> Float32:
    return ieee.mul(a, b, rounding=NEAREST)


def divide(a: Float32, b: Float32) -> Float32:
    return ieee.div(a, b, rounding=NEAREST)


def root(a: Float32) -> Float32:
    return ieee.sqrt(a, rounding=NEAREST)


def as_float(bits: Uint32) -> Float32:
    return bits.bitcast(Float32)


def as_bits(value: Float32) -> Uint32:
    return value.bitcast(Uint32)


def unpack(v: ptx.Vector) -> list[Float32]:
    """Eight elements, exactly."""
    halves = []
    for word in v:
        halves.append(as_float(word << 16))
        halves.append(as_float(word & Uint32(0xFFFF0000)))
    return halves


def pack(values: list[Float32]) -> ptx.Vector:
    """Rounds each to bf16."""
    low, high = values[::2], values[1::2]
    words = [ptx.round2(a, b) for a, b in zip(low, high, strict=True)]
    return (words[0], words[1], words[2], words[3])


def poison() -> ptx.Vector:
    nan = Uint32(POISON_PAIR)
    return (nan, nan, nan, nan)


def zeros() -> list[Float32]:
    return [Float32(0.0) for _ in range(8)]


def accumulate(sums: list[Float32], x: ptx.Vector) -> list[Float32]:
    """Step 1: called once a rank, in rank order, on sums that start as +0."""
    return [add(one, other) for one, other in zip(sums, unpack(x), strict=True)]


def add_residual(s: ptx.Vector, residual: ptx.Vector) -> ptx.Vector:
    """Step 2."""
    return pack([add(a, b) for a, b in zip(unpack(s), unpack(residual), strict=True)])


def square_sum(z: ptx.Vector) -> Float32:
    """Step 3, within a vector."""
    q = Float32(0.0)
    for value in unpack(z):
        q = add(q, mul(value, value))
    return q


def reduce_group(q: Float32) -> Float32:
    """Step 3, within a group: by all lanes of a warp."""
    for step in range(5):
        q = add(q, arch.shuffle_sync_bfly(q, offset=16 >> step))
    return q


def total(groups: list[Float32]) -> Float32:
    """Step 3, over the groups of a row, in ascending order; groups that are not there are +0."""
    sums = []
    for first in range(4):
        one = Float32(0.0)
        for group in groups[first::4]:
            one = add(one, group)
        sums.append(one)
    return add(add(sums[0], sums[1]), add(sums[2], sums[3]))


def reciprocal_root(square_sum: Float32, hidden: Float32, eps: Float32) -> Float32:
    """Step 4."""
    return divide(Float32(1.0), root(add(divide(square_sum, hidden), eps)))


def normalize(z: ptx.Vector, rstd: Float32, weight: list[Float32], weight_bias: Float32) -> list[Float32]:
    """Step 5, before it is rounded to bf16."""
    return [mul(mul(value, rstd), add(weight_bias, factor)) for value, factor in zip(unpack(z), weight, strict=True)]
