"""The chain of manifests below a head: one hash fixes the whole history.

HEAD names the hash of the last manifest, each manifest that of the one before, the first that of ledger.json. Manifests
are read when they are asked for, and hashes on the way down without parsing what lies between. Threads may share one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from copy import copy

from protoken.errors import ArgumentError, LedgerFormatError, StaleSnapshot
from protoken.ledger import manifest as m
from protoken.ledger import parsing
from protoken.ledger.files import FileLayer
from protoken.ledger.rounds import folder

# Manifests kept in memory, and the clients that those may have between them once there are more than two.
ROUND_CACHE, CLIENT_CACHE = 64, 1 << 14


class Chain:
    """Manifests of the rounds up to a head; grows when its own writer commits."""

    def __init__(self, files: FileLayer, genesis: m.Genesis, genesis_hash: str, head: m.Head) -> None:
        self.head = head
        self._files, self._run, self._genesis_hash = files, genesis.run, genesis_hash
        self._hashes: dict[int, str] = {head.round: head.sha256}
        self._clients: dict[int, tuple[str, ...]] = {}
        self._ids: dict[str, str] = {}
        self._kept: OrderedDict[int, m.Manifest] = OrderedDict()
        self._lock = threading.RLock()  # over all of the above, which reading changes as well

    def __getstate__(self) -> dict[str, object]:
        """All but the lock, as one moment saw it: a copied ledger stays at its rounds."""
        with self._lock:
            return {name: copy(value) for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    def advance(self, manifest: m.Manifest, head: m.Head) -> None:
        """Take in a round that was just committed on top."""
        with self._lock:
            self.head = head
            self._hashes[head.round] = head.sha256
            self._note_clients(manifest)

    def manifest(self, number: int) -> m.Manifest:
        """A round's manifest. LedgerFormatError when it is not the one that the head fixes."""
        with self._lock:
            self.hash_of(number)
            return self._manifest_of_known(number)

    def clients_of(self, number: int) -> tuple[str, ...]:
        """Ids in a round, in its order."""
        with self._lock:
            if number not in self._clients:
                self.manifest(number)
            return self._clients[number]

    def hash_of(self, number: int) -> str:
        """Hash of a round's manifest (0: of ledger.json), as the chain below the head fixes it."""
        with self._lock:
            if number == 0:
                if self.head.round:
                    self.manifest(1)
                return self._genesis_hash
            known = min(n for n in self._hashes if n >= number)
            for later in range(known, number, -1):
                self._hashes[later - 1] = self._previous_of(later)
            return self._hashes[number]

    def require_pinned(self, pinned: str | m.Head) -> None:
        """StaleSnapshot unless the pinned head is this one or an ancestor of it."""
        number, sha256 = parse_pinned(pinned)
        if number > self.head.round:
            raise StaleSnapshot("ledger", expected=f"round {number}, which was pinned", got=f"{self.head.round} rounds")
        found = self.hash_of(number)
        if found != sha256:
            raise StaleSnapshot("ledger", expected=f"round {number} with hash {sha256}", got=found)

    def _manifest_of_known(self, number: int) -> m.Manifest:
        """A manifest whose hash is known; notes the hash of the one before it."""
        found = self._load(number)
        if self._hashes.setdefault(number - 1, found.previous) != found.previous:
            raise LedgerFormatError(
                f"{folder(number)}/manifest.json", expected="its own previous hash", got="another one read before"
            )
        self._note_clients(found)
        return found

    def _note_clients(self, manifest: m.Manifest) -> None:
        """Ids of a round; a client of many rounds has one string, and rounds of the same clients share a tuple."""
        number = manifest.round
        if number in self._clients:
            return
        found = tuple(self._ids.setdefault(record.client, record.client) for record in manifest.clients)
        near = (self._clients.get(other) for other in (number - 1, number + 1))
        self._clients[number] = next((other for other in near if other == found), found)

    def _load(self, number: int) -> m.Manifest:
        """A manifest, read or kept from before; the ones used last are kept."""
        found = self._kept.pop(number, None) or self._read(number)
        self._kept[number] = found
        while len(self._kept) > ROUND_CACHE or (
            len(self._kept) > 2 and sum(len(kept.clients) for kept in self._kept.values()) > CLIENT_CACHE
        ):
            self._kept.popitem(last=False)
        return found

    def _previous_of(self, number: int) -> str:
        """The field ``previous`` of a manifest whose hash is known, without parsing the rest: walking down a long
        chain would take a second per hundred thousand clients. In canonical JSON only ``residual``, ``round``,
        ``rule``, ``run`` and ``version`` follow it; a manifest where that is not so is refused once it is parsed.
        """
        data = self._checked_bytes(number)
        at = data.rfind(b'"previous":"')
        value = data[at + 12 : at + 76]
        if at < 0 or len(value) != 64 or not set(value) <= set(b"0123456789abcdef"):
            return self._manifest_of_known(number).previous
        return value.decode("ascii")

    def _checked_bytes(self, number: int) -> bytes:
        what = f"{folder(number)}/manifest.json"
        data = self._files.read(what, m.MANIFEST_LIMIT)
        if m.sha256(data) != self._hashes[number]:
            raise LedgerFormatError(what, expected=f"a manifest with hash {self._hashes[number]}", got=m.sha256(data))
        return data

    def _read(self, number: int) -> m.Manifest:
        what, data = f"{folder(number)}/manifest.json", self._checked_bytes(number)
        found = parsing.parse_manifest(data, what)
        if found.run != self._run or found.round != number:
            raise LedgerFormatError(
                what,
                expected=f"round {number} of run {self._run}",
                got=f"round {found.round} of run {found.run}",
            )
        if number == 1 and found.previous != self._genesis_hash:
            raise LedgerFormatError("ledger.json", expected=f"hash {found.previous}", got=self._genesis_hash)
        return found


def parse_pinned(pinned: str | m.Head) -> tuple[int, str]:
    """Round and hash of a head that was noted down; ArgumentError for a text that is none."""
    number, _, sha256 = str(pinned).partition(":")
    if not number.isdecimal() or len(number) > 8 or len(sha256) != 64:
        raise ArgumentError("pinned", expected='"<round>:<hash>", as str(ledger.head) gives it', got=ascii(pinned)[:90])
    return int(number), sha256
