"""Verification: does every byte of a ledger still say what was committed?

From HEAD down the chain: manifests (hash, place, content), continuity of digests from round to round, every
shard (size, header, binding to run, round, base and client, layout, hash and finiteness of every tensor),
signatures. Large shards are read by a pool of threads: hashing and pread release the interpreter lock, so this
runs at the speed of the disk or of SHA-256. Small ones are checked by the calling thread: they are over before
another thread could take the lock, and handing it to and fro would cost more than the check. Where they come from
the disk and not from memory, other threads ask for them ahead (read_ahead.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from protoken.arguments import check_callable, check_count, check_flag
from protoken.errors import ArgumentError, LedgerError, LedgerFormatError, ProtokenError
from protoken.ledger import manifest as m
from protoken.ledger.chain import parse_pinned
from protoken.ledger.ledger import Ledger
from protoken.ledger.read_ahead import THREADS, ReadAhead
from protoken.ledger.rounds import Round, folder, relative
from protoken.ledger.shard_check import ShardChecker
from protoken.ledger.shards import ShardRef
from protoken.ledger.signatures import key_hex
from protoken.ledger.tensors import norm
from protoken.paths import path_of

# Recomputed residuals differ from recorded ones by the rounding of fp32 sums in another order.
RESIDUAL_TOLERANCE = 1e-4
# Shards up to this size are checked by the calling thread.
SMALL = 256 << 10


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was committed: where, and the typed error that reading it would raise."""

    where: str
    error: ProtokenError

    def __str__(self) -> str:
        return f"{self.where}: {type(self.error).__name__}: {self.error}"


