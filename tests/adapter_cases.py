"""What the tests of adapters and of thin updates share: models, updates, rounds, and what the same means."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tolerances import close

import protoken
from protoken.ledger import ClientUpdate, Ledger, LowRank
from protoken.models.architectures import architecture_of

peft = pytest.importorskip("peft")

PROMPT = [5, 17, 42, 8, 60, 33, 21]
CLIENTS, WEIGHTS, RANKS = ("ada", "bob", "cleo"), (0.5, 0.2, 0.3), (2, 5, 3)
WAYS = {"local": {}, "forward": {"blocks": 3}, "reverse": {"blocks": 3, "way": "reverse"}}
TARGETS = {"llama": ["o_proj", "down_proj", "v_proj"], "gpt2": ["attn.c_proj", "mlp.c_proj"]}


def trace(model: Any, ledger: Path, **arguments: Any) -> protoken.Trace:
    arguments = {"max_new_tokens": 6, "do_sample": True, "seed": 3, **arguments}
    return protoken.trace(model, PROMPT, ledger=ledger, **arguments)


def same(a: protoken.Trace, b: protoken.Trace, *, factor: float = 1.0) -> None:
    assert [t.id for t in a.token_list] == [t.id for t in b.token_list]
    if a.token_scores is not None:
        close(torch.tensor(a.token_scores), torch.tensor(b.token_scores), torch.float32, factor=factor)
    else:
        close(torch.tensor(a.layer_totals), torch.tensor(b.layer_totals), torch.float32, factor=factor)


def thin_updates(model: Any, seed: int = 1) -> list[dict[str, LowRank]]:
    """Per client random factors, of a rank of its own, for the traced layers of every block."""
    generator = torch.Generator().manual_seed(seed)
    found = architecture_of(model)
    names = [f"{layer}.weight" for layer in found.traced_layers(len(found.blocks))]
    return [
        {
            name: LowRank(
                torch.randn(rank, model.get_parameter(name).shape[1], generator=generator) * 0.1,
                torch.randn(model.get_parameter(name).shape[0], rank, generator=generator) * 0.1,
                0.5,
            )
            for name in names
        }
        for rank in RANKS
    ]


def commit(model: Any, path: Path, updates: list[dict[str, Any]], codec: str = "fp32") -> Path:
    """Record a round whose aggregate is the model as it is after the updates have been added."""
    base = {name: model.get_parameter(name).detach().clone() for name in updates[0]}
    dense = [{n: u.dense() if isinstance(u, LowRank) else u for n, u in update.items()} for update in updates]
    with torch.no_grad():
        for name, start in base.items():
            change = sum(weight * update[name] for weight, update in zip(WEIGHTS, dense, strict=True))
            model.get_parameter(name).copy_(start + change)
    aggregate = {name: model.get_parameter(name).detach().clone() for name in base}
    rows = [ClientUpdate(c, w, delta=d) for c, w, d in zip(CLIENTS, WEIGHTS, updates, strict=True)]
    Ledger.create(path).commit_round(base, aggregate, rows, codec=codec)
    return path


def adapted(family: str = "llama", seed: int = 5, **settings: Any) -> Any:
    """A PEFT model whose adapter does something."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[family], **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT reports that it turned fan_in_fan_out on for Conv1D
        model = peft.get_peft_model(tiny_model(family), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    shake(model, seed)
    return model


def shake(model: Any, seed: int, adapter: str = "default") -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in f"{name}.":  # an embedding's factors end with the adapter's name
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def with_another(model: Any) -> Any:
    """The model with a second adapter, "house", that is not active."""
    model.add_adapter("house", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=TARGETS["llama"]))
    shake(model.eval(), 12, "house")
    model.set_adapter("default")
    return model


@contextmanager
def idle(model: Any, how: str) -> Iterator[None]:
    """The adapter does not act for a while, or not by its factors; no factor is written to."""
    if how.startswith("merged"):
        model.merge_adapter()
    if how == "switched":
        model.set_adapter("house")
        yield
        model.set_adapter("default")
    elif how == "merged":
        yield
        model.unmerge_adapter()
    else:
        with model.disable_adapter():  # the next pass takes out what is merged, and it stays out
            yield


def average_factors(model: Any, path: Path, rounds: int = 1, *, short: bool = False) -> Path:
    """Rounds of FedAvg over the factors, each parameter averaged apart, as PEFT federations do.

    `short`: names as PEFT saves them, without the adapter's.
    """
    ledger = Ledger.create(path)
    generator = torch.Generator().manual_seed(2)
    own = {(n.replace(".default", "") if short else n): p for n, p in model.named_parameters() if "lora_" in n}
    for _ in range(rounds):
        base = {name: p.detach().clone() for name, p in own.items()}
        states = [
            {n: value + torch.randn(value.shape, generator=generator) * 0.05 for n, value in base.items()}
            for _ in CLIENTS
        ]
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(sum(w * state[name] for w, state in zip(WEIGHTS, states, strict=True)))
        aggregate = {name: p.detach().clone() for name, p in own.items()}
        rows = [ClientUpdate(c, w, state=s) for c, w, s in zip(CLIENTS, WEIGHTS, states, strict=True)]
        ledger.commit_round(base, aggregate, rows)
    return path


def record_products(model: Any, path: Path, adapter: str = "default") -> Path:
    """A server that adds up products: client adapters as LowRank, the aggregate their (wider) weighted sum."""
    generator = torch.Generator().manual_seed(4)
    base, aggregate = {}, {}
    updates: list[dict[str, LowRank]] = [{} for _ in CLIENTS]
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            key = f"{name.removeprefix('base_model.model.')}.weight"
            width, height, scale = module.in_features, module.out_features, module.scaling[adapter]
            base[key] = LowRank(torch.zeros(3, width), torch.zeros(height, 3), scale)
            for update in updates:
                a, b = torch.randn(1, width, generator=generator), torch.randn(height, 1, generator=generator)
                update[key] = LowRank(a * 0.1, b * 0.1, scale)
            own = [update[key] for update in updates]
            a = torch.cat([u.a for u in own])
            b = torch.cat([u.b * weight for u, weight in zip(own, WEIGHTS, strict=True)], dim=1)
            with torch.no_grad():
                module.lora_A[adapter].weight.copy_(a)
                module.lora_B[adapter].weight.copy_(b)
            aggregate[key] = LowRank(a, b, scale)
    rows = [ClientUpdate(c, w, delta=u) for c, w, u in zip(CLIENTS, WEIGHTS, updates, strict=True)]
    Ledger.create(path).commit_round(base, aggregate, rows)
    return path
