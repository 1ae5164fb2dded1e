"""`Trace`: what one generation said, and how much of it each client taught.

    trace.clients                     ranked clients: raw score, share, weight, confidence
    trace.tokens                      every generated token with its score per client
    trace.span(3, 9), trace.sentences(), trace.find("sorry")     the same question about parts of the answer
    trace.show(), trace.to_html(path)       look instead of read
    trace.save(path), Trace.load(path)      keep

Scores s[k, t] are raw and additive, in the objective's unit (nats for the log-probability), with the
aggregation weight included: the client's weight times <delta_k x_t, g_t>, summed over the traced layers.
They satisfy conservation:

    sum_k totals[k] + residual == change        change = sum over layers, tokens of <(G - G_prev) x, g>

Nothing here imports torch or transformers: a trace is text and numbers, whatever made it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from protoken.arguments import check_flag, finite, listed, whole
from protoken.errors import ArgumentError
from protoken.results.checks import Array, check_parts, check_sums, frozen_array, utf8
from protoken.results.parts import UNITS, WITHOUT_CONSERVATION, ClientScore, Objective, Token, TokenScore, TraceInfo

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from protoken.counterfactual import Counterfactual
    from protoken.history import History

__all__ = ["ClientScore", "Objective", "Token", "TokenScore", "Trace", "TraceInfo"]


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """The attribution of one generation. T tokens, K clients, L layers; arrays are read-only float64.

    prompt, prompt_ids  as the model saw it, special tokens included; P ids
    response          exactly the tokens' texts one after the other, special tokens included
    token_list        [T] ids and texts; ``tokens`` has them with their scores
    client_ids        [K] in the order of all arrays; ``clients`` has them ranked
    weights           [K] aggregation weights; of several rounds their mean, 0 for a round without the client
    token_scores      [T, K], or None when only sequence totals were computed (then token_residual too)
    totals            [K] = token_scores summed over tokens
    objective_values  [T] log-probability, log-odds or logit of each generated token under the model
    token_residual    [T] what no client accounts for, per token
    residual, change  sum(totals) + residual == change
    layer_totals      [L, K] totals by layer of info.layers, or None
    token_layer_scores  [T, L, K] = token_scores by layer, where granularity "layer" was asked for, else None
    position_scores   [S, K], S = P - 1 + T positions that entered the model, prompt first: totals by the position
                      whose activations carried them; where granularity "position" was asked for, else None
    info              how the scores came to be: method, way, layers, rounds, seconds, versions
    start             where token 0 stands in the generation this trace was cut from
    standard_errors   [K] of the totals, where they were sampled, else None

    Errors: ShapeError, DtypeError, NonFiniteError, ArgumentError name the field that does not fit.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    response: str
    token_list: tuple[Token, ...]
    client_ids: tuple[str, ...]
    weights: Array
    token_scores: Array | None
    totals: Array
    objective_values: Array
    token_residual: Array | None
    residual: float
    change: float
    layer_totals: Array | None
    info: TraceInfo
    start: int = 0
    standard_errors: Array | None = None
    token_layer_scores: Array | None = None
    position_scores: Array | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name in ("prompt", "response"):
            utf8(name, getattr(self, name))
        put("prompt_ids", tuple(whole("prompt_ids", i) for i in listed("prompt_ids", self.prompt_ids)))
        put("token_list", listed("token_list", self.token_list))
        put("client_ids", tuple(utf8("client_ids", client) for client in listed("client_ids", self.client_ids)))
        check_parts(self)
        tokens, clients, layers = len(self.token_list), len(self.client_ids), len(self.info.layers)
        if not clients or len(set(self.client_ids)) != clients:
            raise ArgumentError("client_ids", expected="at least one, all different", got=self.client_ids)
        if "".join(token.text for token in self.token_list) != self.response:
            raise ArgumentError("response", expected="the tokens' texts, concatenated", got=self.response)
        if (self.token_scores is None) != (self.token_residual is None):
            raise ArgumentError("token_residual", expected="token_scores and token_residual, or neither")
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "weights": ((clients,), "[K]"),
            "totals": ((clients,), "[K]"),
            "objective_values": ((tokens,), "[T]"),
            "token_scores": ((tokens, clients), "[T, K]"),
            "token_residual": ((tokens,), "[T]"),
            "layer_totals": ((layers, clients), "[L, K]"),
            "standard_errors": ((clients,), "[K]"),
            "token_layer_scores": ((tokens, layers, clients), "[T, L, K]"),
            "position_scores": ((max(len(self.prompt_ids) - 1 + tokens, 0), clients), "[S, K]"),
        }
        needed = ("weights", "totals", "objective_values")
        for name, (shape, axes) in shapes.items():
            value = getattr(self, name)
            put(name, None if value is None and name not in needed else frozen_array(name, value, shape, axes))
        for name in ("residual", "change"):
            put(name, finite(name, getattr(self, name)))
        put("start", whole("start", self.start))
        check_sums(self)

    # ---- reading -------------------------------------------------------------------------------------

    @property
    def unit(self) -> str:
        """Of every score: "nats" (log-probability), "nats of log-odds", "logit units", or a baseline's own."""
        return WITHOUT_CONSERVATION.get(self.info.method) or UNITS[self.info.objective]

    @property
    def text(self) -> str:
        """The response as a reader sees it: without special tokens."""
        return "".join(token.text for token in self.token_list if not token.special)

    @property
    def shares(self) -> Array:
        """[K], P = softmax_k(totals) (arXiv 2601.19672). A ranking aid; the raw scores are the finding."""
        exponentials = np.exp(self.totals - self.totals.max())
        shares: Array = exponentials / exponentials.sum()
        return shares

    @property
    def clients(self) -> list[ClientScore]:
        """Clients by descending score, ties by id."""
        order = sorted(range(len(self.client_ids)), key=lambda k: (-self.totals[k], self.client_ids[k]))
        shares, sure = self.shares, self._top_rates
        return [
            ClientScore(
                self.client_ids[k],
                float(self.totals[k]),
                float(shares[k]),
                rank,
                float(self.weights[k]),
                None if sure is None else float(sure[k]),
            )
            for rank, k in enumerate(order, start=1)
        ]

    @cached_property
    def _top_rates(self) -> Array | None:
        from protoken.confidence import top_rates

        return top_rates(self)

    @property
    def tokens(self) -> list[TokenScore]:
        """Every token; ``scores`` and ``top`` are None in a totals-only trace. Ties for top go by id."""
        found = []
        for index, token in enumerate(self.token_list):
            scores, top = None, None
            if self.token_scores is not None:
                scores = dict(zip(self.client_ids, self.token_scores[index].tolist(), strict=True))
                top = min(scores.items(), key=lambda item: (-item[1], item[0]))[0]
            value = float(self.objective_values[index])
            found.append(TokenScore(index, token.id, token.text, value, scores, top))
        return found

    @property
    def conservation_residual(self) -> float:
        """|residual| / max(sum |totals|, |change|, smallest normal float64), without unit.

        0 when the clients account for everything. Large means the server did more than a weighted mean,
        or an error in ledger or code. ``residual`` is the same in the objective's unit.
        """
        scale = max(float(np.abs(self.totals).sum()), abs(self.change), float(np.finfo(np.float64).tiny))
        return abs(self.residual) / scale

    # ---- parts ---------------------------------------------------------------------------------------

    def span(self, start: int, stop: int) -> Trace:
        """The same trace restricted to tokens start..stop (half-open).

        Totals, residual and change are those tokens' own; layer_totals (unless layers are known per token) and
        position_scores are of the whole answer and become None. ArgumentError unless 0 <= start < stop <= T, or for a
        totals-only trace.
        """
        scores, residuals = self._need_token_scores("span")
        i, j = whole("start", start), whole("stop", stop)
        if not 0 <= i < j <= len(self.token_list):
            limit = f"0 <= start < stop <= {len(self.token_list)}"
            raise ArgumentError("span", expected=limit, got=(i, j), remedy="Token indices are trace.tokens[n].index")
        kept = self.token_list[i:j]
        totals, residual = scores[i:j].sum(axis=0), float(residuals[i:j].sum())
        apart = None if self.token_layer_scores is None else self.token_layer_scores[i:j]
        part = replace(
            self,
            response="".join(token.text for token in kept),
            token_list=kept,
            token_scores=scores[i:j],
            totals=totals,
            objective_values=self.objective_values[i:j],
            token_residual=residuals[i:j],
            residual=residual,
            change=float(totals.sum()) + residual,
            layer_totals=None if apart is None else apart.sum(axis=0),
            token_layer_scores=apart,
            position_scores=None,
            standard_errors=None,
            start=self.start + i,
        )
        # replace() leaves behind what is no field: where the trace came from (origin.py).
        if "_origin" in vars(self):
            vars(part)["_origin"] = vars(self)["_origin"]
        return part

    def sentences(self) -> list[Trace]:
        """One `span` per sentence; every token is in exactly one. ArgumentError for a totals-only trace."""
        from protoken.results.spans import sentence_ranges

        self._need_token_scores("sentences")
        return [self.span(i, j) for i, j in sentence_ranges(self.token_list)]

    def find(self, phrase: str, *, ignore_case: bool = False) -> list[Trace]:
        """One `span` per place where the answer says `phrase`, as whole tokens: who taught it these words?

        ArgumentError for an empty phrase and for a totals-only trace.
        """
        from protoken.results.spans import phrase_ranges

        self._need_token_scores("find")
        if not isinstance(phrase, str) or not phrase:
            raise ArgumentError("phrase", expected="at least one character", got=repr(phrase))
        check_flag("ignore_case", ignore_case)
        return [self.span(i, j) for i, j in phrase_ranges(self.token_list, phrase, ignore_case=ignore_case)]

    def _need_token_scores(self, asked: str) -> tuple[Array, Array]:
        if self.token_scores is None or self.token_residual is None:
            raise ArgumentError(
                asked,
                expected="a trace with scores per token",
                got="sequence totals only",
                remedy='Trace again with granularity="token"',
            )
        return self.token_scores, self.token_residual

    # ---- asking again -----------------------------------------------------------------------------------

    def counterfactual(
        self,
        without: str | Collection[str],
        *,
        reaggregate: bool = True,
        generate: bool = False,
        model: Any = None,
        ledger: Any = None,
        tokenizer: Any = None,
    ) -> Counterfactual:
        """How likely were these tokens if these clients had not taken part? See `protoken.counterfactual`.

        ``generate``: also answer the prompt anew without them. ``model`` and ``ledger`` are needed for a trace that
        was loaded, or whose model is gone.
        """
        from protoken.counterfactual import counterfactual

        return counterfactual(
            self,
            without,
            reaggregate=reaggregate,
            generate=generate,
            model=model,
            ledger=ledger,
            tokenizer=tokenizer,
        )

    def lineage(
        self,
        *,
        nodes: int | None = 1,
        objective: Objective = "log_odds",
        rounds: Any = "all",
        granularity: Any = "sequence",
        model: Any = None,
        ledger: Any = None,
        tokenizer: Any = None,
    ) -> Trace:
        """Who, over the federation's life, taught what this response says? A trace of its own; see `protoken.lineage`.

        ``nodes=None``: the whole path, which adds up to the whole change. ``granularity="token"``: of every token.
        ``model`` and ``ledger`` are needed for a trace that was loaded, or whose model is gone.
        """
        from protoken.lineage import lineage

        return lineage(
            self,
            nodes=nodes,
            objective=objective,
            rounds=rounds,
            granularity=granularity,
            model=model,
            ledger=ledger,
            tokenizer=tokenizer,
        )

    def history(
        self,
        *,
        nodes: int = 1,
        objective: Objective = "log_odds",
        since: int | None = None,
        model: Any = None,
        ledger: Any = None,
        tokenizer: Any = None,
    ) -> History:
        """When did the model learn to say this, and from whom? Round by round; see `protoken.history`.

        ``since``: the first round to look at. ``model`` and ``ledger`` are needed for a trace that was loaded, or whose
        model is gone.
        """
        from protoken.history import history

        return history(
            self, nodes=nodes, objective=objective, since=since, model=model, ledger=ledger, tokenizer=tokenizer
        )

    # ---- looking -------------------------------------------------------------------------------------

    def show(self, console: Console | None = None, *, top: int | None = 10) -> None:
        """Print tokens, ranking, residual and timings; ``top`` limits the ranking (None: all clients)."""
        from protoken.report.terminal import show

        show(self, console, top=top)

    def to_html(self, path: str | PathLike[str] | None = None) -> str:
        """One self-contained page, everything in it escaped; written to ``path`` if given."""
        from protoken.report.html import trace_html

        return trace_html(self, path)

    def _repr_html_(self) -> str:
        from protoken.report.html import notebook_html

        return notebook_html(self)

    def __rich__(self) -> Text:
        from protoken.report.terminal import headline

        return headline(self)

    def __repr__(self) -> str:
        best = self.clients[0]
        return (
            f"Trace({len(self.token_list)} tokens, {len(self.client_ids)} clients, top {best.client!r} "
            f"{best.score:+.3g} {self.unit}, share {best.share:.3f}, "
            f"conservation residual {self.conservation_residual:.1e})"
        )

    # ---- keeping -------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The trace in JSON's own types, as `save` writes it."""
        from protoken.results.export import to_dict

        return to_dict(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Write JSON (schema-versioned; every float comes back bit for bit). The file appears whole or not at all.

        OSError names the file. Links are followed; to a device or a pipe (/dev/stdout) it is written as it stands.
        """
        from protoken.results.export import save

        save(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Trace:
        """Read what `save` wrote. TraceFormatError for anything else; safe on files from strangers."""
        from protoken.results.export import load

        return load(path)

    def to_dataframe(self, granularity: str = "token") -> Any:
        """Long form, one score per row; needs pandas.

        "token": T K rows with columns index, id, token, client, score. "layer": T L K rows, with a column layer before
        client. "position": S K rows with position, id, client, score. "sequence": K rows with client, score.
        MissingDependencyError without pandas, ArgumentError for a granularity that this trace does not have.
        """
        from protoken.results.frame import to_dataframe

        return to_dataframe(self, granularity)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trace):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    __hash__ = None  # type: ignore[assignment]


def _same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.array_equal(a, b)
    return a == b
