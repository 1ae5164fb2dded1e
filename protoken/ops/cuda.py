"""The cuda backend: hands addresses, strides and dtype codes to the native module, which knows nothing of torch.

A layer (or, for low rank, a layer's clients of one rank and layout) travels as one row of int64; csrc/cuda_ops.h
lists the columns. The native side launches on torch's current stream and returns at once, so calls can be
captured into a CUDA graph after one warm-up call; scratch memory comes from torch's allocator.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import protoken._C_cuda as native
from protoken.errors import ArgumentError
from protoken.ops.banks import CODES, DenseBank, LowRankBank, read_here
from protoken.ops.checks import narrow
from protoken.ops.relevance_head import NORMS, Head

FLOAT64 = 6  # capture_append alone
HALF = 5  # fp16 bank and fp16 tokens: multiplied as they are; any other fp16 bank is split into two bf16 planes
ALONG_INNER, ALONG_RANK, ANYWHERE = 0, 1, 2  # LoadMode of csrc/client_scores_lowrank.cu
MAX_RANK = 128
AUTO, MMA, WGMMA = 0, 1, 2  # path of client_scores: WGMMA is what AUTO takes on compute capability 9.0
WHOLE, SPLIT = 1, 2  # path of client_scores_lowrank; AUTO decides by the amount of work
ONCE, TWICE = 1, 2  # path of relevance_head: how often the head is read; AUTO: once for up to 4 tokens
AT_ONCE = 20  # layers of client_scores in a launch: the device begins while Python still gathers the others
COLUMNS = {"client_scores": 17, "client_scores_lowrank": 26, "client_totals": 13}  # of a row, csrc/cuda_ops.h
NORM_CODES = {"none": 0, "rms": 1, "layer": 2}  # HeadNorm of csrc/relevance_head.cuh
assert set(NORM_CODES) == set(NORMS)


def driver_problem(driver: int, runtime: int) -> str | None:
    """Why kernels built with this CUDA do not run on this driver; both as CUDA numbers versions, 0: no driver."""
    if not driver or driver // 1000 >= runtime // 1000:
        return None
    known, built = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, runtime))
    return f"built with CUDA {built}, the driver serves up to {known}"


if problem := driver_problem(*native.versions()):
    raise ImportError(problem)  # which is the reason that `protoken.dispatch` gives


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class _Tables(dict[Any, "array[int]"]):
    """Rows of int64 by what their launches have in common."""

    def __missing__(self, key: Any) -> array[int]:
        self[key] = array("q")
        return self[key]


def _workspace(size: int, device: torch.device) -> Tensor:
    return torch.empty(max(size, 1), dtype=torch.uint8, device=device)


def _matrix(value: Tensor) -> list[int]:
    return [value.data_ptr(), *value.stride(), CODES[value.dtype]]


def _aligned(bank: DenseBank, name: str, addresses: Callable[[], Tensor]) -> bool:
    """Whether all of the bank's addresses are multiples of 16; looked at once per bank."""
    if name not in bank.cache:
        bank.cache[name] = not bool((addresses() % 16).any())
    return bool(bank.cache[name])


def _vectors(bank: DenseBank, transposed: bool) -> bool:
    """Whether every row (column, when ``transposed``) can be read 16 bytes at a time."""
    outer, inner = (bank.stride_i, bank.stride_o) if transposed else (bank.stride_o, bank.stride_i)
    length, count = (bank.rows, bank.columns) if transposed else (bank.columns, bank.rows)
    size = bank.dtype.itemsize
    return (
        inner == 1
        and length * size % 16 == 0
        and (count == 1 or outer * size % 16 == 0)
        and _aligned(bank, "aligned16", lambda: bank.pointers)
    )


def _clients(bank: DenseBank) -> list[int]:
    """Base address, bytes between clients, address of the table of addresses (0: not needed)."""
    if bank.tensor is not None:
        return [bank.tensor.data_ptr(), bank.tensor.stride(0) * bank.dtype.itemsize, 0]
    return [0, 0, bank.device_pointers().data_ptr()]


def _layout(bank: DenseBank) -> tuple[bool, bool]:
    """(transposed, vectors): which dimension of the bank is read along, and whether 16 bytes at a time."""
    if _vectors(bank, False):
        return False, True
    if bank.scale is None and bank.stride_o == 1 and bank.stride_i != 1:
        return True, _vectors(bank, True)
    return False, False


