"""Generations at their edges: one token, none, duplicates, several prompts, other vocabularies, interruptions."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from character_tokenizer import character_tokenizer
from oracle import equals_oracle
from test_trace_errors import fingerprint
from tiny_federation import TinyFederation, tiny_federation
from tiny_models import tiny_model
from tolerances import close
from transformers import StoppingCriteria, StoppingCriteriaList

import protoken
from protoken import errors
from protoken.models.patching import evaluation_mode

PROMPT = [5, 17, 42, 8]
WAYS: dict[str, dict[str, Any]] = {
    "local": {},
    "forward": {"blocks": 2, "way": "forward"},
    "reverse": {"blocks": 2, "way": "reverse"},
    "reverse token": {"blocks": 2, "way": "reverse", "granularity": "token"},
    "position": {"blocks": 2, "granularity": "position"},
}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("federation"))


def run(federation: TinyFederation, prompt: Any = PROMPT, **arguments: Any) -> protoken.Trace:
    arguments = {"max_new_tokens": 4, "do_sample": False, **arguments}
    return protoken.trace(federation.model, prompt, ledger=federation.path, **arguments)


# ---- short and empty ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_generation_that_stops_at_once_has_one_token(federation: TinyFederation, way: str) -> None:
    first = run(federation).token_list[0].id
    trace = run(federation, eos_token_id=first, pad_token_id=0, max_new_tokens=20, **WAYS[way])
    assert [token.id for token in trace.token_list] == [first]
    equals_oracle(federation.model, federation.ledger, trace)


@pytest.mark.parametrize("way", WAYS)
def test_prompt_of_one_token(federation: TinyFederation, way: str) -> None:
    trace = run(federation, [17], **WAYS[way])
    assert trace.prompt_ids == (17,)
    equals_oracle(federation.model, federation.ledger, trace)


def test_prompt_and_response_of_one_token(federation: TinyFederation) -> None:
    for arguments in WAYS.values():
        equals_oracle(federation.model, federation.ledger, run(federation, [17], max_new_tokens=1, **arguments))


@pytest.mark.parametrize("way", WAYS)
def test_zero_new_tokens_are_refused(federation: TinyFederation, way: str) -> None:
    before = fingerprint(federation.model)
    with pytest.raises(errors.ArgumentError, match="max_new_tokens"):
        run(federation, max_new_tokens=0, **WAYS[way])
    with pytest.raises(errors.ArgumentError, match="max_length"):
        run(federation, max_new_tokens=None, max_length=len(PROMPT), **WAYS[way])
    assert fingerprint(federation.model) == before


# ---- several at once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [torch.tensor([[5, 6], [7, 8]]), torch.zeros(1, 2, 2, dtype=torch.long), torch.tensor([1.5, 2.5])],
    ids=["two rows", "three axes", "no ids"],
)
def test_tensor_that_is_no_single_prompt_is_refused(federation: TinyFederation, prompt: torch.Tensor) -> None:
    with pytest.raises(errors.PromptError, match="one prompt"):
        run(federation, prompt)


@pytest.mark.parametrize(
    "prompt", [torch.tensor([5, 17, 42, 8]), torch.tensor([[5, 17, 42, 8]])], ids=["[n]", "[1, n]"]
)
def test_tensor_of_one_prompt_is_taken(federation: TinyFederation, prompt: torch.Tensor) -> None:
    assert (run(federation, prompt).token_scores == run(federation).token_scores).all()


def test_sequences_that_come_out_twice_score_twice(federation: TinyFederation) -> None:
    row = torch.tensor([PROMPT])
    with protoken.tracing(federation.model, ledger=federation.path) as tape:
        federation.model.generate(row, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=3)
        federation.model.generate(row, max_new_tokens=4, num_beams=3, num_return_sequences=3, do_sample=False)
    twins, beams = tape.calls
    assert len({trace.token_list for trace in twins}) == 1
    for trace in twins:
        close(torch.tensor(trace.token_scores), torch.tensor(run(federation).token_scores), torch.float32, factor=3)
    assert len(beams) == 3
    for trace in beams:
        equals_oracle(federation.model, federation.ledger, trace)


# ---- stop strings ------------------------------------------------------------------------------------------------


def test_stop_strings_need_no_second_tokenizer(federation: TinyFederation) -> None:
    tokenizer = character_tokenizer()
    free = run(federation, tokenizer=tokenizer, max_new_tokens=8)
    texts = [token.text for token in free.token_list]
    stop = next(text for text in texts[2:] if len(text) == 1)
    trace = run(federation, tokenizer=tokenizer, max_new_tokens=8, stop_strings=[stop])
    assert [token.text for token in trace.token_list] == texts[: texts.index(stop) + 1]
    with protoken.stream(
        federation.model, PROMPT, ledger=federation.path, tokenizer=tokenizer, max_new_tokens=8, stop_strings=[stop]
    ) as stream:
        assert [token.id for token in stream] == [token.id for token in trace.token_list]


# ---- other models ------------------------------------------------------------------------------------------------


def test_embeddings_resized_after_training_do_not_matter_to_other_layers(tmp_path: Path) -> None:
    """A ledger of the blocks alone knows no vocabulary: their scores are those of the model as it now is."""
    federation = tiny_federation(tmp_path)
    federation.model.resize_token_embeddings(120)
    equals_oracle(federation.model, federation.ledger, run(federation, blocks=2))


def test_ledger_of_another_vocabulary_is_named(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path, ends=True)
    federation.model.resize_token_embeddings(120)
    for layers in (["lm_head"], ["model.embed_tokens"]):
        with pytest.raises(errors.LedgerMismatchError, match=r"120 tokens.*had 97.*resized"):
            run(federation, layers=layers, blocks=4)


def test_prompt_of_a_larger_vocabulary_is_refused(federation: TinyFederation) -> None:
    with pytest.raises(errors.PromptError, match="own tokenizer"):
        run(federation, [5, 97])


@pytest.mark.parametrize("way", ["local", "forward", "reverse", "reverse token"])
def test_clients_of_different_ranks(tmp_path: Path, way: str) -> None:
    model = tiny_model("llama")
    names = [f"model.layers.{b}.{n}.weight" for b in (2, 3) for n in ("self_attn.o_proj", "mlp.down_proj")]
    generator = torch.Generator().manual_seed(2)

    def factors(rank: int, shape: torch.Size) -> protoken.ledger.LowRank:
        a, b = (torch.randn(*size, generator=generator) * 0.1 for size in ((rank, shape[1]), (shape[0], rank)))
        return protoken.ledger.LowRank(a, b, 0.5)

    updates = [
        protoken.ClientUpdate(
            f"rank-{rank}", 0.25, delta={n: factors(rank, model.get_parameter(n).shape) for n in names}
        )
        for rank in (1, 3, 8, 2)
    ]
    base = {n: model.get_parameter(n).detach().clone() for n in names}
    with torch.no_grad():
        for name in names:
            change = sum(0.25 * update.delta[name].dense() for update in updates)  # type: ignore[index, union-attr]
            model.get_parameter(name).add_(change)
    path = tmp_path / "ranks"
    aggregate = {n: model.get_parameter(n).detach() for n in names}
    protoken.Ledger.create(path).commit_round(base, aggregate, updates)
    trace = run(TinyFederation(model, path), **WAYS[way])
    equals_oracle(model, protoken.Ledger.open(path), trace)
    assert trace.conservation_residual < 1e-5


# ---- interruptions -----------------------------------------------------------------------------------------------


class _Interrupt(StoppingCriteria):
    """Ctrl-C at the n-th token."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("way", WAYS)
