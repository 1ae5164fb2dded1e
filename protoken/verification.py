"""Are these the weights that the ledger was written for? Compared by digest, adapters also by what they add up to."""

from __future__ import annotations

import torch
from torch import nn

from protoken.banks.bank import check_shape
from protoken.errors import LedgerMismatchError
from protoken.ledger import Ledger, LowRank, parameter_digest, tensor_digest
from protoken.models.adapters import Pair, active_adapters, factors_of, is_lora, recorded_as
from protoken.models.layers import Layer, layer_of
from protoken.models.quantised import at_hand, is_quantised

# ||in memory - in the ledger|| / ||in the ledger|| of an adapter's effect, where its factors are others: fp32 rounding.
EFFECT_TOLERANCE = 1e-4


def check_layer(model: nn.Module, name: str, ledger: Ledger, at_round: int) -> None:
    """Compare one traced layer's weight, or its adapters' factors, with what the ledger says after a round.

    Raises:
        LayerError: the ledger records nothing of this layer.
        LedgerMismatchError: other weights, or weights that cannot be compared (quantised, merged without a trace).
    """
    layer = layer_of(model, name)
    record = ledger.round(at_round)
    recorded = recorded_as(model, layer, record.parameters, f"round {at_round} of the ledger")
    check_shape(record, layer, recorded)
    for pair in recorded.pairs:
        _check_pair(layer, pair, ledger, at_round)
    if recorded.direct is None:
        return
    if record.parameters[recorded.direct].form == "lowrank":
        _check_adapter(layer, recorded.direct, ledger, at_round)
    else:
        _check_weight(layer, recorded.direct, ledger, at_round)


def _check_weight(layer: Layer, parameter: str, ledger: Ledger, at_round: int) -> None:
    if is_quantised(layer.weight):
        raise LedgerMismatchError(
            "ledger",
            expected=f"{layer.parameter} in the dtype it was recorded in",
            got=f"a quantised weight ({type(layer.weight).__name__}, {layer.weight.dtype})",
            remedy="Quantised weights cannot be compared with the ledger's digests: attach(..., verify=False) if they "
            "come from the ledger's model",
        )
    merged = getattr(layer.module, "merged_adapters", None)
    if is_lora(layer.module) and isinstance(merged, list) and merged:
        raise LedgerMismatchError(
            "ledger",
            expected=f"{layer.parameter} as it was recorded",
            got=f"it with the adapters {', '.join(merged)} merged in",
            remedy="Call model.unmerge_adapter(), or attach(..., verify=False)",
        )
    with at_hand(layer.owner):
        digest = tensor_digest(layer.weight.detach())
    compare(layer.parameter, digest, parameter, ledger, at_round)


def _check_pair(layer: Layer, pair: Pair, ledger: Ledger, at_round: int) -> None:
    with at_hand(layer.module):
        factors = factors_of(layer.module, pair.adapter)
        digests = {pair.a: tensor_digest(factors.a), pair.b: tensor_digest(factors.b)}
    for name, digest in digests.items():
        compare(name, digest, name, ledger, at_round)


def _check_adapter(layer: Layer, parameter: str, ledger: Ledger, at_round: int) -> None:
    """Equal factors, or an equal effect: over all active adapters, sum s B A = what the rounds' changes add up to.

    The effect is what counts, and (c A, B / c) has the same; it presumes that the adapter started without one, as LoRA
    does (B = 0).
    """
    active = active_adapters(layer.module)
    if not active:
        raise LedgerMismatchError(
            "ledger",
            expected=f"an adapter at {layer.name}, since the ledger records {parameter} as factors",
            got="a layer without one (merged and unloaded, disabled, or never loaded)",
            remedy="Load the federation's adapter with PEFT, or attach(..., verify=False) if it is merged in",
        )
    found = [factors_of(layer.module, adapter) for adapter in active]
    recorded = ledger.round(at_round).aggregate_digest[parameter]
    if len(found) == 1 and recorded in (parameter_digest(found[0]), parameter_digest(_turned(found[0]))):
        return
    effect = torch.stack([factors.dense().cpu() for factors in found]).sum(0)
    rounds = [ledger.round(number) for number in ledger.rounds if number <= at_round]
    total = torch.stack([r.change(parameter) for r in rounds if parameter in r.parameters]).sum(0)
    total = total.T if layer.transposed else total
    error = float((effect - total).norm() / total.norm().clamp(min=1e-30))
    if not error <= EFFECT_TOLERANCE:
        raise LedgerMismatchError(
            "ledger",
            expected=f"adapters {', '.join(active)} at {layer.name} that add up to the rounds' changes",
            got=f"a relative difference of {error:.2g}",
            remedy="Load the adapter of the ledger's last round (or give at_round=), with its own alpha and rank",
        )


def _turned(factors: LowRank) -> LowRank:
    """As a weight of (in, out) records it."""
    return LowRank(factors.b.T.contiguous(), factors.a.T.contiguous(), factors.scale)


def compare(name: str, digest: str, parameter: str, ledger: Ledger, at_round: int) -> None:
    """LedgerMismatchError unless `digest`, of the model's tensor `name`, is that of the recorded `parameter`."""
    recorded = ledger.round(at_round).aggregate_digest[parameter]
    if digest == recorded:
        return
    raise LedgerMismatchError(
        "ledger",
        expected=f"{name} with the model's digest {digest[:12]}",
        got=f"{recorded[:12]} after round {at_round}",
        remedy=_remedy(ledger, parameter, digest),
    )


def _remedy(ledger: Ledger, parameter: str, digest: str) -> str:
    for number in ledger.rounds:
        if ledger.round(number).aggregate_digest.get(parameter) == digest:
            return f"These are the weights after round {number}: attach(..., at_round={number})"
    return (
        "Pass the global model this ledger was written for, in the dtype it was recorded in, "
        "or verify=False if the weights differ on purpose (quantised, merged)"
    )
