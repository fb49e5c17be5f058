"""The epilogue of docs/tutorials/epilogue_in_python.md: the square of the norm where that is positive, else 0."""

from cutlass import Float32, Uint32

from mnnvl_ar.dsl import numerics, ptx


def relu_squared(norm: list[Float32]) -> ptx.Vector:
    stored = []
    for value in numerics.unpack(numerics.pack(norm)):  # the norm as it would have been stored
        word = numerics.as_bits(value)
        is_negative = (word > Uint32(0x80000000)) & (word <= Uint32(0xFF800000))  # down to -infinity; a NaN is not
        square = numerics.as_bits(numerics.mul(value, value))
        stored.append(numerics.as_float(ptx.select(is_negative, Uint32(0), square)))
    return numerics.pack(stored)
