"""Runs the tests under other versions of Python and torch, and writes the table of environments in ``docs/matrix.md``.

::

    python -m tests.environments                       # all of ENVIRONMENTS: gigabytes, a quarter of an hour each
    python -m tests.environments python3.12=2.11.0     # only this one; the other results are kept
    python -m tests.environments python3.13=newest -- tests/engine    # runs these tests, records nothing
    python -m tests.environments --table               # only writes the table, from the existing results

Each environment is made in ``build/environments`` from the files of the working tree, and deleted before the next. A
wheel built with the torch of the running environment must work in all of them, since the library uses only torch's
stable interface. Results are in ``docs/environments.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "environments"
RESULTS, DOCUMENT = ROOT / "docs" / "environments.json", ROOT / "docs" / "matrix.md"
BEGIN, END = "<!-- environments:begin -->", "<!-- environments:end -->"

#: Interpreter and torch: the oldest, some between, and the newest.
ENVIRONMENTS = ("python3.10=2.10.0", "python3.13=2.12.0", "python3.14=newest", "python3.15=newest")
CPU = {"FUSED_ADAPTIVE_BUILD": "cpu", "FUSED_ADAPTIVE_REQUIRE_EXT": "cpu"}

STEP = """
import torch, fused_adaptive as fa
p = torch.zeros(5, requires_grad=True)
p.grad = torch.arange(5.0)
fa.ActiveAdamW([p], lr=0.5, interval=1, backend="native").step()
assert p[0] == 0 and torch.allclose(p[1:], torch.tensor(-0.5)), p
"""
VERSIONS = """
import json, platform, torch
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__}))
"""


def copy_of_the_tree(to: Path) -> Path:
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def requirements(torch: str) -> list[str]:
    """Returns what an environment for the tests needs, without this package."""
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    pinned = "torch" if torch == "newest" else f"torch=={torch}"
    return [pinned, "numpy", "setuptools>=77", "wheel", "ninja", *extras["test"]]


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FUSED_ADAPTIVE") and k != "PYTHONPATH"}
    environment |= variables
    command = tuple(map(str, command))
    return subprocess.run(command, cwd=cwd, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def build_wheel() -> Path:
    """Builds a wheel with the torch of this environment."""
    tree = copy_of_the_tree(FOLDER / "tree")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", FOLDER, "."]
    run(*pip, cwd=tree, **CPU)
    shutil.rmtree(tree)
    (wheel,) = FOLDER.glob("*.whl")
    return wheel


def try_one(interpreter: str, torch: str, files: list[str], wheel: Path) -> dict[str, Any]:
    """Makes an environment, steps with the wheel, builds the library there, and runs the tests."""
    tree, site = copy_of_the_tree(FOLDER / "tree"), FOLDER / "site"
    python = FOLDER / "venv" / "bin" / "python"
    run(interpreter, "-m", "venv", FOLDER / "venv", cwd=FOLDER)
    run(python, "-m", "pip", "install", "-q", *requirements(torch), cwd=tree)
    result: dict[str, Any] = json.loads(run(python, "-c", VERSIONS, cwd=tree))
    result["date"] = datetime.date.today().isoformat()
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=tree)
    try:
        run(python, "-c", STEP, cwd=site)
        loads = True
    except subprocess.CalledProcessError:
        loads = False
    result["wheel"] = {"torch": version("torch"), "loads": loads}
    run(python, "setup.py", "build_ext", "--inplace", cwd=tree, **CPU)
    report = FOLDER / "report.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-q", "-n", "auto", "-m", "not heavy", f"--junitxml={report}", *files]
    subprocess.run([*map(str, command)], cwd=tree)
    return result | outcomes(report)


def outcomes(report: Path) -> dict[str, Any]:
    """Returns the numbers of passed, failed and skipped tests and the names of failures, from pytest's report."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    names = sorted({f"{c.get('classname', '')}::{c.get('name', '')}".replace("tests.", "", 1) for c in failed})
    passed = len(cases) - len(failed) - len(skipped)
    return {"passed": passed, "failed": len(failed), "skipped": len(skipped), "failures": names}


def table(results: list[dict[str, Any]]) -> str:
    """Returns the results as Markdown."""
    lines = [
        "| Python | torch | passed | failed | skipped | a wheel built with | date |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for r in results:
        wheel = f"torch {r['wheel']['torch']}: {'steps' if r['wheel']['loads'] else '**does not load**'}"
        failed = f"**{r['failed']}**" if r["failed"] else "0"
        numbers = [str(r["passed"]), failed, str(r["skipped"])]
        lines.append(f"| {r['python']} | {r['torch']} | {' | '.join(numbers)} | {wheel} | {r['date']} |")
    return "\n".join(lines)


def sort_key(result: dict[str, Any]) -> list[int]:
    return [int(number) for key in ("torch", "python") for number in re.findall(r"\d+", result[key])[:3]]


def write_table(results: list[dict[str, Any]]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    DOCUMENT.write_text(f"{head}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", metavar="PYTHON=TORCH", default=ENVIRONMENTS)
    parser.add_argument("--table", action="store_true")
    own, _, files = " ".join(sys.argv[1:]).partition(" -- ")
    arguments = parser.parse_args(own.split())
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    wheel = None if arguments.table else build_wheel()
    for environment in [] if wheel is None else arguments.environments:
        interpreter, _, torch = environment.rpartition("=")
        result = try_one(interpreter, torch, files.split(), wheel)
        for name in ("venv", "tree", "site"):
            shutil.rmtree(FOLDER / name, ignore_errors=True)
        print(json.dumps(result, indent=1))
        if files:
            continue
        results = [r for r in results if (r["python"], r["torch"]) != (result["python"], result["torch"])] + [result]
        results.sort(key=sort_key)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        write_table(results)
    if arguments.table:
        write_table(results)


if __name__ == "__main__":
    main()