def _stored(bank: DenseBank) -> tuple[bool, bool, list[int]]:
    """`_layout`, and the columns of a layer's row that say where the bank lies; found once per bank.

    A small model has many layers, and what Python does per layer is what its calls cost.
    """
    found = bank.cache.get("cuda_layer")
    if found is None:
        transposed, vectors = _layout(bank)
        order = -1 if transposed else 1
        shape, strides = [bank.rows, bank.columns][::order], [bank.stride_o, bank.stride_i][::order]
        scale = 0 if bank.scale is None else bank.scale.data_ptr()
        found = transposed, vectors, [*shape, *_clients(bank), *strides, scale]
        bank.cache["cuda_layer"] = found
    elif bank.tensor is None:
        bank.device_pointers()  # whose address the row holds
    return found


def launch_client_scores(
    out: Tensor, xs: list[Tensor], grads: list[Tensor], banks: list[DenseBank], *, path: int = AUTO
) -> None:
    """s[k, t] = <grad[t], delta_k x[t]>; one launch per format and AT_ONCE layers."""
    clients, tokens = out.shape[1:]
    results, bytes_each = out.data_ptr(), 4 * clients * tokens
    tables = _Tables()

    def launch(key: tuple[int, int, bool], table: array[int]) -> None:
        code, planes, vectors = key
        _run("client_scores", table, out.device, clients, tokens, code, planes, vectors, path)

    for layer, bank in enumerate(banks):
        transposed, vectors, stored = _stored(bank)
        x, grad = (grads[layer], xs[layer]) if transposed else (xs[layer], grads[layer])
        first, second = _matrix(x), _matrix(grad)
        code, across = CODES[bank.dtype], first[-1]
        half = code == across == CODES[torch.float16]
        key = (HALF if half else code, 1 if half or across == CODES[torch.bfloat16] else 3, vectors)
        table = tables[key]
        table.extend((*first, *second, *stored, results + layer * bytes_each))
        if len(table) == AT_ONCE * COLUMNS["client_scores"]:
            launch(key, tables.pop(key))
    for key, table in tables.items():
        launch(key, table)


def launch_client_scores_lowrank(
    out: Tensor, xs: list[Tensor], grads: list[Tensor], banks: list[LowRankBank], *, path: int = AUTO
) -> None:
    """s[k, t] = scale[k] <B_k^T grad[t], A_k x[t]>; one launch per format, for up to 48 jobs each."""
    tables = _Tables()
    for layer, bank in enumerate(banks):
        x, grad = xs[layer], grads[layer]
        half = bank.dtype == x.dtype == grad.dtype == torch.float16
        exact = half or x.dtype == grad.dtype == torch.bfloat16
        key = (HALF if half else CODES[bank.dtype], 1 if exact else 3)
        if "cuda_jobs" not in bank.cache:
            bank.cache["cuda_jobs"] = _jobs(bank)
        jobs, complete = bank.cache["cuda_jobs"]
        if not complete:
            out[layer].zero_()  # rank 0 scores 0
        if bank.a is None:
            bank.device_table()  # whose address the jobs hold
        for job, modes, kept in jobs:
            if kept is not None:
                read_here(kept)
            row = [*_matrix(x), *_matrix(grad), bank.rows, bank.columns, *job]
            tables[key].extend((*row, bank.scale.data_ptr(), out[layer].data_ptr(), *modes))
    for (code, planes), table in tables.items():
        _run("client_scores_lowrank", table, out.device, out.shape[2], code, planes, path)


def why_not_client_scores_lowrank(xs: list[Tensor], grads: list[Tensor], banks: list[LowRankBank]) -> str | None:
    largest = max((bank.max_rank for bank in banks), default=0)
    return f"serves ranks up to {MAX_RANK}, not {largest}" if largest > MAX_RANK else None


def launch_client_totals(out: Tensor, ms: list[Tensor], banks: list[DenseBank]) -> None:
    """S[k] = <m, delta_k>; one launch per format, for up to 64 layers each."""
    clients = out.shape[1]
    results = out.data_ptr()
    tables = _Tables()
    for layer, bank in enumerate(banks):
        transposed, vectors, stored = _stored(bank)
        m = ms[layer].t() if transposed else ms[layer]
        tables[CODES[bank.dtype], vectors].extend((*_matrix(m), *stored, results + 4 * layer * clients))
    for (code, vectors), table in tables.items():
        _run("client_totals", table, out.device, clients, code, vectors)


def why_not_relevance_head(hidden: Tensor, targets: Tensor, head: Head) -> str | None:
    if head.weight.dtype == torch.float64:
        return "takes fp32, bf16 and fp16 heads, not float64"
    return None if head.weight.numel() else "takes heads of at least one row and one column"


