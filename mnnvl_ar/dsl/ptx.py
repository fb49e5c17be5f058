"""One-line wrappers over the PTX that the kernel is made of, by the names of csrc/kernels/ptx.cuh.

Addresses are Uint64, of shared memory Uint32; a vector is a tuple of four Uint32. Memory order and scope are in the
name. All are inline PTX, so that each is the instruction that is written, in the order that is written: the compiler
neither moves nor merges them, and no word changes its sign on the way (cutlass reads a Uint32 from a shared-memory
tensor as a signed one).
"""

from typing import Any

from cutlass import Boolean, Uint32, Uint64, select_
from cutlass.cute.arch import globaltimer, inline_ptx

Vector = tuple[Uint32, Uint32, Uint32, Uint32]
_FOUR = [Uint32] * 4


def _load(instruction: str, address: Any) -> Vector:
    out = "{{$w0}, {$w1}, {$w2}, {$w3}}"
    loaded: Vector = inline_ptx(f"{instruction} {out}, [{{$r0}}];", write_only_types=_FOUR, read_only_args=[address])
    return loaded


def _store(instruction: str, address: Any, v: Vector) -> None:
    words = "{{$r1}, {$r2}, {$r3}, {$r4}}"
    inline_ptx(f"{instruction} [{{$r0}}], {words};", read_only_args=[address, *v])


# ---- data on the link


def load_relaxed_sys(address: Uint64) -> Vector:
    return _load("ld.relaxed.sys.global.v4.u32", address)


def store_relaxed_sys(address: Uint64, v: Vector) -> None:
    _store("st.relaxed.sys.global.v4.u32", address, v)


def load_halves_relaxed_sys(address: Uint64) -> Vector:
    """As two words of 64 bits, each of which is there or not: a wider access is several of its parts, in any order."""
    loaded: Vector = inline_ptx(
        "{ .reg .b64 low, high; ld.relaxed.sys.global.v2.b64 {low, high}, [{$r0}];"
        " mov.b64 {{$w0}, {$w1}}, low; mov.b64 {{$w2}, {$w3}}, high; }",
        write_only_types=_FOUR,
        read_only_args=[address],
    )
    return loaded


def store_halves_relaxed_sys(address: Uint64, v: Vector) -> None:
    inline_ptx(
        "{ .reg .b64 low, high; mov.b64 low, {{$r1}, {$r2}}; mov.b64 high, {{$r3}, {$r4}};"
        " st.relaxed.sys.global.v2.b64 [{$r0}], {low, high}; }",
        read_only_args=[address, *v],
    )


