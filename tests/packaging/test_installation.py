"""Installation without a compiler, with old tools, on other systems and with other kinds of Python."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fused_adaptive as fa
from fused_adaptive import backends
from fused_adaptive.core import library as native_library
from fused_adaptive.core import python_calls

from ..regressions.test_builds import another_cuda
from .test_build import (
    ROOT,
    STEP,
    build,
    copy_tree,
    environment_with,
    needs_compiler,
    needs_pip,
    run,
    wheel_by_way_of_sdist,
)

# ---- missing kernels ----

CPU, CUDA, META = map(torch.device, ("cpu", "cuda", "meta"))


@pytest.fixture
def _without_kernels(monkeypatch):
    monkeypatch.setattr(
        native_library, "_reason", f"the native library was not built: no g++; then {native_library.REBUILD}"
    )
    monkeypatch.setattr(backends, "_TOLD", set())
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)


def an_optimizer(**options) -> fa.AdamW:
    return fa.AdamW([torch.zeros(3, requires_grad=True)], **options)


def test_sources_that_hide_the_installed_package_say_so(monkeypatch, tmp_path):
    installed = tmp_path / "site" / "fused_adaptive"
    installed.mkdir(parents=True)
    (installed / native_library.LIBRARY).touch()
    monkeypatch.setattr(native_library, "FOLDER", tmp_path / "clone" / "fused_adaptive")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "clone"), str(installed.parent)])
    why = native_library._try_to_load()
    assert f"the sources in {tmp_path / 'clone'}, which hide the installed package in {installed}: run" in why
    (installed / native_library.LIBRARY).unlink()
    assert "no build has run" in native_library._try_to_load()


@pytest.mark.usefixtures("_without_kernels")
def test_missing_kernels_are_reported_once_with_a_reason_and_a_command():
    with pytest.warns(UserWarning, match="kernels for cpu are missing") as told:
        optimizer = an_optimizer()
    assert len(told) == 1
    assert told[0].filename == __file__
    for part in ("no g++", "pip install --no-build-isolation", "takes 'reference'", "pass backend='reference'"):
        assert part in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})
        an_optimizer()


@pytest.mark.usefixtures("_without_kernels")
def test_nothing_is_reported_if_the_reference_is_selected(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        an_optimizer(backend="reference")
        backends.select("auto", [META])  # no backend has kernels for this device
        monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
        an_optimizer()


@pytest.mark.usefixtures("_without_kernels")
def test_every_backend_gives_a_reason_for_a_gpu(monkeypatch):
    triton = backends._load("triton")
    monkeypatch.setattr(triton, "why_not", lambda devices: "no triton")
    with pytest.warns(UserWarning, match="kernels for cuda are missing.*no g.*backend 'triton' cannot run: no triton"):
        assert backends.select("auto", [CUDA]).name == "reference"
    monkeypatch.setattr(triton, "why_not", lambda devices: "")
    backends._TOLD.clear()
    assert backends.select("auto", [CUDA]).name == "triton"  # triton has kernels for GPUs


@pytest.mark.heavy
@needs_pip
def test_a_cached_wheel_without_kernels_is_not_used_if_kernels_are_required(tmp_path):
    """pip caches wheels that it builds from archives, and does not run setup.py or read the environment again."""
    tree = copy_tree(tmp_path / "tree")
    run(sys.executable, "setup.py", "sdist", "-d", "dist", cwd=tree)
    named = ["--ignore-installed", "--no-build-isolation", "--find-links", tree / "dist", "fused_adaptive"]
    variables = {"CXX": "/nonexistent", "PIP_CACHE_DIR": str(tmp_path / "cache")}
    python = environment_with(*named, folder=tmp_path / "environment", **variables)
    report = run(python, "-m", "fused_adaptive", cwd=tmp_path)
    assert "not loaded: the native library was not built: no C++ compiler was found (/nonexistent)" in report
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    required = {"FUSED_ADAPTIVE_REQUIRE_EXT": "cpu"}
    assert "forbids to leave this out" in run(*pip, *named, cwd=tmp_path, ok=False, **variables, **required)
    # A build that is asked for no kernels gives an ordinary wheel.
    run(*pip, *named, cwd=tmp_path, FUSED_ADAPTIVE_BUILD="none", **variables)
    assert [w.name.partition("-")[2] for w in (tmp_path / "cache").rglob("*-any.whl")] == [
        f"{fa.__version__}-py3-none-any.whl"
    ]


# ---- old tools, other systems ----


@pytest.mark.parametrize("module", ["__version__ = '65.5.0'\nExtension = setup = None\n", "raise ImportError\n"])
def test_old_or_missing_setuptools_give_a_message(module, tmp_path):
    (tmp_path / "setuptools" / "command").mkdir(parents=True)
    (tmp_path / "setuptools" / "__init__.py").write_text(module)
    (tmp_path / "setuptools" / "command" / "__init__.py").touch()
    (tmp_path / "setuptools" / "command" / "build_ext.py").write_text("build_ext = object\n")
    output = run(sys.executable, "setup.py", "--version", cwd=ROOT, ok=False, PYTHONPATH=str(tmp_path))
    assert output.startswith("building fused_adaptive needs setuptools 77 or later: pip install 'setuptools>=77'")
    assert "Traceback" not in output


FIND = """
import runpy, sys
sys.argv = ["setup.py", "--version"]
names = runpy.run_path("setup.py")
sys.platform = "{}"
try:
    names["find_compiler_and_torch"]()
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("system", "remedy"), [("win32", "install under WSL"), ("darwin", "xcode-select"), ("linux", "install g++")]
)
def test_the_remedy_depends_on_the_system(system, remedy):
    output = run(sys.executable, "-c", FIND.format(system), cwd=ROOT, CXX="/nonexistent")
    told = output.splitlines()[-1]
    assert told.startswith("Missing ")
    assert remedy in told
    assert ("g++" in told) == (system == "linux")


