"""What goes wrong, where and when: faults drawn from a seed, and the calls during which they happen."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

from common.cases.calls import Call

# Kind -> the error that every other rank must raise, naming the rank at fault; which of two may depend on the moment.
KINDS = {
    "kill": "PeerTimeout",  # SIGKILL, at any moment
    "stop": "PeerTimeout",  # SIGSTOP at any moment, SIGCONT when the others have given up
    "slow": "PeerTimeout",  # a call begins later than the deadline allows
    "exception": "PeerTimeout",  # Python raises between two calls, and no more calls are made
    "exit before first call": "PeerTimeout",
    "exit in a call": "PeerTimeout",  # or between two, at any moment
    "signal": "WorkspaceBroken or PeerTimeout",  # its handler raises, in a wait or between two calls
    "closed by force": "WorkspaceBroken or PeerTimeout",  # by another thread, likewise
    "death": "PeerGone",  # as "kill", but with a monitor, and a deadline that nobody waits for; so are these
    "close": "PeerGone",  # between two calls, and no more calls are made; so are these
    "sleep": "PeerGone",
    "exit": "PeerGone",  # of the process, in good order
    "skipped call": "CallMismatch",
    "extra call": "CallMismatch",
    "wrong shape": "CallMismatch",
    "wrong op": "CallMismatch",
    "wrong order": "CallMismatch",
    "other tag": "CallMismatch",
    "other eps": "CallMismatch",  # of a call with a norm, as the next two
    "other weight bias": "CallMismatch",
    "other weight dtype": "CallMismatch",
    "honest": "",  # late, but within the deadline: no rank may raise an error
}
HEARD = ("death", "close", "sleep", "exit")  # of by the connections to the rank at fault
ORDERLY = ("close", "sleep", "exit")  # a rank that leaves between two calls, and says so
LETHAL = ("kill", "death", "exit", "exit before first call", "exit in a call")
# What one rank's call with a norm has otherwise.
OF_A_NORM: dict[str, dict[str, Any]] = {
    "other eps": {"eps": 1e-5},
    "other weight bias": {"weight_bias": 1.0},
    "other weight dtype": {"fp32_weight": True},
}
ON_THE_HOST = ("signal", "closed by force")  # on a GPU nobody waits inside a call
SUDDEN = ("kill", "death", "stop", "exit in a call", *ON_THE_HOST)  # by a thread beside the calls
FAULTS = tuple(kind for kind in KINDS if kind != "honest")

CALLS = 36  # of a round
LATEST = 24  # number of the last call that a fault may happen to


def _sizes(device: str) -> list[Call]:
    sets = [("bf16", 64), ("fp32", 264), ("fp16", 128), ("bf16", 264)]
    tokens = (1, 3, 8) if device == "cpu" else (1, 8, 32)
    found = []
    for number, (dtype, hidden) in enumerate(sets):
        for place, count in enumerate(tokens):
            op = "all_reduce" if (number + place) % 2 else "all_reduce_rms_norm"
            found.append(Call(op, count, hidden, dtype, strategy=(number + 2 * place) % 3 % 2, seed=number))
    return found


SIZES = {device: _sizes(device) for device in ("cpu", "cuda")}
WORKSPACE = {"max_tokens": 33, "hidden": 264}  # room for a shape that is wrong by one


@dataclass(frozen=True)
class Plan:
    """One round: what happens to rank `victim` at call `at`."""

    kind: str
    world_size: int
    victim: int
    at: int
    seed: int
    deadline: float
    device: str = "cpu"
    recover: bool = False  # begin with `recover` of the last round's workspace, if it is there
    off: str = ""  # rules switched off
    graphs: bool = False  # calls are replayed CUDA graphs
    looks: bool = False  # ranks check after each call, at odd moments: before a call that others have come to already
    more: dict[str, float] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        """Seconds from the beginning of a call until it must end, but for a margin. What is heard of is so within a
        tenth of a second (tests/host/test_gone.py), but a process may take long to end on a busy machine."""
        return self.deadline / 2 if self.kind in HEARD else self.deadline

    @property
    def differs_at(self) -> int:
        """Number of the first call that the victim makes otherwise than its peers, in kinds where it does."""
        pairs = zip(self.calls(self.victim), self.calls(self.victim + 1), strict=False)
        return next(number for number, (mine, theirs) in enumerate(pairs) if mine != theirs)

    def calls(self, rank: int) -> list[Call]:
        """The calls that `rank` makes. No two in a row are alike, or one of them could be skipped unnoticed."""
        random_ = random.Random(self.seed)
        sizes = SIZES[self.device]
        calls = [random_.choice(sizes)]
        while len(calls) < CALLS:
            calls.append(random_.choice([call for call in sizes if call not in calls[-1:]]))
        if rank != self.victim:
            return calls
        at = self.at
        if self.kind == "skipped call":
            del calls[at]
        elif self.kind == "extra call":
            calls.insert(at, random_.choice([call for call in sizes if call != calls[at]]))
        elif self.kind == "wrong order":
            calls[at], calls[at + 1] = calls[at + 1], calls[at]
        elif self.kind == "wrong shape":
            calls[at] = replace(calls[at], tokens=calls[at].tokens + 1)
        elif self.kind == "wrong op":
            other = {"all_reduce": "all_reduce_rms_norm", "all_reduce_rms_norm": "all_reduce"}
            calls[at] = replace(calls[at], op=other[calls[at].op])
        elif self.kind == "other tag":
            calls[at] = replace(calls[at], tag=2)
        elif of_a_norm := OF_A_NORM.get(self.kind):
            at = next(i for i in range(at, CALLS) if calls[i].op != "all_reduce" and calls[i].dtype != "fp32")
            calls[at] = replace(calls[at], **of_a_norm)
        return calls


def draw(number: int, world_size: int, deadline: float, seed: int, kinds: tuple[str, ...], device: str) -> Plan:
    """Fault `number` of a run."""
    random_ = random.Random(seed * 1_000_003 + number)
    kind = kinds[number % len(kinds)]
    return Plan(
        kind=kind,
        world_size=world_size,
        victim=random_.randrange(world_size),
        at=0 if kind == "exit before first call" else random_.randrange(LATEST),
        seed=random_.randrange(1 << 30),
        deadline=60.0 if kind in HEARD else deadline,
        device=device,
        recover=random_.random() < 0.5 and kind not in HEARD,
        graphs=device == "cuda" and random_.random() < 0.5,
        more={"delay": random_.random() * 0.003, "late": 1.0 + random_.random()},
        looks=random_.random() < 0.5 or device == "cuda",  # on a GPU only a check tells
    )