def load_relaxed_sys_u32(address: Uint64) -> Uint32:
    return inline_ptx("ld.relaxed.sys.global.u32 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[address])


def store_relaxed_sys_u32(address: Uint64, value: Uint32) -> None:
    inline_ptx("st.relaxed.sys.global.u32 [{$r0}], {$r1};", read_only_args=[address, value])


def load_relaxed_sys_u64(address: Uint64) -> Uint64:
    return inline_ptx("ld.relaxed.sys.global.u64 {$w0}, [{$r0}];", write_only_types=[Uint64], read_only_args=[address])


def store_relaxed_sys_u64(address: Uint64, value: Uint64) -> None:
    inline_ptx("st.relaxed.sys.global.u64 [{$r0}], {$r1};", read_only_args=[address, value])


# ---- a call's own tensors: ordered by kernel boundaries


def load(address: Uint64) -> Vector:
    return _load("ld.global.L1::no_allocate.v4.u32", address)


def store(address: Uint64, v: Vector) -> None:
    _store("st.global.v4.u32", address, v)


# ---- control words


def load_relaxed_gpu(address: Uint64) -> Vector:
    return _load("ld.relaxed.gpu.global.v4.u32", address)


def atomic_add_relaxed_gpu(address: Uint64, value: Uint32) -> Uint32:
    return inline_ptx(
        "atom.relaxed.gpu.global.add.u32 {$w0}, [{$r0}], {$r1};",
        write_only_types=[Uint32],
        read_only_args=[address, value],
    )


def reduce_add_relaxed_gpu(address: Uint64, value: Uint32) -> None:
    inline_ptx("red.relaxed.gpu.global.add.u32 [{$r0}], {$r1};", read_only_args=[address, value])


def reduce_inc_relaxed_gpu(address: Uint64, last: Uint32) -> None:
    """One more; after `last` comes 0."""
    inline_ptx("red.relaxed.gpu.global.inc.u32 [{$r0}], {$r1};", read_only_args=[address, last])


def atomic_cas_relaxed_sys(address: Uint64, expected: Uint32, value: Uint32) -> Uint32:
    return inline_ptx(
        "atom.relaxed.sys.global.cas.b32 {$w0}, [{$r0}], {$r1}, {$r2};",
        write_only_types=[Uint32],
        read_only_args=[address, expected, value],
    )


def exchange_relaxed_gpu(address: Uint64, v: Vector) -> Vector:
    before: Vector = inline_ptx(
        "{ .reg .b128 fresh, stale; .reg .b64 low, high;"
        " mov.b64 low, {{$r1}, {$r2}}; mov.b64 high, {{$r3}, {$r4}}; mov.b128 fresh, {low, high};"
        " atom.relaxed.gpu.global.exch.b128 stale, [{$r0}], fresh;"
        " mov.b128 {low, high}, stale; mov.b64 {{$w0}, {$w1}}, low; mov.b64 {{$w2}, {$w3}}, high; }",
        write_only_types=_FOUR,
        read_only_args=[address, *v],
    )
    return before


def fence_acq_rel_gpu() -> None:
    inline_ptx("fence.acq_rel.gpu;")


def fence_acq_rel_sys() -> None:
    inline_ptx("fence.acq_rel.sys;")


# ---- launch, time


def wait_for_predecessor() -> None:
    inline_ptx("griddepcontrol.wait;")


def trigger_dependents() -> None:
    inline_ptx("griddepcontrol.launch_dependents;")


def global_timer_ns() -> Uint64:
    return Uint64(globaltimer())


def sleep_ns(ns: Uint32) -> None:
    inline_ptx("nanosleep.u32 {$r0};", read_only_args=[ns])


# ---- what the threads of a CTA share


def load_shared(address: Uint32) -> Uint32:
    return inline_ptx("ld.volatile.shared.u32 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[address])


def store_shared(address: Uint32, value: Uint32) -> None:
    inline_ptx("st.volatile.shared.u32 [{$r0}], {$r1};", read_only_args=[address, value])


def load_shared_vector(address: Uint32) -> Vector:
    return _load("ld.shared.v4.u32", address)


def store_shared_vector(address: Uint32, v: Vector) -> None:
    _store("st.shared.v4.u32", address, v)


def atomic_cas_shared(address: Uint32, expected: Uint32, value: Uint32) -> Uint32:
    return inline_ptx(
        "atom.relaxed.cta.shared.cas.b32 {$w0}, [{$r0}], {$r1}, {$r2};",
        write_only_types=[Uint32],
        read_only_args=[address, expected, value],
    )


def sync_threads() -> None:
    inline_ptx("barrier.cta.sync 0;")


def sync_warp() -> None:
    inline_ptx("bar.warp.sync 0xffffffff;")


def any_in_warp(value: Boolean) -> Boolean:
    found = inline_ptx(
        "{ .reg .pred p, q; setp.ne.u32 p, {$r0}, 0; vote.sync.any.pred q, p, 0xffffffff; selp.u32 {$w0}, 1, 0, q; }",
        write_only_types=[Uint32],
        read_only_args=[Uint32(value)],
    )
    return found != Uint32(0)


# ---- words


def select(condition: Boolean, word: Uint32, other: Uint32) -> Uint32:
    """`word` where the condition holds, else `other`: without a branch."""
    return Uint32(select_(condition, word, other))


def round2(low: Any, high: Any) -> Uint32:
    """Two Float32 to one word of bf16, to nearest even, the first in the low half."""
    return inline_ptx("cvt.rn.bf16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Uint32], read_only_args=[low, high])
