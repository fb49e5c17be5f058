"""What is run, one part after the other: a part is one program on every rank, within a time limit.

    check       the doctor, over all ranks: memory shared between all nodes, bits of a few calls
    bits        all ranks of each group size: both strategies, three dtypes, graphs and eager, rows that do not divide
    quantised   the same of every quantised output
    tune        launch shapes of this machine; what is found is what the parts behind it go by
    multicast   times and bits over NVLink multicast, in a chain and between GEMMs: what predictions.md is about
    unicast     the same without multicast
    warm        peers that compile at first use compile
    peers       the peers that may hang or crash, beside ours: last, so that they can take nothing along

Every row of `bits` to `peers` was compared with the reference, bit for bit, by the very graph that was timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.quantised import KINDS

ORDER = ("check", "bits", "quantised", "tune", "multicast", "unicast", "warm", "peers")
TPS = (4, 8, 16, 36, 72)
LATE_PEERS = "flashinfer,vllm,flashinfer_mnnvl"
SPARE = 60.0  # seconds between a program's own end and the limit that ends it from outside
RUN, TUNE = "bench/run.py", "bench/tune.py"


@dataclass(frozen=True)
class Part:
    """arguments: a script and its arguments, or "-m" and a module; options that name files are left to whoever runs it.
    limit: seconds. leaves: what the first rank leaves behind: "rows", a "table", what the "doctor" says, or "nothing".
    tuned: it goes by the table that `tune` has made."""

    name: str
    arguments: tuple[str, ...]
    limit: float
    leaves: str = "rows"
    tuned: bool = False


@dataclass(frozen=True)
class Grid:
    """How much is measured."""

    tokens: str = "1,2,4,6,8,12,16,32,64,128,256,512,1024,2048"
    tuned_tokens: str = "1,2,4,8,16,32,64,128,256,512,1024,2048"
    odd_tokens: str = "1,17,200"
    quantised_tokens: str = "17"
    peer_tokens: str = "1,8,32,128,512"
    hidden: str = "7168"
    odd_hidden: str = "2880"  # 360 vectors, which 16 and 72 ranks do not divide
    dtypes: str = "bfloat16,float16,float32"
    more: tuple[str, ...] = ()


FULL = Grid()
# On the host, or by ranks that share a GPU: that everything goes, in seconds. Nothing is said of times.
REHEARSAL = Grid(
    tokens="1,5",
    tuned_tokens="2",
    odd_tokens="3",
    quantised_tokens="3",
    peer_tokens="1",
    hidden="256",
    odd_hidden="360",
    dtypes="bfloat16,float32",
    more=("--rounds", "2"),
)


def plan(
    world: int, *, tps: Sequence[int], on_gpu: bool, multicast: bool, only: Sequence[str], shared: bool = False
) -> list[Part]:
    """The parts for `world` ranks, in order. multicast: whether it may be used, as on a machine that is all one's own.
    only: names of `ORDER`; all if empty. shared: several ranks have one GPU together, where no peer can run."""
    grid = FULL if on_gpu and not shared else REHEARSAL
    sizes = ",".join(str(tp) for tp in tps if tp <= world) or str(world)
    allow = ("--multicast",) if multicast else ()
    common = ("--tp", sizes, *(() if on_gpu else ("--device", "cpu")))
    every = ("--strategy", "auto,one_shot,two_shot")
    unmeasured = ("--mode", "graph,eager" if on_gpu else "eager", "--peers", "", "--rounds", "1")
    bits = ("--op", "fused,plain", "--dtype", grid.dtypes, "--hidden", grid.odd_hidden, "--tokens", grid.odd_tokens)
    quantised = ("--op", ",".join(KINDS), "--hidden", grid.hidden, "--tokens", grid.quantised_tokens)
    peers = "gloo" if not on_gpu else "yardsticks" if shared else "yardsticks,nccl,nccl_symmetric,symm_mem"
    timed = ("--tokens", grid.tokens, "--hidden", grid.hidden, "--context", "chain,gemm", "--peers", peers, "--verbose")
    late = ("--tokens", grid.peer_tokens, "--hidden", grid.hidden, "--peers", LATE_PEERS, "--verbose")

    def run(name: str, minutes: float, *more: str, leaves: str = "rows", tuned: bool = False) -> Part:
        return Part(name, (RUN, *common, *more, *grid.more), 60 * minutes, leaves, tuned)

    parts = [
        Part("check", ("-m", "mnnvl_ar", "doctor", "--json", "--timeout", "120"), 60 * 6, "doctor"),
        run("bits", 15, *bits, *unmeasured, *every, *allow),
        run("quantised", 10, *quantised, *unmeasured, *every, *allow),
        Part(
            "tune",
            (TUNE, *common, "--tokens", grid.tuned_tokens, "--hidden", grid.hidden, *allow, *grid.more),
            60 * 15,
            "table",
        ),
        run("multicast", 20, *timed, *every, *allow, tuned=True),
        run("unicast", 20, *timed, *every, tuned=True),
        run("warm", 10, "--warm-peers", "--peers", LATE_PEERS, *allow, leaves="nothing"),
        run("peers", 15, *late, *allow, tuned=True),
    ]
    left_out = set() if on_gpu and not shared else {"warm", "peers"}
    if not multicast:
        left_out.add("multicast")
    if on_gpu and world == 1:
        left_out |= {"tune", "warm", "peers"}  # there is nobody to send to
    return [part for part in parts if part.name not in left_out and (not only or part.name in only)]
