"""Quantised bases, weights that accelerate keeps elsewhere, and half precision with its self-check."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import equals_oracle, oracle
from tiny_federation import TinyFederation, tiny_federation
from tolerances import close

import protoken
from protoken import errors
from protoken.models.layers import input_device
from protoken.models.quantised import dequantised, is_quantised, quantised_linears, straight_through

PROMPT = [5, 17, 42, 8, 60, 33, 21]
WAYS = {
    "local": {},
    "forward": {"blocks": 3, "way": "forward"},
    "reverse by token and layer": {"blocks": 3, "way": "reverse", "granularity": "layer"},
    "reverse": {"blocks": 3, "way": "reverse"},
    "every layer": {"blocks": 2, "layers": ["*"]},
}


def trace(federation: TinyFederation, **arguments: Any) -> protoken.Trace:
    arguments = {"max_new_tokens": 6, "do_sample": True, "seed": 2, **arguments}
    return protoken.trace(federation.model, PROMPT, ledger=federation.path, **arguments)


def scores(trace: protoken.Trace) -> torch.Tensor:
    return torch.tensor(trace.token_scores if trace.token_scores is not None else trace.layer_totals)


# ---- quantised ---------------------------------------------------------------------------------------------------


def torchao_weights(model: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def torchao_activations(model: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())


def bitsandbytes_4bit(model: Any) -> None:
    nn = pytest.importorskip("bitsandbytes").nn

    def packed(linear: torch.nn.Linear) -> Any:
        bias = linear.bias is not None
        own = nn.Linear4bit(linear.in_features, linear.out_features, bias, torch.float32, quant_type="nf4")
        own.weight = nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return own

    _replace_linears(model, packed)


def bitsandbytes_8bit(model: Any) -> None:
    nn = pytest.importorskip("bitsandbytes").nn

    def packed(linear: torch.nn.Linear) -> Any:
        own = nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False)
        own.weight = nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return own

    _replace_linears(model, packed)


def _replace_linears(model: Any, packed: Callable[[torch.nn.Linear], Any]) -> None:
    for block in model.model.layers:
        for parent in [module for module in block.modules() if not isinstance(module, torch.nn.Linear)]:
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, name, packed(child).to("cpu"))
    model.eval()


def needs_rows_that_stand_alone(model: Any) -> None:
    """Skip where a processor computes a row otherwise beside other rows.

    Rounded, the last bit becomes a whole step, and generation and oracle, which run different numbers of rows, are two
    models.
    """
    ids = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[0]
        parts = torch.stack([model(ids[:, : n + 1], use_cache=False).logits[0, n] for n in range(ids.shape[1])])
    if not torch.allclose(parts, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max())):
        pytest.skip("on this processor a row's rounded activations depend on the rows beside it")


# Rounding activations to integers turns the last bits of cached and uncached attention into whole steps. The oracle
# runs uncached: where the generation does as well, both round the same numbers, and nothing needs to be widened.
QUANTISED: dict[str, tuple[Callable[[Any], None], dict[str, Any]]] = {
    "torchao int8": (torchao_weights, {}),
    "torchao int8 activations": (torchao_activations, {"use_cache": False}),
    "bitsandbytes 4 bit": (bitsandbytes_4bit, {}),
    "bitsandbytes 8 bit": (bitsandbytes_8bit, {}),
}


@pytest.fixture(scope="module", params=QUANTISED)
def quantised(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TinyFederation, dict[str, Any]]:
    pack, mode = QUANTISED[request.param]
    family = "llama-64" if pack is bitsandbytes_4bit else "llama"
    federation = tiny_federation(tmp_path_factory.mktemp("quantised"), family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pack(federation.model)
    if pack is torchao_activations:
        needs_rows_that_stand_alone(federation.model)
    return federation, mode


@pytest.mark.parametrize("way", WAYS)
def test_quantised_base_equals_the_oracle(quantised: tuple[TinyFederation, dict[str, Any]], way: str) -> None:
    federation, mode = quantised
    assert len(quantised_linears(federation.model.model.layers)) == 28
    protoken.attach(federation.model, federation.path, verify=False)
    arguments = {"max_new_tokens": 6, "do_sample": True, "seed": 2, **mode, **WAYS[way]}
    found = protoken.trace(federation.model, PROMPT, **arguments)
    equals_oracle(federation.model, federation.ledger, found)
    assert found.conservation_residual < 1e-5


def test_quantised_weights_are_refused_with_the_remedy(quantised: tuple[TinyFederation, dict[str, Any]]) -> None:
    with pytest.raises(errors.LedgerMismatchError, match=r"quantised weight.*verify=False"):
        trace(quantised[0])


@pytest.mark.parametrize("method", ["leave_one_out", "aumann_shapley"])
def test_quantised_weights_cannot_move(quantised: tuple[TinyFederation, dict[str, Any]], method: Any) -> None:
    """torchao's tensors say that they are fp32, and cannot be added to."""
    model = quantised[0].model
    protoken.attach(model, quantised[0].path, verify=False)
    with pytest.raises(errors.ModelError, match=r"in floating point.*quantised weight.*method=\"protoken\""):
        protoken.trace(model, PROMPT, max_new_tokens=2, method=method)


