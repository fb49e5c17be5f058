"""Faults of tools/faults are the ones they are meant to be."""

from dataclasses import replace

import pytest

from tools.faults.plan import FAULTS, ORDERLY, WORKSPACE, Plan, draw
from tools.faults.rank import Outcome
from tools.faults.run import judge


def _plans(device: str, kind: str) -> list[Plan]:
    return [draw(number, 4, 1.0, 0, (kind,), device) for number in range(200)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", FAULTS)
def test_calls_fit_the_workspace(kind: str, device: str) -> None:
    """Or the rank at fault would be refused its call, which is another fault."""
    for plan in _plans(device, kind):
        assert all(call.tokens <= WORKSPACE["max_tokens"] for call in plan.calls(plan.victim)), plan


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["skipped call", "extra call", "wrong shape", "wrong op", "wrong order"])
def test_differs_from_its_call_on(kind: str, device: str) -> None:
    for plan in _plans(device, kind):
        right, wrong = plan.calls((plan.victim + 1) % 4), plan.calls(plan.victim)
        assert right[: plan.at] == wrong[: plan.at]
        assert right[plan.at] != wrong[plan.at]
        assert plan.differs_at == plan.at


@pytest.mark.parametrize("kind", ["wrong op", "other eps", "slow"])
def test_nobody_else_is_blamed(kind: str) -> None:
    """But by one that had not come to a call in which others differ: it may say that it cannot tell."""
    plan = _plans("cuda", kind)[0]
    error = "PeerTimeout" if kind == "slow" else "CallMismatch"
    other = (plan.victim + 1) % 4
    behind = 0 if kind == "slow" else plan.differs_at
    for world, made in [(4, made) for made in range(behind + 2)] + [(2, 0)]:
        plan = replace(plan, world_size=world)
        is_fine = {
            peer: not judge(plan, other, Outcome(made, error=error, peer=peer, op_text=f"rank {plan.victim}"))
            for peer in (-1, *range(4))
        }
        assert is_fine.pop(-1) == (world > 2 and made < behind)
        assert [peer for peer, fine in is_fine.items() if fine] == [plan.victim]


@pytest.mark.parametrize("kind", ORDERLY)
def test_who_leaves_in_good_order_ends_later_calls_alone(kind: str) -> None:
    plan = _plans("cpu", kind)[0]
    other, said = (plan.victim + 1) % 4, f"rank {plan.victim}"
    judged = {
        made: judge(plan, other, Outcome(made, error="PeerGone", peer=plan.victim, op_text=said))
        for made in (plan.at - 1, plan.at, plan.at + 1)
    }
    assert [not problems for problems in judged.values()] == [False, True, False]
