"""What Flower's replies hold, read by attribute only: flwr need not be installed, and of its classes nothing is known.

Replies are hostile: arrays are read without pickle, ids are checked against the ledger's charset, and a reply that
cannot be read becomes an update that is kept and flagged.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protoken.errors import ArgumentError, ProtokenWarning
from protoken.ledger import ClientUpdate, Ledger
from protoken.ledger import names as rules_of_names
from protoken.ledger.updates import Value

RECORD, CLIENT_ID = "protoken", "client-id"
# Key -> Array (of a message), or bytes in numpy's format (of Parameters).
Arrays = Mapping[str, Any]
_FLOATS = tuple(np.dtype(kind) for kind in (np.float64, np.float32, np.float16))


@dataclass(frozen=True)
class Reply:
    """One client's answer: `source` is Flower's own object, `claimed` the id that the client gave itself."""

    node: str
    claimed: str | None
    examples: float | None
    loss: Callable[[str], float | None]
    arrays: Arrays
    source: Any


def arrays_of(message: Any) -> Arrays:
    """The arrays of a reply; none of one that is an error."""
    if message.has_error():
        return {}
    return {key: array for part in message.content.array_records.values() for key, array in part.items()}


def read_messages(
    replies: Sequence[Any], before: Sequence[Arrays], weighted_by: str | None
) -> tuple[list[Reply], list[str]]:
    """(answers, nodes whose reply was an error). Arrays that the strategy removed are those from before."""
    read, failed = [], []
    for message, old in zip(replies, before, strict=True):
        node = str(message.metadata.src_node_id)
        if message.has_error():
            failed.append(node)
            continue
        content = message.content
        metrics = [metric for part in content.metric_records.values() for metric in part.items()]
        named = content.config_records.get(RECORD)
        read.append(
            Reply(
                node,
                None if named is None else named.get(CLIENT_ID),
                _number(dict(metrics).get(weighted_by or "num-examples")),
                lambda key, found=dict(metrics): _number(found.get(key)),  # type: ignore[misc]
                {**old, **arrays_of(message)},
                message,
            )
        )
    return read, failed


def read_results(results: Sequence[Any], failures: Sequence[Any]) -> tuple[list[Reply], list[str]]:
    """The same of (ClientProxy, FitRes) pairs; of failures that are exceptions the node is not known."""
    read = [
        Reply(
            str(proxy.cid),
            result.metrics.get(CLIENT_ID),
            _number(result.num_examples),
            lambda key, found=result.metrics: _number(found.get(key)),  # type: ignore[misc]
            arrays_of_parameters(result.parameters),
            (proxy, result),
        )
        for proxy, result in results
    ]
    return read, [str(failure[0].cid) if isinstance(failure, tuple) else "unknown" for failure in failures]


def arrays_of_parameters(parameters: Any) -> Arrays:
    """Of Parameters: the bytes of each array by its position."""
    if parameters.tensor_type != "numpy.ndarray":
        raise ArgumentError("parameters", expected="numpy.ndarray", got=ascii(parameters.tensor_type)[:40])
    return {str(i): data for i, data in enumerate(parameters.tensors)}


def named(arrays: Arrays, names: Sequence[str] | None) -> Arrays:
    """The arrays by parameter name instead of Flower's key. ArgumentError when there are not as many names."""
    if names is None:
        return arrays
    if len(names) != len(arrays):
        raise ArgumentError("names", expected=f"one for each of the {len(arrays)} arrays", got=len(names))
    return dict(zip(names, arrays.values(), strict=True))


def tensors(arrays: Arrays, dtypes: Mapping[str, torch.dtype]) -> dict[str, Value]:
    """The server's floating arrays; counters and the like are not recorded.

    ``dtypes`` are those of the model: some strategies return fp64 for fp32 weights, which clients load as fp32 again.
    """
    found = {key: _decode(key, array) for key, array in arrays.items()}
    return {key: value.to(dtypes.get(key, value.dtype)) for key, value in found.items() if value is not None}


