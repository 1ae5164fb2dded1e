"""Your own federation: the global model before and after a round, and the clients' checkpoints of that round.

    python examples/own_federation.py BEFORE AFTER "a prompt" clinic-a=DIR clinic-b=DIR ...

Every folder is a Hugging Face checkpoint (safetensors). Clients count alike here; pass your aggregation weights where
the server used others.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import protoken


def main(before: str, after: str, prompt: str, *clients: str) -> None:
    model, tokenizer = load(after), AutoTokenizer.from_pretrained(after)

    # The record: what the clients were sent, what came out, and each client's own checkpoint and weight.
    names = [n for n, _ in model.named_parameters() if n.endswith(("o_proj.weight", "down_proj.weight"))]
    folders = dict(client.split("=", 1) for client in clients)
    ledger = protoken.Ledger.create("federation.ledger", model=after)
    ledger.commit_round(
        pick(load(before), names),
        pick(model, names),
        [protoken.ClientUpdate(c, 1 / len(folders), state=pick(load(f), names)) for c, f in folders.items()],
    )

    # The question: who taught the model what it says now?
    protoken.attach(model, ledger, tokenizer)
    trace = protoken.trace(model, prompt, max_new_tokens=48)
    trace.show()
    trace.to_html("trace.html")


def load(folder: str) -> AutoModelForCausalLM:
    # Safetensors only, and no code of the folder's own: a checkpoint from a client could run anything.
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", use_safetensors=True, trust_remote_code=False)


def pick(model: AutoModelForCausalLM, names: list[str]) -> dict:
    return {name: model.get_parameter(name).detach() for name in names}


if __name__ == "__main__":
    main(*sys.argv[1:])
