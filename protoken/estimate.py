"""`estimate(model, prompt, ...)`: what a trace would take, in bytes and work, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from protoken.attribution import settle
from protoken.banks.bank import LedgerBank, Rounds
from protoken.dispatch import choose
from protoken.errors import ArgumentError
from protoken.generation import bound_of, check_arguments, check_seed, complete_arguments, with_length
from protoken.ledger import Ledger
from protoken.models.layers import input_device
from protoken.models.patching import refuse_inference_mode
from protoken.planning.cost import work
from protoken.planning.memory import Chunks, bytes_by_part, readable, smallest
from protoken.planning.options import Granularity, Method, Options, Way
from protoken.session import Session
from protoken.text import Prompt, check_ids, encode_prompt
from protoken.ways.objective import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Estimate:
    """What attribution takes on top of the model and its generation. Bytes, upper bounds: `planning/memory.py`.

    way, granularity, reason     as they will stand in the trace's info
    prompt_tokens, new_tokens    P, and the T that the generation arguments allow at most
    clients, layers              K, L
    parts                        bytes by part: capture, replay, relevance, tangents, bank, result
    smallest                     the lowest memory_limit under which this can be done
    chunks                       how many tokens, clients and blocks are worked on at once
    work                         multiplications of each way that is exact here: `planning/cost.py`
    """

    way: str
    granularity: str
    reason: str
    prompt_tokens: int
    new_tokens: int
    clients: int
    layers: int
    parts: dict[str, int]
    smallest: int
    chunks: Chunks
    work: dict[str, float]

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        head = (
            f"{self.way} way, {self.granularity} ({self.reason}): {self.prompt_tokens} + {self.new_tokens} tokens, "
            f"{self.clients} clients, {self.layers} layers"
        )
        parts = [f"  {name:<10} {readable(count)}" for name, count in self.parts.items()]
        tail = f"  {'total':<10} {readable(self.total)}; memory_limit may be as low as {readable(self.smallest)}"
        return "\n".join([head, *parts, tail])


def estimate(
    model: PreTrainedModel,
    prompt: Prompt,
    *,
    ledger: Ledger | str | PathLike[str] | None = None,
    tokenizer: Any = None,
    rounds: Rounds = "last",
    blocks: int | None = None,
    layers: list[str] | None = None,
    way: Way = "auto",
    granularity: Granularity = "auto",
    objective: Objective | None = None,
    method: Method = "protoken",
    backend: str = "auto",
    nodes: int | None = None,
    pairs: int | None = None,
    memory_limit: int | str | None = None,
    chat: bool | None = None,
    seed: int | None = None,
    **generate_arguments: Any,
) -> Estimate:
    """What `protoken.trace` with the same arguments would take; nothing is generated. Also `protoken.trace.estimate`.

    Raises:
        ArgumentError: a method other than "protoken"; and all that `protoken.trace` raises before it generates.
    """
    refuse_inference_mode(model)
    check_arguments(model, generate_arguments)
    check_seed(seed)
    options = Options(
        rounds=rounds,
        blocks=blocks,
        layers=layers,
        way=way,
        granularity=granularity,
        objective=objective,
        method=method,
        backend=backend,
        nodes=nodes,
        pairs=pairs,
        memory_limit=memory_limit,
    )
    if method != "protoken":
        raise ArgumentError("method", expected='"protoken", whose parts are known', got=method)
    session = Session.of(model, ledger, tokenizer, options, seed=seed)
    choose("client_scores", backend, input_device(model))
    assert isinstance(session.source, LedgerBank), "the scores of this method are projections onto a bank"
    ids = encode_prompt(session.tokenizer, prompt, chat)
    check_ids(model, ids)
    arguments = complete_arguments(model, with_length(generate_arguments), len(ids), session.tokenizer)
    new = bound_of(model, arguments, len(ids))
    plan, sizes, chunks = settle(model, session.own.architecture, session.plan, session.source, len(ids), new)
    return Estimate(
        way=plan.way,
        granularity=plan.granularity,
        reason=plan.reason,
        prompt_tokens=len(ids),
        new_tokens=new,
        clients=sizes.clients,
        layers=len(sizes.layers),
        parts=bytes_by_part(plan, sizes, chunks),
        smallest=smallest(plan, sizes),
        chunks=chunks,
        work=work(sizes, plan.granularity),
    )