def test_rounded_activations_of_cached_decoding_stay_near(tmp_path: Path) -> None:
    """Cached, the traced numbers are those that generation rounded, which the oracle's pass rounds otherwise here and
    there: some steps of 1/127 of a row's largest activation apart."""
    federation = tiny_federation(tmp_path, "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao_activations(federation.model)
    needs_rows_that_stand_alone(federation.model)
    protoken.attach(federation.model, federation.path, verify=False)
    for arguments in WAYS.values():
        found = protoken.trace(federation.model, PROMPT, max_new_tokens=6, do_sample=True, seed=2, **arguments)
        equals_oracle(federation.model, federation.ledger, found, factor=1000)


def test_published_method_takes_a_quantised_base(quantised: tuple[TinyFederation, dict[str, Any]]) -> None:
    """Full weights W_k of a packed layer are its dequantised weight, less the change, plus the update."""
    federation, mode = quantised
    protoken.attach(federation.model, federation.path, verify=False)
    arguments = {"max_new_tokens": 4, "do_sample": False, **mode}
    paper = protoken.trace(federation.model, PROMPT, method="paper", **arguments)
    fast = protoken.trace(federation.model, PROMPT, objective="logit", **arguments)
    unweighted = fast.token_scores / fast.weights
    centred = torch.tensor(paper.token_scores - paper.token_scores.mean(1, keepdims=True))
    close(centred, torch.tensor(unweighted - unweighted.mean(1, keepdims=True)), torch.float32, factor=30)


def four_bit_layer(*, nested: bool) -> Any:
    """bitsandbytes' layer of 96 x 128 with a bias, in evaluation mode."""
    nn = pytest.importorskip("bitsandbytes").nn
    generator = torch.Generator().manual_seed(3)
    layer = nn.Linear4bit(128, 96, True, torch.float32, quant_type="nf4")
    weight = torch.randn(96, 128, generator=generator)
    layer.weight = nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=nested)
    layer.bias = torch.nn.Parameter(torch.randn(96, generator=generator), requires_grad=False)
    return layer.to("cpu").eval()


@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "nested scales"])
def test_four_bits_laid_out_for_inference_are_the_same_numbers(nested: bool) -> None:
    """The layout that bitsandbytes gives its weight on AVX512-BF16, made here on any processor; it rounds scales."""
    functional = pytest.importorskip("bitsandbytes").functional
    layer = four_bit_layer(nested=nested)
    expected = dequantised(layer, layer.weight)
    state = layer.weight.quant_state
    layer.weight.data, _ = functional._convert_weight_packed_for_cpu(layer.weight.data, state)
    found = dequantised(layer, layer.weight)
    assert state.packing_format_for_cpu
    assert found.shape == expected.shape == (96, 128)
    rounding = torch.finfo(torch.bfloat16).eps / 2
    torch.testing.assert_close(found, expected, rtol=1.01 * rounding, atol=1e-7)
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "nested scales"])
def test_gradient_passes_a_four_bit_layer_that_has_run(nested: bool) -> None:
    """After a call without gradients, which is where a processor with AVX512-BF16 gives up the layer's derivative."""
    layer = four_bit_layer(nested=nested)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = layer(x)
    leaf = x.clone().requires_grad_()
    with straight_through([layer]):
        y = layer(leaf)
    slope = torch.randn(5, 96, generator=torch.Generator().manual_seed(5))
    (gradient,) = torch.autograd.grad((y * slope).sum(), leaf)
    weight = dequantised(layer, layer.weight)
    assert torch.equal(y.detach(), expected)
    close(gradient, slope @ weight, torch.float32)
    # The bias is part of the values and no part of the derivative.
    error = (expected - x @ weight.T - layer.bias).norm() / expected.norm()
    assert error < 2 * torch.finfo(torch.bfloat16).eps
    assert "forward" not in vars(layer)


def test_plain_weights_are_not_taken_for_quantised() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert not is_quantised(torch.nn.Parameter(torch.zeros(2, 2, dtype=dtype)))
    assert is_quantised(torch.zeros(2, 2, dtype=torch.int8))
    assert is_quantised(torch.zeros(2, 2, dtype=torch.float8_e4m3fn))


