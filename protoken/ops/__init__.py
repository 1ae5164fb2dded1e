"""The ops at the heart of the package: one file each with contract, validation and pure-torch reference.

client_scores.py, client_scores_lowrank.py, client_totals.py   updates against tokens or gradients: every trace
relevance_head.py, capture_append.py                           for callers who run a model by themselves: a trace goes
                                                               through the model's own head and its own hooks instead
gated_tail.py                                                  no public op: how a stream pulls one token back
banks.py, checks.py                                            what the kernels read, and what is checked before
library.py                                                     the same ops as torch.library operators
cpp.py, cuda.py                                                their native backends; Triton's are in kernels/
"""

from protoken.ops.banks import DenseBank, LowRankBank
from protoken.ops.capture_append import capture_append, capture_append_reference
from protoken.ops.client_scores import client_scores, client_scores_grouped, client_scores_reference
from protoken.ops.client_scores_lowrank import (
    client_scores_lowrank,
    client_scores_lowrank_grouped,
    client_scores_lowrank_reference,
)
from protoken.ops.client_totals import client_totals, client_totals_grouped, client_totals_reference
from protoken.ops.library import register
from protoken.ops.relevance_head import Head, relevance_head, relevance_head_reference

__all__ = [
    "DenseBank",
    "Head",
    "LowRankBank",
    "capture_append",
    "capture_append_reference",
    "client_scores",
    "client_scores_grouped",
    "client_scores_lowrank",
    "client_scores_lowrank_grouped",
    "client_scores_lowrank_reference",
    "client_scores_reference",
    "client_totals",
    "client_totals_grouped",
    "client_totals_reference",
    "relevance_head",
    "relevance_head_reference",
]

register()
