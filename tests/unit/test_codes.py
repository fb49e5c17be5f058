"""Conversions to e4m3, e2m1 and e8m0, of csrc/protocol and of mnnvl_ar.reference: against their definition, PyTorch,
ml_dtypes and NVIDIA's host headers, bit for bit, wherever those define the same.

All words are decided by few: a conversion is a monotone step function whose steps have at most 7 mantissa bits, so that
between two words of the same upper half it can change beside 0x0000, 0x8000 and 0xffff only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mnnvl_ar.reference import codes as reference

protocol = pytest.importorskip("_protocol", reason="tests/_protocol is not built: `make test-build`")

ROOT = Path(__file__).parent.parent.parent
Convert = Callable[[np.ndarray], np.ndarray]
LOWER = (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
DECISIVE = (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | np.array(LOWER, dtype=np.uint32)).reshape(-1)
HALVES = {
    dtype: np.arange(-(1 << 15), 1 << 15, dtype=np.int16) for dtype in (torch.bfloat16, torch.float16)
}  # all of them


def floats(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(words.astype(np.uint32).view(np.int32)).view(torch.float32)


def of_reference(convert: Callable[[torch.Tensor], torch.Tensor]) -> Convert:
    return lambda words: convert(floats(words)).view(torch.uint8).numpy()


E4M3 = {"protocol": protocol.e4m3, "reference": of_reference(reference.e4m3)}
E2M1 = {"protocol": protocol.e2m1, "reference": of_reference(reference.e2m1)}
E8M0 = {"protocol": protocol.e8m0_up, "reference": of_reference(reference.e8m0_up)}
both = pytest.mark.parametrize("of", ["protocol", "reference"])


# ---- the definition

# The finite values of the positive codes, in order.
VALUES_E4M3 = np.array([m / 512 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127])
VALUES_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest(values: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Codes by their definition: the nearest value, of two the one with the even code; beyond the last, the last.
    In fp64, where distances of fp32 numbers to these values are exact or far from a tie. Not for NaN."""
    x = np.abs(words.view(np.float32).astype(np.float64))
    above = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
    tie = (values[above - 1] + values[above]) / 2
    code = np.where((x > tie) | ((x == tie) & (above % 2 == 0)), above, above - 1)
    return code.astype(np.uint8)


def breakpoints(values: np.ndarray) -> np.ndarray:
    """Words of all values, of all ties between them, and of the words beside those, of both signs."""
    beyond = values[-1] * 2 - values[-2]  # where the next value would be
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2, [beyond, (values[-1] + beyond) / 2]])
    exact = points.astype(np.float32)
    assert np.array_equal(exact.astype(np.float64), points)
    words = exact.view(np.uint32).astype(np.int64)
    words = np.unique(np.clip(np.concatenate([words - 1, words, words + 1]), 0, 0x7F800000)).astype(np.uint32)
    return np.concatenate([words, words | 1 << 31]).astype(np.uint32)


def signed(code: np.ndarray, words: np.ndarray, bit: int) -> np.ndarray:
    return code | ((words >> 31) << bit).astype(np.uint8)


def wrong(convert: Convert, words: np.ndarray, want: np.ndarray) -> list[str]:
    """Words whose code is another than wanted."""
    got = convert(words)
    return [f"{words[i]:#010x}: {got[i]:#x}, wanted {want[i]:#x}" for i in np.flatnonzero(got != want)]


FORMATS = {"e4m3": (E4M3, VALUES_E4M3, 7), "e2m1": (E2M1, VALUES_E2M1, 3)}


@both
@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_the_nearest_at_every_breakpoint(name: str, of: str) -> None:
    convert, values, sign = FORMATS[name]
    words = breakpoints(values)
    assert wrong(convert[of], words, signed(nearest(values, words), words, sign)) == []


@both
@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_the_nearest_of_every_word_that_decides(name: str, of: str) -> None:
    convert, values, sign = FORMATS[name]
    words = DECISIVE[~np.isnan(DECISIVE.view(np.float32))]
    assert wrong(convert[of], words, signed(nearest(values, words), words, sign)) == []


@pytest.mark.parametrize("name", FORMATS)
def test_another_rounding_shows(name: str) -> None:
    """The control: truncation, ties away from zero, and a tie taken down, at the breakpoints."""
    convert, values, sign = FORMATS[name]
    words = breakpoints(values)
    want = signed(nearest(values, words), words, sign)
    truncated = signed(
        (np.searchsorted(values, np.abs(words.view(np.float32)), "right") - 1).astype(np.uint8), words, sign
    )
    assert wrong(lambda _: truncated, words, want)
    assert wrong(lambda w: convert["protocol"](w + 1), words, want)
    assert wrong(lambda w: convert["protocol"](np.where(w & 0x7FFFFFFF, w - 1, w)), words, want)


@both
def test_e8m0_is_the_least_power_of_two_above(of: str) -> None:
    words = DECISIVE[DECISIVE <= 0x7F800000]
    x = words.view(np.float32).astype(np.float64)
    powers = 2.0 ** np.arange(-127, 128)  # codes 0 to 254
    want = np.minimum(np.searchsorted(powers, x), 254).astype(np.uint8)
    assert wrong(E8M0[of], words, want) == []
    assert wrong(lambda w: E8M0["protocol"](w + 1), words, want), "strictly above: the control"


