"""Low-rank and quantised updates in the ledger, PEFT adapters in the model: exact, and verified against the record."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import equals_oracle
from tiny_federation import tiny_federation
from tiny_models import tiny_model
from tolerances import close

import protoken
from protoken import errors
from protoken.architectures import architecture_of
from protoken.ledger import ClientUpdate, Ledger, LowRank

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


# ---- updates in the ledger's own layouts -------------------------------------------------------------------------


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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_factors_score_like_the_matrices_they_stand_for(tmp_path: Path, family: str, way: str) -> None:
    thin, full = tiny_model(family), tiny_model(family)
    updates = thin_updates(thin)
    a = trace(thin, commit(thin, tmp_path / "thin", updates), **WAYS[way])
    dense = [{name: factors.dense() for name, factors in update.items()} for update in updates]
    b = trace(full, commit(full, tmp_path / "full", dense), **WAYS[way])
    same(a, b)
    equals_oracle(thin, Ledger.open(tmp_path / "thin"), a)
    assert a.conservation_residual < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_factors_are_never_multiplied_out(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    path = commit(model, tmp_path / "ledger", thin_updates(model))
    expected = trace(model, path, **WAYS[way])

    def refuse(_: LowRank) -> torch.Tensor:
        raise AssertionError("materialised")

    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "dense", refuse)
        same(trace(model, path, **WAYS[way]), expected)


@pytest.mark.parametrize("way", WAYS)
def test_gauge_of_the_factors_does_not_matter(tmp_path: Path, way: str) -> None:
    """(c A, B / c) is the same update."""
    scores = []
    for factor in (1.0, 37.0):
        model = tiny_model("llama")
        updates = [
            {name: LowRank(u.a * factor, u.b / factor, u.scale) for name, u in update.items()}
            for update in thin_updates(model)
        ]
        found = trace(model, commit(model, tmp_path / f"ledger{factor}", updates), **WAYS[way])
        scores.append(torch.tensor(found.totals if found.token_scores is None else found.token_scores))
    assert (scores[0] - scores[1]).norm() <= 1e-6 * scores[0].norm()


@pytest.mark.parametrize("way", WAYS)
def test_clients_of_one_layer_may_lie_in_different_layouts(tmp_path: Path, way: str) -> None:
    mixed, full = tiny_model("llama"), tiny_model("llama")
    thin = thin_updates(mixed)
    dense = [{name: factors.dense() for name, factors in update.items()} for update in thin]
    a = trace(mixed, commit(mixed, tmp_path / "mixed", [thin[0], dense[1], thin[2]]), **WAYS[way])
    b = trace(full, commit(full, tmp_path / "full", dense), **WAYS[way])
    same(a, b)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("codec", ["int8", "fp8", "bf16", "lowrank-4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stored_numbers_are_what_is_scored(tmp_path: Path, family: str, codec: str, way: str) -> None:
    """What a codec loses is in the residual, as measured; what it kept is scored exactly."""
    model = tiny_model(family)
    dense = [{name: factors.dense() for name, factors in update.items()} for update in thin_updates(model)]
    path = commit(model, tmp_path / "ledger", dense, codec)
    found = trace(model, path, **WAYS[way])
    equals_oracle(model, Ledger.open(path), found)
    assert found.totals.sum() + found.residual == pytest.approx(found.change, rel=1e-9)


def test_factors_over_rounds_are_summed_as_factors(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = commit(model, tmp_path / "ledger", thin_updates(model))
    ledger = Ledger.open(path)
    second = thin_updates(model, seed=9)
    base = {name: model.get_parameter(name).detach().clone() for name in second[0]}
    with torch.no_grad():
        for name in base:
            model.get_parameter(name).add_(0.6 * second[0][name].dense() + 0.4 * second[1][name].dense())
    aggregate = {name: model.get_parameter(name).detach().clone() for name in base}
    rows = [ClientUpdate("ada", 0.6, delta=second[0]), ClientUpdate("bob", 0.4, delta=second[1])]
    ledger.commit_round(base, aggregate, rows)
    for way in WAYS.values():
        every = trace(model, path, rounds="all", **way)
        single = [trace(model, path, rounds=number, **way) for number in (1, 2)]
        for client, total in zip(every.client_ids, every.totals, strict=True):
            parts = [dict(zip(t.client_ids, t.totals, strict=True)).get(client, 0.0) for t in single]
            assert total == pytest.approx(sum(parts), rel=1e-4, abs=1e-6)
        assert every.conservation_residual < 1e-4


# ---- adapters in the model ---------------------------------------------------------------------------------------


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
            if f".{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


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
    bank = protoken.bank.build_bank(Ledger.open(path), model, found.info.layers[:1], [1])
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


# ---- refusals ----------------------------------------------------------------------------------------------------


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


# ---- embeddings and heads that an adapter trained ----------------------------------------------------------------


@pytest.mark.parametrize("way", ["forward", "reverse"])
def test_adapted_embeddings_are_traced(tmp_path: Path, way: str) -> None:
    model = adapted("llama", target_modules=["embed_tokens", "o_proj"])
    path = average_factors(model, tmp_path / "ledger")
    name = "base_model.model.model.embed_tokens"
    assert f"{name}.lora_embedding_A.default" in Ledger.open(path).round(1).parameters
    found = trace(model, path, layers=["*embed_tokens"], way=way)
    assert found.info.layers == (name,)
    assert found.conservation_residual < 1e-5
    # The slope of the objective along one client's contribution, by differences.
    bank = protoken.bank.build_bank(Ledger.open(path), model, [name], [1])
    ids = torch.tensor([[*found.prompt_ids, *(token.id for token in found.token_list)]])
    table = model.get_submodule(name).base_layer.weight
    step, values = 0.003 * bank.deltas[name][0].T, []
    with torch.no_grad():
        for sign in (1, -2):
            table.add_(sign * step)
            logits = model(input_ids=ids[:, :-1]).logits[0, len(PROMPT) - 1 :].log_softmax(-1)
            values.append(logits.gather(-1, ids[0, len(PROMPT) :, None]).double().sum())
    slope = float(values[0] - values[1]) / 0.006 * WEIGHTS[0]
    assert found.totals[0] == pytest.approx(slope, rel=5e-3)


def test_head_that_peft_saves_whole_is_traced(tmp_path: Path) -> None:
    """modules_to_save unties it: a copy of its own, recorded under its name in memory."""
    model = adapted("llama", target_modules=["o_proj"], modules_to_save=["lm_head"])
    name = "base_model.model.lm_head"
    parameter = f"{name}.modules_to_save.default.weight"
    path = commit(model, tmp_path / "ledger", [{parameter: torch.randn(97, 48) * 0.02} for _ in CLIENTS])
    found = trace(model, path, layers=["*lm_head"])
    assert (found.info.layers, found.info.way) == ((name,), "local")
    equals_oracle(model, Ledger.open(path), found)
    assert found.conservation_residual < 1e-5


# ---- clients that cannot be used ---------------------------------------------------------------------------------


def test_client_with_a_missing_layer_is_left_out_and_stands_in_the_residual(tmp_path: Path) -> None:
    """The server had aggregated it: its effect is known only as what the others do not explain."""
    model = tiny_model("llama")
    updates = thin_updates(model)
    dense = [{name: factors.dense() for name, factors in update.items()} for update in updates]
    base = {name: model.get_parameter(name).detach().clone() for name in dense[0]}
    with torch.no_grad():
        for name in base:
            model.get_parameter(name).add_(sum(w * d[name] for w, d in zip(WEIGHTS, dense, strict=True)))
    aggregate = {name: model.get_parameter(name).detach().clone() for name in base}
    short = dict(dense[2])
    del short[next(iter(short))]
    with Ledger.create(tmp_path / "ledger").begin_round(base) as writer:
        for client, weight, delta in zip(CLIENTS, WEIGHTS, (dense[0], dense[1], short), strict=True):
            writer.add(ClientUpdate(client, weight, delta=delta), on_bad="quarantine")
        writer.commit(aggregate)
    whole = trace(model, commit(tiny_model("llama"), tmp_path / "whole", dense))
    for way in WAYS.values():
        found = trace(model, tmp_path / "ledger", **way)
        assert found.client_ids == ("ada", "bob")
        assert found.totals.sum() + found.residual == pytest.approx(found.change, rel=1e-9)
    found = trace(model, tmp_path / "ledger")
    close(torch.tensor(found.token_scores), torch.tensor(whole.token_scores[:, :2]), torch.float32)
    assert found.residual == pytest.approx(whole.totals[2], rel=1e-3)
