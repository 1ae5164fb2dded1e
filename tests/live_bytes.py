"""How many bytes of tensors were alive at once: every storage that torch makes is counted until it is freed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Live:
    """Bytes alive now and at most, of storages made inside the `with`."""

    now: int = 0
    peak: int = 0
    known: dict[int, Any] = field(default_factory=dict)

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known or not storage.nbytes():
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self.known.pop(key, None)
            self.now -= size

        self.known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


class _Count(TorchDispatchMode):
    def __init__(self, live: Live) -> None:
        super().__init__()
        self.live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in before:
                self.live.see(leaf)
        return result


@contextmanager
def live_bytes() -> Iterator[Live]:
    """Count from here on; only what is made inside counts, also when it is freed later."""
    live = Live()
    with _Count(live):
        yield live