class Difference(Mapping[str, Value]):
    """delta_k = C_k - G_{r-1} by parameter, decoded and subtracted at each look: one parameter in memory at a time.

    Subtracted in fp64 and rounded once to fp32. What is not an array of the base's shape comes as it is, for the
    ledger's own checks to refuse.
    """

    def __init__(self, arrays: Arrays, base: Mapping[str, Value]) -> None:
        self._arrays, self._base = {key: arrays[key] for key in base if key in arrays}, base

    def __getitem__(self, name: str) -> Value:
        try:
            mine = _decode(name, self._arrays[name])
        except ArgumentError:
            mine = None
        before = self._base[name]
        if mine is None or not isinstance(before, Tensor):
            return torch.empty(0)
        return (mine.double() - before.double()).float() if mine.shape == before.shape else mine

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def update_of(reply: Reply, client: str, base: Mapping[str, Value], names: Sequence[str] | None) -> ClientUpdate:
    """The reply as an update of weight 0, to be weighted by the rule."""
    arrays = reply.arrays if names is None or len(names) != len(reply.arrays) else named(reply.arrays, names)
    count = reply.examples
    whole = int(count) if count is not None and count < 1 << 53 and count == int(count) else None
    return ClientUpdate(client, 0.0, delta=Difference(arrays, base), examples=whole)


class Identities:
    """Which client a node is. The first claim of a node holds for the run; nobody gets another's id."""

    def __init__(self, ledger: Ledger, choose: Callable[[Any], str] | None) -> None:
        self._choose = choose
        self._spelling = {rules_of_names.fold(client): client for client in ledger.clients}
        self._by_node: dict[str, str] = {}
        self._taken: dict[str, str] = {}

    def of(self, replies: Sequence[Reply]) -> list[str]:
        """An id for each reply, unique among them."""
        return [self._by_node.get(reply.node) or self._first(reply) for reply in replies]

    def known(self, nodes: Sequence[str]) -> list[str]:
        """Ids of nodes where they have one, at most 1,000 of them."""
        return [self._by_node.get(node, f"node-{node}") for node in nodes[:1000]]

    def _first(self, reply: Reply) -> str:
        claimed = reply.claimed if self._choose is None else self._choose(reply.source)
        client, problem = f"node-{reply.node}", None
        if not isinstance(claimed, str):
            problem = "gave no id, and node ids are fresh in every run: use ClientApp(mods=[identified()])"
        elif not rules_of_names.CLIENT_PATTERN.fullmatch(claimed):
            problem = f"gave the id {ascii(claimed)[:60]}, which a ledger cannot hold"
        else:
            folded = rules_of_names.fold(claimed)
            if folded in self._taken:
                problem = f"claims to be {claimed}, as node {self._taken[folded]} does"
            elif self._spelling.get(folded, claimed) != claimed:
                problem = f"claims to be {claimed}; the ledger knows {self._spelling[folded]}"
            else:
                client = claimed
        if problem is not None:
            warnings.warn(f"node {reply.node} {problem}; recorded as {client}", ProtokenWarning, stacklevel=6)
        self._by_node[reply.node] = client
        self._taken[rules_of_names.fold(client)] = reply.node
        return client


def _decode(name: str, array: Any) -> Tensor | None:
    """None for what is no floating array. ArgumentError for bytes that are no array at all."""
    try:
        found = np.load(io.BytesIO(array), allow_pickle=False) if isinstance(array, bytes) else array.numpy()
        native = found.dtype.newbyteorder("=")
    except Exception as error:  # whatever numpy's and zipfile's parsers make of a stranger's bytes
        raise ArgumentError(
            f"array {ascii(name)[:80]}", expected="an array in numpy's format", got=ascii(str(error))[:80]
        ) from error
    if native not in _FLOATS:
        return None
    # Always a copy: what Flower hands out may be read-only.
    return torch.from_numpy(np.array(found, dtype=native, order="C", copy=True))


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
    return float(value) if good else None
