"""Shards recognised by a header met before: the same answers as by parsing each, in verification and in the bank."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ledger_cases import NAMES, WEIGHTS, commit_next, forge_header, forge_shard, forge_tensor, reopen, small_ledger

from protoken.errors import (
    LayerError,
    LedgerError,
    LedgerFormatError,
    NonFiniteError,
    ProtokenError,
    UnknownClientError,
)
from protoken.ledger import ClientUpdate, Ledger, LowRank, Round, round_files, shard_check
from protoken.ledger.round_files import RoundReader, dense
from protoken.ledger.shards import parse_header, read_index
from protoken.ledger.small_factors import FactorPlan
from protoken.ledger.templates import HeaderTemplate
from protoken.ledger.transfer import prune
from protoken.ledger.verification import verify

SHAPES = {"v.bias": (7,), "w.weight": (16, 24)}


def crowd(path: Path, codec: str, clients: int = 6) -> Ledger:
    """One round of clients whose ids differ in length, with a matrix and a vector each; "adapters": factors instead."""
    ledger = small_ledger(path, 0)
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    base: dict[str, Any] = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    given = []
    for number in range(clients):
        delta: dict[str, Any] = {name: drawn(shape) for name, shape in SHAPES.items()}
        if codec == "adapters":
            delta["w.weight"] = LowRank(drawn((3, 24)), drawn((16, 3)), 0.5)
        given.append(ClientUpdate(f"c{10**number}", 1 / clients, delta=delta))
    ledger.commit_round(base, base, given, codec="fp32" if codec == "adapters" else codec)
    return reopen(path)


def plainly(read: Round, client: str, parameter: str) -> list[torch.Tensor | float]:
    """What Round says of an update, as it is stored."""
    layout = read.layout(client, parameter)
    if layout in ("lora", "lowrank"):
        return list(read.factors(client, parameter))
    return list(read.quantised(client, parameter)) if layout in ("int8", "fp8") else [read.delta(client, parameter)]


def flat(stored: round_files.Stored) -> list[torch.Tensor | float]:
    if isinstance(stored, LowRank):
        return [stored.a, stored.b, stored.scale]
    return [stored] if isinstance(stored, torch.Tensor) else list(stored)


def same(found: list[torch.Tensor | float], expected: list[torch.Tensor | float]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(f.float(), e.float()) and f.dtype == e.dtype if isinstance(f, torch.Tensor) else f == e
        for f, e in zip(found, expected, strict=True)
    )


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards whose headers were parsed."""
    seen: list[str] = []

    def counting(body: bytes, ref: Any) -> Any:
        seen.append(ref.file)
        return parse_header(body, ref)

    for module in (round_files, shard_check):
        monkeypatch.setattr(module, "parse_header", counting)
    return seen


@pytest.mark.parametrize("small", [0, 1 << 20])
@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16", "int8", "fp8", "lowrank-2", "adapters"])
def test_a_kind_is_parsed_once_and_read_as_the_round_reads_it(
    tmp_path: Path, codec: str, small: int, parsed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_files, "SMALL", small)
    read = crowd(tmp_path / "ledger", codec).round(1)
    with RoundReader(read) as reader:
        for record in read.clients:
            found = reader.stored(record.client, list(SHAPES))
            for name, stored in zip(SHAPES, found, strict=True):
                assert same(flat(stored), plainly(read, record.client, name))
                assert torch.equal(dense(stored).float(), read.delta(record.client, name).float())
            assert same(flat(reader.stored(record.client, ["w.weight"])[0]), flat(found[1]))
    assert parsed == ["rounds/00000001/clients/000000.safetensors"]
    parsed.clear()
    report = verify(read.cache.files.root)
    assert (report.ok, report.shards) == (True, 7 if read.manifest.residual is None else 8)
    assert [name for name in parsed if "/clients/" in name] == ["rounds/00000001/clients/000000.safetensors"]


