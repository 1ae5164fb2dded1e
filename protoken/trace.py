"""`trace(model, prompt)`: generate once, then say which client taught which token. Read this file first.

    prompt ─▶ generate, capturing the traced blocks' inputs ─▶ relevance ─▶ projection onto the clients' deltas ─▶ Trace

Scores are s[k, t] = rho_k * sum_layers <g_t, delta_k x_t>, in the unit of the objective (nats for the
log-probability). They are first order at the global model G: the contribution of client k's weighted update to the
objective of token t. Over all clients they add up to <(G - G_prev) x, g> but for the residual, which is reported.
"""

from __future__ import annotations

import time
from os import PathLike
from typing import Any

import torch
from transformers import PreTrainedModel

from .attachment import attachment_of, make_attachment
from .attribution import Method, Way, assemble, attribute, make_plan, model_name, read_source
from .bank import Rounds
from .counterfactual import remember
from .generation import check_arguments, complete_arguments, generate
from .layers import input_device
from .ledger import Ledger
from .methods.replayed import Settings
from .patching import evaluation_mode, refuse_inference_mode
from .relevance import Objective
from .results import Trace
from .text import Prompt, as_row, check_ids, encode_prompt


def trace(
    model: PreTrainedModel,
    prompt: Prompt,
    *,
    ledger: Ledger | str | PathLike[str] | None = None,
    tokenizer: Any = None,
    rounds: Rounds = "last",
    blocks: int | None = None,
    layers: list[str] | None = None,
    way: Way = "auto",
    objective: Objective | None = None,
    method: Method = "protoken",
    backend: str = "auto",
    nodes: int = 4,
    pairs: int | None = None,
    chat: bool | None = None,
    seed: int | None = None,
    **generate_arguments: Any,
) -> Trace:
    """Generate a response and attribute every token of it to the federation's clients.

    Args:
        model: the global model; left exactly as it was found, also after an error.
        prompt: text, a conversation ([{"role": "user", "content": ...}]), or token ids.
        ledger: the federation's ledger or its path, unless one was attached with `protoken.attach`.
        tokenizer: likewise.
        rounds: "last", "all" (each client's weighted deltas summed: its lineage), a number, or several.
        blocks: trace the last `blocks` blocks: attention out-projection and MLP-final layer of each. None: one block
            for "protoken" and "paper", and every parameter that the ledger records for the other methods.
        layers: names or shell patterns of linear layers to trace in those blocks instead.
        way: "local" (scores per token, one block), "forward" (scores per token, any number of blocks) or "reverse"
            (totals of the whole response only, any number of blocks, cheapest for many clients); "auto" takes the
            local way where it is exact (the last block's two default layers), else the forward way.
        objective: "log_prob" (default) or "logit" (the paper's, and the default of method "paper").
        method: "protoken" (first order at G); "paper" (the published algorithm as it stands, slow, for comparison);
            "aumann_shapley", "shapley", "paired_shapley", "leave_one_out" (beyond first order: the response is replayed
            at other weights), or a baseline: "chance", "aggregation_weight", "update_norm", "cosine",
            "client_log_prob", "activation_only", "head_only", "tracefl". docs/methods.md says what each answers.
        backend: who computes the projection: "auto", "cuda", "triton", "cpp" or "torch".
        nodes: gradients along the path of "aumann_shapley" (totals; way="forward" scores every token).
        pairs: sampled pairs of orders of "shapley" (None: exact up to 8 clients, 16 pairs above) and of coalitions of
            "paired_shapley" (None: as many as clients).
        chat: wrap text in the tokenizer's chat template; None: if it has one.
        seed: seed of this generation alone.
        **generate_arguments: for the model's own `generate`. Without a length, 64 new tokens at most.

    Returns:
        A `Trace` with scores [T, K], or with totals [K] only (way "reverse").

    Raises:
        ModelError: no ledger attached, not a causal language model, or inference mode.
        PromptError: empty, too long for the model's window, out of its vocabulary, or no chat template.
        ArgumentError, LayerError, UnknownRoundError, BackendError: a choice that is not there.
        LedgerMismatchError: the ledger was written for other weights.
        GenerationError: this way of generating cannot be traced.
    """
    refuse_inference_mode(model)
    check_arguments(generate_arguments)
    own = attachment_of(model) if ledger is None else make_attachment(model, ledger, tokenizer)
    tokenizer = own.tokenizer if tokenizer is None else tokenizer
    settings = Settings(nodes=nodes, pairs=pairs, seed=seed or 0)
    plan = make_plan(own.architecture, blocks, layers, way, objective, method, backend, settings)
    bank = read_source(own, model, plan, rounds)
    ids = encode_prompt(tokenizer, prompt, chat)
    check_ids(model, ids)
    arguments = complete_arguments(model, generate_arguments, len(ids))

    row = as_row(ids, input_device(model))
    mask = arguments.setdefault("attention_mask", torch.ones_like(row))

    began = time.perf_counter()
    with evaluation_mode(model):
        _, (generated,) = generate(
            model,
            own.architecture,
            {"inputs": row, **arguments},
            call=model.generate,
            prompt=row,
            attention_mask=mask,
            first_block=plan.first_block,
            sequence=plan.needs_sequence,
            seed=seed,
        )
        generated_at = time.perf_counter()
        scores = attribute(model, own.architecture, generated, bank, plan, own.ledger)
    trace = assemble(
        tokenizer,
        generated.response,
        bank,
        scores,
        plan,
        model=model_name(model),
        ledger=own.ledger.run,
        seed=seed,
        seconds_generate=generated_at - began,
        seconds_trace=time.perf_counter() - began,
        generate_arguments=generate_arguments,
    )
    remember(trace, model, own)
    return trace
