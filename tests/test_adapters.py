"""PEFT adapters in the model: exact, and verified against the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import (
    CLIENTS,
    PROMPT,
    TARGETS,
    WAYS,
    WEIGHTS,
    adapted,
    average_factors,
    commit,
    peft,
    record_products,
    same,
    shake,
    thin_updates,
    trace,
)
from oracle import equals_oracle
from tiny_models import tiny_model
from tolerances import close

import protoken
from protoken import errors
from protoken.banks.bank import LedgerBank
from protoken.ledger import Ledger


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_factors_averaged_apart_are_split_exactly(
    tmp_path: Path, family: str, way: str, settings: dict[str, Any]
) -> None:
    model = adapted(family, **settings)
    path = average_factors(model, tmp_path / "ledger")
    found = trace(model, path, **WAYS[way])
    equals_oracle(model, Ledger.open(path), found)
    assert found.conservation_residual < 1e-5
    # The change is the product's, not the factors': what taking the round back does to the effective weight.
    layer = model.get_submodule(found.info.layers[0])
    a, b = (getattr(layer, f"lora_{x}")["default"].weight.detach() for x in "AB")
    record = Ledger.open(path).round(1)
    before_a = a - record.change(f"{found.info.layers[0]}.lora_A.default.weight")
    before_b = b - record.change(f"{found.info.layers[0]}.lora_B.default.weight")
    change = (b @ a - before_b @ before_a) * layer.scaling["default"]
    bank = LedgerBank(Ledger.open(path), model, found.info.layers[:1], [1]).read(model, found.info.layers[:1])
    close(bank.change[found.info.layers[0]], change, torch.float32)


def test_names_as_peft_saves_them_are_the_same_layers(tmp_path: Path) -> None:
    traces = []
    for short in (False, True):
        model = adapted()
        traces.append(trace(model, average_factors(model, tmp_path / f"ledger{short}", short=short)))
    assert (traces[0].token_scores == traces[1].token_scores).all()


def test_earlier_rounds_of_factors_are_found_backwards(tmp_path: Path) -> None:
    model = adapted()
    path = average_factors(model, tmp_path / "ledger", rounds=3)
    every = trace(model, path, rounds="all")
    single = [trace(model, path, rounds=number) for number in (1, 2, 3)]
    assert every.conservation_residual < 1e-4
    close(torch.tensor(every.totals), torch.tensor(sum(t.totals for t in single)), torch.float32, factor=10)
    equals_oracle(model, Ledger.open(path), single[0])


def test_merging_does_not_change_the_scores(tmp_path: Path) -> None:
    model = adapted()
    path = average_factors(model, tmp_path / "ledger")
    for way in WAYS.values():
        apart = trace(model, path, do_sample=False, **way)
        model.merge_adapter()
        same(trace(model, path, do_sample=False, **way), apart, factor=10)
        model.unmerge_adapter()
        # Merging and taking it back rounds the base weight; the adapter is untouched.
    plain = model.merge_and_unload()
    with pytest.raises(errors.LayerError, match="lora_A"):
        trace(plain, path)


@pytest.mark.parametrize("way", WAYS)
def test_stacked_client_adapters_equal_the_oracle(tmp_path: Path, way: str) -> None:
    model = adapted()
    path = record_products(model, tmp_path / "ledger")
    found = trace(model, path, **WAYS[way])
    equals_oracle(model, Ledger.open(path), found)
    assert found.conservation_residual < 1e-5


def test_adapter_is_known_by_its_factors_or_by_its_effect(tmp_path: Path) -> None:
    model = adapted()
    path = record_products(model, tmp_path / "ledger")
    expected = trace(model, path)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.lora_A["default"].weight.mul_(8)
                module.lora_B["default"].weight.div_(8)
    same(trace(model, path), expected)
    shake(model, 11)
    with pytest.raises(errors.LedgerMismatchError, match="add up"):
        trace(model, path)


def test_every_client_may_have_an_adapter_of_its_own(tmp_path: Path) -> None:
    """All adapters active, each scaled by its aggregation weight: the federation without a merge."""
    one, many = adapted(), adapted()
    path = record_products(one, tmp_path / "ledger")
    record = Ledger.open(path).round(1)
    for client, weight in zip(CLIENTS, WEIGHTS, strict=True):
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=1, lora_alpha=5 / 3 * weight, target_modules=TARGETS["llama"])
        many.add_adapter(client, config)
    for name, module in many.named_modules():
        if hasattr(module, "lora_A"):
            for client in CLIENTS:
                a, b, _ = record.factors(client, f"{name.removeprefix('base_model.model.')}.weight")
                with torch.no_grad():
                    module.lora_A[client].weight.copy_(a)
                    module.lora_B[client].weight.copy_(b)
    many.base_model.set_adapter(list(CLIENTS))
    same(trace(many.eval(), path, do_sample=False), trace(one, path, do_sample=False), factor=5)


def test_adapter_beside_the_federations_is_no_clients_work(tmp_path: Path) -> None:
    """Two adapters act; the ledger records one of them."""
    model = adapted()
    path = average_factors(model, tmp_path / "ledger")
    alone = trace(model, path, do_sample=False)
    model.add_adapter("house", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=TARGETS["llama"]))
    model.base_model.set_adapter(["default", "house"])
    model.eval()
    shake(model, 6, "house")
    both = trace(model, path, do_sample=False)
    equals_oracle(model, Ledger.open(path), both)
    assert both.conservation_residual < 1e-5
    assert abs(both.totals - alone.totals).sum() > 0


def test_full_updates_below_an_adapter_are_traced(tmp_path: Path) -> None:
    """A federation of the base model, with somebody's adapter on top."""
    plain = tiny_model("llama")
    path = commit(plain, tmp_path / "ledger", thin_updates(plain))
    model = peft.get_peft_model(plain, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=TARGETS["llama"]))
    shake(model.eval(), 8)
    for way in WAYS.values():
        found = trace(model, path, **way)
        equals_oracle(model, Ledger.open(path), found)


