"""When did the model learn to say this, and from whom? A finished trace's response, followed round by round.

    f_r      = f at G_r, for every round r from the first model on                    f = sum_t log(p_t / (1 - p_t))
    s[r, k]  = rho_k^r integral_0^1 < delta_k^r, df/dW at G_{r-1} + a (G_r - G_{r-1}) > da

Each round's updates are weighed by the gradient where the model stood in that round, on the way that training really
took, so that sum_{r,k} s[r, k] + the residuals = f(G) - f(G_first). `Trace.lineage` takes the straight way instead: one
gradient serves all rounds there, and cannot tell them apart. The models in between need not be kept: the ledger's
changes, taken off one after the other, lead back to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from protoken.attachment import Attachment
from protoken.banks.bank import require_usable, select_rounds
from protoken.errors import ArgumentError
from protoken.ledger import Ledger
from protoken.methods.aumann_shapley import aumann_shapley_scores
from protoken.methods.game import Game
from protoken.methods.placement import ASKED_FOR
from protoken.methods.replayed import recorded_parameters
from protoken.methods.updates import Updates, read_updates, warned_of_gaps
from protoken.models.layers import input_device
from protoken.models.patching import evaluation_mode, refuse_inference_mode
from protoken.models.twin import uncompiled
from protoken.origin import ids_of, origin_of
from protoken.planning.options import Options
from protoken.results import Trace
from protoken.results.checks import Array
from protoken.results.parts import UNITS
from protoken.text import as_row
from protoken.ways.objective import Objective
from protoken.ways.projection import Scores
from protoken.ways.relevance import Response

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False, repr=False)
class History:
    """How a response came to be said. R rounds, K clients, T tokens; scores in `unit`.

    rounds        R numbers, ascending; the last is the model's own
    client_ids    K ids: all who took part in any of them
    tokens        the texts of the T tokens
    prompt, model, ledger   of the trace
    values        [R + 1, T] objective of each token under the model before the first round, then after each
    scores        [R, K] contribution of each client's weighted update; 0 for a round without the client
    residuals     [R] what the clients' scores leave of the round's change: quadrature, and the server's own part
    gaps          rounds that do not start where the one before ended; the values before them are of models without
                  what changed in between
    """

    rounds: tuple[int, ...]
    client_ids: tuple[str, ...]
    tokens: tuple[str, ...]
    values: Array
    scores: Array
    residuals: Array
    objective: Objective
    nodes: int
    prompt: str = ""
    model: str = ""
    ledger: str = ""
    gaps: tuple[int, ...] = ()

    @property
    def response(self) -> str:
        """The tokens' texts, one after the other."""
        return "".join(self.tokens)

    @property
    def unit(self) -> str:
        """Of the scores and values."""
        return UNITS[self.objective]

    @property
    def changes(self) -> Array:
        """[R], f_r - f_{r-1}: what each round did for the response."""
        found: Array = np.diff(self.values.sum(axis=1))
        return found

    @property
    def totals(self) -> Array:
        """[K], scores summed over the rounds."""
        found: Array = self.scores.sum(axis=0)
        return found

    @property
    def ranking(self) -> list[tuple[str, float]]:
        """Clients and totals, descending; ties by id."""
        pairs = zip(self.client_ids, self.totals.tolist(), strict=True)
        return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))

    def to_dict(self) -> dict[str, Any]:
        """In JSON's own types."""
        lists = {name: list(getattr(self, name)) for name in ("rounds", "client_ids", "tokens", "gaps")}
        plain = {name: getattr(self, name) for name in ("objective", "unit", "nodes", "prompt", "model", "ledger")}
        arrays = {name: getattr(self, name).tolist() for name in ("values", "scores", "residuals", "changes", "totals")}
        return plain | lists | arrays

    def to_html(self, path: str | PathLike[str] | None = None) -> str:
        """One self-contained page, everything in it escaped; written to ``path`` if given."""
        from protoken.report.history import history_html

        return history_html(self, path)

    def _repr_html_(self) -> str:
        from protoken.report.page import framed

        return framed(self.to_html(), "protoken history")

    def __repr__(self) -> str:
        best, total = self.ranking[0]
        return (
            f"History({len(self.rounds)} rounds, {len(self.client_ids)} clients, top {best!r} {total:+.3g} {self.unit})"
        )

    def __rich__(self) -> RenderableType:
        from protoken.report.history import HistoryTable

        return HistoryTable(self)


