"""Bytes that attribution takes on top of the model and its generation, part by part, and how to keep below a ceiling.

With S positions, T new tokens, K clients, d width, V vocabulary, a activations per position and block, in chunks of
t tokens, k clients and b blocks (e bytes per number of the model, w where it is accumulated):

    capture     T (3d + I) e                                 and S d e, twice while joined, where blocks are run again
    replay      t (2 a e + 5 V w)                            the last block's second half and the head, with gradients
                b S (1.5 a e)                                reverse: so many blocks with gradients, and S d e for each
                                                             entrance; eager attention holds heads S^2 e more per block
    relevance   T (I + O) e per local layer; per deeper layer S (I + t O) e, or its gradient matrix O I w
    tangents    (k + 1) (S (3 a + sum O) e + 4 heads S^2 e)  forward: clients and change pushed at once
    bank        k clients' updates as they lie in the ledger, the change, and one layer while it is read
    result      T K for each local layer and once for the deeper ones, or for each of them; numbers of 8 bytes, four
                times while they are weighted and added up; S K where positions are told apart

The sum is the estimate; parts do not all peak at once, so it is an upper bound, and `tests` hold it against the bytes
counted while tracing. A ceiling is met by smaller chunks: first all minimal, then clients, tokens and blocks grow in
turn while they fit. Chunks change no score but for the order of additions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from protoken.errors import ArgumentError
from protoken.planning.plan import Plan
from protoken.planning.sizes import LayerSize, Sizes

KEPT = 1 << 30
"""Banks up to this size are read once and kept, unless a ceiling says otherwise."""
STREAMED = 256 << 20
"""Larger ones are read in runs of clients of about this size."""
TANGENTS = 64
"""Tangents pushed at once without a ceiling."""
SCRATCH = 32 << 20
"""Directions delta_k x held at once, where rows are scored one by one."""


@dataclass(frozen=True)
class Chunks:
    """How much is done at once. `kept`: the bank is read once and stays in memory."""

    tokens: int
    clients: int
    blocks: int
    kept: bool


def bytes_by_part(plan: Plan, sizes: Sizes, chunks: Chunks) -> dict[str, int]:
    """The formulas above, in bytes."""
    return {
        "capture": _capture(plan, sizes),
        "replay": int(_replay(plan, sizes, chunks)),
        "relevance": _relevance(plan, sizes, chunks),
        "tangents": _tangents(plan, sizes, chunks),
        "bank": _bank(plan, sizes, chunks),
        "result": _result(plan, sizes),
    }


def whole(sizes: Sizes) -> Chunks:
    """What is done where no ceiling is set: everything at once, but for a bank that is too large to keep."""
    client = sum(layer.client_bytes for layer in sizes.layers)
    if client * sizes.clients <= KEPT:
        return Chunks(max(sizes.new_tokens, 1), sizes.clients, sizes.blocks, kept=True)
    return Chunks(max(sizes.new_tokens, 1), max(1, STREAMED // max(client, 1)), sizes.blocks, kept=False)


def smallest(plan: Plan, sizes: Sizes) -> int:
    """The lowest ceiling under which this can be done, in bytes."""
    return sum(bytes_by_part(plan, sizes, Chunks(1, 1, 1, kept=False)).values())


def fitted(plan: Plan, sizes: Sizes, limit: int | None) -> Chunks:
    """The largest chunks whose parts add up to no more than the limit.

    Raises:
        ArgumentError: not even the smallest do; the message says what would be enough.
    """
    if limit is None:
        return whole(sizes)

    def fits(chunks: Chunks) -> bool:
        return sum(bytes_by_part(plan, sizes, chunks).values()) <= limit

    if fits(replace(whole(sizes), clients=sizes.clients, kept=True)):
        return replace(whole(sizes), clients=sizes.clients, kept=True)
    chunks, least = Chunks(1, 1, 1, kept=False), smallest(plan, sizes)
    if limit < least:
        raise ArgumentError(
            "memory_limit",
            expected=f"at least {least} bytes ({readable(least)}) for {sizes.positions} positions, "
            f"{len(sizes.layers)} layers and the {plan.way} way",
            got=limit,
            remedy="Raise it, shorten prompt or response, trace fewer blocks or layers, or leave it out",
        )
    most = {"clients": sizes.clients, "tokens": max(sizes.new_tokens, 1), "blocks": sizes.blocks}
    growing = list(most)
    while growing:
        for name in list(growing):
            larger = replace(chunks, **{name: min(2 * getattr(chunks, name), most[name])})
            if larger == chunks or not fits(larger):
                growing.remove(name)
            else:
                chunks = larger
    return chunks


def directions_at_once(each: int, clients: int) -> int:
    """For how many clients delta_k x is held at once, of `each` so many bytes."""
    return max(1, min(clients, SCRATCH // max(each, 1)))


def readable(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def _runs_blocks(plan: Plan, sizes: Sizes) -> bool:
    """Whether whole blocks are run again, not only the last one's second half."""
    return plan.way != "local" and bool(sizes.deep)


