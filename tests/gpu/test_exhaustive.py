"""All 2^32 words through sanitise, store, load and "has it arrived?", with the library's own device functions (R1, R2).

And its conversions and roots on the device against the host's, for every word. tests/native/exhaustive.cu does the
work in seconds; the same run holds the controls: FlashInfer's old compare, and sending as is, have to be caught.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from common import sass
from tools import gpu_record

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent.parent
FLAGS = "-std=c++20 -O3 -arch=native -fmad=false -ftz=false -prec-div=true -prec-sqrt=true --expt-relaxed-constexpr"
FLAGS += " -Xcompiler -ffp-contract=off,-pthread -DMNNVL_AR_TEST_BUILD"
NEGATIVE_SUBNORMALS = 2**23 - 1
POSITIONS = 4


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    program = tmp_path_factory.mktemp("exhaustive") / "exhaustive"
    try:
        nvcc = sass.find_tool("nvcc")
    except sass.NoDisassembly as reason:
        pytest.skip(str(reason))
    source = ROOT / "tests" / "native" / "exhaustive.cu"
    subprocess.run([nvcc, *FLAGS.split(), f"-I{ROOT}/csrc", "-o", str(program), str(source)], check=True)
    got: dict[str, Any] = json.loads(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
    if file := request.config.getoption("--gpu-record"):
        figures = {"words": got["words"], "positions": POSITIONS, "lost": sum(at["lost"] for at in got["rule"])}
        figures["lost_by_the_old_compare"] = [at["lost"] for at in got["old_compare"]]
        gpu_record.merge("numerics", "exhaustive bits", figures, Path(file))
    return got


def check_wire(counts: dict[str, int]) -> None:
    """The rule, and what the controls break: the sentinel is not sent, all arrives, unchanged but for a zero's sign."""
    assert counts["sentinels"] == 0, "the sentinel was sent"
    assert counts["lost"] == 0, f"never arrives: {counts['first_lost']:#010x}"
    assert counts["changed"] == 0, "changed on the way"


@pytest.mark.parametrize("position", range(POSITIONS))
def test_every_word_arrives_as_it_was_sent(found: dict[str, Any], position: int) -> None:
    assert found["words"] == 2**32
    check_wire(found["rule"][position])


@pytest.mark.parametrize("position", range(POSITIONS))
def test_the_old_compare_is_caught(found: dict[str, Any], position: int) -> None:
    counts = found["old_compare"][position]
    with pytest.raises(AssertionError, match="never arrives: 0x80000001"):
        check_wire(counts)
    assert counts["lost"] == NEGATIVE_SUBNORMALS, "exactly those: -0 itself is sent as +0"
    assert (counts["first_lost"], counts["last_lost"]) == (0x80000001, 0x807FFFFF)
    assert counts["changed"] == 0


@pytest.mark.parametrize("position", range(POSITIONS))
def test_unsanitised_sending_is_caught(found: dict[str, Any], position: int) -> None:
    counts = found["unsanitised"][position]
    with pytest.raises(AssertionError, match="the sentinel was sent"):
        check_wire(counts)
    assert (counts["sentinels"], counts["lost"], counts["first_lost"]) == (1, 1, 0x80000000)


@pytest.mark.parametrize("position", range(POSITIONS))
def test_a_look_at_the_first_word_only_misses_the_others(found: dict[str, Any], position: int) -> None:
    """R2's control: with every_word off, a sentinel in a later word is taken for data."""
    assert found["first_word_only"][position]["lost"] == (1 if position == 0 else 0)


@pytest.mark.parametrize(
    "what",
    [
        "loads",
        "to_bfloat16",
        "to_float16",
        "to_bfloat16_by_bits",
        "to_float16_by_bits",
        "to_e4m3",
        "to_e2m1_and_e8m0",
        "to_scales",
        "to_nvfp4",
        "to_quotients",
        "quick_quotient",
        "root",
        "quick_root",
        "add_multiply",
    ],
)
def test_the_device_and_the_host_give_the_same_bits(found: dict[str, Any], what: str) -> None:
    """No bin of 2^20 words differs; for "loads", none of the 2^16 halves in either position, for bf16 and fp16. For
    "quick_root", which only kernels have, no word from the device's own IEEE division and root, for many row sizes."""
    assert found[what] == 0


def test_one_other_code_of_one_word_is_caught(found: dict[str, Any]) -> None:
    assert found["one_other_e4m3"] == 1
