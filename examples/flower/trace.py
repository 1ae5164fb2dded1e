"""Who taught the federated model a town's password?

python trace.py OUT [TOWN]
"""

import sys
from pathlib import Path

from safetensors.torch import load_file
from towns.task import PASSWORDS, TOWNS, adapted_model, prompt, set_adapter, tokenizer

import protoken


def main(out: str, town: str = "ghent") -> None:
    model = adapted_model()
    set_adapter(model, load_file(Path(out) / "adapter.safetensors"))
    model.eval()
    protoken.attach(model, Path(out) / "ledger", tokenizer())
    # The last round alone says who moved the model last; all rounds say who taught it.
    length = len(PASSWORDS[town].split())
    trace = protoken.trace(model, prompt(town), rounds="all", blocks=2, do_sample=False, max_new_tokens=length)
    trace.show()
    trace.to_html(Path(out) / "trace.html")
    first = trace.clients[0]
    print(f"{town} is partition-{TOWNS.index(town)}; the trace names {first.client}")


if __name__ == "__main__":
    main(*sys.argv[1:])
