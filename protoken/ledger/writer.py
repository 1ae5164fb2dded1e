"""Writing one round: client by client into a staging folder, then visible all at once.

    1. staging/<random>/clients/NNNNNN.safetensors, one per client   write, fsync
    2. staging/<random>/change.safetensors, residual.safetensors     write, fsync
    3. staging/<random>/manifest.json [, manifest.sig]               write, fsync; fsync of both folders
    4. rename to rounds/RRRRRRRR                                     fsync of rounds/
    5. HEAD.new -> HEAD                                              write, fsync, rename; fsync of the root

The round exists from the rename of HEAD on, and is acknowledged when commit() returns. Before, whatever a
crash leaves is ignored by readers and removed by the next writer.
"""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from protoken.arguments import check_bound
from protoken.errors import ArgumentError, CommitConflict, ConservationError, LedgerError, NonFiniteError, ProtokenError
from protoken.ledger import codecs, names, strictjson
from protoken.ledger import manifest as m
from protoken.ledger.composing import check_continuity, difference, raw, shard_content, stored_norm
from protoken.ledger.files import FileLayer
from protoken.ledger.rounds import Round, add_weighted, folder, relative
from protoken.ledger.rules import check_groups
from protoken.ledger.shards import ShardIndex, ShardRef, encode_shard, parse_header, read_tensor
from protoken.ledger.tensors import DTYPES, LowRank, norm, parameter_digest
from protoken.ledger.updates import (
    ClientUpdate,
    Value,
    check_aggregate,
    check_base,
    check_update,
    deltas_of,
    form_dtype,
)

if TYPE_CHECKING:
    from types import TracebackType

OnBad = Literal["raise", "quarantine"]
KeepResidual = Literal["auto", "always", "never"]
# Below this the residual is the rounding of fp32 sums, and a shard of it would only cost bytes.
RESIDUAL_WORTH_KEEPING = 1e-5


