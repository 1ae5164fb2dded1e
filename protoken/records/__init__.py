"""From a client to its own records: which of them would have been moved by the response?

probe.py    at the server, and at the client; text.py, a record as the model reads it
scores.py   what comes back
"""

from protoken.records.probe import RecordProbe, record_probe
from protoken.records.scores import RecordScores

__all__ = ["RecordProbe", "RecordScores", "record_probe"]
