"""What experiments work with: corpora, base models, trained federations. Each is made once and used by all units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from protoken.errors import ArgumentError
from protoken.evaluation.base_model import BaseModel
from protoken.evaluation.corpora import ChatRow, partition, poison
from protoken.evaluation.federation import Client, FederationConfig, Progress, RoundReport
from protoken.evaluation.federation_store import StoredFederation, federate
from protoken.evaluation.progress import Bars
from protoken.evaluation.runs import Settings
from protoken.evaluation.sources import TEST_ROWS, DomainRows, read_corpus, split
from protoken.evaluation.training import LocalSettings, trainable_parameters
from protoken.evaluation.zoo import QUICK_MODEL, SMOLLM2, load_model

# Rows set aside for clients: what the largest federation needs (55 clients of 24 rows), or half of a small corpus.
_CLIENT_ROWS = 1320


@dataclass(frozen=True)
class Recipe:
    """How a model is federated and asked: sizes that this model can be given within minutes on a core or two.

    rows             of every client
    federation       rounds, local training, trained blocks; see FederationConfig
    max_new_tokens   of an answer, at most 32 as in arXiv 2601.19672
    batch            prompts answered at a time
    """

    rows: int
    federation: FederationConfig
    max_new_tokens: int = 32
    batch: int = 32


def recipe_of(model: str, seed: int) -> Recipe:
    """The recipe of a model of the zoo."""
    if model == SMOLLM2:
        local = LocalSettings(epochs=1, batch_size=4, learning_rate=1e-3, warmup_steps=1)
        config = FederationConfig(rounds=10, local=local, blocks=2, max_tokens=160, upload="bf16", seed=seed)
        return Recipe(16, config, max_new_tokens=20, batch=12)
    if model == QUICK_MODEL:
        local = LocalSettings(epochs=4, batch_size=4, learning_rate=3e-3, warmup_steps=2)
        return Recipe(24, FederationConfig(rounds=5, local=local, max_tokens=160, seed=seed), max_new_tokens=24)
    local = LocalSettings(epochs=2, batch_size=4, learning_rate=2e-3, warmup_steps=2)
    return Recipe(24, FederationConfig(rounds=10, local=local, max_tokens=160, seed=seed), max_new_tokens=24)


@dataclass
class Workbench:
    """Caches of one run; one base model is in memory at a time.

    cache    base models and federations on disk, shared by all experiments
    """

    settings: Settings
    cache: Path
    bars: Bars = field(default_factory=Bars)

    def __post_init__(self) -> None:
        self._domains: dict[str, DomainRows] = {}
        self._base: BaseModel | None = None
        self._base_name = ""
        self._pristine: dict[str, Tensor] = {}
        self._at: tuple[Path, int] | None = None

    # ---- rows --------------------------------------------------------------------------------------------

    def rows(self, domain: str) -> DomainRows:
        """A domain's rows, cut into pretraining, clients and test.

        Raises:
            ArgumentError: the corpus holds no such domain, or too few rows.
        """
        found = self._all_rows()
        if domain not in found:
            raise ArgumentError("domains", expected=f"one of {', '.join(found)} in this corpus", got=domain)
        return found[domain]

    def _all_rows(self) -> dict[str, DomainRows]:
        if not self._domains:
            seed = self.settings.seed
            test = max(TEST_ROWS, self.settings.samples)
            for name, rows in read_corpus(self.settings.corpus, seed=seed).items():
                clients = min(_CLIENT_ROWS, max(len(rows) - test, 0) // 2)
                self._domains[name] = split(rows, name, clients=clients, seed=seed, test=test)
        return self._domains

    def client_rows(self, domain: str, count: int) -> list[ChatRow]:
        """The first `count` of a domain's rows for clients.

        Raises:
            ArgumentError: there are not so many.
        """
        rows = self.rows(domain).clients
        if count > len(rows):
            raise ArgumentError("corpus", expected=f"{count} rows for the clients of {domain}", got=len(rows))
        return list(rows[:count])

    def poisoned_federation(self, domain: str, clients: int, poisoned: int, rows: int) -> list[Client]:
        """`clients` of one domain with `rows` rows each (IID), the first `poisoned` of them poisoned."""
        shares = partition(self.client_rows(domain, clients * rows), clients, seed=self.settings.seed)
        width = len(str(clients - 1))
        return [
            Client(f"client-{k:0{width}d}", poison(share) if k < poisoned else share, k < poisoned, domain)
            for k, share in enumerate(shares)
        ]

    # ---- models ------------------------------------------------------------------------------------------

    def base(self, name: str) -> BaseModel:
        """The base model of that name; it holds whatever weights it was given last."""
        if self._base is None or self._base_name != name:
            self._base, self._pristine, self._at = None, {}, None
            corpora = {domain: part.pretraining for domain, part in self._all_rows().items()}

            def step(done: int, total: int, loss: float) -> None:
                self.bars.step(f"pretraining {name}", done, total, f"loss {loss:.2f}")

            self._base = load_model(name, corpora, self.cache, seed=self.settings.seed, step=step, say=self.bars.say)
            self._base_name = name
        return self._base

    def federation(self, model: str, clients: Sequence[Client], config: FederationConfig) -> StoredFederation:
        """The federation of these clients around a model of the zoo, trained if it was never before."""
        base = self.base(model)
        self._restore(base)
        self._remember(base, config.blocks)

        def progress(event: Progress) -> None:
            note = "" if event.loss is None else f"loss {event.loss:.2f}"
            if event.stage != "round":
                text = f"{model}: round {event.round} of {event.rounds}, {event.client}"
                self.bars.step(text, event.done, event.total, note)

        def after(report: RoundReport) -> None:
            self.bars.say(f"{model}: round {report.number} trained in {report.seconds:.1f} s")

        stored = federate(
            self.cache / "federations",
            base,
            clients,
            config,
            progress=progress,
            after_round=after,
            snapshots=True,
        )
        self._at = (stored.folder, config.rounds)
        return stored

    def at_round(self, model: str, stored: StoredFederation, number: int) -> BaseModel:
        """The base model's object with the weights that the federation had after a round; 0 for before the first."""
        base = self.base(model)
        if self._at != (stored.folder, number):
            self._restore(base)
            if number:
                stored.set_round(base.model, number)
            self._at = (stored.folder, number)
        return base

    @torch.no_grad()
    def _restore(self, base: BaseModel) -> None:
        """Back to the weights before any round."""
        for name, value in self._pristine.items():
            base.model.get_parameter(name).copy_(value)
        self._at = None

    def _remember(self, base: BaseModel, blocks: int | None) -> None:
        """Keep the values of parameters that are about to learn; the others never changed."""
        for name in trainable_parameters(base.model, blocks):
            if name not in self._pristine:
                self._pristine[name] = base.model.get_parameter(name).detach().clone()
