"""Selection of a backend, and the environment report."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import fused_adaptive as fa
from fused_adaptive import __main__, backends
from fused_adaptive.backends import native, triton
from fused_adaptive.core import library

from ..common.cases import all_equal, needs_native, parameters, train


def test_reference_is_always_available():
    assert fa.backends.available()["reference"] == ""
    assert backends.NAMES[-1] == "reference"  # "auto" falls back to it
    assert fa.AdamW(parameters(), backend="reference")._step_backend.name == "reference"


def test_every_backend_gives_a_reason_if_it_cannot_run():
    for name, reason in fa.backends.available().items():
        assert name in backends.NAMES
        assert reason == "" or len(reason) > 10


@pytest.fixture
def fake(monkeypatch):
    """A backend that cannot run on the CPU and has precedence over the others."""
    module = SimpleNamespace(name="fake", why_not=lambda devices: "no fake device in this machine")
    load = backends._load
    monkeypatch.setattr(backends, "NAMES", ("fake", "reference"))
    monkeypatch.setattr(backends, "_load", lambda name: module if name == "fake" else load(name))
    return module


def test_a_backend_that_cannot_run_is_skipped_by_auto_and_refused_by_name(fake, monkeypatch):
    assert fa.backends.available()["fake"] == "no fake device in this machine"
    assert backends.select("auto", [torch.device("cpu")]).name == "reference"
    with pytest.raises(RuntimeError, match="'fake' cannot run: no fake device"):
        fa.AdamW(parameters(), backend="fake")
    assert "cannot run: no fake device in this machine" in __main__.report()
    monkeypatch.setenv("FUSED_ADAPTIVE_BACKEND", "fake")
    with pytest.raises(RuntimeError, match="'fake' cannot run"):
        fa.AdamW(parameters())


def test_the_environment_variable_overrides_auto_only(fake, monkeypatch):
    fake.why_not = lambda devices: ""
    monkeypatch.setenv("FUSED_ADAPTIVE_BACKEND", "reference")
    assert backends.select("auto", ()).name == "reference"
    assert backends.select("fake", ()).name == "fake"
    monkeypatch.setenv("FUSED_ADAPTIVE_BACKEND", "auto")
    assert backends.select("auto", ()).name == "fake"
    monkeypatch.setenv("FUSED_ADAPTIVE_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="unknown FUSED_ADAPTIVE_BACKEND 'nonsense'"):
        fa.AdamW(parameters())


def test_backend_is_called_for_every_step_and_interval_end(fake):
    """The interface for kernels: tensors with state, and the tensors of every policy."""
    calls = []
    fake.why_not = lambda devices: ""
    fake.step = lambda participants, found_inf, grad_scale, draw: calls.append(
        (len(participants.views), list(participants.members))
    )
    fake.end_interval = lambda participants: calls.append(list(participants.members))
    policy = fa.ActiveLR(interval=2, high=0.1)
    optimizer = fa.AdamW(parameters(), policy=policy, backend="fake")
    train(optimizer, 1)
    optimizer.end_interval()
    assert calls == [(6, [policy]), [policy]]


def test_backend_is_selected_again_when_a_group_on_another_device_is_added(fake):
    fake.why_not = lambda devices: "only the CPU" if torch.device("meta") in set(devices) else ""
    optimizer = fa.AdamW(parameters())
    assert optimizer._step_backend.name == "fake"
    optimizer.add_param_group({"params": [torch.zeros(2, device="meta", requires_grad=True)]})
    assert optimizer._step_backend.name == "reference"
    strict = fa.AdamW(parameters(), backend="fake")
    with pytest.raises(RuntimeError, match="only the CPU"):
        strict.add_param_group({"params": [torch.zeros(2, device="meta", requires_grad=True)]})
    assert len(strict.param_groups) == 1


def test_foreach_and_fused_do_not_select_a_backend():
    runs = [
        train(fa.AdamW(parameters(), lr=0.1, foreach=f, fused=u), 4) for f in (None, True, False) for u in (None, True)
    ]
    assert all(all_equal(runs[0], run) for run in runs)


def test_environment_report():
    out = subprocess.run([sys.executable, "-m", "fused_adaptive"], capture_output=True, text=True, check=True).stdout
    for expected in (fa.__version__, torch.__version__, "backends", "reference", "can run", '"auto" takes'):
        assert expected in out
    assert ("cuda            none" in out) == (not torch.cuda.is_available())


def test_reference_cannot_be_captured(monkeypatch):
    optimizer = fa.SGD(parameters(), lr=0.1, backend="reference")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        train(optimizer, 1)
    assert all_equal(before, optimizer.param_groups[0]["params"])


def test_a_library_without_code_for_this_gpu_is_skipped_with_a_reason(monkeypatch):
    """The library was built for other compute capabilities and has no PTX for this one."""
    if native.why_not([torch.device("cpu")]):
        pytest.skip("no native library")
    cuda = [torch.device("cuda", 0)]
    monkeypatch.setattr(library, "has_cuda", lambda: True)
    monkeypatch.setattr(library, "built", lambda: {"cuda": "8.0;9.0"})
    monkeypatch.setattr(native, "_missing_code", lambda index: "no kernel image is available")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    reason = native.why_not(cuda)
    assert "for 8.0;9.0, and none that run on cuda:0, of compute capability 7.5 (no kernel image is" in reason
    assert "TORCH_CUDA_ARCH_LIST=7.5" in reason
    with pytest.raises(RuntimeError, match=r"'native' cannot run: .*compute capability 7.5"):
        backends.select("native", cuda)
    monkeypatch.setattr(triton, "why_not", lambda devices: "")
    assert backends.select("auto", cuda).name == "triton"
    monkeypatch.setattr(native, "_missing_code", lambda index: "")
    assert backends.select("auto", cuda).name == "native"


def test_warning_of_sync_debug_mode_is_not_an_error():
    """torch.cuda.set_sync_debug_mode warns at its first call, and other warnings are errors in the tests."""
    text = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    warnings.warn(text, UserWarning, stacklevel=1)


SECOND_IMPORT = """
import copy, sys, torch, fused_adaptive as fa
p = torch.ones(3, requires_grad=True)
optimizer = fa.ActiveAdamW([p], interval=2)
p.grad = torch.ones(3)
optimizer.step()
for name in [name for name in sys.modules if name.split(".")[0] == "fused_adaptive"]:
    del sys.modules[name]
import fused_adaptive
optimizer.load_state_dict(optimizer.state_dict())
copied = copy.deepcopy(optimizer)
copied.step()
optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)], "policy": fa.TrainableLR(interval=2)})
optimizer.step()
print(optimizer._step_backend.name, copied._step_backend.name)
"""


@needs_native
def test_an_optimizer_keeps_its_backend_when_the_package_is_imported_again():
    environment = {**os.environ, "FUSED_ADAPTIVE_BACKEND": "native"}
    command = [sys.executable, "-c", SECOND_IMPORT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["native", "native"]
