"""Every example runs as its first lines say, and learns what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
#: Several times what an example takes on two cores, for machines that do something else besides.
TIMEOUT = 240
pytestmark = pytest.mark.heavy

if not EXAMPLES.exists():
    pytest.skip("the examples are not here", allow_module_level=True)


def run(*command: str | Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def percentages(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+)%", line)]


def test_swap_in():
    pytest.importorskip("sklearn")
    theirs, ours, active = (percentages(line)[0] for line in run(sys.executable, EXAMPLES / "swap_in.py").splitlines())
    assert ours == theirs
    assert active > theirs + 2


def test_no_rate():
    pytest.importorskip("sklearn")
    _, plain, active = run(sys.executable, EXAMPLES / "no_rate.py").splitlines()
    assert len(percentages(plain)) == len(percentages(active)) == 5
    assert min(percentages(plain)) < 50
    assert min(percentages(active)) > 90


def test_bf16_split():
    pytest.importorskip("sklearn")
    full, rounded, split = (
        float(line.split()[-1]) for line in run(sys.executable, EXAMPLES / "bf16_split.py").splitlines()
    )
    assert rounded > full + 0.05
    assert abs(split - full) < 0.02


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gpt_goes_on_where_it_stopped(parallel, tmp_path):
    def torchrun(folder: str, steps: int) -> list[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        arguments = ["--parallel", parallel, "--steps", str(steps), "--checkpoint", tmp_path / folder]
        return run(*launcher, EXAMPLES / "gpt.py", *arguments).splitlines()

    whole = torchrun("whole", 40)
    assert torchrun("parts", 10) + torchrun("parts", 40) == whole  # from the middle of an interval, with the same bits
    first, last = (float(line.split()[3]) for line in whole)
    assert last < first - 0.3


@pytest.mark.parametrize("trainer", ["transformers", "lightning"])
def test_trainers(trainer):
    pytest.importorskip("sklearn")
    pytest.importorskip(trainer)
    if trainer == "transformers":
        pytest.importorskip("accelerate")
    last = run(sys.executable, EXAMPLES / f"trainer_{trainer}.py").splitlines()[-1]
    assert last.startswith("accuracy ")
    assert percentages(last)[0] > 90


def test_every_example_is_tested_and_listed():
    tested = Path(__file__).read_text(encoding="utf-8")
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert path.name in listed
        assert path.name in tested or f"trainer_{{trainer}}{path.suffix}" in tested
