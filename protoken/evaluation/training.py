"""Local training of a client: AdamW on the answers' tokens, the frozen lower blocks run once and remembered.

When only the last blocks learn, everything below them gives the same hidden states in every step, epoch and round. They
are computed once per example and handed to the first trained block; each step then costs the trained blocks and the
head on the answer's positions. Both passes go through the model's own forward, so masks, rotary embeddings, norms and
soft-caps are the family's own, and a step's gradient is that of an ordinary step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from protoken.errors import ArgumentError, PromptError
from protoken.evaluation.corpora import ChatRow
from protoken.models.architectures import Architecture, architecture_of
from protoken.models.layers import is_linear
from protoken.models.patching import evaluation_mode, hidden_of, hooks, replaced_method


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one conversation; those from `answer_start` on are the answer, which carries the loss."""

    ids: tuple[int, ...]
    answer_start: int


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """How a client trains in one round. The defaults are those of arXiv 2601.19672."""

    epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 5e-5
    weight_decay: float = 1e-3
    warmup_steps: int = 15
    max_gradient_norm: float | None = 1.0


def encode_rows(
    tokenizer: Any, rows: Sequence[ChatRow], *, max_tokens: int = 512, drop_long: bool = False
) -> list[Example]:
    """Chat-template ids of every row, the answer closed by the end-of-turn token and cut at `max_tokens`.

    A prompt that leaves no room for an answer raises PromptError, or is dropped with `drop_long`.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            "tokenizer",
            expected="a tokenizer with a chat template, since the rows are conversations",
            got=type(tokenizer).__name__,
            remedy="Use an instruction-tuned model, or set tokenizer.chat_template",
        )
    examples = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True, return_dict=False)
        answer = tokenizer(row.answer, add_special_tokens=False)["input_ids"]
        if len(prompt) < max_tokens:
            ids = [*prompt, *answer, tokenizer.eos_token_id][:max_tokens]
            examples.append(Example(tuple(ids), len(prompt)))
        elif not drop_long:
            raise PromptError(
                "rows",
                expected=f"prompts of less than max_tokens = {max_tokens} tokens",
                got=f"{len(prompt)} tokens in {row.question[:50]!r}",
                remedy="Raise max_tokens, or leave such rows out with drop_long=True",
            )
    return examples


def trainable_parameters(model: nn.Module, blocks: int | None) -> tuple[str, ...]:
    """Names of the weights that learn: of every linear layer in the last `blocks` blocks, or all if None.

    A tied weight appears once. Raises ArgumentError when the model has fewer blocks.
    """
    if blocks is None:
        return tuple(name for name, _ in model.named_parameters())
    architecture = architecture_of(model)
    count = len(architecture.blocks)
    if not 1 <= blocks <= count:
        raise ArgumentError("blocks", expected=f"1 to {count} for this model, or None for all", got=blocks)
    return tuple(
        f"{architecture.layer_name(number, name)}.weight"
        for number in range(count - blocks, count)
        for name, module in architecture.blocks[number].named_modules()
        if is_linear(module)
    )


class LocalTrainer:
    """Trains the named parameters of one model in place; examples are prepared once and used in every round.

    The model is left as it was found, but for the values of the named parameters.
    """

    def __init__(self, model: Any, parameters: Sequence[str], *, cache_boundary: bool = True) -> None:
        known = dict(model.named_parameters())
        unknown = [name for name in parameters if name not in known]
        if unknown or not parameters:
            raise ArgumentError("parameters", expected="names of the model's parameters", got=unknown or "none")
        self.model, self.parameters = model, {name: known[name] for name in parameters}
        self._architecture = architecture_of(model)
        self._first = _first_trained_block(self._architecture, parameters) if cache_boundary else 0
        self._tuples = False
        self._hidden: dict[Example, Tensor] = {}

    @property
    def first_block(self) -> int:
        """Number of the first block that computes in a step; the ones below are remembered (0: none are)."""
        return self._first

    def prepare(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int = 8,
        step: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compute and keep the hidden states [t, d] that enter the first trained block, once per example.

        `step(done, total)` is called after every batch. Nothing to do when all blocks train.
        """
        todo = [e for e in dict.fromkeys(examples) if e not in self._hidden] if self._first else []
        # Neighbours in length share a batch, so that little is spent on padding.
        todo.sort(key=lambda example: len(example.ids))
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            for example, hidden in zip(batch, self._boundary(batch), strict=True):
                self._hidden[example] = hidden[: len(example.ids)].clone()
            if step is not None:
                step(min(start + batch_size, len(todo)), len(todo))

    def train(
        self,
        examples: Sequence[Example],
        settings: LocalSettings,
        *,
        seed: int,
        step: Callable[[int, int, float], None] | None = None,
    ) -> list[float]:
        """Run `settings.epochs` epochs of AdamW from the parameters' present values; the mean loss of every step.

        Loss: mean over the batch's answer tokens of -log p(token | what is before it), in nats. Batches are
            shuffled by `seed`; dropout is off. `step(done, total, loss)` is called after every step. The
            optimiser starts fresh, as a client's does in every round of FedAvg.
        """
        if not examples:
            raise ArgumentError("examples", expected="at least one example to train on", got="none")
        self.prepare(examples)
        order = torch.Generator().manual_seed(seed)
        trained = list(self.parameters.values())
        optimizer = torch.optim.AdamW(
            trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        steps = settings.epochs * -(-len(examples) // settings.batch_size)
        losses: list[float] = []
        with _only_these_learn(self.model, trained), evaluation_mode(self.model), torch.enable_grad():
            for _ in range(settings.epochs):
                shuffled = torch.randperm(len(examples), generator=order).tolist()
                for start in range(0, len(examples), settings.batch_size):
                    batch = [examples[i] for i in shuffled[start : start + settings.batch_size]]
                    warm = min(1.0, (len(losses) + 1) / max(settings.warmup_steps, 1))
                    for group in optimizer.param_groups:
                        group["lr"] = settings.learning_rate * warm
                    losses.append(self._step(batch, optimizer, settings.max_gradient_norm))
                    if step is not None:
                        step(len(losses), steps, losses[-1])
            optimizer.zero_grad(set_to_none=True)
        return losses

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """Mean negative log-likelihood of the answers' tokens, in nats, as one step's forward computes it."""
        self.prepare(examples)
        ids, mask = _padded([e.ids for e in examples], self.model.device)
        rows, columns, targets = _answer_positions(examples, self.model.device)

        def keep_answers(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # The head sees only the rows that are scored; whatever the family does after it still happens.
            return (args[0][rows, columns].unsqueeze(0), *args[1:])

        with hooks(self._architecture.head.register_forward_pre_hook(keep_answers)), ExitStack() as stack:
            if self._first:
                stack.enter_context(self._from_boundary([self._hidden[e] for e in examples]))
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
        return nn.functional.cross_entropy(logits.float(), targets)

    def _step(self, batch: Sequence[Example], optimizer: torch.optim.Optimizer, max_norm: float | None) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if max_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), max_norm)
        optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def _boundary(self, batch: Sequence[Example]) -> Tensor:
        """Hidden states [B, t, d] that enter the first trained block; the blocks from there on are passed through."""
        ids, mask = _padded([e.ids for e in batch], self.model.device)
        seen: list[Tensor] = []

        def note_form(_module: nn.Module, _args: Any, result: Any) -> None:
            self._tuples = isinstance(result, tuple)

        def take(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            seen.append(hidden_of(args, kwargs))

        blocks = self._architecture.blocks
        handles = (
            blocks[self._first - 1].register_forward_hook(note_form),
            blocks[self._first].register_forward_pre_hook(take, with_kwargs=True),
        )
        with hooks(*handles), evaluation_mode(self.model), self._passed_through(blocks[self._first :]):
            self.model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
        return seen[0]

    @contextmanager
    def _from_boundary(self, states: Sequence[Tensor]) -> Iterator[None]:
        """Within: the frozen blocks are skipped, and the first trained one is handed `states` ([t_i, d] each)."""
        hidden = nn.utils.rnn.pad_sequence(list(states), batch_first=True)

        def enter(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

        blocks = self._architecture.blocks
        handle = blocks[self._first].register_forward_pre_hook(enter, with_kwargs=True)
        with hooks(handle), self._passed_through(blocks[: self._first]):
            yield

    @contextmanager
    def _passed_through(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = hidden_of(args, kwargs)
            return (hidden, None) if self._tuples else hidden

        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(replaced_method(block, "forward", forward))
            yield


def _first_trained_block(architecture: Architecture, parameters: Sequence[str]) -> int:
    """Number of the lowest block with a trained parameter; 0 when one stands outside the blocks (an embedding)."""
    inside = [name for name in parameters if name.startswith(f"{architecture.blocks_name}.")]
    if len(inside) < len(parameters):
        return 0
    return min(architecture.block_of(name) for name in inside)


@contextmanager
def _only_these_learn(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = {id(parameter) for parameter in trained}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = None


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, t] and mask [B, t], padded on the right. What stands in the padding is masked and never scored."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return ids.to(device), mask.to(device)


def _answer_positions(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and targets [n]: position p predicts token p + 1, for every token of an answer."""
    where = [(b, p) for b, e in enumerate(examples) for p in range(e.answer_start - 1, len(e.ids) - 1)]
    rows, columns = torch.tensor(where, device=device).T
    targets = torch.tensor([examples[b].ids[p + 1] for b, p in where], device=device)
    return rows, columns, targets
