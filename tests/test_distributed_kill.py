"""kill -9 in the middle of training loses nothing: the run that goes on ends with the weights of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("resuming_script.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def start(directory: Path, ranks: int) -> subprocess.Popen[str]:
    command = [sys.executable, *((*TORCHRUN, str(ranks)) if ranks > 1 else ()), str(SCRIPT), str(directory)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(ranks, tmp_path):
    moment = random.Random()  # another one each time
    enough, delay = moment.randrange(3, 25), moment.uniform(0, 0.05)
    with start(tmp_path, ranks) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.split() == ["step", str(enough)]:
                break
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with start(tmp_path, ranks) as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    lines = output.splitlines()
    started = int(next(line for line in lines if line.startswith("start")).split()[1])
    assert enough <= started < 40, f"went on from {started}, killed after {enough}"
    assert lines.count("the same") == ranks, output