def history(
    trace: Trace,
    *,
    nodes: int = 1,
    objective: Objective = "log_odds",
    since: int | None = None,
    model: PreTrainedModel | None = None,
    ledger: Ledger | str | PathLike[str] | None = None,
    tokenizer: Any = None,
) -> History:
    """Follow a trace's response through the rounds that made its model.

    Costs per round `nodes` forward and backward passes, two forward passes (with more than one node up to 31 more, to
    place them) and one reading of the round's updates.

    Args:
        nodes: gradients along each round's change; 1 is its midpoint. More make the residuals smaller.
        objective: as in `protoken.trace`.
        since: the first round to look at; the ledger's first if left out.
        model, ledger, tokenizer: where the trace does not know them any more (loaded from a file).

    Raises:
        ArgumentError: the trace is a part of an answer that does not begin where the answer does, it has no tokens, or
            a wrong choice.
        UnknownRoundError: `since` is no round of the ledger.
        ModelError: the trace does not know its model, or that model is gone.
        LedgerMismatchError: the model is not the one that the ledger was written for.
    """
    ids, prompt_length = ids_of(trace)
    options = Options(rounds="all", method="aumann_shapley", nodes=nodes, objective=objective)
    points = ASKED_FOR if options.nodes is None else options.nodes
    if not trace.token_list:
        raise ArgumentError("trace", expected="a response of at least one token", got="an empty one")
    model, own = origin_of(trace, model, ledger, tokenizer)
    refuse_inference_mode(model)
    own.follow(model)
    numbers = select_rounds(own.ledger, "all", own.round)
    if since is not None:
        (since,) = select_rounds(own.ledger, (since,), own.round)
        numbers = tuple(number for number in numbers if number >= since)
    require_usable(own.ledger, numbers)
    names = recorded_parameters(own.ledger, numbers, model, own.architecture)
    gaps = warned_of_gaps([own.ledger.round(number) for number in numbers], names)
    response = Response(as_row(ids, input_device(model)), prompt_length)
    with evaluation_mode(model):
        before, found = walk(
            model,
            own,
            response,
            stretches(model, own, numbers, names),
            objective=options.resolved_objective,
            nodes=points,
        )
    clients = tuple(sorted({client for present, _ in found for client in present}))
    scores = np.zeros((len(numbers), len(clients)))
    for row, (present, one) in zip(scores, found, strict=True):
        row[[clients.index(client) for client in present]] = one.totals.numpy()
    return History(
        rounds=numbers,
        client_ids=clients,
        tokens=tuple(token.text for token in trace.token_list),
        values=np.stack([before, *(one.objective.numpy() for _, one in found)]),
        scores=scores,
        residuals=np.array([one.residual for _, one in found]),
        objective=options.resolved_objective,
        nodes=points,
        prompt=trace.prompt,
        model=trace.info.model,
        ledger=trace.info.ledger,
        gaps=gaps,
    )


def stretches(
    model: PreTrainedModel, own: Attachment, numbers: Sequence[int], names: Sequence[str]
) -> Iterator[Updates]:
    """The updates of consecutive rounds that end with the model's own, the last round first, each read when it is due.

    What moves are these parameters, which every one of the rounds records.
    """
    if own.verify:
        own.check_weights(model, names)
    for number in reversed(numbers):
        yield read_updates(own.ledger, model, (number,), names)


def walk(
    model: PreTrainedModel,
    own: Attachment,
    response: Response,
    rounds: Iterable[Updates],
    *,
    objective: Objective = "log_odds",
    nodes: int = 1,
) -> tuple[Array, list[tuple[tuple[str, ...], Scores]]]:
    """Back along `stretches`: f_t [T] before the first round; then per round its clients and their scores."""
    model, architecture = uncompiled(model, own.architecture)
    game, found = None, []
    for updates in rounds:
        game = Game(model, architecture, response, updates, objective, end=None if game is None else game.start)
        found.append((updates.clients, aumann_shapley_scores(game, nodes)))
    assert game is not None
    return game.value_at_start().numpy(), found[::-1]
