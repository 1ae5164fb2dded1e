"""Taking rounds out of a ledger: a copy for somebody else, plain files for other tools, pruning of old shards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from protoken.arguments import is_whole, listed
from protoken.errors import ArgumentError, DurabilityError, UnknownClientError, UnknownRoundError
from protoken.ledger import strictjson
from protoken.ledger.files import FileLayer, remedy_of
from protoken.ledger.ledger import Ledger, RoundChoice, check_ledger
from protoken.ledger.manifest import GENESIS_LIMIT, MANIFEST_LIMIT, Head
from protoken.ledger.pruned import pruned_bytes, read_pruned
from protoken.ledger.rounds import Round, folder
from protoken.ledger.shard_check import check_shard
from protoken.ledger.signatures import SIGNATURE_FILE_BYTES
from protoken.paths import path_of, write_whole

_PIECE = 1 << 24


def copy_ledger(ledger: Ledger, path: str | os.PathLike[str], *, upto: int | None = None) -> Ledger:
    """Copy a snapshot byte for byte, hashes checked on the way: the first ``upto`` rounds, or all. Signatures stay
    valid.

    Safe while a writer goes on.

    Raises:
        ArgumentError: the target is not a new or empty folder, or lies in the ledger.
        UnknownRoundError: ``upto`` is not a round, or is one before the head that was pruned: a ledger whose last
            round has no tensors answers nothing. Nothing was written.
    """
    check_ledger(ledger)
    _refuse_inside(ledger, path_of("path", path))
    last = ledger.head.round if upto is None else upto
    if not is_whole(last) or not 0 <= last <= ledger.head.round:
        raise UnknownRoundError("upto", expected=f"0 to {ledger.head.round}", got=last)
    last = int(last)
    pruned = read_pruned(ledger.files)
    if last < ledger.head.round and last in pruned:
        full = [number for number in ledger.rounds[last:] if number not in pruned]
        raise UnknownRoundError(
            "upto",
            expected="a round with its tensors",
            got=f"round {last}, which was pruned",
            remedy=f"The next that a copy can end with is {full[0]}" if full else "Copy from a full copy",
        )
    target = FileLayer(path, sync=ledger.files.syncs)
    target.make_root()
    if target.names(""):
        raise ArgumentError("path", expected="a new or empty folder", got=ascii(target.names("")[0]))
    for name in ("rounds", "staging"):
        target.make_folder(name)
    target.write_file("ledger.json", ledger.files.read("ledger.json", GENESIS_LIMIT))
    for number in range(1, last + 1):
        _copy_round(ledger, ledger.round(number), target)
    if ledger.files.exists("PRUNED"):
        target.write_file("PRUNED", pruned_bytes({n for n in pruned if n <= last}))
    target.sync_folder("rounds")
    target.replace_file("HEAD", Head(ledger.run, last, ledger.hash_of(last)).dump())
    target.sync_above()
    return Ledger.open(path, files=target)


def export_rounds(
    ledger: Ledger,
    path: str | os.PathLike[str],
    *,
    rounds: RoundChoice = "all",
    clients: Sequence[str] | None = None,
    parameters: Sequence[str] | None = None,
) -> list[Path]:
    """Write updates as plain safetensors for other tools: PATH/round-N/{change,residual}.safetensors and
    PATH/round-N/clients/ID.safetensors, dense, keyed by parameter, with round.json beside them. Returns the files.

    Quarantined and absent clients are left out; round.json names the former.

    Raises:
        ArgumentError: PATH lies in the ledger, or holds one of the rounds already.
        UnknownRoundError: no such round.
        UnknownClientError: a client took part in none of the rounds.
        LayerError: a round does not record a parameter.
        LedgerError: a round was pruned. After this and all above nothing was written.
        LedgerFormatError: a shard does not hold what the manifest says.
        DurabilityError: the file system refused.
    """
    check_ledger(ledger)
    root = Path(path_of("path", path))
    clients = None if clients is None else listed("clients", clients)
    parameters = None if parameters is None else listed("parameters", parameters)
    places = [(root / f"round-{current.number}", current) for current in ledger.select(rounds)]
    _refuse_missing([current for _, current in places], clients, parameters)
    for place, _ in places:
        _refuse_inside(ledger, place)
        if os.path.lexists(place) and not (os.path.isdir(place) and not os.listdir(place)):
            raise ArgumentError(
                "path",
                expected=f"a folder without a {place.name}",
                got=ascii(str(root)),
                remedy="Export to another folder, or remove what was exported before",
            )
    written = []
    for place, current in places:
        _make_folder(place / "clients")
        names = list(current.parameters) if parameters is None else list(parameters)
        chosen = [c for c in current.clients if c.quarantined is None and (clients is None or c.client in clients)]
        written.append(save_tensors(place / "change.safetensors", {n: current.change(n) for n in names}))
        written.append(save_tensors(place / "residual.safetensors", {n: current.residual(n) for n in names}))
        for record in chosen:
            # Ids keep to a charset without "/"; no id starts with a dot.
            tensors = dict(current.deltas(record.client, names))
            written.append(save_tensors(place / "clients" / f"{record.client}.safetensors", tensors))
        notes = place / "round.json"
        notes.write_bytes(strictjson.dump(_notes(current)))
        written.append(notes)
    return written


def _refuse_missing(chosen: Sequence[Round], clients: Sequence[str] | None, parameters: Sequence[str] | None) -> None:
    """LedgerError, LayerError or UnknownClientError for what the rounds cannot give."""
    for current in chosen:
        current.require_shards()
        for name in parameters or ():
            current.spec(name)
    known = {record.client for current in chosen for record in current.clients}
    for client in clients or ():
        if client not in known:
            raise UnknownClientError(
                "clients",
                expected=f"clients of rounds {[current.number for current in chosen]}",
                got=ascii(client)[:80],
                remedy=f"The first are {', '.join(sorted(known)[:5])}",
            )


def prune(ledger: Ledger, rounds: RoundChoice) -> int:
    """Remove the shards of rounds for good, keeping manifests, hashes and signatures; returns the bytes freed.

    The pruned rounds stay in the chain and are listed by Round.pruned; their tensors are gone, and lineage over them
    is not possible any more. The last round cannot be pruned. Takes the writer's lock.
    """
    check_ledger(ledger)
    numbers = {current.number for current in ledger.select(rounds)}
    if ledger.head.round in numbers:
        raise UnknownRoundError("rounds", expected="rounds before the last", got=ledger.head.round)
    files, freed = ledger.files, 0
    lock = files.lock("lock")
    try:
        gone = numbers | set(read_pruned(files))
        # Listed first, removed afterwards: a crash in between leaves files that nobody needs, not missing ones.
        files.replace_file("PRUNED", pruned_bytes(gone))
        for number in sorted(gone):
            for name in ("clients", "change.safetensors", "residual.safetensors"):
                freed += _remove(files, f"{folder(number)}/{name}")
    finally:
        os.close(lock)
    ledger.forget_pruned()
    return freed


def _refuse_inside(ledger: Ledger, path: str | os.PathLike[str]) -> None:
    """ArgumentError when what is written there would lie in the ledger's folder, which only its writer changes."""
    own, target = (Path(os.path.realpath(place)) for place in (ledger.path, path))
    if target.is_relative_to(own):
        raise ArgumentError(
            "path",
            expected="a folder outside the ledger",
            got=f"{str(path)!a}, which lies in {str(own)!a}",
            remedy="Name a folder beside the ledger",
        )


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DurabilityError(
            str(path), expected="mkdir to succeed", got=error.strerror, remedy=remedy_of(error)
        ) from error


