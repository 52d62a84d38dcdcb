"""What is published: sdist and wheel, their metadata, and the files that a repository has for its visitors."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fused_adaptive as fa

from .test_build import ROOT, copy_tree, environment_with, needs_compiler, needs_pip, run

MAKEFILE = ROOT / "Makefile"
if not MAKEFILE.exists():
    pytest.skip("the sources are not here", allow_module_level=True)


@pytest.mark.heavy
@needs_compiler
@needs_pip
def test_make_wheel(tmp_path):
    """An sdist, and a wheel for manylinux that has the library and none of torch's, and loads where torch is."""
    for package in ("auditwheel", "build", "twine"):
        pytest.importorskip(package)
    tree = copy_tree(tmp_path / "tree")
    (tree / "Makefile").write_text(MAKEFILE.read_text())
    make = ["make", "wheel", f"PYTHON={sys.executable}", "VENV=", "FUSED_ADAPTIVE_BUILD=cpu"]
    output = run(*make, cwd=tree)
    assert output.count("PASSED") == 2
    wheel, sdist = sorted((tree / "dist").iterdir(), key=lambda path: path.suffix, reverse=True)
    assert re.fullmatch(rf"fused_adaptive-{fa.__version__}-cp310-abi3-manylinux_\d+_\d+_\w+\.whl", wheel.name)
    assert sdist.name == f"fused_adaptive-{fa.__version__}.tar.gz"
    names = zipfile.ZipFile(wheel).namelist()
    assert [Path(name).name for name in names if ".so" in name] == ["_C.abi3.so"]
    assert "fused_adaptive/playground/page.py" in names
    python = environment_with(wheel, folder=tmp_path / "environment")
    assert "native library  loaded\n" in run(python, "-m", "fused_adaptive", cwd=tmp_path)


def test_make_and_the_release_repair_wheels_alike():
    tomllib = pytest.importorskip("tomllib")
    release = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]["repair-wheel-command"]
    excluded = re.compile(r"--exclude '([^']+)'")
    assert excluded.findall(MAKEFILE.read_text()) == excluded.findall(release) == ["libtorch*", "libc10*"]


def test_every_folder_of_the_package_is_in_the_wheel():
    tomllib = pytest.importorskip("tomllib")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (ROOT / "fused_adaptive").rglob("*.py")}
    assert set(listed) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_the_extras_have_pinned_versions():
    """Development and CI install what a file says, and no surprise of the day."""
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for extra in ("browser", "packaging", "playground"):
        for requirement in extras[extra]:
            assert re.split(r"[^\w-]", requirement)[0] in pinned


def test_the_citation_is_of_this_version():
    assert f"\nversion: {fa.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.skipif(not shutil.which("actionlint"), reason="no actionlint")
def test_workflows_pass_actionlint():
    workflows = (ROOT / ".github" / "workflows").glob("*.yml")
    subprocess.run(["actionlint", *map(str, workflows)], cwd=ROOT, check=True)


def test_workflows_ask_for_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE.read_text(), re.MULTILINE))
    workflows = "".join(path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml"))
    used = set(re.findall(r"run: make ([a-z-]+)", workflows))
    assert {"lint", "test", "test-all", "wheel"} <= used <= targets
