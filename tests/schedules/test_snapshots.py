"""AALR's snapshots: memory use, files that survive kill -9 and full disks, and errors without space."""

from __future__ import annotations

import copy
import math
import pickle
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import fused_adaptive as fa
from fused_adaptive.schedules import snapshots

from .common import Net, one_thread, same, values  # noqa: F401


def test_a_snapshot_in_memory_is_one_copy_of_parameters_and_buffers():
    model = Net()
    controller = fa.AALR(torch.optim.SGD(model.parameters(), lr=0.1), model, initial_loss=1.0)
    held = controller.state_dict()["snapshot"]
    parameters, buffers = list(model.parameters()), list(model.buffers())
    assert held.keys() == {**dict(model.named_parameters()), **dict(model.named_buffers())}.keys()
    expected = sum(t.numel() * t.element_size() for t in [*parameters, *buffers])
    assert snapshots.size_of(held) == expected


def test_a_buffer_that_cannot_be_restored_is_refused_before_anything_is():
    model = Net()
    build = lambda: fa.AALR(torch.optim.SGD(model.parameters(), lr=0.1), model, initial_loss=1.0)  # noqa: E731
    controller = build()
    with torch.no_grad():
        model.layers[0].weight.add_(1)  # pyright: ignore
    with torch.inference_mode():
        model.seen = torch.ones(())
    before = values(model)
    for call in (lambda: controller.step(math.nan), build):
        with pytest.raises(RuntimeError, match=r"'seen' was made in torch\.inference_mode\(\)"):
            call()
    assert same(values(model), before)


