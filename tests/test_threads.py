"""One model, several threads: a trace concerns its own generation, and nobody else's notices it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from tiny_federation import TinyFederation, tiny_federation
from tolerances import close
from torch import Tensor, nn

import protoken
from protoken.models.patching import current_method, replaced_method
from protoken.models.twin import bound_otherwise, twin_of
from protoken.precision import _measured

IDS = torch.arange(3, 23)[None]
FORMS: dict[str, dict[str, Any]] = {
    "local": {},
    "forward": {"blocks": 3, "way": "forward"},
    "reverse": {"blocks": 3, "way": "reverse"},
    "paper": {"method": "paper"},
    "path": {"method": "aumann_shapley"},
    "tangents": {"method": "aumann_shapley", "way": "forward", "nodes": 1, "blocks": 1},
    "paired": {"method": "paired_shapley", "pairs": 2},
}


def answer(model: Any) -> Tensor:
    return model.generate(IDS, max_new_tokens=8, do_sample=False)


def beside(work: Callable[[], object], other: Callable[[], object], *, turns: int = 3) -> None:
    """Do `work` some turns while a second thread does `other` without a pause; errors of both are raised."""
    over = threading.Event()

    def until_over() -> None:
        while True:
            other()
            if over.is_set():
                return

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(until_over)
        try:
            for _ in range(turns):
                work()
        finally:
            over.set()
        running.result()


def is_clean(model: nn.Module) -> bool:
    """No method, hook or gradient of ours is left on any module."""
    return not any(
        {"forward", "generate"} & module.__dict__.keys() or module._forward_hooks or module._forward_pre_hooks
        for module in model.modules()
    ) and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("family", "form"), [*(("llama", form) for form in FORMS), ("mixtral", "forward"), ("bloom", "forward")]
)
def test_other_requests_are_answered_as_if_nobody_traced(tmp_path: Path, family: str, form: str) -> None:
    federation = tiny_federation(tmp_path, family)
    model, arguments = federation.model, {"max_new_tokens": 8, "do_sample": False, **FORMS[form]}
    expected = answer(model)
    alone = protoken.trace(model, IDS, ledger=federation.path, **arguments)

    def traced() -> None:
        found = protoken.trace(model, IDS, ledger=federation.path, **arguments)
        close(torch.tensor(found.totals), torch.tensor(alone.totals), torch.float32)

    def untraced() -> None:
        assert torch.equal(answer(model), expected)

    beside(traced, untraced)
    assert is_clean(model)
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("form", FORMS)
def test_two_traces_at_once_are_those_of_one_after_the_other(tmp_path: Path, form: str) -> None:
    federation = tiny_federation(tmp_path)
    prompts = [IDS, IDS.flip(1)[:, :11]]

    def traced(prompt: Tensor) -> protoken.Trace:
        return protoken.trace(
            federation.model, prompt, ledger=federation.path, max_new_tokens=8, do_sample=False, **FORMS[form]
        )

    alone = [traced(prompt) for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(traced, prompts * 4))
    for number, found in enumerate(together):
        assert found.token_list == alone[number % 2].token_list
        close(torch.tensor(found.totals), torch.tensor(alone[number % 2].totals), torch.float32)
    assert is_clean(federation.model)


def test_first_trace_in_half_precision_widens_nothing_that_others_see(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path, dtype=torch.bfloat16, scale=0.1)
    model, expected = federation.model, answer(federation.model)

    def first() -> None:
        # The noise is measured at a model's first trace only: forgotten, each is the first.
        _measured.clear()
        protoken.trace(model, IDS, ledger=federation.path, max_new_tokens=4, do_sample=False)
        assert len(_measured) == 1

    def untraced() -> None:
        assert torch.equal(answer(model), expected)

    beside(first, untraced)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_streams_leave_other_requests_alone(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path)
    model, expected = federation.model, answer(federation.model)

    def streamed() -> None:
        tokens = list(protoken.stream(model, IDS, ledger=federation.path, max_new_tokens=8, do_sample=False))
        assert [token.id for token in tokens] == expected[0, IDS.shape[1] :].tolist()

    def untraced() -> None:
        assert torch.equal(answer(model), expected)

    beside(streamed, untraced)
    assert is_clean(model)


def test_who_asks_without_a_client_gets_another_model_than_everybody_else(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path, scale=0.3)
    model, expected = federation.model, answer(federation.model)
    trace = protoken.trace(model, IDS, ledger=federation.path, max_new_tokens=8, do_sample=False)
    alone = trace.counterfactual("ada", generate=True)
    assert list(alone.response_ids) != expected[0, IDS.shape[1] :].tolist()

    def asked() -> None:
        assert trace.counterfactual("ada", generate=True).response_ids == alone.response_ids

    def untraced() -> None:
        assert torch.equal(answer(model), expected)

    beside(asked, untraced)
    assert is_clean(model)


ASKED: dict[str, Callable[[protoken.Trace], Any]] = {
    "lineage": lambda trace: trace.lineage(nodes=2).totals,
    "history": lambda trace: trace.history().scores,
    "counterfactual": lambda trace: trace.counterfactual("ada").after,
    "answer": lambda trace: trace.counterfactual("ada", generate=True).response_ids,
}


@pytest.mark.parametrize("question", ASKED)
@pytest.mark.parametrize("family", ["smollm", "gpt2"])
def test_a_model_with_accelerates_hooks_is_at_its_own_weights_for_others(
    tmp_path: Path, family: str, question: str
) -> None:
    accelerate = pytest.importorskip("accelerate")
    federation = tiny_federation(tmp_path, family, scale=0.2)
    model, arguments = federation.model, {"max_new_tokens": 8, "do_sample": False}
    ask, expected = ASKED[question], answer(federation.model)
    alone = ask(protoken.trace(model, IDS, ledger=federation.path, **arguments))
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    attributes = [(sorted(m.__dict__), m.__dict__.get("_hf_hook")) for m in model.modules()]
    trace = protoken.trace(model, IDS, ledger=federation.path, **arguments)

    def asked() -> None:
        close(torch.tensor(ask(trace)), torch.tensor(alone), torch.float32)

    def untraced() -> None:
        assert torch.equal(answer(model), expected)

    beside(asked, untraced)
    assert [(sorted(m.__dict__), m.__dict__.get("_hf_hook")) for m in model.modules()] == attributes


@pytest.mark.parametrize("family", ["smollm", "gpt2", "mixtral"])
def test_twin_of_an_offloaded_model_loads_its_weights_into_itself(tmp_path: Path, family: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_federation(tmp_path, family).model
    expected = model(IDS).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    twin = twin_of(model)
    assert twin is not model
    seen: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    for module in twin.modules():
        module._forward_pre_hooks.clear()
    loaded: list[str] = []
    inside = next(m for m in twin.modules() if isinstance(m, nn.Embedding))
    outside = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    own = inside._old_forward

    def looked(*args: Any) -> Any:
        loaded.extend(module.weight.device.type for module in (inside, outside))
        return own(*args)

    inside._old_forward = looked
    assert torch.equal(twin(IDS).logits, expected)
    assert loaded == ["cpu", "meta"]
    assert seen == []
    assert {p.device.type for m in (model, twin) for p in m.parameters()} == {"meta"}


def test_a_tape_hears_every_thread(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path)
    with protoken.tracing(federation.model, ledger=federation.path) as tape, ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda _: answer(federation.model), range(4)))
    assert len(tape) == len(outputs) == 4
    for trace in tape:
        close(torch.tensor(trace.totals), torch.tensor(tape[0].totals), torch.float32)
    assert is_clean(federation.model)


def test_each_of_two_tapes_hears_its_own_thread(federations: TinyFederation) -> None:
    model, both = federations.model, threading.Barrier(2)

    def taped(length: int) -> list[int]:
        with protoken.tracing(model, ledger=federations.path) as tape:
            both.wait()
            model.generate(IDS[:, :length], max_new_tokens=3, do_sample=False)
            both.wait()
        return [len(trace.prompt_ids) for trace in tape]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(taped, (5, 9))) == [[5], [9]]
    assert is_clean(model)


def test_a_tape_goes_with_its_task_into_other_threads(federations: TinyFederation) -> None:
    """What asyncio.to_thread does: the context goes along, the thread is another."""
    model = federations.model

    def opened() -> tuple[Any, Any, Any]:
        context = protoken.tracing(model, ledger=federations.path)
        return context, context.__enter__(), copy_context()

    first, second = (copy_context().run(opened) for _ in range(2))
    with ThreadPoolExecutor(1) as pool:
        for (_, _, here), length in ((first, 5), (second, 9)):
            pool.submit(here.run, model.generate, IDS[:, :length], max_new_tokens=3, do_sample=False).result()
        pool.submit(model.generate, IDS, max_new_tokens=3, do_sample=False).result()
    for context, _, here in (first, second):
        here.run(context.__exit__, None, None, None)
    assert [len(trace.prompt_ids) for trace in first[1]] == [5]
    assert [len(trace.prompt_ids) for trace in second[1]] == [9]
    assert is_clean(model)


@pytest.fixture(scope="module")
def federations(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("threads"))


def test_replacements_that_overlap_come_off_in_any_order() -> None:
    module, entered, leave = nn.Linear(1, 1), threading.Event(), threading.Event()
    own = module.forward

    def other() -> str:
        with replaced_method(module, "forward", lambda: "theirs"):
            entered.set()
            leave.wait()
            return module.forward()  # type: ignore[call-arg]

    with ThreadPoolExecutor(1) as pool:
        with replaced_method(module, "forward", lambda: "ours"):
            theirs = pool.submit(other)
            entered.wait()
            assert module.forward() == "ours"  # type: ignore[call-arg]
        assert module.forward == current_method(module, "forward") or "forward" in module.__dict__
        assert current_method(module, "forward") == own
        leave.set()
        assert theirs.result() == "theirs"
    assert "forward" not in module.__dict__


def test_replacement_over_a_method_of_the_users_brings_that_back() -> None:
    module = nn.Linear(1, 1)
    module.forward = mine = lambda x: x  # type: ignore[method-assign]
    with replaced_method(module, "forward", lambda: "ours"):
        assert module.forward() == "ours"  # type: ignore[call-arg]
    assert module.__dict__["forward"] is mine


def test_twin_shares_parameters_and_nothing_that_is_written_to(federations: TinyFederation) -> None:
    model = federations.model
    twin = twin_of(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert not {id(module) for module in model.modules()} & {id(module) for module in twin.modules()}
    twin.lm_head.register_forward_hook(lambda *_: None)
    twin.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    assert is_clean(model)
    assert bool(model.lm_head.weight.any())


def test_twin_has_the_methods_of_the_models_instances_as_its_own(tmp_path: Path) -> None:
    model = tiny_federation(tmp_path).model
    block = model.model.layers[0]

    def doubled(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, 2 * hidden, *args, **kwargs)

    block.forward = MethodType(doubled, block)
    expected = model(IDS).logits
    twin = twin_of(model)
    assert twin is not model
    assert twin.model.layers[0].forward.__self__ is twin.model.layers[0]
    assert torch.equal(twin(IDS).logits, expected)
    with torch.no_grad():
        last = twin.model.layers[0].mlp.down_proj
        last.weight = nn.Parameter(torch.zeros_like(last.weight))
        assert not torch.equal(twin(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, expected)


def test_model_with_closures_for_methods_is_its_own_twin(tmp_path: Path) -> None:
    model = tiny_federation(tmp_path).model
    block = model.model.layers[0]
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)
    assert twin_of(model) is model
    assert bound_otherwise(model) == "model.layers.0"
    del block.forward
    with replaced_method(block, "forward", block.forward):
        twin = twin_of(model)
    assert twin is not model
    assert is_clean(twin)
