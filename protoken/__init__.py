"""protoken: which client taught the federated language model what it just said?

>>> import protoken
>>> protoken.attach(model, "federation.ledger", tokenizer)
>>> trace = protoken.trace(model, "How is a fever treated?")
>>> trace.show()
"""

from . import confidence, verdict
from .account import Account, account
from .attachment import attach, detach
from .counterfactual import Counterfactual
from .estimate import Estimate, estimate
from .history import History
from .ledger import ClientUpdate, Ledger
from .records import RecordProbe, RecordScores, record_probe
from .results import Trace
from .streaming import Stream, StreamedToken, stream
from .trace import trace
from .tracing import Tape, tracing
from .versions import version_of

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
