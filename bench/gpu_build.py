"""Step build of bench/gpu.py: `python gpu_build.py SITE` installs protoken into the folder SITE, without a network.

First as users do, with pip. Where that fails (an old setuptools, say) cmake builds the native modules beside a copy of
the Python files; where nvcc fails, the rest is installed without the CUDA module. The Python files are there from the
first second: the steps of Triton can run even if the compilers are out of time. Exit status 0: with the CUDA module
(or without, where PROTOKEN_CUDA=0 asks for that); 1: something is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def with_pip(site: Path) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    return run([*command, "--upgrade", "--target", str(site), str(ROOT)])


def with_cmake(site: Path, cuda: str) -> bool:
    package = copy(site)
    try:
        import pybind11
    except ImportError as error:
        print(f"gpu_build: {error}", flush=True)
        return False
    with tempfile.TemporaryDirectory() as build:
        options = {
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "PROTOKEN_OUTPUT_DIR": str(package),
            "PROTOKEN_CUDA": cuda,
        }
        ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
        defined = [f"-D{name}={value}" for name, value in options.items()]
        configure = ["cmake", "-S", str(ROOT), "-B", build, *ninja, *defined]
        return run(configure) and run(["cmake", "--build", build, "--parallel", str(os.cpu_count() or 2)])


def copy(site: Path) -> Path:
    """The package's Python files as setuptools lays them out; native modules of other machines stay behind."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "protoken", site / "protoken", dirs_exist_ok=True, ignore=ignore)
    shutil.copytree(ROOT / "kernels", site / "protoken" / "kernels", dirs_exist_ok=True, ignore=ignore)
    return site / "protoken"


def run(command: list[str]) -> bool:
    print("+", *command, flush=True)
    try:
        return subprocess.run(command, check=False).returncode == 0
    except OSError as error:
        print(f"gpu_build: {error}", flush=True)
        return False


def main() -> int:
    site = Path(sys.argv[1])
    cuda = os.environ.get("PROTOKEN_CUDA", "1")
    copy(site)  # whatever becomes of the compilers, or of the time they have, Triton and torch can run
    if with_pip(site) or with_cmake(site, cuda):
        return 0
    if cuda != "0":
        with_cmake(site, "0")
    return 1


if __name__ == "__main__":
    sys.exit(main())
