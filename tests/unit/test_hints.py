"""Which launches carry the hint that CTAs be spread by their NVLink traffic: those of drivers and GPUs that know it."""

import pytest

protocol = pytest.importorskip("_protocol", reason="tests/_protocol is not built: `make test-build`")


@pytest.mark.parametrize(
    ("driver", "generation", "wanted"),
    [
        (13000, 10, True),
        (13010, 10, True),
        (13000, 12, True),
        (13020, 9, False),  # an H200: what was measured there was measured without
        (12080, 10, False),  # CUDA 12's driver would refuse the launch
        (12090, 10, False),
        (0, 10, False),  # nobody said
        (13000, 0, False),
    ],
)
def test_the_hint_is_for_blackwell_under_cuda_13(driver: int, generation: int, wanted: bool) -> None:
    assert protocol.spreads_link_traffic(driver, generation) is wanted
