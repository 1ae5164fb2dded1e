"""What the published double loop says about a trace: the same layers, updates and objective, only data shared."""

from __future__ import annotations

import torch
from tolerances import close
from torch import nn

import protoken
from protoken.bank import build_bank
from protoken.ledger import Ledger
from protoken.methods.paper import paper_scores


def oracle(model: nn.Module, ledger: Ledger, trace: protoken.Trace) -> torch.Tensor:
    """rho_k * (updates in the published double loop), [L, T, K]."""
    bank = build_bank(ledger, model, trace.info.layers, trace.info.rounds)
    ids = torch.tensor([[*trace.prompt_ids, *(token.id for token in trace.token_list)]])
    scores, _ = paper_scores(model, ids, len(trace.prompt_ids), bank.deltas, trace.info.objective)
    return scores * bank.weights


def equals_oracle(model: nn.Module, ledger: Ledger, trace: protoken.Trace, *, factor: float = 1.0) -> None:
    """Fail unless every number of the trace is the oracle's, within fp32's row of the tolerance table."""
    expected = oracle(model, ledger, trace)
    if trace.token_scores is not None:
        close(torch.tensor(trace.token_scores), expected.sum(0), torch.float32, factor=factor)
    if trace.layer_totals is not None:
        close(torch.tensor(trace.layer_totals), expected.sum(1), torch.float32, factor=factor)
