"""One committed round, read lazily: nothing but the manifest is loaded until a tensor is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property, lru_cache

from torch import Tensor

from protoken.arguments import listed
from protoken.errors import DtypeError, LayerError, LedgerError, LedgerFormatError, NonFiniteError, UnknownClientError
from protoken.ledger import codecs
from protoken.ledger.files import FileLayer
from protoken.ledger.manifest import ClientRecord, Manifest, ParameterSpec, base_hash
from protoken.ledger.shards import ShardIndex, ShardRef, read_index, read_tensor
from protoken.ledger.tensors import LARGEST, USUAL, LowRank, is_finite

INDEX_CACHE = 1024


class ShardCache:
    """Headers of the shards read last, shared by the rounds of a ledger; bounded, however many clients."""

    def __init__(self, files: FileLayer, *, check: bool = True) -> None:
        self.files, self.check = files, check
        self.index = lru_cache(maxsize=INDEX_CACHE)(self._index)

    def _index(self, ref: ShardRef) -> ShardIndex:
        return read_index(self.files, ref)

    def tensor(self, index: ShardIndex, name: str) -> Tensor:
        return read_tensor(self.files, index, name, check=self.check)


class Round:
    """A committed round. Tensors are read and checked (hash, shape, finite) at each call and never kept."""

    def __init__(self, manifest: Manifest, cache: ShardCache, *, pruned: bool = False) -> None:
        self._manifest, self.cache, self.pruned = manifest, cache, pruned
        self._records = {record.client: record for record in manifest.clients}

    def __repr__(self) -> str:
        counts = f"clients={len(self.clients)}, parameters={len(self.parameters)}"
        return f"Round({self.number}, rule={self.rule!r}, {counts})"

    # ---- what the manifest says ----------------------------------------------------------------------------

    @property
    def number(self) -> int:
        """1-based."""
        return self._manifest.round

    @property
    def clients(self) -> tuple[ClientRecord, ...]:
        """All participants in the order they were added, quarantined ones included."""
        return self._manifest.clients

    @property
    def usable(self) -> tuple[ClientRecord, ...]:
        """The participants whose updates can be used: all but the quarantined ones."""
        return tuple(record for record in self.clients if record.quarantined is None)

    @property
    def parameters(self) -> dict[str, ParameterSpec]:
        return self._manifest.parameters

    @property
    def rule(self) -> str:
        """The server's rule, e.g. fedavg."""
        return self._manifest.rule

    @property
    def codec(self) -> str:
        return self._manifest.codec

    @property
    def metadata(self) -> dict[str, object]:
        return self._manifest.metadata

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @cached_property
    def base_hash(self) -> str:
        """One hash over the base's digests."""
        return base_hash(self.base_digest)

    @property
    def base_digest(self) -> dict[str, str]:
        """Digest of each parameter of G_{r-1}."""
        return {name: spec.base for name, spec in self.parameters.items()}

    @property
    def aggregate_digest(self) -> dict[str, str]:
        """Digest of each parameter of G_r."""
        return {name: spec.aggregate for name, spec in self.parameters.items()}

    @property
    def residual_norm(self) -> dict[str, float]:
        """|| change - sum_k rho_k delta_k || per parameter, for the deltas as stored."""
        return {name: spec.residual_norm for name, spec in self.parameters.items()}

    @property
    def relative_residual(self) -> dict[str, float]:
        """residual_norm over the norm of the change; 0 when both are 0, infinite when only the change is 0."""
        return {name: relative(spec.residual_norm, spec.change_norm) for name, spec in self.parameters.items()}

    def has_client(self, client: str) -> bool:
        """Whether it took part, quarantined or not."""
        return isinstance(client, str) and client in self._records

    def client(self, client: str) -> ClientRecord:
        """One participant's record; UnknownClientError if it took no part."""
        if not self.has_client(client):
            raise UnknownClientError(
                "client",
                expected=f"one of the {len(self._records)} clients of round {self.number}",
                got=ascii(client)[:80],
                remedy=f"The first are {', '.join(list(self._records)[:5])}.",
            )
        return self._records[client]

    # ---- tensors -------------------------------------------------------------------------------------------

    def delta(self, client: str, parameter: str) -> Tensor:
        """delta_k of one parameter: dtype as stored; fp32, materialised, for int8, fp8 and low-rank."""
        return self._dense(self._usable(client).shard, parameter, client)

    def layout(self, client: str, parameter: str) -> str:
        """fp32, bf16, fp16, int8, fp8, lowrank or lora; reads the header only."""
        index = self._index(self._usable(client).shard, client)
        return check_layout(index, parameter, self.spec(parameter))

    def factors(self, client: str, parameter: str) -> tuple[Tensor, Tensor, float]:
        """(A [r, I], B [O, r], scale) with delta = scale B A. DtypeError when the update is stored dense."""
        layout, parts = self.stored(client, parameter)
        if layout not in ("lora", "lowrank"):
            raise DtypeError(f"{client}: {parameter}", expected="lora or lowrank", got=layout, remedy="Use delta().")
        found = codecs.factors(parts)
        self.require_finite(parameter, found)
        return found.a, found.b, found.scale

    def quantised(self, client: str, parameter: str) -> tuple[Tensor, Tensor]:
        """(values int8 or fp8 [O, I], scale fp32 [O]) with delta = values * scale. DtypeError for other layouts."""
        layout, parts = self.stored(client, parameter)
        if layout not in ("int8", "fp8"):
            raise DtypeError(f"{client}: {parameter}", expected="int8 or fp8", got=layout, remedy="Use delta().")
        self.require_finite(parameter, parts[codecs.VALUES], parts[codecs.SCALE])
        return parts[codecs.VALUES], parts[codecs.SCALE]

    def stored_bytes(self, client: str, parameter: str) -> int:
        """Bytes of one update as it lies in its shard; reads the header only."""
        index, spec = self._index(self._usable(client).shard, client), self.spec(parameter)
        suffixes = codecs.expected_parts(check_layout(index, parameter, spec), spec.shape, index.file)
        return sum(
            index.entries[parameter + suffix].end - index.entries[parameter + suffix].begin for suffix in suffixes
        )

    def error_bound(self, client: str, parameter: str) -> float:
        """Frobenius norm of what the codec lost of this update, as measured when it was written."""
        self.spec(parameter)
        return float(self._index(self._usable(client).shard, client).info["bound"].get(parameter, 0.0))

    def deltas(self, client: str, parameters: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(parameter, delta) one after the other; reads each header once."""
        for parameter in self.parameters if parameters is None else listed("parameters", parameters):
            yield parameter, self.delta(client, parameter)

    def change(self, parameter: str) -> Tensor:
        """G_r - G_{r-1}, fp32."""
        return self._dense(self._manifest.change, parameter, None).float()

    def change_factors(self, parameter: str) -> LowRank:
        """The change of a parameter recorded as factors. DtypeError for a dense one."""
        layout, parts = self._read(self._manifest.change, parameter, None)
        if layout != "lora":
            raise DtypeError(parameter, expected="a parameter recorded as factors", got=layout)
        found = codecs.factors(parts)
        self.require_finite(parameter, found)
        return found

    def residual(self, parameter: str) -> Tensor:
        """change - sum_k rho_k delta_k, fp32: what the server did beyond the weighted mean, owed to nobody.

        From its own shard if the round has one for this parameter, else computed from all clients' deltas.
        """
        self.spec(parameter)
        reference = self._manifest.residual
        if reference is not None and parameter in self._index(reference, None).info["layout"]:
            return self._dense(reference, parameter, None).float()
        return self.computed_residual(parameter)

    def computed_residual(self, parameter: str) -> Tensor:
        """The same, added up from the stored change and deltas even where a shard holds it."""
        rest = self.change(parameter)
        for record in self.usable:
            layout, parts = self._read(record.shard, parameter, record.client)
            add_weighted(rest, layout, parts, -record.weight)
        self.require_finite(parameter, rest)
        return rest

    def quarantined_tensor(self, client: str, parameter: str) -> Tensor:
        """What a quarantined client sent for one parameter, unchecked: it may hold NaN or have a shape of its own."""
        record = self.client(client)
        index = self._index(record.shard, client)
        if record.quarantined is None or not isinstance(parameter, str) or parameter not in index.entries:
            raise LayerError("parameter", expected="one kept from a quarantined update", got=ascii(parameter)[:80])
        return self.cache.tensor(index, parameter)

    # ---- checks --------------------------------------------------------------------------------------------

    def spec(self, parameter: str) -> ParameterSpec:
        """What the manifest says of one parameter; LayerError if it is not recorded."""
        spec = self.parameters.get(parameter) if isinstance(parameter, str) else None
        if spec is None:
            raise LayerError(
                "parameter",
                expected=f"one of the {len(self.parameters)} parameters of round {self.number}",
                got=ascii(parameter)[:80],
                remedy=f"The first are {', '.join(list(self.parameters)[:3])}.",
            )
        return spec

    def _usable(self, client: str) -> ClientRecord:
        record = self.client(client)
        if record.quarantined is not None:
            raise NonFiniteError(
                f"client {client}",
                expected="a usable update",
                got=f"one quarantined in round {self.number}: {ascii(record.quarantined)[:160]}",
                remedy="Leave it out; its effect is in the residual.",
            )
        return record

    def usable_shard(self, client: str) -> ShardRef:
        """A participant's shard. UnknownClientError, NonFiniteError of a quarantined one, LedgerError when pruned."""
        ref = self._usable(client).shard
        self.require_shards()
        return ref

    def require_shards(self) -> None:
        """LedgerError when the round was pruned."""
        if self.pruned:
            raise LedgerError(
                f"round {self.number}", expected="its shards", got="a pruned round", remedy="Use a full copy."
            )

    def _index(self, ref: ShardRef, client: str | None) -> ShardIndex:
        self.require_shards()
        index = self.cache.index(replace(ref, file=f"{folder(self.number)}/{ref.file}"))
        check_binding(index, self._manifest, self.base_hash, client)
        return index

    def stored(self, client: str, parameter: str) -> tuple[str, dict[str, Tensor]]:
        """Layout and parts as they lie in the shard (see protoken.ledger.codecs)."""
        return self._read(self._usable(client).shard, parameter, client)

    def _dense(self, ref: ShardRef, parameter: str, client: str | None) -> Tensor:
        layout, parts = self._read(ref, parameter, client)
        dense = codecs.decode(layout, parts)
        self.require_finite(parameter, dense)
        return dense

    def require_finite(self, parameter: str, *values: Tensor | LowRank) -> None:
        """LedgerFormatError when one of the values of a parameter, as read, holds NaN or infinity."""
        if not all(value.finite() if isinstance(value, LowRank) else is_finite(value) for value in values):
            raise LedgerFormatError(
                f"round {self.number}", expected=f"finite numbers in {parameter}", got="NaN or infinity"
            )

    def _read(self, ref: ShardRef, parameter: str, client: str | None) -> tuple[str, dict[str, Tensor]]:
        """The parts of one parameter, of the dtypes and shapes that its layout demands."""
        spec = self.spec(parameter)
        index = self._index(ref, client)
        layout = check_layout(index, parameter, spec)
        parts = {
            suffix: self.cache.tensor(index, parameter + suffix)
            for suffix in codecs.expected_parts(layout, spec.shape, index.file)
        }
        return layout, parts


def check_binding(index: ShardIndex, manifest: Manifest, base: str, client: str | None) -> None:
    """LedgerFormatError when a shard's header names another run, round, base or client."""
    wanted = {"run": manifest.run, "round": manifest.round, "base": base, "client": client}
    found = {key: index.info.get(key) for key in wanted}
    if found != wanted:
        raise LedgerFormatError(index.file, expected=f"a shard of {wanted}", got=ascii(found)[:300])


def check_layout(index: ShardIndex, parameter: str, spec: ParameterSpec) -> str:
    """The layout of a parameter in a shard, once its parts are known to have the dtypes and shapes it demands."""
    try:
        layout = index.info["layout"][parameter]
        wanted = codecs.expected_parts(layout, spec.shape, index.file)
        found = {suffix: index.entries[parameter + suffix] for suffix in wanted}
    except (KeyError, TypeError) as error:
        raise LedgerFormatError(index.file, expected=f"{parameter} in the shard", got="none") from error
    ranks: set[int] = set()
    for suffix, (dtypes, shape) in wanted.items():
        entry = found[suffix]
        same = len(entry.shape) == len(shape) and all(w in (-1, n) for w, n in zip(shape, entry.shape, strict=True))
        if entry.dtype not in dtypes or not same:
            raise LedgerFormatError(
                index.file,
                expected=f"{' or '.join(dtypes)} {shape} for {parameter}{suffix}",
                got=f"{entry.dtype} {entry.shape}",
            )
        ranks.update(n for w, n in zip(shape, entry.shape, strict=True) if w == -1)
    if len(ranks) > 1:
        raise LedgerFormatError(index.file, expected=f"one rank for {parameter}", got=sorted(ranks))
    return str(layout)


def add_weighted(total: Tensor, layout: str, parts: dict[str, Tensor], weight: float) -> None:
    """total += weight * delta, in place and in fp32, without making a low-rank delta dense."""
    if layout in ("lora", "lowrank"):
        add_factors(total, codecs.factors(parts), weight)
    else:
        total.add_(codecs.decode(layout, parts).float(), alpha=weight)


def add_factors(total: Tensor, factors: LowRank, weight: float) -> None:
    """total += weight * scale * b @ a, in place and in fp32."""
    # A hostile shard's scale may be any double: torch takes infinity for alpha, but no number between it and fp32.
    alpha = weight * factors.scale
    alpha = alpha if abs(alpha) <= LARGEST else math.inf
    if abs(alpha) <= USUAL:
        total.addmm_(factors.b.float(), factors.a.float(), alpha=alpha)
    else:  # which some machines' matmul multiplies into one factor first, where it may overflow
        total.add_(factors.b.float() @ factors.a.float(), alpha=alpha)


def relative(part: float, whole: float) -> float:
    """part / whole; 0 when both are 0."""
    if whole > 0:
        return part / whole
    return 0.0 if part == 0 else float("inf")


def folder(number: int) -> str:
    """Folder of a round inside the ledger."""
    return f"rounds/{number:08d}"
