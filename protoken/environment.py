"""What `protoken env` prints: versions, native modules, and the backend of every op with its reason."""

from __future__ import annotations

import importlib
import os
import platform

import torch
from rich.console import Console
from rich.table import Table

from protoken.dispatch import OPS, backends_for, choose
from protoken.errors import BackendError
from protoken.versions import versions

NATIVE_MODULES = ("protoken._C", "protoken._C_cuda")


def show_environment(console: Console) -> None:
    """Print everything that decides how fast and by which code a trace is computed here."""
    console.print(_versions())
    console.print(_native())
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        console.print(_backends(device))


def native_status(name: str) -> str:
    """Where a native module was loaded from, or why it was not."""
    try:
        return str(importlib.import_module(name).__file__)
    except ImportError as error:
        return f"not available: {error}"


def _versions() -> Table:
    table = Table(title="Versions", title_justify="left", show_header=False)
    for name, version in versions().items():
        table.add_row(name, version)
    table.add_row("platform", f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} torch threads")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    table.add_row("CUDA device", gpu)
    table.add_row("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "not set"))
    return table


def _native() -> Table:
    table = Table(title="Native modules", title_justify="left", show_header=False)
    for name in NATIVE_MODULES:
        table.add_row(name, native_status(name))
    return table


def _backends(device: str) -> Table:
    table = Table("op", "auto picks", "others", title=f"Backends on {device}", title_justify="left")
    for op in OPS:
        try:
            picked = choose(op, "auto", torch.device(device)).name
        except BackendError as error:
            picked = str(error)
        others = [f"{b.name}: {b.reason or 'available'}" for b in backends_for(op, device) if b.name != picked]
        table.add_row(op, picked, "\n".join(others))
    return table