# ---- weights elsewhere -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("family", ["llama", "smollm", "gpt2", "mixtral"])
def test_offloaded_weights_change_nothing(tmp_path: Path, family: str, place: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    federation = tiny_federation(tmp_path / "federation", family, ends=True)
    ends = {"head": {"layers": ["lm_head"], "way": "reverse"}}
    expected = {way: trace(federation, **arguments) for way, arguments in {**WAYS, **ends}.items()}
    if place == "cpu":
        accelerate.cpu_offload(federation.model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(federation.model, str(tmp_path / "weights"), execution_device=torch.device("cpu"))
    hooks = [(len(m._forward_hooks), sorted(m.__dict__)) for m in federation.model.modules()]
    for way, arguments in {**WAYS, **ends}.items():
        found = trace(federation, **arguments)  # the digests are checked, too
        assert found.info.layers == expected[way].info.layers
        close(scores(found), scores(expected[way]), torch.float32)
    assert {parameter.device.type for parameter in federation.model.parameters()} == {"meta"}
    assert [(len(m._forward_hooks), sorted(m.__dict__)) for m in federation.model.modules()] == hooks
    assert input_device(federation.model) == torch.device("cpu")


def test_offloaded_weights_of_another_model_are_noticed(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    federation = tiny_federation(tmp_path, "llama")
    with torch.no_grad():
        federation.model.model.layers[3].mlp.down_proj.weight.add_(1e-3)
    accelerate.cpu_offload(federation.model, execution_device=torch.device("cpu"))
    with pytest.raises(errors.LedgerMismatchError, match="digest"):
        trace(federation)


def test_published_method_refuses_what_is_not_in_memory(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    federation = tiny_federation(tmp_path, "mixtral")
    linear = {"method": "paper", "layers": ["self_attn.o_proj"]}
    expected = trace(federation, **linear)
    accelerate.cpu_offload(federation.model, execution_device=torch.device("cpu"))
    close(scores(trace(federation, **linear)), scores(expected), torch.float32)
    with pytest.raises(errors.GenerationError, match="offloaded"):
        trace(federation, method="paper")


def test_what_runs_at_other_weights_refuses_weights_that_are_elsewhere(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    federation = tiny_federation(tmp_path, "llama")
    accelerate.cpu_offload(federation.model, execution_device=torch.device("cpu"))
    found = trace(federation)
    for ask in (
        lambda: trace(federation, method="shapley"),
        lambda: trace(federation, method="leave_one_out"),
        found.lineage,
        found.history,
        lambda: found.counterfactual("ada", generate=True),
        lambda: protoken.record_probe(found),
    ):
        with pytest.raises(errors.ModelError, match=r"weight in memory.*offloaded\. Load the model without offloading"):
            ask()
    protoken.attach(federation.model, federation.path, verify=False)
    with pytest.raises(errors.ModelError, match="offloaded"):
        protoken.trace(federation.model, [5, 17, 42], max_new_tokens=2, method="shapley")
    protoken.detach(federation.model)


# ---- half precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral", "gpt_oss"])
def test_half_precision_stays_near_fp32_and_silent(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """The same weights and tokens, in half precision and widened; warnings are errors in this suite."""
    federation = tiny_federation(tmp_path, family, dtype=dtype)
    found = trace(federation)
    assert {parameter.dtype for parameter in federation.model.parameters()} == {dtype}
    federation.model.float()
    expected = oracle(federation.model, federation.ledger, found).sum(0)
    error = (scores(found) - expected).norm() / expected.norm()
    # Routing and rounding below the last block differ as well: this is no statement about the projection.
    assert error < 0.2


def saturated(folder: Path, dtype: torch.dtype) -> TinyFederation:
    """A model that is sure of every token: what is left of the log-probability's gradient is below bf16's step."""
    federation = tiny_federation(folder, "llama", dtype=dtype)
    with torch.no_grad():
        federation.model.lm_head.weight.mul_(100)
    return federation


def test_gradient_that_is_rounding_is_warned_about_once(tmp_path: Path) -> None:
    federation = saturated(tmp_path, torch.bfloat16)
    with pytest.warns(errors.ProtokenWarning, match=r"bfloat16 differ by \d+% from the same replay in float32"):
        trace(federation, do_sample=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace(federation, do_sample=False)
    assert not [w for w in caught if issubclass(w.category, errors.ProtokenWarning)]


def test_same_model_in_fp32_is_not_warned_about(tmp_path: Path) -> None:
    assert trace(saturated(tmp_path, torch.float32), do_sample=False).conservation_residual < 1e-3


def test_self_check_leaves_the_model_alone(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path, "llama", dtype=torch.bfloat16)
    before = [(n, id(p), p.dtype) for n, p in federation.model.named_parameters()]
    hooks = [(len(m._forward_hooks), sorted(m.__dict__)) for m in federation.model.modules()]
    trace(federation)
    assert [(n, id(p), p.dtype) for n, p in federation.model.named_parameters()] == before
    assert [(len(m._forward_hooks), sorted(m.__dict__)) for m in federation.model.modules()] == hooks