class RoundWriter:
    """Context manager of Ledger.begin_round: add() each client, then commit(). Leaving without commit removes
    everything.

    Memory: the base, plus one client's update while it is added, plus one parameter while committing.
    """

    def __init__(
        self,
        files: FileLayer,
        head: m.Head,
        base: Mapping[str, Value],
        *,
        lock: int,
        rule: str,
        codec: str,
        metadata: Mapping[str, object] | None,
        gap: bool,
        last: m.Manifest | None,
        known_clients: Mapping[str, str],
        keep_residual: KeepResidual,
        sign: Callable[[m.Head], bytes] | None,
        done: Callable[[m.Manifest, m.Head], Round],
    ) -> None:
        self._files, self._head, self._lock, self._done, self._sign = files, head, lock, done, sign
        self._base = check_base(base)
        self._rule, self._codec = names.check_rule(rule), codecs.check_codec(codec)
        self._metadata = strictjson.check_metadata(metadata)
        self._gap, self._known, self._keep_residual = gap, known_clients, keep_residual
        self._base_digest = {name: parameter_digest(value) for name, value in self._base.items()}
        if not gap:
            check_continuity(self._base_digest, last)
        self._records: list[m.ClientRecord] = []
        self._indices: list[ShardIndex] = []
        self._folded: dict[str, str] = {}
        self._staging = f"staging/{secrets.token_hex(8)}"
        self._open = True
        files.make_folder(self._staging)
        files.make_folder(f"{self._staging}/clients")

    @property
    def number(self) -> int:
        """The round being written."""
        return self._head.round + 1

    @property
    def base_hash(self) -> str:
        """One hash over the base's digests; part of what clients sign."""
        return m.base_hash(self._base_digest)

    def add(self, update: ClientUpdate, *, on_bad: OnBad = "raise") -> m.ClientRecord:
        """Write one client's update to disk.

        ``on_bad="quarantine"`` keeps an update that cannot be used (NaN, infinity, wrong shape, missing or unknown
        parameters) as it came, flagged, instead of raising: for updates that the server has aggregated already.
        """
        self._require_open()
        check_update("updates", update)
        self._check_new(update.client)
        reason = None
        try:
            deltas = deltas_of(update, self._base)
            stored = {name: codecs.encode(self._codec, value) for name, value in deltas.items()}
            total = math.hypot(*map(stored_norm, stored.values()))
        except ProtokenError as error:
            if on_bad != "quarantine":
                raise
            reason, stored, total = str(error)[:1000], raw(update), 0.0
        ref, index = self._write(m.client_file(len(self._records)), stored, self._binding(update.client))
        key, signature = self._signed(update, ref)
        record = m.ClientRecord(
            update.client, float(update.weight), update.examples, total, reason, ref, key, signature
        )
        self._records.append(record)
        self._indices.append(index)
        self._folded[names.fold(update.client)] = update.client
        return record

    def commit(self, aggregate: Mapping[str, Value], *, max_relative_residual: float | None = None) -> Round:
        """Check conservation, make the round durable and visible, return it.

        For each parameter: residual = (G_r - G_{r-1}) - sum_k rho_k delta_k, with the deltas as stored. Its
        norm is recorded; its tensor too when it is worth it (more than 1e-5 of the change, or
        keep_residual="always"). ConservationError when it is larger than ``max_relative_residual`` times the
        change. DurabilityError when the file system refuses; then nothing was acknowledged.
        """
        self._require_open()
        if max_relative_residual is not None:
            check_bound("max_relative_residual", max_relative_residual)
        if not self._records:
            raise ArgumentError("round", expected="at least one client", got="none", remedy="Call add() first.")
        m.check_weights(self._rule, [record.weight for record in self._records])
        check_groups(self._rule, [record.client for record in self._records], self._metadata)
        after = check_aggregate(self._base, aggregate)
        try:
            manifest = self._compose(after, max_relative_residual)
            return self._publish(manifest)
        finally:
            self.close()

    def close(self) -> None:
        """Give up: remove what was staged and let the next writer in. Nothing happens after a commit."""
        if not self._open:
            return
        self._open = False
        try:
            self._files.remove(self._staging)
        except LedgerError:
            pass  # the disk is failing or full: the next writer clears staging/ first
        finally:
            os.close(self._lock)

    def __enter__(self) -> RoundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- one client ----------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if not self._open:
            raise CommitConflict("round", expected="a writer that is open", got="one committed or given up already")

    def _check_new(self, client: str) -> None:
        folded = names.fold(client)
        if folded in self._folded:
            raise ArgumentError(
                "client", expected="each client once per round", got=f"{self._folded[folded]}, {client}"
            )
        if self._known.get(folded, client) != client:
            raise ArgumentError(
                "client",
                expected=f"{self._known[folded]}, as in earlier rounds",
                got=client,
                remedy="Case counts.",
            )
        if len(self._records) >= m.MAX_CLIENTS:
            raise ArgumentError("client", expected=f"at most {m.MAX_CLIENTS} clients in a round", got="one more")

    def _binding(self, client: str | None) -> dict[str, object]:
        """Stands in each shard's header, so that it cannot pass for one of another round or client."""
        return {"run": self._head.run, "round": self.number, "base": self.base_hash, "client": client}

    def _write(
        self, file: str, stored: Mapping[str, codecs.Encoded], binding: Mapping[str, object]
    ) -> tuple[ShardRef, ShardIndex]:
        tensors, info = shard_content(stored, binding)
        header, pieces = encode_shard(tensors, info)
        path = f"{self._staging}/{file}"
        self._files.write_file(path, header, *pieces)
        ref = ShardRef(file, len(header) + sum(map(len, pieces)), m.sha256(header))
        return ref, parse_header(header[8:], replace(ref, file=path))

    def _signed(self, update: ClientUpdate, ref: ShardRef) -> tuple[str | None, str | None]:
        if update.signature is None and update.key is None:
            return None, None
        from protoken.ledger.signatures import check_client

        return check_client(update, ref.sha256)

    # ---- the whole round -----------------------------------------------------------------------------------

    def _compose(self, after: Mapping[str, Value], limit: float | None) -> m.Manifest:
        changes: dict[str, codecs.Encoded] = {}
        residuals: dict[str, codecs.Encoded] = {}
        specs: dict[str, m.ParameterSpec] = {}
        for name, before in self._base.items():
            change = difference(after[name], before)
            changes[name] = codecs.encode("fp32", change)
            rest = change.dense() if isinstance(change, LowRank) else change.clone()
            change_norm = norm(rest)
            self._subtract_clients(name, rest)
            rest_norm = norm(rest)
            if not math.isfinite(rest_norm):
                raise NonFiniteError(
                    f"residual of {name}", expected="weighted updates whose sum fits fp32", got="an overflow"
                )
            self._check_conservation(name, rest_norm, change_norm, limit)
            if self._worth_keeping(relative(rest_norm, change_norm)):
                residuals[name] = codecs.encode("fp32", rest)
            specs[name] = m.ParameterSpec(
                tuple(before.shape),
                DTYPES[form_dtype(before)],
                "lowrank" if isinstance(before, LowRank) else "dense",
                self._base_digest[name],
                parameter_digest(after[name]),
                change_norm,
                rest_norm,
            )
        change_ref, _ = self._write("change.safetensors", changes, self._binding(None))
        residual_ref = None
        if residuals:
            residual_ref, _ = self._write("residual.safetensors", residuals, self._binding(None))
        return m.Manifest(
            run=self._head.run,
            round=self.number,
            previous=self._head.sha256,
            rule=self._rule,
            codec=self._codec,
            parameters=specs,
            clients=tuple(self._records),
            change=change_ref,
            residual=residual_ref,
            gap=self._gap,
            created=int(time.time()),
            metadata=self._metadata,
        )

    def _subtract_clients(self, name: str, rest: Tensor) -> None:
        for record, index in zip(self._records, self._indices, strict=True):
            if record.quarantined is None and record.weight:
                layout = index.info["layout"][name]
                suffixes = codecs.expected_parts(layout, tuple(rest.shape), index.file)
                parts = {s: read_tensor(self._files, index, name + s, check=False) for s in suffixes}
                add_weighted(rest, layout, parts, -record.weight)

    def _check_conservation(self, name: str, rest: float, change: float, limit: float | None) -> None:
        if limit is not None and not relative(rest, change) <= limit:
            raise ConservationError(
                f"round {self.number}: {name}",
                expected=f"a residual of at most {limit} times the change",
                got=relative(rest, change),
                remedy="Is base what the clients were sent, and are the weights those the server applied?",
            )

    def _worth_keeping(self, share: float) -> bool:
        if self._keep_residual == "auto":
            return share > RESIDUAL_WORTH_KEEPING
        return self._keep_residual == "always"

    def _publish(self, manifest: m.Manifest) -> Round:
        files, data = self._files, manifest.dump()
        if len(data) > m.MANIFEST_LIMIT:
            raise ArgumentError("round", expected=f"a manifest of at most {m.MANIFEST_LIMIT} bytes", got=len(data))
        head = m.Head(self._head.run, self.number, m.sha256(data))
        files.write_file(f"{self._staging}/manifest.json", data)
        if self._sign is not None:
            files.write_file(f"{self._staging}/manifest.sig", self._sign(head))
        files.sync_folder(f"{self._staging}/clients")
        files.sync_folder(self._staging)
        files.rename(self._staging, folder(self.number))
        files.sync_folder("rounds")
        files.replace_file("HEAD", head.dump())
        return self._done(manifest, head)
