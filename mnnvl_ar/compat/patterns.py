"""FlashInfer's pattern codes: each is an epilogue of ours, with or without the norm stored beside its output.

Codes are compared as numbers, since older releases have no name for the newer ones.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """name: FlashInfer's. epilogue: ours. norm: whether the norm is stored; of a quantised one, beside its output."""

    name: str
    epilogue: str
    norm: bool


SUM, NORM = 0, 1
PATTERNS = {
    SUM: Pattern("kAllReduce", "sum", False),
    NORM: Pattern("kARResidualRMSNorm", "norm", True),
    2: Pattern("kARResidualRMSNormFP8Quant", "fp8", False),
    3: Pattern("kARResidualRMSNormFP4Quant", "nvfp4", False),
    4: Pattern("kARResidualRMSNormOutFP8Quant", "fp8", True),
    5: Pattern("kARResidualRMSNormOutFP4Quant", "nvfp4", True),
    8: Pattern("kARResidualRMSNormPerTokenGroupFP8PackedQuant", "group fp8", False),
    9: Pattern("kARResidualRMSNormOutPerTokenGroupFP8PackedQuant", "group fp8", True),
    10: Pattern("kARResidualRMSNormDynamicFP8Quant", "token fp8", False),
    11: Pattern("kARResidualRMSNormOutDynamicFP8Quant", "token fp8", True),
    13: Pattern("kARResidualRMSNormMXFP8Quant", "mxfp8", False),
    14: Pattern("kARResidualRMSNormOutMXFP8Quant", "mxfp8", True),
}
REFUSED = {
    6: "kMoEReductionARResidualRMSNorm",
    7: "kMoEFinalizeARResidualRMSNorm",
    12: "kMoEFinalizeARResidualRMSNormFP8Quant",
}


def refusal(pattern: object) -> ValueError:
    """Why a call of `pattern` is refused, by name."""
    if pattern in REFUSED:
        why = f"is {pattern} ({REFUSED[pattern]}), which mnnvl_ar does not support, as FlashInfer's mnnvl does not"
    else:
        why = f"is {pattern!r}, wanted one of {', '.join(map(str, PATTERNS))}"
    return ValueError(f"pattern: {why}. Nothing was launched.")
