"""Build of the one native library, ``fused_adaptive/_C.abi3.so``; everything else stands in pyproject.toml.

CPU kernels are built where a C++ compiler is, CUDA kernels where nvcc is. What cannot be built is left out: the build's
last lines, ``_build.json`` and ``python -m fused_adaptive`` say what and why. Besides CXX, CUDA_HOME and the like:

FUSED_ADAPTIVE_BUILD        auto (default), cpu or none: what to try
FUSED_ADAPTIVE_REQUIRE_EXT  1: it is an error if any of that cannot be built; cpu: only if the CPU kernels cannot.
                            pip asks nobody where it has built the same archive before: give it --no-cache-dir
"""

import atexit
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

WANTED = "building fused_adaptive needs setuptools 77 or later: pip install 'setuptools>=77', then try again"
try:
    import setuptools
    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext
except ImportError:
    sys.exit(WANTED)
if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(f"{WANTED}; this is {setuptools.__version__}")

NAME = "fused_adaptive._C"
ARCHITECTURES = ("8.0", "9.0", "10.0")  # those that nvcc knows, the last as PTX too
# No -march: the sources dispatch at run time. No contraction, no fast math: the reference's results, bit for bit.
CXX = "-std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden -Wall"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"  # torch 2.10, the floor in pyproject.toml
NVCC = "-std=c++17 -O3 --fmad=false -lineinfo -Xcompiler -ffp-contract=off,-fvisibility=hidden,-Wall "
NVCC += "-Xfatbin -compress-all"  # a tenth of the size, and every driver can read it
# Free-threaded Python has no stable ABI: there the library is for one version of it.
STABLE_PYTHON = not sysconfig.get_config_var("Py_GIL_DISABLED")
LIBRARY = f"_C{'.abi3.so' if STABLE_PYTHON else sysconfig.get_config_var('EXT_SUFFIX')}"
LINK = "-Wl,--as-needed -Wl,--exclude-libs,ALL -Wl,-z,defs" if sys.platform == "linux" else ""


class Missing(Exception):
    """Why something cannot be built."""


def choice(variable: str, *values: str) -> str:
    value = os.environ.get(variable) or values[0]
    if value not in values:
        sys.exit(f"{variable}={value}: choose one of {', '.join(filter(None, values))}")
    return value


def sources(*patterns: str) -> list[str]:
    return sorted(path.as_posix() for pattern in patterns for path in Path("csrc").glob(pattern))


def find_compiler_and_torch():
    if sys.platform == "win32":
        raise Missing("the kernels are written for GCC and Clang, and Windows builds with cl; install under WSL")
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((c for c in candidates if shutil.which(c.split()[0])), None)
    if compiler is None:
        remedy = "run xcode-select --install" if sys.platform == "darwin" else "install g++"
        raise Missing(f"no C++ compiler was found ({', '.join(candidates)}); {remedy} or set CXX")
    try:
        import torch
        from torch.utils import cpp_extension
    except Exception as error:
        raise Missing(f"torch is not there to build with ({error}); use pip install --no-build-isolation") from error
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 10):
        raise Missing(f"torch {torch.__version__} is older than 2.10")
    os.environ["CXX"] = compiler  # else torch and setuptools might take different ones
    os.environ["PATH"] = f"{os.environ['PATH']}{os.pathsep}{Path(sys.executable).parent}"  # this environment's ninja
    return cpp_extension


