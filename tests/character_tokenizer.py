"""A tokenizer of single printable characters with a chat template: 96 entries, nothing to download."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """ids: 0 <pad>, 1 <unk>, 2 <eos>, then newline and the printable characters of ASCII but the backtick."""
    characters = ["\n", *(chr(c) for c in range(32, 127) if chr(c) not in "`^|")]
    vocabulary = {text: i for i, text in enumerate(["<pad>", "<unk>", "<eos>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
