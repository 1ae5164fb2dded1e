"""What the published double loop says about a trace: the same layers, updates and objective, only data shared."""

from __future__ import annotations

import torch
from tolerances import close
from torch import nn

import protoken
from protoken.banks.bank import LedgerBank
from protoken.ledger import Ledger
from protoken.methods.paper import objective_and_taps, paper_scores


def oracle(model: nn.Module, ledger: Ledger, trace: protoken.Trace) -> torch.Tensor:
    """rho_k * (updates in the published double loop), [L, T, K]."""
    bank = LedgerBank(ledger, model, trace.info.layers, trace.info.rounds).read(model, trace.info.layers)
    ids = torch.tensor([[*trace.prompt_ids, *(token.id for token in trace.token_list)]])
    scores, _ = paper_scores(model, ids, len(trace.prompt_ids), bank.deltas, trace.info.objective)
    return scores * bank.weights


def oracle_positions(model: nn.Module, ledger: Ledger, trace: protoken.Trace) -> torch.Tensor:
    """rho_k * sum_t sum_l <g_t[pos], delta_k x[pos]> in the same loop, [S, K]; linear layers only."""
    bank = LedgerBank(ledger, model, trace.info.layers, trace.info.rounds).read(model, trace.info.layers)
    ids = torch.tensor([[*trace.prompt_ids, *(token.id for token in trace.token_list)]])
    found = torch.zeros(ids.shape[1] - 1, len(bank.clients), dtype=torch.float64)
    for end in range(len(trace.prompt_ids), ids.shape[1]):
        value, taps = objective_and_taps(
            model, ids[:, :end], int(ids[0, end]), list(trace.info.layers), trace.info.objective
        )
        grads = torch.autograd.grad(value, [y for _, y in taps.values()])
        for (name, (x, _)), grad in zip(taps.items(), grads, strict=True):
            assert x is not None
            rows, own = x.reshape(end, -1), grad.reshape(end, -1)
            for k, delta in enumerate(bank.deltas[name]):
                found[:end, k] += ((rows @ delta.to(rows).T) * own).sum(1).double()
    return found * bank.weights


def equals_oracle(model: nn.Module, ledger: Ledger, trace: protoken.Trace, *, factor: float = 1.0) -> None:
    """Fail unless every number of the trace is the oracle's, within fp32's row of the tolerance table."""
    expected = oracle(model, ledger, trace)
    if trace.token_scores is not None:
        close(torch.tensor(trace.token_scores), expected.sum(0), torch.float32, factor=factor)
    if trace.layer_totals is not None:
        close(torch.tensor(trace.layer_totals), expected.sum(1), torch.float32, factor=factor)
    if trace.token_layer_scores is not None:
        close(torch.tensor(trace.token_layer_scores), expected.transpose(0, 1), torch.float32, factor=factor)
    if trace.position_scores is not None:
        close(torch.tensor(trace.position_scores), oracle_positions(model, ledger, trace), torch.float32, factor=factor)