def find_cuda() -> tuple[Path, Path, str]:
    """CUDA's folder, that of its static run-time library, and the architectures to build for."""
    import torch

    asked = os.environ.get("FUSED_ADAPTIVE_BUILD") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if torch.version.cuda is None and not asked:  # compiling takes minutes
        raise Missing("this torch has no CUDA; FUSED_ADAPTIVE_BUILD=auto compiles kernels for GPUs all the same")
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc").resolve()
    homes = [Path(given)] if given else list(dict.fromkeys([nvcc.parents[1], Path("/usr/local/cuda")]))
    places = [f"{folder}/libcudart_static.a" for folder in ("lib*", "lib/*", "targets/*/lib")]
    found = [(h, lib) for h in homes if (h / "bin" / "nvcc").exists() for p in places for lib in h.glob(p)]
    if not found:
        raise Missing(f"no nvcc with a libcudart_static.a was found in {' or '.join(map(str, homes))}; set CUDA_HOME")
    home, library = found[0]
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        known = subprocess.run([home / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
        chosen = [a for a in ARCHITECTURES if re.search(rf"compute_{a.replace('.', '')}\b", known)]
        if not chosen:
            raise Missing(f"{home}/bin/nvcc knows none of {', '.join(ARCHITECTURES)}; set TORCH_CUDA_ARCH_LIST")
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(chosen) + "+PTX"
    return home, library.parent, os.environ["TORCH_CUDA_ARCH_LIST"]


class Build(build_ext):
    """Tries CUDA and CPU kernels, then the CPU kernels alone, then does without, and writes down what came of it."""

    def run(self) -> None:
        asked = choice("FUSED_ADAPTIVE_BUILD", "", "auto", "cpu", "none")
        required = choice("FUSED_ADAPTIVE_REQUIRE_EXT", "0", "1", "cpu")
        cuda, left_out, errors = None, {}, ""
        for part in ("cuda", "cpu"):
            if asked not in ("", "auto", part):
                left_out[part] = f"FUSED_ADAPTIVE_BUILD={asked} did not ask for it"
                continue
            try:
                cuda = self.build_with(part)
                break
            except Exception as error:
                failed = f"it failed to compile; the build's output (pip install -v) has the errors ({error})"
                left_out[part] = str(error) if isinstance(error, Missing) else failed
                errors += f"\n{part}: {left_out[part]}" if required in ("1", part) else ""
        self.write_down("cpu" not in left_out, cuda, left_out)
        if "cpu" in left_out and asked != "none":
            self.keep_out_of_pips_cache()
        if errors:
            sys.exit(f"FUSED_ADAPTIVE_REQUIRE_EXT={required} forbids to leave this out:{errors}")

    def build_with(self, part: str) -> str | None:
        """Builds everything ("cuda") or the CPU kernels only ("cpu"); returns CUDA's architectures."""
        cpp_extension = find_compiler_and_torch()
        if not sources(f"{part}/*.c*"):
            raise Missing(f"there are no sources in csrc/{part}")
        files, libraries, architectures = sources("bindings/*.cpp", "plan/*.cpp", "cpu/*.cpp"), ["torch_cpu"], None
        flags = [*CXX.split(), STABLE_ABI, f'-DFUSED_ADAPTIVE_VERSION="{self.distribution.get_version()}"']
        include, folders = [str(Path("csrc").absolute()), *cpp_extension.include_paths()], cpp_extension.library_paths()
        if part == "cuda":
            home, folder, architectures = find_cuda()
            # Whichever CUDA torch has, or none: the .cu files know no torch, and CUDA is linked statically.
            cpp_extension.CUDA_HOME, cpp_extension._check_cuda_version = str(home), lambda *_: None
            files, flags = [*files, *sources("cuda/*.cu", "cuda/*.cpp")], [*flags, "-DFUSED_ADAPTIVE_WITH_CUDA"]
            include += [str(path) for path in (home / "include", *home.glob("targets/*/include")) if path.exists()]
            folders, libraries = [str(folder), *folders], [*libraries, "cudart_static", "dl", "rt", "pthread"]
        extension = Extension(NAME, files, include, library_dirs=folders, libraries=libraries, language="c++")
        extension.extra_link_args, extension.extra_compile_args = LINK.split(), {"cxx": flags, "nvcc": NVCC.split()}
        extension.depends, extension.py_limited_api = sources("**/*.h", "**/*.cuh", "**/*.inl"), STABLE_PYTHON
        by_nvcc = [Path(file).name for file in files if file.endswith(".cu")]
        slow = f", with nvcc {' '.join(by_nvcc)} for {architectures}, which takes minutes" if by_nvcc else ""
        print(f"fused_adaptive: compiling {len(files)} files{slow}", flush=True)
        self.distribution.ext_modules = [extension]
        command = cpp_extension.BuildExtension(self.distribution)
        command.get_ext_filename = self.get_ext_filename
        for option in ("build_lib", "build_temp", "inplace", "editable_mode"):
            setattr(command, option, getattr(self, option))
        command.ensure_finalized()
        # With a torch that is for the CPU only, torch's build does not notice that a header of a .cu file has changed.
        newest = max((Path(header).stat().st_mtime for header in extension.depends), default=0.0)
        for compiled in Path(command.build_temp).glob("csrc/cuda/*.o"):
            if compiled.stat().st_mtime < newest:
                compiled.unlink()
        command.run()
        return architectures

    def get_ext_filename(self, fullname: str) -> str:
        """Returns one name for all versions of Python. For 3.15 setuptools would put the platform into it."""
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def write_down(self, cpu: bool, cuda: str | None, left_out: dict[str, str]) -> None:
        folder = Path("" if self.inplace else self.build_lib, "fused_adaptive")
        version, torch = self.distribution.get_version(), getattr(sys.modules.get("torch"), "__version__", None)
        record = {"cpu": cpu, "cuda": cuda, "left_out": left_out, "version": version, "torch": torch}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build.json").write_text(json.dumps(record | {"platform": sysconfig.get_platform()}, indent=2))
        if not cpu:  # a pure Python package, and no library of an earlier build in it
            (folder / LIBRARY).unlink(missing_ok=True)
            self.extensions = self.distribution.ext_modules = []
            self.get_finalized_command("bdist_wheel").root_is_pure = True
        lines = [f"CPU kernels{f', CUDA kernels for {cuda}' if cuda else ''}" if cpu else "pure Python, no kernels"]
        lines += [f"left out {part}: {why}" for part, why in left_out.items()]
        atexit.register(print, *(f"fused_adaptive: {line}" for line in lines), sep="\n", flush=True)  # the last word

    def keep_out_of_pips_cache(self) -> None:
        """pip keeps wheels that it builds, and would serve one without kernels to those who ask for them later on. It
        installs what it has just built whatever the tag, and serves none whose tag no machine supports.
        """
        if "PIP_BUILD_TRACKER" in os.environ and not self.editable_mode:
            wheel = self.get_finalized_command("bdist_wheel")
            wheel.plat_name, wheel.plat_name_supplied = "without_kernels", True


setup(
    ext_modules=[Extension(NAME, [], py_limited_api=STABLE_PYTHON)],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_PYTHON else {},
)
