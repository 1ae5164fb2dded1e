"""A town: trains the adapter on its own sentence."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from protoken.integrations.flower import identified

from .task import TOWNS, adapted_model, get_adapter, set_adapter, train

torch.set_num_threads(1)
app = ClientApp(mods=[identified()])


@app.train()
def train_town(message: Message, context: Context) -> Message:
    town = TOWNS[context.node_config["partition-id"] % len(TOWNS)]
    model = adapted_model()
    set_adapter(model, message.content["arrays"].to_torch_state_dict())
    loss = train(model, town, int(context.run_config["local-steps"]), float(context.run_config["learning-rate"]))
    metrics = MetricRecord({"train_loss": loss, "num-examples": 1})
    return Message(RecordDict({"arrays": ArrayRecord(get_adapter(model)), "metrics": metrics}), reply_to=message)
