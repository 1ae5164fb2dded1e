"""Builds the native extensions through CMake; everything declarative stands in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeExtension(Extension):
    """An extension whose sources are known to CMakeLists.txt, not to setuptools."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configure once, build the target named after the extension, install next to the package.

    PROTOKEN_CUDA=0 leaves the CUDA module out; =1 makes a missing nvcc an error; unset builds it when nvcc is found.
    """

    def build_extension(self, ext: Extension) -> None:
        if not isinstance(ext, CMakeExtension):
            super().build_extension(ext)
            return
        import pybind11

        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        destination.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            find_tool("cmake"),
            "-S", str(ROOT),
            "-B", str(build),
            "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPROTOKEN_OUTPUT_DIR={destination}",
            f"-DPROTOKEN_CUDA={os.environ.get('PROTOKEN_CUDA', 'AUTO')}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run([find_tool("cmake"), "--build", str(build)], check=True)


def find_tool(name: str) -> str:
    """The build environment's own copy first (pip puts it beside the interpreter), then PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise SystemExit(f"{name} is needed to build protoken: pip install {name}")
    return found


setup(ext_modules=[CMakeExtension("protoken._C")], cmdclass={"build_ext": CMakeBuild})
