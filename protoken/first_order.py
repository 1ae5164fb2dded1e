"""First-order scores of one response by the local, the forward or the reverse way, in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from protoken.banks.bank import Bank, BankInParts
from protoken.banks.layer_bank import LayerBank
from protoken.generation import Generated
from protoken.models.architectures import Architecture
from protoken.planning.memory import TANGENTS, Chunks
from protoken.planning.plan import Plan, local_layers
from protoken.precision import warn_of_noise
from protoken.reverse_way import reverse_scores
from protoken.ways.capture import Capture
from protoken.ways.forward import forward_scores
from protoken.ways.projection import Scores, project_local, project_reverse
from protoken.ways.pullback import PulledBack
from protoken.ways.relevance import LocalRelevance, Response, local_relevance, reverse_relevance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FirstOrder:
    """One response on its way to scores, by a settled plan."""

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        generated: Generated,
        bank: Bank | BankInParts,
        plan: Plan,
        chunks: Chunks,
    ) -> None:
        self.model, self.architecture, self.plan, self.chunks = model, architecture, plan, chunks
        self.capture, self.response, self.bank = generated.capture, generated.response, bank
        local = local_layers(architecture)
        self.near = tuple(name for name in plan.layers if name in local)
        self.deep = tuple(name for name in plan.layers if name not in local)
        if plan.limit is None:
            # Its copy in fp32 of the last block and the head is in no ceiling.
            warn_of_noise(model, architecture, generated, bank, self.near, plan.objective)

    def scores(self) -> Scores:
        plan, whole = self.plan, self.plan.limit is None
        if plan.way == "reverse" and plan.granularity == "sequence" and whole:
            reverse = reverse_relevance(
                self.model, self.architecture, self.capture, self.response, plan.layers, plan.objective
            )
            return project_reverse(reverse, self.bank, plan.layers, plan.backend)
        local = self._local_relevance()
        if plan.way == "reverse" and self.deep:
            return self._reverse(local)
        scores = self._near(local, by_layer=plan.granularity == "layer") if self.near else None
        if plan.way == "forward":
            scores = self._forward(local, scores)
        assert scores is not None
        if plan.granularity == "sequence":
            scores = replace(scores, tokens=None, change_tokens=None, residual_tokens=None)
        return scores

    def _local_relevance(self) -> LocalRelevance:
        """Of all tokens, a chunk of them at a time."""
        response, step = self.response, self.chunks.tokens
        found = []
        for start in range(0, response.new_tokens, step):
            stop = min(start + step, response.new_tokens)
            capture, part = _token_range(self.capture, response, start, stop)
            found.append(local_relevance(self.model, self.architecture, capture, part, self.near, self.plan.objective))
        return _joined(found)

    def _near(self, local: LocalRelevance, *, by_layer: bool) -> Scores:
        return project_local(local, self.bank, self.near, self.plan.backend, by_layer=by_layer)

    def _reverse(self, local: LocalRelevance) -> Scores:
        pulled = PulledBack(
            self.model, self.architecture, self.capture, self.response, self.deep, local, self.chunks.blocks
        )
        near = self._near(local, by_layer=True) if self.near else None
        return reverse_scores(
            pulled, near, self.bank, self.plan.layers, self.plan.granularity, self.chunks, self.plan.backend
        )

    def _forward(self, local: LocalRelevance, near: Scores | None) -> Scores:
        """Tangents for the layers that later positions can see, the local way for the last block's others."""
        by_layer = self.plan.granularity == "layer"
        alone = [[name] for name in self.deep] if by_layer else [list(self.deep)]
        # [L or 1, K + 1, T]: the change rides along as one more direction, so that conservation is measured here, too.
        raw = torch.cat([torch.stack(self._pushed(part, local, alone)) for part in self.bank.parts(self.deep)], 1)
        by_client, changed = raw[:, :-1] * self.bank.weights[:, None], raw[:, -1].sum(0)
        tokens = by_client.sum(0).T
        apart = self._in_order(by_client.permute(2, 0, 1), near) if by_layer else None
        if near is not None:
            assert near.tokens is not None
            assert near.change_tokens is not None
            tokens, changed = tokens + near.tokens, changed + near.change_tokens
        return Scores.of_weighted_deltas(
            tokens=tokens.contiguous(),
            layer_totals=None if apart is None else apart.sum(0),
            change_tokens=changed,
            change=float(changed.sum()),
            objective=local.objective.double().cpu(),
            layer_tokens=apart,
        )

    def _pushed(self, part: Bank, local: LocalRelevance, alone: Sequence[Sequence[str]]) -> list[Tensor]:
        """Per set of layers what one part's clients (and the change) score when only these layers are moved."""
        banks = {name: part.with_change(name) for name in self.deep}
        chunk = min(self.chunks.clients, TANGENTS) + 1  # the change rides along, not in a pass of its own
        found = []
        for moved in alone:
            some = {name: bank if name in moved else LayerBank.still(bank) for name, bank in banks.items()}
            raw = forward_scores(
                self.model, self.architecture, self.capture, self.response, self.deep, some, local, chunk=chunk
            )
            found.append(raw.double().cpu())
        return found

    def _in_order(self, deep: Tensor, near: Scores | None) -> Tensor:
        """[T, L, K] in the order of the plan's layers."""
        whole = deep if near is None or near.layer_tokens is None else torch.cat([deep, near.layer_tokens], 1)
        names = [*self.deep, *self.near]
        return whole[:, [names.index(name) for name in self.plan.layers]].contiguous()


def _token_range(capture: Capture, response: Response, start: int, stop: int) -> tuple[Capture, Response]:
    """Tokens start..stop as a response of their own, whose prompt is all before them."""
    if (start, stop) == (0, response.new_tokens):
        return capture, response
    prompt = response.prompt_length
    part = Response(response.ids[:, : prompt + stop], prompt + start)
    if capture.every:
        return capture, part
    return capture.mapped(lambda kept: [torch.cat(kept, dim=1)[:, start:stop]]), part


def _joined(found: Sequence[LocalRelevance]) -> LocalRelevance:
    """The relevance of consecutive runs of tokens as one."""
    if len(found) == 1:
        return found[0]

    def of(name: str) -> dict[str, Tensor]:
        return {layer: torch.cat([getattr(one, name)[layer] for one in found]) for layer in getattr(found[0], name)}

    return LocalRelevance(
        x=of("x"),
        grad=of("grad"),
        hidden_grad=torch.cat([one.hidden_grad for one in found]),
        projection_grad=torch.cat([one.projection_grad for one in found]),
        objective=torch.cat([one.objective for one in found]),
        replay_error=max(one.replay_error for one in found),
        routes=of("routes"),
    )
