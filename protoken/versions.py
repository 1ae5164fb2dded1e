"""Versions that a trace depends on, for its record and for `protoken env`."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

import torch

PACKAGES = ("protoken", "torch", "transformers", "numpy", "safetensors", "triton", "peft")


@cache
def version_of(package: str) -> str | None:
    """Installed version of a package, or None; torch's own names its build, too ("2.13.0+cpu")."""
    try:
        return torch.__version__ if package == "torch" else metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Python and every installed package of `PACKAGES`, name to version."""
    found = {name: version_of(name) for name in PACKAGES}
    return {"python": platform.python_version(), **{n: v for n, v in found.items() if v is not None}}