def _copy_round(ledger: Ledger, current: Round, target: FileLayer) -> None:
    place = folder(current.number)
    target.make_folder(place)
    target.make_folder(f"{place}/clients")
    target.write_file(f"{place}/manifest.json", ledger.files.read(f"{place}/manifest.json", MANIFEST_LIMIT))
    if ledger.genesis.server_key is not None:
        signature = ledger.files.read(f"{place}/manifest.sig", SIGNATURE_FILE_BYTES)
        target.write_file(f"{place}/manifest.sig", signature)
    if not current.pruned:
        shards = [(current.manifest.change, None), *((c.shard, c.client) for c in current.clients)]
        if current.manifest.residual is not None:
            shards.append((current.manifest.residual, None))
        for ref, client in shards:
            check_shard(current, ref, client)
            _copy_file(ledger.files, target, f"{place}/{ref.file}", ref.size)
    target.sync_folder(f"{place}/clients")
    target.sync_folder(place)


def _copy_file(source: FileLayer, target: FileLayer, name: str, size: int) -> None:
    reading, writing = source.open_read(name), target.create(name)
    try:
        for offset in range(0, size, _PIECE):
            piece = bytearray(min(_PIECE, size - offset))
            source.read_into(reading, memoryview(piece), offset, name)
            target.write(writing, piece, name)
        target.sync(writing, name)
    finally:
        os.close(reading)
        os.close(writing)


def _remove(files: FileLayer, name: str) -> int:
    if not files.exists(name):
        return 0
    inside = [f"{name}/{child}" for child in files.names(name)] if not name.endswith(".safetensors") else [name]
    freed = sum(files.size_of(child) for child in inside)
    files.remove(name)
    return freed


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> Path:
    """Write one safetensors file, whole or not at all.

    Raises:
        DurabilityError: the file system refused.
    """
    path = Path(path_of("path", path))
    dense = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        write_whole(
            str(path),
            lambda name: save_file(dense, name, metadata),
            lambda name: Path(name).write_bytes(save(dense, metadata)),
        )
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error).rsplit(": ", 1)[-1]
        raise DurabilityError(
            str(path),
            expected="write to succeed",
            got=reason,
            remedy=f"{remedy_of(error)}; write it again",
        ) from error
    return path


def _notes(current: Round) -> dict[str, object]:
    return {
        "round": current.number,
        "rule": current.rule,
        "metadata": current.metadata,
        "weights": {c.client: c.weight for c in current.clients},
        "examples": {c.client: c.examples for c in current.clients if c.examples is not None},
        "quarantined": {c.client: c.quarantined for c in current.clients if c.quarantined is not None},
    }
