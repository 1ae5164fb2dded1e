"""The only place that picks a backend, and the contract that every backend serves.

Order of ``backend="auto"``: cuda, triton, cpp, torch. A backend asked for by name raises `BackendError` with its reason
when it cannot serve the call; an error inside a launch is raised and never turned into another backend.

Contract of a launcher
----------------------
A backend is a module with one function ``launch_<op>(out..., operands...)`` per op it has. Operands arrive validated
(`protoken.ops` raised every typed error already), all on one device, none of T, K, O, I is 0; the launcher fills every
element of the outputs, which arrive uninitialised, C-contiguous and fp32. It allocates through torch, launches on the
current stream, never synchronises, and keeps no state but compiled code and what it caches on a bank object
(`DenseBank.cache`, `LowRankBank.cache`: plain dicts for tables living as long as the bank).

    launch_client_scores(out, xs, grads, banks)
        out    fp32 [L, K, T]
        xs     list of L tensors [T, I_l], fp32 / bf16 / fp16, any strides (float64 was cast to fp32)
        grads  list of L tensors [T, O_l], likewise
        banks  list of L `DenseBank`: .tensor [K, O, I] any strides, or None when the clients' matrices lie apart;
               .pointers int64 [K] on the CPU and .device_pointers() int64 [K] on the bank's device (cached),
               one address per client; .stride_o, .stride_i strides in elements, shared by all clients of the
               bank; .dtype fp32 / bf16 / fp16 / int8 / float8_e4m3fn; .scale fp32 [K, O] contiguous, or None;
               .clients, .rows (O), .columns (I). T and K are shared by the layers, O and I may differ.
    launch_client_scores_lowrank(out, xs, grads, banks)
        out, xs, grads as above; banks list of L `LowRankBank`: .a [K, r, I] and .b [K, O, r] or None when the
        clients' factors lie apart or differ in rank; .table int64 [K, 7] on the CPU and .device_table()
        (cached): per client (address of A, stride of A's rank dimension, stride of A's I, address of B,
        stride of B's O, stride of B's rank dimension, rank), strides in elements; .max_rank; .dtype fp32 /
        bf16 / fp16; .scale fp32 [K]; .clients, .rows (O), .columns (I). Rank 0 is a client that scores 0.
    launch_client_totals(out, ms, banks)
        out fp32 [L, K]; ms list of L tensors [O_l, I_l], fp32 / bf16 / fp16, any strides; banks as
        client_scores.
    launch_relevance_head(grad, value, hidden, targets, head)
        grad fp32 [T, d], value fp32 [T]; hidden [T, d] fp32 / bf16 / fp16; targets int64 [T], on a GPU not
        checked: the row of one outside the vocabulary is NaN; head a `Head` (see
        protoken/ops/relevance_head.py: norm kind, weight, bias, eps, head weight [V, d], bias, scale, softcap,
        objective), its tensors of any float dtype and strides.
    launch_capture_append(buffers, steps, cursor)
        in place: buffers[j][(cursor + t) % C] = steps[j][t] cast to the buffer's dtype for t < T, then cursor
        += T; buffers [C, n_j] with stride 1 along n; steps [T, n_j] any strides; both fp32 / bf16 / fp16 /
        fp64, n_j may be 0; cursor int64 [1] on the same device. Of T > C rows only the last C are written.

A module may also have ``why_not_<op>(*operands) -> str | None``: the reason it cannot serve these operands,
or None. It must be cheap, since auto asks it on every call. And it may have ``serve_<op>(*operands) -> Tensor |
None`` for a call of one layer with a bank object on the CPU: the whole answer where the operands are plain (it
checks that), or None where they need the checks and the launcher.

Where backends live (each is imported at its first use, never earlier):

    cuda    protoken.ops.cuda, over the native module protoken._C_cuda
    triton  protoken.kernels.<op>
    cpp     protoken.ops.cpp, over the native module protoken._C
    torch   protoken.ops.<op>

With TRITON_INTERPRET=1 triton also serves CPU tensors, when asked for by name; auto never picks it there.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from protoken.errors import ArgumentError, BackendError
from protoken.versions import version_of

ORDER = ("cuda", "triton", "cpp", "torch")
_ON_THE_CPU = ("cpp", "torch")  # what auto looks at there: cuda serves no CPU tensor, and triton only interprets
OPS = ("client_scores", "client_scores_lowrank", "client_totals", "relevance_head", "capture_append")

_log = logging.getLogger("protoken")
_told: set[tuple[str, str, str]] = set()
_modules: dict[tuple[str, str], ModuleType | str] = {}
_served: dict[tuple[str, str], tuple[ModuleType, str, str | None]] = {}
_shortcuts: dict[str, Callable[..., torch.Tensor | None]] = {}


@dataclass(frozen=True)
class Backend:
    """One way to run an op: whether it can, and if not, why."""

    name: str
    available: bool
    reason: str
    launch: Callable[..., None] | None = None


def backends_for(op: str, device: torch.device | str = "cpu", *operands: Any) -> list[Backend]:
    """All backends of ``op`` on ``device`` in the order of auto, each with the reason why or why not.

    With ``operands`` (those of the launcher) each backend also says whether it takes these very operands.
    """
    _known(op)
    return [_probe(op, name, torch.device(device), operands) for name in ORDER]


def choose(op: str, backend: str, device: torch.device, *operands: Any) -> Backend:
    """The backend that serves this call.

    Errors: `ArgumentError` for a name that does not exist, `BackendError` with the reason when the one asked
    for by name cannot serve, or when none can.
    """
    _known(op)
    if backend != "auto":
        if backend not in ORDER:
            raise ArgumentError("backend", expected=f"auto or one of {', '.join(ORDER)}", got=repr(backend))
        found = _probe(op, backend, device, operands)
        if not found.available:
            raise BackendError(
                f"backend {backend!r} of {op}", got=found.reason, remedy='Use backend="auto" or another one.'
            )
        return found
    reasons = []
    for name in _ON_THE_CPU if device.type == "cpu" else ORDER:
        found = _probe(op, name, device, operands)
        if found.available:
            _tell(op, name, device)
            return found
        reasons.append(f"{name}: {found.reason}")
    raise BackendError(f"no backend of {op} on {device.type}", got="; ".join(reasons))


def launcher(op: str, backend: str, device: torch.device, *operands: Any) -> Callable[..., None]:
    """The function that serves this call: that of `choose`, whose errors it raises.

    Whom auto prefers on a kind of device does not change while the process lives; only what that one has against
    these very operands is asked again. A small call would otherwise spend more time here than in its kernel.
    """
    if backend == "auto" and (known := _served.get((op, device.type))) is not None:
        module, launch, why_not = known
        if why_not is None or not getattr(module, why_not)(*operands):
            return getattr(module, launch)  # type: ignore[no-any-return]
    chosen = choose(op, backend, device, *operands)
    if backend == "auto":
        _remember(op, device, chosen.name)
    assert chosen.launch is not None
    return chosen.launch


def shortcut(op: str) -> Callable[..., torch.Tensor | None] | None:
    """``serve_<op>`` of the backend that auto prefers on the CPU, once that has served there; None before."""
    return _shortcuts.get(op)


def native(name: str) -> Callable[..., None] | None:
    """A function of the cpp backend that is no op, or None where the native module is not."""
    module = _module("client_scores", "cpp")
    return None if isinstance(module, str) else getattr(module, name)


def _remember(op: str, device: torch.device, name: str) -> None:
    preferred = next(found.name for found in backends_for(op, device) if found.available)
    # On the CPU triton may be there by request alone, and what serves only because of the operands is not preferred.
    if name == preferred or (device.type == "cpu" and name == _ON_THE_CPU[0]):
        module = _module(op, name)
        assert not isinstance(module, str)
        why_not = f"why_not_{op}"
        _served[op, device.type] = module, f"launch_{op}", why_not if hasattr(module, why_not) else None
        if device.type == "cpu" and (serve := getattr(module, f"serve_{op}", None)) is not None:
            _shortcuts[op] = serve


def _known(op: str) -> None:
    if op not in OPS:
        raise ArgumentError("op", expected=f"one of {', '.join(OPS)}", got=repr(op))


def _tell(op: str, name: str, device: torch.device) -> None:
    if (op, name, device.type) not in _told:
        _told.add((op, name, device.type))
        _log.info("%s on %s: backend %s", op, device.type, name)


def _probe(op: str, name: str, device: torch.device, operands: tuple[Any, ...]) -> Backend:
    missing = _device_reason(name, device)
    if missing:
        return Backend(name, False, missing)
    module = _module(op, name)
    if isinstance(module, str):
        return Backend(name, False, module)
    launch = getattr(module, f"launch_{op}", None)
    if launch is None:
        return Backend(name, False, f"has no {op}")
    if operands:
        why_not = getattr(module, f"why_not_{op}", None)
        reason = why_not(*operands) if why_not is not None else None
        if reason:
            return Backend(name, False, reason)
    return Backend(name, True, f"serves {device.type}", launch)


def _device_reason(name: str, device: torch.device) -> str | None:
    """What keeps this backend from this kind of device, before anything is imported."""
    if name == "cpp" and device.type != "cpu":
        return f"serves cpu tensors, not {device.type}"
    if name == "cuda":
        return _too_old(device) if device.type == "cuda" else f"serves cuda tensors, not {device.type}"
    if name == "triton" and device.type != "cuda":
        if device.type != "cpu":
            return f"serves cuda tensors, not {device.type}"
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "serves cuda tensors; cpu tensors need TRITON_INTERPRET=1 before triton is imported"
    return None


def _too_old(device: torch.device) -> str | None:
    """The native module holds code for compute capability 8.0 and newer; older devices are triton's and torch's."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else "needs compute capability 8.0, {} has {}.{}".format(device, *capability)


