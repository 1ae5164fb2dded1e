"""gated_tail: the pull-back behind the last attention without autograd, and when a stream may rely on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import normal
from tiny_federation import TinyFederation, tiny_federation
from tolerances import close
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import protoken
from protoken.dispatch import native
from protoken.errors import ArgumentError
from protoken.models.architectures import architecture_of
from protoken.ops.gated_tail import GatedBlock, GatedValues, gated_tail_reference
from protoken.streaming.gated_tail import GatedTail

PROMPT = [5, 17, 42, 8, 60, 33, 21]
GREEDY = {"max_new_tokens": 6, "do_sample": False}
SIZES = [(2, 2), (17, 33), (64, 192), (129, 257), (576, 1536)]

launch = native("launch_gated_tail")
needs_native = pytest.mark.skipif(launch is None, reason="the native module is not built")


def case(width: int, inner: int, *, gap: int = 0) -> tuple[GatedBlock, GatedValues, Tensor]:
    """Random weights whose rows lie `gap` elements apart."""

    def matrix(rows: int, columns: int, seed: int) -> Tensor:
        return (normal(rows, columns + gap, seed=seed) / columns**0.5)[:, :columns]

    block = GatedBlock(
        gate=matrix(inner, width, 1),
        up=matrix(inner, width, 2),
        down=matrix(width, inner, 3),
        norm=1 + 0.3 * normal(width, seed=4),
        epsilon=1e-5,
        final_norm=1 + 0.3 * normal(width, seed=5),
        final_epsilon=1e-6,
    )
    values = GatedValues(
        normal(width, seed=6), 2 * normal(inner, seed=7), normal(inner, seed=8), 3 * normal(width, seed=9)
    )
    return block, values, normal(width, seed=10)


def native_tail(block: GatedBlock, values: GatedValues, upstream: Tensor) -> Tensor:
    assert launch is not None
    out = torch.full((2, block.norm.numel()), torch.nan)
    launch(out, block, values, upstream)
    return out


def test_reference_equals_autograd_through_the_models_own_modules() -> None:
    width, inner = 24, 40
    block, values, upstream = case(width, inner)
    config = LlamaConfig(hidden_size=width, intermediate_size=inner, hidden_act="silu", num_attention_heads=2)
    mlp = LlamaMLP(config).double()
    norm, final_norm = LlamaRMSNorm(width, eps=block.epsilon), LlamaRMSNorm(width, eps=block.final_epsilon)
    with torch.no_grad():
        for module, weight in (
            (mlp.gate_proj, block.gate),
            (mlp.up_proj, block.up),
            (mlp.down_proj, block.down),
            (norm, block.norm),
            (final_norm, block.final_norm),
        ):
            module.weight = nn.Parameter(weight.double())

    def rms(module: LlamaRMSNorm, x: Tensor) -> Tensor:
        # The module itself computes in fp32 whatever it is given.
        return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)

    entering = values.entering.double().requires_grad_()
    normed = rms(norm, entering)
    down = mlp(normed)
    leaving = entering + down
    expected = torch.autograd.grad(rms(final_norm, leaving), [down, entering], upstream.double())
    seen = GatedValues(
        entering.detach(), mlp.gate_proj(normed).detach(), mlp.up_proj(normed).detach(), leaving.detach()
    )
    for got, wanted in zip(gated_tail_reference(block, seen, upstream), expected, strict=True):
        close(got, wanted, torch.float64)


@needs_native
@pytest.mark.parametrize("gap", [0, 5])
@pytest.mark.parametrize(("width", "inner"), SIZES)
def test_native_equals_the_reference(width: int, inner: int, gap: int) -> None:
    arguments = case(width, inner, gap=gap)
    close(native_tail(*arguments), torch.stack(gated_tail_reference(*arguments)), torch.float32)


@needs_native
def test_bits_do_not_depend_on_runs_or_threads() -> None:
    arguments, threads = case(129, 257), torch.get_num_threads()
    first = native_tail(*arguments)
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            assert all(torch.equal(native_tail(*arguments), first) for _ in range(20))
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_sizes_that_are_none_are_refused() -> None:
    block, values, upstream = case(2, 2)
    one = GatedBlock(block.gate[:1, :1], block.up[:1, :1], block.down[:1, :1], block.norm, 0.0, block.norm, 0.0)
    with pytest.raises(ArgumentError, match="width"):
        native_tail(one, values, upstream)


# ---- in a stream ---------------------------------------------------------------------------------------


@pytest.fixture
def tails(monkeypatch: pytest.MonkeyPatch) -> list[GatedTail | None]:
    """The tails of all streams of a test, in their order."""
    made: list[GatedTail | None] = []
    own = GatedTail.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[GatedTail], *arguments: Any) -> GatedTail | None:
        made.append(own(cls, *arguments))
        return made[-1]

    monkeypatch.setattr(GatedTail, "of", classmethod(of))
    return made


def streamed(federation: TinyFederation, **arguments: Any) -> protoken.Stream:
    return protoken.stream(federation.model, PROMPT, **{"ledger": federation.path, **GREEDY, **arguments})


def scores(stream: protoken.Stream) -> Tensor:
    return torch.tensor([list(token.scores.values()) for token in stream.tokens], dtype=torch.float64)


def trust(stream: protoken.Stream, tails: list[GatedTail | None]) -> Iterator[bool]:
    """Whether the stream's tail is trusted after each token."""
    for _ in stream:
        tail = tails[-1]
        yield tail is not None and tail.trusted


