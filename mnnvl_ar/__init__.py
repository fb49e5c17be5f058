"""All-reduce kernels for tensor-parallel inference: AllReduce, and AllReduce fused with residual add and RMSNorm."""

from mnnvl_ar import _library, ops, reference, scales
from mnnvl_ar.bound import BoundCall, bind
from mnnvl_ar.errors import (
    BringUpError,
    CallMismatch,
    MnnvlArError,
    PeerGone,
    PeerTimeout,
    RanksDiffer,
    WorkspaceBroken,
)
from mnnvl_ar.memory import Group
from mnnvl_ar.ops import Pdl, Strategy
from mnnvl_ar.workspace import Workspace

__all__ = [
    "BoundCall",
    "BringUpError",
    "CallMismatch",
    "Group",
    "MnnvlArError",
    "Pdl",
    "PeerGone",
    "PeerTimeout",
    "RanksDiffer",
    "Strategy",
    "Workspace",
    "WorkspaceBroken",
    "__version__",
    "bind",
    "ops",
    "reference",
    "scales",
]

__version__ = "0.1.0"  # SemVer; read by setuptools, and a heading of CHANGELOG.md
if not _library.ARCHITECTURES:
    __version__ += "+host"  # like the wheel's
