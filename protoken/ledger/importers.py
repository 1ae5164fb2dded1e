"""Filling a ledger from files: one round from checkpoints, or a whole folder of rounds.

    federation/
      global/                     G_0: a checkpoint folder, an adapter folder, or global.safetensors
      round-1/
        global/                   G_1
        clients/alice/            the model that alice sent back (or alice.safetensors)
        clients/bob/
        round.json                {"weights": {id: rho}, "examples": {id: n}, "rule": "fedavg", "metadata": {}}
      round-2/ ...

All of round.json is optional: without it all clients weigh the same; with "examples" alone, rho_k = n_k / sum n.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from protoken.arguments import check_callable, check_word
from protoken.errors import ArgumentError, LedgerFormatError
from protoken.ledger import strictjson
from protoken.ledger.checkpoints import Patterns, load
from protoken.ledger.ledger import Ledger, check_ledger
from protoken.ledger.rounds import Round, relative
from protoken.ledger.rules import lora_factor_split
from protoken.ledger.tensors import LowRank, norm
from protoken.ledger.updates import ClientUpdate, Value
from protoken.paths import path_of

Source = str | os.PathLike[str] | Mapping[str, Value]
LoraAverage = Literal["auto", "factors", "products"]
# Factors whose weighted mean is the aggregate to this were averaged apart.
FACTOR_TOLERANCE = 1e-3


def import_round(
    ledger: Ledger,
    *,
    base: Source | None,
    aggregate: Source,
    clients: Mapping[str, Source],
    weights: Mapping[str, float] | None = None,
    examples: Mapping[str, int] | None = None,
    parameters: Patterns = None,
    rule: str = "fedavg",
    codec: str = "fp32",
    metadata: Mapping[str, object] | None = None,
    lora: LoraAverage = "auto",
    on_bad: Literal["raise", "quarantine"] = "raise",
    allow_gap: bool = False,
    max_relative_residual: float | None = None,
) -> Round:
    """Commit one round from checkpoints, adapters, files or state dicts (see checkpoints.load). One client in memory.

    ``base`` may be None for the first round of adapters that started at B = 0. ``parameters`` chooses what is recorded
    (names, patterns, a function; None: all). ``lora`` says what the server averaged: "factors" A and B apart, or
    "products" B A; "auto" looks. Parameters that no file changed cost space: choose the layers you will trace.
    """
    check_ledger(ledger)
    for name, table in (("clients", clients), ("weights", weights), ("examples", examples)):
        if not isinstance(table, Mapping) and not (table is None and name != "clients"):
            raise ArgumentError(name, expected="a mapping by client", got=f"a {type(table).__name__}")
    after = load(aggregate, parameters)
    before = load(base, parameters) if base is not None else _empty(after)
    names = list(before)
    shares = resolve_weights(list(clients), weights, examples)
    counts = examples or {}

    def updates() -> list[tuple[str, Callable[[], ClientUpdate]]]:
        return [
            (c, lambda c=c: ClientUpdate(c, shares[c], state=load(clients[c], names), examples=counts.get(c)))  # type: ignore[misc]
            for c in clients
        ]

    apart = _averaged_apart(before, after, updates(), lora, base is not None)
    with ledger.begin_round(before, rule=rule, metadata=metadata, codec=codec, allow_gap=allow_gap) as writer:
        for _, make in updates():
            update = make()
            writer.add(lora_factor_split(before, after, [update])[0] if apart else update, on_bad=on_bad)
        return writer.commit(after, max_relative_residual=max_relative_residual)


def import_folder(
    ledger: Ledger,
    folder: str | os.PathLike[str],
    *,
    parameters: Patterns = None,
    codec: str = "fp32",
    lora: LoraAverage = "auto",
    on_bad: Literal["raise", "quarantine"] = "raise",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Round, ...]:
    """Commit every round of a folder laid out as in this module's head, in order of their numbers.

    Rounds that the ledger holds already are left out, so an interrupted import goes on where it stopped.

    Raises:
        ArgumentError: no such folder, no rounds in it or a gap between them, or clients and weights that do not fit.
        LedgerFormatError: a file that cannot be read. And what `Ledger.commit_round` raises.
    """
    check_ledger(ledger)
    check_callable("progress", progress)
    found = round_folders(folder)
    committed = []
    for number, path in enumerate(found, 1):
        if number > ledger.head.round:
            before = _place(found[number - 2] if number > 1 else Path(folder), "global", optional=number == 1)
            committed.append(_import_one(ledger, path, before, parameters, codec, lora, on_bad))
        if progress is not None:
            progress(number, len(found))
    return tuple(committed)


def round_folders(folder: str | os.PathLike[str]) -> list[Path]:
    """The folders round-1, round-2, ... of a federation on disk, in order.

    Raises:
        ArgumentError: no such folder, none in it, or a gap between them.
    """
    root = Path(path_of("folder", folder))
    if not os.path.isdir(root):
        raise ArgumentError("folder", expected="a folder that is there", got=str(root))
    found = sorted(
        (int(match[1]), path)
        for path in root.iterdir()
        if (match := re.fullmatch(r"round-0*([1-9][0-9]{0,7})", path.name)) and path.is_dir()
    )
    numbers = [number for number, _ in found]
    if numbers != list(range(1, len(found) + 1)) or not found:
        raise ArgumentError(
            "folder", expected="folders round-1, round-2, ... without a gap", got=numbers[:10] or "none"
        )
    return [path for _, path in found]


def resolve_weights(
    clients: list[str], weights: Mapping[str, float] | None, examples: Mapping[str, int] | None
) -> dict[str, float]:
    """rho_k: as given, or from numbers of examples, or all the same. ArgumentError when a client has none."""
    table = weights if weights is not None else examples
    if table is None:
        return {client: 1.0 / len(clients) for client in clients}
    missing = [client for client in clients if client not in table]
    extra = [client for client in table if client not in clients]
    if missing or extra:
        raise ArgumentError(
            "weights", expected=f"one for each of the {len(clients)} clients", got=ascii(missing + extra)[:120]
        )
    if weights is not None:
        return dict(weights)
    total = sum(table.values())
    if not total > 0:
        raise ArgumentError("examples", expected="a sum above 0", got=total)
    return {client: table[client] / total for client in clients}


def _import_one(
    ledger: Ledger,
    path: Path,
    base: Path | None,
    parameters: Patterns,
    codec: str,
    lora: LoraAverage,
    on_bad: Literal["raise", "quarantine"],
) -> Round:
    notes = _notes(path / "round.json")
    clients = {}
    for child in sorted((path / "clients").iterdir()) if (path / "clients").is_dir() else ():
        if child.name.startswith("."):  # no client's id does: what a file browser left behind
            continue
        client = child.stem if child.suffix == ".safetensors" else child.name
        if client in clients:
            raise ArgumentError(
                "folder", expected=f"one file or folder of {client!a}", got=f"two in {path.name!a}/clients"
            )
        clients[client] = child
    if not clients:
        raise ArgumentError("folder", expected=f"clients in {path.name!a}/clients", got="none")
    aggregate = _place(path, "global", optional=False)
    assert aggregate is not None
    return import_round(
        ledger,
        base=base,
        aggregate=aggregate,
        clients=clients,
        weights=notes.get("weights"),  # type: ignore[arg-type]
        examples=notes.get("examples"),  # type: ignore[arg-type]
        parameters=parameters,
        rule=str(notes.get("rule", "fedavg")),
        codec=codec,
        metadata=notes.get("metadata"),  # type: ignore[arg-type]
        lora=lora,
        on_bad=on_bad,
    )


def _notes(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    with path.open("rb") as file:
        value = strictjson.load(file.read((1 << 24) + 1), limit=1 << 24, what=str(path))
    tables = {"weights": (int, float), "examples": (int,)}
    if not isinstance(value, dict) or set(value) - {"weights", "examples", "rule", "metadata"}:
        raise LedgerFormatError(str(path), expected="weights, examples, rule and metadata only", got=ascii(value)[:120])
    for key, kinds in tables.items():
        table = value.get(key, {})
        if not isinstance(table, dict) or not all(type(v) in kinds for v in table.values()):
            raise LedgerFormatError(str(path), expected=f"{key} as numbers by client", got=ascii(table)[:120])
    if not isinstance(value.get("metadata", {}), dict):
        raise LedgerFormatError(str(path), expected="metadata as an object", got=ascii(value["metadata"])[:120])
    return value


def _place(folder: Path, name: str, *, optional: bool) -> Path | None:
    for candidate in (folder / name, folder / f"{name}.safetensors"):
        if candidate.exists():
            return candidate
    if optional:
        return None
    raise ArgumentError("folder", expected=f"{name}/ or {name}.safetensors", got=f"neither in {str(folder)!a}")


def _empty(after: Mapping[str, Value]) -> dict[str, Value]:
    """The adapter before the first round, when B was 0: nothing added to the frozen weights."""
    result: dict[str, Value] = {}
    for name, value in after.items():
        if not isinstance(value, LowRank):
            raise ArgumentError("base", expected=f"the model before the round, for {name}", got="none")
        result[name] = LowRank(torch.zeros_like(value.a[:1]), torch.zeros_like(value.b[:, :1]), 1.0)
    return result


def _averaged_apart(
    before: Mapping[str, Value],
    after: Mapping[str, Value],
    updates: list[tuple[str, Callable[[], ClientUpdate]]],
    lora: LoraAverage,
    has_base: bool,
) -> bool:
    """Whether the aggregate's factors are the weighted means of the clients' factors."""
    check_word("lora", lora, ("auto", "factors", "products"))
    adapters = {n: v for n, v in after.items() if isinstance(v, LowRank) and _same_form(before[n], v)}
    if lora == "products" or not adapters or not has_base:
        return False
    if lora == "factors":
        return True
    means: dict[str, tuple[Tensor, Tensor]] = {}
    for _, make in updates:
        update = make()
        assert update.state is not None
        for name, value in adapters.items():
            mine = update.state[name]
            if not isinstance(mine, LowRank) or not _same_form(mine, value):
                return False
            a, b = mine.a.float() * update.weight, mine.b.float() * update.weight
            means[name] = (means[name][0] + a, means[name][1] + b) if name in means else (a, b)
    return all(
        relative(norm(a - adapters[n].a.float()), norm(adapters[n].a)) < FACTOR_TOLERANCE
        and relative(norm(b - adapters[n].b.float()), norm(adapters[n].b)) < FACTOR_TOLERANCE
        for n, (a, b) in means.items()
    )


def _same_form(one: Value, other: LowRank) -> bool:
    return (
        isinstance(one, LowRank)
        and one.a.shape == other.a.shape
        and one.b.shape == other.b.shape
        and one.scale == other.scale
    )
