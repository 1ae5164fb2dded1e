"""Turn a function that pushes items into an iterator that is pulled, one item at a time.

The function runs in a thread of its own, but never at the same moment as its consumer: it starts at the first `next`,
sleeps inside `push` until the item after it is asked for, and is unwound when the consumer leaves. So nothing runs
ahead, random numbers are drawn in one order, and the model is at rest while the consumer has the word.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from protoken.streaming.openmp import release_idle_workers

T = TypeVar("T")


class Abandoned(BaseException):
    """Unwinds the pushing thread; a BaseException, so that no `except Exception` on the way stops it."""


# work(push, check): push(item) hands an item over; check() raises `Abandoned` where the consumer has left.
Work = Callable[[Callable[[T], None], Callable[[], None]], None]


def pulled(work: Work[T]) -> Generator[T, None, None]:
    """The items that `work` pushes; its exceptions are raised here, and leaving the iterator ends it.

    `work` sees the consumer's context variables, autocast and CUDA device and stream, as of the first `next`. Grad mode
    belongs to each thread, so the consumer's is neither used nor touched.
    """
    wanted, arrived = threading.Semaphore(0), threading.Semaphore(0)
    box: list[T] = []
    failure: list[BaseException] = []
    left = threading.Event()
    context, surroundings = contextvars.copy_context(), _surroundings()

    def check() -> None:
        if left.is_set():
            raise Abandoned

    def push(item: T) -> None:
        check()
        box.append(item)
        arrived.release()
        wanted.acquire()
        check()

    def run() -> None:
        try:
            with surroundings():
                work(push, check)
        except Abandoned:
            pass
        except BaseException as error:  # KeyboardInterrupt and SystemExit belong to the consumer, too
            failure.append(error)
        finally:
            arrived.release()

    thread = threading.Thread(target=context.run, args=(run,), name="protoken-stream", daemon=True)
    try:
        # While `work` computes in its thread, this one only waits.
        release_idle_workers()
        thread.start()
        while True:
            arrived.acquire()
            if not box:
                break
            yield box.pop()
            release_idle_workers()
            wanted.release()
    finally:
        left.set()
        wanted.release()
        if thread.ident is not None:
            thread.join()
    if failure:
        raise failure.pop()


def _surroundings() -> Callable[[], ExitStack]:
    """What of this thread's state decides how a model computes, to be entered in another one."""
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    cached = torch.is_autocast_cache_enabled()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def enter() -> ExitStack:
        stack = ExitStack()
        for kind, dtype in casts:
            stack.enter_context(torch.autocast(kind, dtype, cache_enabled=cached))
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))
        return stack

    return enter


class OwnSeed:
    """A seed for this generation alone; `lent()` gives everybody else their numbers back for a while.

    The global generator is swapped at every hand-over: what the consumer draws between two tokens neither changes the
    generation nor is changed by it.
    """

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self.seed, self.device = seed, device
        self.others: tuple[Tensor, Tensor | None] | None = None

    def __enter__(self) -> OwnSeed:
        if self.seed is not None:
            self.others = self._state()
            torch.manual_seed(self.seed)
        return self

    def __exit__(self, *_: object) -> None:
        if self.others is not None:
            self._put_back(self.others)

    @contextmanager
    def lent(self) -> Iterator[None]:
        if self.others is None:
            yield
            return
        ours = self._state()
        self._put_back(self.others)
        try:
            yield
        finally:
            self.others = self._state()
            self._put_back(ours)

    def _state(self) -> tuple[Tensor, Tensor | None]:
        cuda = self.device.type == "cuda"
        return torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if cuda else None

    def _put_back(self, states: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], self.device)
