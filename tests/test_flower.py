"""Flower's real strategies and messages in one process: every round in the ledger, exact where the server is linear."""

from __future__ import annotations

import io
import logging
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip(
    "flwr", reason="flwr pins older typer and rich; `make flower` runs this in an environment of its own"
)

from flower_federation import SHAPES, Grid, answer, arrays, record_of, train
from flwr.app import Array, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.server import strategy as older
from flwr.serverapp import strategy as flower

from protoken.errors import ArgumentError, LedgerMismatchError, NonFiniteError, ProtokenError, ProtokenWarning
from protoken.integrations.flower import identified, record
from protoken.ledger import Ledger
from protoken.ledger.verification import verify

logging.getLogger("flwr").setLevel(logging.ERROR)

# name: (settings, rule in the ledger, largest relative residual)
STRATEGIES: dict[str, tuple[dict[str, Any], str, float]] = {
    "FedAvg": ({}, "fedavg", 1e-5),
    "FedProx": ({"proximal_mu": 0.1}, "fedprox", 1e-5),
    "FedAvgM": ({"server_momentum": 0.9, "server_learning_rate": 0.7}, "fedavgm", 1e-5),
    "FedAdam": ({}, "fedadam", 3e-5),
    "FedYogi": ({}, "fedyogi", 3e-5),
    "FedAdagrad": ({}, "fedadagrad", 3e-5),
    "Krum": ({"num_malicious_nodes": 1}, "krum", 1e-5),
    "MultiKrum": ({"num_malicious_nodes": 1, "num_nodes_to_select": 3}, "krum", 1e-5),
    "QFedAvg": ({"client_learning_rate": 0.1, "q": 0.2}, "qfedavg", 1e-5),
    "FedMedian": ({}, "median", 10.0),
    "FedTrimmedAvg": ({"beta": 0.2}, "trimmed-mean", 10.0),
    "Bulyan": ({"num_malicious_nodes": 1}, "bulyan", 10.0),
}
NAMES = list(SHAPES)


