"""A run that is killed with kill -9 and resumed ends with the weights of an uninterrupted run."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("resuming_script.py")


def start(directory: Path, ranks: int, attempt: int) -> list[subprocess.Popen[str]]:
    command = [sys.executable, str(SCRIPT), str(directory)]
    environment = os.environ | {"WORLD_SIZE": str(ranks), "RENDEZVOUS": f"file://{directory}/rendezvous{attempt}"}
    return [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]


@pytest.mark.feature("kill -9, and on from the last checkpoint, bit for bit")
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(ranks, tmp_path):
    moment = random.Random()  # unseeded, so that the time differs in each test
    enough, delay = moment.randrange(3, 25), moment.uniform(0, 0.05)
    processes = start(tmp_path, ranks, 1)
    assert processes[0].stdout is not None
    for line in processes[0].stdout:
        if line == f"step {enough}\n":
            break
    time.sleep(delay)
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
        assert process.returncode == -9, "it ended by itself"

    processes = start(tmp_path, ranks, 2)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    lines = outputs[0].splitlines()
    assert enough <= int(lines[0].removeprefix("start ")) < 40, f"{lines[0]}, killed after {enough}"
    assert lines[-1] == "the same", outputs
