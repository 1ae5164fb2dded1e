"""What the rows of bench/gpu.py's bench say about the bars set for one H100: figure, bar, and whether it is met.

A bar is looked at on backend auto, what a caller gets. Where a row is missing (no time, a wrong result), so is the bar.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

LARGE, SMALL = "Llama-3.1-8B", "SmolLM2-135M x30"


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per bar and shape: ``bar`` (its words), ``figure``, ``wanted`` and ``met``."""
    timed = {
        tuple(row[key] for key in ("op", "shape", "format", "K", "T", "backend")): row
        for row in rows
        if "median_s" in row
    }

    def median(*key: Any) -> float | None:
        row = timed.get(key)
        return None if row is None else float(row["median_s"])

    def found() -> Iterator[tuple[str, float, float, bool]]:
        for tokens in (1, 16, 64, 128):
            bf16 = timed.get(("client_scores", LARGE, "bf16", 55, tokens, "auto"))
            if bf16 is not None:
                share = float(bf16["bandwidth_share"])
                yield (
                    f"share of the copy's bandwidth, {LARGE}, 55 clients, bf16, T = {tokens}",
                    share,
                    0.9,
                    share >= 0.9,
                )
            one_byte = median("client_scores", LARGE, "fp8", 55, tokens, "auto")
            if bf16 is not None and one_byte is not None:
                ratio = float(bf16["median_s"]) / one_byte
                yield f"fp8 as fast as bf16, times, T = {tokens}", ratio, 1.8, ratio >= 1.8
            ours = median("client_scores", SMALL, "bf16", 6, tokens, "auto")
            loop = median("client_scores", SMALL, "bf16", 6, tokens, "torch.loop")
            if ours is not None and loop is not None:
                yield (
                    f"one matmul per client in our time, times, {SMALL}, T = {tokens}",
                    loop / ours,
                    10.0,
                    loop >= 10 * ours,
                )
        low_rank = median("client_scores_lowrank", LARGE, "bf16", 10_000, 64, "auto")
        if low_rank is not None:
            milliseconds = 1e3 * low_rank
            yield f"ms, 10,000 rank-8 clients, {LARGE}, T = 64", milliseconds, 2.0, milliseconds < 2.0

    return [
        {"bar": words, "figure": round(figure, 3), "wanted": wanted, "met": met}
        for words, figure, wanted, met in found()
    ]
