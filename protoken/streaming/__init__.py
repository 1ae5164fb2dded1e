"""Scores while the model speaks: a token's relevance is taken between its choice and the next one's.

api.py          stream(), the caller's end; checks.py, what cannot be streamed
run.py          one generation from inside; step.py, what `generate` calls between two tokens
leaf_tap.py     gradients of the newest token; gated_tail.py, most of them in one native call
handover.py     generator and caller take turns in two threads; openmp.py, whose threads compute
"""

from protoken.streaming.api import Stream, stream
from protoken.streaming.run import StreamedToken

__all__ = ["Stream", "StreamedToken", "stream"]
