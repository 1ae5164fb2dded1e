"""A trace is of its tokens: however they were generated, the clients score and rank the same."""

from __future__ import annotations

import pytest
from modes import by_mode, difference, forced, ranking
from tiny_federation import tiny_federation

import protoken

PROMPT = [5, 17, 42, 8, 60, 33, 21]


@pytest.mark.parametrize("family", ["llama", "qwen2", "smollm"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_every_mode_ranks_the_clients_the_same(tmp_path, family: str, blocks: int) -> None:
    federation = tiny_federation(tmp_path, family)
    protoken.attach(federation.model, federation.path)
    found = by_mode(federation.model, PROMPT, 6, blocks=blocks)
    assert len(found) == (13 if blocks == 1 else 12)
    greedy = [token.id for token in found["greedy"].token_list]
    for name in (
        "prompt lookup",
        "static cache",
        "chunked prefill",
        "no cache",
        "left-padded batch",
        "stream",
        "assisted",
    ):
        if name in found:
            assert [token.id for token in found[name].token_list] == greedy, name
    for name, trace in found.items():
        again = forced(federation.model, trace, blocks=blocks)
        assert [token.id for token in again.token_list] == [token.id for token in trace.token_list]
        assert ranking(again) == ranking(trace), name
        assert difference(trace, again) < 3e-5, name
