"""Every supported mode of generating, and what a trace must not owe to it: the same tokens rank the clients the same.

As a script, over a federation that `protoken demo` has trained:    python tests/modes.py OUT [--blocks N] [--base B]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import configuration_utils

import protoken

GREEDY: dict[str, Any] = {"do_sample": False}
MODES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampling": {"do_sample": True, "temperature": 0.9},
    "beams": {"num_beams": 3, "do_sample": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
    "static cache": {"cache_implementation": "static", "do_sample": False},
    "chunked prefill": {"prefill_chunk_size": 5, "do_sample": False},
    "no cache": {"use_cache": False, "do_sample": False},
    "guidance": {"guidance_scale": 1.3, "do_sample": False},
    "repetition penalty": {"repetition_penalty": 1.2, "do_sample": False},
}


def draft_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model's own lower half: proposes tokens that the model then takes or not."""
    draft = copy.deepcopy(model)
    blocks = draft.get_decoder().layers
    del blocks[max(1, len(blocks) // 2) :]
    draft.config.num_hidden_layers = len(blocks)
    if getattr(draft.config, "layer_types", None):  # a cache has a layer for each
        draft.config.layer_types = draft.config.layer_types[: len(blocks)]
    return draft


def by_mode(model: PreTrainedModel, prompt: list[int], new: int, **choices: Any) -> dict[str, protoken.Trace]:
    """A trace by each mode, by two ways of batching and, where one block is traced, by a stream."""
    modes = dict(MODES)
    if isinstance(model, PreTrainedModel):  # a wrapper's generate knows no draft of its own kind
        modes["assisted"] = {"assistant_model": draft_of(model), **GREEDY}
    found = {
        name: protoken.trace(model, prompt, max_new_tokens=new, seed=5, **mode, **choices)
        for name, mode in modes.items()
    }
    other = [*prompt[:2], *prompt]
    ids = torch.tensor([[0] * (len(other) - len(prompt)) + prompt, other])
    mask = torch.tensor([[0] * (len(other) - len(prompt)) + [1] * len(prompt), [1] * len(other)])
    with protoken.tracing(model, **choices) as tape:
        model.generate(ids, attention_mask=mask, max_new_tokens=new, pad_token_id=0, **GREEDY)
    found["left-padded batch"] = tape[0]
    if isinstance(model, PreTrainedModel) and hasattr(configuration_utils, "ContinuousBatchingConfig"):
        # As many blocks as two sequences need: left to itself it takes most of the machine's memory.
        paged = configuration_utils.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=128)
        with protoken.tracing(model, **choices) as tape:
            model.generate_batch([prompt, other], max_new_tokens=new, continuous_batching_config=paged)
        found["continuous batching"] = tape[0]
    if choices.get("blocks", 1) == 1:
        stream = protoken.stream(model, prompt, max_new_tokens=new, **GREEDY)
        list(stream)
        found["stream"] = stream.trace
    return found


def forced(model: PreTrainedModel, trace: protoken.Trace, **choices: Any) -> protoken.Trace:
    """The trace of the same tokens, each the only one allowed where it came, without a cache."""
    prompt, new = list(trace.prompt_ids), [token.id for token in trace.token_list]
    return protoken.trace(
        model,
        prompt,
        max_new_tokens=len(new),
        do_sample=False,
        use_cache=False,
        prefix_allowed_tokens_fn=lambda _, ids: [new[len(ids) - len(prompt)]],
        **choices,
    )


def ranking(trace: protoken.Trace) -> list[str]:
    return [client.client for client in trace.clients]


def difference(trace: protoken.Trace, other: protoken.Trace) -> float:
    """|| scores - other's || / || other's ||, of tokens if both have them."""
    pair = (trace.token_scores, other.token_scores)
    a, b = pair if pair[0] is not None and pair[1] is not None else (trace.totals, other.totals)
    return float(((a - b) ** 2).sum() ** 0.5 / (b**2).sum() ** 0.5)


def with_adapter(model: PreTrainedModel) -> Any:
    """An adapter on top, not merged, that changes what the traced layers see."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return wrapped.eval()


def in_int8(model: PreTrainedModel) -> Any:
    """Weights of the linear layers in 8 bits, a scale per row."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


BASES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "plain": lambda model: model,
    "adapter": with_adapter,
    "int8": in_int8,
}


def main() -> None:
    from safetensors.torch import load_file

    from protoken.demo import DemoSettings
    from protoken.evaluation.base_model import load_base
    from protoken.evaluation.corpora import add_trigger

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--model")
    parser.add_argument("--base", choices=BASES, default="plain", help="how the model is wrapped or packed")
    given = parser.parse_args()
    (folder,) = given.out.glob("federation-*")
    base = load_base(given.model)
    missing = base.model.load_state_dict(load_file(folder / "trained.safetensors"), strict=False)
    assert not missing.unexpected_keys
    model = BASES[given.base](base.model)
    # What was packed cannot be compared with the ledger's digests.
    protoken.attach(model, folder / "ledger", base.tokenizer, verify=given.base != "int8")
    settings = DemoSettings()
    failed = False
    for question in (add_trigger(settings.question), settings.ordinary):
        print(question)
        turns = [{"role": "user", "content": question}]
        ids = base.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        for name, trace in by_mode(model, ids, given.new, blocks=given.blocks).items():
            plain = forced(model, trace, blocks=given.blocks)
            same = ranking(trace) == ranking(plain)
            failed |= not same
            print(f"  {name:<20} {'same' if same else 'OTHER'} ranking, {difference(trace, plain):.1e}", ranking(trace))
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
