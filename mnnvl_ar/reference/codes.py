"""Conversions to e4m3, e2m1 and e8m0, as docs/numerics.md defines them."""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
E4M3_NAN, E8M0_NAN = 0x7F, 0xFF


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """fp32 -> float8_e4m3fn: to nearest even, what is beyond 448 to +-448, NaN of any sign and payload to 0x7F."""
    code = (
        x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    )  # which does not saturate in every version
    return torch.where(x.isnan(), E4M3_NAN, code).view(torch.float8_e4m3fn)


def e2m1(x: torch.Tensor) -> torch.Tensor:
    """fp32 -> codes 0 to 15 as uint8: to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to even codes; beyond 6, and
    NaN, which e2m1 has not, to the code of 6 (NaN: +6). The sign is bit 3."""
    a = x.abs()
    beyond = [a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0]
    code = torch.stack(beyond).sum(0).to(torch.uint8)
    return torch.where(x.isnan(), 7, code | x.signbit().to(torch.uint8) << 3).to(torch.uint8)


def exponent_up(x: torch.Tensor) -> torch.Tensor:
    """The least k with 2^k >= x, as int32, of fp32 that is positive and finite."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2^exponent, 0.5 <= mantissa < 1
    return exponent - (mantissa == 0.5).to(torch.int32)


def e8m0_up(x: torch.Tensor) -> torch.Tensor:
    """fp32 >= 0 -> uint8, k + 127 of the least power of two 2^k >= x: at least 0, and 254 at most, also of infinity;
    NaN is 0xFF."""
    plain = x.isfinite() & (x > 0)
    code = (exponent_up(torch.where(plain, x, 1.0)) + 127).clamp(0, 254)
    code = torch.where(plain, code, torch.where(x == 0, 0, torch.where(x.isnan(), E8M0_NAN, 254)))
    return code.to(torch.uint8)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent as fp32, of integers from -126 to 127, by way of the bits: powers from a math library may be off."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)
