"""Several ways to do the same work, timed side by side: who takes turns, and what their times say of each other."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from protoken.benchmarks import measuring

NORMAL_QUANTILE = 1.959964  # of the 95 % interval
HOPELESS = 10.0  # times the fastest way, and over a second a call on a CPU: that call tells enough


def take_turns(ways: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of every way; all run once a round. A way far slower than its share leaves after 3 rounds, and
    a hopeless one after the call that warms up. Without seconds there is one round.

    Every round takes another order: who comes after the copy finds the caches full of something else, and who
    comes after a way that reads the same bank finds part of it there.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    first = {name: timed(way, device) for name, way in ways.items()}
    fastest = min(first.values())
    order = []
    for name, taken in first.items():
        # Elsewhere a first call may compile.
        if device.type == "cpu" and taken > 1 and taken > HOPELESS * fastest:
            times[name].append(taken)
        else:
            order.append(name)
    start = time.perf_counter()
    rounds = 0
    while rounds < 3 or (time.perf_counter() - start < seconds * len(order) and rounds < 200):
        random.Random(rounds).shuffle(order)
        for name in order:
            way = ways[name]
            if rounds < 3 or sum(times[name]) < seconds:
                times[name].append(timed(way, device))
        rounds += 1
        if (rounds >= 3 or seconds == 0) and all(sum(times[name]) >= seconds for name in order):
            break
    return times


def timed(way: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on an accelerator between two events, without what starting it takes."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        way()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    return measuring.seconds(way, device)


def interquartile_range(taken: list[float]) -> float:
    """The interquartile range."""
    if len(taken) < 2:
        return 0.0
    quartiles = statistics.quantiles(taken, n=4)
    return quartiles[2] - quartiles[0]


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float, int]:
    """(median of theirs[i] / ours[i] over the rounds i that both ran, low and high end of its 95 % interval, pairs).

    What slows a machine down for a while slows both of a pair, where it moves two medians apart. The ends are order
    statistics (ranks (n + 1) / 2 -+ 1.96 sqrt(n) / 2, rounded outwards): nothing is assumed of the times. Fewer than 6
    pairs cannot carry 95 %: the ends are then the smallest and the largest ratio.
    """
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=False))
    count = len(ratios)
    half = NORMAL_QUANTILE * math.sqrt(count) / 2
    low, high = math.floor((count - 1) / 2 - half), math.ceil((count - 1) / 2 + half)
    return statistics.median(ratios), ratios[max(low, 0)], ratios[min(high, count - 1)], count
