"""Whether the buffers that were timed hold the right answer.

After the timing, residuals go back to their start, outputs are poisoned, and the very graph that was timed is replayed
once more. Every call of it must be right for its last output to be right, as each call's residual is the next one's
input.
"""

from __future__ import annotations

import contextlib

import torch

from bench.buffers import EPS, Inputs, Outputs
from bench.cells import Cell
from bench.quantised import KINDS, memory_of
from bench.team import Team
from mnnvl_ar import reference


class Oracle:
    """mnnvl_ar.reference, evaluated on the GPU where that gives the CPU's bits (tried out once), else on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cpu" or _same_as_on_cpu(device) else torch.device("cpu")

    def sums(self, team: Team, inputs: Inputs) -> list[torch.Tensor]:
        """The sum over ranks of each x. Collective."""
        with self._here():
            return [reference.all_reduce([x.to(self.device) for x in team.all_tensors(x)]) for x in inputs.xs]

    def expected(self, cell: Cell, inputs: Inputs, sums: list[torch.Tensor], calls: int) -> Outputs:
        """What `calls` calls leave in each set of outputs."""
        residuals: list[torch.Tensor] = []
        outs: list[torch.Tensor] = []
        quants: list[tuple[torch.Tensor, ...]] = []
        weight = inputs.weight.to(self.device)
        count = len(inputs.residuals)
        with self._here():
            for index, start in enumerate(inputs.residuals):
                z = start.to(self.device)
                norm = torch.full_like(z, float("nan"))
                for call in range(index, calls, count):
                    s = sums[call % len(sums)]
                    last = call + count >= calls
                    if cell.op == "plain":
                        norm = s
                    elif last:
                        norm, z = reference.all_reduce_rms_norm([s], z, weight, EPS)
                    else:
                        z = reference.all_reduce([s, z])  # D(float(s) + float(z)), the numerics' step 2
                residuals.append(z)
                if kind := KINDS.get(cell.op):
                    quants.append(kind.of_norm(norm))
                else:
                    outs.append(norm)
        return Outputs(residuals, outs, quants)

    def _here(self) -> contextlib.AbstractContextManager[object]:
        return torch.device(self.device)


def verdict(cell: Cell, got: Outputs, want: Outputs, exact: bool) -> str | None:
    """None if `got` is right, else what is wrong. exact: bit for bit; otherwise close, as peers round in other
    places."""
    pairs = [("out", g, w) for g, w in zip(got.outs, want.outs, strict=True)]
    if cell.op != "plain":
        pairs += [("residual", g, w) for g, w in zip(got.residuals, want.residuals, strict=True)]
    for name, g, w in pairs:
        wrong = None if same_bits(g, w) else "other bits than the reference" if exact else _distance(g, w.to(g.device))
        if wrong is not None:
            return f"{name}: {wrong}"
    for made, wanted in zip(got.quants, want.quants, strict=True):
        for i, (g, w) in enumerate(zip(made, wanted, strict=True)):
            whole = memory_of if exact else _elements  # what pads a scale is ours to say, and others may leave it
            if not torch.equal(whole(g), whole(w).to(g.device)):
                return f"quantised output {i}: other bytes than the reference"
    return None


def _elements(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    """reference.same_bits where the tensors are: those of large cells are better not moved."""
    integer = torch.int16 if got.element_size() == 2 else torch.int32
    return torch.equal(got.view(integer), want.to(got.device).view(integer))


# Of values of size 1 (norms) to sqrt(R) (sums), after a chain of a few hundred calls in 16 bits. A rank left out, a
# wrong row or a wrong weight is off by 0.3 at the very least.
_MEAN, _FAR, _FAR_SHARE = 0.03, 0.25, 1e-3


def _distance(got: torch.Tensor, want: torch.Tensor) -> str | None:
    if not bool(torch.isfinite(got).all()):
        return "not finite"
    scale = float(want.float().square().mean().sqrt()) or 1.0
    error = (got.float() - want.float()).abs() / scale
    mean, far = float(error.mean()), float((error > _FAR).float().mean())
    if mean <= _MEAN and far <= _FAR_SHARE:
        return None
    return f"off by {mean:.3g} of its size on average, by more than {_FAR} in {far:.2%}"


def _same_as_on_cpu(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(1)
    for dtype, hidden in ((torch.bfloat16, 2880), (torch.float16, 4096), (torch.float32, 1024)):
        inputs = [torch.randn((16, hidden), generator=generator).to(dtype) for _ in range(3)]
        weight = torch.randn(hidden, generator=generator).to(dtype)
        want = reference.all_reduce_rms_norm(inputs, inputs[0], weight, EPS)
        with torch.device(device):
            moved = [x.to(device) for x in inputs]
            got = reference.all_reduce_rms_norm(moved, moved[0], weight.to(device), EPS)
        if not all(same_bits(g.cpu(), w) for g, w in zip(got, want, strict=True)):
            return False
        for kind in KINDS.values() if dtype != torch.float32 and hidden % 128 == 0 else ():
            quant = kind.of_norm(want[0])
            with torch.device(device):
                found = kind.of_norm(want[0].to(device))
            if not all(torch.equal(memory_of(g).cpu(), memory_of(w)) for g, w in zip(found, quant, strict=True)):
                return False
    return True
