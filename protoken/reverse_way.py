"""Scores by the reverse way in pieces: what `pullback` finds at the rows of layers, projected onto the updates.

    sequence    S[k]      = rho_k sum_l < sum_pos g[pos] x[pos]^T, delta_k >
    position    s[k, pos] = rho_k sum_l < g[pos], delta_k x[pos] >         g of the sum over all tokens' objectives
    token       s[k, t]   = rho_k sum_l sum_pos < g_t[pos], delta_k x[pos] >
    layer       the same, with layers kept apart: s[k, l, t]

A position's score is what acted there: the part of the response's objective that flows through what the client's
update did to the activations at that position. Summed over positions it is the client's total.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from protoken.banks.bank import Bank, BankInParts
from protoken.banks.layer_bank import LayerBank, directions, totals
from protoken.planning.memory import Chunks, directions_at_once
from protoken.ways.projection import Scores
from protoken.ways.pullback import LayerRows, PulledBack
from protoken.ways.relevance import LocalRelevance, gradient_matrix


@dataclass
class _Sums:
    """fp64 sums on the CPU; the last column is the round's change, without weight.

    rows: [R, K + 1] with R tokens, positions or 1. layers: [L, K + 1]. apart: [R, L, K + 1] if layers are kept apart.
    """

    rows: Tensor
    layers: Tensor
    apart: Tensor | None

    @staticmethod
    def of(rows: int, layers: int, clients: int, *, apart: bool) -> _Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, clients + 1, dtype=torch.float64)

        return _Sums(zeros(rows), zeros(layers), zeros(rows, layers) if apart else None)

    def add(self, found: Tensor, where: slice, layer: int, columns: slice) -> None:
        """Scores [n, k] of one layer for a run of rows and of clients."""
        self.rows[where, columns] += found
        self.layers[layer, columns] += found.sum(0)
        if self.apart is not None:
            self.apart[where, layer, columns] += found


def reverse_scores(
    pulled: PulledBack,
    near: Scores | None,
    bank: Bank | BankInParts,
    layers: Sequence[str],
    granularity: str,
    chunks: Chunks,
    backend: str,
) -> Scores:
    """Scores at any granularity.

    Args:
        near: by token and layer, of the layers that the local way takes; the last of `layers` in their order.
        layers: all traced layers, in the order of the result.
    """
    response, clients = pulled.response, len(bank.clients)
    new, length = response.new_tokens, response.prompt_length - 1 + response.new_tokens
    rows = {"sequence": 1, "position": length}.get(granularity, new)
    sums = _Sums.of(rows, len(layers), clients, apart=granularity == "layer")
    for groups, where in _groups(granularity, new, rows, chunks.tokens):
        for piece in pulled.rows(groups):
            _add_piece(pulled.model, piece, bank, layers, sums, where, granularity, chunks, backend)
    if near is not None:
        _add_near(near, layers, pulled.local, sums, granularity, response.prompt_length)
    return _scores(sums, granularity, pulled.local.objective)


def _groups(granularity: str, new: int, rows: int, chunk: int) -> list[tuple[list[slice], slice]]:
    """Groups of tokens that are pulled back together, and the rows of the result that they fill."""
    if granularity in ("sequence", "position"):
        return [([slice(0, new)], slice(0, rows))]
    starts = range(0, new, chunk)
    return [
        ([slice(t, t + 1) for t in range(start, min(start + chunk, new))], slice(start, min(start + chunk, new)))
        for start in starts
    ]


def _add_piece(
    model: nn.Module,
    piece: list[LayerRows],
    bank: Bank | BankInParts,
    layers: Sequence[str],
    sums: _Sums,
    where: slice,
    granularity: str,
    chunks: Chunks,
    backend: str,
) -> None:
    names = [rows.layer.name for rows in piece]
    if not names:
        return
    matrices = (
        [gradient_matrix(model, r.layer.name, r.tap, r.grads[0]) for r in piece] if granularity == "sequence" else []
    )
    start = 0
    for part in bank.parts(names):
        stop = start + len(part.clients)
        some = [(part.layers, slice(start, stop), part.weights)]
        if part.changes:
            some.append((part.changes, slice(len(bank.clients), len(bank.clients) + 1), torch.ones(1)))
        for banks, columns, weights in some:
            if matrices:
                found = totals([banks[name] for name in names], matrices, backend).double()
                each = [found[index : index + 1] for index in range(len(names))]
            else:
                each = [_rows_by_client(rows, banks[rows.layer.name], granularity, chunks.clients) for rows in piece]
            for name, scores in zip(names, each, strict=True):
                sums.add(scores * weights, where, layers.index(name), columns)
        start = stop


def _rows_by_client(rows: LayerRows, bank: LayerBank, granularity: str, at_once: int) -> Tensor:
    """< g, delta_k x > per position [S, k], or summed over positions per group [C, k]; fp64 on the CPU."""
    wide = torch.promote_types(rows.grads.dtype, torch.float32)
    x = rows.tap.x[0]
    x = x.to(wide) if x.is_floating_point() else x
    grads = rows.grads.to(wide)
    route = None if rows.tap.route is None else rows.tap.route[0]
    step = directions_at_once(grads[0].numel() * grads.element_size(), at_once)
    found = []
    for start in range(0, len(bank.updates), step):
        moved = directions(bank, x, route, slice(start, start + step)).to(wide)  # [k, S, O]
        if granularity == "position":
            found.append(torch.einsum("kso,so->sk", moved, grads[0]))
        else:
            found.append(grads.flatten(1) @ moved.flatten(1).T)
    return torch.cat(found, 1).double().cpu()


def _add_near(
    near: Scores, layers: Sequence[str], local: LocalRelevance, sums: _Sums, granularity: str, prompt: int
) -> None:
    """Layers past the last attention: all of a token's score is at the position that chose it."""
    assert near.layer_tokens is not None
    assert near.change_tokens is not None
    new = len(local.objective)
    where = {"sequence": slice(0, 1), "position": slice(prompt - 1, prompt - 1 + new)}.get(granularity, slice(0, new))
    clients = slice(0, near.layer_tokens.shape[2])
    for index, name in enumerate(local.grad):
        found = near.layer_tokens[:, index]
        sums.add(found.sum(0, keepdim=True) if granularity == "sequence" else found, where, layers.index(name), clients)
    changed = near.change_tokens[:, None]
    changed = changed.sum(0, keepdim=True) if granularity == "sequence" else changed
    sums.rows[where, clients.stop :] += changed


def _scores(sums: _Sums, granularity: str, objective: Tensor) -> Scores:
    changed = sums.rows[:, -1]
    by_row = sums.rows[:, :-1]
    tokens = granularity in ("token", "layer")
    return Scores.of_weighted_deltas(
        tokens=by_row if tokens else None,
        layer_totals=sums.layers[:, :-1],
        change_tokens=changed if tokens else None,
        change=float(changed.sum()),
        objective=objective.double().cpu(),
        layer_tokens=None if sums.apart is None else sums.apart[..., :-1],
        positions=by_row if granularity == "position" else None,
    )
