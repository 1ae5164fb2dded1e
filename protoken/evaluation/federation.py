"""An in-process federation: FedAvg over clients that really train, every round's updates written to a ledger.

Each round the server sends G_{r-1} to the participants, each trains on its own rows and uploads
delta_k = C_k - G_{r-1} (rounded to the upload's dtype, if one is set, before anybody uses it), and the server forms

    G_r = G_{r-1} + sum_k rho_k delta_k,    rho_k = n_k / sum_j n_j    (McMahan et al., arXiv 1602.05629)

with n_k the client's number of rows. What was averaged is exactly what the ledger holds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from protoken.errors import ArgumentError, NonFiniteError
from protoken.evaluation.corpora import ChatRow
from protoken.evaluation.training import Example, LocalSettings, LocalTrainer, encode_rows, trainable_parameters
from protoken.ledger import ClientUpdate, Ledger

UPLOAD_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the name of the ledger's codec that keeps such an upload without loss."""


@dataclass(frozen=True)
class Turn:
    """From round `number` on a client trains on these rows in place of those it had."""

    number: int
    rows: Sequence[ChatRow]


@dataclass(frozen=True)
class Client:
    """A participant and its rows.

    `alter(delta, round) -> delta` stands between training and upload: an attack, a clipping, a zero update. With a
    `turn` the client changes its rows in a later round.
    """

    id: str
    rows: Sequence[ChatRow]
    poisoned: bool = False
    label: str = ""
    alter: Callable[[Mapping[str, Tensor], int], Mapping[str, Tensor]] | None = None
    turn: Turn | None = None

    def turned(self, number: int) -> bool:
        """Whether it trains on other rows by that round."""
        return self.turn is not None and number >= self.turn.number

    @property
    def all_rows(self) -> dict[bool, Sequence[ChatRow]]:
        """Its rows by `turned`."""
        return {False: self.rows} if self.turn is None else {False: self.rows, True: self.turn.rows}


@dataclass(frozen=True)
class FederationConfig:
    """What is trained and how; the defaults are those of arXiv 2601.19672, all parameters included.

    blocks: learn the linear weights of the last so many blocks; None for every parameter of the model.
    participants: clients drawn per round; None for all.
    upload: dtype a client uploads its update in, one of UPLOAD_DTYPES.
    cache_boundary: remember the hidden states below the trained blocks, t * d * 4 bytes per row.
    """

    rounds: int = 10
    local: LocalSettings = field(default_factory=LocalSettings)
    blocks: int | None = None
    participants: int | None = None
    max_tokens: int = 512
    upload: str = "fp32"
    cache_boundary: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a federation stands. `stage` is "prepare" (round 0), "train", or "round" (a round was committed)."""

    stage: str
    round: int
    rounds: int
    client: str
    done: int
    total: int
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class RoundReport:
    """One round: weight, first and last step's loss per participant (nats per answer token), and seconds."""

    number: int
    weights: dict[str, float]
    first_loss: dict[str, float]
    last_loss: dict[str, float]
    seconds: float


def train_federation(
    model: Any,
    tokenizer: Any,
    clients: Sequence[Client],
    config: FederationConfig,
    *,
    ledger: Ledger | None = None,
    progress: Callable[[Progress], None] | None = None,
    after_round: Callable[[RoundReport], None] | None = None,
) -> list[RoundReport]:
    """Train `model` in place by `config.rounds` rounds of FedAvg; it holds G_R at the end.

    Every round is committed to `ledger`, with the trained parameters on record. The same seed gives the same
    federation on the same machine and number of threads. `after_round` runs while the model holds G_r.

    Raises ArgumentError for an empty or ambiguous federation, NonFiniteError when a client's update diverges; the
    model then holds the last finished round.
    """
    _check(clients, config)
    examples = {
        (client.id, turned): encode_rows(tokenizer, rows, max_tokens=config.max_tokens)
        for client in clients
        for turned, rows in client.all_rows.items()
    }
    names = trainable_parameters(model, config.blocks)
    trainer = LocalTrainer(model, names, cache_boundary=config.cache_boundary)
    tell = progress or (lambda _: None)
    _prepare(trainer, clients, examples, config, tell)
    draw = random.Random(f"participants:{config.seed}")
    reports = []
    for number in range(1, config.rounds + 1):
        chosen = sorted(draw.sample(range(len(clients)), config.participants or len(clients)))
        report = _round(number, trainer, [clients[i] for i in chosen], examples, config, ledger, tell)
        reports.append(report)
        if after_round is not None:
            after_round(report)
    return reports