def run(strategy: Any, grid: Grid, rounds: int = 3, start: dict[str, np.ndarray] | None = None) -> Any:
    random.seed(0)  # Flower samples nodes with it
    return strategy.start(grid, record_of(start or arrays(0)), num_rounds=rounds)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_round_of_every_strategy_lands_in_the_ledger_and_adds_up(name: str, tmp_path: Path) -> None:
    settings, rule, limit = STRATEGIES[name]
    strategy = record(getattr(flower, name)(**settings), tmp_path / "ledger", model="m")
    result = run(strategy, Grid(8))
    ledger = Ledger.open(tmp_path / "ledger")
    assert verify(ledger.path, conservation=True).problems == []
    assert (ledger.model, ledger.rounds) == ("m", (1, 2, 3))
    for read in ledger.select("all"):
        assert read.rule == rule
        assert sorted(c.client for c in read.clients) == [f"client-{i}" for i in range(1, 9)]
        assert max(read.relative_residual.values()) <= limit
        assert read.metadata["flower"] == {"server_round": read.number, "strategy": name}
    # What the ledger says the rounds changed is what came out of the run.
    for parameter, before in arrays(0).items():
        moved = sum(ledger.round(n).change(parameter) for n in ledger.rounds)
        torch.testing.assert_close(
            moved.numpy() + before, result.arrays[parameter].numpy().astype(np.float32), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_recorded_strategy_computes_exactly_what_it_would_alone(name: str, tmp_path: Path) -> None:
    settings = STRATEGIES[name][0]
    recorded = run(record(getattr(flower, name)(**settings), tmp_path / "ledger"), Grid(8))
    alone = run(getattr(flower, name)(**settings), Grid(8))
    for parameter in SHAPES:
        assert recorded.arrays[parameter].data == alone.arrays[parameter].data
    assert recorded.train_metrics_clientapp == alone.train_metrics_clientapp


def test_weights_are_shares_of_examples_and_updates_what_clients_sent(tmp_path: Path) -> None:
    strategy = record(flower.FedAvg(), tmp_path / "ledger")
    run(strategy, Grid(3), rounds=1)
    read = strategy.ledger.round(1)
    assert {c.client: (c.weight, c.examples) for c in read.clients} == {
        "client-1": (10 / 60, 10), "client-2": (20 / 60, 20), "client-3": (30 / 60, 30),
    }  # fmt: skip
    sent = arrays(0)
    for name, moved in arrays(100 + 2, 0.1).items():
        expected = (sent[name] + moved).astype(np.float64) - sent[name]
        assert np.array_equal(read.delta("client-2", name).numpy(), expected.astype(np.float32))


def test_partial_participation_and_momentum_of_clients_that_sat_out(tmp_path: Path) -> None:
    plain = record(flower.FedAvg(fraction_train=0.5), tmp_path / "plain")
    run(plain, Grid(6), rounds=4)
    counts = [len(read.clients) for read in plain.ledger.select("all")]
    assert counts == [3, 3, 3, 3]
    assert len(plain.ledger.clients) > 3
    momentum = record(flower.FedAvgM(fraction_train=0.5, server_momentum=0.9), tmp_path / "momentum")
    run(momentum, Grid(6), rounds=4)
    last = momentum.ledger.round("last")
    trained = set(last.metadata["server"]["weights"])
    sat_out = [c for c in last.clients if c.client not in trained]
    assert len(trained) == 3
    assert sat_out
    assert all(c.norm > 0 and c.examples is None for c in sat_out)
    assert max(last.relative_residual.values()) < 1e-5


def test_failed_and_silent_nodes_are_named_and_the_round_stands(tmp_path: Path) -> None:
    def answers(node: int, sent: dict[str, np.ndarray], server_round: int) -> Any:
        if server_round == 2 and node == 1:
            return Error(code=0, reason="out of memory")
        return None if server_round == 2 and node == 2 else train(node, sent, server_round)

    strategy = record(flower.FedAvg(), tmp_path / "ledger")
    run(strategy, Grid(4, answers))
    notes = [read.metadata["flower"] for read in strategy.ledger.select("all")]
    assert notes[1] == {"server_round": 2, "strategy": "FedAvg", "failed": ["client-1"], "silent": ["client-2"]}
    assert set(notes[2]) == {"server_round", "strategy"}
    assert [len(read.clients) for read in strategy.ledger.select("all")] == [4, 2, 4]


def test_a_round_without_an_aggregate_is_no_round_and_the_next_one_says_so(tmp_path: Path) -> None:
    def answers(node: int, sent: dict[str, np.ndarray], server_round: int) -> Any:
        return Error(code=0, reason="down") if server_round == 2 else train(node, sent, server_round)

    strategy = record(flower.FedAvg(), tmp_path / "ledger")
    run(strategy, Grid(3, answers))
    assert [r.metadata["flower"]["server_round"] for r in strategy.ledger.select("all")] == [1, 3]
    assert strategy.ledger.round(2).metadata["flower"]["not_recorded"] == [2]
    assert verify(strategy.ledger.path).ok


class Careful(flower.FedAvg):
    """Somebody's own strategy: leaves out replies with NaN."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        good = [r for r in replies if np.isfinite(r.content["arrays"][NAMES[0]].numpy()).all()]
        return super().aggregate_train(server_round, good)


def broken(node: int, sent: dict[str, np.ndarray], server_round: int) -> Any:
    content = train(node, sent, server_round)
    if node == 2:
        content["arrays"][NAMES[0]] = Array(np.full(SHAPES[NAMES[0]], np.nan, np.float32))
    return content


def test_a_bad_update_is_kept_and_flagged_while_the_others_stay_traceable(tmp_path: Path) -> None:
    strategy = record(Careful(), tmp_path / "ledger")
    run(strategy, Grid(4, broken), rounds=2)
    for read in strategy.ledger.select("all"):
        assert [c.client for c in read.clients if c.quarantined is not None] == ["client-2"]
        assert "finite numbers" in str(read.client("client-2").quarantined)
        assert len(read.usable) == 3
        assert read.rule == "fedavg"
        # The strategy renormalised over three; recorded are the shares of four, and the rest is shown.
        assert 0.05 < max(read.relative_residual.values()) < 1


def test_nan_that_was_averaged_stops_the_run_or_is_left_out_as_told(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="aggregate"):
        run(record(flower.FedAvg(), tmp_path / "ledger"), Grid(3, broken))

    def once(node: int, sent: dict[str, np.ndarray], server_round: int) -> Any:
        start = arrays(7) if server_round == 3 else sent  # the operators put the model right
        return (broken if server_round == 2 else train)(node, start, server_round)

    strategy = record(flower.FedAvg(), tmp_path / "other", on_error="warn")
    with pytest.warns(ProtokenWarning, match="round 2 is not in the ledger"):
        run(strategy, Grid(3, once), rounds=2)
    run(strategy, Grid(3), rounds=1, start=arrays(7))
    assert [r.manifest.gap for r in strategy.ledger.select("all")] == [False, True]
    assert strategy.ledger.round(2).metadata["flower"]["not_recorded"] == [2]


def test_clipped_updates_are_recorded_as_applied_and_noise_is_residual(tmp_path: Path) -> None:
    inner = flower.FedAvg(min_train_nodes=4, min_available_nodes=4)
    private = flower.DifferentialPrivacyServerSideFixedClipping(inner, 0.5, 0.3, 4)

    def equal(node: int, sent: dict[str, np.ndarray], server_round: int) -> Any:
        moved = arrays(100 * server_round + node, 0.1)
        return answer({n: sent[n] + moved[n] for n in sent}, f"client-{node}", 10)

    strategy = record(private, tmp_path / "ledger")
    run(strategy, Grid(4, equal), rounds=1)
    read = strategy.ledger.round(1)
    assert read.metadata["flower"]["strategy"] == "DifferentialPrivacyServerSideFixedClipping of FedAvg"
    assert (read.rule, [round(c.norm, 3) for c in read.clients]) == ("fedavg", [0.3] * 4)
    noise = torch.cat([read.residual(n).reshape(-1) for n in NAMES])
    assert 0.5 < float(noise.std()) / (0.5 * 0.3 / 4) < 1.5


def test_ids_are_the_clients_own_checked_and_never_shared(tmp_path: Path) -> None:
    def answers(node: int, sent: dict[str, np.ndarray], server_round: int) -> Any:
        claimed = {1: "ann", 2: "ann", 3: "\x1b[2J", 4: None, 5: "ANN", 6: "bea" if server_round == 1 else "cid"}
        return answer(train(node, sent, server_round)["arrays"] and {n: sent[n] + 0.01 * node for n in sent},
                      claimed[node])  # fmt: skip

    strategy = record(flower.FedAvg(), tmp_path / "ledger")
    with pytest.warns(ProtokenWarning) as caught:
        run(strategy, Grid(6, answers), rounds=2)
    found = [sorted(c.client for c in read.clients) for read in strategy.ledger.select("all")]
    assert found[0] == found[1]
    assert len(set(found[0])) == 6
    assert sum(name.lower() == "ann" for name in found[0]) == 1
    assert "bea" in found[0]
    assert "cid" not in found[0]
    assert {"node-3", "node-4"} <= set(found[0])
    said = " | ".join(str(warning.message) for warning in caught)
    assert "\x1b" not in said
    assert "use ClientApp(mods=[identified()])" in said
    assert "as node" in said


def test_ids_of_another_spelling_than_the_ledgers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    first = run(record(flower.FedAvg(), path), Grid(2), rounds=1)

    def shouting(node: int, sent: dict[str, np.ndarray], server_round: int) -> Any:
        return answer({n: sent[n] + 0.1 for n in sent}, f"CLIENT-{node}")

    again = record(flower.FedAvg(), path)
    with pytest.warns(ProtokenWarning, match="the ledger knows client-"):
        run(again, Grid(2, shouting), rounds=1, start={n: a.numpy() for n, a in first.arrays.items()})
    assert sorted(c.client for c in again.ledger.round(2).clients) == ["node-1", "node-2"]


def test_the_server_may_decide_who_is_who(tmp_path: Path) -> None:
    strategy = record(
        flower.FedAvg(), tmp_path / "ledger", client_id=lambda reply: f"bank-{reply.metadata.src_node_id}"
    )
    run(strategy, Grid(2), rounds=1)
    assert sorted(strategy.ledger.clients) == ["bank-1", "bank-2"]


def test_a_run_goes_on_where_the_ledger_ended_or_says_that_it_does_not(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    first = run(record(flower.FedAvg(), path), Grid(2), rounds=2)
    run(record(flower.FedAvg(), path), Grid(2), 1, {n: a.numpy() for n, a in first.arrays.items()})
    assert Ledger.open(path).rounds == (1, 2, 3)
    with pytest.raises(LedgerMismatchError, match="allow_gap"):
        run(record(flower.FedAvg(), path), Grid(2), rounds=1)
    run(record(flower.FedAvg(), path, allow_gap=True), Grid(2), rounds=2)
    assert [r.manifest.gap for r in Ledger.open(path).select("all")] == [False, False, False, True, False]


def test_arrays_that_are_pickles_or_no_numbers_are_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "opened").touch, ())

    stream = io.BytesIO()
    np.save(stream, np.array([Bomb()], dtype=object), allow_pickle=True)

    class Lenient(flower.FedAvg):
        """Averages the clients it knows to be good."""

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            return super().aggregate_train(server_round, [r for r in replies if r.metadata.src_node_id > 3])

    def answers(node: int, sent: dict[str, np.ndarray], server_round: int) -> Any:
        content = train(node, sent, server_round)
        if node <= 3:
            data = {1: stream.getvalue(), 2: pickle.dumps(Bomb()), 3: b"PK\x03\x04"}[node]
            content["arrays"][NAMES[0]] = Array("float32", SHAPES[NAMES[0]], "numpy.ndarray", data)
        return content

    strategy = record(Lenient(), tmp_path / "ledger")
    run(strategy, Grid(5, answers), rounds=1)
    assert not (tmp_path / "opened").exists()
    flagged = {c.client for c in strategy.ledger.round(1).clients if c.quarantined is not None}
    assert flagged == {"client-1", "client-2", "client-3"}


def test_chosen_parameters_and_a_codec(tmp_path: Path) -> None:
    strategy = record(flower.FedAvg(), tmp_path / "ledger", parameters=["*_proj.weight"], codec="bf16")
    run(strategy, Grid(2), rounds=2)
    read = strategy.ledger.round(2)
    assert set(read.parameters) == {"layers.0.o_proj.weight", "layers.0.down_proj.weight"}
    assert read.codec == "bf16"
    assert read.layout("client-1", NAMES[0]) == "bf16"


def test_counters_beside_the_weights_are_left_alone(tmp_path: Path) -> None:
    def counted(node: int, sent: dict[str, np.ndarray], server_round: int) -> Any:
        moved = {n: a + np.asarray(node, a.dtype) for n, a in sent.items()}
        return answer(moved, f"client-{node}")

    strategy = record(flower.FedAvg(), tmp_path / "ledger")
    run(strategy, Grid(2, counted), rounds=1, start={**arrays(0), "steps": np.array([5], np.int64)})
    assert sorted(strategy.ledger.round(1).parameters) == sorted(SHAPES)


def test_a_signed_ledger_is_signed_round_by_round(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from protoken.ledger.signatures import generate_key, public_hex

    key = generate_key()
    run(record(flower.FedAvg(), tmp_path / "ledger", signing_key=key), Grid(2), rounds=2)
    report = verify(tmp_path / "ledger", server_key=public_hex(key))
    assert (report.ok, report.signed) == (True, 2)


def test_what_is_returned_stands_in_for_the_strategy(tmp_path: Path) -> None:
    class Counting(flower.FedAvg):
        """Overrides the loop itself, and keeps state on itself."""

        def start(self, *arguments: Any, **named: Any) -> Any:
            self.started = getattr(self, "started", 0) + 1
            return super().start(*arguments, **named)

    inner = Counting()
    strategy = record(inner, tmp_path / "ledger")
    assert isinstance(strategy, flower.FedAvg)
    run(strategy, Grid(2), rounds=2)
    assert inner.started == strategy.started == 1
    strategy.fraction_train = 0.5
    assert inner.fraction_train == 0.5
    assert strategy.ledger.rounds == (1, 2)
    assert "record(" in repr(strategy)
    assert vars(inner).keys() == vars(Counting()).keys() | {"started"}
    with pytest.raises(ArgumentError, match="a strategy of Flower, got dict"):
        record({}, tmp_path / "other")
    with pytest.raises(ArgumentError, match=r"one of raise, warn, got .ignore."):
        record(inner, tmp_path / "other", on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        strategy.nothing_of_this_name  # noqa: B018


# ---- the client's side ---------------------------------------------------------------------------------------------


def reply_of(node_config: dict[str, Any], *given: str) -> Any:
    app = ClientApp(mods=[identified(*given)])

    @app.train()
    def trained(message: Message, context: Context) -> Message:
        return Message(answer(arrays(0), None), reply_to=message)

    Grid(1)
    message = Message(
        RecordDict({"arrays": record_of(arrays(0)), "config": ConfigRecord()}), dst_node_id=1, message_type="train"
    )
    return app(message, Context(1, 1, node_config, RecordDict(), {}))


def test_a_client_gives_its_configured_id_or_its_partition() -> None:
    assert reply_of({"client-id": "clinic-a", "partition-id": 3}).content["protoken"]["client-id"] == "clinic-a"
    assert reply_of({"partition-id": 3}).content["protoken"]["client-id"] == "partition-3"
    assert reply_of({}, "clinic-b").content["protoken"]["client-id"] == "clinic-b"
    with pytest.raises(ProtokenError, match="Start the node with --node-config"):
        reply_of({})


# ---- the older API -------------------------------------------------------------------------------------------------


class Proxy:
    """The part of a ClientProxy that strategies look at."""

    def __init__(self, cid: str) -> None:
        self.cid = cid


class Manager:
    """The part of a ClientManager that strategies look at."""

    def __init__(self, count: int) -> None:
        self.proxies = [Proxy(str(i)) for i in range(1, count + 1)]

    def num_available(self) -> int:
        return len(self.proxies)

    def sample(self, num_clients: int, min_num_clients: int | None = None, criterion: Any = None) -> list[Proxy]:
        return self.proxies[:num_clients]


def fit(strategy: Any, rounds: int, count: int = 4, same: bool = False) -> Any:
    """Flower's older server loop, with clients that answer at once."""
    parameters, manager = ndarrays_to_parameters(list(arrays(0).values())), Manager(count)
    for server_round in range(1, rounds + 1):
        asked = strategy.configure_fit(server_round, parameters, manager)
        results = []
        for proxy, instruction in asked:
            sent = [np.load(io.BytesIO(data)) for data in instruction.parameters.tensors]
            moved = arrays(100 * server_round + int(proxy.cid), 0.1).values()
            given = ndarrays_to_parameters([a + b for a, b in zip(sent, moved, strict=True)])
            metrics = {"client-id": f"client-{proxy.cid}", "loss": 0.5}
            results.append((proxy, FitRes(Status(Code.OK, ""), given, 10 * int(proxy.cid), metrics)))
        if same:  # as SecAggPlusWorkflow hands them over
            for _, result in results:
                result.parameters = results[0][1].parameters
        parameters, _ = strategy.aggregate_fit(server_round, results, [RuntimeError("gone")])
    return parameters


OLDER: dict[str, tuple[dict[str, Any], str, float]] = {
    "FedAvg": ({}, "fedavg", 1e-5),
    "FedProx": ({"proximal_mu": 0.1}, "fedprox", 1e-5),
    "FedAvgM": ({"server_momentum": 0.9}, "fedavgm", 1e-5),
    "FedAdam": ({}, "fedadam", 3e-5),
    "FedYogi": ({}, "fedyogi", 3e-5),
    "Krum": ({"num_malicious_clients": 1}, "krum", 1e-5),
    "FedMedian": ({}, "median", 10.0),
}


@pytest.mark.parametrize("name", OLDER)
def test_strategies_of_the_older_api(name: str, tmp_path: Path) -> None:
    settings, rule, limit = OLDER[name]
    if name in ("FedAvgM", "FedAdam", "FedYogi"):
        settings = {**settings, "initial_parameters": ndarrays_to_parameters(list(arrays(0).values()))}
    strategy = record(getattr(older, name)(**settings), tmp_path / "ledger", names=NAMES)
    assert isinstance(strategy, older.Strategy)
    out = fit(strategy, 3)
    alone = fit(getattr(older, name)(**settings), 3)
    assert out.tensors == alone.tensors
    for read in Ledger.open(tmp_path / "ledger").select("all"):
        assert (read.rule, sorted(read.parameters)) == (rule, sorted(NAMES))
        assert max(read.relative_residual.values()) <= limit
        assert sorted(c.client for c in read.clients) == [f"client-{i}" for i in range(1, 5)]
        assert read.metadata["flower"]["failed"] == ["node-unknown"]
    assert verify(tmp_path / "ledger", conservation=True).ok


def test_secure_aggregation_is_recorded_as_one_group_and_never_guessed(tmp_path: Path) -> None:
    strategy = record(older.FedAvg(), tmp_path / "ledger", names=NAMES)
    fit(strategy, 1, same=True)
    read = strategy.ledger.round(1)
    assert read.rule == "secure-aggregation"
    assert [c.client for c in read.clients] == ["secure-aggregation-group"]
    assert read.metadata["groups"] == {"secure-aggregation-group": [f"client-{i}" for i in range(1, 5)]}
    assert max(read.relative_residual.values()) < 1e-5


def test_names_that_do_not_fit_the_arrays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="names: expected one for each of the 3 arrays, got 2"):
        fit(record(older.FedAvg(), tmp_path / "ledger", names=NAMES[:2]), 1)
