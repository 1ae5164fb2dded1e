"""What a trace is: numbers, texts and where they came from, whatever made them.

result.py   Trace
parts.py    what it is made of: tokens, clients, settings; spans.py, some of its words
checks.py   what must hold of a trace that is read from a file
export.py   JSON, files; frame.py, tables
"""

from protoken.results.result import ClientScore, Objective, Token, TokenScore, Trace, TraceInfo

__all__ = ["ClientScore", "Objective", "Token", "TokenScore", "Trace", "TraceInfo"]
