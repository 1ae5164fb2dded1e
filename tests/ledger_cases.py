"""A federation small enough for thousands of ledgers, shared by the ledger's tests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from protoken.ledger import ClientUpdate, Ledger, Round
from protoken.ledger import manifest as m
from protoken.ledger.files import FileLayer
from protoken.ledger.verification import verify

NAMES = ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.bias")
SHAPES = ((6, 5), (4,))
SHARD = "rounds/00000002/clients/000000.safetensors"
MANIFEST = "rounds/00000002/manifest.json"
WEIGHTS = {"alice": 0.5, "bob": 0.3, "carol": 0.2}


def parameters(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: (torch.randn(s, generator=generator) * scale).to(dtype) for n, s in zip(NAMES, SHAPES, strict=True)}


def federation(
    base: dict[str, torch.Tensor], seed: int = 1
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Clients' states and their weighted mean, in the dtype of the base."""
    states = {
        client: {n: base[n] + parameters(seed + i, 0.1)[n].to(base[n].dtype) for n in NAMES}
        for i, client in enumerate(WEIGHTS)
    }
    mean = {n: sum(WEIGHTS[c] * states[c][n] for c in WEIGHTS) for n in NAMES}
    return states, mean


def updates(states: dict[str, dict[str, torch.Tensor]]) -> list[ClientUpdate]:
    return [ClientUpdate(client, WEIGHTS[client], state=states[client], examples=7) for client in states]


def contents(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """Every file below a folder, by relative name."""
    return {
        os.path.relpath(os.path.join(folder, name), path): (Path(folder) / name).read_bytes()
        for folder, _, files in os.walk(path)
        for name in files
    }


def round_data(number: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[ClientUpdate]]:
    """base, aggregate and updates of the number-th round of one fixed, endless federation (1-based).

    G_r is a function of r alone, so that a reader can check any round without having seen the ones before.
    """
    base, mean = parameters(1000 + number - 1), parameters(1000 + number)
    delta = {n: mean[n] - base[n] for n in NAMES}
    scales = {"alice": 1.0, "bob": 0.5, "carol": 1.75}  # weighted mean 1
    return (
        base,
        mean,
        [ClientUpdate(c, w, delta={n: d * scales[c] for n, d in delta.items()}) for c, w in WEIGHTS.items()],
    )


def commit_next(ledger: Ledger) -> Round:
    """Commit the round after the last one of a ledger made of round_data."""
    base, mean, given = round_data(ledger.head.round + 1)
    return ledger.commit_round(base, mean, given, max_relative_residual=1e-4)


def reopen(path: Path) -> Ledger:
    """Open without syncing what is written."""
    return Ledger.open(path, files=FileLayer(path, sync=False))


def check_round(read: Round) -> None:
    """Every tensor of a round made by commit_next is what it should be."""
    base, mean, given = round_data(read.number)
    for name in NAMES:
        assert torch.equal(read.change(name), mean[name] - base[name])
        for update in given:
            assert update.delta is not None
            assert torch.equal(read.delta(update.client, name), update.delta[name])


def small_ledger(path: Path, rounds: int = 2, files: FileLayer | None = None, **arguments: object) -> Ledger:
    """A ledger of ``rounds`` rounds of round_data. Not synced unless ``files`` says so: tests are many, disks slow."""
    files = files or FileLayer(path, sync=False)
    ledger = Ledger.create(path, run="run-1", files=files, **arguments)  # type: ignore[arg-type]
    for _ in range(rounds):
        commit_next(ledger)
    return ledger


# ---- forging: edits that keep every hash consistent, so that they reach the validators ----------------------------


def forge_manifest(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the last round's manifest and make HEAD name it. ``edit`` changes the object, or returns bytes instead."""
    head = json.loads((path / "HEAD").read_bytes())
    place = path / f"rounds/{head['round']:08d}/manifest.json"
    value = json.loads(place.read_bytes())
    result = edit(value)
    data = result if isinstance(result, bytes) else json.dumps(value).encode()
    place.write_bytes(data)
    head["sha256"] = hashlib.sha256(data).hexdigest()
    (path / "HEAD").write_bytes(json.dumps(head, sort_keys=True, separators=(",", ":")).encode() + b"\n")


def forge_shard(path: Path, edit: Callable[[bytes], bytes], index: int = 0) -> None:
    """Edit the bytes of a client's shard in the last round, and its size and hash in the manifest."""

    def adjust(manifest: dict[str, Any]) -> None:
        shard = manifest["clients"][index]["shard"]
        place = path / f"rounds/{manifest['round']:08d}" / shard["file"]
        data = edit(place.read_bytes())
        place.write_bytes(data)
        length = int.from_bytes(data[:8], "little")
        shard.update(size=len(data), sha256=hashlib.sha256(data[: 8 + length]).hexdigest())

    forge_manifest(path, adjust)


def forge_header(path: Path, edit: Callable[[dict[str, Any], dict[str, Any]], object], index: int = 0) -> None:
    """Edit a client's shard header: ``edit(header, info)``; the tensors' bytes stay."""

    def rewrite(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        info = json.loads(header["__metadata__"]["protoken"])
        result = edit(header, info)
        if isinstance(header.get("__metadata__"), dict):
            header["__metadata__"]["protoken"] = json.dumps(info)
        body = result if isinstance(result, bytes) else json.dumps(header).encode()
        body += b" " * (-len(body) % 8)
        return len(body).to_bytes(8, "little") + body + data[8 + length :]

    forge_shard(path, rewrite, index)


def forge_tensor(path: Path, name: str, edit: Callable[[bytes], bytes], index: int = 0) -> None:
    """Edit the bytes of one tensor of a client's shard (as many as before), its hash mended with all others."""

    def rewrite(data: bytes) -> bytes:
        start = 8 + int.from_bytes(data[:8], "little")
        begin, end = (start + offset for offset in json.loads(data[8:start])[name]["data_offsets"])
        changed = edit(data[begin:end])
        assert len(changed) == end - begin
        hashes[name] = hashlib.sha256(changed).hexdigest()
        return data[:begin] + changed + data[end:]

    hashes: dict[str, str] = {}
    forge_shard(path, rewrite, index)
    forge_header(path, lambda header, info: info["sha256"].update(hashes), index)


def read_all(path: Path) -> None:
    ledger = Ledger.open(path)
    for number in ledger.rounds:
        check_round(ledger.round(number))


def assert_first_round_is_untouched(path: Path) -> None:
    """Under the head of a moment before, the ledger is sound: what came after harmed nothing that was there."""
    data = (path / "rounds/00000001/manifest.json").read_bytes()
    (path / "HEAD").write_bytes(m.Head("run-1", 1, m.sha256(data)).dump())
    report = verify(path)
    assert report.problems == []
    assert report.leftovers == ["rounds/00000002"]
    check_round(Ledger.open(path).round(1))
