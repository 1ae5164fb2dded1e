"""The ops at the heart of the package: one file each with contract, validation and pure-torch reference."""

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
