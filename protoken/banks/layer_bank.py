"""One traced layer's updates, as they lie in the ledger: dense, quantised by row, or two thin factors.

Nothing is made dense to be scored. With x the layer's input and g the objective's gradient at its output,

    dense       <g, D x>             quantised    sum_o scale_o g_o <q_o, x>             low rank    s <B^T g, A x>

and clients of one layer may lie in different layouts: each layout is one call, the scores are put back in order.
Low-rank updates are scored as the product B A, so (c A, B / c) is the same update and gets the same score.

Layers that keep their weight as (in, out), GPT-2's Conv1D and embedding tables, are read as they lie: with the roles
of x and g exchanged, <g, D x> = <x, D^T g>. Experts keep E matrices in one parameter; a row meets the one that it was
routed to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from protoken.ledger import LowRank
from protoken.ops import (
    DenseBank,
    LowRankBank,
    client_scores_grouped,
    client_scores_lowrank_grouped,
    client_scores_lowrank_reference,
    client_scores_reference,
    client_totals_grouped,
)


@dataclass(frozen=True)
class Stored:
    """One client's update of one layer: `values` (with `scale` per row if quantised), or `factors`.

    Attributes:
        values: [O, I], or [I, O] where the layer keeps its weight so, with experts [E, ., .].
        scale: fp32 [rows] or [E, rows]; None for fp32, bf16 and fp16.
        factors: delta = scale B A with A [r, I] and B [O, r], whichever way the layer keeps its weight.
    """

    values: Tensor | None = None
    scale: Tensor | None = None
    factors: LowRank | None = None

    @property
    def layout(self) -> tuple[str, torch.dtype]:
        """Updates of equal layout go through one kernel call."""
        if self.factors is not None:
            # Kernels take one dtype for both factors: mixed ones are widened.
            a, b = self.factors.a.dtype, self.factors.b.dtype
            return "factors", a if a == b else torch.float32
        assert self.values is not None
        return "values", self.values.dtype

    @property
    def device(self) -> torch.device:
        tensor = self.factors.a if self.factors is not None else self.values
        assert tensor is not None
        return tensor.device

    def shape(self, transposed: bool) -> tuple[int, ...]:
        """(O, I) or (E, O, I)."""
        if self.factors is not None:
            return (self.factors.b.shape[0], self.factors.a.shape[1])
        assert self.values is not None
        return tuple(self.values.mT.shape) if transposed else tuple(self.values.shape)

    def to(self, device: torch.device) -> Stored:
        """The same on another device."""
        if self.factors is not None:
            return Stored(factors=LowRank(self.factors.a.to(device), self.factors.b.to(device), self.factors.scale))
        assert self.values is not None
        return Stored(self.values.to(device), None if self.scale is None else self.scale.to(device))

    def matrix(self, transposed: bool) -> Tensor:
        """delta as [O, I] or [E, O, I]: a view where it is kept dense, else materialised in fp32."""
        if self.factors is not None:
            return self.factors.dense()
        assert self.values is not None
        dense = self.values if self.scale is None else self.values.float() * self.scale[..., None]
        return dense.mT if transposed else dense


@dataclass(frozen=True)
class LayerBank:
    """K updates of one layer, ready for the kernels.

    Attributes:
        updates: K of them.
        transposed: dense values are (in, out).
        experts: E, or None for a layer with one matrix.
        groups: positions of the clients of each layout.
    """

    updates: tuple[Stored, ...]
    transposed: bool = False
    experts: int | None = None
    groups: tuple[tuple[int, ...], ...] = ()
    cache: dict[object, DenseBank | LowRankBank] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(updates: Sequence[Stored], *, transposed: bool = False, experts: int | None = None) -> LayerBank:
        groups: dict[tuple[str, torch.dtype], list[int]] = {}
        for index, update in enumerate(updates):
            groups.setdefault(update.layout, []).append(index)
        return LayerBank(tuple(updates), transposed, experts, tuple(map(tuple, groups.values())))

    @staticmethod
    def still(bank: LayerBank) -> LayerBank:
        """As many clients that change nothing: factors of rank 0, or one zero in all places of experts."""
        first = bank.updates[0]
        rows, columns = first.shape(bank.transposed)[-2:]
        if bank.experts is not None:
            assert first.values is not None
            nothing = Stored(torch.zeros((), device=first.device).expand(first.values.shape))
        else:
            a, b = torch.zeros(0, columns, device=first.device), torch.zeros(rows, 0, device=first.device)
            nothing = Stored(factors=LowRank(a, b))
        return LayerBank.of([nothing] * len(bank.updates), transposed=bank.transposed, experts=bank.experts)

    def matrices(self) -> list[Tensor]:
        """K dense updates [O, I] (or [E, O, I]); see `Stored.matrix`."""
        return [update.matrix(self.transposed) for update in self.updates]

    def is_lowrank(self, group: tuple[int, ...]) -> bool:
        return self.updates[group[0]].factors is not None

    def swaps(self, group: tuple[int, ...]) -> bool:
        """Whether x and g exchange their roles in this group's kernel call."""
        return self.transposed and not self.is_lowrank(group)

    def lowrank(self, group: tuple[int, ...]) -> LowRankBank:
        if group not in self.cache:
            found = [self.updates[index].factors for index in group]
            dtype = self.updates[group[0]].layout[1]
            pairs = [(f.a.to(dtype), f.b.to(dtype), f.scale) for f in found if f is not None]
            scale = torch.tensor([s for _, _, s in pairs], device=pairs[0][0].device)
            self.cache[group] = LowRankBank.of([a for a, _, _ in pairs], [b for _, b, _ in pairs], scale)
        bank = self.cache[group]
        assert isinstance(bank, LowRankBank)
        return bank

    def dense(self, group: tuple[int, ...], expert: int | None = None) -> DenseBank:
        """The group's matrices as they lie: of one expert, or all of them stacked, [E rows, .], if `expert` is None."""
        key = (group, expert)
        if key not in self.cache:
            values, scales = [], []
            for index in group:
                update = self.updates[index]
                assert update.values is not None
                value, scale = update.values, update.scale
                if self.experts is not None:
                    value = value.flatten(0, 1) if expert is None else value[expert]
                    if scale is not None:
                        scale = scale.flatten() if expert is None else scale[expert]
                values.append(value)
                scales += [] if scale is None else [scale]
            self.cache[key] = DenseBank.of(values, torch.stack(scales) if scales else None)
        bank = self.cache[key]
        assert isinstance(bank, DenseBank)
        return bank


