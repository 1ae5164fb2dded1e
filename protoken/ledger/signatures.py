"""Optional Ed25519 signatures of server and clients (package cryptography, extra "signatures").

What is signed is canonical JSON, so that a signature holds for one purpose, run, round and base only:

    client   {"purpose": "protoken client update 1", "shard": hash of the client's shard}
             whose header names run, round, base hash and client (see protoken.ledger.shards)
    server   {"manifest": hash of the round's manifest, "purpose": "protoken round 1", "round", "run"}

The server's public key stands in ledger.json, a client's beside its signature; a reader pins the keys it trusts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from protoken.errors import ArgumentError, SignatureError
from protoken.ledger import manifest as m
from protoken.ledger import names, strictjson
from protoken.ledger.codecs import check_codec, encode
from protoken.ledger.composing import shard_content
from protoken.ledger.rounds import folder
from protoken.ledger.shards import encode_shard
from protoken.ledger.tensors import parameter_digest
from protoken.ledger.updates import ClientUpdate, Value, check_base, check_update, deltas_of

if TYPE_CHECKING:
    from protoken.ledger.ledger import Ledger

# An Ed25519PrivateKey of cryptography, or its 32 raw bytes.
SigningKey = Any
SIGNATURE_FILE_BYTES = 129


def generate_key() -> bytes:
    """A new private key, 32 bytes. Keep it secret."""
    return bytes(_ed25519().Ed25519PrivateKey.generate().private_bytes_raw())


def public_key(key: SigningKey) -> bytes:
    """The 32 bytes that may be shown to everybody."""
    return bytes(_private(key).public_key().public_bytes_raw())


def key_hex(argument: str, key: bytes | str) -> str:
    """A public key as the ledger writes it: 64 hex digits in lower case. ArgumentError for what is none."""
    text = key.lower() if isinstance(key, str) else bytes(key).hex() if isinstance(key, bytes | bytearray) else ""
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise ArgumentError(argument, expected="an Ed25519 public key, 32 bytes or 64 hex digits", got=ascii(key)[:80])
    return text


def public_hex(key: SigningKey) -> str:
    return public_key(key).hex()


def sign_update(
    key: SigningKey,
    update: ClientUpdate,
    *,
    run: str,
    round: int,
    base: Mapping[str, Value],
    codec: str = "fp32",
) -> ClientUpdate:
    """The client's side: the same update with its key and signature.

    Encodes the update exactly as the server will record it. If the server clips or changes it afterwards the
    signature no longer fits, and the round has to record the changed update unsigned.
    """
    check_update("update", update)
    base = check_base(base)
    stored = {name: encode(check_codec(codec), value) for name, value in deltas_of(update, base).items()}
    base_hash = m.base_hash({name: parameter_digest(value) for name, value in base.items()})
    binding = {"run": names.check_run(run), "round": round, "base": base_hash, "client": update.client}
    header, _ = encode_shard(*shard_content(stored, binding))
    signature = bytes(_private(key).sign(_client_message(m.sha256(header))))
    return ClientUpdate(
        update.client,
        update.weight,
        delta=update.delta,
        state=update.state,
        examples=update.examples,
        key=public_key(key),
        signature=signature,
    )


def check_client(update: ClientUpdate, shard: str) -> tuple[str, str]:
    """Key and signature in hex, once the signature fits the shard's hash. SignatureError otherwise."""
    if update.key is None or update.signature is None:
        raise SignatureError(f"signature of {update.client}", expected="key and signature", got="only one of them")
    key, signature = bytes(update.key).hex(), bytes(update.signature).hex()
    verify_client(update.client, key, signature, shard)
    return key, signature


def verify_client(client: str, key: str, signature: str, shard: str) -> None:
    """SignatureError unless the client's key signed this shard's hash."""
    _verify(f"signature of {client}", key, signature, _client_message(shard))


def server_signer(key: SigningKey) -> Callable[[m.Head], bytes]:
    """What the writer calls to sign a round: the content of manifest.sig, 128 hex digits and a newline."""
    private = _private(key)
    return lambda head: private.sign(_server_message(head)).hex().encode("ascii") + b"\n"


def verify_server(ledger: Ledger, number: int, server_key: str) -> None:
    """SignatureError unless manifest.sig of a round is the server's signature of its manifest."""
    name = f"{folder(number)}/manifest.sig"
    if not ledger.files.exists(name):
        raise SignatureError(name, expected="the server's signature", got="nothing there")
    data = ledger.files.read(name, SIGNATURE_FILE_BYTES)
    text = data.decode("ascii", "replace")
    if len(text) != SIGNATURE_FILE_BYTES or text[-1] != "\n" or not set(text[:-1]) <= set("0123456789abcdef"):
        raise SignatureError(name, expected="128 hex digits and a newline", got=ascii(text)[:60])
    _verify(name, server_key, text[:-1], _server_message(m.Head(ledger.run, number, ledger.hash_of(number))))


def require_server(ledger: Ledger, server_key: bytes | str) -> None:
    """SignatureError unless the head is signed by this key; the hash chain then covers all earlier rounds.

    A ledger without rounds has nothing that could be signed: then only the key in ledger.json is compared.
    """
    wanted = key_hex("server_key", server_key)
    if ledger.genesis.server_key != wanted:
        raise SignatureError("server_key", expected=f"a ledger of {wanted}", got=ledger.genesis.server_key)
    if ledger.head.round:
        verify_server(ledger, ledger.head.round, wanted)


def _client_message(shard: str) -> bytes:
    return strictjson.dump({"purpose": "protoken client update 1", "shard": shard})


def _server_message(head: m.Head) -> bytes:
    return strictjson.dump(
        {"purpose": "protoken round 1", "run": head.run, "round": head.round, "manifest": head.sha256}
    )


def _verify(argument: str, key: str, signature: str, message: bytes) -> None:
    from cryptography.exceptions import InvalidSignature

    try:
        _ed25519().Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError) as error:
        raise SignatureError(argument, expected=f"a signature by {key[:16]}...", got="one that does not fit") from error


def _private(key: SigningKey) -> Any:
    module = _ed25519()
    if isinstance(key, module.Ed25519PrivateKey):
        return key
    if isinstance(key, bytes) and len(key) == 32:
        return module.Ed25519PrivateKey.from_private_bytes(key)
    raise ArgumentError("signing_key", expected="an Ed25519PrivateKey or its 32 bytes", got=type(key).__name__)


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise SignatureError(
            "cryptography", expected="the package", got="none", remedy="pip install 'protoken[signatures]'"
        ) from error
    return ed25519
