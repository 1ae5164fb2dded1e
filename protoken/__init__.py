"""protoken: which client taught the federated language model what it just said?

>>> import protoken
>>> protoken.attach(model, "federation.ledger", tokenizer)
>>> trace = protoken.trace(model, "How is a fever treated?")
>>> trace.show()
"""

from protoken import confidence, verdict
from protoken.account import Account, account
from protoken.attachment import attach, detach
from protoken.counterfactual import Counterfactual
from protoken.estimate import Estimate, estimate
from protoken.history import History
from protoken.ledger import ClientUpdate, Ledger
from protoken.records import RecordProbe, RecordScores, record_probe
from protoken.results import Trace
from protoken.streaming import Stream, StreamedToken, stream
from protoken.trace import trace
from protoken.tracing import Tape, tracing
from protoken.versions import version_of

__version__ = version_of("protoken") or "0"

__all__ = [
    "Account",
    "ClientUpdate",
    "Counterfactual",
    "Estimate",
    "History",
    "Ledger",
    "RecordProbe",
    "RecordScores",
    "Stream",
    "StreamedToken",
    "Tape",
    "Trace",
    "account",
    "attach",
    "confidence",
    "detach",
    "estimate",
    "record_probe",
    "stream",
    "trace",
    "tracing",
    "verdict",
]
