"""Fixtures for every test: a fixed seed, one thread, and GPU tests that show as skipped where there is no GPU."""

import pytest
import torch

from fused_adaptive import backends

from .common import recording
from .common.covering import covering


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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    _thin(items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU")
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is not None and not (recording.is_emulated() and marker.kwargs.get("emulated")):
            item.add_marker(skip)


def _thin(items):
    """Of a test that is marked ``thinned``, cases that meet no new pair of values become heavy."""
    products = {}
    for item in items:
        if item.get_closest_marker("thinned") and not item.get_closest_marker("heavy"):
            products.setdefault(item.function, []).append(item)
    for cases in products.values():
        chosen = set(covering([item.callspec.params for item in cases]))
        for i, item in enumerate(cases):
            if i not in chosen:
                item.add_marker("heavy")
