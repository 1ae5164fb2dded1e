"""Models that somebody else has his hands on: hooks, parametrizations, wrappers, weights that are not there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_federation import CLIENTS, WEIGHTS, TinyFederation, tiny_federation
from tolerances import close
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import protoken
from protoken import errors
from protoken.models.layers import layer_of

PROMPT = [5, 17, 42, 8, 60, 33, 21]
WAYS: dict[str, dict[str, Any]] = {
    "local": {},
    "forward": {"blocks": 3, "way": "forward"},
    "reverse": {"blocks": 3, "way": "reverse"},
    "reverse, by token": {"blocks": 3, "way": "reverse", "granularity": "token"},
}
# Out-projection and MLP-final layer; in OPT they see rows of all positions.
LAYERS = {
    "llama": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "opt": ("model.decoder.layers", "self_attn.out_proj", "fc2"),
    "mixtral": ("model.layers", "self_attn.o_proj", "mlp.gate"),
}


def run(federation: TinyFederation, **arguments: Any) -> protoken.Trace:
    return protoken.trace(federation.model, PROMPT, ledger=federation.path, max_new_tokens=5, **arguments)


def by_weight(federation: TinyFederation, trace: protoken.Trace) -> torch.Tensor:
    """rho_k <df_t/dW, delta_k> by autograd on the weights of the whole model as it is, [T, K]."""
    record, model = federation.ledger.round("last"), federation.model
    names = [layer_of(model, layer).parameter for layer in trace.info.layers]
    weights = [model.get_parameter(name) for name in names]
    ids = torch.tensor([[*trace.prompt_ids, *(token.id for token in trace.token_list)]])
    start, rows = len(trace.prompt_ids), []
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0].log_softmax(-1)
    for position in range(start, ids.shape[1]):
        grads = torch.autograd.grad(logits[position - 1, ids[0, position]], weights, retain_graph=True)
        rows.append(
            [
                sum(float((record.delta(client, name) * grad).sum()) for name, grad in zip(names, grads, strict=True))
                for client in CLIENTS
            ]
        )
    return torch.tensor(rows, dtype=torch.float64) * torch.tensor(WEIGHTS, dtype=torch.float64)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("block", [3, 2])
@pytest.mark.parametrize("family", LAYERS)
def test_hooks_on_traced_layers_are_part_of_the_model(tmp_path: Path, family: str, block: int, way: str) -> None:
    federation = tiny_federation(tmp_path, family)
    blocks, projection, final = LAYERS[family]
    for name in (projection, final):
        layer = federation.model.get_submodule(f"{blocks}.{block}.{name}")
        layer.register_forward_pre_hook(lambda _module, args: (args[0] * 0.7,))
        if final != "mlp.gate" or name == projection:
            layer.register_forward_hook(lambda _module, _args, output: output * 1.5)
    layers = {"layers": [projection, final]} if family == "mixtral" else {}
    trace = run(federation, **WAYS[way], **layers)
    expected = by_weight(federation, trace)
    if trace.token_scores is None:
        close(torch.tensor(trace.totals), expected.sum(0), torch.float32)
    else:
        close(torch.tensor(trace.token_scores), expected, torch.float32)


def test_hooks_on_traced_layers_are_part_of_a_stream(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        layer = federation.model.get_submodule(f"model.layers.3.{name}")
        layer.register_forward_hook(lambda _module, _args, output: output * 1.5)
    with protoken.stream(federation.model, PROMPT, ledger=federation.path, max_new_tokens=5) as stream:
        assert len(list(stream)) == 5
    close(torch.tensor(stream.trace.token_scores), by_weight(federation, stream.trace), torch.float32)


def test_hooks_keep_their_order_and_are_left_alone(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path)
    layer, seen = federation.model.model.layers[3].mlp.down_proj, []
    for number in range(3):
        layer.register_forward_hook(lambda _module, _args, _output, number=number: seen.append(number))
    before = list(layer._forward_hooks)
    run(federation)
    assert list(layer._forward_hooks) == before
    assert seen == [0, 1, 2] * (len(seen) // 3)


class Added(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(2, columns)), nn.Parameter(torch.ones(rows, 2))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.b @ self.a


def test_parametrized_weights_are_scored_as_what_they_come_to(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path)
    expected = run(federation)
    block = federation.model.model.layers[3]
    parametrize.register_parametrization(block.self_attn.o_proj, "weight", Added(48, 48))
    parametrizations.weight_norm(block.mlp.up_proj)
    close(torch.tensor(run(federation).token_scores), torch.tensor(expected.token_scores), torch.float32)


def callers(model: Any, path: Path) -> list[Any]:
    def recorded() -> None:
        with protoken.tracing(model, ledger=path):
            pass

    given: dict[str, Any] = {"ledger": path, "max_new_tokens": 3}
    return [
        lambda: protoken.trace(model, PROMPT, **given),
        lambda: protoken.stream(model, PROMPT, **given),
        lambda: protoken.estimate(model, PROMPT, **given),
        recorded,
    ]


def test_weights_on_the_meta_device_are_refused(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path)
    for call in callers(copy.deepcopy(federation.model).to("meta"), federation.path):
        with pytest.raises(errors.ModelError, match="on the meta device, which holds shapes only"):
            call()


def test_data_parallel_is_refused_with_what_it_wraps(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path)
    wrapped = nn.DataParallel(federation.model)
    for call in [*callers(wrapped, federation.path), lambda: protoken.attach(wrapped, federation.path)]:
        with pytest.raises(errors.ModelError, match=r"Give what it wraps: model\.module"):
            call()


def test_no_language_model_is_refused_by_a_stream(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path)
    with pytest.raises(errors.ModelError, match="causal"):
        protoken.stream(nn.Linear(2, 2), PROMPT, ledger=federation.path)
