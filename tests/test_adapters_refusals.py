"""Adapters that the record does not explain, or that are no sum: refused with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
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
    idle,
    peft,
    record_products,
    same,
    shake,
    thin_updates,
    trace,
    with_another,
)
from tiny_federation import tiny_federation
from tiny_models import tiny_model

import protoken
from protoken import attachment, errors
from protoken.banks.bank import LedgerBank
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


@pytest.mark.parametrize(
    ("record", "verify"),
    [(average_factors, True), (average_factors, False), (record_products, True)],
    ids=["factors", "factors-unverified", "products"],
)
@pytest.mark.parametrize("change", ["switched", "disabled", "merged, then disabled"])
def test_adapter_that_ceased_to_act_after_a_trace_is_refused(
    tmp_path: Path, change: str, record: Callable[[Any, Path], Path], verify: bool
) -> None:
    model = adapted()
    path = record(model, tmp_path / "ledger")
    protoken.attach(with_another(model), path, verify=verify)
    settings = {"max_new_tokens": 3, "do_sample": False}
    first = protoken.trace(model, PROMPT, **settings)
    with idle(model, change), pytest.raises(errors.LedgerMismatchError, match="adapter"):
        protoken.trace(model, PROMPT, **settings)
    if "merged" not in change:  # rounds the base weight
        same(protoken.trace(model, PROMPT, **settings), first)
    protoken.detach(model)


def test_adapter_is_read_and_compared_once_while_nothing_is_switched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    path = average_factors(model, tmp_path / "ledger")
    protoken.attach(with_another(model), path)
    protoken.trace(model, PROMPT, max_new_tokens=2)
    with model.disable_adapter(), pytest.raises(errors.LedgerMismatchError):
        protoken.trace(model, PROMPT, max_new_tokens=2)
    with monkeypatch.context() as patch:
        for module, name in ((attachment, "check_layer"), (LedgerBank, "__init__"), (LedgerBank, "read")):
            patch.delattr(module, name)
        assert protoken.trace(model, PROMPT, max_new_tokens=2).totals.any()
    protoken.detach(model)


def test_bank_is_made_anew_for_another_scale(tmp_path: Path) -> None:
    """Factors are recorded without their scale, which enters every contribution."""
    model = adapted()
    path = average_factors(model, tmp_path / "ledger")
    protoken.attach(model, path)
    settings = {"max_new_tokens": 3, "do_sample": False}
    protoken.trace(model, PROMPT, **settings)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 2
    same(protoken.trace(model, PROMPT, **settings), trace(model, path, **settings))
    protoken.detach(model)


@pytest.mark.parametrize("method", ["protoken", "leave_one_out"])
def test_adapter_switched_inside_a_tape_is_refused(tmp_path: Path, method: Any) -> None:
    model = adapted()
    path = average_factors(model, tmp_path / "ledger")
    with_another(model)
    inputs = {"input_ids": torch.tensor([PROMPT]), "max_new_tokens": 2, "do_sample": False}
    with protoken.tracing(model, ledger=path, method=method) as tape:
        model.generate(**inputs)
        for change in ("switched", "disabled"):
            with idle(model, change), pytest.raises(errors.ProtokenError, match="adapter"):
                model.generate(**inputs)
        model.generate(**inputs)
    same(tape[0], tape[1])


def test_head_that_peft_saves_whole_is_refused_while_its_copy_is_idle(tmp_path: Path) -> None:
    model = adapted("llama", target_modules=["o_proj"], modules_to_save=["lm_head"])
    parameter = "base_model.model.lm_head.modules_to_save.default.weight"
    path = commit(model, tmp_path / "ledger", [{parameter: torch.randn(97, 48) * 0.02} for _ in range(3)])
    protoken.attach(model, path)
    for settings in ({"layers": ["lm_head"]}, {"method": "leave_one_out"}):
        assert protoken.trace(model, PROMPT, max_new_tokens=2, **settings).totals.any()
        with model.disable_adapter(), pytest.raises((errors.LayerError, errors.ModelError), match="lm_head"):
            protoken.trace(model, PROMPT, max_new_tokens=2, **settings)
    protoken.detach(model)


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
