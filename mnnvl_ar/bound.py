"""Calls that are checked once and then cost the CPU little more than their launch."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from mnnvl_ar import crosscheck
from mnnvl_ar._library import PATH, ops

# Without the GIL, as an op runs: where a launch queue is full the driver blocks, and the monitor is to run meanwhile.
_run = ctypes.CDLL(str(PATH)).mnnvl_ar_run_bound
_run.argtypes, _run.restype = (ctypes.c_int64,), ctypes.c_char_p

# In C all the way: no signal's handler runs before they have.
_begin, _end = ops._bind_begin.default._op, ops._bind_end.default._op
_binders = itertools.count(1)


class BoundCall:
    """What `bind` returns: call it, without arguments, for one call of the op on the current stream."""

    def __init__(self, op: Callable[..., None], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._op, self._arguments, self._options = op, arguments, options  # and with them the tensors
        self._number, self._memory = 0, list[torch.UntypedStorage]()
        self._bind()

    def __call__(self) -> None:
        if not self._number:
            self._op(*self._arguments, **self._options)
            return
        wrong = _run(self._number)
        if wrong is None:
            return
        if wrong:
            raise RuntimeError(wrong.decode())
        self._bind()  # other workspaces share the device by now, and launch shapes go by that
        self()

    def _bind(self) -> None:
        self._forget()
        given = (*self._arguments, *self._options.values())
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        self._memory = [tensor.untyped_storage() for tensor in tensors]  # which they may be given another one for
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        # The host launches nothing, and with checks a call is more than its launch.
        if not on_gpu or crosscheck.is_watching():
            return
        who, is_whole = next(_binders), False
        try:  # whatever a signal's handler raises, and wherever: what has begun ends
            _begin(who)
            self._op(*self._arguments, **self._options)
            is_whole = True
        finally:
            self._number = _end(who)
            if not is_whole:  # what was bound until then is a part of the call
                self._forget()

    def _forget(self) -> None:
        if self._number:
            ops._bind_forget(self._number)
            self._number = 0

    def __copy__(self) -> BoundCall:
        return self

    def __deepcopy__(self, memo: object) -> BoundCall:
        return self  # its tensors are those that were bound

    def __reduce__(self) -> NoReturn:
        raise TypeError("a BoundCall cannot be pickled, nor sent to another process: bind there")

    def __del__(self) -> None:
        if getattr(self, "_number", 0):
            self._forget()


def bind(op: Callable[..., None], *arguments: Any, **options: Any) -> BoundCall:
    """A call of `op` with these arguments, to be made again and again by calling what is returned: for loops that run
    eagerly, on the same tensors each time.

    op:                 an `_out` op of `mnnvl_ar.ops`
    arguments, options: as it takes them. Tensors are kept, and may hold other values at each call; their memory is
                        what is bound, as in a CUDA graph: after `weight.data = ...`, `set_` or `resize_`, bind anew

    All that the op checks is checked here, once: dtypes, shapes, alignment, that outputs are apart. Each call looks at
    the workspace alone: broken, closed, asleep, in use by another thread. It is launched on the stream that is current
    when it is made, may be captured, and leaves the same bits as the op. On the host, and with `MNNVL_AR_CHECK=1`, it
    is a call of the op. Not for code under `torch.compile`, which has no such cost.
    Errors: what the op raises, here; at a call `RuntimeError` for what is wrong with the workspace by then.
    Source: mnnvl_ar design; bench/cpu_cost.py for the cost.
    """
    name = getattr(op, "__name__", str(op)).removesuffix(".default")
    if not name.endswith("_out"):
        raise ValueError(f"op: is {name}, wanted an op that writes into tensors it is given, such as all_reduce_out")
    return BoundCall(op, arguments, options)