def test_tracing_a_peft_model_returns_what_generate_returns(tmp_path: Path) -> None:
    model = adapted()
    path = average_factors(model, tmp_path / "ledger")
    ids = torch.tensor([[0, 0, 5, 17, 42], [8, 60, 33, 21, 9]])
    arguments = {"input_ids": ids, "attention_mask": (ids > 0).long(), "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**arguments)
    with protoken.tracing(model, ledger=path) as tape:
        assert torch.equal(model.generate(**arguments), expected)
    for traced, prompt in zip(tape, ([5, 17, 42], ids[1].tolist()), strict=True):
        alone = protoken.trace(model, prompt, ledger=path, max_new_tokens=4, do_sample=False)
        close(torch.tensor(traced.token_scores), torch.tensor(alone.token_scores), torch.float32, factor=3)


@pytest.mark.parametrize("way", ["forward", "reverse"])
def test_adapted_embeddings_are_traced(tmp_path: Path, way: str) -> None:
    model = adapted("llama", target_modules=["embed_tokens", "o_proj"])
    path = average_factors(model, tmp_path / "ledger")
    name = "base_model.model.model.embed_tokens"
    assert f"{name}.lora_embedding_A.default" in Ledger.open(path).round(1).parameters
    found = trace(model, path, layers=["*embed_tokens"], way=way)
    assert found.info.layers == (name,)
    assert found.conservation_residual < 1e-5
    # The slope of the objective along one client's contribution, by autograd through the whole model.
    bank = LedgerBank(Ledger.open(path), model, [name], [1]).read(model, [name])
    ids = torch.tensor([[*found.prompt_ids, *(token.id for token in found.token_list)]])
    table = model.get_submodule(name).base_layer.weight.requires_grad_()
    logits = model(input_ids=ids[:, :-1]).logits[0, len(PROMPT) - 1 :].log_softmax(-1)
    (gradient,) = torch.autograd.grad(logits.gather(-1, ids[0, len(PROMPT) :, None]).sum(), table)
    slope = WEIGHTS[0] * float((gradient * bank.deltas[name][0].T).sum())
    assert found.totals[0] == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("pattern", ["*lm_head", "lm_head"])
def test_head_that_peft_saves_whole_is_traced(tmp_path: Path, pattern: str) -> None:
    """modules_to_save unties it: a copy of its own, recorded under its name in memory."""
    model = adapted("llama", target_modules=["o_proj"], modules_to_save=["lm_head"])
    name = "base_model.model.lm_head"
    parameter = f"{name}.modules_to_save.default.weight"
    path = commit(model, tmp_path / "ledger", [{parameter: torch.randn(97, 48) * 0.02} for _ in CLIENTS])
    found = trace(model, path, layers=[pattern])
    assert (found.info.layers, found.info.way) == ((name,), "local")
    equals_oracle(model, Ledger.open(path), found)
    assert found.conservation_residual < 1e-5
