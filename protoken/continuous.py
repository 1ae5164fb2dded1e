"""`generate_batch` inside `tracing`: prompts of all lengths packed into shared rows, each traced once it is finished.

What hooks see there is several requests in one row, on another thread, under another attention. So nothing is
recorded: every finished request is run once more by teacher forcing, and its trace depends on its own tokens alone.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any

from protoken.errors import GenerationError
from protoken.generation import Generated, teacher_forced
from protoken.models.layers import input_device
from protoken.models.patching import current_method, evaluation_mode, refuse_inference_mode
from protoken.results import Trace
from protoken.session import Session
from protoken.text import as_row
from protoken.ways.relevance import Response


class ContinuousBatches:
    """Stands in for a model's ways into continuous batching for the length of a `with`.

    Attributes:
        calls: where the traces of each call are put, in the order of the returned requests.
    """

    def __init__(self, session: Session, calls: list[list[Trace]]) -> None:
        self.session, self.calls = session, calls
        self.own: dict[str, Callable[..., Any]] = {}
        self.inside = False

    def methods(self) -> dict[str, Callable[..., Any]]:
        """What to put in the place of the model's own methods."""
        model: Any = self.session.model
        names = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
        self.own = {name: current_method(model, name) for name in names if hasattr(model, name)}
        return {name: self.generate_batch if name == "generate_batch" else self._manager(name) for name in self.own}

    def generate_batch(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate_batch`, with a trace of every finished request on the tape.

        Raises:
            GenerationError: the manager is to stay behind, or a request failed (after its call).
        """
        model = self.session.model
        refuse_inference_mode(model)
        if kwargs.get("persistent_manager"):
            raise _refusal("a manager that stays behind, with the model's attention replaced")
        self.session.look_again()
        began = time.perf_counter()
        with evaluation_mode(model):
            self.inside = True
            try:
                results = self.own["generate_batch"](inputs, *args, **kwargs)
            finally:
                self.inside = False
            seconds = time.perf_counter() - began
            # By name, also what came by position after the prompts.
            names = list(inspect.signature(self.own["generate_batch"]).parameters)[1:]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            self.calls.append([self._trace(one, seconds, given) for one in results.values() if one.error is None])
        return results

    def _trace(self, result: Any, seconds: float, given: Mapping[str, Any]) -> Trace:
        session = self.session
        ids = as_row([*result.prompt_ids, *result.generated_tokens], input_device(session.model))
        response = Response(ids, len(result.prompt_ids))
        session.check_memory(response.prompt_length, response.new_tokens)
        capture = teacher_forced(
            session.model, session.own.architecture, response, session.plan.first_block, session.plan.needs_sequence
        )
        return session.trace(Generated(response, capture), seconds, given)

    def _manager(self, name: str) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return self.own[name](*args, **kwargs)
            raise _refusal(f"{name}, whose requests come and go after the call")

        return method


def _refusal(got: str) -> GenerationError:
    return GenerationError(
        "generate_batch",
        expected="continuous batching that ends with its call",
        got=got,
        remedy="Use model.generate_batch(...) without persistent_manager inside protoken.tracing",
    )