def _capture(plan: Plan, sizes: Sizes) -> int:
    rows = sizes.new_tokens * (3 * sizes.width + sizes.projected)
    joined = 2 * sizes.positions * sizes.width if _runs_blocks(plan, sizes) else 0
    return (rows + joined) * sizes.element


def _replay(plan: Plan, sizes: Sizes, chunks: Chunks) -> float:
    s, e = sizes.positions, sizes.element
    head = 3 * sizes.width if sizes.gathered_head else 5 * sizes.vocabulary
    local = min(chunks.tokens, sizes.new_tokens) * (2 * sizes.activations * e + head * sizes.wide)
    if not _runs_blocks(plan, sizes):
        return local
    if plan.way == "forward":
        return local + s * 2 * sizes.activations * e
    blocks = min(chunks.blocks, sizes.blocks)
    pairs = 2 * sizes.heads * s * s if sizes.plain_attention else 0
    with_gradients = (blocks + 1) * (s * 1.5 * sizes.activations + pairs) * e
    entrances = -(-sizes.blocks // blocks) * s * sizes.width * e
    return local + with_gradients + entrances


def _relevance(plan: Plan, sizes: Sizes, chunks: Chunks) -> int:
    near = sum(layer.rows + layer.columns for layer in sizes.near) + 3 * sizes.width
    local = sizes.new_tokens * near * sizes.element * 2
    if not _runs_blocks(plan, sizes):
        return local
    if plan.way == "forward":
        return local + sizes.positions * sum(layer.rows + layer.columns for layer in sizes.deep) * sizes.element
    return local + _gradients(plan, sizes, chunks)


def _gradients(plan: Plan, sizes: Sizes, chunks: Chunks) -> int:
    """Of the layers in the blocks that the reverse way runs at once."""
    s, e, w = sizes.positions, sizes.element, sizes.wide
    layers = _at_once(plan, sizes, chunks)
    if plan.granularity == "sequence":
        return sum(s * (layer.rows + layer.columns) * e + 2 * layer.numbers * w for layer in layers)
    groups = 1 if plan.granularity == "position" else min(chunks.tokens, max(sizes.new_tokens, 1))
    rows = sum(s * (2 * groups * layer.rows + layer.columns) * e for layer in layers)
    # Both sides of the last inner product are widened.
    products = (
        (2 * directions_at_once(s * layer.rows * w, chunks.clients) + groups) * s * layer.rows * w for layer in layers
    )
    return rows + max(products) + 4 * groups * s * sizes.width * e


def _tangents(plan: Plan, sizes: Sizes, chunks: Chunks) -> int:
    if plan.way != "forward" or not sizes.deep:
        return 0
    s, pushed = sizes.positions, min(chunks.clients, sizes.clients, TANGENTS) + 1
    rows = sum(layer.rows for layer in sizes.deep)
    return (pushed + 1) * (s * (3 * sizes.activations + rows) + 4 * sizes.heads * s * s) * sizes.element


def _bank(plan: Plan, sizes: Sizes, chunks: Chunks) -> int:
    together = _at_once(plan, sizes, chunks)
    clients = sizes.clients if chunks.kept else min(chunks.clients, sizes.clients)
    updates = clients * sum(layer.client_bytes for layer in (sizes.layers if chunks.kept else together))
    change = sum(4 * layer.numbers for layer in together)
    widest = max(layer.numbers for layer in sizes.layers)
    return updates + change + 2 * 4 * widest


def _result(plan: Plan, sizes: Sizes) -> int:
    layers = len(sizes.near) + (len(sizes.deep) if plan.granularity == "layer" else 1)
    rows = sizes.positions if plan.granularity == "position" else sizes.new_tokens
    return 4 * 8 * rows * (sizes.clients + 1) * layers


def _at_once(plan: Plan, sizes: Sizes, chunks: Chunks) -> tuple[LayerSize, ...]:
    """The layers whose updates are in memory together: of the fullest run of blocks in the reverse way, else all."""
    if plan.way != "reverse" or chunks.blocks >= sizes.blocks:
        return sizes.layers
    last = max(layer.block for layer in sizes.layers)
    runs: dict[int, list[LayerSize]] = {-1: list(sizes.near)}
    for layer in sizes.deep:
        runs.setdefault((last - layer.block) // chunks.blocks, []).append(layer)
    return tuple(max(runs.values(), key=lambda run: sum(layer.client_bytes + 4 * layer.numbers for layer in run)))
