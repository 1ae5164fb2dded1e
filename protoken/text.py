"""From a prompt to token ids, and from generated ids back to pieces of text that add up to the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor

from protoken.errors import ArgumentError, PromptError
from protoken.models.layers import base_of
from protoken.results import Token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens decoded along before a new one, so that tokenizers which strip a leading space see that it does not lead.
_CONTEXT = 8
_WHOLE = frozenset([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])

# Tensors among the arguments that say nothing of what the model sees but its text.
OF_TEXT = frozenset(
    [
        *("inputs", "input_ids", "attention_mask", "negative_prompt_ids", "negative_prompt_attention_mask"),
        *("eos_token_id", "pad_token_id", "bos_token_id", "suppress_tokens", "begin_suppress_tokens"),
    ]
)
# How a tensor among the arguments is recorded.
TENSOR_OF = "tensor of shape "

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int] | Tensor | np.ndarray[Any, Any]


def encode_prompt(tokenizer: Any, prompt: Prompt, chat: bool | None) -> list[int]:
    """Token ids of a prompt.

    Args:
        tokenizer: needed unless the prompt is a sequence of ids.
        prompt: text; a conversation [{"role": ..., "content": ...}, ...]; or token ids, taken as they are.
        chat: wrap text as one user turn of the tokenizer's chat template. None: if it has a template.

    Raises:
        PromptError: empty, several prompts, of another type, or a chat template is needed and the tokenizer has none.
    """
    check_tokenizer(tokenizer)
    if chat is not None and not isinstance(chat, bool):
        raise ArgumentError("chat", expected="True, False or None", got=repr(chat))
    if isinstance(prompt, Tensor | np.ndarray):
        prompt = _one_row("prompt", prompt)
    if not isinstance(prompt, str):
        _check_sequence(prompt)
        if all(isinstance(token, int | np.integer) for token in prompt):
            return _not_empty([int(token) for token in prompt])  # type: ignore[arg-type]
    _need_tokenizer("prompt", tokenizer)
    if isinstance(prompt, str):
        if not prompt:
            return _not_empty([])
        if chat is False or (chat is None and not getattr(tokenizer, "chat_template", None)):
            return _not_empty(encode_text("prompt", tokenizer, prompt))
        prompt = [{"role": "user", "content": prompt}]
    return _not_empty(_encode_conversation(tokenizer, prompt))


def encode_response(tokenizer: Any, response: str | Sequence[int] | Tensor | np.ndarray[Any, Any]) -> list[int]:
    """Token ids of a response that is there already: ids as they are, text as it stands, nothing added to it.

    Raises:
        PromptError: empty, several responses, of another type, or text without a tokenizer.
    """
    if isinstance(response, Tensor | np.ndarray):
        response = _one_row("response", response)
    if isinstance(response, str):
        _need_tokenizer("response", tokenizer)
        response = encode_text("response", tokenizer, response, add_special_tokens=False) if response else []
    listed = isinstance(response, Sequence) and not isinstance(response, bytes | bytearray)
    if not listed or not all(isinstance(token, int | np.integer) for token in response):
        raise PromptError("response", expected="text, or the token ids of one response", got=type(response).__name__)
    if not response:
        raise PromptError("response", expected="at least one token", got="an empty response")
    return [int(token) for token in response]


def encode_text(argument: str, tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Token ids of a text; PromptError for one that no tokenizer can read."""
    _check_text(argument, text)
    return list(tokenizer(text, **options)["input_ids"])


