"""The models of the experiments: SmolLM2-135M, and small Gemma 3, Llama and Qwen2 models that the machine can train.

The small ones are trained here: a byte-level BPE of the corpora's text, then a central pretraining on a mix of all
domains, so that there is a base model to federate. Tokenizer and weights are kept in a folder of the cache that is
named by everything they depend on, and read from there next time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from protoken.errors import ArgumentError
from protoken.evaluation.base_model import BaseModel, load_base, weights_digest
from protoken.evaluation.corpora import ChatRow
from protoken.evaluation.training import LocalSettings, LocalTrainer, encode_rows, trainable_parameters

SMOLLM2 = "smollm2-135m"
_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<assistant>{{ m['content'] }}<eos>"
    "{% else %}<user>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_SPECIAL = ("<pad>", "<eos>", "<user>", "<assistant>")


@dataclass(frozen=True)
class Shape:
    """A small model of a real family, and how it is pretrained."""

    family: str
    blocks: int = 4
    width: int = 128
    inner: int = 352
    vocabulary: int = 2048
    own: Mapping[str, Any] = field(default_factory=dict)
    pretraining: LocalSettings = field(
        default_factory=lambda: LocalSettings(epochs=2, batch_size=16, learning_rate=2e-3, warmup_steps=50)
    )
    rows: int = 1000

    def config(self) -> Any:
        """The transformers configuration."""
        heads = self.width // 32
        settings = {
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": heads,
            "num_key_value_heads": max(heads // 2, 1),
            "head_dim": 32,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
        }
        return AutoConfig.for_model(self.family, **{**settings, **self.own})


def _gemma3(blocks: int) -> dict[str, Any]:
    kinds = ["sliding_attention" if (n + 1) % 2 else "full_attention" for n in range(blocks)]
    return {"sliding_window": 64, "query_pre_attn_scalar": 32, "layer_types": kinds}


SHAPES: dict[str, Shape] = {
    "gemma3": Shape("gemma3_text", own=_gemma3(4)),
    "llama": Shape("llama"),
    "qwen2": Shape("qwen2", own={"tie_word_embeddings": True}),
}
_QUICK = LocalSettings(epochs=3, batch_size=16, learning_rate=2e-3, warmup_steps=50)
QUICK = Shape("llama", blocks=3, width=64, inner=176, vocabulary=768, rows=250, pretraining=_QUICK)
"""For `--quick`: learns the trigger within a minute on one core, and little else."""
QUICK_MODEL = "quick"

MODELS = (SMOLLM2, *SHAPES)


def check_model(name: str) -> str:
    """The name of a model of the zoo.

    Raises:
        ArgumentError: there is none of that name.
    """
    if name not in (*MODELS, QUICK_MODEL):
        raise ArgumentError("models", expected=f"one of {', '.join(MODELS)}", got=repr(name))
    return name


def load_model(
    name: str,
    corpora: Mapping[str, Sequence[ChatRow]],
    cache: Path,
    *,
    seed: int = 0,
    step: Callable[[int, int, float], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> BaseModel:
    """A base model, in float32 on the CPU and in evaluation mode; the small ones are pretrained if they are not there.

    Args:
        corpora: rows for pretraining by domain, of which every domain gives the same number.
        cache: below it `base-<name>-<fingerprint>/`.
        step: called after every step of pretraining with (done, total, loss).

    Raises:
        ArgumentError: an unknown name.
        ModelError: SmolLM2-135M cannot be found; see base_model.load_base.
    """
    if check_model(name) == SMOLLM2:
        return load_base(say=say)
    shape = QUICK if name == QUICK_MODEL else SHAPES[name]
    rows = mixed(corpora, shape.rows)
    folder = cache / f"base-{name}-{_fingerprint(shape, rows, seed)[:16]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pretraining-", dir=cache) as made:
            aside = Path(made) / "base"
            _pretrain(shape, rows, aside, seed, step)
            try:
                aside.rename(folder)
            except OSError:
                # Another process was first: equal by its fingerprint.
                if not folder.is_dir():
                    raise
                shutil.rmtree(aside)
    found = load_base(folder)
    found.model.config.name_or_path = name
    return BaseModel(found.model, found.tokenizer, name, found.digest)


def mixed(corpora: Mapping[str, Sequence[ChatRow]], each: int) -> list[ChatRow]:
    """At most `each` rows of every domain, in the domains' order; training shuffles them."""
    return [row for domain in sorted(corpora) for row in corpora[domain][:each]]


def make_tokenizer(rows: Sequence[ChatRow], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the rows' text with a chat template of two markers; every text can be encoded."""
    backend = Tokenizer(tokenizer_models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (message["content"] for row in rows for message in row.messages)
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = _TEMPLATE
    tokenizer.padding_side = "left"
    return tokenizer


def _pretrain(
    shape: Shape,
    rows: Sequence[ChatRow],
    folder: Path,
    seed: int,
    step: Callable[[int, int, float], None] | None,
) -> None:
    tokenizer = make_tokenizer(rows, shape.vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(shape.config()).float().eval()
    examples = encode_rows(tokenizer, rows, max_tokens=192, drop_long=True)
    trainer = LocalTrainer(model, trainable_parameters(model, None))
    losses = trainer.train(examples, shape.pretraining, seed=seed, step=step)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "shape": asdict(shape),
        "rows": len(examples),
        "numbers": sum(parameter.numel() for parameter in model.parameters()),
        "losses": [losses[0], sum(losses[-20:]) / len(losses[-20:])],
        "digest": weights_digest(model),
    }
    (folder / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _fingerprint(shape: Shape, rows: Sequence[ChatRow], seed: int) -> str:
    digest = hashlib.sha256(json.dumps([asdict(shape), seed], sort_keys=True).encode())
    for row in rows:
        digest.update(json.dumps([dict(message) for message in row.messages], sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
