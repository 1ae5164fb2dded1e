"""The ledger: a folder of rounds that only grows.

>>> ledger = Ledger.create("ledger", model="my-model")
>>> updates = [ClientUpdate("alice", 0.6, state=alice), ClientUpdate("bob", 0.4, state=bob)]
>>> ledger.commit_round(before, after, updates)
>>> ledger.round("last").delta("alice", "model.layers.29.self_attn.o_proj.weight")

An open ledger is a snapshot: it shows the rounds that were committed when it was opened, whatever a writer
does beside it. Any number of readers may stand beside one writer; a second writer gets CommitConflict.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from protoken.arguments import check_flag, check_word, is_whole, listed
from protoken.errors import ArgumentError, CommitConflict, LedgerFormatError, SignatureError, UnknownRoundError
from protoken.ledger import manifest as m
from protoken.ledger import names, parsing, strictjson
from protoken.ledger.chain import Chain
from protoken.ledger.files import FileLayer
from protoken.ledger.pruned import read_pruned
from protoken.ledger.rounds import Round, ShardCache, folder
from protoken.ledger.updates import ClientUpdate, Value
from protoken.ledger.writer import KeepResidual, RoundWriter

if TYPE_CHECKING:
    from protoken.ledger.signatures import SigningKey

RoundChoice = int | Literal["last", "all"] | slice | Iterable[int]
_CHOICE = "'last', 'all', a number, a slice or numbers"


class Ledger:
    """A ledger on disk, as it was when it was opened. Use Ledger.create or Ledger.open.

    Reading: `rounds`, `clients`, `round(number)`, `select(rounds)`, `head`. Writing: `commit_round`, or `begin_round`
    to add clients one at a time. The format is docs/ledger-format.md.

    Errors: LedgerFormatError for files that are damaged or missing, UnknownRoundError, UnknownClientError; what writing
    raises stands at its methods.
    """

    def __init__(
        self,
        files: FileLayer,
        genesis: m.Genesis,
        genesis_hash: str,
        head: m.Head,
        *,
        check: bool,
        key: object,
    ) -> None:
        self._files, self._genesis, self._key = files, genesis, key
        self._chain = Chain(files, genesis, genesis_hash, head)
        self._cache = ShardCache(files, check=check)
        self._pruned = read_pruned(files)

    # ---- opening -------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        model: str = "",
        run: str | None = None,
        metadata: Mapping[str, object] | None = None,
        signing_key: SigningKey | None = None,
        files: FileLayer | None = None,
    ) -> Ledger:
        """An empty ledger in a new or empty folder.

        ``run`` names the federation (random when left out). With ``signing_key`` every round is signed by the
        server, and its public key is written into the ledger. ArgumentError when something is there already.
        """
        files = files or FileLayer(path)
        files.make_root()
        rest = [
            name for name in files.names("") if name not in ("ledger.json", "rounds", "staging", "lock", "HEAD.new")
        ]
        if rest:
            raise ArgumentError(
                "path",
                expected="a new or empty folder",
                got=f"one with {rest[0]!a} in it",
                remedy="Use Ledger.open.",
            )
        genesis = m.Genesis(
            run=names.check_run(run if run is not None else secrets.token_hex(16)),
            model=m.check_model(model),
            metadata=strictjson.check_metadata(metadata),
            server_key=_public(signing_key),
            created=int(time.time()),
        )
        lock = files.lock("lock")
        try:
            if files.exists("HEAD"):
                raise CommitConflict("path", expected="nobody else to create it", got="a ledger that is there now")
            for name in ("ledger.json", "rounds", "staging"):  # what a crashed create left
                files.remove(name)
            data = genesis.dump()
            files.write_file("ledger.json", data)
            files.make_folder("rounds")
            files.make_folder("staging")
            files.sync_folder("")
            head = m.Head(genesis.run, 0, m.sha256(data))
            files.replace_file("HEAD", head.dump())
            files.sync_above()
        finally:
            os.close(lock)
        return cls(files, genesis, m.sha256(data), head, check=True, key=signing_key)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        pinned: str | m.Head | None = None,
        server_key: bytes | str | None = None,
        signing_key: SigningKey | None = None,
        check: bool = True,
        files: FileLayer | None = None,
    ) -> Ledger:
        """Open for reading, and for writing when the folder allows it. Reads two small files; the rest is lazy.

        ``pinned`` is a head noted earlier (str(ledger.head)): StaleSnapshot when the ledger does not contain
        it. ``server_key`` is the server's public key from a trusted place: SignatureError when the ledger is
        not signed by it. ``check=False`` skips the hash of each tensor read.
        """
        check_flag("check", check)
        files = files or FileLayer(path)
        data = files.read("ledger.json", m.GENESIS_LIMIT)
        genesis, head = parsing.parse_genesis(data), parsing.parse_head(files.read("HEAD", m.HEAD_LIMIT))
        if head.run != genesis.run or (head.round == 0 and head.sha256 != m.sha256(data)):
            raise LedgerFormatError("HEAD", expected=f"the head of run {genesis.run}", got=f"one of {head.run}")
        ledger = cls(files, genesis, m.sha256(data), head, check=check, key=signing_key)
        if signing_key is not None and _public(signing_key) != genesis.server_key:
            raise SignatureError("signing_key", expected=f"the key of {genesis.server_key}", got=_public(signing_key))
        if pinned is not None:
            ledger.require_pinned(pinned)
        if server_key is not None:
            from protoken.ledger.signatures import require_server

            require_server(ledger, server_key)
        return ledger

    @classmethod
    def open_or_create(
        cls, path: str | os.PathLike[str], *, model: str = "", signing_key: SigningKey | None = None
    ) -> Ledger:
        """The ledger at a path, or an empty one made there, unless somebody else has made it meanwhile.

        ``model`` is of a new one. With ``signing_key`` a ledger that is there must be signed by it (SignatureError).
        Errors are those of create and open.
        """
        files = FileLayer(path)
        if not files.exists("HEAD"):
            try:
                return cls.create(path, model=model, signing_key=signing_key)
            except (ArgumentError, CommitConflict):
                if not files.exists("HEAD"):
                    raise
        return cls.open(path, signing_key=signing_key)

    def refresh(self) -> Ledger:
        """A new snapshot of the same ledger, pinned to this one: StaleSnapshot if the ledger went back."""
        return Ledger.open(
            self.path, pinned=self._chain.head, signing_key=self._key, check=self._cache.check, files=self._files
        )

    # ---- what is there -------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"Ledger({str(self.path)!r}, run={self.run!r}, rounds={self._chain.head.round})"

    @property
    def path(self) -> Path:
        """The ledger's folder."""
        return self._files.root

    @property
    def files(self) -> FileLayer:
        """The file layer below this ledger."""
        return self._files

    @property
    def run(self) -> str:
        """Which federation this is of: the name given to create(), or a random one."""
        return self._genesis.run

    @property
    def model(self) -> str:
        """What create() was told; the digests of the rounds are what counts."""
        return self._genesis.model

    @property
    def metadata(self) -> dict[str, object]:
        """What create() was given to keep with the run."""
        return self._genesis.metadata

    @property
    def genesis(self) -> m.Genesis:
        """The content of ledger.json: run, model, metadata, the server's key."""
        return self._genesis

    @property
    def head(self) -> m.Head:
        """Number and hash of the last round; note str(head) elsewhere to notice a ledger that was rolled back."""
        return self._chain.head

    @property
    def rounds(self) -> tuple[int, ...]:
        """1-based, ascending."""
        return tuple(range(1, self._chain.head.round + 1))

    @property
    def clients(self) -> tuple[str, ...]:
        """All ids over all rounds, sorted. Reads every manifest once."""
        return tuple(sorted({client for number in self.rounds for client in self._chain.clients_of(number)}))

    def round(self, number: int | Literal["last"]) -> Round:
        """One round. UnknownRoundError when there is none of this number."""
        if isinstance(number, str) and number == "last":
            number = self._chain.head.round
        whole = int(number) if is_whole(number) else 0
        if not 1 <= whole <= self._chain.head.round:
            raise UnknownRoundError(
                "round", expected=f"'last' or a number from 1 to {self._chain.head.round}", got=ascii(number)[:40]
            )
        return Round(self._chain.manifest(whole), self._cache, pruned=whole in self._pruned)

    def select(self, rounds: RoundChoice = "last") -> tuple[Round, ...]:
        """Rounds by "last", "all", a number, a slice of the tuple of rounds, or an iterable of numbers; ascending."""
        chosen: tuple[Any, ...]
        if isinstance(rounds, str):
            words: dict[str, tuple[Any, ...]] = {"last": ("last",), "all": self.rounds}
            if rounds not in words:
                raise UnknownRoundError("rounds", expected=_CHOICE, got=ascii(rounds)[:40])
            chosen = words[rounds]
        elif isinstance(rounds, slice):
            chosen = slice_of(self.rounds, rounds)
        else:
            single = isinstance(rounds, bool) or is_whole(rounds)
            chosen = (rounds,) if single else listed("rounds", rounds, _CHOICE)
        found = {one.number: one for one in map(self.round, chosen)}
        if not found:
            raise UnknownRoundError("rounds", expected="at least one round", got=f"none of {self._chain.head.round}")
        return tuple(found[number] for number in sorted(found))

    def require_pinned(self, pinned: str | m.Head) -> None:
        """StaleSnapshot unless the pinned head is this ledger's or an ancestor of it."""
        self._chain.require_pinned(pinned)

    def hash_of(self, number: int) -> str:
        """Hash of a round's manifest (0: of ledger.json), as the chain below the head fixes it. UnknownRoundError."""
        if not is_whole(number) or not 0 <= number <= self._chain.head.round:
            raise UnknownRoundError("number", expected=f"0 to {self._chain.head.round}", got=ascii(number)[:40])
        return self._chain.hash_of(number)

    # ---- writing -------------------------------------------------------------------------------------------

    def commit_round(
        self,
        base: Mapping[str, Value],
        aggregate: Mapping[str, Value],
        updates: Sequence[ClientUpdate],
        *,
        rule: str = "fedavg",
        metadata: Mapping[str, object] | None = None,
        max_relative_residual: float | None = None,
        codec: str = "fp32",
        allow_gap: bool = False,
        keep_residual: KeepResidual = "auto",
        on_bad: Literal["raise", "quarantine"] = "raise",
    ) -> Round:
        """Record one round whole or not at all: base = G_{r-1} as sent to the clients, aggregate = G_r.

        The keys of ``base`` choose the parameters on record. See RoundWriter.add and RoundWriter.commit.

        Args:
            base, aggregate: parameter name -> tensor, or LowRank for adapters.
            updates: one `ClientUpdate` per participant.
            rule: what the server did ("fedavg", "fedadam", ...); of "fedavg" and "fedprox" the weights must sum to 1.
            metadata: anything that JSON can hold.
            max_relative_residual: refuse the round where the residual is larger than this times the change.
            codec: "fp32", "bf16", "fp16", "int8", "fp8" or "lowrank-<r>": how updates are stored.
            allow_gap: take a base that is not what the last round ended with.
            keep_residual: "always", "never", or "auto": where it exceeds 1e-5 of the change.
            on_bad: "raise", or "quarantine" to keep and flag what cannot be used.

        Raises:
            ArgumentError, ShapeError, DtypeError, NonFiniteError, LayerError: something of the above does not fit.
            ConservationError: the residual is larger than was allowed.
            LedgerMismatchError: the base is not the last round's aggregate.
            CommitConflict: another writer holds the ledger, or has committed since it was opened.
            DurabilityError: the file system refused; nothing was acknowledged.
        """
        check_word("on_bad", on_bad, ("raise", "quarantine"))
        if isinstance(updates, Mapping | str) or not isinstance(updates, Iterable):
            raise ArgumentError("updates", expected="a list of ClientUpdate", got=f"a {type(updates).__name__}")
        with self.begin_round(
            base, rule=rule, metadata=metadata, codec=codec, allow_gap=allow_gap, keep_residual=keep_residual
        ) as writer:
            for update in updates:
                writer.add(update, on_bad=on_bad)
            return writer.commit(aggregate, max_relative_residual=max_relative_residual)

    def begin_round(
        self,
        base: Mapping[str, Value],
        *,
        rule: str = "fedavg",
        metadata: Mapping[str, object] | None = None,
        codec: str = "fp32",
        allow_gap: bool = False,
        keep_residual: KeepResidual = "auto",
    ) -> RoundWriter:
        """A context manager that takes clients one at a time and holds the ledger for writing meanwhile.

        CommitConflict when another writer holds it or has committed since this snapshot. LedgerMismatchError
        when the base is not what the last round ended with, unless ``allow_gap``.
        """
        check_word("keep_residual", keep_residual, ("auto", "always", "never"))
        allow_gap = check_flag("allow_gap", allow_gap)
        if self._genesis.server_key is not None and self._key is None:
            raise SignatureError(
                "signing_key", expected="the server's key", got="none", remedy="Ledger.open(signing_key=...)"
            )
        lock = self._files.lock("lock")
        try:
            self._require_current()
            self._clear_leftovers()
            return RoundWriter(
                self._files,
                self._chain.head,
                base,
                lock=lock,
                rule=rule,
                codec=codec,
                metadata=metadata,
                gap=allow_gap,
                last=self._chain.manifest(self._chain.head.round) if self._chain.head.round else None,
                known_clients={names.fold(client): client for client in self.clients},
                keep_residual=keep_residual,
                sign=self._signer(),
                done=self._advance,
            )
        except BaseException:
            os.close(lock)
            raise

    def _advance(self, manifest: m.Manifest, head: m.Head) -> Round:
        self._chain.advance(manifest, head)
        return Round(manifest, self._cache)

    def forget_pruned(self) -> None:
        """Notice which rounds were pruned since this snapshot was taken."""
        self._pruned = read_pruned(self._files)

    def _require_current(self) -> None:
        found = parsing.parse_head(self._files.read("HEAD", m.HEAD_LIMIT))
        if found != self._chain.head:
            raise CommitConflict(
                "ledger",
                expected=f"head {str(self._chain.head)[:20]}..., which this snapshot shows",
                got=f"{str(found)[:20]}... on disk",
                remedy="Use ledger.refresh() and write on top of that.",
            )

    def _clear_leftovers(self) -> None:
        """Remove what crashed writers left: everything staged, and rounds beyond the head."""
        for name in self._files.names("staging"):
            self._files.remove(f"staging/{name}")
        known = {folder(number).partition("/")[2] for number in self.rounds}
        for name in self._files.names("rounds"):
            if name not in known:
                self._files.remove(f"rounds/{name}")

    def _signer(self) -> Callable[[m.Head], bytes] | None:
        if self._key is None:
            return None
        from protoken.ledger.signatures import server_signer

        return server_signer(self._key)


def check_ledger(ledger: object) -> None:
    """ArgumentError for what is no open ledger."""
    if not isinstance(ledger, Ledger):
        remedy = "Open it: protoken.Ledger.open(path)" if isinstance(ledger, str | os.PathLike) else None
        raise ArgumentError(
            "ledger", expected="an open protoken.Ledger", got=f"a {type(ledger).__name__}", remedy=remedy
        )


def slice_of(rounds: Sequence[int], chosen: slice) -> tuple[int, ...]:
    """A slice of the rounds; ArgumentError for one that is none."""
    try:
        return tuple(rounds[chosen])
    except (TypeError, ValueError) as error:
        raise ArgumentError("rounds", expected="a slice of whole numbers, its step not 0", got=chosen) from error


def _public(signing_key: SigningKey | None) -> str | None:
    if signing_key is None:
        return None
    from protoken.ledger.signatures import public_hex

    return public_hex(signing_key)