def _prepare(
    trainer: LocalTrainer,
    clients: Sequence[Client],
    examples: Mapping[tuple[str, bool], list[Example]],
    config: FederationConfig,
    tell: Callable[[Progress], None],
) -> None:
    for client in clients:

        def step(done: int, total: int, client: Client = client) -> None:
            tell(Progress("prepare", 0, config.rounds, client.id, done, total))

        for turned in client.all_rows:
            trainer.prepare(examples[client.id, turned], step=step)


def _round(
    number: int,
    trainer: LocalTrainer,
    clients: Sequence[Client],
    examples: Mapping[tuple[str, bool], list[Example]],
    config: FederationConfig,
    ledger: Ledger | None,
    tell: Callable[[Progress], None],
) -> RoundReport:
    start = time.perf_counter()
    base = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    mean = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in base.items()}
    rows = {client.id: len(client.all_rows[client.turned(number)]) for client in clients}
    weights = {client: count / sum(rows.values()) for client, count in rows.items()}
    report = RoundReport(number, weights, {}, {}, 0.0)

    def run(add: Callable[[ClientUpdate], object]) -> None:
        for client in clients:

            def step(done: int, total: int, loss: float, client: Client = client) -> None:
                tell(Progress("train", number, config.rounds, client.id, done, total, loss))

            _set(trainer.parameters, base)
            losses = trainer.train(
                examples[client.id, client.turned(number)],
                config.local,
                seed=_seed(config.seed, number, client.id),
                step=step,
            )
            report.first_loss[client.id], report.last_loss[client.id] = losses[0], losses[-1]
            delta = _upload(client, number, trainer.parameters, base, UPLOAD_DTYPES[config.upload])
            weight = report.weights[client.id]
            for name, tensor in delta.items():
                mean[name].add_(tensor.float(), alpha=weight)
            add(ClientUpdate(client.id, weight, delta=delta, examples=rows[client.id]))

    try:
        if ledger is None:
            run(lambda _: None)
            after = _aggregate(base, mean)
        else:
            with ledger.begin_round(base, rule="fedavg", codec=config.upload) as writer:
                run(writer.add)
                after = _aggregate(base, mean)
                writer.commit(after)
    except BaseException:
        _set(trainer.parameters, base)
        raise
    _set(trainer.parameters, after)
    tell(Progress("round", number, config.rounds, "", number, config.rounds))
    return RoundReport(number, report.weights, report.first_loss, report.last_loss, time.perf_counter() - start)


def _upload(
    client: Client,
    number: int,
    parameters: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """What client k sends: delta_k = C_k - G_{r-1} in float32, altered if the client alters it, then rounded."""
    delta: Mapping[str, Tensor] = {
        name: parameter.detach().float() - base[name].float() for name, parameter in parameters.items()
    }
    if client.alter is not None:
        delta = client.alter(delta, number)
    sent = {name: tensor.to(dtype) for name, tensor in delta.items()}
    bad = [name for name, tensor in sent.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise NonFiniteError(
            f"update of {client.id} in round {number}",
            expected="finite numbers",
            got=f"NaN or infinity in {bad[0]} and {len(bad) - 1} others",
            remedy="Lower the learning rate",
        )
    return sent


def _aggregate(base: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: (tensor.float() + mean[name]).to(tensor.dtype) for name, tensor in base.items()}


@torch.no_grad()
def _set(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _seed(seed: int, number: int, client: str) -> int:
    """A seed per round and client that does not depend on who else takes part."""
    return random.Random(f"{seed}:{number}:{client}").getrandbits(62)


def _check(clients: Sequence[Client], config: FederationConfig) -> None:
    ids = [client.id for client in clients]
    if not ids or len(set(ids)) < len(ids):
        raise ArgumentError("clients", expected="at least one client, each with an id of its own", got=ids)
    empty = [client.id for client in clients if not all(client.all_rows.values())]
    if empty:
        raise ArgumentError("clients", expected="rows for every client", got=f"none for {empty}")
    if config.participants is not None and not 1 <= config.participants <= len(ids):
        raise ArgumentError(
            "participants", expected=f"1 to {len(ids)} (the number of clients)", got=config.participants
        )
    if config.rounds < 1 or config.local.epochs < 1 or config.local.batch_size < 1:
        raise ArgumentError(
            "config",
            expected="at least one round, one local epoch, and one row a batch",
            got=f"{config.rounds}, {config.local.epochs} and {config.local.batch_size}",
        )
    if config.upload not in UPLOAD_DTYPES:
        raise ArgumentError("upload", expected=f"one of {', '.join(UPLOAD_DTYPES)}", got=repr(config.upload))
