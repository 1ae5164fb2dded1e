"""Adapters that the record does not explain, or that are no sum: refused with the reason."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import (
    PROMPT,
    TARGETS,
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
from tiny_federation import tiny_federation
from tiny_models import tiny_model

import protoken
from protoken import errors
from protoken.ledger import ClientUpdate, Ledger


def test_dora_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = adapted(use_dora=True)
    names = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}
    rows = [ClientUpdate("ada", 1.0, delta={n: torch.zeros_like(p) for n, p in names.items()})]
    Ledger.create(tmp_path / "ledger").commit_round(names, names, rows)
    with pytest.raises(errors.ModelError, match="DoRA, whose effect is no sum of updates"):
        trace(model, tmp_path / "ledger")


def test_another_adapter_is_refused(tmp_path: Path) -> None:
    model = adapted()
    path = average_factors(model, tmp_path / "ledger")
    with model.disable_adapter(), pytest.raises(errors.LedgerMismatchError, match="none does"):
        trace(model, path)
    model.add_adapter("house", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=TARGETS["llama"]))
    model.set_adapter("house")
    with pytest.raises(errors.LedgerMismatchError, match="set_adapter"):
        trace(model.eval(), path)
    shake(model, 12)
    model.set_adapter("default")
    with pytest.raises(errors.LedgerMismatchError, match="digest"):
        trace(model, path)


def test_adapter_record_without_an_adapter_is_refused_unless_told_so(tmp_path: Path) -> None:
    model = adapted()
    path = record_products(model, tmp_path / "ledger")
    expected = trace(model, path, do_sample=False)
    merged = model.merge_and_unload()
    with pytest.raises(errors.LedgerMismatchError, match="merged and unloaded"):
        trace(merged, path)
    protoken.attach(merged, path, verify=False)
    found = protoken.trace(merged, PROMPT, max_new_tokens=6, do_sample=False)
    same(found, expected, factor=10)


def test_base_weight_with_a_merged_adapter_is_refused(tmp_path: Path) -> None:
    plain = tiny_model("llama")
    path = commit(plain, tmp_path / "ledger", thin_updates(plain))
    model = peft.get_peft_model(plain, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=TARGETS["llama"]))
    shake(model.eval(), 8)
    model.merge_adapter()
    with pytest.raises(errors.LedgerMismatchError, match="unmerge_adapter"):
        trace(model, path)


def test_resized_embeddings_are_named(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path, "llama", ends=True)
    federation.model.resize_token_embeddings(105, mean_resizing=False)
    assert trace(federation.model, federation.path).totals.any()  # the blocks are what they were
    for layer in ("lm_head", "model.embed_tokens"):
        with pytest.raises(
            errors.LedgerMismatchError, match=r"105 tokens, the federation's had 97: were the embeddings"
        ):
            trace(federation.model, federation.path, layers=[layer])


@pytest.mark.parametrize("kind", ["IA3Config", "LoHaConfig", "OFTConfig"])
def test_adapters_that_are_no_sum_are_refused(tmp_path: Path, kind: str) -> None:
    """Below a factor on the output, an update of the base weight is not what reaches the next layer."""
    plain = tiny_model("llama")
    path = commit(plain, tmp_path / "ledger", thin_updates(plain))
    settings: dict[str, Any] = {
        "IA3Config": {"feedforward_modules": []},
        "OFTConfig": {"oft_block_size": 0, "r": 2},
    }.get(kind, {})
    config = getattr(peft, kind)(target_modules=["down_proj"], **settings)
    model = peft.get_peft_model(plain, config).eval()
    with pytest.raises(errors.ModelError, match=r"down_proj, a peft\.tuners"):
        trace(model, path)
    assert trace(model, path, layers=["*o_proj"]).totals.any()


def test_dora_is_refused_above_updates_of_the_base_weight(tmp_path: Path) -> None:
    plain = tiny_model("llama")
    path = commit(plain, tmp_path / "ledger", thin_updates(plain))
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["o_proj"], use_dora=True)
    with pytest.raises(errors.ModelError, match="DoRA"):
        trace(peft.get_peft_model(plain, config).eval(), path)


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens_are_refused(tmp_path: Path, kind: str) -> None:
    federation = tiny_federation(tmp_path, "llama")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(federation.model, config).eval()
    with pytest.raises(errors.ModelError, match="virtual tokens"):
        trace(model, federation.path)


def test_adapters_inside_experts_are_refused(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path, "mixtral")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["o_proj"], target_parameters=["mlp.experts.down_proj"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(federation.model, config).eval()
    with pytest.raises(errors.ModelError, match="adapter of another kind wraps it"):
        trace(model, federation.path)
