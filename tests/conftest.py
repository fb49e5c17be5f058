"""GPU tests run where there are GPUs enough, are skipped with a reason elsewhere; `--gpu-record` writes down what ran.

A test says what it needs by `@pytest.mark.gpu(n)`: n CUDA GPUs, 1 if left out. All of tests/gpu needs at least one.
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import hypothesis
import pytest

from tools import gpu_record
from tools.multicast import keep_multicast_off

keep_multicast_off()  # before any rank starts

# A busy machine draws slowly, which is no failure.
SLOW = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("dev", **SLOW)
hypothesis.settings.register_profile("ci", **SLOW, derandomize=True, max_examples=100, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


# The files that take longest, mostly to wait. They come first: where files run side by side (-n 4 --dist loadfile
# --no-loadscope-reorder, as in .ci/run) one of them at the end would be what all others wait for.
LONGEST = (
    "memory/test_faults.py",
    "host/test_doctor_group.py",
    "host/test_wheel.py",
    "bench/test_bench_run.py",
    "ranks/test_quantised_ops.py",
    "ranks/test_input.py",
    "host/test_host_virtual.py",
    "compat/test_policy.py",
    "host/test_demo.py",
    "host/test_host_controls.py",
    "host/test_sanitizers.py",
    "host/test_ranks.py",
    "host/test_gone.py",
    "host/test_fault_matrix.py",
    "host/test_tutorials.py",
    "host/test_host_replays.py",
    "compat/test_ends.py",
)


def longest_first(items: list[pytest.Item]) -> None:
    """Files keep together, and tests of a file keep their order."""
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@functools.cache
def gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def gpus_needed(item: pytest.Item) -> int:
    """The largest n of the test's `gpu(n)` marks; 0 without one."""
    counts = [(*mark.args, *mark.kwargs.values(), 1)[0] for mark in item.iter_markers("gpu")]
    return max([int("gpu" in item.path.relative_to(Path(__file__).parent).parts[:-1]), *counts])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-record", metavar="FILE", help="write what the GPU tests did to FILE")
    parser.addoption("--gpus", metavar="N", type=int, help="only tests that need N GPUs, no more and no fewer")


@pytest.hookimpl(tryfirst=True)  # before -m chooses, as tests/gpu is marked here
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--gpus")
    if wanted is not None:
        others = [item for item in items if gpus_needed(item) != wanted]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if gpus_needed(item) == wanted]
    longest_first(items)
    asked = "exhaustive" in config.getoption("-m")
    for item in items:
        if item.get_closest_marker("exhaustive") and not asked:
            item.add_marker(pytest.mark.skip(reason="takes minutes: run by `-m exhaustive`"))
        needed = gpus_needed(item)
        if needed == 0:
            continue
        item.add_marker(pytest.mark.gpu(needed))
        item.user_properties.append(("gpus", needed))
        if gpus_here() < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA GPU{'s' * (needed > 1)}, {gpus_here()} here"))


class Recorder:
    """Notes the outcome of each GPU test and the number of GPUs that it needs. Says which tests of tests/gpu and
    tests/ranks were left out, by an option or by an end before the last, and not just skipped for want of GPUs.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.outcomes: dict[str, tuple[int, str]] = {}  # a failure at any stage stays
        self.wanted: dict[str, int] = {}  # GPUs needed, by test; 0 for files of which nothing was collected

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self.wanted |= {item.nodeid: gpus_needed(item) for item in items if gpus_needed(item)}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.wanted |= {item.nodeid: gpus_needed(item) for item in session.items if gpus_needed(item)}
        seen = {test.split("::")[0] for test in self.wanted}
        here = Path(__file__).parent
        found = [*here.glob("gpu/test_*.py"), *here.glob("ranks/test_*.py")]
        files = {str(file.relative_to(session.config.rootpath)) for file in found}
        self.wanted |= dict.fromkeys(files - seen, 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        gpus = dict(report.user_properties).get("gpus")
        failed = self.outcomes.get(report.nodeid, (0, ""))[1] == "failed"
        if isinstance(gpus, int) and not failed and (report.when == "call" or not report.passed):
            self.outcomes[report.nodeid] = (gpus, report.outcome)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if any(outcome == "passed" for _, outcome in self.outcomes.values()):
            left_out = {test: self.wanted[test] for test in sorted(self.wanted.keys() - self.outcomes.keys())}
            gpu_record.write_run(self.file, self.outcomes, left_out)
            partial = f", as partial: {len(left_out)} tests were left out" if left_out else ""
            terminalreporter.write_line(f"recorded in {self.file}{partial}")
        else:
            terminalreporter.write_line(f"no GPU test passed: {self.file} is left as it was")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("--gpu-record"):
        config.pluginmanager.register(Recorder(Path(file)), "gpu-record")