@contextmanager
def largest_file(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_no_data(tmp_path):
    model = nn.Linear(100, 100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    file = tmp_path / "best.pt"
    controller = fa.AALR(optimizer, model, initial_loss=1.0, patience=1, snapshot=file)
    initial, before = file.read_bytes(), copy.deepcopy(controller.progress)
    with torch.no_grad():
        model.weight.zero_()
    with largest_file(10_000), pytest.raises(OSError, match=r"0\.0 MiB, could not be written to .*best\.pt.*repeat"):
        controller.step(0.5)
    assert (file.read_bytes(), controller.progress, controller.last_epoch) == (initial, before, 0)
    assert list(tmp_path.iterdir()) == [file], "no half file is left"
    controller.step(0.5)
    assert controller.action == "save"
    assert not torch.load(file, weights_only=True)["tensors"]["weight"].any()


def test_a_lost_snapshot_file_loses_no_other_data(tmp_path):
    model = Net()
    file = tmp_path / "best.pt"
    controller = fa.AALR(torch.optim.SGD(model.parameters(), lr=0.1), model, initial_loss=1.0, snapshot=file)
    content, before = file.read_bytes(), controller.progress
    file.unlink()
    with pytest.raises(FileNotFoundError, match="put it back"):
        controller.step(math.nan)
    assert controller.progress == before
    file.write_bytes(content)
    controller.step(math.nan)
    assert controller.get_last_lr() == [0.05]


def test_a_snapshot_without_memory_raises_an_error_with_a_remedy(monkeypatch):
    def refuse(tensor, pinned):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(snapshots, "_allocate", refuse)
    model = nn.Linear(512, 1024, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with pytest.raises(MemoryError, match=r"cpu .*2\.0 MiB.*'pinned' or a file"):
        fa.AALR(optimizer, model, initial_loss=1.0)
    assert optimizer.param_groups[0]["lr"] == 0.3


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_pinned_memory_needs_an_accelerator():
    model = Net()
    with pytest.raises(RuntimeError, match="use 'device'"):
        fa.AALR(torch.optim.SGD(model.parameters(), lr=0.1), model, initial_loss=1.0, snapshot="pinned")


@pytest.mark.gpu
@pytest.mark.parametrize("snapshot", ["device", "pinned"])
def test_snapshot_of_a_model_on_a_gpu(snapshot):
    model = Net().cuda()
    controller = fa.AALR(
        torch.optim.SGD(model.parameters(), lr=0.1), model, initial_loss=1.0, patience=1, snapshot=snapshot
    )
    before = values(model)
    held = controller.state_dict()["snapshot"]
    assert all(t.is_pinned() == (snapshot == "pinned") for t in held.values())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    controller.step(math.nan)
    assert same(values(model), before)


def controlled(file: Any) -> fa.AALR:
    model = nn.Linear(2, 2)
    return fa.AALR(fa.SGD(model.parameters(), lr=0.1), model, initial_loss=9.0, patience=1, snapshot=file)


def test_a_file_is_found_after_a_change_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    controller = controlled("best.pt")
    initial = values(controller.model)
    nn.init.zeros_(controller.model.weight)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir("below")
    controller.step(math.nan)
    assert same(values(controller.model), initial)


def test_a_copy_has_a_file_of_its_own(tmp_path):
    controller = controlled(tmp_path / "best.pt")
    nn.init.ones_(controller.model.weight)
    controller.step(1.0)
    best, copied = values(controller.model), copy.deepcopy(controller)
    nn.init.zeros_(copied.model.weight)
    copied.step(0.5)
    assert (controller.action, copied.action) == ("save", "save")
    controller.restore_best()
    assert same(values(controller.model), best)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "best.pt.copy1"]


def test_another_controllers_snapshot_is_not_put_back(tmp_path):
    file = tmp_path / "best.pt"
    first = controlled(file)
    second = controlled(file)
    before = values(first.model)
    for call in (lambda: first.step(math.nan), first.state_dict, lambda: copy.deepcopy(first)):
        with pytest.raises(RuntimeError, match=r"best\.pt is not the one that this controller saved.*path of its own"):
            call()
    assert same(values(first.model), before)
    assert (first.last_epoch, first.get_last_lr()) == (0, [0.1])
    initial = values(second.model)
    nn.init.zeros_(second.model.weight)  # pyright: ignore
    second.step(math.nan)
    assert same(values(second.model), initial), "whose file it is"


def test_a_file_that_is_no_snapshot_is_not_put_back(tmp_path):
    controller = controlled(tmp_path / "best.pt")
    for content in (controller.model.state_dict(), [torch.ones(2)]):
        torch.save(content, tmp_path / "best.pt")
        with pytest.raises(RuntimeError, match="something else writes to the file"):
            controller.step(math.nan)


def test_a_pickled_controller_finds_its_file(tmp_path):
    controller = controlled(tmp_path / "best.pt")
    initial = values(controller.model)
    again = pickle.loads(pickle.dumps(controller))
    nn.init.zeros_(again.model.weight)
    again.step(math.nan)
    assert same(values(again.model), initial)


WRITER = """
import io, sys, time, torch
from fused_adaptive.schedules.snapshots import FileSnapshot

def stop_halfway(tensors, file):
    buffer = io.BytesIO()
    save(tensors, buffer)
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()
    print(-1, flush=True)
    time.sleep(600)

save, snapshot = torch.save, FileSnapshot(sys.argv[1])
for i in range(10_000):
    if i == 3 and sys.argv[2] == "halfway":
        torch.save = stop_halfway
    snapshot.save({"a": torch.full((500_000,), float(i)), "b": torch.full((3,), float(i))})
    print(i, flush=True)
"""


@pytest.mark.parametrize("when", ["halfway", "anywhere"])
def test_snapshots_survive_kill_9_in_the_middle_of_a_write(when, tmp_path):
    file = tmp_path / "best.pt"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(file), when], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = [int(process.stdout.readline()) for _ in range(4)]
        time.sleep(0.013)
        process.send_signal(signal.SIGKILL)
        lines += [int(line) for line in process.stdout if line.endswith("\n")]
        last = max(lines)
    saved = torch.load(file, weights_only=True)["tensors"]
    number = saved["b"][0].item()
    assert number in ((2,) if when == "halfway" else (last, last + 1)), "the newest whole one"
    assert all((t == number).all() for t in saved.values())
