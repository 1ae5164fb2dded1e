"""Numbers at the edge of what fits: finite each for itself, and too large once they meet."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from ledger_cases import NAMES, WEIGHTS, forge_header, forge_manifest, forge_tensor, parameters, reopen, small_ledger

from protoken.errors import ArgumentError, LedgerFormatError, NonFiniteError
from protoken.ledger import ClientUpdate, Ledger, LowRank
from protoken.ledger.verification import verify

LARGEST = float(torch.finfo(torch.float32).max)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return Path(small_ledger(tmp_path / "ledger", 1).path)


def still(value: LowRank) -> dict[str, LowRank]:
    """The same adapter with factors of zeros."""
    return {"w": LowRank(torch.zeros_like(value.a), torch.zeros_like(value.b))}


@pytest.mark.parametrize("weight", [1e308, 1e39])
def test_weights_beyond_fp32_are_refused_by_the_writer_and_by_the_reader(path: Path, weight: float) -> None:
    base = parameters(1001)
    given = [ClientUpdate(c, weight, state=base) for c in WEIGHTS]
    with pytest.raises(ArgumentError, match=r"weight: expected a number from 0 to 3\.4e\+38"):
        reopen(path).commit_round(base, base, given, rule="fedadam")

    def heavy(manifest: dict[str, Any]) -> None:
        manifest["rule"] = "fedadam"
        for client in manifest["clients"]:
            client["weight"] = weight

    assert verify(path).ok
    forge_manifest(path, heavy)
    with pytest.raises(LedgerFormatError, match="expected a number from 0 to"):
        Ledger.open(path).round(1)


def test_the_largest_weight_reads_as_a_typed_error_where_it_overflows(path: Path) -> None:
    def heavy(manifest: dict[str, Any]) -> None:
        manifest["rule"] = "fedadam"
        for client in manifest["clients"]:
            client["weight"] = LARGEST

    forge_manifest(path, heavy)
    read = Ledger.open(path).round(1)
    for name in NAMES:
        with pytest.raises(LedgerFormatError, match="finite numbers"):
            read.residual(name)
    assert torch.isfinite(read.delta("alice", NAMES[0])).all()


OVERFLOWING = {
    "scale": LowRank(torch.ones(2, 5), torch.ones(6, 2), 1e200),
    "scale of nothing": LowRank(torch.zeros(2, 5), torch.ones(6, 2), 1e39),
    "product": LowRank(torch.full((2, 5), 1e30), torch.full((6, 2), 1e30)),
    "product before the scale": LowRank(torch.full((2, 5), 1e30), torch.full((6, 2), 1e30), 1e-30),
    "scaled factor": LowRank(torch.full((2, 5), 1e-38), torch.full((6, 2), 1e30), 1e38),
}


@pytest.mark.parametrize("kind", ["delta", "state"])
@pytest.mark.parametrize("case", OVERFLOWING)
def test_factors_whose_product_overflows_are_refused_or_quarantined(tmp_path: Path, case: str, kind: Any) -> None:
    value = OVERFLOWING[case]
    if case == "scaled factor" and kind == "delta":
        value = LowRank(value.a, value.b, LARGEST)  # only a difference multiplies the scale into one factor
    base = still(value)
    ledger = small_ledger(tmp_path / "ledger", 0)
    with ledger.begin_round(base) as writer:
        writer.add(ClientUpdate("good", 0.5, delta=still(value)))
        bad = ClientUpdate("bad", 0.5, **{kind: {"w": value}})
        if case == "scaled factor" and kind == "delta":
            assert writer.add(bad).quarantined is None  # ||b|| ||a|| scale fits
        else:
            with pytest.raises(NonFiniteError, match="product fits fp32"):
                writer.add(bad)
            assert writer.add(bad, on_bad="quarantine").quarantined
        writer.commit(base)
    assert verify(ledger.path, conservation=True).ok


def test_factors_that_fit_are_never_called_infinite() -> None:
    for a, b, scale in ((1e19, 1e18, 1.0), (1e30, 1e-30, 1e30), (0.0, 0.0, LARGEST), (1e-38, 1e38, 1e38)):
        value = LowRank(torch.full((3, 4), a), torch.full((5, 3), b), scale)
        assert value.finite()
        assert bool(torch.isfinite(value.dense()).all())
    for dtype in (torch.float32, torch.bfloat16):
        assert LowRank(torch.zeros(0, 4, dtype=dtype), torch.zeros(5, 0, dtype=dtype)).finite()
    assert LowRank(torch.zeros(2, 0), torch.zeros(5, 2)).finite()


def test_the_quick_look_at_usual_factors_says_what_the_careful_one_says() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = [0.0, 1e-30, 1.0, 1e3, float("nan"), float("inf"), -float("inf")]
        values += [] if dtype == torch.float16 else [1e19, 3e38]
        for a in values:
            for b in values:
                for scale in (0.0, 1.0, -1e12, 1e30, 3e38, float("nan"), float("inf")):
                    left, right = torch.ones(3, 4, dtype=dtype), torch.ones(5, 3, dtype=dtype)
                    left[1, 2], right[4, 0] = a, b
                    largest = float(left.double().norm(dim=0).max() * right.double().norm(dim=1).max())
                    expected = abs(scale) <= LARGEST and largest * max(1.0, abs(scale)) <= LARGEST
                    assert LowRank(left, right, scale).finite() == expected


@pytest.mark.parametrize("scale", [1e300, -1e300, float("inf"), float("nan")])
def test_a_stored_scale_that_overflows_is_a_format_error_wherever_it_is_read(tmp_path: Path, scale: float) -> None:
    ledger = small_ledger(tmp_path / "ledger", 0)
    value = LowRank(torch.ones(2, 5), torch.ones(6, 2))
    ledger.commit_round(still(value), {"w": value}, [ClientUpdate("a", 1.0, delta={"w": value})])
    forge_tensor(Path(ledger.path), "w::scale", lambda _: struct.pack("<d", scale))
    read = Ledger.open(ledger.path).round(1)
    for reading in (read.delta, read.factors, lambda c, n: read.computed_residual(n)):
        with pytest.raises(LedgerFormatError, match="finite numbers in w"):
            reading("a", "w")
    assert not verify(ledger.path, conservation=True).ok


def test_a_sparse_shard_larger_than_memory_is_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    """A file of a terabyte of zeros takes no room; read as a tensor it would take it all."""
    ledger = small_ledger(tmp_path / "ledger", 0)
    base, size = {"w": torch.zeros(2)}, 1 << 40
    with ledger.begin_round(base) as writer:
        writer.add(ClientUpdate("good", 0.5, delta=base))
        writer.add(ClientUpdate("huge", 0.5, delta={"w": torch.zeros(3)}), on_bad="quarantine")
        writer.commit(base)
    path = Path(ledger.path)
    place = path / "rounds/00000001/clients/000001.safetensors"

    def widen(header: dict[str, Any], info: dict[str, Any]) -> None:
        header["w"].update(shape=[size // 4], data_offsets=[0, size])

    forge_header(path, widen, 1)
    start = 8 + int.from_bytes(place.read_bytes()[:8], "little")
    os.truncate(place, start + size)
    forge_manifest(path, lambda manifest: manifest["clients"][1]["shard"].update(size=start + size))
    read = Ledger.open(path).round(1)
    with pytest.raises(LedgerFormatError, match="a tensor that fits in memory"):
        read.quarantined_tensor("huge", "w")
    assert [p.where for p in verify(path).problems] == ["round 1, client huge"]
    assert torch.equal(read.delta("good", "w"), base["w"])
