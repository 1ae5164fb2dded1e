"""What the leaf tap needs of a last block with a gated MLP, so that its pull-back can do without autograd.

Which models are made as ops/gated_tail.py says is not read off a list: a block that has the parts is watched, the
first token is pulled back both ways, and only if they agree do the others go the short way, with no graph recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from protoken.dispatch import native
from protoken.models.architectures import Architecture
from protoken.models.patching import hooks
from protoken.models.structure import decoder_of
from protoken.ops.gated_tail import GatedBlock, GatedValues

# Two fp32 ways to one gradient differ by the rounding of sums of a few thousand terms.
_ROUNDING = 1e-5
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class GatedTail:
    """The last block's second half, and what the newest token left there.

    Attributes:
        block: its weights.
        places: per traced layer 0 for the MLP-final one (d f / d b), 1 for the out-projection (d f / d a).
        modules: everything that this relies on, by role.
    """

    block: GatedBlock
    places: tuple[int, ...]
    modules: dict[str, nn.Module]
    launch: Callable[..., None]
    seen: dict[str, Tensor] = field(default_factory=dict)
    trusted: bool = False
    refuted: bool = False
    hooked: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, model: nn.Module, architecture: Architecture, layers: Sequence[str], backend: str = "auto"
    ) -> GatedTail | None:
        """None where a part is missing or of another kind, not fp32 on the CPU, or has somebody's hooks on it."""
        launch = native("launch_gated_tail") if backend in ("auto", "cpp") else None
        last = len(architecture.blocks) - 1
        final = architecture.layer_name(last, architecture.final_of(last))
        places = {final: 0, architecture.layer_name(last, architecture.out_projection): 1}
        modules = _modules(model, architecture)
        if launch is None or modules is None or any(name not in places for name in layers):
            return None
        names = ("gate", "up", "down", "norm", "final_norm", "head")
        weights = {name: getattr(modules[name], "weight", None) for name in names}
        epsilons = [getattr(modules[name], "variance_epsilon", None) for name in ("norm", "final_norm")]
        if not all(map(_is_plain, weights.values())) or not all(isinstance(e, float) for e in epsilons):
            return None
        gate, up, down, norm, final_norm = (weights[name].detach() for name in names[:-1])  # type: ignore[union-attr]
        if gate.dim() != 2 or norm.dim() != 1 or up.shape != gate.shape or down.shape != gate.T.shape:
            return None
        width = gate.shape[1:]
        if norm.shape != width or final_norm.shape != width or weights["head"].shape[1:] != width:  # type: ignore[union-attr]
            return None
        block = GatedBlock(gate, up, down, norm, epsilons[0], final_norm, epsilons[1])  # type: ignore[arg-type]
        return cls(block, tuple(places[name] for name in layers), modules, launch)

    @contextmanager
    def watched(self, counts: Callable[[], bool]) -> Iterator[None]:
        """Notice what a, z, u and b of each pass are that `counts`; call it when all other hooks are in place."""

        def before(role: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                if args and counts():
                    self.seen[role] = args[0]

            return hook

        def after(role: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
                if counts():
                    self.seen[role] = output

            return hook

        m = self.modules
        handles = [
            m["norm"].register_forward_pre_hook(before("entering")),
            m["gate"].register_forward_hook(after("gate")),
            m["up"].register_forward_hook(after("up")),
            m["final_norm"].register_forward_pre_hook(before("leaving")),
        ]
        with hooks(*handles):
            self.hooked = _hook_counts(m.values())
            try:
                yield
            finally:
                self.trusted = False
                self.seen.clear()

    def ready(self) -> bool:
        """Whether the pass that begins can do without a graph: what was seen to agree is as it was then."""
        now = _hook_counts(self.modules.values())
        if now != self.hooked:
            self.hooked, self.trusted, self.refuted = now, False, False
        if self.trusted and any(weight.data_ptr() != address for weight, address in self._weights()):
            # Other parameters were put in place; what is known here is of the old ones.
            self.trusted, self.refuted = False, True
        return self.trusted

    def _weights(self) -> Iterator[tuple[Tensor, int]]:
        """The modules' weights as they are now, and where those were that this knows."""
        for role in ("gate", "up", "down", "norm", "final_norm"):
            yield self.modules[role].weight, getattr(self.block, role).data_ptr()  # type: ignore[misc]

    def pull(self, upstream: Tensor) -> list[Tensor]:
        """d f / d y [1, O] of the traced layers from d f / d h [d], for the token whose pass was just seen."""
        values = GatedValues(*(self.seen[name].detach() for name in ("entering", "gate", "up", "leaving")))
        both = torch.empty(2, self.block.norm.numel())
        self.launch(both, self.block, values, upstream)
        return [both[place : place + 1] for place in self.places]

    def compare(self, upstream: Tensor, grads: Sequence[Tensor]) -> None:
        """Trust the short way from now on if it gives what autograd gave for this token; if not, never try again."""
        if self.refuted:
            return
        sizes, width, inner = [self.seen[n].numel() for n in self.seen], *self.block.down.shape
        if len(sizes) != 4 or sorted(sizes) != sorted([width, width, inner, inner]):
            return
        if any(x.dtype != torch.float32 or x.device.type != "cpu" for x in (*self.seen.values(), *grads)):
            return
        norms = [float(theirs.norm()) for theirs in grads]
        if not all(0 < norm < torch.inf for norm in norms):
            return  # A gradient of 0 (certainty, in fp32) tells nothing: the next token is compared, too.
        pairs = zip(self.pull(upstream), grads, norms, strict=True)
        self.trusted = all(float((a - b.reshape(1, -1)).norm()) <= _ROUNDING * norm for a, b, norm in pairs)
        self.refuted = not self.trusted


def _modules(model: nn.Module, architecture: Architecture) -> dict[str, nn.Module] | None:
    """The parts by role, if they are all there, of the plain kinds, and nobody's code runs around them."""
    block, decoder = architecture.blocks[-1], decoder_of(model)
    mlp = getattr(block, "mlp", None)
    projection = block.get_submodule(architecture.out_projection)
    found = {
        "model": model,
        "decoder": decoder,
        "block": block,
        "mlp": mlp,
        "gate": getattr(mlp, "gate_proj", None),
        "up": getattr(mlp, "up_proj", None),
        "down": getattr(mlp, "down_proj", None),
        "activation": getattr(mlp, "act_fn", None),
        "norm": getattr(block, "post_attention_layernorm", None),
        "final_norm": getattr(decoder, "norm", None),
        "projection": projection,
        "head": architecture.head,
    }
    modules = {role: module for role, module in found.items() if isinstance(module, nn.Module)}
    if len(modules) < len(found) or any("forward" in module.__dict__ for module in modules.values()):
        return None
    linear = all(type(modules[role]) is nn.Linear for role in ("gate", "up", "down", "projection", "head"))
    hooked = _has_any_global_hook() or any(_hook_counts(modules.values()))  # type: ignore[no-untyped-call]
    return modules if linear and not hooked else None


def _is_plain(weight: object) -> bool:
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.dtype == torch.float32  # type: ignore[attr-defined]
        and weight.device.type == "cpu"  # type: ignore[attr-defined]
        and weight.stride(-1) == 1  # type: ignore[attr-defined]
    )


def _hook_counts(modules: Iterable[nn.Module]) -> tuple[int, ...]:
    return tuple(sum(len(getattr(module, name)) for name in _HOOKS) for module in modules)
