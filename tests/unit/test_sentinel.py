"""Rules R1 and R2 on the host, exhaustively: the sentinel is never sent, and what arrives is what was sent but for the
sign of a zero.

One test body, `check_wire`, serves the rule and its controls: it has to pass with the library's compare, and has to
fail with the one that FlashInfer's kernel hung by, and without sanitising.
"""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

protocol = pytest.importorskip("_protocol", reason="tests/_protocol is not built: `make test-build`")

SENTINEL = protocol.SENTINEL
DTYPES = ["bfloat16", "float16", "float32"]
HALVES = np.arange(1 << 16, dtype=np.uint32)
# What stands in the word's other half: zeros of both signs, subnormals, a normal, infinity, NaN, the sentinel's halves.
PARTNERS = [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x807F, 0x3F80, 0x7C00, 0xFF80, 0x7FC0, 0xFFFF]

word = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, SENTINEL, SENTINEL + 1, SENTINEL - 1, 0x80008000, 0x8000, 0x807FFFFF, 0x80010000, 0x00010000]),
)
quad = st.tuples(word, word, word, word)


def half_words() -> np.ndarray:
    """All 2^16 halves in both positions of a word, beside each partner."""
    low = [HALVES | partner << 16 for partner in PARTNERS]
    high = [HALVES << 16 | partner for partner in PARTNERS]
    return np.concatenate(low + high).astype(np.uint32)


def vectors_with(words: np.ndarray, position: int, others: int = 0x3F803F80) -> np.ndarray:
    vectors = np.full((words.size, 4), others, dtype=np.uint32)
    vectors[:, position] = words
    return vectors


def is_same_but_for_zeros_signs(sent: np.ndarray, got: np.ndarray, dtype: str) -> np.ndarray:
    """Elementwise on bits, so that a NaN has to keep its payload."""
    integer, sign = (np.uint32, 1 << 31) if dtype == "float32" else (np.uint16, 1 << 15)
    a, b = sent.view(integer), got.view(integer)
    magnitude = integer(sign - 1)
    same: np.ndarray = (a == b) | ((a & magnitude) == 0) & ((b & magnitude) == 0)
    return same


def check_wire(dtype: str, compare: str = "integer", sanitized: bool = True) -> None:
    words = half_words()
    for position in range(4):
        vectors = vectors_with(words, position)
        sent, arrived = protocol.wire(compare, sanitized, vectors)
        assert not np.any(sent == SENTINEL), "the sentinel was sent"
        assert np.all(arrived), (
            f"never arrives: {vectors[~arrived][0, position]:#010x}, {np.sum(~arrived)} of {words.size}"
        )
        assert np.all(is_same_but_for_zeros_signs(vectors, sent, dtype)), "changed on the way"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_half_arrives_as_it_was_sent(dtype: str) -> None:
    check_wire(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_flushed_compare_is_caught(dtype: str) -> None:
    with pytest.raises(AssertionError, match="never arrives: 0x80"):
        check_wire(dtype, compare="flushing")


@pytest.mark.parametrize("dtype", DTYPES)
def test_unsanitised_sending_is_caught(dtype: str) -> None:
    with pytest.raises(AssertionError, match="the sentinel was sent"):
        check_wire(dtype, sanitized=False)


def test_what_the_flushed_compare_loses() -> None:
    """Exactly the words of a negative subnormal fp32: as pairs, a high half of bf16's negative subnormals or -0."""
    words = half_words()
    _, arrived = protocol.wire("flushing", True, vectors_with(words, 0))
    lost = words[~arrived]
    assert np.all((lost > SENTINEL) & (lost <= 0x807FFFFF))
    assert np.array_equal(np.unique(lost), np.unique(words[(words > SENTINEL) & (words <= 0x807FFFFF)]))


@pytest.mark.parametrize("halves", [True, False], ids=["pairs", "fp32"])
def test_all_words_about_zero(halves: bool) -> None:
    """Every word with an exponent of 0, of either sign; the control counts what the flushed compare loses of them."""
    for first, negative in ((0, False), (SENTINEL, True)):
        assert protocol.sweep("integer", halves, 1, first, first + 0x7FFFFF, 0x3F803F80)[:2] == (0, 0)
        lost, changed, example_word = protocol.sweep("flushing", halves, 1, first, first + 0x7FFFFF, 0x3F803F80)
        assert (lost, changed) == ((0x7FFFFF, 0) if negative else (0, 0))
        assert not negative or example_word == SENTINEL + 1


@pytest.mark.slow
def test_all_words() -> None:
    """In one position; in all four on a GPU: tests/gpu/test_exhaustive.py."""
    assert protocol.sweep("integer", True, 2, 0, 2**32 - 1, 0x80010000)[:2] == (0, 0)


@given(quad)
@example((SENTINEL,) * 4)
def test_sanitised_vectors_have_arrived(v: tuple[int, int, int, int]) -> None:
    sent = protocol.sanitize(list(v))
    assert SENTINEL not in sent
    assert protocol.has_arrived(sent)
    assert [protocol.sanitize(w) for w in v] == list(sent)
    assert all(a == b or (a, b) == (SENTINEL, 0) for a, b in zip(v, sent, strict=True))
    assert protocol.sanitize(list(sent)) == sent, "sanitising twice is sanitising once"


@given(quad)
def test_arrived_is_every_word(v: tuple[int, int, int, int]) -> None:
    assert protocol.has_arrived(list(v)) == (SENTINEL not in v)


@given(quad, st.integers(1, 14))
def test_no_part_of_a_vector_is_taken_for_the_whole(v: tuple[int, int, int, int], there: int) -> None:
    """Rule R2: a store seen in part, any words of it, over an empty slot."""
    sent, empty = protocol.sanitize(list(v)), protocol.sentinel_vector()
    torn = [sent[i] if there >> i & 1 else empty[i] for i in range(4)]
    assert not protocol.has_arrived(torn)


def test_an_empty_slot_has_not_arrived() -> None:
    assert not protocol.has_arrived(protocol.sentinel_vector())