def _check_text(argument: str, text: str) -> None:
    """PromptError for half a character: what a text that was cut in UTF-16 ends with."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            argument,
            expected="text that UTF-8 can say",
            got=f"a lone surrogate, {text[error.start]!a}, at character {error.start}",
            remedy='Clean it first: text.encode("utf-8", "replace").decode("utf-8")',
        ) from error


def check_tokenizer(tokenizer: Any) -> None:
    """ArgumentError for what is neither None nor can decode ids (as bytes can, in their way)."""
    decodes = callable(getattr(tokenizer, "decode", None)) and not isinstance(tokenizer, bytes | bytearray)
    if tokenizer is not None and not decodes:
        raise ArgumentError(
            "tokenizer", expected="a tokenizer as AutoTokenizer loads it, or None", got=f"a {type(tokenizer).__name__}"
        )


def _need_tokenizer(argument: str, tokenizer: Any) -> None:
    if tokenizer is None:
        raise PromptError(
            "tokenizer",
            expected=f"a tokenizer, since the {argument} is text",
            got=None,
            remedy=f"Pass tokenizer=, attach one, or give the {argument} as token ids",
        )


def _one_row(argument: str, ids: Tensor | np.ndarray[Any, Any]) -> list[int]:
    """Ids [n] or [1, n]; rows run together would be a text that nobody wrote."""
    whole = ids.dtype.kind in "iu" if isinstance(ids, np.ndarray) else ids.dtype in _WHOLE
    if ids.ndim not in (1, 2) or (ids.ndim == 2 and ids.shape[0] != 1) or not whole:
        raise PromptError(
            argument,
            expected=f"the token ids of one {argument}, [n] or [1, n]",
            got=f"{ids.dtype} of shape {tuple(ids.shape)}",
            remedy="Trace one prompt per call, or a batch by model.generate inside protoken.tracing",
        )
    return [int(token) for token in ids.reshape(-1).tolist()]


def _check_sequence(prompt: Any) -> None:
    """PromptError for what is no sequence of ids or turns, with where the ids are in what came instead."""
    several = "Trace one prompt per call, or a batch by model.generate inside protoken.tracing"
    if isinstance(prompt, Mapping):
        remedy = 'Give its ids: prompt["input_ids"]' if "input_ids" in prompt else "A conversation is a list of turns"
    elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        if not prompt or isinstance(prompt[0], int | np.integer | Mapping):
            return
        remedy = several
    else:
        remedy = ""
    raise PromptError(
        "prompt",
        expected='text, the token ids of one prompt, or turns like {"role": "user", "content": "..."}',
        got=f"a {type(prompt).__name__}" + (f" of {type(prompt[0]).__name__}" if remedy is several else ""),
        remedy=remedy,
    )


def _encode_conversation(tokenizer: Any, conversation: Any) -> list[int]:
    if not all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in conversation):
        raise PromptError(
            "prompt",
            expected='text, token ids, or turns like {"role": "user", "content": "..."}',
            got=f"a {type(conversation).__name__} of {type(conversation[0]).__name__}",
        )
    for turn in conversation:
        if isinstance(turn["content"], str):
            _check_text("prompt", turn["content"])
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            "prompt",
            expected="a tokenizer with a chat template, to render a conversation",
            got=f"{type(tokenizer).__name__} without one",
            remedy="Set tokenizer.chat_template, or pass the prompt as text with chat=False",
        )
    turns = [dict(turn) for turn in conversation]
    try:
        encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
    except (TemplateError, TypeError, ValueError) as error:
        # Templates refuse roles and orders that their model was not trained on, each in words of its own.
        raise PromptError("prompt", expected="turns that the tokenizer's chat template takes", got=error) from error
    return list(encoded["input_ids"])


def _not_empty(ids: list[int]) -> list[int]:
    if not ids:
        raise PromptError("prompt", expected="at least one token", got="an empty prompt")
    return ids


def check_window(model: PreTrainedModel, prompt_length: int, new_tokens: int) -> None:
    """Refuse what the model's window cannot hold, before any work is done.

    Raises:
        PromptError: prompt and new tokens are more than `max_position_embeddings`.
    """
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window and prompt_length + new_tokens > window:
        raise PromptError(
            "prompt",
            expected=f"prompt and new tokens within the model's window of {window}",
            got=f"{prompt_length} + {new_tokens} tokens",
            remedy="Shorten the prompt or lower max_new_tokens",
        )


def check_ids(model: PreTrainedModel, ids: Sequence[int], argument: str = "prompt") -> None:
    """Refuse ids outside the embedding table, which would be an index error deep inside the model.

    Raises:
        PromptError: an id is negative or beyond the vocabulary.
    """
    table: Any = base_of(model.get_input_embeddings())
    size = int(table.num_embeddings)
    bad = [token for token in ids if not 0 <= token < size]
    if bad:
        raise PromptError(
            argument,
            expected=f"token ids below the model's vocabulary size {size}",
            got=bad[0],
            remedy=f"Encode the {argument} with this model's own tokenizer",
        )


def tokens_of(tokenizer: Any, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> tuple[Token, ...]:
    """Each generated token with the text it adds; the texts joined are the response, whitespace and all.

    A character spread over several tokens belongs to the one that completes it. The prompt's end is decoded along, so
    that a leading space survives tokenizers that strip it at the start of a text.
    """
    if tokenizer is None:
        return tuple(Token(token, f"⟨{token}⟩") for token in new_ids)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    pending = list(prompt_ids[-_CONTEXT:])
    before = after = _decode(tokenizer, pending)
    tokens: list[Token] = []
    for token in new_ids:
        pending.append(token)
        after = _decode(tokenizer, pending)
        whole = not after.endswith("\N{REPLACEMENT CHARACTER}")
        tokens.append(Token(token, after[len(before) :] if whole else "", token in special))
        if whole:
            # Decoding from a recent clean boundary keeps this linear in the response's length.
            pending = pending[-_CONTEXT:]
            before = after = _decode(tokenizer, pending)
    if after != before:
        # The response was cut inside a character: what there is of it belongs to the last token.
        tokens[-1] = Token(tokens[-1].id, after[len(before) :], tokens[-1].special)
    return tuple(tokens)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def as_row(ids: Sequence[int], device: torch.device) -> Tensor:
    """Ids as a batch of one, [1, n]."""
    return torch.tensor([list(ids)], dtype=torch.long, device=device)
