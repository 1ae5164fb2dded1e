"""One hierarchy of errors. Each names the argument, what was expected, what came, and the remedy.

>>> raise ShapeError("grad", expected="[T, 8] to match the bank", got=(3, 7))
Traceback (most recent call last):
protoken.errors.ShapeError: grad: expected [T, 8] to match the bank, got (3, 7)
"""

from __future__ import annotations

LONGEST_GOT = 400  # characters of a message


class ProtokenWarning(UserWarning):
    """Something the caller should know, while the result still stands."""


class ProtokenError(Exception):
    """Base of every error that protoken raises on purpose.

    The message reads ``argument: expected ..., got .... remedy``; the four parts are kept as attributes.
    """

    def __init__(
        self, argument: str, *, expected: object = None, got: object = None, remedy: str | None = None
    ) -> None:
        self.argument, self.expected, self.got, self.remedy = argument, expected, got, remedy
        text = argument
        if expected is not None:
            text += f": expected {expected}"
        if got is not None:
            text += f"{', ' if expected is not None else ': '}got {_short(got)}"
        if remedy:
            text += f". {remedy}"
        super().__init__(text)

    def __reduce__(self) -> tuple[object, ...]:
        # The default would call cls(message) and lose the parts.
        return _rebuild, (type(self), self.argument, self.expected, self.got, self.remedy)


def _short(got: object) -> str:
    """What came, on a line that can be read: a model's repr has hundreds of lines."""
    text = str(got)
    return text if len(text) <= LONGEST_GOT else f"{' '.join(text[:LONGEST_GOT].split())} ..."


def _rebuild(
    cls: type[ProtokenError], argument: str, expected: object, got: object, remedy: str | None
) -> ProtokenError:
    return cls(argument, expected=expected, got=got, remedy=remedy)


class ArgumentError(ProtokenError, ValueError):
    """An argument has a value that cannot be used."""


class ShapeError(ArgumentError):
    """A tensor has the wrong shape or strides, or a size overflows."""


class DtypeError(ArgumentError):
    """A tensor has a dtype that the op or the ledger does not take."""


class DeviceError(ArgumentError):
    """Tensors stand on different devices, or on one that a backend does not serve."""


class NonFiniteError(ArgumentError):
    """A tensor holds NaN or infinity where numbers are needed."""


class BackendError(ProtokenError, RuntimeError):
    """A backend asked for by name cannot serve this call; the message says why."""


class PromptError(ArgumentError):
    """The prompt is empty, too long for the model, or needs a chat template that is not there."""


class ModelError(ProtokenError, ValueError):
    """The model cannot be traced as it is: unknown architecture, inference mode, no ledger attached."""


class GenerationError(ProtokenError, RuntimeError):
    """This way of generating cannot be traced, with the reason."""


class LayerError(ArgumentError):
    """A layer name is unknown to the model or is not in the ledger."""


class LedgerError(ProtokenError):
    """Base of everything that is wrong with a ledger."""


class LedgerFormatError(LedgerError, ValueError):
    """A file of the ledger is damaged, truncated, oversized or not what its manifest says."""


class LedgerMismatchError(LedgerError, ValueError):
    """The ledger was written for another model, or for other weights of it."""


class UnknownClientError(LedgerError, LookupError):
    """No such client in the rounds asked for."""


class UnknownRoundError(LedgerError, LookupError):
    """No such round in the ledger."""


class ConservationError(LedgerError, ValueError):
    """A round's change is not what its weighted updates and residual add up to."""


class CommitConflict(LedgerError, RuntimeError):
    """Another writer holds the ledger, or has committed this round already."""


class DurabilityError(LedgerError, OSError):
    """The file system refused a write, fsync or rename; nothing of the round was acknowledged."""


class SignatureError(LedgerError, ValueError):
    """A signature is missing, malformed, or does not fit what it signs."""


class StaleSnapshot(LedgerError, ValueError):
    """The ledger's head is older than, or not a descendant of, the one that was pinned."""


class TraceFormatError(ProtokenError, ValueError):
    """A saved trace is damaged or was written by a newer version."""


class MissingDependencyError(ProtokenError, ImportError):
    """An optional package is not installed; the message says how to get it."""
