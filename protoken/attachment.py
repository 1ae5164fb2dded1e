"""Which ledger and tokenizer belong to a model. Kept beside the model, keyed weakly: nothing is written onto it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from protoken.arguments import check_flag
from protoken.banks.bank import Bank, LedgerBank
from protoken.errors import LayerError, LedgerMismatchError, ModelError
from protoken.ledger import Ledger, tensor_digest
from protoken.methods.updates import Updates, read_updates
from protoken.models.adapters import acting, active_in
from protoken.models.architectures import Architecture, architecture_of
from protoken.models.layers import Layer, layer_of
from protoken.models.parameters import own_names, parameter_of, require_in_memory
from protoken.models.patching import refuse_no_model
from protoken.text import check_tokenizer
from protoken.verification import check_layer, compare


@dataclass
class Attachment:
    """A model's ledger, tokenizer and structure, and the banks and weight checks already made for it.

    Attributes:
        checked: layer or parameter -> the state that it was in when it was compared with the ledger.
        own_names: recorded parameter, and the adapters that were active -> the model's name for it.
    """

    ledger: Ledger
    tokenizer: Any
    architecture: Architecture
    round: int
    verify: bool
    checked: dict[str, Any] = field(default_factory=dict)
    own_names: dict[tuple[str, tuple[str, ...]], str] = field(default_factory=dict)
    banks: dict[tuple[Any, ...], LedgerBank] = field(default_factory=dict)
    updates: dict[tuple[Any, ...], Updates] = field(default_factory=dict)

    def follow(self, model: nn.Module) -> None:
        """Find the model's structure anew if its blocks or its head were replaced since.

        Raises:
            ModelError: it has none that can be traced any more.
        """
        if not self.architecture.is_of(model):
            self.architecture = architecture_of(model)

    def bank(self, model: nn.Module, layers: Sequence[str], rounds: Sequence[int]) -> Bank:
        """The bank of these layers and rounds in memory, after checking once that the weights are the ledger's."""
        return self.ledger_bank(model, layers, rounds).whole(model)

    def ledger_bank(self, model: nn.Module, layers: Sequence[str], rounds: Sequence[int]) -> LedgerBank:
        """The same, of which nothing need be in memory."""
        places = [layer_of(model, name) for name in layers]
        if self.verify:
            for place in places:
                self._check_once(model, place, place.name)
        key = (tuple(layers), tuple(rounds))
        found = self.banks.get(key)
        if found is None or found.acting != tuple(map(acting, places)):
            self._refuse_shared(model, layers)
            found = LedgerBank(self.ledger, model, layers, rounds, self.round)
            # One bank at a time: alternating between many selections must not pile up memory.
            self.banks = {key: found}
        return found

    def moving(self, model: nn.Module, names: Sequence[str], rounds: Sequence[int]) -> Updates:
        """The updates of these parameters and rounds, after checking once that the weights are the ledger's.

        Raises:
            ModelError: some of the parameters do not act, or cannot be moved.
        """
        self.follow(model)
        if self.verify:
            self.check_weights(model, names)
        key = (tuple(names), tuple(rounds))
        found = self.updates.get(key)
        # What acts can change without a write to it, so it is looked at every time.
        own = own_names([self.ledger.round(number) for number in rounds], model, names)
        if found is None or found.parameters != own:
            found = read_updates(self.ledger, model, rounds, names)
            self.updates = {key: found}
        return found

    def renewed(self, model: nn.Module, source: LedgerBank | Updates) -> LedgerBank | Updates:
        """The same updates for what acts by now: others than the given where adapters were switched since."""
        self.follow(model)
        if isinstance(source, LedgerBank):
            same = source.acting == tuple(acting(layer_of(model, name)) for name in source.layers)
            return source if same else self.ledger_bank(model, source.layers, source.rounds)
        own = own_names([self.ledger.round(number) for number in source.rounds], model, source.names)
        return source if source.parameters == own else self.moving(model, source.names, source.rounds)

    def _refuse_shared(self, model: nn.Module, layers: Sequence[str]) -> None:
        """LayerError for a weight that acts at several places: what is seen at one is not all that it does."""
        ends = {self.architecture.embeddings_name, self.architecture.head_name}
        users: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            users.setdefault(id(parameter), []).append(name)
        for name in layers:
            places = users.get(id(layer_of(model, name).weight), [])
            if len(places) > 1 and name not in ends:
                raise LayerError(
                    "layers",
                    expected="layers with a weight of their own",
                    got=f"{name}, whose weight also acts as {', '.join(places)}",
                    remedy="Name other layers, or take a method that replays the response at other weights",
                )

    def check_weights(self, model: nn.Module, names: Sequence[str]) -> None:
        """Compare parameters with the ledger's digests, each once, and again if it was written to or replaced.

        Raises:
            LayerError: the ledger does not record one of them.
            LedgerMismatchError: the model's weights are not those of the round.
        """
        recorded = self.ledger.round(self.round).aggregate_digest
        known, adapters = dict(model.named_parameters(remove_duplicate=False)), active_in(model)
        for name in names:
            if name not in recorded:
                raise LayerError(
                    "layers",
                    expected=f"layers that round {self.round} of the ledger records",
                    got=name.removesuffix(".weight"),
                    remedy=f"Recorded are {', '.join(sorted(recorded)[:8])}",
                )
            own = self._own_name(model, known, name, adapters)
            require_in_memory(own, known[own])
            if own.endswith(".base_layer.weight"):
                self._check_once(model, layer_of(model, own.removesuffix(".base_layer.weight")), name)
                continue
            if self.checked.get(name) == _state([known[own]]):
                continue
            compare(name, tensor_digest(known[own].detach()), name, self.ledger, self.round)
            self.checked[name] = _state([known[own]])

    def _own_name(self, model: nn.Module, known: Collection[str], name: str, adapters: tuple[str, ...]) -> str:
        if self.own_names.get((name, adapters)) not in known:
            found = parameter_of(model, name, known)
            if found is None:
                raise LedgerMismatchError(
                    "ledger",
                    expected=f"a ledger of this model's parameters, {name} among them",
                    got=f"a {type(model).__name__} without it",
                    remedy="Pass the global model this ledger was written for",
                )
            self.own_names[name, adapters] = found
        return self.own_names[name, adapters]

    def _check_once(self, model: nn.Module, layer: Layer, name: str) -> None:
        state = (acting(layer), _state(layer.module.parameters()))
        if self.checked.get(name) != state:
            check_layer(model, layer.name, self.ledger, self.round)
            self.checked[name] = state


