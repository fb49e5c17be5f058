"""Quantised outputs beside vLLM's ops on a GPU: bit for bit the same codes and scales, of the norm that a call stores.

What has no GPU op to compare with on the machine's architecture is compared on the CPU (tests/compat).
"""

import pytest
import torch

from bench.peers import vllm_quantised
from bench.quantised import KINDS, SCALE
from bench.variant import Unavailable
from common.virtual import VirtualGroup

pytestmark = pytest.mark.gpu(1)
SHAPES = ((1, 4096), (7, 2944), (130, 7168))
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def vllm() -> None:
    try:
        vllm_quantised.load_ops()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def group() -> VirtualGroup:
    tokens, hidden = max(tokens for tokens, _ in SHAPES), max(hidden for _, hidden in SHAPES)
    return VirtualGroup(1, tokens, hidden, torch.bfloat16, "cuda:0")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", vllm_quantised.QUANTISE)
def test_codes_and_scales_are_vllms(group: VirtualGroup, kind: str, dtype: torch.dtype) -> None:
    for tokens, hidden in SHAPES:
        residual = torch.randn(tokens, hidden, device="cuda").to(dtype)
        sizes = torch.exp2(torch.randint(-6, 7, (tokens, hidden // 128, 1), device="cuda"))  # of groups
        x = (torch.randn(tokens, hidden // 128, 128, device="cuda") * sizes).view(tokens, hidden).to(dtype)
        norm, weight = torch.empty_like(x), torch.linspace(0.5, 1.5, hidden, device="cuda")
        scale = (torch.tensor([SCALE], device="cuda"),)
        given = () if KINDS[kind].scale is None else scale
        ours, theirs = (KINDS[kind].outputs(tokens, hidden, x.device) for _ in range(2))
        op = getattr(torch.ops.mnnvl_ar, f"all_reduce_rms_norm_{KINDS[kind].op}_out")
        op(x, residual, weight, 1e-6, *given, *ours, norm, residual, group.handles[0], **KINDS[kind].options)
        vllm_quantised.QUANTISE[kind](norm, *theirs, *given)
        assert all(same(*pair) for pair in zip(ours, theirs, strict=True)), (tokens, hidden)
        vllm_quantised.QUANTISE[kind](norm.flip(-1), *theirs, *given)
        assert not same(ours[0], theirs[0]), "the control"


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """As bytes; what pads a scale is not compared."""
    return torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))
