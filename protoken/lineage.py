"""Who, over the federation's life, taught what this response says? A finished trace, asked that question.

    phi_k = < sum_r rho_k^r delta_k^r, df/dW >    at G_first + (G - G_first) / 2,    f = sum_t log(p_t / (1 - p_t))

One gradient half-way along the path from the first model to this one, in log-odds: the midpoint rule of the path
integral `aumann_shapley`. More `nodes` make it add up to the whole change. docs/results.md compares both with exact
values; docs/methods.md says who can cheat which.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

from protoken.banks.bank import Rounds
from protoken.ledger import Ledger
from protoken.models.patching import refuse_inference_mode
from protoken.origin import ids_of, origin_of
from protoken.planning.options import Granularity, Options
from protoken.results import Trace
from protoken.session import Session
from protoken.ways.objective import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def lineage(
    trace: Trace,
    *,
    nodes: int | None = 1,
    objective: Objective = "log_odds",
    rounds: Rounds = "all",
    granularity: Granularity = "sequence",
    model: PreTrainedModel | None = None,
    ledger: Ledger | str | PathLike[str] | None = None,
    tokenizer: Any = None,
) -> Trace:
    """Trace the same response again, by the path over the rounds; nothing is generated.

    Args:
        nodes: gradients along the path. 1: its midpoint, to rank; None: as many as it takes to add up to the
            change, at most 8, to accuse.
        objective, rounds, granularity: as in `protoken.trace`; "token" costs one tangent per client at each node.
        model, ledger, tokenizer: where the trace does not know them any more (loaded from a file).

    Raises:
        ArgumentError: the trace is a part of an answer that does not begin where the answer does, or a wrong choice.
        ModelError: the trace does not know its model, or that model is gone.
        LedgerMismatchError: the model is not the one that the ledger was written for.
    """
    ids, prompt_length = ids_of(trace)
    options = Options(rounds=rounds, method="aumann_shapley", nodes=nodes, objective=objective, granularity=granularity)
    model, own = origin_of(trace, model, ledger, tokenizer)
    refuse_inference_mode(model)
    session = Session.attached(model, own, options)
    about = trace.info
    return session.forced(ids, prompt_length, given=about.generate_arguments, seed=about.seed, forced=about.forced)
