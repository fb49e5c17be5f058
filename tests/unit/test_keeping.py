"""What closed workspaces have left, given back by two threads at once; a front's workspace that sleeps while peers are
late."""

from __future__ import annotations

import threading
import types
from typing import Any
from unittest import mock

import pytest

from mnnvl_ar import workspace
from mnnvl_ar.compat.shared import Shared
from mnnvl_ar.errors import MnnvlArError


def test_of_two_threads_one_gives_back() -> None:
    both, memory, raised = threading.Barrier(2), mock.Mock(), list[BaseException]()

    def close(handle: int, force: bool) -> bool:
        both.wait(20.0)
        return True

    def give_back() -> None:
        try:
            workspace._give_back_kept()
        except BaseException as error:
            raised.append(error)

    ops = types.SimpleNamespace(_workspace_close=close, _workspace_graphs=lambda handle: 0)
    with mock.patch.object(workspace, "ops", ops), mock.patch.object(workspace, "_kept", [(-1, memory, None)]):
        threads = [threading.Thread(target=give_back) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert workspace._kept == []
    assert raised == []
    memory.close.assert_called_once()


class Late:
    """A workspace whose peers are late for a checkpoint."""

    is_asleep = False

    def checkpoint_prepare(self) -> None:
        self.is_asleep = True
        raise MnnvlArError("rank 1 may still send")


def test_a_checkpoint_that_is_late_still_wakes() -> None:
    shared: Any = Shared.__new__(Shared)
    shared.workspace, shared._asleep = Late(), False
    with pytest.raises(MnnvlArError, match="still send"):
        shared.sleep()
    shared.workspace.wake = mock.Mock()
    with mock.patch("mnnvl_ar.compat.shared.policy"):
        shared.wake(None, 1.0)
    shared.workspace.wake.assert_called_once()
