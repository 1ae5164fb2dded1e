"""Flower: wrap a strategy in one line, and every round lands in the ledger.

    from protoken.integrations.flower import record

    strategy = record(FedAvg(...), "federation.ledger", model="my-model")        # in the ServerApp
    app = ClientApp(mods=[identified()])                                         # in the ClientApp

Any strategy of either API does: `flwr.serverapp.strategy` (messages) and `flwr.server.strategy` (FitRes). What is
returned stands in for it everywhere, `isinstance` included, and behaves as it does: nothing of what the server sends or
computes is changed. Wrap the outermost strategy, so that clipping and noise around it are seen.

What is written down is what the server applied: see `flower_rules` for every strategy's rule. A client goes by the id
that `identified` puts into its replies, since Flower's node ids are fresh in every run.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch

from protoken.arguments import check_flag, check_word
from protoken.errors import ArgumentError, MissingDependencyError, ProtokenError, ProtokenWarning
from protoken.integrations import flower_messages as messages
from protoken.integrations.flower_rules import Rule, rule_of
from protoken.ledger import Ledger
from protoken.ledger.checkpoints import Patterns, select
from protoken.paths import path_of

OnError = Literal["raise", "warn"]
RECORD, CLIENT_ID = messages.RECORD, messages.CLIENT_ID


def record(
    strategy: Any,
    ledger: Ledger | str | os.PathLike[str],
    *,
    model: str = "",
    parameters: Patterns = None,
    names: Sequence[str] | None = None,
    client_id: Callable[[Any], str] | None = None,
    codec: str = "fp32",
    signing_key: Any = None,
    allow_gap: bool = False,
    on_error: OnError = "raise",
) -> Any:
    """The same strategy, recording.

    Args:
        strategy: of either API; the outermost one where strategies are nested.
        ledger: an open ledger, or the path of one; made if there is none.
        model: name of the model, for a new ledger.
        parameters: which arrays are recorded: names, patterns such as "*.lora_?.weight", or a function. None: all
            floating ones.
        names: in-memory parameter names of the arrays in their order, where the strategy sends a bare list of them.
        client_id: (reply) -> stable id, if you trust something else than what the client says of itself. It gets the
            Message, or the pair (ClientProxy, FitRes).
        codec: how updates are stored, see `Ledger.begin_round`.
        signing_key: the server's Ed25519 key; every round is signed.
        allow_gap: the first round may start from other weights than the ledger ended with.
        on_error: "raise" stops the run when a round cannot be recorded; "warn" lets it go on, and the next round that
            can be recorded is marked as a gap.

    Raises:
        ArgumentError: this is no Flower strategy.
        LedgerError: (during the run) what the ledger refuses, e.g. initial weights that are not its last aggregate.
    """
    check_word("on_error", on_error, ("raise", "warn"))
    check_flag("allow_gap", allow_gap)
    if hasattr(strategy, "aggregate_train") and hasattr(strategy, "configure_train"):
        kind: type[_Recorded] = _MessageStrategy
    elif hasattr(strategy, "aggregate_fit") and hasattr(strategy, "configure_fit"):
        kind = _FitStrategy
    else:
        raise ArgumentError("strategy", expected="a strategy of Flower", got=type(strategy).__name__)
    if not isinstance(ledger, Ledger):
        path_of("ledger", ledger)
        ledger = Ledger.open_or_create(ledger, model=model, signing_key=signing_key)
    recorder = Recorder(ledger, rule_of(strategy), parameters, names, client_id, codec, allow_gap, on_error)
    return kind(strategy, recorder)


def identified(client_id: str | None = None) -> Callable[[Any, Any, Callable[[Any, Any], Any]], Any]:
    """A mod for the ClientApp that adds the client's stable id to its replies: `ClientApp(mods=[identified()])`.

    The id is `client_id`, or else "client-id" of the node's configuration (`--node-config 'client-id="clinic-a"'`), or
    else, in simulations, "partition-<partition id>".
    """

    def mod(message: Any, context: Any, call_next: Callable[[Any, Any], Any]) -> Any:
        try:
            from flwr.app import ConfigRecord
        except ImportError as error:
            raise MissingDependencyError("flwr", remedy="pip install 'protoken[flower]'") from error
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        own = client_id if client_id is not None else _own_id(context.node_config)
        metrics = reply.content.config_records.get("fitres.metrics")
        if metrics is not None:  # a client of the older API: this becomes FitRes.metrics
            metrics[CLIENT_ID] = own
        else:
            reply.content[RECORD] = ConfigRecord({CLIENT_ID: own})
        return reply

    return mod


def _own_id(node_config: Any) -> str:
    if CLIENT_ID in node_config:
        return str(node_config[CLIENT_ID])
    if "partition-id" in node_config:
        return f"partition-{node_config['partition-id']}"
    raise ArgumentError(
        "client_id",
        expected="an id, or client-id or partition-id in the node's configuration",
        got="none",
        remedy='Start the node with --node-config \'client-id="clinic-a"\', or pass identified("clinic-a")',
    )


class Recorder:
    """Collects one round after the other and commits it. One per recorded strategy."""

    def __init__(
        self,
        ledger: Ledger,
        rule: Rule,
        parameters: Patterns,
        names: Sequence[str] | None,
        client_id: Callable[[Any], str] | None,
        codec: str,
        allow_gap: bool,
        on_error: OnError,
    ) -> None:
        self.ledger, self.rule, self.codec, self.on_error = ledger, rule, codec, on_error
        self._parameters, self._names, self._allow_gap = parameters, names, allow_gap
        self._identities = messages.Identities(ledger, client_id)
        self._base: messages.Arrays | None = None
        self._asked: set[str] = set()
        self._skipped: list[int] = []

    def sent(self, base: messages.Arrays, asked: Iterable[str]) -> None:
        """G_{r-1}, as the strategy is about to send it, and the nodes it goes to."""
        self._base, self._asked = base, set(asked)

    def aggregated(
        self, server_round: int, replies: Sequence[messages.Reply], failed: Sequence[str], after: messages.Arrays | None
    ) -> None:
        """Commit the round. Without an aggregate there is no round: the next one names those that came to nothing."""
        if after is None or self._base is None:
            self._skipped.append(server_round)
            return
        try:
            self._commit(server_round, replies, failed, after)
        except ProtokenError as error:
            if self.on_error == "raise":
                raise
            self._allow_gap = True
            self._skipped.append(server_round)
            warnings.warn(f"round {server_round} is not in the ledger: {error}", ProtokenWarning, stacklevel=4)
        else:
            self._allow_gap, self._skipped = False, []

    def _commit(
        self, server_round: int, replies: Sequence[messages.Reply], failed: Sequence[str], after: messages.Arrays
    ) -> None:
        assert self._base is not None
        known = self._dtypes()
        base = select(
            messages.tensors(messages.named(self._base, self._names), known), self._parameters, "the strategy's arrays"
        )
        moved = messages.tensors(
            messages.named(after, self._names),
            {name: value.dtype for name, value in base.items() if isinstance(value, torch.Tensor)},
        )
        clients = self._identities.of(replies)
        updates = [
            messages.update_of(reply, client, base, self._names) for reply, client in zip(replies, clients, strict=True)
        ]
        applied = self.rule.applied(updates, replies, base, moved, server_round)
        answered = {reply.node for reply in replies} | set(failed)
        notes = {
            "server_round": server_round,
            "strategy": self.rule.strategy,
            "failed": self._identities.known(failed),
            "silent": self._identities.known(sorted(self._asked - answered)),
            "not_recorded": self._skipped,
        }
        metadata = {"flower": {key: value for key, value in notes.items() if value}, **applied.metadata}
        with self.ledger.begin_round(
            base, rule=applied.rule, codec=self.codec, metadata=metadata, allow_gap=self._allow_gap
        ) as writer:
            for update in applied.updates:
                writer.add(update, on_bad="quarantine")
            writer.commit(moved)

    def _dtypes(self) -> dict[str, torch.dtype]:
        """Of the parameters as the ledger has recorded them so far."""
        if not self.ledger.head.round:
            return {}
        return {name: spec.dtype for name, spec in self.ledger.round("last").parameters.items()}


class _Recorded:
    """Stands in for a strategy: whatever is asked of it, or set on it, is the strategy's own."""

    _OWN = ("_strategy", "_recorder")

    def __init__(self, strategy: Any, recorder: Recorder) -> None:
        object.__setattr__(self, "_strategy", strategy)
        object.__setattr__(self, "_recorder", recorder)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._strategy)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_strategy"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._strategy, name, value)

    def __repr__(self) -> str:
        return f"record({self._strategy!r}, {str(self._recorder.ledger.path)!r})"

    @property
    def ledger(self) -> Ledger:
        """The ledger that the rounds go to."""
        ledger: Ledger = self._recorder.ledger
        return ledger