def without_kinds(monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(round_files, "KINDS", 0)
        return action()


def info_edit(**fields: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda header, info: info.update(fields)


def canonical(edit: Callable[[dict[str, Any], dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Edit a shard's header and write it as protoken does, but for the padding if that is what was edited."""

    def rewrite(data: bytes) -> bytes:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        info = json.loads(header["__metadata__"]["protoken"])
        pad = edit(header, info)
        header["__metadata__"]["protoken"] = json.dumps(info, sort_keys=True, separators=(",", ":"))
        body = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        body += b" " * (-len(body) % 8 + (8 if pad else 0))
        return len(body).to_bytes(8, "little") + body + data[start:]

    return rewrite


def hash_edit(header: dict[str, Any], info: dict[str, Any]) -> None:
    info["sha256"]["v.bias"] = "0" * 64


def quote_edit(header: dict[str, Any], info: dict[str, Any]) -> None:
    info["sha256"]["v.bias"] = '"' + "0" * 63


def dtype_edit(header: dict[str, Any], info: dict[str, Any]) -> None:
    header["v.bias"].update(dtype="BF16", shape=[14])


def swap_edit(header: dict[str, Any], info: dict[str, Any]) -> None:
    header["v.bias"]["data_offsets"], header["w.weight"]["data_offsets"] = [1536, 1564], [0, 1536]


FORGED: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "nothing": lambda header, info: None,
    "padding": lambda header, info: True,
    "client": info_edit(client="c1"),
    "client of another type": info_edit(client=None),
    "round": info_edit(round=2),
    "run": info_edit(run="run-2"),
    "base": info_edit(base="0" * 64),
    "extra field": info_edit(note="x"),
    "marks in an extra field": info_edit(note="#%"),
    "bound": info_edit(bound={"w.weight": 0.25}),
    "bounds": info_edit(bound={"w.weight": 1e-9, "v.bias": 0.5}),
    "bound of nothing recorded": info_edit(bound={"other": 0.25}),
    "bound of an odd name": info_edit(bound={"a b": 0.25}),
    "whole number for a bound": info_edit(bound={"w.weight": 1}),
    "bound that is no number": info_edit(bound={"w.weight": "1.0"}),
    "layout": info_edit(layout={"v.bias": "bf16", "w.weight": "fp32"}),
    "hash": hash_edit,
    "quote in a hash": quote_edit,
    "dtype": dtype_edit,
    "order": swap_edit,
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_header_gets_the_verdict_of_the_parser(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client before it is good, so its kind is known when the forged one comes."""
    path = tmp_path / "ledger"
    client = crowd(path, "fp32").round(1).clients[3].client
    forge_shard(path, canonical(FORGED[case]), 3)

    def verdict() -> tuple[Any, Any]:
        problems = [(problem.where, str(problem.error)) for problem in verify(path).problems]
        read = reopen(path).round(1)
        try:
            with RoundReader(read) as reader:
                reader.stored("c1", list(SHAPES))
                found: Any = [flat(one) for one in reader.stored(client, list(SHAPES))]
        except ProtokenError as error:
            found = str(error)
        return problems, found

    (problems, found), (expected_problems, expected) = verdict(), without_kinds(monkeypatch, verdict)
    assert problems == expected_problems
    if isinstance(expected, str):
        assert found == expected
    else:
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    good = case in ("nothing", "padding", "extra field", "marks in an extra field") or (
        case.startswith("bound") and case != "bound that is no number"
    )
    assert (not problems) == good


@pytest.mark.parametrize(
    "text", ['{\\"w\\":1.2.3}', '{\\"w\\":1.0,\\"w\\":1.0}', '{\\"w\\":1e999}', "{}{}", '{\\"w\\":1}']
)
def test_bounds_that_a_parser_refuses_are_not_of_the_kind(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ledger"
    read = crowd(path, "fp32").round(1)
    ref = read.clients[0].shard
    data = (path / "rounds/00000001" / ref.file).read_bytes()
    body = data[8 : 8 + int.from_bytes(data[:8], "little")]
    with RoundReader(read) as reader:
        index = read_index(reader.files, round_files.ShardRef(reader.name(ref), ref.size, ref.sha256))
    made = HeaderTemplate.of(index, body)
    assert made is not None
    hashes = [entry.sha256 for _, entry in sorted(index.entries.items())]
    assert made.match(body, "c1") == hashes

    def with_bound(bound: str) -> bytes:
        changed = body.rstrip(b" ").replace(b'\\"bound\\":{}', b'\\"bound\\":' + bound.encode())
        return changed + b" " * (-len(changed) % 8)

    assert made.match(with_bound('{\\"w\\":1.5}'), "c1") == hashes
    assert made.match(with_bound(text), "c1") is None
    assert made.match(body, "c2") is None
    assert made.match(body[:-9], "c1") is None
    assert made.match(b"", "c1") is None
    assert made.match(body.replace(b"run-1", b"run-\xff"), "c1") is None
    assert HeaderTemplate.of(index, body + b" " * 8) is None
    forged = body.replace(hashes[0].encode(), b'\\",\\"x\\":\\"' + b"0" * 53)
    assert len(forged) == len(body)
    assert made.match(forged, "c1") is None


def test_clients_of_several_kinds_are_told_apart(tmp_path: Path, parsed: list[str]) -> None:
    """Of equal size as well: ranks 2 and 4 the other way round over two matrices."""
    ledger = small_ledger(tmp_path / "ledger", 0)
    base = {"v": torch.zeros(8, 8), "w": torch.zeros(8, 8)}
    ranks = [(2, 4), (4, 2), (2, 2), (2, 4), (4, 2), (2, 2)]
    given = []
    for number, pair in enumerate(ranks):
        delta = {n: LowRank(torch.randn(r, 8), torch.randn(8, r)) for n, r in zip(base, pair, strict=True)}
        given.append(ClientUpdate(f"c{number}", 1 / len(ranks), delta=delta))
    read = ledger.commit_round(base, base, given)
    with RoundReader(read) as reader:
        for number, pair in enumerate(ranks):
            found = reader.stored(f"c{number}", ["v", "w"])
            assert tuple(one.rank for one in found if isinstance(one, LowRank)) == pair
            assert all(same(flat(f), plainly(read, f"c{number}", n)) for n, f in zip(base, found, strict=True))
    assert len(parsed) == 3
    assert verify(ledger.path).ok


def test_numbers_that_are_not_finite_and_other_bytes_are_found_in_a_known_kind(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    crowd(path, "fp32")
    forge_tensor(path, "w.weight", lambda data: b"\x00\x00\xc0\x7f" + data[4:], 2)
    place = path / "rounds/00000001/clients/000004.safetensors"
    data = place.read_bytes()
    place.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    # Forged by json.dumps: no longer the bytes that protoken writes, so made canonical again.
    forge_shard(path, canonical(lambda header, info: None), 2)
    assert [p.where for p in verify(path).problems] == ["round 1, client c100", "round 1, client c10000"]
    with RoundReader(reopen(path).round(1)) as reader:
        reader.stored("c1", ["w.weight"])
        with pytest.raises(LedgerFormatError, match=r"finite numbers in w\.weight, got NaN or infinity"):
            reader.stored("c100", ["w.weight"])
        with pytest.raises(LedgerFormatError, match=r"'w\.weight' with hash .*, got other bytes"):
            reader.stored("c10000", ["v.bias", "w.weight"])
    with RoundReader(Ledger.open(path, check=False).round(1)) as reader:
        reader.stored("c10000", ["v.bias", "w.weight"])


def adapters(path: Path, *values: LowRank) -> Round:
    """One round in which each client gives one of these for both its matrices."""
    ledger = small_ledger(path, 0)
    base = {"v": torch.zeros(values[0].shape), "w": torch.zeros(values[0].shape)}
    given = [ClientUpdate(f"c{k}", 1 / len(values), delta=dict.fromkeys(base, v)) for k, v in enumerate(values)]
    ledger.commit_round(base, base, given, keep_residual="never")
    return reopen(path).round(1)


def drawn_factors(dtype: torch.dtype = torch.float32, size: float = 1.0, scale: float = 0.5, rank: int = 2) -> LowRank:
    return LowRank((torch.randn(rank, 6) * size).to(dtype), torch.randn(4, rank).to(dtype), scale)


UNUSUAL = {
    "usual": drawn_factors(),
    "bf16": drawn_factors(torch.bfloat16),
    "large": drawn_factors(size=1e20),
    "large scale": drawn_factors(scale=1e20),
    "nothing": drawn_factors(rank=0),
}


@pytest.mark.parametrize("parameters", [["v", "w"], ["w"], ["w", "v"]])
@pytest.mark.parametrize("case", UNUSUAL)
def test_factors_taken_together_are_those_taken_one_by_one(
    tmp_path: Path, case: str, parameters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    take = FactorPlan.take
    monkeypatch.setattr(FactorPlan, "take", lambda *given: taken.append(take(*given)) or taken[-1])
    read = adapters(tmp_path / "ledger", UNUSUAL[case], UNUSUAL[case], UNUSUAL[case])
    with RoundReader(read) as reader:
        for client in ("c0", "c1", "c2"):
            found = reader.stored(client, parameters)
            assert all(same(flat(f), plainly(read, client, n)) for n, f in zip(parameters, found, strict=True))
        assert reader.stored("c0", []) == []
    together = sum(found is not None for found in taken)
    # The first client's header is parsed, the second's layouts are looked up, from the third on all is known.
    assert together == (1 if case == "usual" else 0)
    assert len(taken) == (0 if case in ("bf16", "nothing") else 1)


def test_factors_far_apart_in_a_shard_are_read_one_by_one(tmp_path: Path) -> None:
    ledger = small_ledger(tmp_path / "ledger", 0)
    base = {"a": torch.zeros(4, 6), "m": torch.zeros(20, 20), "z": torch.zeros(4, 6)}
    delta = {"a": drawn_factors(), "m": torch.ones(20, 20), "z": drawn_factors()}
    read = ledger.commit_round(base, base, [ClientUpdate(f"c{k}", 0.5, delta=delta) for k in range(2)])
    with RoundReader(read) as reader:
        for client in ("c0", "c1"):
            found = reader.stored(client, ["a", "z"])
            assert all(same(flat(f), plainly(read, client, n)) for n, f in zip("az", found, strict=True))
            own = [f.a.untyped_storage().nbytes() for f in found if isinstance(f, LowRank)]
            assert own == [48, 48]


def test_bad_factors_among_good_ones_are_typed_errors(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    adapters(path, *[drawn_factors() for _ in range(5)])
    forge_tensor(path, "w::a", lambda data: b"\x00\x00\xc0\x7f" + data[4:], 2)
    forge_tensor(path, "v::scale", lambda data: b"\xff" * 8, 3)
    for index in (2, 3):
        forge_shard(path, canonical(lambda header, info: None), index)
    place = path / "rounds/00000001/clients/000004.safetensors"
    data = place.read_bytes()
    place.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with RoundReader(reopen(path).round(1)) as reader:
        for client in ("c0", "c1"):
            reader.stored(client, ["v", "w"])
        for client, message in (("c2", "numbers in w"), ("c3", "numbers in v"), ("c4", "'w::b' with hash")):
            with pytest.raises(LedgerFormatError, match=message):
                reader.stored(client, ["v", "w"])
    with RoundReader(Ledger.open(path, check=False).round(1)) as reader:
        for client in ("c0", "c1", "c4"):
            reader.stored(client, ["v", "w"])


def test_factors_that_lie_unaligned_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    adapters(path, *[drawn_factors() for _ in range(3)])
    read = adapters(tmp_path / "other", *[drawn_factors() for _ in range(3)])
    ref = read.clients[1].shard
    with RoundReader(read) as reader:
        index = read_index(reader.files, round_files.ShardRef(reader.name(ref), ref.size, ref.sha256))
        data = (tmp_path / "other/rounds/00000001" / ref.file).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        kind = HeaderTemplate.of(index, data[8:start])
        assert kind is not None
        reader.stored("c0", ["v"])
        kind.layouts["v"] = ("lora", ("::a", "::b", "::scale"))
        plan = FactorPlan.of(kind, ["v"])
        assert plan is not None
        hashes = kind.match(data[8:start], "c1")
        (found,) = plan.take(memoryview(bytearray(data)), start, hashes) or []
        assert same(flat(found), plainly(read, "c1", "v"))
        assert plan.take(memoryview(bytearray(b"x" + data)), start + 1, hashes) is None


@pytest.mark.parametrize("row", [0, 5])
def test_scales_that_overflow_with_their_values_are_a_typed_error(tmp_path: Path, row: int) -> None:
    """Finite each for itself; a scale of zeros may be as large as it likes."""
    ledger = small_ledger(tmp_path / "ledger", 0)
    base = {"w": torch.zeros(6, 8)}
    delta = {"w": torch.cat([torch.randn(5, 8), torch.zeros(1, 8)])}
    ledger.commit_round(base, base, [ClientUpdate("a", 1.0, delta=delta)], codec="int8")
    huge = struct.pack("<f", 3e38)
    forge_tensor(Path(ledger.path), "w::scale", lambda data: data[: 4 * row] + huge + data[4 * row + 4 :])
    with RoundReader(reopen(Path(ledger.path)).round(1)) as reader:
        if row == 5:
            assert bool(torch.isfinite(dense(reader.stored("a", ["w"])[0])).all())
        else:
            with pytest.raises(LedgerFormatError, match="finite numbers in w"):
                reader.stored("a", ["w"])


def test_a_reader_raises_what_the_round_raises(tmp_path: Path) -> None:
    ledger = small_ledger(tmp_path / "ledger", 0)
    base = {"w": torch.zeros(2, 2)}
    bad = ClientUpdate("bad", 0.5, delta={"w": torch.full((2, 2), float("nan"))})
    ledger.commit_round(base, base, [ClientUpdate("a", 0.5, delta=base), bad], on_bad="quarantine")
    commit_next(small_ledger(tmp_path / "other", 1))
    with RoundReader(ledger.round(1)) as reader:
        for client, parameter, kind in (
            ("bad", "w", NonFiniteError),
            ("nobody", "w", UnknownClientError),
            ("a", "v", LayerError),
        ):
            with pytest.raises(kind) as caught:
                reader.stored(client, [parameter])
            with pytest.raises(kind) as expected:
                ledger.round(1).delta(client, parameter)
            assert str(caught.value) == str(expected.value)
    other = Ledger.open(tmp_path / "other")
    prune(other, 1)
    with RoundReader(other.round(1)) as reader, pytest.raises(LedgerError, match="a pruned round"):
        reader.stored("alice", [NAMES[0]])


@pytest.mark.parametrize("small", [0, 1 << 20])
def test_damaged_shards_are_typed_errors_for_a_reader(
    tmp_path: Path, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_files, "SMALL", small)
    path = Path(small_ledger(tmp_path / "ledger", 1).path)
    places = [path / f"rounds/00000001/clients/{n:06d}.safetensors" for n in range(3)]
    data = places[0].read_bytes()
    places[0].write_bytes((1 << 40).to_bytes(8, "little") + data[8:])
    places[1].write_bytes(data[:-1])
    places[2].write_bytes(data[:20] + b"x" + data[21:])
    with RoundReader(reopen(path).round(1)) as reader:
        for client, message in zip(
            WEIGHTS, ("a header inside the file", "bytes, got", "a header with hash|bytes, got"), strict=True
        ):
            with pytest.raises(LedgerFormatError, match=message):
                reader.stored(client, [NAMES[0]])


def test_tensors_that_lie_unaligned_are_read_all_the_same(tmp_path: Path) -> None:
    """Safetensors asks for no padding of the header; protoken writes it, a forger may not."""
    path = tmp_path / "ledger"
    expected = crowd(path, "fp32").round(1).delta("c1", "w.weight")
    forge_header(path, lambda header, info: json.dumps(header).encode() + b" " * 3, 0)
    with RoundReader(reopen(path).round(1)) as reader:
        (found,) = reader.stored("c1", ["w.weight"])
    assert torch.equal(dense(found), expected)


def test_a_round_without_its_folder_of_clients_is_a_typed_error(tmp_path: Path) -> None:
    path = Path(small_ledger(tmp_path / "ledger", 1).path)
    (path / "rounds/00000001/clients").rename(path / "rounds/00000001/gone")
    with RoundReader(reopen(path).round(1)) as reader, pytest.raises(LedgerFormatError, match="got nothing there"):
        reader.stored("alice", [NAMES[0]])