@pytest.mark.heavy
@needs_compiler
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_kernels_that_torch_cannot_use_are_compiled_on_request_only(tmp_path):
    """They take minutes."""
    tree = copy_tree(tmp_path)
    for variables in ({}, {"CUDA_HOME": "/usr/local/cuda"}):
        built, _ = build(tree, FUSED_ADAPTIVE_BUILD="", **variables)
        assert (built["cpu"], built["cuda"]) == (True, None)
        assert built["left_out"]["cuda"].startswith("this torch has no CUDA; FUSED_ADAPTIVE_BUILD=auto compiles")
    built, _ = build(tree, FUSED_ADAPTIVE_BUILD="", TORCH_CUDA_ARCH_LIST="9.0", CUDA_HOME=str(tmp_path / "none"))
    assert built["left_out"]["cuda"].startswith("no nvcc")


@pytest.mark.heavy
@needs_compiler
def test_architectures_are_printed_before_nvcc_compiles(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    (tree / "csrc" / "cuda" / "kernel.cu").write_text("void launch(float*) {}\n")
    (tree / "csrc" / "cuda" / "launch.cpp").unlink()
    _, output = build(tree, CUDA_HOME=str(another_cuda(tmp_path / "cuda")))
    told = output.index("fused_adaptive: compiling 3 files, with nvcc kernel.cu for 9.0+PTX, which takes minutes")
    assert told < output.index("-c ")


# ---- free-threaded Python ----

FREE_THREADED = """
import re, sys, sysconfig
variables = sysconfig.get_config_vars()
variables["Py_GIL_DISABLED"] = 1
if sys.version_info >= (3, 13):  # whose free-threaded builds have an ABI tag of their own
    variables["SOABI"] = re.sub(r"^cpython-\\d+", r"\\g<0>t", variables["SOABI"])
"""
LOAD = """
import torch
from fused_adaptive.core import library, python_calls
library.load()
print(torch.ops.fused_adaptive.number(), python_calls.same_objects(), python_calls.gradients_reader())
"""


@pytest.mark.heavy
@needs_compiler
def test_a_library_for_free_threaded_python_is_for_one_version(tmp_path):
    """There is no stable ABI for it: setuptools refuses to build a library that claims one."""
    tree = copy_tree(tmp_path)
    (tree / "setup.py").write_text(FREE_THREADED + (tree / "setup.py").read_text())
    asked = {"FUSED_ADAPTIVE_BUILD": "cpu", "FUSED_ADAPTIVE_REQUIRE_EXT": "cpu"}
    run(sys.executable, "setup.py", "bdist_wheel", cwd=tree, **asked)
    (wheel,) = (tree / "dist").glob("*.whl")
    assert re.search(r"-cp3\d+-cp3\d+t?-\w+\.whl$", wheel.name)
    with_it = tmp_path / "installed"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, with_it], check=True)
    assert run(sys.executable, "-c", FREE_THREADED + LOAD, cwd=with_it) == "3 None None\n"


