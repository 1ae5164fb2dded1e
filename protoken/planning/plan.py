"""From the caller's choices to a plan: which layers, by which way, at which granularity, and why.

    way       exact for                                     gives per token   work, in passes through the traced blocks
    local     the last block's layers past its attention    yes               none: T rows through the rest of one block
    forward   any layers                                    yes               1 + (K + 1) tangents; by layer L (K + 1)
    reverse   any layers                                    totals            2: one forward and one backward pass
                                                            yes               1 + T backward passes, by layer as well

K clients (and the round's change, which rides along), T new tokens, L layers below the last out-projection. "auto"
takes the local way where it is exact; for totals the reverse one; else the cheaper of forward and reverse, which is
settled by `cost.cheaper` when T is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from protoken.errors import ArgumentError
from protoken.methods.replayed import REPLAYED, Settings
from protoken.models.architectures import Architecture
from protoken.planning.options import Method, Options
from protoken.ways.objective import Objective


@dataclass(frozen=True)
class Plan:
    """Every choice of one trace. `way` is "auto" only where T decides between forward and reverse; see `settled`.

    Attributes:
        layers: full names, in the model's order.
        first_block: number of the first block that must be run again.
        granularity: "sequence", "token", "layer" or "position".
        reason: why this way, in words.
        limit: ceiling of the bytes that attribution may take, or None.
    """

    layers: tuple[str, ...]
    first_block: int
    way: str
    granularity: str
    reason: str
    objective: Objective
    method: Method
    backend: str
    blocks: int | None = 1
    patterns: tuple[str, ...] | None = None
    settings: Settings = field(default_factory=Settings)
    limit: int | None = None

    @property
    def replays(self) -> bool:
        """Whether the finished response is replayed at other weights, instead of scored from what was captured."""
        return self.method in REPLAYED

    @property
    def needs_sequence(self) -> bool:
        """Whether hidden states of all positions must be recorded, not only of the deciding ones."""
        return self.way in ("auto", "reverse", "forward") and not self.replays

    def settled(self, way: str, reason: str) -> Plan:
        """The plan with what only the finished response could decide."""
        return replace(self, way=way, reason=reason)


def make_plan(architecture: Architecture, options: Options, *, seed: int = 0) -> Plan:
    """Resolve the choices; `blocks` is 1 for the first-order methods, and all that is recorded for others.

    Raises:
        ArgumentError: a combination that is not exact, or not offered; the message says what is.
        LayerError: a layer pattern that names nothing.
    """
    if options.method in REPLAYED:
        return _replay_plan(architecture, options, Settings(nodes=options.nodes, pairs=options.pairs, seed=seed))
    names = architecture.traced_layers(1 if options.blocks is None else options.blocks, options.layers)
    if options.method == "paper":
        way, granularity, reason = _published(options)
    else:
        way, granularity, reason = _first_order(architecture, names, options)
    return Plan(
        layers=names,
        first_block=min(architecture.block_of(name) for name in names),
        way=way,
        granularity=granularity,
        reason=reason,
        objective=options.resolved_objective,
        method=options.method,
        backend=options.backend,
        limit=options.limit,
    )


def local_layers(architecture: Architecture) -> set[str]:
    """Layers whose output reaches no other position: the last block's out-projection, all outside attention, the head.

    A tied head is the embeddings as well; both are traced then, and the embeddings are not local.
    """
    last = len(architecture.blocks) - 1
    attention = architecture.out_projection.split(".")[0] + "."
    inside = {
        architecture.layer_name(last, name)
        for name in architecture.linear_layers(last)
        if name == architecture.out_projection or not name.startswith(attention)
    }
    return inside | ({architecture.head_name} - {""})


def _first_order(architecture: Architecture, names: tuple[str, ...], options: Options) -> tuple[str, str, str]:
    """Way, granularity and reason of method "protoken"."""
    local = local_layers(architecture)
    near, way, granularity = set(names) <= local, options.way, options.granularity
    if way == "local" and not near:
        raise ArgumentError(
            "way",
            expected=f'"forward" or "reverse" for these layers; "local" is exact only for {", ".join(sorted(local))}',
            got="local",
            remedy='Use blocks=1 with the default layers, way="forward" (per token) or way="reverse" (totals)',
        )
    if granularity == "auto":
        granularity = "sequence" if way == "reverse" else "token"
    if granularity == "position":
        _check_position(near, way)
        return "reverse", granularity, "positions are told apart by the reverse way alone"
    if way == "reverse":
        return "reverse", granularity, "asked for"
    if near:
        # Of such layers the forward way has nothing to push: both are one computation.
        return "local", granularity, "exact here: these layers' outputs reach no other position"
    if way == "forward":
        _check_forward(granularity)
        return "forward", granularity, "asked for"
    if granularity == "sequence":
        return "reverse", granularity, "totals of the response take one backward pass, whatever the number of clients"
    return "auto", granularity, ""


def _check_forward(granularity: str) -> None:
    if granularity == "sequence":
        raise ArgumentError(
            "granularity",
            expected='"token" or "layer" for way "forward", which scores every token in any case',
            got="sequence",
            remedy='Use way="reverse" for totals alone; trace.totals are those of a trace with tokens, too',
        )


def _check_position(near: bool, way: str) -> None:
    if way in ("local", "forward"):
        raise ArgumentError(
            "granularity",
            expected=f'"sequence", "token" or "layer" for way "{way}"',
            got="position",
            remedy="A tangent starts at all positions at once and the local way sees the deciding ones alone: "
            'use way="reverse" or "auto"',
        )
    if near:
        raise ArgumentError(
            "granularity",
            expected='"sequence", "token" or "layer" for layers whose output reaches no other position',
            got="position",
            remedy="Every token's score comes from the position that chose it there. Trace blocks=2 or more, or layers "
            "inside the attention",
        )


def _published(options: Options) -> tuple[str, str, str]:
    granularity = "token" if options.granularity == "auto" else options.granularity
    if granularity == "position":
        raise ArgumentError(
            "granularity", expected='"sequence", "token" or "layer" for method "paper"', got=options.granularity
        )
    _check_unlimited(options)
    return "paper", granularity, "the published algorithm: one pass over the context per token"


def _check_unlimited(options: Options) -> None:
    if options.limit is not None:
        raise ArgumentError(
            "memory_limit",
            expected=f'None for method "{options.method}", which cannot be cut into chunks',
            got=options.limit,
            remedy='Use method="protoken"',
        )


def _replay_plan(architecture: Architecture, options: Options, settings: Settings) -> Plan:
    """Of a method that replays the response; only the path integral offers ways and granularities."""
    path = options.method == "aumann_shapley"
    _check_offered("way", options.way, options, ("reverse", "forward") if path else ())
    _check_offered("granularity", options.granularity, options, ("sequence", "token") if path else ())
    _check_unlimited(options)
    if options.blocks is not None or options.layers is not None:
        # What they name is found again when the updates are read; a wrong name is refused here, before generating.
        blocks = len(architecture.blocks) if options.blocks is None else options.blocks
        architecture.traced_layers(blocks, options.layers)
    if path:
        per_token = _path_per_token(options)
        way, granularity = ("forward", "token") if per_token else ("reverse", "sequence")
    else:
        way, granularity, per_token = "replay", "token", False
    return Plan(
        layers=(),
        first_block=len(architecture.blocks) - 1,
        way=way,
        granularity=granularity,
        reason="the response is replayed at other weights",
        objective=options.resolved_objective,
        method=options.method,
        backend=options.backend,
        blocks=options.blocks,
        patterns=None if options.layers is None else tuple(options.layers),
        settings=replace(settings, per_token=per_token),
    )


def _path_per_token(options: Options) -> bool:
    """Whether the path integral scores every token (the forward way) or the whole response (the reverse way)."""
    per_token = options.way == "forward" or (options.way == "auto" and options.granularity == "token")
    if options.granularity != "auto" and per_token != (options.granularity == "token"):
        raise ArgumentError(
            "granularity",
            expected='"token" with way "forward", "sequence" with way "reverse"',
            got=f"{options.granularity} with {options.way}",
        )
    return per_token


def _check_offered(argument: str, value: str, options: Options, offered: tuple[str, ...]) -> None:
    if value not in ("auto", *offered):
        known = ", ".join(("auto", *offered))
        raise ArgumentError(argument, expected=f'one of {known} for method "{options.method}"', got=value)
