"""Updates summed over rounds as they are read: equal to the rounds one by one, in memory that rounds do not add to."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import live_bytes
from tiny_federation import TinyFederation, tiny_federation
from tiny_models import tiny_model
from tolerances import close

import protoken
from protoken.banks import lineage_sums
from protoken.banks.bank import LedgerBank
from protoken.banks.layer_bank import Stored
from protoken.banks.lineage_sums import RunningSum
from protoken.ledger import ClientUpdate, Ledger, LowRank, chain
from protoken.ledger.lineage import lineage_change, lineage_clients, lineage_delta
from protoken.ledger.manifest import ClientRecord
from protoken.models.layers import layer_of

PROMPT = [5, 17, 42, 8]
LAYERS = ("model.layers.3.self_attn.o_proj", "model.layers.3.mlp.down_proj")


def adapters(path: Path, rounds: int, clients: int = 6, rank: int = 8, codec: str = "fp32") -> TinyFederation:
    """Adapters of rank 8 (a third of the layers' width), of which every round some clients sit out."""
    model = tiny_model("llama")
    names = [f"{name}.weight" for name in LAYERS]
    generator = torch.Generator().manual_seed(0)
    ledger = Ledger.create(path, model="tiny")
    for number in range(rounds):
        base = {n: model.get_parameter(n).detach().clone() for n in names}
        present = [k for k in range(clients) if (k + number) % 3]
        given = []
        for k in present:
            delta: dict[str, Any] = {}
            for n, before in base.items():
                a = torch.randn(rank, before.shape[1], generator=generator) * 0.05
                delta[n] = LowRank(a, torch.randn(before.shape[0], rank, generator=generator) * 0.05)
                if codec != "fp32":
                    delta[n] = delta[n].dense()
            given.append(ClientUpdate(f"c{k}", 1 / len(present), delta=delta))
        with torch.no_grad():
            for n, before in base.items():
                change = sum(u.weight * (v.dense() if isinstance(v := u.delta[n], LowRank) else v) for u in given)
                model.get_parameter(n).copy_(before + change)
        after = {n: model.get_parameter(n).detach().clone() for n in names}
        ledger.commit_round(base, after, given, keep_residual="never", codec=codec)
    return TinyFederation(model, path)


def equals_lineage(federation: TinyFederation, layers: tuple[str, ...], rounds: tuple[int, ...]) -> None:
    ledger = federation.ledger
    records = [ledger.round(number) for number in rounds]
    bank = LedgerBank(ledger, federation.model, layers, rounds).read(federation.model, layers)
    assert bank.clients == lineage_clients(records)
    for name in layers:
        layer = layer_of(federation.model, name)
        expected = [lineage_delta(records, client, layer.parameter) for client in bank.clients]
        for found, wanted in zip(bank.deltas[name], expected, strict=True):
            close(found, wanted.mT if layer.transposed else wanted, torch.float32)
        change = lineage_change(records, layer.parameter)
        close(bank.change[name], change.mT if layer.transposed else change, torch.float32)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "lowrank-4"])
@pytest.mark.parametrize("rounds", [(1, 2), (2, 3, 5), (1, 2, 3, 4, 5)])
def test_sums_of_any_rounds_are_the_rounds_one_by_one(tmp_path: Path, codec: str, rounds: tuple[int, ...]) -> None:
    equals_lineage(adapters(tmp_path / "ledger", 5, codec=codec), LAYERS, rounds)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_sums_of_layers_that_lie_otherwise(tmp_path: Path, family: str) -> None:
    federation = tiny_federation(tmp_path, family, rounds=3)
    layers = protoken.trace(federation.model, PROMPT, ledger=federation.path, max_new_tokens=1).info.layers
    equals_lineage(federation, tuple(layers), (1, 2, 3))


def test_factors_of_a_transposed_layer_are_added_up_upright() -> None:
    layer = layer_of(tiny_model("gpt2"), "transformer.h.3.mlp.c_proj")
    assert layer.transposed
    torch.manual_seed(0)
    own, expected = RunningSum(layer), torch.zeros(layer.rows, layer.columns)
    for number in range(12):
        factors = LowRank(torch.randn(5, layer.columns), torch.randn(layer.rows, 5), 0.5)
        own.add(0.1 * number, Stored(factors=factors))
        expected += 0.1 * number * factors.dense()
        assert (own.found().factors is None) == ((number + 1) * 5 * sum(expected.shape) >= expected.numel())
        close(own.found().matrix(transposed=True), expected, torch.float32)


def test_nothing_sums_to_zeros() -> None:
    layer = layer_of(tiny_model("llama"), LAYERS[0])
    assert torch.equal(RunningSum(layer).found().matrix(transposed=False), torch.zeros(layer.shape))


class Watched:
    """Most client records alive while a round is added, and most bytes of tensors, over one reading of a bank."""

    def __init__(self, federation: TinyFederation, monkeypatch: pytest.MonkeyPatch) -> None:
        self.records, add_round = 0, lineage_sums.add_round

        def watched(*arguments: Any, **options: Any) -> None:
            add_round(*arguments, **options)
            gc.collect()
            self.records = max(self.records, sum(type(one) is ClientRecord for one in gc.get_objects()))

        before = sum(type(one) is ClientRecord for one in gc.get_objects())
        ledger = federation.ledger
        with monkeypatch.context() as patch, live_bytes() as live:
            patch.setattr("protoken.banks.bank.add_round", watched)
            LedgerBank(ledger, federation.model, LAYERS, ledger.rounds).read(federation.model, LAYERS)
        self.records -= before
        self.bytes = live.peak


def test_memory_does_not_grow_with_the_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "CLIENT_CACHE", 12)
    few, many = (adapters(tmp_path / f"of-{rounds}", rounds) for rounds in (8, 24))
    once, thrice = Watched(few, monkeypatch), Watched(many, monkeypatch)
    assert 0 < once.records <= 16
    assert thrice.records <= once.records
    assert 0 < thrice.bytes <= once.bytes


def test_the_bench_of_scale_reports_what_it_wrote(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "bench/bench_ledger_scale.py"
    command = [sys.executable, str(script), "--clients", "3", "--rounds", "2", "--folder", str(tmp_path)]
    for _ in range(2):  # writes, then reads what lies there
        done = subprocess.run([*command, "--json", str(tmp_path / "found.json")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads((tmp_path / "found.json").read_text("utf-8"))
        assert (found["clients"], found["rounds"], found["shards"]) == (3, 2, 8)
        assert found["bytes"] == sum(file.stat().st_size for file in (tmp_path / "ledger").rglob("*.safetensors"))
        assert all(found[step]["seconds"] >= 0 for step in ("open", "list", "trace last", "trace all", "verify"))
