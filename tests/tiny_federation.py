"""A federation of random updates around a tiny model: a ledger on disk and the global model that belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel

from protoken.ledger import ClientUpdate, Ledger
from protoken.models.architectures import architecture_of
from protoken.models.layers import layer_of

WEIGHTS = (0.4, 0.1, 0.3, 0.2)
CLIENTS = ("ada", "bob", "cleo", "null")


@dataclass
class TinyFederation:
    """`model` holds the aggregate of the last round; client "null" never changes anything."""

    model: PreTrainedModel
    path: Path

    @property
    def ledger(self) -> Ledger:
        return Ledger.open(self.path)


def tiny_federation(
    folder: Path,
    family: str = "llama",
    *,
    rounds: int = 1,
    dtype: torch.dtype = torch.float32,
    clients: tuple[str, ...] = CLIENTS,
    weights: tuple[float, ...] = WEIGHTS,
    scale: float = 0.02,
    seed: int = 0,
    ends: bool = False,
) -> TinyFederation:
    """Commit `rounds` rounds of FedAvg over all linear layers of all blocks; random updates, a real average.

    `ends`: over the embeddings and the head, too.
    """
    model = tiny_model(family, dtype=dtype, seed=seed)
    layers = architecture_of(model).traced_layers(len(architecture_of(model).blocks), ["*"])
    if ends:
        layers += (architecture_of(model).embeddings_name, architecture_of(model).head_name)
    known = dict(model.named_parameters())  # a tied head has no parameter of its own
    names = [name for name in (layer_of(model, layer).parameter for layer in layers) if name in known]
    generator = torch.Generator().manual_seed(seed + 1)
    path = folder / f"{family}-ledger"
    ledger = Ledger.create(path, model=family)
    for _ in range(rounds):
        base = {name: model.get_parameter(name).detach().clone() for name in names}
        updates = []
        for client, weight in zip(clients, weights, strict=True):
            size = 0.0 if client == "null" else scale
            delta = {
                name: torch.randn(p.shape, generator=generator, dtype=torch.float32).to(dtype) * size
                for name, p in base.items()
            }
            updates.append(ClientUpdate(client, weight, delta=delta))
        with torch.no_grad():
            for name, start in base.items():
                change = sum(update.weight * update.delta[name] for update in updates)  # type: ignore[index]
                model.get_parameter(name).copy_(start + change)
        ledger.commit_round(base, {name: model.get_parameter(name).detach().clone() for name in names}, updates)
    return TinyFederation(model, path)
