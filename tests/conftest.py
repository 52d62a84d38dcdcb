"""Fixtures for every test: a fixed seed, one thread, and GPU tests that show as skipped where there is no GPU."""

import pytest
import torch

from fused_adaptive import backends

from .common import recording


@pytest.fixture(autouse=True)
def _seed_and_threads():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tests run side by side, and their tensors are small


@pytest.fixture(scope="module")
def reference_backend():
    """For what only the reference promises, torch's bits, and for deliberate mistakes that are made in Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
        yield


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU")
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is not None and not (recording.is_emulated() and marker.kwargs.get("emulated")):
            item.add_marker(skip)
