"""Run Spin over the models: configurations that must hold, variants with one rule broken that must fail.

    python model/check.py                    all of it
    python model/check.py --quick            the configurations that take seconds
    python model/check.py --trail frozen-slot    the counterexample of one variant, step by step

Exits 1 if the correct ring has an error or was not searched to the end, or if a broken variant has no
error or another one than its own; 2 if a tool is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

RING, OVERLAP, ABSENT, LAG, PARTING = "ring.pml", "overlap.pml", "absent.pml", "lag.pml", "parting.pml"
MEMORY_MB = 1900  # per search, and two run at once
SECONDS = 900  # per search: one that takes longer counts as incomplete


@dataclass(frozen=True)
class Config:
    name: str
    what: str
    defines: str
    breaks: str = ""  # the outcome a broken rule must lead to; empty: the ring must hold
    shows: str = ""  # what the counterexample must contain, a regular expression: it fails for its own reason
    model: str = RING
    seconds: int = 1  # roughly; the long ones start first
    progress: bool = False  # look for endless runs in which no call finishes, instead of safety
    depth: int = 20_000


@dataclass(frozen=True)
class Result:
    config: Config
    good: bool
    verdict: str
    states: int
    depth: int
    seconds: float


WRONG, HANG, SILENT, BLAMED = "wrong data read", "hang", "not reported", "wrong one named"
OVERWRITTEN, UNBOUND = "data overwritten", "context lost"
MERGED = "-DSELF=2"  # own stores and polls in one step with others: for what would take too long otherwise
ONE_CTA = "-DCMAX=1 -DCAP=4 -DCHECKS=1 -DSCRIPT={0,0,0,0,0,0}"
SIMPLE = f"{ONE_CTA} -DEARLY=0"
# Rows queue up in calls 7 (3 for each of 2 CTAs), 8 (5 for 1 CTA of rank 0 and 2 of rank 1) and 9 (5 for 2 and 1).
QUEUE = "-DQUEUE=5 -DCAP=12 -DSCRIPT={7,3,8,2,9,0}"
QUEUE_4 = f"{QUEUE} -DCALLS=4 -DSCRIPT={{0,8,7,9}}"
# Light calls and calls that trigger early, as each rank chooses for each of its calls.
LIGHT = "-DMODES=1 -DCMAX=1 -DCAP=4 -DSCRIPT={0,6,1,0,6,1}"
LIGHT_2 = f"{MERGED} -DMODES=1"  # of up to 2 CTAs
LIGHT_ONE = f"{ONE_CTA} -DMODES=1"
MIXED = "under epoch 1 while a call of an earlier one runs"
FAULTY = f"{MERGED} -DCHECKS=1 -DCALLS=4"
TWO_SHOTS = f"{FAULTY} -DFAULT=1 -DCMAX=1 -DSCRIPT={{4,0,6,4}}"
ONE_CLUSTER = "-DCLUSTERS_0=1 -DCLUSTERS_1=1"
NOT_BOUND = "stores to all\n +... but one of them has unbound its memory"
LIGHT_OVERLAP = "-DMODES=1 -DCHECK=BY_ID+BY_SWAP+BY_TAG"  # as in the code

HOLDS = [
    Config("r2", "2 ranks, 2 CTAs, 6 calls, one- and two-shot", ""),
    Config("r2-endless", "the same 6 calls round and round, without end", "-DFOREVER", seconds=4, depth=1_000_000),
    Config(
        "r2-progress",
        "... and no endless run in which no call finishes",
        f"{MERGED} -DFOREVER -DPROGRESS -DSCRIPT={{5,2,3,1,4,5}}",
        seconds=15,
        progress=True,
        depth=4_000_000,
    ),
    Config(
        "r2-any",
        "4 calls, each of any of 3 shapes",
        f"{MERGED} -DCALLS=4 -DNONDET -DSHAPE_A=1 -DSHAPE_B=4 -DSHAPE_C=0",
        seconds=4,
    ),
    Config("r2-any-6", "6 calls, each of any of 2 shapes", f"{MERGED} -DNONDET -DSHAPE_A=0 -DSHAPE_B=4", seconds=4),
    Config(
        "r2-any-endless",
        "1 CTA, calls of any of 3 shapes without end",
        "-DFOREVER -DNONDET -DCMAX=1 -DCAP=4 -DSHAPE_A=0 -DSHAPE_B=6 -DSHAPE_C=1",
        seconds=2,
        depth=1_000_000,
    ),
    Config(
        "r2-pieces",
        "every two launches are one call: its rows in two pieces, of 2 and 1 and of 2 and 2",
        "-DPIECES -DSCRIPT={1,0,4,3,1,1}",
        seconds=2,
    ),
    Config("r2-in-order", "no early start", "-DEARLY=0"),
    Config("r2-own-apart", "data for oneself never goes through the slot", "-DSELF=0"),
    Config("r2-own-merged", "own stores and polls in one step with others", MERGED),
    Config("r2-torn", "vectors land in two pieces", "-DTEAR=1", seconds=2),
    Config("r2-link", "stores to peers land late and in any order", f"{MERGED} -DLINK=1", seconds=4),
    Config("r2-link-own", "... own ones too, 4 calls", "-DLINK=1 -DCALLS=4 -DSCRIPT={1,3,0,4}", seconds=8),
    Config(
        "r2-link-torn",
        "stores to peers land late and in two pieces, 4 calls",
        f"{MERGED} -DLINK=1 -DTEAR=1 -DCALLS=4 -DCAP=6 -DSCRIPT={{1,3,0,1}}",
        seconds=2,
    ),
    Config("r2-loose", "clear, arrival and polls of a CTA in any order", f"{MERGED} -DLOOSE=1", seconds=4),
    Config("r2-link-loose", "both, 4 calls", f"{MERGED} -DLINK=1 -DLOOSE=1 -DCALLS=4 -DSCRIPT={{2,4,0,1}}", seconds=15),
    Config("r2-gated", "equality test, CTAs finish only after the state has advanced", "-DEQUAL -DGATE"),
    Config(
        "r2-queue",
        "one-shot's rows queue up, to 5 a CTA; grids differ by rank; endless",
        f"{QUEUE} -DFOREVER",
        seconds=3,
        depth=1_000_000,
    ),
    Config(
        "r2-queue-progress",
        "... and no endless run in which no call finishes",
        f"{MERGED} {QUEUE} -DFOREVER -DPROGRESS",
        seconds=10,
        progress=True,
        depth=2_000_000,
    ),
    Config("r2-queue-link", "... stores to peers land late, 4 calls", f"{MERGED} {QUEUE_4} -DLINK=1", seconds=7),
    Config("r2-queue-loose", "... any order in a CTA, 4 calls", f"{MERGED} {QUEUE_4} -DLOOSE=1", seconds=4),
    Config("r2-queue-ahead", "... the next row is sent ahead, 6 calls", f"{MERGED} {QUEUE} -DAHEAD=1"),
    Config("r3", "3 ranks, 2 CTAs, 4 calls", f"{MERGED} -DRANKS=3 -DCALLS=4 -DCAP=12 -DSCRIPT={{1,4,0,3}}", seconds=75),
    Config(
        "r3-endless",
        "3 ranks, 1 CTA, 6 calls without end",
        "-DRANKS=3 -DCMAX=1 -DFOREVER -DCAP=12 -DSCRIPT={1,6,0,4,0,1}",
        seconds=2,
        depth=1_000_000,
    ),
    Config(
        "r3-progress",
        "... and no endless run in which no call finishes",
        "-DRANKS=3 -DCMAX=1 -DFOREVER -DPROGRESS -DCAP=12 -DSCRIPT={1,6,0,4,0,1}",
        seconds=9,
        progress=True,
        depth=2_000_000,
    ),
    Config(
        "r3-owner",
        "... rows of one vector: two ranks own none of it",
        "-DRANKS=3 -DCMAX=1 -DFOREVER -DCAP=12 -DVECS=1 -DSCRIPT={1,6,6,4,0,6}",
        depth=1_000_000,
    ),
    Config(
        "r3-queue",
        "3 ranks, 1 CTA, up to 3 rows queue up, without end",
        "-DRANKS=3 -DCMAX=1 -DQUEUE=3 -DFOREVER -DCAP=9 -DSCRIPT={2,0,2,1,6,2}",
        seconds=2,
        depth=1_000_000,
    ),
    Config(
        "r3-any-endless",
        "3 ranks, 1 CTA, calls of any of 2 shapes without end",
        f"{MERGED} -DFOREVER -DNONDET -DRANKS=3 -DCMAX=1 -DCAP=6 -DSHAPE_A=0 -DSHAPE_B=6",
        seconds=22,
        depth=4_000_000,
    ),
    Config(
        "r3-link",
        "3 ranks, 1 CTA, 4 calls, stores to peers land late",
        f"{MERGED} -DRANKS=3 -DCMAX=1 -DCALLS=4 -DLINK=1 -DCAP=6 -DSCRIPT={{0,0,6,0}}",
        seconds=4,
    ),
    Config(
        "r3-loose",
        "3 ranks, 1 CTA, 4 calls, any order in a CTA",
        "-DRANKS=3 -DCMAX=1 -DCALLS=4 -DLOOSE=1 -DCAP=6 -DSCRIPT={0,0,6,0}",
        seconds=6,
    ),
    Config("r2-light", "each call of each rank is light or triggers early, whichever", LIGHT_2, seconds=5),
    Config(
        "r2-light-endless",
        "... without end",
        f"{LIGHT_2} -DFOREVER -DSCRIPT={{1,0,0,1,0,0}}",
        seconds=2,
        depth=1_000_000,
    ),
    Config(
        "r2-light-progress",
        "... 1 CTA, and no endless run in which no call finishes",
        f"{LIGHT} -DFOREVER -DPROGRESS",
        seconds=2,
        progress=True,
        depth=1_000_000,
    ),
    Config(
        "r2-light-any",
        "1 CTA, calls light or not, of any of 2 shapes, without end",
        f"{MERGED} {LIGHT} -DFOREVER -DNONDET -DSHAPE_A=0 -DSHAPE_B=6",
        seconds=2,
        depth=1_000_000,
    ),
    Config(
        "r2-light-link-loose",
        "1 CTA, light or not, stores to peers land late, any order in a CTA, without end",
        f"{MERGED} {LIGHT} -DFOREVER -DLINK=1 -DLOOSE=1",
        depth=1_000_000,
    ),
    Config(
        "r2-light-queue",
        "1 CTA, light or not, up to 3 rows queue up, without end",
        f"{LIGHT} -DQUEUE=3 -DCAP=9 -DFOREVER -DSCRIPT={{2,0,2,1,6,2}}",
        depth=1_000_000,
    ),
    Config(
        "r2-light-fenced",
        "1 CTA, light calls fence their clears, behind them a kernel that never waits, without end",
        f"{LIGHT} -DGAP=1 -DFENCED=1 -DFOREVER",
        depth=1_000_000,
    ),
    Config(
        "r2-light-hop",
        "... they do not: clears land before the next call's sends do at a peer; 2 CTAs, 4 calls",
        f"{LIGHT_2} -DGAP=2 -DCALLS=4 -DSCRIPT={{1,0,3,1}}",
        seconds=5,
    ),
    Config("r2-light-hop-endless", "... 1 CTA, without end", f"{LIGHT} -DGAP=2 -DFOREVER", depth=1_000_000),
    Config(
        "r2-light-fault",
        "a rank gives up anywhere, its peer is told some time: no wrong row is read, none waits; 4 calls",
        f"{FAULTY} -DMODES=1 -DFAULT=2 -DSCRIPT={{1,0,0,0}}",
        seconds=4,
    ),
    Config("r2-two-shot-fault", "the same of two-shot, 1 CTA: no sum is sent that is none", TWO_SHOTS),
    Config(
        "r2-queue-fault",
        "the same of rows that queue up, 1 CTA: those behind the one given up are still sent",
        f"{FAULTY} -DFAULT=1 -DQUEUE=3 -DCAP=9 -DCMAX=1 -DSCRIPT={{2,0,2,0}}",
        seconds=2,
    ),
    Config(
        "r3-light",
        "3 ranks, 1 CTA, 4 calls, light or not",
        f"{MERGED} -DMODES=1 -DRANKS=3 -DCMAX=1 -DCALLS=4 -DCAP=6 -DSCRIPT={{0,6,0,6}}",
        seconds=3,
    ),
    Config(
        "lag", "two-shot's queue: 1 and 2 clusters, 4 rows, stages a batch apart; 4 calls", "", seconds=4, model=LAG
    ),
    Config(
        "lag-batches",
        "... batches of 2 rows, which are summed together",
        "-DBATCH_0=2 -DBATCH_1=2",
        seconds=2,
        model=LAG,
    ),
    Config("lag-2", "... 6 rows, 1 cluster, 2 batches apart", f"{ONE_CLUSTER} -DLAG_0=2 -DLAG_1=2 -DROWS=6", model=LAG),
    Config("lag-apart", "... another lag on each rank", f"{ONE_CLUSTER} -DLAG_1=2", model=LAG),
    Config(
        "lag-3",
        "... 3 ranks, 1 cluster, 2 rows, 1 call",
        f"{ONE_CLUSTER} -DRANKS=3 -DROWS=2 -DCALLS=1",
        seconds=3,
        model=LAG,
    ),
    Config("parting", "multicast: 3 ranks close or sleep when they like, and unbind when all have", "", model=PARTING),
    Config(
        "parting-death", "... or one dies, and counts when its GPU has stopped", "-DDEATH", seconds=2, model=PARTING
    ),
    Config("parting-meets", "a recovery: they unbind when all have come", "-DWAY=MEETS", seconds=2, model=PARTING),
    Config("parting-makes", "a bring-up given up, or left, while a rank may still store", "-DWAY=MAKES", model=PARTING),
    Config("overlap", "two calls at once, all checks: what is not reported was as if in order", "", model=OVERLAP),
    Config("overlap-grids", "... with grids of 1 and 3 CTAs", "-DGRIDS={1,3}", model=OVERLAP),
    Config("overlap-3", "... three calls, of 1, 1 and 2 CTAs", "-DCALLS=3 -DGRIDS={1,1,2}", seconds=2, model=OVERLAP),
    Config("overlap-in-order", "calls of one stream, started early: no false alarm", "-DIN_ORDER", model=OVERLAP),
    Config(
        "overlap-tag", "epochs in what is added, state advanced by CAS", "-DCHECK=BY_ID+BY_CAS+BY_TAG", model=OVERLAP
    ),
    Config("overlap-light", "as in the code: light or not, the state is exchanged", LIGHT_OVERLAP, model=OVERLAP),
    Config("overlap-light-grids", "... with grids of 1 and 3 CTAs", f"{LIGHT_OVERLAP} -DGRIDS={{1,3}}", model=OVERLAP),
    Config(
        "overlap-light-3",
        "... three calls, of 1, 1 and 2 CTAs",
        f"{LIGHT_OVERLAP} -DCALLS=3 -DGRIDS={{1,1,2}}",
        seconds=2,
        model=OVERLAP,
    ),
    Config(
        "overlap-light-in-order",
        "... three calls of one stream: no false alarm",
        f"{LIGHT_OVERLAP} -DCALLS=3 -DGRIDS={{1,2,1}} -DIN_ORDER",
        model=OVERLAP,
    ),
    Config(
        "overlap-one-cta",
        "... three calls of one CTA, all with one id",
        f"{LIGHT_OVERLAP} -DCALLS=3 -DGRIDS={{1,1,1}} -DSAME_IDS",
        model=OVERLAP,
    ),
    Config(
        "absent",
        "a peer is absent, and the next call waits for the one that waits: the peer is named",
        "",
        model=ABSENT,
    ),
    Config("absent-not", "the peer comes in time: nobody is named", "-DCOMES=2 -DSAYS=NONE", model=ABSENT),
    Config(
        "absent-stuck",
        "it comes, and a CTA of the first call stops: our own call is named",
        "-DSTUCK -DCOMES=2 -DSAYS=OVERLAP",
        model=ABSENT,
    ),
]

BREAKS = [
    Config("frozen-slot", "R6: slot index frozen at capture", f"{SIMPLE} -DBREAK_FROZEN_SLOT", WRONG, "left over"),
    Config(
        "frozen-slot-hang",
        "... the same, looking only for a hang",
        f"{SIMPLE} -DBREAK_FROZEN_SLOT -DCHECKS=0",
        HANG,
        "destroys what rank",
    ),
    Config(
        "frozen-size",
        "R6: bytes to clear frozen at capture",
        f"{SIMPLE} -DSCRIPT={{0,1,1,1,0,1}} -DBREAK_FROZEN_SIZE",
        WRONG,
        "left over",
    ),
    Config("two-slots", "R3: two slots", f"{SIMPLE} -DBREAK_TWO_SLOTS", HANG, "destroys what rank"),
    Config(
        "clear-late", "R3: a slot is cleared one call too late", f"{SIMPLE} -DBREAK_LATE", HANG, "destroys what rank"
    ),
    Config(
        "clear-soon", "R3: a slot is cleared one call too early", f"{SIMPLE} -DBREAK_SOON", HANG, "destroys what rank"
    ),
    Config(
        "not-fenced",
        "R3: a clear lands after its CTA counted as finished",
        f"{ONE_CTA} -DBREAK_UNFENCED",
        HANG,
        "destroys what rank",
    ),
    Config("wrap", "R3: epochs wrap at 2^k, not at a multiple of three", f"{SIMPLE} -DBREAK_WRAP", WRONG, "left over"),
    Config(
        "advance",
        "R4: the first CTA advances the state, not the last",
        "-DCHECKS=1 -DEARLY=0 -DSCRIPT={1,1,1,1,1,1} -DBREAK_ADVANCE",
        HANG,
        r"call 0 CTA \d: starts, reads epoch 5",
    ),
    Config(
        "late-readers",
        "R4: a CTA arrives before its row warps have read the state",
        f"{SIMPLE} -DBREAK_LATE_READERS",
        HANG,
        r"call 0 CTA \d: its row warps read epoch 5",
    ),
    Config(
        "trigger",
        "R4: dependents triggered before the state advances",
        f"{ONE_CTA} -DBREAK_TRIGGER",
        WRONG,
        "call 1 CTA 0: starts, reads epoch 4",
    ),
    Config(
        "no-quiescence",
        "R4: nobody waits for an unfinished predecessor",
        f"{ONE_CTA} -DBREAK_NO_QUIESCE",
        HANG,
        "destroys what rank",
    ),
    Config(
        "send-unchecked",
        "R4: sends do not wait for it, the rest does",
        f"{ONE_CTA} -DBREAK_SEND_EARLY",
        WRONG,
        "    ... over what rank",
    ),
    Config(
        "clear-unchecked",
        "R4: the clear does not wait for it, the rest does",
        f"{ONE_CTA} -DBREAK_CLEAR_EARLY",
        HANG,
        "destroys what rank",
    ),
    Config(
        "equality",
        "R4: quiescence tested with ==, finishing not gated",
        "-DCHECKS=1 -DEARLY=0 -DSCRIPT={1,1,1,1,1,1} -DEQUAL",
        HANG,
        "for ever; its last step: starts",
    ),
    Config(
        "grid",
        "R5: more CTAs than are co-resident",
        "-DCHECKS=1 -DEARLY=0 -DSCRIPT={1,1,1,1,1,1} -DBREAK_GRID",
        HANG,
        "for ever; its last step: arrives",
    ),
    Config(
        "queue-grid",
        "R5: ... they start in turn, rows queue up, grids differ by rank",
        f"{QUEUE} -DCHECKS=1 -DEARLY=0 -DSCRIPT={{8,8,8,8,8,8}} -DBREAK_GRID=2",
        HANG,
        r"\A(?!(?s:.*)CTA 1: starts)(?s:.*)"
        r"rank 0 call 0 CTA 0: waits for ever; its last step: stores its next row, 1, .*\n"
        r"rank 1 call 0 CTA 0: waits for ever; its last step: stores its next row, 2, ",
    ),
    Config(
        "queue-order",
        "R5: a rank takes its queued rows from the last to the first",
        f"{SIMPLE} -DQUEUE=3 -DCAP=6 -DSCRIPT={{2,2,2,2,2,2}} -DBREAK_FALLING",
        HANG,
        r"\A(?=(?s:.*)rank 0 call 0 CTA 0: stores its first row, 0, )"
        r"(?=(?s:.*)rank 1 call 0 CTA 0: stores its first row, 2, )(?s:.*)"
        r"rank 0 call 0 CTA 0: waits for ever; its last step: advances.*\n"
        r"rank 1 call 0 CTA 0: waits for ever; its last step: advances",
    ),
    Config(
        "order",
        "R6: a rank replays two calls in the other order",
        f"{SIMPLE} -DBREAK_ORDER",
        WRONG,
        "what rank 0 stored there in call 1, for row",
    ),
    Config(
        "piece-left-out",
        "a rank leaves a call behind its first piece",
        f"{SIMPLE} -DPIECES -DBREAK_PIECES",
        WRONG,
        "what rank 0 stored there in call 0, for row 1",
    ),
    Config(
        "zero-tokens", "R7: one rank counts a call of no tokens", f"{SIMPLE} -DBREAK_ZERO", HANG, "a call of no tokens"
    ),
    Config(
        "flushed",
        "R1: the poll takes a negative subnormal for the sentinel",
        f"{SIMPLE} -DBREAK_FLUSH",
        HANG,
        "call 1 CTA 0: waits for ever",
    ),
    Config(
        "sentinel-sent",
        "R1: a payload equal to the sentinel is sent as it is",
        f"{SIMPLE} -DBREAK_SANITISE",
        HANG,
        "call 3 CTA 0: waits for ever",
    ),
    Config(
        "one-word",
        "R2: the poll looks at one word of the vector",
        f"{SIMPLE} -DTEAR=1 -DBREAK_WORD",
        WRONG,
        "only part of them",
    ),
    Config(
        "light-triggers",
        "a light call, which does not fence its clears, triggers early",
        f"{LIGHT_ONE} -DBREAK_LIGHT_TRIGGERS",
        HANG,
        "destroys what rank",
        seconds=2,
    ),
    Config(
        "light-unchecked",
        "R4: light calls do not wait for an unfinished predecessor",
        f"{LIGHT_ONE} -DBREAK_LIGHT_UNCHECKED",
        HANG,
        r"(rank \d) call 0 CTA 0: starts, reads(?s:.*)\1 call 1 CTA 0: starts, light(?s:.*)destroys what rank",
    ),
    Config(
        "light-late-state",
        "R4: a light call ends before its state is there; behind it a kernel that never waits",
        f"{LIGHT_ONE} -DGAP=1 -DFENCED=1 -DBREAK_LATE_STATE",
        WRONG,
        "call 1 CTA 0: starts, .*reads epoch 4",
    ),
    Config(
        "light-blind",
        "light calls do not ask whether the workspace is broken",
        f"{LIGHT_ONE} -DFAULT=1 -DBREAK_BLIND",
        WRONG,
        r"gives up waiting(?s:.*)call 1 CTA 0: starts, light(?s:.*)what rank \d stored there in call 0",
    ),
    Config(
        "late-mark",
        "R4: the mark of a fault lands after its CTA counted as finished",
        f"{ONE_CTA} -DFAULT=1 -DBREAK_LATE_MARK",
        WRONG,
        r"gives up waiting(?s:.*)finishes(?s:.*)over what rank 0 stored there in call 0(?s:.*)stored there in call 3",
    ),
    Config(
        "light-gap",
        "not promised: a light call's clear is under way until the next call but one, behind a kernel that never waits",
        f"{LIGHT_ONE} -DGAP=1",
        HANG,
        r"\A(?!(?s:.*)starts, reads)(?s:.*)destroys what rank",
        seconds=2,
    ),
    Config(
        "overlap-unchecked",
        "no check: the state is advanced twice to one epoch",
        "-DCHECK=0 -DTWICE",
        SILENT,
        "to already",
        model=OVERLAP,
    ),
    Config(
        "overlap-ids",
        "only ids: a call that arrives after the other's advance",
        "-DCHECK=BY_ID -DTWICE",
        SILENT,
        "to already",
        model=OVERLAP,
    ),
    Config(
        "overlap-ids-cas",
        "ids and CAS: a call is torn between two epochs",
        "-DCHECK=BY_ID+BY_CAS",
        SILENT,
        "finds epoch 1 and 0 arrivals",
        model=OVERLAP,
    ),
    Config(
        "overlap-epochs",
        "only epochs: arrivals of two calls mix",
        "-DCHECK=BY_EPOCH",
        SILENT,
        "finds epoch 0 and 2 arrivals",
        model=OVERLAP,
    ),
    Config(
        "overlap-same-id",
        "all checks, but two launches have one id",
        "-DSAME_IDS",
        SILENT,
        "finds epoch 1 and 0 arrivals",
        model=OVERLAP,
    ),
    Config(
        "overlap-warps",
        "all checks, but row warps load the state for themselves",
        "-DPER_WARP",
        SILENT,
        r"(call \d CTA \d): its row warps read epoch 0\n(?s:.*)\1: its entry warp reads epoch 1",
        model=OVERLAP,
    ),
    Config(
        "overlap-plain-store",
        "the last to arrive stores the state, and does not ask what was there",
        "-DMODES=1 -DGRIDS={1,1} -DCHECK=BY_ID+BY_TAG",
        SILENT,
        "to already",
        model=OVERLAP,
    ),
    Config(
        "overlap-light-never",
        "light calls are not counted: the second runs in its epoch beside the first",
        f"{LIGHT_OVERLAP} -DCOUNTED=NEVER",
        SILENT,
        MIXED,
        model=OVERLAP,
    ),
    Config(
        "overlap-light-at-once",
        "... are counted as finished when they advance the state",
        f"{LIGHT_OVERLAP} -DCOUNTED=AT_ONCE",
        SILENT,
        MIXED,
        model=OVERLAP,
    ),
    Config(
        "overlap-light-by-next",
        "... are counted by the call behind them",
        f"{LIGHT_OVERLAP} -DCOUNTED=BY_NEXT",
        SILENT,
        MIXED,
        model=OVERLAP,
    ),
    Config(
        "absent-impatient",
        "a call waits no longer for the one before it than that does for its peer",
        "-DPATIENCE=1",
        BLAMED,
        r"call 1 CTA (\d): begins to wait for the call before(?s:.*)call 0 CTA \d: begins to wait for the peer"
        r"(?s:.*)call 1 CTA \d: records 2",
        model=ABSENT,
    ),
    Config(
        "absent-unclaimed",
        "whoever gives up fills the record, not only the first",
        "-DUNCLAIMED",
        BLAMED,
        r"records 1(?s:.*)records 3",
        model=ABSENT,
    ),
    Config(
        "fault-untold",
        "who gives up does not tell its peer, which has no deadline here",
        f"{FAULTY} -DFAULT=1 -DCMAX=1 -DSCRIPT={{0,0,0,0}} -DBREAK_UNTOLD",
        HANG,
        r"rank 0 call 0 CTA 0: gives up(?s:.*)rank 1 call \d CTA 0: waits for ever",
    ),
    Config(
        "fault-sum",
        "an owner that has given up sends a sum all the same: NaN without a word",
        f"{TWO_SHOTS} -DBREAK_NAN",
        WRONG,
        r"rank 1 call \d CTA 0: finds the sums of rank 0 in slot \d\n.*their owner gave up",
    ),
    Config(
        "lag-unlike-batches",
        "two-shot's queue with batches of 4 rows on one rank, of 1 on the other",
        f"{ONE_CLUSTER} -DBATCH_0=4",
        HANG,
        r"sends sums of rows 0(?s:.*)rank 0 call 0 CTA 0: waits for ever; its last step: (clears|scatters rows 0 to 3)",
        model=LAG,
    ),
    Config(
        "lag-stages",
        "... gather runs ahead of reduce",
        "-DBREAK_STAGES",
        HANG,
        r"\A(?!(?s:.*)sends sums)(?s:.*)scatters",
        model=LAG,
    ),
    Config(
        "lag-falling",
        "... a rank takes its batches from the last to the first",
        f"{ONE_CLUSTER} -DBREAK_FALLING",
        HANG,
        r"rank 1 call 0 CTA 0: scatters rows 3 to 3(?s:.*)rank 0 call 0 CTA 0: scatters rows 0",
        model=LAG,
    ),
    Config(
        "lag-two-slots", "... two slots", "-DSLOTS=2", OVERWRITTEN, r"call 2 CTA \d: scatters", seconds=3, model=LAG
    ),
    Config("parting-at-once", "a rank unbinds when it closes", "-DBREAK_AT_ONCE", UNBOUND, NOT_BOUND, model=PARTING),
    Config(
        "parting-one-word",
        "... when it has heard from one other",
        "-DBREAK_ONE_WORD",
        UNBOUND,
        rf"(rank \d): takes its addresses(?s:.*)(?!\1)rank \d: unbinds\n(?s:.*){NOT_BOUND}",
        model=PARTING,
    ),
    Config(
        "parting-word-first",
        "a rank says that it has left while a call of it still sends",
        "-DBREAK_WORD_FIRST",
        UNBOUND,
        rf"(rank \d): says that it has left, while(?s:.*)\1: {NOT_BOUND}",
        model=PARTING,
    ),
    Config(
        "parting-unmarked",
        "what stands in for memory does not say that the workspace is broken",
        "-DBREAK_MARK",
        UNBOUND,
        "a graph is replayed\n.*stores to all\n.*leads nowhere",
        model=PARTING,
    ),
    Config(
        "parting-meets-later",
        "a recovery unbinds before all have come",
        "-DWAY=MEETS -DBREAK_MEET_LATER",
        UNBOUND,
        rf"\A(?!(?s:.*)all have come)(?s:.*)unbinds\n.*{NOT_BOUND}",
        model=PARTING,
    ),
    Config(
        "parting-failed-meeting",
        "... or when a rank cannot come, and goes on",
        "-DWAY=MEETS -DBREAK_FAILED",
        UNBOUND,
        rf"rank 1: cannot end(?s:.*)unbinds\n.*{NOT_BOUND}",
        model=PARTING,
    ),
    Config(
        "parting-votes",
        "a bring-up that has failed unbinds while a rank has yet to store",
        "-DWAY=MAKES -DBREAK_VOTES",
        UNBOUND,
        rf"rank 0: gives up(?s:.*){NOT_BOUND}",
        model=PARTING,
    ),
    Config(
        "parting-unexposed",
        "... a rank unbinds that is interrupted before its own store, when others may store",
        "-DWAY=MAKES -DBREAK_UNEXPOSED",
        UNBOUND,
        rf"is interrupted before it stores(?s:.*)unbinds(?s:.*){NOT_BOUND}",
        model=PARTING,
    ),
    Config(
        "parting-no-pause",
        "a process counts as gone when its connection has ended",
        "-DDEATH -DBREAK_NO_PAUSE",
        UNBOUND,
        rf"rank 1: its connection ends(?s:.*)rank 1: {NOT_BOUND}",
        model=PARTING,
    ),
]


def defines(config: Config) -> list[str]:
    """The -D options; a later one replaces an earlier one of the same name."""
    chosen: dict[str, str] = {}
    for option in config.defines.split():
        chosen[option[2:].split("=")[0]] = option
    return list(chosen.values())


def missing_tools() -> list[str]:
    return [tool for tool in ("spin", "cc") if shutil.which(tool) is None]


def run(command: list[str], where: Path) -> str:
    """Output of a build step, which has to succeed."""
    done = subprocess.run(command, cwd=where, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])}: exit {done.returncode}\n{done.stdout[-2000:]}")
    return done.stdout


def search(config: Config, where: Path) -> Result:
    """Build one configuration's verifier and run it to the end or, for a broken rule, to the shortest failure."""
    where.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).with_name(config.model), where)
    started = time.monotonic()
    options = ["-DCOLLAPSE", f"-DMEMLIM={MEMORY_MB}", "-DNP" if config.progress else "-DSAFETY"]
    if config.breaks:
        options.append("-DBFS")  # breadth first: the shortest counterexample
    run(["spin", "-a", *defines(config), config.model], where)
    # What a better search saves, a better compilation costs.
    optimised = "-O0" if config.seconds <= 1 else "-O1" if config.seconds <= 6 else "-O2"
    run(["cc", optimised, "-w", *options, "-o", "pan", "pan.c"], where)
    command = ["./pan", f"-m{config.depth}", *(["-l"] if config.progress else [])]
    try:
        done = subprocess.run(
            command,
            cwd=where,
            text=True,
            timeout=SECONDS,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        output = done.stdout
    except subprocess.TimeoutExpired:
        output = f"Search not completed: more than {SECONDS} s"
    good, verdict = judge(config, output)
    if good and config.breaks and not re.search(config.shows, "\n".join(readable(config, where))):
        good, verdict = False, f"FAILS OTHERWISE, not by '{config.shows}'"
    return Result(
        config,
        good,
        verdict,
        number(r"(\d+) states, stored", output),
        number(r"depth reached (\d+)", output),
        time.monotonic() - started,
    )


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def judge(config: Config, output: str) -> tuple[bool, str]:
    """Whether the search said what it should, and what it said."""
    complaint = re.search(r"Search not completed.*|.*too small.*|.*out of memory.*|.*MEMLIM.*|.*VECTORSZ.*", output)
    errors = re.search(r"errors: (\d+)", output)
    if errors is None:
        return False, f"no verdict: {output.strip()[-200:]}"
    if errors.group(1) == "0":
        if complaint:
            return False, f"INCOMPLETE: {complaint.group(0).strip()}"
        return (False, "NO ERROR FOUND") if config.breaks else (True, "holds")
    if "assertion violated" in output:
        by_model = {OVERLAP: SILENT, ABSENT: BLAMED, LAG: OVERWRITTEN, PARTING: UNBOUND}
        found = by_model.get(config.model, WRONG)
        outcome = found if config.breaks else "ASSERTION VIOLATED"
    elif "invalid end state" in output.split("Spin Version")[0]:
        outcome = HANG if config.breaks else "INVALID END STATE"
    else:
        outcome = "ERROR"
    return outcome == config.breaks, outcome


def readable(config: Config, where: Path) -> list[str]:
    """The counterexample's steps, in the words of the model's printf, then what never ends."""
    replay = run(["spin", "-t", *defines(config), config.model], where)
    steps: list[str] = []
    unfinished: dict[str, str] = {}
    finished: set[str] = set()
    for line in (raw.strip() for raw in replay.splitlines()):
        call = re.match(r"((?:rank \d+ )?call \d+ CTA \d+): (.*)", line)
        if call:
            steps.append(line)
            who, step = call.groups()
            unfinished[who] = step
            if step == "finishes":
                finished.add(who)
        elif line.startswith(("...", "rank ")):
            steps.append(line if line.startswith("rank ") else f"    {line}")
    if config.breaks == HANG:
        steps += [
            f"{who}: waits for ever; its last step: {last}"
            for who, last in sorted(unfinished.items())
            if who not in finished
        ]
    return steps


def show(result: Result) -> None:
    mark = "ok  " if result.good else "FAIL"
    print(
        f"{mark} {result.config.name:17} {result.states:>9} states  depth {result.depth:>7}  {result.seconds:6.1f} s  "
        f"{result.verdict:16} {result.config.what}",
        flush=True,
    )


def check(configs: Iterable[Config], where: Path, jobs: int) -> bool:
    """Search them all, the long ones first; print each as it ends."""
    order = sorted(configs, key=lambda config: -config.seconds)
    results: list[Result] = []
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(search, config, where / config.name) for config in order]):
            results.append(done.result())
            show(results[-1])
    bad = [result.config.name for result in results if not result.good]
    spent = os.times()
    version = run(["spin", "-V"], where).strip().splitlines()[0].split(" --")[0]
    holding, broken = (sum(r.good for r in results if bool(r.config.breaks) is breaks) for breaks in (False, True))
    print(f"{holding} configurations hold, {broken} broken variants fail, each for its own reason; ", end="")
    print(f"{sum(result.states for result in results):,} states in all; {version}")
    print(f"{spent.children_user + spent.children_system:.0f} s of CPU time, compilation included")
    print(
        f"{len(results) - len(bad)} of {len(results)} as they should be" + (f"; not: {', '.join(bad)}" if bad else "")
    )
    return not bad


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the ring's model with Spin.")
    parser.add_argument("--quick", action="store_true", help="only the configurations that take seconds")
    parser.add_argument("--only", metavar="NAME", nargs="+", help="only these configurations")
    parser.add_argument("--trail", metavar="VARIANT", help="print one variant's counterexample")
    parser.add_argument("--jobs", type=int, default=2, help="searches at once (default 2)")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="build here and keep it (default: a temporary folder)")
    arguments = parser.parse_args()

    absent = missing_tools()
    if absent:
        print(f"model/check.py needs {' and '.join(absent)} (Debian: apt-get install spin gcc)", file=sys.stderr)
        return 2
    configs = {config.name: config for config in HOLDS + BREAKS}
    asked = [*(arguments.only or []), *([arguments.trail] if arguments.trail else [])]
    unknown = [name for name in asked if name not in configs]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(configs)}")

    os.nice(5)
    with tempfile.TemporaryDirectory() as folder:
        where = (arguments.keep or Path(folder)).resolve()
        if arguments.trail:
            config = configs[arguments.trail]
            result = search(config, where / config.name)
            show(result)
            if result.good and config.breaks:
                for index, step in enumerate(readable(config, where / config.name), 1):
                    print(f"{index:3}  {step}")
            return 0 if result.good else 1
        chosen = [configs[name] for name in arguments.only] if arguments.only else list(configs.values())
        if arguments.quick:
            chosen = [config for config in chosen if config.seconds <= 2]
        return 0 if check(chosen, where, arguments.jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
