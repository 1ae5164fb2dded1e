"""How much work each exact way is, in multiplications; what "auto" goes by.

With S positions, T new tokens, K clients, N traced blocks of W multiplications per position, d width, V vocabulary, and
one pass through the traced blocks P = N (S W + S^2 d); sums over traced layers: `near` those whose output reaches no
other position, `deep` the L others, no index all of them; |W_l| the numbers of a layer's weight, O I unless it has
experts or is an embedding:

    local       3 T W + H + (K + 1) T sum_near O I        H = 3 T V d; T d for the logit of a plain head
    forward     P + (K + 1) D P   + (K + 1) S sum_deep O I + local                   per token
                P + L (K + 1) D P + (K + 1) S sum_deep O I + local                   per token and layer
    reverse     2 P + S sum O I + H + (K + 1) sum |W_l|                              totals
                P + B P   + (K + 1) S sum_deep O I + local                           per position
                P + T B P + (K + 1) S (sum_deep O I + T sum_deep O) + local          per token, by layer as well

D and B: what one tangent, among several pushed as one batch, and one backward pass with its graph kept cost in passes,
as measured on SmolLM2-135M (`protoken bench overhead` shows what they amount to on a machine). The K + 1st is the
round's change. Which way is cheapest is a matter of T against K, hence settled when the response is there.
"""

from __future__ import annotations

from protoken.planning.sizes import Sizes

TANGENT = 1.6
BACKWARD = 1.6


def work(sizes: Sizes, granularity: str) -> dict[str, float]:
    """Multiplications by way; only ways that are exact for these layers and give that granularity."""
    s, t, k = sizes.positions, sizes.new_tokens, sizes.clients
    once = sizes.blocks * (s * sizes.weights + s * s * sizes.width)
    head = t * (sizes.width if sizes.gathered_head else 3 * sizes.vocabulary * sizes.width)
    near = sum(layer.rows * layer.columns for layer in sizes.near)
    deep = sum(layer.rows * layer.columns for layer in sizes.deep)
    local = 3 * t * sizes.weights + head + (k + 1) * t * near
    found: dict[str, float] = {}
    if not sizes.deep and granularity != "position":
        found["local"] = local
    if granularity == "sequence":
        numbers = sum(layer.numbers for layer in sizes.layers)
        found["reverse"] = 2 * once + s * (near + deep) + head + (k + 1) * numbers
    elif granularity == "position":
        found["reverse"] = (1 + BACKWARD) * once + (k + 1) * s * deep + local
    elif sizes.deep:
        rows = sum(layer.rows for layer in sizes.deep)
        passes = len(sizes.deep) if granularity == "layer" else 1
        found["forward"] = (1 + passes * (k + 1) * TANGENT) * once + (k + 1) * s * deep + local
        found["reverse"] = (1 + t * BACKWARD) * once + (k + 1) * s * (deep + t * rows) + local
    return found


def cheaper(sizes: Sizes, granularity: str) -> tuple[str, str]:
    """The way of least work for scores per token, and why; the forward way if they are equal."""
    known = work(sizes, granularity)
    way = min(known, key=lambda name: (known[name], name != "forward"))
    parts = ", ".join(f"{name} {count / min(known.values()):.2g}" for name, count in sorted(known.items()))
    return way, f"least work for {sizes.new_tokens} tokens and {sizes.clients} clients ({parts})"
