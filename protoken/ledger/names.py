"""Names that may stand in a ledger, so that none can leave its folder or fool a reader.

    client      [A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}   unique in the whole ledger, letter case ignored
    parameter   [A-Za-z0-9_][A-Za-z0-9_.-]{0,255}     the in-memory name, e.g. model.layers.3.mlp.down_proj.weight
    run         [A-Za-z0-9][A-Za-z0-9._-]{0,127}
    rule        [a-z0-9][a-z0-9._-]{0,63}             the server's, e.g. fedavg

All are ASCII, so a name has one Unicode form only; no file is ever named after a client or a parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from protoken.errors import ArgumentError

CLIENT_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}")
PARAMETER_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,255}")
RUN_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RULE_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def check_client(client: object) -> str:
    """Return the client id, or raise ArgumentError with the charset."""
    return _check("client", client, CLIENT_PATTERN, "Map your own ids to opaque ASCII ids, e.g. client-07.")


def check_parameter(parameter: object) -> str:
    """Return the parameter name, or raise ArgumentError with the charset."""
    return _check("parameter", parameter, PARAMETER_PATTERN, "Use the key of model.named_parameters().")


def check_run(run: object) -> str:
    """Return the run id, or raise ArgumentError with the charset."""
    return _check("run", run, RUN_PATTERN, "Leave it out to get a random one.")


def check_rule(rule: object) -> str:
    """Return the name of the server's rule, or raise ArgumentError with the charset."""
    return _check("rule", rule, RULE_PATTERN, "Use a short lower-case word such as fedavg.")


def fold(client: str) -> str:
    """The form under which two client ids count as the same one."""
    return client.lower()


def first_duplicate(clients: Iterable[str]) -> tuple[str, str] | None:
    """The first two ids that differ in nothing or in letter case only, or None."""
    seen: dict[str, str] = {}
    for client in clients:
        if fold(client) in seen:
            return seen[fold(client)], client
        seen[fold(client)] = client
    return None


def _check(argument: str, value: object, pattern: re.Pattern[str], remedy: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        shown = ascii(value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise ArgumentError(argument, expected=f"a string matching {pattern.pattern}", got=shown, remedy=remedy)
    return value
