"""What is measured on a server that has started. Each function returns a dictionary for the record.

subject    the server and what there is around it (`Subject`)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from servers import answers, client, compare, counts, prompts
from servers.answers import Answer
from servers.events import Teller
from servers.models.architectures import Model
from servers.prompts import Prompt

REQUEST_PATIENCE = 150.0  # seconds for one request of the traffic
STEPS_BEFORE = 16  # of a run whose steps are timed


class Server(Protocol):
    def generate(self, prompts: Any, tokens: Any, top: int = 0) -> list[Answer]: ...
    def stream(self, prompts: Any, tokens: int) -> Any: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...


@dataclass
class Subject:
    """words: the module of the server. server: offline, else None and it listens on `port`. folder: the scenario's own,
    with calls/ for counts; outputs: where answers are kept, by `name`."""

    words: Any
    server: Server | None
    port: int
    model: Model
    folder: Path
    outputs: Path
    name: str
    teller: Teller

    @property
    def here(self) -> Server:
        assert self.server is not None
        return self.server


def answers_of(s: Subject, count: int, shortest: int, longest: int, tokens: int, top: int) -> dict[str, Any]:
    asked = prompts.prompts(count, shortest, longest, s.model.vocabulary)
    found = s.here.generate(asked, tokens, top)
    answers.save(s.outputs / f"{s.name.replace('/', '.')}.json.gz", asked, found)
    return {
        "answered": sum(len(each.tokens) == tokens for each in found),
        "wanted": count,
        "degenerate": sum(each.is_degenerate() for each in found),
        "without_logprobs": sum(len(each.tops) != tokens for each in found),
    }


def steps(s: Subject, batches: list[int], tokens: int, repeats: int) -> dict[str, Any]:
    """Milliseconds a step at each batch, by how much longer `tokens` more steps take (`ms_a_step`). Both runs have some
    steps before, in which requests are still coming in. Batches in turn, so that what drifts meets all of them."""
    asked = {batch: prompts.prompts(batch, 16, 128, s.model.vocabulary, seed=batch) for batch in batches}
    times: dict[int, list[tuple[float, float]]] = {batch: [] for batch in batches}
    for repeat in range(repeats + 1):
        for batch in batches:
            short, long = _seconds(s, asked[batch], STEPS_BEFORE), _seconds(s, asked[batch], STEPS_BEFORE + tokens)
            if repeat:  # the first round warms up
                times[batch].append((short, long))
    made = (repeats + 1) * len(batches) * (2 * STEPS_BEFORE + tokens)
    rows = {str(batch): ms_a_step(*zip(*each, strict=True), steps=tokens) for batch, each in times.items()}
    return {"batches": rows, "repeats": repeats, "steps_made": made}


def ms_a_step(short: Sequence[float], long: Sequence[float], steps: int) -> dict[str, Any]:
    """Of runs in seconds, the long ones by `steps` longer: median and quartiles of all differences between a long and a
    short one. A few runs in which something else took time move the median by little (Hodges and Lehmann)."""
    differences = [1e3 * (one - other) / steps for one in long for other in short]
    low, median, high = statistics.quantiles(differences, n=4)
    return {"median_ms": median, "quartiles_ms": [low, high]}


def _seconds(s: Subject, asked: list[Prompt], tokens: int) -> float:
    began = time.perf_counter()
    s.here.generate(asked, tokens)
    return time.perf_counter() - began


def compositions(s: Subject, count: int, length: int, tokens: int) -> dict[str, Any]:
    """The same prompts again, in another order, and each alone.

    Another order keeps the number of rows, so a server whose kernels go by shapes gives the same bits; ours must keep
    them too. Another number of rows makes the server itself choose other kernels for its products, so there bits are
    not asked for, unless it is to be batch-invariant, and the share of equal tokens is stated. Prompts are of one
    length: attention is split by it."""
    asked = prompts.prompts(count, length, length, s.model.vocabulary, seed=7)
    first = s.here.generate(asked, tokens, 5)
    again = s.here.generate(asked, tokens, 5)
    order = sorted(range(count), key=lambda i: (i * 5) % count)
    shuffled = s.here.generate([asked[i] for i in order], tokens, 5)
    alone = [s.here.generate([each], tokens, 5)[0] for each in asked[:4]]
    return {
        "again_same_bits": compare.same_bits(first, again),
        "other_order_same_bits": compare.same_bits([first[i] for i in order], shuffled),
        "alone": compare.agreement(alone, first[:4]),
        "alone_same_bits": compare.same_bits(alone, first[:4]),
    }


def traffic(s: Subject, requests: int, concurrency: int, repeated: bool = False) -> dict[str, Any]:
    """Random lengths. Answered is a request that got as many tokens as it asked for."""
    make = prompts.repetitive if repeated else prompts.prompts
    asked = make(requests, 4, 600, s.model.vocabulary, seed=requests)
    wanted = prompts.lengths(requests, 8, 192, seed=requests)
    began = time.perf_counter()
    if s.server is not None:
        found = s.here.generate(asked, wanted)
        unanswered = [
            f"request {i}: {len(a.tokens)} tokens, wanted {n}"
            for i, (a, n) in enumerate(zip(found, wanted, strict=True))
            if len(a.tokens) != n
        ]
    else:
        bodies = [s.words.request(prompt, n) for prompt, n in zip(asked, wanted, strict=True)]
        results = client.run(
            *(s.port, s.words.GENERATE, bodies, s.words.tokens_of, wanted),
            concurrency=concurrency,
            patience=REQUEST_PATIENCE,
        )
        unanswered = [f"request {i}: {each.why_not}" for i, each in enumerate(results) if each.why_not]
    took = time.perf_counter() - began
    return {
        "requests": requests,
        "concurrency": concurrency,
        "http": s.server is None,
        "answered": requests - len(unanswered),
        "unanswered": unanswered[:5],
        "seconds": took,
        "tokens_per_second": sum(wanted) / took,
    }


def sleep(s: Subject, count: int) -> dict[str, Any]:
    asked = prompts.prompts(count, 32, 32, s.model.vocabulary, seed=3)
    before = s.here.generate(asked, 32, 5)
    s.here.sleep()
    slept = time.time()
    s.here.wake()
    after = s.here.generate(asked, 32, 5)
    return {"awake_after_s": time.time() - slept, "same_bits": compare.same_bits(before, after)}


def fault(s: Subject, kind: str, where: str, rank: int) -> dict[str, Any]:
    """Two runs without a fault, which must agree, and one with it. What came of the last is told token by token, since
    a server may take this process along. One prompt: of several, an engine in another process begins as many as have
    come, and their number of rows chooses kernels, and with them bits."""
    del kind, where, rank  # the plugin has them (`scenario`)
    asked = prompts.prompts(1, 24, 24, s.model.vocabulary, seed=5)
    for number in range(2):
        run: dict[int, list[int]] = {}
        for index, tokens in s.here.stream(asked, 192):
            run[index] = list(tokens)
        s.teller.tell("sound", number=number, tokens=[run.get(i, []) for i in range(len(asked))])
    (s.folder / "armed").touch()
    for index, tokens in s.here.stream(asked, 192):
        s.teller.tell("returned", request=index, tokens=list(tokens))
    return {"survived": True}


def counted(s: Subject, before: list[dict[str, Any]]) -> dict[str, Any]:
    """What workers served since `before`."""
    after = counts.settled(s.folder / "calls", time.time())
    return {
        "calls": counts.served(before, after),
        "normed": counts.normed(after),
        "made": counts.made(after),
        "workspace_bytes": counts.nbytes(after),
        "workers": len(after),
    }


KINDS = {
    "answers": answers_of,
    "steps": steps,
    "compositions": compositions,
    "traffic": traffic,
    "sleep": sleep,
    "fault": fault,
}