def scores(
    banks: Sequence[LayerBank],
    xs: Sequence[Tensor],
    grads: Sequence[Tensor],
    routes: Sequence[Tensor | None],
    backend: str,
) -> Tensor:
    """s[l, k, t] = <g_t, delta_k x_t> of L layers, [L, K, T] in fp32 (fp64 for a double-precision model), on the CPU.

    Args:
        banks: of L layers with K clients each.
        xs, grads: [T, I] and [T, O]; for experts with n slots per token [T, n I] and [T, n O].
        routes: for experts the expert of every slot, [T, n]; else None.
    """
    clients, tokens = len(banks[0].updates), xs[0].shape[0]
    wide = torch.float64 if xs[0].dtype == torch.float64 else torch.float32
    out = torch.zeros(len(banks), clients, tokens, dtype=wide)
    calls: dict[tuple[tuple[int, ...], bool, torch.device], list[int]] = {}
    for layer, bank in enumerate(banks):
        route = routes[layer]
        for group in bank.groups:
            if route is not None:
                found = _expert_scores(bank, group, xs[layer], grads[layer], route, backend)
                out[layer, list(group)] = found.to(out)
            else:
                calls.setdefault((group, bank.is_lowrank(group), xs[layer].device), []).append(layer)
    for (group, lowrank, _), layers in calls.items():
        pairs = [_roles(banks[n], group, xs[n], grads[n]) for n in layers]
        wrapped = [banks[n].lowrank(group) if lowrank else banks[n].dense(group) for n in layers]
        found = _call([x for x, _ in pairs], [g for _, g in pairs], wrapped, backend).to(out)
        for row, layer in zip(found, layers, strict=True):
            out[layer, list(group)] = row
    return out


def totals(banks: Sequence[LayerBank], matrices: Sequence[Tensor], backend: str) -> Tensor:
    """S[l, k] = <M_l, delta_k> of L layers with M [O, I] or [E, O, I]; [L, K], dtype and device as `scores`."""
    clients = len(banks[0].updates)
    wide = torch.float64 if matrices[0].dtype == torch.float64 else torch.float32
    out = torch.zeros(len(banks), clients, dtype=wide)
    calls: dict[tuple[tuple[int, ...], torch.device], list[int]] = {}
    for layer, bank in enumerate(banks):
        for group in bank.groups:
            if bank.is_lowrank(group):
                out[layer, list(group)] = _lowrank_totals(bank.lowrank(group), matrices[layer]).to(out)
            elif wide == torch.float64:
                products = [matrices[layer] * bank.updates[n].matrix(bank.transposed).double() for n in group]
                out[layer, list(group)] = torch.stack([product.sum() for product in products]).to(out)
            else:
                calls.setdefault((group, matrices[layer].device), []).append(layer)
    for (group, _), layers in calls.items():
        ms = [matrices[n].mT if banks[n].transposed else matrices[n] for n in layers]
        ms = [m.flatten(0, 1) if m.dim() == 3 else m for m in ms]
        found = client_totals_grouped(ms, [banks[n].dense(group) for n in layers], backend=backend).to(out)
        for row, layer in zip(found, layers, strict=True):
            out[layer, list(group)] = row
    return out


