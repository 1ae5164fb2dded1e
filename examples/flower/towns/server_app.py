"""The server: FedAdam over the adapters. The one line that makes it traceable is `record`."""

from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam
from safetensors.torch import save_file

from protoken.integrations.flower import record

from .task import adapted_model, get_adapter

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FedAdam(eta=0.01, fraction_train=float(context.run_config["fraction-train"]), fraction_evaluate=0.0)
    out = Path(str(context.run_config["out"]))
    strategy = record(strategy, out / "ledger", model="towns")
    model = adapted_model()
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_adapter(model)),
        num_rounds=int(context.run_config["num-server-rounds"]),
    )
    adapter = {name: tensor.float() for name, tensor in result.arrays.to_torch_state_dict().items()}
    save_file(adapter, out / "adapter.safetensors")
