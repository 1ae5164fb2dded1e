"""Federations in one process out of Flower's real strategies and messages: only the network is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

SHAPES = {"layers.0.o_proj.weight": (6, 5), "layers.0.down_proj.weight": (4, 6), "norm.weight": (3,)}
Answer = Callable[[int, dict[str, np.ndarray], int], Any]


def arrays(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {n: (random.standard_normal(s) * scale).astype(np.float32) for n, s in SHAPES.items()}


def record_of(values: dict[str, np.ndarray]) -> ArrayRecord:
    from flwr.app import Array

    return ArrayRecord({name: Array(value) for name, value in values.items()})


def answer(values: dict[str, np.ndarray], client: str | None, examples: float = 10, **metrics: float) -> RecordDict:
    """What a ClientApp puts into its reply."""
    content = RecordDict({"arrays": record_of(values), "metrics": MetricRecord({"num-examples": examples, **metrics})})
    if client is not None:
        content["protoken"] = ConfigRecord({"client-id": client})
    return content


def train(node: int, sent: dict[str, np.ndarray], server_round: int) -> RecordDict:
    """Client `node` moves every weight by random numbers of its own and has 10 * node examples."""
    moved = arrays(100 * server_round + node, 0.1)
    return answer({n: sent[n] + moved[n] for n in sent}, f"client-{node}", 10 * node, train_loss=0.5 + node)


class Grid:
    """Nodes 1..n, each answering at once."""

    def __init__(self, nodes: int, answers: Answer = train) -> None:
        self.nodes, self.answers = nodes, answers
        # What the process that runs a ServerApp is told before its first message.
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self.nodes + 1)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [reply for message in messages if (reply := self._reply(message)) is not None]

    def _reply(self, message: Message) -> Message | None:
        if message.metadata.message_type != "train":
            content = RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 0.5})})
            return Message(content, reply_to=message)
        sent = {name: array.numpy() for name, array in message.content["arrays"].items()}
        found = self.answers(message.metadata.dst_node_id, sent, int(message.content["config"]["server-round"]))
        if found is None:
            return None
        if isinstance(found, Error):
            return Message(found, reply_to=message)
        return Message(found, reply_to=message)
