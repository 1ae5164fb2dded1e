"""The CUDA kernels compiled as C++ with one fiber per thread, for the tests of them; see csrc/cuda_emulation.h."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tolerances import EMULATED_CUDA, close_in_rms
from torch import Tensor

pybind11 = pytest.importorskip("pybind11", reason="pybind11 is needed to build the emulated kernels")
COMPILER = shutil.which("g++")
if COMPILER is None:
    pytest.skip("g++ is needed to build the emulated kernels", allow_module_level=True)

ROOT = Path(__file__).parents[1]
NAME = "_C_cuda_emulated"
SOURCES = ["cuda_bindings.cpp", "cuda_device.cpp", "client_scores.cu", "client_scores_lowrank.cu", "client_totals.cu"]
SOURCES += ["relevance_head.cu", "capture_append.cu"]
SOURCES += [f"client_scores_{name}.cu" for name in ("bf16", "e4m3", "f16", "f32", "half", "i8")]
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-DPROTOKEN_EMULATE",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-U_FORTIFY_SOURCE",
]


def build(folder: Path) -> Path:
    """Compile the kernels once per state of the sources; who comes meanwhile waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        target = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not target.exists():
            _compile(folder, target)
    return target


def _compile(folder: Path, target: Path) -> None:
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]

    def compile_one(source: str) -> str:
        made = str(folder / f"{source}.o")
        command = [str(COMPILER), *FLAGS, *includes, "-x", "c++", "-c", str(ROOT / "csrc" / source), "-o", made]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-4000:]
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    half_made = folder / f"{NAME}.part"
    subprocess.run([str(COMPILER), "-shared", "-o", str(half_made), *objects], check=True)
    half_made.rename(target)


def load(name: str, path: Path, loader: type | None = None) -> ModuleType:
    chosen = loader(name, str(path)) if loader else None
    spec = importlib.util.spec_from_file_location(name, path, loader=chosen)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulated_backend() -> Iterator[ModuleType]:
    """A copy of protoken.ops.cuda over the emulated module."""
    import protoken

    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").glob("*.c*")) + sorted((ROOT / "csrc").glob("cuda_*")):
        digest.update(path.read_bytes())
    digest.update(sys.version.encode())
    target = build(Path(tempfile.gettempdir()) / f"protoken-emulation-{digest.hexdigest()[:16]}")
    emulated = load(NAME, target, importlib.machinery.ExtensionFileLoader)
    before, had = sys.modules.get("protoken._C_cuda"), getattr(protoken, "_C_cuda", None)
    sys.modules["protoken._C_cuda"] = emulated
    protoken._C_cuda = emulated
    try:
        yield load("emulated_cuda_backend", ROOT / "protoken" / "ops" / "cuda.py")
    finally:
        if before is None:
            del sys.modules["protoken._C_cuda"]
        else:
            sys.modules["protoken._C_cuda"] = before
        if had is None:
            del protoken._C_cuda
        else:
            protoken._C_cuda = had


def assert_close(got: Tensor, reference: Tensor) -> None:
    close_in_rms(got, reference, EMULATED_CUDA)


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"))
