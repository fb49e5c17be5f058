"""Faults of tools/faults are the ones they are meant to be."""

import pytest

from tools.faults.plan import FAULTS, WORKSPACE, Plan, draw


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
