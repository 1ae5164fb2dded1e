"""`trace(model, prompt)`: generate once, then say which client taught which token. Read this file first.

    prompt ─▶ generate, capturing the traced blocks' inputs ─▶ relevance ─▶ projection onto the clients' deltas ─▶ Trace
    text.py   generation.py, ways/capture.py                   ways/         banks/, ways/projection.py         results/

What the caller chose, and what follows from it, is in planning/; session.py, attribution.py and first_order.py take
these steps one after the other. CONTRIBUTING.md has the whole map.

Scores are s[k, t] = rho_k * sum_layers <g_t, delta_k x_t>, in the unit of the objective (nats for the
log-probability). They are first order at the global model G: the contribution of client k's weighted update to the
objective of token t. Over all clients they add up to <(G - G_prev) x, g> but for the residual, which is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from protoken.banks.bank import Rounds
from protoken.errors import ArgumentError
from protoken.estimate import estimate
from protoken.generation import bound_of, check_arguments, check_seed, complete_arguments, with_length
from protoken.ledger import Ledger
from protoken.models.layers import input_device
from protoken.models.patching import refuse_inference_mode
from protoken.planning.options import Granularity, Method, Options, Way
from protoken.results import Trace
from protoken.session import Session
from protoken.text import Prompt, as_row, check_ids, check_window, encode_prompt, encode_response
from protoken.ways.objective import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    granularity: Granularity = "auto",
    objective: Objective | None = None,
    method: Method = "protoken",
    backend: str = "auto",
    nodes: int | None = None,
    pairs: int | None = None,
    memory_limit: int | str | None = None,
    response: str | Sequence[int] | Tensor | None = None,
    chat: bool | None = None,
    seed: int | None = None,
    **generate_arguments: Any,
) -> Trace:
    """Generate a response and attribute every token of it to the federation's clients.

    Args:
        model: the global model; left exactly as it was found, also after an error.
        prompt: text, a conversation ([{"role": "user", "content": ...}]), or the token ids of one prompt.
        ledger: the federation's ledger or its path, unless one was attached with `protoken.attach`.
        tokenizer: likewise.
        rounds: "last", "all" (each client's weighted deltas summed: its lineage), a number, several, or a slice of the
            ledger's rounds: slice(-3, None) are the last three.
        blocks: trace the last `blocks` blocks: attention out-projection and MLP-final layer of each. None: one block
            for "protoken" and "paper", and every parameter that the ledger records for the other methods.
        layers: names or shell patterns of linear layers to trace in those blocks instead.
        way: how the scores are found; each is exact for the layers it is listed with. With P the work of one pass
            through the traced blocks, T new tokens and K clients:

            "local"    layers past the last attention only    T rows through the rest of one block
            "forward"  any layers                             K + 1 tangents, each about 1.6 P; by layer L times that
            "reverse"  any layers                             2 P for totals; T backward passes of 1.6 P for tokens

            "auto" takes the local way where it is exact, for totals and positions the reverse one, else whichever of
            forward and reverse is less work (`protoken.planning.cost`). `trace.info.way` and `.reason` say what was
            taken.
        granularity: what a score is of.

            "sequence"  client                    trace.totals                  local, reverse
            "token"     token x client            trace.token_scores            local, forward, reverse
            "layer"     token x client x layer    trace.token_layer_scores      local, forward, reverse
            "position"  position x client         trace.position_scores         reverse: at which position of prompt
                        and response the client's update acted; needs layers that other positions can see (blocks=2)

            "auto" is "sequence" if way="reverse" was asked for, else "token". Finer ones bring the coarser ones.
        objective: "log_prob" (default), "log_odds" (log p / (1 - p): tokens that are nearly certain count as well; see
            docs/methods.md) or "logit" (the paper's, and the default of method "paper").
        method: "protoken" (first order at G); "paper" (the published algorithm as it stands, slow, for comparison);
            "aumann_shapley", "shapley", "paired_shapley", "leave_one_out" (beyond first order: the response is replayed
            at other weights), or a baseline: "chance", "aggregation_weight", "update_norm", "cosine",
            "client_log_prob", "activation_only", "head_only", "tracefl". docs/methods.md says what each answers.
        backend: who computes the projection: "auto", "cuda", "triton", "cpp" or "torch".
        nodes: gradients along the path of "aumann_shapley" (totals; way="forward" scores every token); None: from 2
            to 8, as many as the response's change along the path asks for (docs/methods.md has the residuals).
        pairs: sampled pairs of orders of "shapley" (None: exact up to 8 clients, 16 pairs above) and of coalitions of
            "paired_shapley" (None: as many as clients).
        memory_limit: ceiling for what attribution allocates on top of the model and its generation, in bytes or as
            "2GB", "512MiB". It is kept by working on fewer tokens, clients and blocks at a time, with the same scores
            but for rounding; `estimate` says what is needed. Without one a bank of clients' updates above 1 GiB is
            still read from the ledger a few clients at a time.
        response: attribute this response (an answer from a log, say) instead of generating one: its token ids as they
            were generated, or text, which is encoded as it stands (no end of turn is added). `info.forced` says so.
        chat: wrap a text prompt in the tokenizer's chat template; None: if it has one.
        seed: of this generation alone. torch's generators are the process's: other threads that sample meanwhile draw
            from them as well.
        **generate_arguments: for the model's own `generate`. Without a length, 64 new tokens at most.

    Returns:
        A `Trace` with scores of the granularity asked for.

    Raises:
        ModelError: no ledger attached, not a causal language model, or inference mode.
        PromptError: prompt or response is empty, too long for the model's window or out of its vocabulary, or there is
            no chat template.
        ArgumentError, LayerError, UnknownRoundError, BackendError: a choice that is not there, or a memory limit that
            is too low (the message says what would be enough).
        LedgerMismatchError: the ledger was written for other weights.
        GenerationError: this way of generating cannot be traced.
    """
    refuse_inference_mode(model)
    check_arguments(model, generate_arguments)
    check_seed(seed)
    options = Options(
        rounds=rounds,
        blocks=blocks,
        layers=layers,
        way=way,
        granularity=granularity,
        objective=objective,
        method=method,
        backend=backend,
        nodes=nodes,
        pairs=pairs,
        memory_limit=memory_limit,
    )
    session = Session.of(model, ledger, tokenizer, options, seed=seed)
    ids = encode_prompt(session.tokenizer, prompt, chat)
    check_ids(model, ids)
    if response is not None:
        return _forced(session, ids, response, generate_arguments, seed)
    given = with_length(generate_arguments)
    arguments = complete_arguments(model, given, len(ids), session.tokenizer)
    session.check_memory(len(ids), bound_of(model, arguments, len(ids)))

    row = as_row(ids, input_device(model))
    mask = arguments.setdefault("attention_mask", torch.ones_like(row))
    _, (trace,) = session.run(
        {"inputs": row, **arguments},
        call=model.generate,
        prompt=row,
        attention_mask=mask,
        given=given,
        seed=seed,
    )
    return trace


def _forced(
    session: Session,
    ids: list[int],
    response: str | Sequence[int] | Tensor,
    generate_arguments: dict[str, Any],
    seed: int | None,
) -> Trace:
    """The trace of a response that is there already: refused like a prompt, and with no generation to steer."""
    if generate_arguments:
        name, value = next(iter(generate_arguments.items()))
        raise ArgumentError(
            name,
            expected="no arguments for generate beside response=, which is attributed as it is",
            got=value,
            remedy="Leave one of them out",
        )
    new = encode_response(session.tokenizer, response)
    check_ids(session.model, new, "response")
    check_window(session.model, len(ids), len(new))
    session.check_memory(len(ids), len(new))
    return session.forced([*ids, *new], len(ids), seed=seed)


trace.estimate = estimate  # type: ignore[attr-defined]
