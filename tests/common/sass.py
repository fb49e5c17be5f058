"""What a kernel's machine code has to be: rule R1 and the rounding of docs/numerics.md, checked on what ptxas made.

Contract
  * `kernels(text)` reads the output of `cuobjdump -sass`; `faults(kernel)` names what is wrong in one kernel, or [];
    `library_faults(kernel)` lets pass what this library's quick root explains.
  * A kernel's *body* is what it reaches without a call. Subroutines are nvcc's own (slow paths of division and square
    root) and this library's fault report.
  * A *poll loop* is a loop around a strong, system-scope 128-bit load, with no such loop inside it.

Rules, by name
  compare  no floating-point compare in the body: nothing that waits can depend on one. (A first look at the data is
           often peeled off its loop, so the loops alone would not do.)
  ftz      no .FTZ in the body, but where nvcc's sequences for integer division and for IEEE square root have it.
  fma      no fused multiply-add in the body, but as many as nvcc's sequences for IEEE division and square root hold.
  float    no floating-point instruction in a poll loop, whatever it does.
  call     no call in a poll loop, so that the body is all there is to look at.
  local    no local memory in the body: no spills, no arrays by index.
  narrow   data moves in 128 bits. Control words (32 or 64 bits, strong) are no data. An epilogue whose outputs are not
           like x may load and store less than that, weakly: `library_faults` knows which have all outputs like x.
  loops    at least two poll loops, for data and for signatures: or this checker has not found what it is to look at.
  readonly no load by the read-only path (ld.global.nc, and what nvcc makes of const __restrict__) anywhere, calls too:
           it may not see what others write while the kernel runs, and a predecessor may run on beside its dependent.

Rules of functions of their own
  timer    what comes of the global timer is ordered as signed 64-bit numbers, so that a timer that steps back ends no
           wait at once; one such compare for each poll loop, one for quiescence and one for the hold of a report.
           (The twin, which has other waits, is asked for the signs alone, by test_twin.py.)
  board    one poll loop is of signatures, and looks at one whole signature for each board and at nothing narrower.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;"
    r"(?:\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/)?",
    re.MULTILINE,
)
COMPARE = re.compile(r"(FSETP|FSET|FCMP|FMNMX3?|DSETP|DSET|DMNMX|HSETP2|HSET2|HMNMX2|VHMNMX)\b")
FLOAT = re.compile(r"(F(?!ENCE|LO\b)|H[A-Z]|D(?!EPBAR)|MUFU|I2F|UF[A-Z])")
CONSTANT = re.compile(r"HFMA2(\.MMA)?(\.BF16_V2)?$")  # with zero factors: nvcc's second way to load a constant
FMAS_A_DIVISION, FMAS_A_ROOT = 5, 2  # in nvcc's inline sequences, which begin with FCHK and with MUFU.RSQ


class NoDisassembly(Exception):
    """There is nothing to check on this machine; the message says why."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    address: int
    guard: str | None  # predicate it depends on
    opcode: str
    operands: str
    control: int | None = None  # the upper half of its encoding, which holds what it waits for

    @property
    def target(self) -> int | None:
        """Where a branch or call goes: its last operand."""
        found = re.search(r"(?:^|[ ,])0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if found else None

    @property
    def is_poll(self) -> bool:
        return re.fullmatch(r"LDG?\.E\S*\.128\S*", self.opcode) is not None and ".STRONG.SYS" in self.opcode

    @property
    def is_constant(self) -> bool:
        return CONSTANT.match(self.opcode) is not None and re.match(r"\S+, -RZ, RZ, ", self.operands) is not None

    def __str__(self) -> str:
        return f"{self.address:04x} {self.opcode} {self.operands}"


@dataclasses.dataclass(frozen=True)
class Kernel:
    name: str
    arch: str
    code: list[Instruction]


def kernels(text: str) -> list[Kernel]:
    found = []
    for part in re.split(r"^\s*code for (?=sm_)", text, flags=re.MULTILINE)[1:]:
        arch = part.split(None, 1)[0]
        for function in re.split(r"^\s*Function : ", part, flags=re.MULTILINE)[1:]:
            code = [
                Instruction(int(a, 16), guard or None, op, rest, int(control, 16) if control else None)
                for a, guard, op, rest, control in INSTRUCTION.findall(function)
            ]
            found.append(Kernel(function.split(None, 1)[0], arch, code))
    return found


# ---- control flow


def body(kernel: Kernel) -> dict[int, list[int]]:
    """Indices of the instructions reached from the first without a call, and where each goes on."""
    index = {instruction.address: i for i, instruction in enumerate(kernel.code)}

    def successors(i: int) -> list[int]:
        one = kernel.code[i]
        base = one.opcode.split(".")[0]
        conditional = one.guard not in (None, "PT") or base in ("WARPSYNC", "BSSY") or "," in one.operands
        ends = base in ("EXIT", "RET", "KILL", "BPT", "BRA", "JMP") and not conditional
        following = [] if ends or i + 1 == len(kernel.code) else [i + 1]
        if base in ("BRX", "JMX", "BRXU"):
            raise ValueError(f"{kernel.name}: {one}: an indirect branch, which this checker does not follow")
        if base in ("BRA", "JMP", "WARPSYNC") and one.target is not None:
            following.append(index[one.target])
        return following

    flow: dict[int, list[int]] = {}
    pending = [0]
    while pending:
        i = pending.pop()
        if i not in flow:
            flow[i] = successors(i)
            pending += flow[i]
    return flow


def that_reach(goal: int, flow: dict[int, list[int]]) -> set[int]:
    """Indices of the instructions from which a way leads to `goal`, itself included."""
    before: dict[int, list[int]] = {}
    for i, following in flow.items():
        for other in following:
            before.setdefault(other, []).append(i)
    found, pending = set[int](), [goal]
    while pending:
        i = pending.pop()
        if i not in found:
            found.add(i)
            pending += before.get(i, [])
    return found


def cycles(flow: dict[int, list[int]]) -> list[set[int]]:
    """Strongly connected components that hold a cycle (Tarjan's algorithm, without recursion)."""
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found = []
    for root in flow:
        if root in number:
            continue
        work: list[tuple[int, Iterator[int]]] = []

        def enter(node: int, work: list[tuple[int, Iterator[int]]] = work) -> None:
            number[node] = low[node] = len(number)
            stack.append(node)
            on_stack.add(node)
            work.append((node, iter(flow[node])))

        enter(root)
        while work:
            node, rest = work[-1]
            for following in rest:
                if following not in number:
                    enter(following)
                    break
                if following in on_stack:
                    low[node] = min(low[node], number[following])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == number[node]:
                    component = set()
                    while node not in component:
                        member = stack.pop()
                        on_stack.remove(member)
                        component.add(member)
                    if len(component) > 1 or node in flow[node]:
                        found.append(component)
    return found


def poll_loops(kernel: Kernel, flow: dict[int, list[int]] | None = None) -> list[set[int]]:
    """The innermost loops that hold a polling load. Nests are taken apart by cutting the jumps back to an entry."""
    flow = body(kernel) if flow is None else flow
    entered = {following for i, after in flow.items() for following in after if following <= i}
    found = []
    for loop in cycles(flow):
        if not any(kernel.code[i].is_poll for i in loop):
            continue
        outside = {following for i, after in flow.items() if i not in loop for following in after if following in loop}
        entry = min(outside or entered & loop or loop)
        inner = {i: [following for following in flow[i] if following in loop and following != entry] for i in loop}
        found += poll_loops(kernel, inner) or [loop]
    return found


# ---- rules


def faults(kernel: Kernel) -> list[str]:
    flow = body(kernel)
    instructions = [kernel.code[i] for i in sorted(flow)]
    loops = poll_loops(kernel, flow)
    wrong = []
    last_root = None  # the register that the newest MUFU.RSQ wrote
    for one in instructions:
        if COMPARE.match(one.opcode):
            wrong.append(f"compare: {one}")
        if one.opcode.startswith("MUFU.RSQ"):
            last_root = one.operands.split(",")[0]
        if ".FTZ" in one.opcode:
            in_division = one.opcode == "F2I.FTZ.U32.TRUNC.NTZ"
            in_root = one.opcode == "FMUL.FTZ" and last_root in re.split(r"[, ]+", one.operands)[1:]
            if not in_division and not in_root:
                wrong.append(f"ftz: {one}")
        if re.match(r"(LDL|STL)\b", one.opcode):
            wrong.append(f"local: {one}")
        if re.match(r"(LDG?|STG?)\.E\b", one.opcode) and ".128" not in one.opcode and ".STRONG" not in one.opcode:
            wrong.append(f"narrow: {one}")
        if re.match(r"STG?\.E\b", one.opcode) and ".128" not in one.opcode and ".STRONG" in one.opcode:
            wrong.append(f"narrow: {one}")
    opcodes = [one.opcode.split(".")[0] for one in instructions]
    roots = sum(one.opcode.startswith("MUFU.RSQ") for one in instructions)
    fmas, explained = opcodes.count("FFMA"), FMAS_A_DIVISION * opcodes.count("FCHK") + FMAS_A_ROOT * roots
    if fmas != explained or any(opcode in ("DFMA", "FFMA2") for opcode in opcodes):
        wrong.append(f"fma: {fmas} FFMA, {explained} of them explained by divisions and square roots")
    for loop in loops:
        for i in sorted(loop):
            one = kernel.code[i]
            if FLOAT.match(one.opcode) and not one.is_constant:
                wrong.append(f"float: {one}")
            if one.opcode.startswith("CALL"):
                wrong.append(f"call: {one}")
    if len(loops) < 2:
        wrong.append(f"loops: {len(loops)} poll loops")
    return wrong + [f"readonly: {one}" for one in kernel.code if re.match(r"LD\S*\.CONSTANT\b", one.opcode)]


def timer_faults(kernel: Kernel) -> list[str]:
    compares = timer_compares(kernel)
    signed = sum(compares.values())
    wanted = len(poll_loops(kernel)) + 2
    wrong = [f"timer: {kernel.code[i]}" for i, is_signed in compares.items() if not is_signed]
    return wrong + [f"timer: {signed} signed compares, wanted {wanted}"] * (signed < wanted)


def timer_compares(kernel: Kernel) -> dict[int, bool]:
    """Where what comes of the global timer is ordered (not: is equal to), and whether with a sign. Of 64 bits that is
    said by the second of two compares, .EX, of the upper words. Values are followed through the instructions behind
    each read of the timer, in the order of their addresses."""
    found: dict[int, bool] = {}
    for start, read in enumerate(kernel.code):
        if "SR_GLOBALTIMER" not in read.operands:
            continue
        known = {*_registers(read)}
        for i, one in enumerate(kernel.code[start + 1 : start + 1 + _WINDOW], start + 1):
            is_derived = any(each.lstrip("-~") in known for each in _operands(one)[1:])
            if is_derived and re.match(r"U?ISETP\.(GE|GT|LE|LT)\S*\.EX\b", one.opcode):
                found[i] = ".U32" not in one.opcode
            if is_derived and not re.match(r"LD|AT|S2|CS2", one.opcode):  # what is loaded comes of an address only
                known |= {*_registers(one)}
            elif one.guard is None:
                known -= {*_registers(one)}
    return found


def board_faults(kernel: Kernel, boards: int) -> list[str]:
    """The loop of signatures is the poll loop that looks for no sentinel. A strong load of 128 bits is what ptxas makes
    of two words of 64 bits and of four of 32, alike; what was asked for only PTX says, to test_memory_model.py."""
    found = []
    for loop in poll_loops(kernel):
        code = [kernel.code[i] for i in sorted(loop)]
        if not any(one.opcode.startswith("ISETP") and "-0x80000000" in _operands(one) for one in code):
            found.append([one.opcode for one in code if re.match(r"LDG?\.E\S*\.STRONG\.SYS", one.opcode)])
    # Besides signatures: one look at the deadline (64 bits) and at the mark of a broken workspace (32).
    wanted = ["LDG.E.128.STRONG.SYS"] * boards + ["LDG.E.64.STRONG.SYS", "LDG.E.STRONG.SYS"]
    return [] if [sorted(loads) for loads in found] == [wanted] else [f"board: {found}"]


def alias_faults(kernel: Kernel) -> list[str]:
    """What is wrong with the fence between aliases (docs/multicast.md), whose system-scope half no other fence has: one
    a kernel, which can be passed by on the way to the fence of clears, and stands in no poll loop."""
    flow = body(kernel)
    fences = [i for i in sorted(flow) if kernel.code[i].opcode == "MEMBAR.SC.SYS"]
    # Which of two scopes it has is the driver's to say; both come to what follows them.
    alias = {next(j for j in range(i, len(kernel.code)) if kernel.code[j].opcode == "CCTL.IVALL") for i in fences}
    wrong = [] if len(fences) == 1 else [f"alias: {len(fences)} fences"]
    if any(alias & loop for loop in poll_loops(kernel, flow)):
        wrong.append("alias: in a poll loop")
    reached, pending = set[int](), [0]
    while pending:
        i = pending.pop()
        if i not in reached | alias:
            reached.add(i)
            pending += flow[i]
    if not any(kernel.code[i].opcode == "MEMBAR.ALL.GPU" for i in reached):
        wrong.append("alias: cannot be passed by")
    return wrong


# What csrc/kernels/root.cuh adds to CUDA's own division and root, which stand behind it: 1 / H, once a kernel, in
# nvcc's sequence for a reciprocal; and for each row, with a MUFU.RSQ of its own beside that of CUDA's root, ten FFMAs,
# two of which are counted as a root's.
FMAS_A_RECIPROCAL, FMAS_A_QUICK_ROOT = 2, 8
# Mangled. All that Plain and RmsNorm load and store are whole vectors; other epilogues have outputs of other sizes.
OTHER_EPILOGUE = re.compile(r"epilogues\d+(?!(?:Plain|RmsNorm)E)")
NORMED = re.compile(r"epilogues\d+(?!Plain)")
WEAK = re.compile(r"narrow: [0-9a-f]+ (?!\S*\.STRONG)")
NEGATION = re.compile(r"ftz: [0-9a-f]+ FADD\.FTZ R\d+, (-R\d+, -RZ|-RZ, -R\d+)$")  # in that sequence, of no subnormal
# Of each vector whose elements are divided by a scale (protocol/numerics_base.h, divide_by): two for each of eight
# elements, and those of the scale itself and of its reciprocal. Once more a negation, in nvcc's sequence for that.
QUOTIENTS = {"PerTokenFp8": 18, "BlockScaled": 24}


def library_faults(kernel: Kernel) -> list[str]:
    found = faults(kernel)
    if OTHER_EPILOGUE.search(kernel.name):
        found = [fault for fault in found if not WEAK.match(fault)]
    roots = sum(kernel.code[i].opcode.startswith("MUFU.RSQ") for i in body(kernel))
    if not NORMED.search(kernel.name) or roots == 0:
        return found
    divides = re.search(r"PerTokenFp8|BlockScaled", kernel.name)
    tile = re.search(r"TileILi(\d)ELi(\d)E", kernel.name)
    quotients = QUOTIENTS[divides[0]] * int(tile[1]) * int(tile[2]) if divides and tile else 0
    negations = [fault for fault in found if NEGATION.match(fault)][: 2 if divides else 1]
    fmas = [
        fault
        for fault in found
        if (count := re.match(r"fma: (\d+) FFMA, (\d+) of them", fault))
        and int(count[1]) - int(count[2]) == FMAS_A_RECIPROCAL + FMAS_A_QUICK_ROOT * roots // 2 + quotients
    ]
    return [fault for fault in found if fault not in (*negations, *fmas)]


def roots(kernel: Kernel) -> list[set[str]]:
    """Of each MUFU.RSQ that is reached without a call, in order: which of "root" and "rstd" is computed from it, by
    exactly the operations of csrc/protocol/numerics_root.h. "root" is nvcc's inline sequence for __fsqrt_rn, too."""
    return [_made_of(kernel.code, i) for i in sorted(body(kernel)) if kernel.code[i].opcode == "MUFU.RSQ"]


# Name -> the product's factors, sorted, and what is added. A minus is written before the whole product.
_QUICK = {
    "r": ("about*x", ""),
    "h": ("0.5*about", ""),
    "e": ("-r*r", "x"),
    "root": ("e*h", "r"),
    "e1": ("-about*root", "1"),
    "once": ("about*e1", "about"),
    "e2": ("-once*root", "1"),
    "rstd": ("e2*once", "once"),
}
_WINDOW = 96  # instructions: other work of the kernel is between them


def _made_of(code: list[Instruction], start: int) -> set[str]:
    """Names what the instructions behind a MUFU.RSQ compute, register by register; all else is forgotten."""
    names = {formula: name for name, formula in _QUICK.items()}
    target, source = _operands(code[start])
    known = {target: "about", source: "x"} if target != source else {target: "about"}
    found = set()

    def named(operand: str) -> str | None:
        minus, plain = ("-", operand[1:]) if operand.startswith("-") else ("", operand)
        value = plain if plain in ("0.5", "1") else "" if plain == "RZ" else known.get(plain)
        if value is None:
            return None
        return value.removeprefix("-") if minus and value.startswith("-") else minus + value if value else value

    for one in code[start + 1 : start + 1 + _WINDOW]:
        operands = _operands(one)
        base, values = one.opcode.removesuffix(".FTZ"), [named(each) for each in operands[1:]]
        name = None
        if base in ("FMUL", "FFMA", "FADD") and None not in values:
            factors = [str(each) for each in values]
            if base == "FADD":
                name = factors[0] if factors[1].strip("-") == "" else None
            else:
                minus = "-" if sum(each.startswith("-") for each in factors[:2]) == 1 else ""
                product = minus + "*".join(sorted(each.removeprefix("-") for each in factors[:2]))
                name = names.get((product, factors[2] if base == "FFMA" else ""))
        for register in _written(one, operands):
            known.pop(register, None)
        if name is not None:
            known[operands[0]] = name
            found.add(name)
    return found & {"root", "rstd"}


def _operands(one: Instruction) -> list[str]:
    return [each.strip().removesuffix(".reuse") for each in one.operands.split(",")]


def _written(one: Instruction, operands: list[str]) -> list[str]:
    """The registers that an instruction may write: its first operand, and those behind it if it is wide."""
    first = re.fullmatch(r"R(\d+)", operands[0])
    if first is None or one.opcode.startswith(("ST", "RED", "BAR")):
        return []
    wide = 4 if ".128" in one.opcode else 2 if ".64" in one.opcode or ".WIDE" in one.opcode else 1
    return [f"R{int(first[1]) + i}" for i in range(wide)]


def _registers(one: Instruction) -> list[str]:
    """As `_written`, of uniform registers too."""
    target = _operands(one)[0]
    if target.startswith("UR"):
        return [target]
    wide = one.opcode == "CS2R"  # 64 bits, unless it says 32
    return [target, f"R{int(target[1:]) + 1}"] if wide and target != "RZ" else _written(one, [target])


# ---- tools


def find_tool(name: str) -> str:
    """From PATH, $CUDA_HOME or pip's packages."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = (nvidia and nvidia.submodule_search_locations) or ()
    places = [os.environ.get("PATH", ""), os.environ.get("CUDA_HOME", "/none") + "/bin"]
    places += [str(path) for folder in folders for path in Path(folder).glob("cu*/bin")]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise NoDisassembly(f"no {name} on this machine (pip install nvidia-cuda-{name})")
    return found


def compile_by_nvcc(source: Path, out: Path, arch: str, *options: str, csrc: Path = ROOT / "csrc") -> None:
    """One file, by the flags that decide on floating point, to a cubin or (by `out`) PTX. Raises NoDisassembly."""
    nvcc = find_tool("nvcc")
    if shutil.which("g++") is None:
        raise NoDisassembly("no g++ on this machine")
    if arch[3:] not in subprocess.run([nvcc, "--help"], capture_output=True, text=True).stdout:
        raise NoDisassembly(f"this nvcc does not build for {arch}")
    flags = "-std=c++20 -O3 -fmad=false -ftz=false --expt-relaxed-constexpr"
    command = [nvcc, *flags.split(), *options, "-ptx" if out.suffix == ".ptx" else "-cubin", f"-arch={arch}"]
    subprocess.run([*command, f"-I{csrc}", "-o", str(out), str(source)], check=True, capture_output=True, text=True)


def disassemble(file: Path) -> list[Kernel]:
    """The kernels of a library or cubin. Raises NoDisassembly."""
    if not file.exists():
        raise NoDisassembly(f"{file.name} is not built")
    tools = [find_tool("cuobjdump"), find_tool("nvdisasm")]
    path = os.pathsep.join([*(str(Path(tool).parent) for tool in tools), os.environ.get("PATH", "")])
    got = subprocess.run(
        [tools[0], "-sass", str(file)], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    found = kernels(got.stdout)
    if not found:
        raise NoDisassembly(f"{file.name} holds no GPU code: {(got.stderr or 'built without nvcc').strip()}")
    return found
