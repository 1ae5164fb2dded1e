"""Who taught the federated model a town's password?

python trace.py OUT [TOWN]
"""

import sys
from pathlib import Path

from safetensors.torch import load_file
from towns.task import LAYERS, PASSWORDS, TOWNS, adapted_model, prompt, set_adapter, tokenizer

import protoken


def main(out: str, town: str = "ghent") -> None:
    model = adapted_model()
    set_adapter(model, load_file(Path(out) / "adapter.safetensors"))
    model.eval()
    protoken.attach(model, Path(out) / "ledger", tokenizer())
    # The last round alone says who moved the model last; all rounds say who taught it. By now the model is sure of its
    # answer, so the gradient here is close to nothing: what counts is the path from the untrained adapter to this one,
    # over every layer that was trained.
    trace = protoken.trace(
        model, prompt(town), rounds="all", method="aumann_shapley", layers=[f"*{name}" for name in LAYERS],
        do_sample=False, max_new_tokens=len(PASSWORDS[town].split()),
    )  # fmt: skip
    trace.show()
    trace.to_html(Path(out) / "trace.html")
    first = trace.clients[0]
    print(f"{town} is partition-{TOWNS.index(town)}; the trace names {first.client}")


if __name__ == "__main__":
    main(*sys.argv[1:])