@needs_native
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_trusted_after_the_first_token_that_was_decoded(
    family: str, tmp_path: Path, tails: list[GatedTail | None]
) -> None:
    federation = tiny_federation(tmp_path, family)
    # The prompt's own token is replayed; at the end of the stream nothing is trusted any more.
    assert list(trust(streamed(federation), tails)) == [False, True, True, True, True, True]
    assert not tails[-1].trusted  # type: ignore[union-attr]


@needs_native
def test_a_block_that_only_looks_alike_is_refuted_once(
    tmp_path: Path, tails: list[GatedTail | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, pulled = tiny_federation(tmp_path, "olmo2"), []  # its norms come after attention and MLP
    own = GatedTail.pull
    monkeypatch.setattr(GatedTail, "pull", lambda self, upstream: pulled.append(1) or own(self, upstream))
    assert not any(trust(streamed(federation), tails))
    assert tails[-1] is not None
    assert len(pulled) <= 1


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi3", "mixtral"])
def test_other_blocks_are_not_watched(family: str, tmp_path: Path, tails: list[GatedTail | None]) -> None:
    list(streamed(tiny_federation(tmp_path, family)))
    assert tails == [None]


@pytest.mark.parametrize("change", ["hook", "forward", "dtype", "backend", "layer", "global hook"])
def test_what_is_changed_is_not_watched(change: str, tmp_path: Path, tails: list[GatedTail | None]) -> None:
    federation = tiny_federation(tmp_path, dtype=torch.float64 if change == "dtype" else torch.float32)
    mlp, arguments, handle = federation.model.model.layers[-1].mlp, {}, None
    if change == "hook":
        handle = mlp.register_forward_hook(lambda _module, _args, output: 2 * output)
    elif change == "forward":
        mlp.forward = mlp.forward
    elif change == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    elif change == "backend":
        arguments = {"backend": "torch"}
    elif change == "layer":
        arguments = {"layers": ["mlp.gate_proj"]}
    try:
        list(streamed(federation, **arguments))
    finally:
        if handle is not None:
            handle.remove()
    assert tails == [None]


def hooked(mlp: nn.Module) -> None:
    mlp.register_forward_hook(lambda _module, _args, output: 2 * output)


def replaced(mlp: Any) -> None:
    mlp.down_proj.weight = nn.Parameter(2 * mlp.down_proj.weight.detach())


@needs_native
@pytest.mark.parametrize("change", [hooked, replaced])
def test_what_is_changed_between_two_tokens_is_part_of_the_gradient(
    change: Callable[[nn.Module], None], tmp_path: Path, tails: list[GatedTail | None]
) -> None:
    plain = streamed(tiny_federation(tmp_path / "plain"))
    list(plain)
    found = []
    for backend in ("torch", "auto"):
        federation, trusted = tiny_federation(tmp_path / backend), []
        with streamed(federation, backend=backend) as stream:
            for answer in trust(stream, tails):
                trusted.append(answer)
                if len(trusted) == 3:
                    change(federation.model.model.layers[-1].mlp)
        found.append(scores(stream))
    assert trusted == [False, True, True, False, False, False]
    close(found[1], found[0], torch.float32)
    assert not torch.allclose(scores(plain)[3:], found[1][3:])


@needs_native
def test_overlapping_streams(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path)
    alone = streamed(federation)
    list(alone)
    streams = [streamed(federation), streamed(federation)]
    for _ in range(GREEDY["max_new_tokens"]):
        for stream in streams:
            next(stream)
    for stream in streams:
        stream.close()
        close(scores(stream), scores(alone), torch.float32)


@needs_native
@pytest.mark.parametrize("error", [0.0, 1e-4, torch.nan])
def test_trust_needs_a_gradient_that_agrees(error: float, tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path)
    architecture = architecture_of(federation.model)
    tail = GatedTail.of(federation.model, architecture, architecture.traced_layers(1))
    assert tail is not None
    values = case(*tail.block.down.shape)[1]
    with tail.watched(lambda: True):
        tail.seen.update(entering=values.entering, gate=values.gate, up=values.up, leaving=values.leaving)
        upstream = normal(tail.block.norm.numel(), seed=11)
        at_leaving, at_entering = gated_tail_reference(tail.block, values, upstream)
        nothing = torch.zeros(1, at_leaving.numel())
        tail.compare(0 * upstream, [nothing, nothing])  # a token that is certain in fp32
        assert (tail.trusted, tail.refuted) == (False, False)
        tail.compare(upstream, [at_entering.float(), at_leaving.float() * (1 + error)])
        agrees = error == 0
        # What is not finite says nothing either.
        assert (tail.trusted, tail.refuted) == (agrees, error == 1e-4)
        assert tail.ready() == agrees
    assert not tail.trusted
