"""What a server does with CUDA graphs, as data: what is captured, in which order, and what is then replayed.

    script = vllm(Profile(world_size=4, seed=1))     # or sglang(...)
    for step in script.steps: ...                    # the same on every rank; `server.Server` carries them out

A script is a function of its profile alone. Nothing in here knows a transport, and nothing is imported but the
standard library.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

VLLM = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
SGLANG_DECODE = (1, 2, 4, 8, 12, *range(16, 257, 8), *range(272, 497, 16), 512)
SGLANG_PREFILL = (
    *range(4, 33, 4),
    *range(48, 257, 16),
    *range(288, 513, 32),
    *range(576, 1025, 64),
    *range(1280, 4097, 256),
    *range(4608, 8193, 512),
)
FUSED_LIMIT = 2048  # SGLang fuses prefill calls of up to so many tokens; larger ones never reach this library
SETS = 4  # of inputs, taken in turn; no multiple of the ring's three slots, so stale data never fits
WORKSPACES = ("attention", "experts", "aside", "spare")


@dataclass(frozen=True)
class Call:
    """One call of the library.

    form: "sum", a plain all-reduce; else the fused op: "" functional, "A" to "E" as in `common.cases.calls`.
    after: what runs before it on its stream. "kernel": an ordinary one, which writes its inputs. "attention": an eager
    one, outside the graph, which writes real rows only. "call": the call before, whose outputs are its inputs.
    "nothing": the call before, on which it does not depend. "impatient": as "nothing", with a kernel in between that
    lets its successor start at once and never waits for its predecessor.
    """

    workspace: str = "attention"
    form: str = "A"
    strategy: int = -1
    pdl: int = -1
    after: str = "kernel"


@dataclass(frozen=True)
class Body:
    """What one graph holds, or one eager stretch: calls of `tokens` rows each."""

    tokens: int
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Warm:
    """An eager run before a capture. skew: seconds that each rank is late; None: synchronise, then a barrier."""

    body: Body
    skew: tuple[float, ...] | None
    turn: int


@dataclass(frozen=True)
class Capture:
    """Captures `bodies`, a graph each, with eager attention in front of each. kind: "full", "piecewise" or "breakable",
    a name for how it is done. keep: False throws it away unreplayed, its memory pool too."""

    key: tuple[str, int]
    kind: str
    bodies: tuple[Body, ...]
    keep: bool = True


@dataclass(frozen=True)
class Forward:
    """One pass: `captured` is replayed, or `bodies` run eagerly.

    real: rows that hold tokens, the others are padding, which holds what is left there ("stale"), "zero", or "garbage":
    hostile bits, different on each rank. turn: which inputs.
    """

    key: tuple[str, int]
    bodies: tuple[Body, ...]
    captured: bool
    real: int
    turn: int
    padding: str


@dataclass(frozen=True)
class Update:
    """The executable graph `into` takes the parameters of `source`, as by cudaGraphExecUpdate, or gets its own back."""

    into: tuple[str, int]
    source: tuple[str, int]


@dataclass(frozen=True)
class Reopen:
    """A workspace is closed, and one made in its place, which is used eagerly at once."""

    workspace: str
    body: Body


Step = Warm | Capture | Forward | Update | Reopen


@dataclass(frozen=True)
class Profile:
    """How much of it.

    max_tokens: of a captured size; eager passes may be larger.
    forwards: how many passes are made after all captures. eager, garbage: shares of the passes. late: the largest skew
    in seconds. max_bytes: of the workspaces; calls larger than their slots run in pieces. It has to leave room for 8
    rows, or one graph of a pair may hold more launches than the other.
    impatient: whether calls may follow an impatient kernel. aside: whether some calls run on a stream aside; without
    them the workspaces are made with concurrent=False, so that calls do start early.
    """

    world_size: int
    seed: int
    hidden: int = 64
    dtype: str = "bf16"
    layers: int = 4
    max_tokens: int = 64
    forwards: int = 200
    late: float = 0.05
    eager: float = 0.25
    impatient: bool = False
    aside: bool = True
    max_bytes: int | None = None

    @property
    def largest(self) -> int:
        """Of all passes: servers run eagerly what is larger than every captured size."""
        return self.max_tokens + self.max_tokens // 4


@dataclass
class Script:
    engine: str
    profile: Profile
    steps: list[Step] = field(default_factory=list)

    @property
    def captures(self) -> Script:
        """What comes before the traffic."""
        return Script(self.engine, self.profile, [step for step in self.steps if isinstance(step, Warm | Capture)])

    @property
    def traffic(self) -> Script:
        return Script(self.engine, self.profile, [step for step in self.steps if not isinstance(step, Warm | Capture)])

    @property
    def reals(self) -> list[int]:
        """Every number of real rows in it."""
        reals = {step.real for step in self.steps if isinstance(step, Forward)}
        bodies = [step.body for step in self.steps if isinstance(step, Warm | Reopen)]
        return sorted(reals | {body.tokens for body in bodies})


def vllm(profile: Profile) -> Script:
    """FULL_AND_PIECEWISE: profiling graphs that are thrown away; piecewise sizes, then full ones, largest first, one
    eager warm-up each, ranks skewed and without a barrier; MTP's sizes of one and two tokens a request; then traffic.
    """
    writer = _Writer("vllm", profile)
    sizes = [size for size in VLLM if size <= profile.max_tokens]
    writer.capture("full", sizes[-1], skewed=True, keep=False)
    for size in reversed(sizes):
        writer.capture("piecewise", size, skewed=True)
    for size in reversed(sizes):
        writer.capture("full", size, skewed=True)
    mtp = [tokens * n for n in range(15, 19) for tokens in (1, 2) if tokens * n <= profile.max_tokens]
    for size in sorted(set(mtp), reverse=True):
        writer.capture("mtp", size, skewed=True)
    writer.capture_pair()
    writer.serve({"piecewise": 1, "full": 2, "mtp": 1 if mtp else 0})
    return writer.script


def sglang(profile: Profile) -> Script:
    """Decode as full graphs, prefill as breakable ones, largest first, two warm-ups and a barrier before each."""
    writer = _Writer("sglang", profile)
    for size in reversed([size for size in SGLANG_DECODE if size <= profile.max_tokens]):
        writer.capture("full", size, skewed=False)
    for size in reversed([size for size in SGLANG_PREFILL if size <= min(profile.max_tokens, FUSED_LIMIT)]):
        writer.capture("breakable", size, skewed=False)
    writer.capture_pair()
    writer.serve({"breakable": 1, "full": 2})
    return writer.script


class _Writer:
    """Writes a script down, step by step."""

    def __init__(self, engine: str, profile: Profile) -> None:
        self.profile, self.draw, self.script = profile, random.Random(profile.seed), Script(engine, profile)
        self.captured: dict[tuple[str, int], tuple[Body, ...]] = {}
        self.turn = 0

    def capture(self, kind: str, size: int, *, skewed: bool, keep: bool = True) -> None:
        bodies = tuple(self.bodies(kind, size))
        for _ in range(1 if skewed else 2):
            late = tuple(self.draw.uniform(0, self.profile.late) for _ in range(self.profile.world_size))
            self.script.steps.append(Warm(self.draw.choice(bodies), late if skewed else None, self.next_turn()))
        how = "full" if kind == "mtp" else kind
        if not keep or self.draw.random() < 0.1:
            self.script.steps.append(Capture((kind, size), how, bodies, keep=False))
        if keep:
            self.script.steps.append(Capture((kind, size), how, bodies))
            self.captured[kind, size] = bodies

    def capture_pair(self) -> None:
        """Two buckets whose graphs have equal shape, so that one can take the other's parameters where their calls have
        clusters of one size: small ones mostly have (tests/gpu/test_updates.py)."""
        large = min(8, max(2, self.profile.max_tokens // 4))
        small = large // 2
        calls = tuple(Call(form=form, strategy=s) for form in ("A", "sum") for s in (0, 1))
        for size in (small, large):
            body = Body(size, calls)
            self.script.steps.append(Capture(("pair", size), "update", (body,)))
            self.captured["pair", size] = (body,)

    def serve(self, weights: dict[str, int]) -> None:
        """Passes in any order; now and then an eager one of an odd size, an update, a workspace made anew."""
        kinds = [kind for kind, weight in weights.items() for _ in range(weight)]
        by_kind = {kind: [key for key in self.captured if key[0] == kind] for kind in kinds}
        for number in range(self.profile.forwards):
            if self.draw.random() < self.profile.eager:
                self.eager()
            else:
                key = self.draw.choice(by_kind[self.draw.choice(kinds)])
                self.forward(key, self.captured[key], captured=True)
            if number % 40 == 10:
                self.updates()
            if self.profile.forwards // 4 > 0 and number % (self.profile.forwards // 4) == 3:
                body = Body(self.profile.max_tokens, (self.call(self.profile.max_tokens, "spare"),) * 3)
                self.script.steps.append(Reopen("spare", body))

    def eager(self) -> None:
        size = self.draw.randint(1, self.profile.largest)
        self.forward(("eager", size), (self.middle(size), self.middle(size)), captured=False)

    def updates(self) -> None:
        pair = [key for key in self.captured if key[0] == "pair"]
        for into, source in ((pair[0], pair[1]), (pair[0], pair[0]), (pair[1], pair[0]), (pair[1], pair[1])):
            self.script.steps.append(Update(into, source))
            self.forward(into, self.captured[source], captured=True)

    def forward(self, key: tuple[str, int], bodies: tuple[Body, ...], *, captured: bool) -> None:
        size = bodies[0].tokens
        real = size if not captured or self.draw.random() < 0.3 else self.draw.randint(max(1, size // 2), size)
        padding = "zero" if key[0] == "breakable" else self.draw.choice(("stale", "garbage"))
        self.script.steps.append(Forward(key, bodies, captured, real, self.next_turn(), padding))

    def next_turn(self) -> int:
        """A set of inputs that the last pass did not begin with."""
        self.turn = (self.turn + self.draw.randint(1, SETS - 1)) % SETS
        return self.turn

    def bodies(self, kind: str, size: int) -> Iterator[Body]:
        """The graphs of one pass: one for all layers, or cut at each attention."""
        layers = self.profile.layers
        if kind in ("full", "mtp"):
            middles = [call for _ in range(layers) for call in self.middle(size).calls]
            yield Body(size, (*self.first(size).calls, *(self.in_full(call) for call in middles)))
            return
        yield self.first(size)
        for _ in range(layers):
            yield self.middle(size)

    def in_full(self, call: Call) -> Call:
        """Attention is in the graph too."""
        return replace(call, after="kernel") if call.after == "attention" else call

    def first(self, size: int) -> Body:
        """The embedding's sum, then a norm on its own: pattern B."""
        return Body(size, (self.call(size, "attention", form="sum"), self.call(size, "attention", form="B")))

    def middle(self, size: int) -> Body:
        """From one attention to the next: its output projection's sum, then the MLP's; now and then the experts' on a
        stream aside."""
        calls = [self.call(size, "attention", after="attention")]
        if self.draw.random() < 0.3 and self.profile.aside:
            calls.append(self.call(size, "aside"))
        follow = ["kernel", "kernel", "nothing", "call" if calls[-1].workspace != "aside" else "kernel"]
        follow += ["impatient"] * (2 * self.profile.impatient)
        after = self.draw.choice(follow)
        form = self.draw.choice(("", "E", "sum")) if after == "call" else None
        calls.append(self.call(size, self.draw.choice(("attention", "experts")), form=form, after=after))
        if self.draw.random() < 0.2:
            calls.append(self.call(size, "experts", after="impatient" if self.profile.impatient else "nothing"))
        return Body(size, tuple(calls))

    def call(self, size: int, workspace: str, form: str | None = None, after: str = "kernel") -> Call:
        draw = self.draw
        if form is None:
            form = "sum" if workspace == "aside" else draw.choice(("A", "A", "A", "C", "D", "E", ""))
        strategy = draw.choice((-1, 0, 1))
        return Call(workspace, form, strategy, draw.choice((-1, -1, 0, 1, 2)), after)
