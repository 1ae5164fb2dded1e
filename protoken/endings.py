"""Where each row of a `generate` call ended, as its stopping criteria said while it ran.

A row that has ended is padded while its neighbours go on. A stop token can be read off the ids; a stop string or a
criterion of the caller's cannot, and a padding token may have been chosen as well. So the criteria's own word is kept:
the list that `generate` makes of them for one call is replaced by one that notes what it answers. The caller's criteria
and their list stay as they are, and none of them is asked twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList

from protoken.models.patching import current_method, replaced_method

_MAKES_THE_LIST = "_get_stopping_criteria"


@contextmanager
def watched(model: nn.Module, *, beams: bool) -> Iterator[Endings]:
    """Note where the rows of a `generate` call of this thread end, which is made inside the `with`.

    Args:
        model: it, or a module inside it (of a wrapper, as PEFT has one), generates.
        beams: the call is a beam search, whose criteria see candidates instead of rows.
    """
    endings = Endings(beams)
    with ExitStack() as stack:
        for module in model.modules():
            if hasattr(type(module), _MAKES_THE_LIST):
                own = partial(endings.watching, current_method(module, _MAKES_THE_LIST))
                stack.enter_context(replaced_method(module, _MAKES_THE_LIST, own))
        yield endings


class Endings:
    """What the criteria of one call said. R rows come back, C candidates of a beam search are judged at each step.

    Attributes:
        seen: the rows [R, n] that were judged last.
        ends: [R], the length at which each row was first said to be done; 0: not yet.
        finished: of a beam search, the candidates [m, n] that were done at each step.
    """

    def __init__(self, beams: bool) -> None:
        self.beams = beams
        self.begun = False
        self.seen: Tensor | None = None
        self.ends: Tensor | None = None
        self.finished: list[Tensor] = []

    def watching(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The list that `generate` makes, watched. Later ones are of calls inside the call: a model that drafts."""
        criteria = own(*args, **kwargs)
        if self.begun:
            return criteria
        self.begun = True
        return _Watched(criteria, self.note)

    def note(self, ids: Tensor, done: Tensor) -> None:
        """Of the rows [R, n] or candidates [C, n] so far, those with done [R] or [C] end here."""
        # For one row transformers also takes [1, 1], as its own docstring has it.
        done = done.reshape(len(ids), -1).any(1)
        if self.beams:
            self.finished.append(ids[done])
            return
        # On the device throughout: nobody waits for it between two tokens.
        before = torch.zeros(len(ids), dtype=torch.long, device=ids.device) if self.ends is None else self.ends
        self.ends = torch.where((before == 0) & done, ids.shape[1], before)
        self.seen = ids

    def of(self, sequences: Tensor) -> list[int]:
        """The length, prompt included, at which each of the returned rows [R, S] ended.

        S where it cannot be known: a decoding loop of somebody else's that asks no criteria, or returns other rows than
        they were asked about. All that came back is then the answer, since a padding token cannot be told from padding.
        """
        ends = self._of_candidates(sequences) if self.beams else self._of_rows(sequences)
        return torch.where(ends == 0, sequences.shape[1], ends.clamp(max=sequences.shape[1])).tolist()

    def _of_rows(self, sequences: Tensor) -> Tensor:
        unknown = torch.zeros(len(sequences), dtype=torch.long, device=sequences.device)
        if self.ends is None or self.seen is None or len(self.seen) != len(sequences):
            return unknown
        # With its stop check deferred, transformers asks once more about a token that it throws away.
        common = min(self.seen.shape[1], sequences.shape[1])
        same = torch.equal(self.seen[:, :common].to(sequences), sequences[:, :common])
        return self.ends.to(sequences.device) if same else unknown

    def _of_candidates(self, sequences: Tensor) -> Tensor:
        """A row is a candidate that was done, and then filled up; its place among them says nothing."""
        ends = torch.zeros(len(sequences), dtype=torch.long, device=sequences.device)
        for candidates in self.finished:
            length = candidates.shape[1]
            if length <= sequences.shape[1]:
                same = (sequences[:, None, :length] == candidates.to(sequences)[None]).all(-1).any(-1)
                ends = torch.where((ends == 0) & same, length, ends)
        return ends


class _Watched(StoppingCriteriaList):  # type: ignore[misc]
    """The same criteria in the same order, with a witness to what they answer."""

    def __init__(self, criteria: Any, note: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__(criteria)
        self.note = note

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        self.note(input_ids, done)
        return done