def _state(tensors: Iterable[Tensor]) -> list[tuple[int, int, torch.dtype]]:
    """What changes when a tensor is written to, moved or replaced (but not when it is written to through `.data`)."""
    return [(_address(tensor), tensor._version, tensor.dtype) for tensor in tensors]


def _address(tensor: Tensor) -> int:
    """Offloaded tensors are others after every call, and quantised ones of classes of their own may have no address."""
    if tensor.is_meta:
        return 0
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else id(tensor)


_attachments: WeakKeyDictionary[nn.Module, Attachment] = WeakKeyDictionary()


def attach(
    model: nn.Module,
    ledger: Ledger | str | PathLike[str],
    tokenizer: Any = None,
    *,
    at_round: int | None = None,
    verify: bool = True,
) -> None:
    """Tell protoken which ledger (and tokenizer) belong to a model, so that `trace(model, prompt)` needs no more.

    Args:
        model: the global model, a transformers causal language model.
        ledger: an open ledger or its path.
        tokenizer: for prompts that are text and for showing tokens.
        at_round: the round whose aggregate these weights are; the ledger's last one if None.
        verify: compare the weights of every traced layer with the ledger's digests, at the first trace and whenever
            they were written to or replaced, or adapters switched, since.

    Raises:
        ModelError: not a causal language model, or of an unknown structure.
        ArgumentError, LedgerFormatError: `ledger` is no ledger, or damaged; `tokenizer` is none.
        UnknownRoundError: `at_round` is not in the ledger, or it has no round yet.
        LedgerMismatchError: (when it is traced) the ledger was written for other weights.
    """
    _attachments[model] = make_attachment(model, ledger, tokenizer, at_round=at_round, verify=verify)


def detach(model: nn.Module) -> None:
    """Forget the model's ledger; no error if none was attached. ModelError for what is no model."""
    refuse_no_model(model)
    _attachments.pop(model, None)


def make_attachment(
    model: nn.Module,
    ledger: Ledger | str | PathLike[str],
    tokenizer: Any = None,
    *,
    at_round: int | None = None,
    verify: bool = True,
) -> Attachment:
    """What `attach` stores, for one call that brings its own ledger."""
    check_tokenizer(tokenizer)
    check_flag("verify", verify)
    opened = ledger if isinstance(ledger, Ledger) else Ledger.open(ledger)
    number = opened.round("last" if at_round is None else at_round).number
    return Attachment(opened, tokenizer, architecture_of(model), number, verify)


def attachment_of(model: nn.Module) -> Attachment:
    """The attachment of a model.

    Raises:
        ModelError: none was made.
    """
    found = _attachments.get(model)
    if found is None:
        raise ModelError(
            "model",
            expected="a model with a ledger",
            got=f"{type(model).__name__} without one",
            remedy="Call protoken.attach(model, ledger, tokenizer) once, or pass ledger=",
        )
    return found
