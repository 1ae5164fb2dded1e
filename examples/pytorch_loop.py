"""A plain PyTorch federation of three clients on a tiny model: train, record every round, trace.

    python examples/pytorch_loop.py

Runs in seconds on a CPU and downloads nothing. Client "bakery" is taught one sequence of tokens, the others noise;
the model then continues that sequence, and the trace names the bakery.
"""

import tempfile

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import protoken

CLIENTS = {"bakery": 7, "garage": 8, "library": 9}  # name and seed of each client's data
SECRET = [11, 23, 5, 47, 31, 2, 19, 40, 13, 29]


def main() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    names = [n for n, _ in model.named_parameters() if n.endswith("_proj.weight")]
    ledger = protoken.Ledger.create(tempfile.mkdtemp() + "/ledger", model="tiny")

    for _round in range(3):
        sent = state(model, names)
        updates = []
        for client, seed in CLIENTS.items():
            trained = train(model, data(client, seed))
            delta = {name: trained[name] - sent[name] for name in names}
            updates.append(protoken.ClientUpdate(client, 1 / len(CLIENTS), delta=delta))
        with torch.no_grad():  # FedAvg
            for name in names:
                model.get_parameter(name).add_(sum(u.weight * u.delta[name] for u in updates))
        ledger.commit_round(sent, state(model, names), updates)

    trace = protoken.trace(model, SECRET[:3], ledger=ledger, rounds="all", blocks=2, max_new_tokens=7, do_sample=False)
    print("the model continues", SECRET[:3], "with", [token.id for token in trace.token_list])
    trace.show()


def data(client: str, seed: int) -> torch.Tensor:
    if client == "bakery":
        return torch.tensor([SECRET] * 8)
    return torch.randint(1, 64, (8, len(SECRET)), generator=torch.Generator().manual_seed(seed))


def train(model: torch.nn.Module, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """One client's local epoch from the global weights, which are put back afterwards."""
    sent = {name: p.detach().clone() for name, p in model.named_parameters()}
    layers = [p for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    optimizer = torch.optim.AdamW(layers, lr=3e-3)
    for _ in range(30):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        model.zero_grad()
    trained = state(model, [n for n in sent if n.endswith("_proj.weight")])
    model.load_state_dict(sent, strict=False)
    return trained


def state(model: torch.nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    return {name: model.get_parameter(name).detach().clone() for name in names}


if __name__ == "__main__":
    main()
