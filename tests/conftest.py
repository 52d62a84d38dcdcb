"""Fixtures for all tests: a fixed seed and one thread. GPU tests are skipped if there is no GPU."""

import pytest
import torch

from fused_adaptive import backends

from .common import recording
from .common.covering import covering


@pytest.fixture(autouse=True)
def _seed_and_threads():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tests run in parallel, and their tensors are small


@pytest.fixture(scope="module")
def reference_backend():
    """Uses the reference backend: for tests of its equality with torch, and of mistakes that are made in Python."""
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
    """Marks a case of a ``thinned`` test as heavy if it meets no new pair of values."""
    products = {}
    for item in items:
        if item.get_closest_marker("thinned") and not item.get_closest_marker("heavy"):
            products.setdefault(item.function, []).append(item)
    for cases in products.values():
        chosen = set(covering([item.callspec.params for item in cases]))
        for i, item in enumerate(cases):
            if i not in chosen:
                item.add_marker("heavy")
