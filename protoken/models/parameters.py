"""The model's parameters by the names that a ledger records, and whether they can be moved."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from protoken.errors import LayerError, LedgerMismatchError, ModelError
from protoken.ledger import Round
from protoken.models.adapters import PEFT_PREFIX, active_in, require_acting
from protoken.models.quantised import is_quantised


def parameter_of(model: nn.Module, recorded: str, known: Collection[str] | None = None) -> str | None:
    """The model's own name of a recorded parameter, or None.

    PEFT prefixes names, wraps a layer's weight as its base_layer's (an update of the effective weight moves that one:
    the adapter is added to it), and puts the adapter's name into its factors'.

    Args:
        known: the names of the model's parameters, where they are at hand.
    """
    if known is None:
        known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stem, _, leaf = recorded.rpartition(".")
    shapes = [recorded, f"{stem}.base_layer.{leaf}"]
    if stem.endswith((".lora_A", ".lora_B")):
        shapes += [f"{stem}.{adapter}.{leaf}" for adapter in active_in(model)]
    return next((name for shape in shapes for name in (shape, PEFT_PREFIX + shape) if name in known), None)


def own_names(records: Sequence[Round], model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """The model's names of the recorded ones, after checking that every round has them, in the model's shape."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for name in names:
        for record in records:
            if name not in record.parameters:
                raise LayerError(
                    "layers",
                    expected=f"parameters that round {record.number} of the ledger holds",
                    got=name,
                    remedy=f"It holds {', '.join(list(record.parameters)[:6])}",
                )
        theirs = tuple(records[0].parameters[name].shape)
        own = parameter_of(model, name, parameters)
        if own is not None:  # First, for packed weights have another shape.
            _check_acts(model, own, parameters[own])
        ours = tuple(parameters[own].shape) if own else None
        if ours != theirs:
            raise LedgerMismatchError(
                "ledger",
                expected=f"{name} of the ledger's shape {theirs}",
                got="no such parameter in the model" if ours is None else ours,
            )
        assert own is not None
        found[name] = own
    return found


def require_in_memory(own: str, parameter: Tensor) -> None:
    """ModelError for a parameter whose numbers are elsewhere: nothing can be added to it."""
    if parameter.is_meta:
        raise ModelError(
            "model",
            expected=f"{own} in memory, to run the response at other values of it",
            got="a weight that was offloaded",
            remedy='Load the model without offloading, or use method="protoken"',
        )


def _check_acts(model: nn.Module, own: str, parameter: nn.Parameter) -> None:
    """ModelError for what cannot be moved: an adapter's factors that do not act, and packed weights."""
    require_acting(model, own)
    require_in_memory(own, parameter)
    if is_quantised(parameter):
        raise ModelError(
            "model",
            expected=f"{own} in floating point, to replay the response at other values of it",
            got=f"a quantised weight ({type(parameter).__name__}, {parameter.dtype})",
            remedy='Load the model unquantised, or use method="protoken"',
        )