@dataclass
class VerifyReport:
    """What verify() found.

    ``pruned``: numbers of the rounds whose tensors are gone, and so were not checked. ``gaps``: of those that were
    allowed to start from other weights than the round before ended with. ``leftovers``: files of unfinished writers,
    harmless, gone with the next commit.
    """

    path: str
    head: m.Head | None = None
    rounds: int = 0
    shards: int = 0
    bytes: int = 0
    signed: int = 0
    pruned: list[int] = field(default_factory=list)
    gaps: list[int] = field(default_factory=list)
    seconds: float = 0.0
    problems: list[Problem] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    path: str | os.PathLike[str],
    *,
    pinned: str | m.Head | None = None,
    server_key: bytes | str | None = None,
    client_keys: Mapping[str, bytes | str] | None = None,
    conservation: bool = False,
    complete: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check a whole ledger; finds problems instead of raising them.

    ``pinned``, ``server_key`` and ``client_keys`` are what you know from elsewhere: without them a ledger
    rewritten from the start in a consistent way cannot be told from the true one. ``conservation=True`` adds
    up all updates again. ``complete=True`` takes a round whose tensors were pruned for a problem: nothing signs PRUNED,
    and what it names is not checked. ``progress(rounds done, rounds)`` is called after each round.

    Raises:
        ArgumentError: there is no ledger at that path, or what was to be known from elsewhere is no head or no key.
            That says nothing about the ledger.
    """
    if pinned is not None:
        parse_pinned(pinned)
    if server_key is not None:
        server_key = key_hex("server_key", server_key)
    if client_keys is not None and not isinstance(client_keys, Mapping):
        raise ArgumentError("client_keys", expected="public keys by client", got=f"a {type(client_keys).__name__}")
    known = {client: key_hex(f"client_keys[{client!a}]", key) for client, key in (client_keys or {}).items()}
    check_flag("conservation", conservation)
    check_flag("complete", complete)
    check_callable("progress", progress)
    if workers is not None:
        check_count("workers", workers, 1)
    _require_a_ledger(path)
    report, start = VerifyReport(str(path)), time.perf_counter()
    try:
        ledger = Ledger.open(path, pinned=pinned, server_key=server_key)
    except ProtokenError as error:
        report.problems.append(Problem("ledger", error))
        report.seconds = time.perf_counter() - start
        return report
    report.head = ledger.head
    report.leftovers = leftovers(ledger)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool, ThreadPoolExecutor(THREADS) as waiting:
        for number in reversed(ledger.rounds):
            try:
                current = ledger.round(number)
            except ProtokenError as error:
                # The chain ends here: without this manifest nothing says what the earlier ones should be.
                report.problems.append(Problem(f"round {number} and all before", error))
                break
            report.rounds += 1
            _verify_round(ledger, current, report, (pool, waiting), known, conservation, complete)
            if progress is not None:
                progress(report.rounds, len(ledger.rounds))
    report.seconds = time.perf_counter() - start
    return report


def _require_a_ledger(path: str | os.PathLike[str]) -> None:
    """ArgumentError where nothing of a ledger is: a mistyped path is no tampering. A missing file may be."""
    root = path_of("path", path)
    if not any(os.path.lexists(os.path.join(root, name)) for name in ("ledger.json", "HEAD", "rounds")):
        got = "which holds none" if os.path.exists(root) else "which is not there"
        raise ArgumentError("path", expected="the folder of a ledger", got=f"{root}, {got}")


def leftovers(ledger: Ledger) -> list[str]:
    """Names of what no head refers to: staged files and rounds beyond the head."""
    known = {folder(number).partition("/")[2] for number in ledger.rounds}
    staged = [f"staging/{name}" for name in ledger.files.names("staging")]
    return staged + [f"rounds/{name}" for name in ledger.files.names("rounds") if name not in known]


def _verify_round(
    ledger: Ledger,
    current: Round,
    report: VerifyReport,
    pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor],
    known: dict[str, str],
    conservation: bool,
    complete: bool,
) -> None:
    where = f"round {current.number}"
    problems = report.problems
    if current.manifest.gap:
        report.gaps.insert(0, current.number)
    problems += _collect(where, lambda: _check_continuity(ledger, current))
    problems += _collect(where, lambda: _check_files(ledger, current))
    report.signed += ledger.genesis.server_key is not None
    problems += _collect(where, lambda: _check_server(ledger, current.number))
    for record in current.clients:
        if record.key is record.signature is known.get(record.client) is None:
            continue  # nobody signs here, and nobody is known to
        problems += _collect(
            f"{where}, client {record.client}",
            lambda record=record: _check_key(record, known),  # type: ignore[misc]
        )
    if current.pruned:
        report.pruned.insert(0, current.number)
        problems += _collect(where, lambda: _check_pruned(current, ledger.head, complete))
        return
    for label, found in _checked_shards(current, *pools):
        report.shards += 1
        if isinstance(found, int):
            report.bytes += found
        else:
            problems.append(Problem(f"{where}, {label}", found))
    if conservation:
        problems += _collect(where, lambda: check_conservation(current))


def check_conservation(round_: Round) -> None:
    """Add up change - sum_k rho_k delta_k again; LedgerFormatError when its norm is not the recorded one."""
    for name, spec in round_.parameters.items():
        found = norm(round_.computed_residual(name))
        scale = max(spec.change_norm, spec.residual_norm, found)
        if relative(abs(found - spec.residual_norm), scale) > RESIDUAL_TOLERANCE:
            raise LedgerFormatError(f"residual of {name}", expected=f"norm {spec.residual_norm} as recorded", got=found)


def _checked_shards(
    current: Round, pool: ThreadPoolExecutor, waiting: ThreadPoolExecutor
) -> Iterator[tuple[str, int | ProtokenError]]:
    """Whose shard, and its bytes or what is wrong with it. ``pool`` checks large ones, ``waiting`` goes ahead."""
    shards = _shards(current)
    small = [ref for ref, _ in shards if ref.size <= SMALL]
    with ShardChecker(current) as checker, ReadAhead(checker.open, small, waiting) as ahead:
        large = {ref.file: pool.submit(_check, checker, ref, client) for ref, client in shards if ref.size > SMALL}
        seen = 0
        for ref, client in shards:
            if ref.size <= SMALL:
                ahead.reached(seen)
                seen += 1
            found = large[ref.file].result() if ref.size > SMALL else _check(checker, ref, client)
            yield ref.file.partition(".")[0] if client is None else f"client {client}", found


def _shards(current: Round) -> list[tuple[ShardRef, str | None]]:
    """All shards of a round, and whose they are."""
    manifest = current.manifest
    own = [manifest.change, *([] if manifest.residual is None else [manifest.residual])]
    return [*((ref, None) for ref in own), *((record.shard, record.client) for record in current.clients)]


def _check(checker: ShardChecker, ref: ShardRef, client: str | None) -> int | ProtokenError:
    """Bytes of a good shard, or what is wrong with it."""
    try:
        return checker.check(ref, client)
    except ProtokenError as error:
        return error


def _check_continuity(ledger: Ledger, current: Round) -> None:
    if current.number == 1 or current.manifest.gap:
        return
    before = ledger.round(current.number - 1).aggregate_digest
    for name, spec in current.parameters.items():
        if before.get(name, spec.base) != spec.base:
            raise LedgerFormatError(name, expected=f"base {before[name]}, the last aggregate", got=spec.base)


def _check_files(ledger: Ledger, current: Round) -> None:
    manifest, place = current.manifest, folder(current.number)
    listed = {"manifest.json", *(() if ledger.genesis.server_key is None else ("manifest.sig",))}
    # Shards of a pruned round may still lie there when prune() was interrupted.
    listed |= {"clients", manifest.change.file, *((manifest.residual.file,) if manifest.residual else ())}
    clients = {record.shard.file.partition("/")[2] for record in current.clients}
    _require_names(f"{place}/clients", ledger.files.names(f"{place}/clients"), clients)
    _require_names(place, ledger.files.names(place), listed)


def _check_pruned(current: Round, head: m.Head, complete: bool) -> None:
    """PRUNED is not signed: anybody who can write to the folder can name a round there, and its shards go unchecked."""
    if current.number == head.round:
        raise LedgerFormatError("PRUNED", expected="rounds before the last", got=f"the last, {current.number}")
    if complete:
        raise LedgerFormatError("PRUNED", expected="no round, for every tensor to be checked", got=current.number)


def _require_names(place: str, found: Iterable[str], listed: set[str]) -> None:
    extra = sorted(set(found) - listed)
    if extra:
        raise LedgerFormatError(place, expected="the files of the manifest only", got=ascii(extra[:3])[:160])


def _check_server(ledger: Ledger, number: int) -> None:
    if ledger.genesis.server_key is not None:
        from protoken.ledger.signatures import verify_server

        verify_server(ledger, number, ledger.genesis.server_key)


def _check_key(record: m.ClientRecord, known: dict[str, str]) -> None:
    """A client keeps one key through all rounds; one that signs, or whose key is known, must have signed."""
    from protoken.errors import SignatureError
    from protoken.ledger.signatures import verify_client

    expected = known.get(record.client)
    if record.key is None or record.signature is None:
        raise SignatureError("signature", expected=f"one by {expected}", got="none or half of one")
    if expected is not None and record.key != expected:
        raise SignatureError("key", expected=expected, got=record.key)
    known[record.client] = record.key
    verify_client(record.client, record.key, record.signature, record.shard.sha256)


def _collect(where: str, check: Callable[[], None]) -> list[Problem]:
    try:
        check()
    except (LedgerError, ProtokenError) as error:
        return [Problem(where, error)]
    return []