def directions(bank: LayerBank, x: Tensor, route: Tensor | None, clients: slice) -> Tensor:
    """delta_k x for a run of clients: [k, ..., O] from x [..., I], or from token ids [..., 1] at an embedding table.

    With experts x is [..., n I], the route [..., n] and the result [k, ..., n O].
    """
    if route is not None:
        return torch.stack([_routed(u.matrix(bank.transposed).to(x), x, route) for u in bank.updates[clients]])
    return torch.stack([_acted(update, bank.transposed, x) for update in bank.updates[clients]])


def _acted(update: Stored, transposed: bool, x: Tensor) -> Tensor:
    looked_up = not x.is_floating_point()
    if update.factors is not None:
        a, b, scale = update.factors.a, update.factors.b, update.factors.scale
        if looked_up:
            return a.float().T[x[..., 0]] @ b.float().T * scale
        return (x @ a.to(x).T) @ b.to(x).T * scale
    if looked_up:
        assert update.values is not None
        rows = update.values[x[..., 0]].float()
        return rows if update.scale is None else rows * update.scale[x[..., 0], None]
    return x @ update.matrix(transposed).to(x).mT


def _routed(matrices: Tensor, x: Tensor, route: Tensor) -> Tensor:
    """Every slot's x through its own expert's matrix: [E, O, I], [..., n I] and [..., n] give [..., n O]."""
    rows, experts = x.reshape(route.numel(), -1), route.flatten()
    out = rows.new_zeros(rows.shape[0], matrices.shape[1])
    for expert in _hit(experts):
        own = experts == expert
        out[own] = rows[own] @ matrices[expert].T
    return out.reshape(*x.shape[:-1], -1)


def _hit(experts: Tensor) -> list[int]:
    return torch.bincount(experts).nonzero()[:, 0].tolist()


def _roles(bank: LayerBank, group: tuple[int, ...], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return (grad, x) if bank.swaps(group) else (x, grad)


def _call(xs: list[Tensor], grads: list[Tensor], banks: Sequence[DenseBank | LowRankBank], backend: str) -> Tensor:
    """[L, k, T] of banks of one kind. The kernels compute in fp32; double precision goes to the references."""
    dense = [bank for bank in banks if isinstance(bank, DenseBank)]
    lowrank = [bank for bank in banks if isinstance(bank, LowRankBank)]
    if xs[0].dtype == torch.float64:
        double = _dense_double if dense else _lowrank_double
        return torch.stack([double(x, g, b) for x, g, b in zip(xs, grads, banks, strict=True)])
    if dense:
        return client_scores_grouped(xs, grads, dense, backend=backend)
    return client_scores_lowrank_grouped(xs, grads, lowrank, backend=backend)


def _dense_double(x: Tensor, grad: Tensor, bank: Any) -> Tensor:
    matrices = torch.stack([bank.matrix(client) for client in range(bank.clients)])
    return client_scores_reference(x, grad, matrices, scale=bank.scale)


def _lowrank_double(x: Tensor, grad: Tensor, bank: Any) -> Tensor:
    pairs = [bank.pair(client) for client in range(bank.clients)]
    return client_scores_lowrank_reference(x, grad, [a for a, _ in pairs], [b for _, b in pairs], bank.scale)


def _expert_scores(
    bank: LayerBank, group: tuple[int, ...], x: Tensor, grad: Tensor, route: Tensor, backend: str
) -> Tensor:
    """[k, T]: only the experts that were hit are read; each meets its own slots, which are then summed per token."""
    slots = route.numel()
    x, grad, experts = x.reshape(slots, -1), grad.reshape(slots, -1), route.flatten()
    found = torch.zeros(len(group), slots, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for expert in _hit(experts):
        own = (experts == expert).nonzero()[:, 0]
        left, right = _roles(bank, group, x[own], grad[own])
        found[:, own] = _call([left], [right], [bank.dense(group, expert)], backend)[0].to(found)
    return found.reshape(len(group), *route.shape).sum(-1)


def _lowrank_totals(bank: LowRankBank, m: Tensor) -> Tensor:
    """scale_k <B_k, M A_k^T>: M is read once, for all clients' A together."""
    pairs = [bank.pair(client) for client in range(bank.clients)]
    products = m @ torch.cat([a.to(m) for a, _ in pairs]).T  # [O, sum of ranks]
    parts = torch.split(products, [a.shape[0] for a, _ in pairs], dim=1)
    found = [(part * b.to(m)).sum() for part, (_, b) in zip(parts, pairs, strict=True)]
    return torch.stack(found) * bank.scale.to(m)