PYTHON_3_15 = """
import sysconfig
sysconfig.get_config_vars()["SOABI_PLATFORM"] = "x86_64-linux-gnu"
"""


@needs_compiler
def test_the_library_has_one_name_for_all_versions_of_python(tmp_path):
    tree = copy_tree(tmp_path)
    (tree / "setup.py").write_text(PYTHON_3_15 + (tree / "setup.py").read_text())
    build(tree, FUSED_ADAPTIVE_BUILD="cpu")
    assert [path.name for path in tree.glob("fused_adaptive/*.so")] == [native_library.LIBRARY]


def test_python_objects_are_not_read_without_the_gil(monkeypatch):
    functions = (python_calls.same_objects, python_calls.same_items, python_calls.gradients_reader)
    monkeypatch.setattr(native_library, "FREE_THREADED", True)
    for function in functions:
        function.cache_clear()
    try:
        assert [function() for function in functions] == [None] * 3
        p = torch.zeros(3, requires_grad=True)
        p.grad = torch.ones(3)
        optimizer = fa.AdamW([p], lr=0.5)
        for _ in range(2):
            optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((3,), -1.0), rtol=0.02, atol=0)
    finally:
        for function in functions:
            function.cache_clear()


# ---- dependencies of the tests ----

#: Packages whose modules have other names, dependencies of torch, and packages that only some tests need.
PROVIDES = {"_pytest": "pytest", "xdist": "pytest-xdist"}
BROUGHT = {"torch", "numpy", "setuptools", "fused_adaptive", "bench", "tests"}


def test_the_extra_for_tests_has_all_packages_that_they_import():
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {re.split(r"[^\w-]", requirement)[0] for requirement in extras["test"]}
    trees = {path: ast.parse(path.read_text()) for path in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("bench/**/*.py")]}
    imported = {name for tree in trees.values() for node in tree.body for name in modules(node)}
    needed = {PROVIDES.get(name, name) for name in imported} - set(sys.stdlib_module_names) - BROUGHT
    assert needed - set(PROVIDES.values()) <= named | {"pytest"}
    assert {"rich", "matplotlib"} <= named


def modules(node: ast.stmt) -> list[str]:
    """Returns the top-level names of the modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    return (
        [node.module.partition(".")[0]] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
    )


@pytest.mark.heavy
@needs_compiler
@needs_pip
def test_the_real_kernels_step_from_an_installed_package(tmp_path):
    tree = copy_tree(tmp_path / "tree", None)
    code = STEP.format(backend="native" if "native" in fa.backends.NAMES else "auto")
    asked = {"FUSED_ADAPTIVE_BUILD": "cpu", "FUSED_ADAPTIVE_REQUIRE_EXT": "1"}
    wheel, _ = wheel_by_way_of_sdist(tree, **asked)
    python = environment_with(wheel, folder=tmp_path / "environment")
    where, backend = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(tmp_path / "environment")
    assert backend == "native" or "native" not in fa.backends.NAMES