def interpreter_fault() -> str | None:
    """Why the installed Triton cannot interpret: before 3.7 it makes integers of arrays, which numpy 2.4 refuses."""

    def installed(package: str) -> tuple[int, ...]:
        return tuple(int(part) for part in (version_of(package) or "0.0").split(".")[:2])

    if installed("triton") < (3, 7) and installed("numpy") >= (2, 4):
        return "triton's interpreter before 3.7 does not work with numpy 2.4 and later"
    return None


def _module(op: str, name: str) -> ModuleType | str:
    """The backend's module, or why there is none; asked once per process."""
    key = (op, name)
    if key not in _modules:
        _modules[key] = _find(op, name)
    return _modules[key]


def _find(op: str, name: str) -> ModuleType | str:
    needs, path = {
        "cuda": ("protoken._C_cuda", "protoken.ops.cuda"),
        "triton": ("triton", f"protoken.kernels.{op}"),
        "cpp": ("protoken._C", "protoken.ops.cpp"),
        "torch": ("torch", f"protoken.ops.{op}"),
    }[name]
    for wanted in (needs, path):
        if importlib.util.find_spec(wanted) is None:
            return f"{wanted} is not installed"
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1" and (fault := interpreter_fault()):
        return fault
    try:
        importlib.import_module(needs)
        return importlib.import_module(path)
    except (ImportError, OSError) as error:  # e.g. a driver library that is not there: say so, don't hide it
        return f"{path} cannot be imported: {error}"
