"""The quick root and its reciprocal (csrc/protocol/numerics_root.h), given any approximation that a GPU may have.

H200's own approximation is tried for every argument by tests/gpu/test_exhaustive.py. No Blackwell's has been: this
test says what follows from PTX's word for its error, 2^-22.9, and what does not. What does not, the root, is the four
operations of nvcc's own __fsqrt_rn (tests/unit/test_sass.py), so if that is right there, so is ours.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

protocol = pytest.importorskip("_protocol", reason="tests/_protocol is not built: `make test-build`")

Words = npt.NDArray[np.uint32]
ONE, FOUR = 0x3F800000, 0x40800000  # scaling by 4^k is exact, so [1, 4) stands for all
DOCUMENTED, CLAIMED = 2.0**-22.9, 2.0**-21
STEPS = 10  # to each side, in ulps: more than 2^-21
# An approximation as near as PTX says whose root is an ulp too small: x, and its steps from the nearest one.
UNPROVEN = {(float.fromhex("0x1.f82294p+0"), 1), (float.fromhex("0x1.dd26e4p+1"), 1)}


def floats(words: Words) -> npt.NDArray[np.float32]:
    return words.view(np.float32)


def sample() -> Words:
    """Around powers of two, squares of short fractions, where roots are all ones, around UNPROVEN; at random."""
    near = np.arange(-64, 65)
    squares = (np.arange(256, 512) / 256.0) ** 2
    all_ones = np.array([2.0, 4.0]) ** 2 * (1 - 2.0**-24) ** 2
    places = np.concatenate([[1.0, 2.0, 4.0], squares, all_ones / 4, [x for x, _ in UNPROVEN]]).astype(np.float32)
    words = (places.view(np.uint32)[:, None] + near[None, :]).ravel().astype(np.uint32)
    drawn = np.random.default_rng(21).integers(ONE, FOUR, 1 << 17, dtype=np.uint32)
    words = np.concatenate([words, drawn])
    return np.unique(words[(words >= ONE) & (words < FOUR)])


def every() -> Iterator[Words]:
    for start in range(ONE, FOUR, 1 << 20):
        yield np.arange(start, start + (1 << 20), dtype=np.uint32)


def truth(words: Words) -> tuple[Words, Words]:
    """The bits of the root and of its reciprocal, both rounded by IEEE."""
    root = np.sqrt(floats(words))
    return root.view(np.uint32), (np.float32(1) / root).view(np.uint32)


def approximations(words: Words, bound: float, steps: int = STEPS) -> Iterator[tuple[int, Words, Words]]:
    """Every fp32 number within `bound` of 1 / sqrt(x), relatively: steps from the nearest, x, approximation."""
    exact = 1 / np.sqrt(floats(words).astype(np.float64))
    nearest = exact.astype(np.float32).view(np.uint32).astype(np.int64)
    for step in range(-steps, steps + 1):
        about = (nearest + step).astype(np.uint32)
        inside = np.abs(floats(about).astype(np.float64) / exact - 1) <= bound
        assert not (inside.any() and abs(step) == steps and bound <= CLAIMED), "more steps are within the bound"
        if inside.any():
            yield step, words[inside], about[inside]


def wrong_roots(words: Words, bound: float) -> set[tuple[float, int]]:
    found = set()
    for step, x, about in approximations(words, bound):
        bad = protocol.root_by(x, about) != truth(x)[0]
        found |= {(float(each), step) for each in floats(x[bad])}
    return found


def wrong_reciprocals(words: Words, bound: float, steps: int = STEPS, spared: bool = True) -> tuple[int, int]:
    """Given the right root: how many were wrong, and of how many. `spared`: of roots that are all ones, none is asked
    for, as in kernels."""
    wrong = tried = 0
    for _, x, about in approximations(words, bound, steps):
        root, want = truth(x)
        asked = protocol.takes_quick_root(x, root) == 1 if spared else np.ones(x.size, bool)
        wrong += int((protocol.reciprocal_by(root, about) != want)[asked].sum())
        tried += int(asked.sum())
    return wrong, tried


def wrong_results(words: Words) -> set[tuple[float, int]]:
    """What a kernel returns, from root to reciprocal, for every approximation that PTX allows."""
    found = set()
    for step, x, about in approximations(words, DOCUMENTED):
        root = protocol.root_by(x, about)
        bad = (protocol.takes_quick_root(x, root) == 1) & (protocol.reciprocal_by(root, about) != truth(x)[1])
        found |= {(float(each), step) for each in floats(x[bad])}
    return found


def test_root_by_what_ptx_promises() -> None:
    """Of every argument but two; the reciprocal of one of the two comes out right all the same."""
    assert wrong_roots(sample(), DOCUMENTED) == UNPROVEN
    assert wrong_results(sample()) == {min(UNPROVEN)}


def test_reciprocal_of_a_right_root() -> None:
    wrong, tried = wrong_reciprocals(sample(), CLAIMED)
    assert wrong == 0
    assert tried > 10 * sample().size


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_every_argument_and_every_approximation() -> None:
    roots: set[tuple[float, int]] = set()
    results: set[tuple[float, int]] = set()
    wrong = tried = 0
    for words in every():
        roots |= wrong_roots(words, DOCUMENTED)
        results |= wrong_results(words)
        found = wrong_reciprocals(words, CLAIMED)
        wrong, tried = wrong + found[0], tried + found[1]
    assert (roots, results, wrong) == (UNPROVEN, {min(UNPROVEN)}, 0)
    assert tried > 180_000_000


def test_what_is_moderate_scales() -> None:
    """Every moderate x is one of [1, 4) times a power of 4, and all that is computed scales with it, exactly."""
    words = sample()[::97]
    about = (1 / np.sqrt(floats(words).astype(np.float64))).astype(np.float32)
    root = protocol.root_by(words, about.view(np.uint32))
    rstd = protocol.reciprocal_by(root, about.view(np.uint32))
    for k in range(-40, 40):
        up, down = np.float32(2.0**k), np.float32(2.0**-k)
        x = (floats(words) * up * up).view(np.uint32)
        scaled = (about * down).view(np.uint32)
        assert (protocol.takes_quick_root(x, root) == protocol.takes_quick_root(words, root)).all()
        there = protocol.root_by(x, scaled)
        assert (there == (floats(root) * up).view(np.uint32)).all()
        assert (protocol.reciprocal_by(there, scaled) == (floats(rstd) * down).view(np.uint32)).all()
    edges = np.array([2.0**-80, 2.0**80], np.float32).view(np.uint32)
    root = np.full(2, ONE, np.uint32)
    assert list(protocol.takes_quick_root(edges - 1, root)) == [0, 1]
    assert list(protocol.takes_quick_root(edges, root)) == [1, 0]


# ---- controls


def test_a_worse_approximation_of_the_root_is_found() -> None:
    assert wrong_roots(sample(), CLAIMED) > UNPROVEN


def test_a_worse_approximation_of_the_reciprocal_is_found() -> None:
    """It is corrected twice, so it has to be far worse: of 6 bits."""
    words = sample()
    root, want = truth(words)
    about = floats(want) * np.float32(1 + 2.0**-6)
    assert (protocol.reciprocal_by(root, about.view(np.uint32)) != want).mean() > 0.1


def test_roots_that_are_all_ones_have_to_be_spared() -> None:
    assert wrong_reciprocals(sample(), CLAIMED, spared=False)[0] > 0
