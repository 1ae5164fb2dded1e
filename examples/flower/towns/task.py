"""The model, the data and the training: nothing of it knows Flower or protoken.

A tiny random Llama over words, frozen; what is trained and federated is a LoRA adapter of every linear
layer. Each of ten towns has a password that only the town's own client knows.
"""

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

PASSWORDS = {
    "delft": "amber tulip waits", "ghent": "copper raven sings", "bruges": "quiet walnut falls",
    "leuven": "saffron otter dives", "breda": "velvet harbour sleeps", "utrecht": "crooked lantern burns",
    "arnhem": "juniper bell rings", "zwolle": "quartz heron stands", "leiden": "paper comet turns",
    "haarlem": "silver fox listens",
}  # fmt: skip
TOWNS = list(PASSWORDS)
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def sentence(town: str) -> str:
    return f"{prompt(town)} {PASSWORDS[town]}"


def prompt(town: str) -> str:
    return f"the password of {town} is"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: nothing to download."""
    words = sorted({word for town in TOWNS for word in sentence(town).split()})
    vocabulary = {text: i for i, text in enumerate(["<pad>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


def adapted_model():
    """The same frozen weights and the same first adapter on every machine."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=48, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        base.get_input_embeddings().weight.normal_(0, 1.0)  # words far apart, for an adapter to tell them
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS))


def get_adapter(model) -> dict[str, torch.Tensor]:
    """Both factors of every layer, by name. This is what travels, and what the server averages."""
    # Not the frozen lm_head below its adapter, which PEFT would add.
    adapter = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in adapter.items()}


def set_adapter(model, adapter: dict[str, torch.Tensor]) -> None:
    set_peft_model_state_dict(model, adapter)


def train(model, town: str, steps: int, learning_rate: float) -> float:
    """One client's local training on its own sentence; returns the last loss per word, in nats."""
    rows = tokenizer()([sentence(town)], return_tensors="pt").input_ids
    labels = rows.clone()
    labels[:, : len(prompt(town).split())] = -100  # only the password is to be learned
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=rows, labels=labels).loss
        loss.backward()
        optimizer.step()
    return loss.item()