def test_interrupted_generation_leaves_the_model_and_the_earlier_traces(tmp_path: Path, way: str) -> None:
    federation = tiny_federation(tmp_path)
    model = federation.model.train()
    before = fingerprint(model)
    row = torch.tensor([PROMPT])
    with protoken.tracing(model, ledger=federation.path, **WAYS[way]) as tape:
        model.generate(row, max_new_tokens=3, do_sample=False)
        with pytest.raises(KeyboardInterrupt):
            model.generate(
                row, max_new_tokens=9, do_sample=False, stopping_criteria=StoppingCriteriaList([_Interrupt(4)])
            )
        assert len(tape) == 1
        model.generate(row, max_new_tokens=3, do_sample=False)
    assert tape[0].totals.tolist() == tape[1].totals.tolist()
    assert fingerprint(model) == before


def test_interrupted_attribution_leaves_the_model(federation: TinyFederation, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(federation.model)

    def failing(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for name, arguments in WAYS.items():
        with monkeypatch.context() as patch:
            patch.setattr("protoken.first_order.local_relevance", failing)
            patch.setattr("protoken.first_order.reverse_relevance", failing)
            with pytest.raises(KeyboardInterrupt):
                run(federation, **arguments)
        if name in ("reverse token", "position"):
            with monkeypatch.context() as patch:
                patch.setattr(federation.model.model.layers[2].mlp, "forward", _after(federation, failing))
                with pytest.raises(KeyboardInterrupt):
                    run(federation, **arguments)
        assert fingerprint(federation.model) == before, name


def _after(federation: TinyFederation, then: Any) -> Any:
    """The block's own MLP while generating; `then` as soon as gradients are on."""
    own = federation.model.model.layers[2].mlp.forward

    def forward(x: torch.Tensor) -> Any:
        return then() if torch.is_grad_enabled() else own(x)

    return forward


# ---- overlapping users of one model ------------------------------------------------------------------------------


def test_the_last_to_leave_puts_the_training_flags_back(federation: TinyFederation) -> None:
    model = copy.deepcopy(federation.model).train()
    first, second = evaluation_mode(model), evaluation_mode(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(module.training for module in model.modules())
    second.__exit__(None, None, None)
    assert all(module.training for module in model.modules())


def test_streams_that_overlap_compute_without_dropout(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path)
    alone = [token.id for token in protoken.stream(federation.model, PROMPT, ledger=federation.path, max_new_tokens=6)]
    for block in federation.model.model.layers:
        block.self_attn.attention_dropout = 0.5
    federation.model.train()

    def start() -> Iterator[protoken.StreamedToken]:
        return protoken.stream(federation.model, PROMPT, ledger=federation.path, max_new_tokens=6)

    first, second = start(), start()
    ids = [next(first).id], [next(second).id]
    first.close()  # type: ignore[attr-defined]
    assert [*ids[1], *(token.id for token in second)] == alone
    assert federation.model.training


def test_streams_check_their_precision_too(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        federation.model.lm_head.weight.mul_(100)
    with pytest.warns(errors.ProtokenWarning, match="mostly rounding"):
        list(protoken.stream(federation.model, [7, *PROMPT[1:]], ledger=federation.path, max_new_tokens=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide = tiny_federation(tmp_path / "wide")
        list(protoken.stream(wide.model, PROMPT, ledger=wide.path, max_new_tokens=3))


# ---- continuous batching -----------------------------------------------------------------------------------------


def paged(federation: TinyFederation, **arguments: Any) -> Any:
    configuration = pytest.importorskip("transformers.generation.configuration_utils")
    config = configuration.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    return federation.model.generate_batch(
        [PROMPT, [11, 9, 3], [70]], max_new_tokens=4, continuous_batching_config=config, **arguments
    )


@pytest.mark.parametrize("way", WAYS)
def test_continuous_batch_is_traced_request_by_request(federation: TinyFederation, way: str) -> None:
    plain = {key: one.generated_tokens for key, one in paged(federation).items()}
    before = fingerprint(federation.model)
    with protoken.tracing(federation.model, ledger=federation.path, **WAYS[way]) as tape:
        results = paged(federation)
    assert {key: one.generated_tokens for key, one in results.items()} == plain
    assert len(tape) == 3
    for trace, one in zip(tape, results.values(), strict=True):
        assert list(trace.prompt_ids) == one.prompt_ids
        assert [token.id for token in trace.token_list] == one.generated_tokens
        equals_oracle(federation.model, federation.ledger, trace)
    assert fingerprint(federation.model) == before


def test_continuous_batching_that_outlives_its_call_is_refused(federation: TinyFederation) -> None:
    before = fingerprint(federation.model)
    with protoken.tracing(federation.model, ledger=federation.path) as tape:
        with pytest.raises(errors.GenerationError, match="stays behind"):
            paged(federation, persistent_manager=True)
        with pytest.raises(errors.GenerationError, match="come and go"):
            federation.model.init_continuous_batching()
        with pytest.raises(errors.GenerationError, match="come and go"):
            federation.model.continuous_batching_context_manager()
        with pytest.raises(errors.GenerationError, match="generate_batch"):
            federation.model.generate(torch.tensor([PROMPT]), cache_implementation="paged", max_new_tokens=3)
    with pytest.raises(errors.GenerationError, match="generate_batch"):
        run(federation, cache_implementation="paged")
    assert len(tape) == 0
    assert fingerprint(federation.model) == before
