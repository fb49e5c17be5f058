"""An exception at any place where a signal's handler may raise one: behind each call, and where a loop begins anew."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

PLACES = ("CALL", "RESUME", "JUMP_BACKWARD")


class Interrupt(BaseException):
    pass


def interrupted(work: Callable[[], object], at: int, is_wanted: Callable[[FrameType], bool]) -> bool:
    """Does `work`, with an exception at place number `at`, from 1, of those in frames that are wanted. False if there
    are fewer: then it was done."""
    seen, before = 0, dict[FrameType, str]()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal seen
        if not is_wanted(frame):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            last = before.get(frame, "")
            before[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if last.startswith(PLACES):
                seen += 1
                if seen == at:
                    raise Interrupt
        return trace

    kept = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except Interrupt:
        return True
    finally:
        sys.settrace(kept)
        before.clear()
    return False