@both
def test_every_nan_has_one_code(of: str) -> None:
    nan = np.concatenate(
        [0x7F800001 + np.arange(0, 0x7FFFFF, 127), [0x7FC00000, 0x7FFFFFFF], 0x7F800000 + 2 ** np.arange(23)]
    )
    nan = np.concatenate([nan, nan | 1 << 31]).astype(np.uint32)
    assert np.isnan(nan.view(np.float32)).all()
    assert set(E4M3[of](nan)) == {0x7F}
    assert set(E2M1[of](nan)) == {7}
    assert set(E8M0[of](nan & 0x7FFFFFFF)) == {0xFF}
    assert set(E4M3[of](DECISIVE[~np.isnan(DECISIVE.view(np.float32))])) == set(range(256)) - {0x7F, 0xFF}, (
        "NaN's alone"
    )


# ---- PyTorch and ml_dtypes


def test_e4m3_is_pytorchs_clamped_cast() -> None:
    x = floats(DECISIVE)
    cast = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()  # not every version's saturates
    number = ~np.isnan(DECISIVE.view(np.float32))
    words, want = DECISIVE[number], cast[number]
    assert wrong(protocol.e4m3, words, want) == []
    assert wrong(lambda w: protocol.e4m3(w + 1), words, want), "the control"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_pytorchs(dtype: torch.dtype) -> None:
    halves = torch.from_numpy(HALVES[dtype]).view(dtype)
    words = halves.float().view(torch.int32).numpy().view(np.uint32)
    cast = halves.float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    want = torch.where(halves.isnan(), 0x7F, cast).numpy()
    assert len(words) == 1 << 16
    assert wrong(protocol.e4m3, words, want) == []
    assert wrong(lambda w: protocol.e4m3(w ^ 1 << 31), words, want), "the control"


def test_every_code_has_pytorchs_value() -> None:
    codes = np.arange(256, dtype=np.uint32)
    want = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    got = floats(protocol.e4m3_value(codes))
    assert torch.equal(got.nan_to_num(1e9), want.nan_to_num(1e9))
    assert torch.equal(got.signbit()[~want.isnan()], want.signbit()[~want.isnan()])
    number = ~np.isin(codes, [0x7F, 0xFF])
    assert np.array_equal(protocol.e4m3(protocol.e4m3_value(codes))[number], codes[number]), "and back"


def test_codes_are_those_of_ml_dtypes() -> None:
    """But for NaN, of which it keeps the sign in e4m3, and which it makes 0 in e2m1. Its e8m0 rounds to nearest."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: the `test` extra")
    x = DECISIVE.view(np.float32)
    number = ~np.isnan(x)
    x, words = x[number], DECISIVE[number]
    for convert, values, dtype in (
        (protocol.e2m1, VALUES_E2M1, ml_dtypes.float4_e2m1fn),
        (protocol.e4m3, VALUES_E4M3, ml_dtypes.float8_e4m3fn),
    ):
        clamped = np.clip(x, -values[-1], values[-1]).astype(np.float32)
        want = clamped.astype(dtype).view(np.uint8)
        assert wrong(convert, words, want) == []
        assert wrong(lambda w, c=convert: c(w + 1), words, want), "the control"


# ---- NVIDIA's headers


def cuda_headers() -> Path | None:
    """A folder with cuda_fp8.h and cuda_fp4.h of a toolkit that has e8m0 (12.8 on)."""
    nvcc, pip = shutil.which("nvcc"), importlib.util.find_spec("nvidia")
    folders = [Path(os.environ.get("CUDA_HOME", "/none")) / "include"]
    folders += [Path(nvcc).resolve().parent.parent / "include"] if nvcc else []
    folders += [each for at in (pip and pip.submodule_search_locations) or () for each in Path(at).glob("cu*/include")]
    folders += sorted(Path("/usr/local").glob("cuda*/include"), reverse=True)
    for folder in folders:
        fp8 = folder / "cuda_fp8.h"
        if (folder / "cuda_fp4.h").exists() and fp8.exists() and "__nv_cvt_float_to_e8m0" in fp8.read_text():
            return folder
    return None


@pytest.fixture(scope="module")
def beside_nvidia(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, dict[str, int]]]:
    headers, cxx = cuda_headers(), os.environ.get("CXX", "g++")
    if headers is None:
        pytest.skip("no CUDA toolkit of 12.8 or later: nothing to compare with")
    program = tmp_path_factory.mktemp("nvidia") / "nvidia_codes"
    source = ROOT / "tests" / "native" / "nvidia_codes.cpp"
    flags = "-std=c++20 -O2 -ffp-contract=off -pthread"
    command = [
        *cxx.split(),
        *flags.split(),
        f"-I{ROOT}/csrc",
        "-isystem",
        str(headers),
        str(source),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)

    def run(which: str) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = json.loads(subprocess.check_output([program, which], text=True))
        return found

    return run


def test_codes_are_those_of_nvidias_headers(beside_nvidia: Callable[[str], dict[str, dict[str, int]]]) -> None:
    """Of all kinds of NaN, of infinities and of negative words, too."""
    found = beside_nvidia("decisive")
    differ = {name: counts["differ"] for name, counts in found.items()}
    right = ("e4m3", "e2m1", "e8m0", "values of e4m3")
    assert {name: differ.pop(name) for name in right} == dict.fromkeys(right, 0), found
    assert len(differ) == 4, "the controls"
    assert all(differ.values()), found
    assert found["e4m3"]["words"] == DECISIVE.size


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_every_word_is_converted_as_nvidias_headers_do(
    beside_nvidia: Callable[[str], dict[str, dict[str, int]]],
) -> None:
    found = beside_nvidia("all")
    assert {name: found[name]["words"] for name in ("e4m3", "e2m1", "e8m0")} == dict.fromkeys(
        ("e4m3", "e2m1", "e8m0"), 2**32
    )
    assert not any(counts["differ"] for counts in found.values()), found