class _MessageStrategy(_Recorded):
    """Of `flwr.serverapp.strategy`."""

    def start(self, *arguments: Any, **named: Any) -> Any:
        # The strategy's own loop, but with this object as its self: so that it calls what is below.
        return type(self._strategy).start(self, *arguments, **named)

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        base = dict(arrays.items())
        asked = list(self._strategy.configure_train(server_round, arrays, config, grid))
        self._recorder.sent(base, (str(message.metadata.dst_node_id) for message in asked))
        return asked

    def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> Any:
        given = list(replies)
        # Some strategies take the arrays out of the replies, others put clipped ones in: look before and after.
        before = [messages.arrays_of(message) for message in given]
        arrays, metrics = self._strategy.aggregate_train(server_round, given)
        read, failed = messages.read_messages(given, before, getattr(self._strategy, "weighted_by_key", None))
        self._recorder.aggregated(server_round, read, failed, None if arrays is None else dict(arrays.items()))
        return arrays, metrics


class _FitStrategy(_Recorded):
    """Of `flwr.server.strategy`."""

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
        asked = self._strategy.configure_fit(server_round, parameters, client_manager)
        self._recorder.sent(messages.arrays_of_parameters(parameters), (str(proxy.cid) for proxy, _ in asked))
        return asked

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        parameters, metrics = self._strategy.aggregate_fit(server_round, results, failures)
        read, failed = messages.read_results(results, failures)
        after = None if parameters is None else messages.arrays_of_parameters(parameters)
        self._recorder.aggregated(server_round, read, failed, after)
        return parameters, metrics