def launch_relevance_head(
    grad: Tensor, value: Tensor, hidden: Tensor, targets: Tensor, head: Head, *, path: int = AUTO
) -> None:
    """grad[t] = d f_t / d h[t] and value[t] = f_t. A target outside the vocabulary makes its token's results NaN."""
    weight = head.weight.detach()
    size = weight.element_size()
    vectors = (
        weight.stride(1) == 1
        and weight.shape[1] * size % 16 == 0
        and (weight.shape[0] == 1 or weight.stride(0) * size % 16 == 0)
        and weight.data_ptr() % 16 == 0
    )
    # Kept here until the launch is on its way: torch's allocator then keeps the order.
    held = [None if vector is None else narrow(vector) for vector in (head.bias, head.norm_weight, head.norm_bias)]
    row = [*_matrix(hidden), targets.data_ptr(), targets.stride(0), weight.data_ptr(), *weight.stride()]
    for vector in held:
        row += [0, 0, 0] if vector is None else _matrix(vector)
    table = array("q", [*row, grad.data_ptr(), value.data_ptr(), *hidden.shape, weight.shape[0]])
    kinds = CODES[weight.dtype], vectors, NORM_CODES[head.norm], head.objective == "log_prob", path
    numbers = head.eps, head.scale, head.softcap or 0.0
    _run("relevance_head", table, hidden.device, *kinds, *numbers)


def launch_capture_append(buffers: list[Tensor], steps: list[Tensor], cursor: Tensor) -> None:
    """One launch for up to 64 buffers, then one for the cursor."""
    codes = CODES | {torch.float64: FLOAT64}
    table = array("q")
    count = 0
    for buffer, step in zip(buffers, steps, strict=True):
        if buffer.shape[1]:
            table.extend((buffer.data_ptr(), buffer.stride(0), codes[buffer.dtype]))
            table.extend((step.data_ptr(), *step.stride(), codes[step.dtype], buffer.shape[1]))
            count += 1
    sizes = count, buffers[0].shape[0], steps[0].shape[0]
    address, device = table.buffer_info()[0], cursor.device
    native.capture_append(address, *sizes, cursor.data_ptr(), device.index or 0, _stream(device))


def _run(op: str, table: array[int], device: torch.device, *numbers: Any) -> None:
    """Ask for the size of the workspace, allocate it, launch. Only client_totals plans without the device."""
    index = device.index or 0
    layers = () if op == "relevance_head" else (len(table) // COLUMNS[op],)
    call = (table.buffer_info()[0], *layers, *numbers)
    planned = call if op == "client_totals" else (*call, index)
    try:
        scratch = _workspace(getattr(native, f"{op}_workspace")(*planned), device)
        getattr(native, op)(*call, scratch.data_ptr(), scratch.numel(), index, _stream(device))
    except ValueError as error:
        raise ArgumentError(op, got=str(error)) from error


def _jobs(bank: LowRankBank) -> tuple[list[tuple[list[int], list[int], Tensor | None]], bool]:
    """The bank's clients grouped by rank and strides, and whether every client is in a group.

    Per group: columns 10 to 21 of csrc/cuda_ops.h, the load modes of A and B, and the tensor of client numbers
    (or None: all, in order) that must live as long as the row is used.
    """
    table = bank.table
    kinds, kind_of = torch.unique(table[:, [1, 2, 4, 5, 6]], dim=0, return_inverse=True)
    jobs: list[tuple[list[int], list[int], Tensor | None]] = []
    complete = True
    for index, kind in enumerate(kinds.tolist()):
        a_rank, a_inner, b_inner, b_rank, rank = kind
        if rank == 0:
            complete = False
            continue
        members = torch.nonzero(kind_of == index).flatten()
        whole = len(members) == bank.clients
        numbers = None if whole else members.to(bank.device)
        clients = [0, 0, 0, 0, 0]
        if bank.a is not None and bank.b is not None:
            size = bank.dtype.itemsize
            clients[1:] = [
                bank.a.data_ptr(),
                bank.a.stride(0) * size,
                bank.b.data_ptr(),
                bank.b.stride(0) * size,
            ]
        else:
            clients[0] = bank.device_table().data_ptr()
        modes = [
            _mode(table[members, 0], a_inner, a_rank, bank.columns, rank, bank.dtype.itemsize),
            _mode(table[members, 3], b_inner, b_rank, bank.rows, rank, bank.dtype.itemsize),
        ]
        held = 0 if numbers is None else numbers.data_ptr()
        jobs.append(([*clients, a_rank, a_inner, b_inner, b_rank, len(members), held, rank], modes, numbers))
    return jobs, complete


def _mode(addresses: Tensor, inner: int, across: int, length: int, rank: int, size: int) -> int:
    """How the kernel may read a factor: 16 bytes along the summed dimension, pairs along the rank, or singly."""
    if (
        inner == 1
        and length * size % 16 == 0
        and (rank == 1 or across * size % 16 == 0)
        and not bool((addresses % 16).any())
    ):
        return ALONG_INNER
    pair = 2 * size
    if rank % 2 == 0 and across == 1 and inner * size % pair == 0 and not bool((addresses % pair).any()):
        return ALONG_RANK
    return ANYWHERE
