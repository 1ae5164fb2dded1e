"""How many bytes a ledger will take, before a federation starts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from protoken.arguments import check_count, listed
from protoken.errors import ArgumentError
from protoken.ledger.codecs import check_codec

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}
# Measured on shards with names of 40 to 60 characters: header of a tensor, and what a shard and a client's line take.
_PER_TENSOR, _PER_SHARD, _PER_CLIENT, _PER_PARAMETER = 330, 420, 320, 400


@dataclass(frozen=True)
class Estimate:
    """Bytes on disk. ``shared`` is what a round takes whatever the number of clients: change, residual, manifest."""

    client: int
    shared: int
    round: int
    total: int


def estimate_bytes(
    shapes: Mapping[str, Sequence[int]],
    *,
    clients: int,
    rounds: int = 1,
    codec: str = "fp32",
    lora_rank: int | None = None,
) -> Estimate:
    """Size of a ledger with these parameters, e.g. {n: p.shape for n, p in model.named_parameters() if chosen(n)}.

    With ``lora_rank``, matrices are adapters of that rank in fp32 (base and aggregate as factors too). A lossy codec
    brings a residual of the size of the change; fp32 and LoRA bring none. Good to about a tenth.
    """
    check_codec(codec)
    clients, rounds = check_count("clients", clients, 1), check_count("rounds", rounds, 0)
    lora_rank = None if lora_rank is None else check_count("lora_rank", lora_rank, 1)
    if not isinstance(shapes, Mapping) or not shapes:
        raise ArgumentError("shapes", expected="the shape of one parameter or more, by name", got=repr(shapes))
    sizes = [_lengths(f"shapes[{name!r}]", shape) for name, shape in shapes.items()]
    client = _PER_SHARD + sum(_tensor_bytes(shape, codec, lora_rank) for shape in sizes)
    dense = _PER_SHARD + sum(_tensor_bytes(shape, "fp32", None) for shape in sizes)
    change = dense
    if lora_rank is not None:
        change = _PER_SHARD + sum(_tensor_bytes(shape, "fp32", 2 * lora_rank) for shape in sizes)
    lossy = codec != "fp32" and lora_rank is None
    shared = change + (dense if lossy else 0) + 700 + _PER_PARAMETER * len(shapes)
    one = shared + clients * (client + _PER_CLIENT)
    return Estimate(client, shared, one, rounds * one)


def _lengths(argument: str, shape: object) -> tuple[int, ...]:
    return tuple(check_count(argument, length, 0) for length in listed(argument, shape))


def _tensor_bytes(shape: tuple[int, ...], codec: str, rank: int | None) -> int:
    count = prod(shape)
    lowrank = re.fullmatch(r"lowrank-([0-9]+)", codec)
    if rank is None and lowrank and len(shape) == 2 and int(lowrank[1]) * sum(shape) < count:
        rank = int(lowrank[1])
    if rank is not None and len(shape) == 2:
        return 4 * rank * sum(shape) + 8 + 3 * _PER_TENSOR
    if codec in ("int8", "fp8") and shape:
        return count + 4 * prod(shape[:-1]) + 2 * _PER_TENSOR
    return count * _BYTES.get(codec, 4) + _PER_TENSOR
