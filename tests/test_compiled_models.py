"""Models compiled by torch.compile: generated as compiled, attributed as written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_federation import tiny_federation
from tolerances import close
from torch import nn

import protoken
from protoken.errors import GenerationError, ModelError
from protoken.models.patching import replaced_method
from protoken.models.twin import is_compiled, twin_of

IDS = torch.arange(3, 18)[None]
SETTINGS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


def _model(model: Any) -> None:
    model.compile(backend="eager", dynamic=True)


def _forward(model: Any) -> None:
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)


def _blocks(model: Any) -> None:
    for block in model.model.layers:
        block.compile(backend="eager", dynamic=True)


WAYS = [{}, {"blocks": 2, "way": "forward"}, {"method": "aumann_shapley", "nodes": 1}]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [_model, _forward, _blocks], ids=["model", "forward", "blocks"])
def test_scores_are_those_of_the_model_as_written(tmp_path: Path, compiled: Callable[[Any], None]) -> None:
    federation = tiny_federation(tmp_path)
    model = federation.model
    expected = [protoken.trace(model, IDS, ledger=federation.path, **SETTINGS, **way) for way in WAYS]
    torch._dynamo.reset()
    compiled(model)
    assert is_compiled(model)
    model.generate(IDS, **SETTINGS)  # In service before anybody traces: hooks placed from here on would not be seen.
    own = {name: dict(vars(module)) for name, module in model.named_modules()}
    for way, alone in zip(WAYS, expected, strict=True):
        found = protoken.trace(model, IDS, ledger=federation.path, **SETTINGS, **way)
        assert found.token_list == alone.token_list
        close(torch.tensor(found.totals), torch.tensor(alone.totals), torch.float32)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == own


def test_what_runs_compiled_cannot_be_streamed(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path)
    _model(federation.model)
    with pytest.raises(GenerationError, match=r"compiled one.*protoken\.trace"):
        protoken.stream(federation.model, IDS, ledger=federation.path)


@pytest.mark.parametrize("inside", [False, True], ids=["model", "decoder"])
def test_wrapper_of_torch_compile_is_refused_with_the_remedy(tmp_path: Path, inside: bool) -> None:
    federation = tiny_federation(tmp_path)
    model: Any = federation.model
    if inside:
        model.model = torch.compile(model.model, backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    with pytest.raises(ModelError, match=r"model\.compile\(\).*model\._orig_mod"):
        protoken.trace(model, IDS, ledger=federation.path)


def test_compiled_model_bound_to_itself_is_refused(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path)
    block = federation.model.model.layers[0]
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)
    _model(federation.model)
    with pytest.raises(ModelError, match="without compiling it"):
        protoken.trace(federation.model, IDS, ledger=federation.path, **SETTINGS)


def test_twin_of_a_compiled_model_is_not_compiled(tmp_path: Path) -> None:
    model: Any = tiny_federation(tmp_path).model
    expected = model(IDS).logits
    _forward(model)
    _blocks(model)
    with replaced_method(model.lm_head, "forward", nn.Identity()):
        twin = twin_of(model)
    assert twin is not model
    assert not is_compiled(twin)
    assert torch.equal(twin(IDS).logits, expected)
