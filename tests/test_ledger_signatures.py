"""Signatures: who said what, for which round of which run; and every byte of a signed ledger counts."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from ledger_cases import NAMES, WEIGHTS, federation, forge_manifest, parameters

from protoken.errors import ArgumentError, SignatureError
from protoken.ledger import ClientUpdate, Ledger
from protoken.ledger.files import FileLayer
from protoken.ledger.signatures import generate_key, public_key, sign_update
from protoken.ledger.verification import verify

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SERVER = bytes(range(32))
KEYS = {client: bytes([i]) * 32 for i, client in enumerate(WEIGHTS)}
CASES = float(os.environ.get("PROTOKEN_FUZZ_CASES", "1"))


def signed_updates(base, states, *, run="run-1", number=1, codec="fp32", keys=KEYS):
    return [
        sign_update(
            keys[c], ClientUpdate(c, WEIGHTS[c], state=states[c]), run=run, round=number, base=base, codec=codec
        )
        for c in states
    ]


def signed_ledger(path: Path, rounds: int = 1) -> Ledger:
    ledger = Ledger.create(path, run="run-1", signing_key=SERVER, files=FileLayer(path, sync=False))
    base = parameters(0)
    for number in range(1, rounds + 1):
        states, mean = federation(base, number * 10)
        ledger.commit_round(base, mean, signed_updates(base, states, number=number))
        base = mean
    return ledger


def test_signed_ledger_verifies_against_the_keys_and_not_against_others(tmp_path):
    ledger = signed_ledger(tmp_path / "ledger", 2)
    server, clients = public_key(SERVER), {c: public_key(k) for c, k in KEYS.items()}
    assert Ledger.open(ledger.path, server_key=server).round(2).client("bob").key == clients["bob"].hex()
    report = verify(ledger.path, server_key=server, client_keys=clients, pinned=str(ledger.head))
    assert (report.ok, report.signed, report.rounds) == (True, 2, 2)
    other = public_key(generate_key())
    with pytest.raises(SignatureError, match="expected a ledger of"):
        Ledger.open(ledger.path, server_key=other)
    problems = verify(ledger.path, client_keys={**clients, "bob": other}).problems
    assert {p.where for p in problems} == {"round 1, client bob", "round 2, client bob"}


def test_unsigned_client_is_a_problem_only_where_a_signature_is_expected(tmp_path):
    path = tmp_path / "ledger"
    ledger = Ledger.create(path, run="run-1", files=FileLayer(path, sync=False))
    base = parameters(0)
    states, mean = federation(base)
    ledger.commit_round(base, mean, [ClientUpdate(c, w, state=states[c]) for c, w in WEIGHTS.items()])
    assert verify(path).ok
    assert not verify(path, client_keys={"bob": public_key(KEYS["bob"])}).ok
    assert not verify(path, server_key=public_key(SERVER)).ok


@pytest.mark.parametrize(
    "wrong", [{"run": "run-2"}, {"number": 2}, {"codec": "bf16"}, {"base": True}], ids=["run", "round", "codec", "base"]
)
def test_signature_for_another_run_round_codec_or_base_is_refused(tmp_path, wrong):
    path = tmp_path / "ledger"
    ledger = Ledger.create(path, run="run-1", files=FileLayer(path, sync=False))
    base = parameters(0)
    states, mean = federation(base)
    if wrong.pop("base", False):
        given = signed_updates(parameters(5), states)
    else:
        given = signed_updates(base, states, **wrong)
    with pytest.raises(SignatureError, match="signature of alice"):
        ledger.commit_round(base, mean, given)
    assert Ledger.open(path).rounds == ()


def test_replayed_or_borrowed_signature_and_changed_update_are_refused(tmp_path):
    ledger = signed_ledger(tmp_path / "ledger")
    base = parameters(0)
    states, _ = federation(base, 10)
    old = signed_updates(base, states)
    _, mean = federation(base, 10)
    later, newer = federation(mean, 20)
    fresh = signed_updates(mean, later, number=2)
    borrowed = ClientUpdate("alice", 0.5, state=later["alice"], key=fresh[1].key, signature=fresh[1].signature)
    half = ClientUpdate("alice", 0.5, state=later["alice"], key=fresh[0].key)
    clipped = {n: mean[n] + 0.5 * (later["alice"][n] - mean[n]) for n in NAMES}
    changed = ClientUpdate("alice", 0.5, state=clipped, key=fresh[0].key, signature=fresh[0].signature)
    replayed = ClientUpdate(
        "alice", 0.5, delta={n: states["alice"][n] - base[n] for n in NAMES}, key=old[0].key, signature=old[0].signature
    )
    for bad in (borrowed, half, changed, replayed):
        with pytest.raises(SignatureError, match="signature of alice"):
            ledger.commit_round(mean, newer, [bad, *fresh[1:]])
    assert ledger.commit_round(mean, newer, fresh).number == 2


def test_client_that_changes_its_key_is_found(tmp_path):
    ledger = signed_ledger(tmp_path / "ledger")
    _, mean = federation(parameters(0), 10)
    states, newer = federation(mean, 20)
    ledger.commit_round(mean, newer, signed_updates(mean, states, number=2, keys={**KEYS, "bob": generate_key()}))
    problems = verify(ledger.path).problems
    assert [p.where for p in problems] == ["round 1, client bob"]
    assert isinstance(problems[0].error, SignatureError)


def test_writing_a_signed_ledger_needs_its_key(tmp_path):
    ledger = signed_ledger(tmp_path / "ledger")
    _, mean = federation(parameters(0), 10)
    states, newer = federation(mean, 20)
    given = signed_updates(mean, states, number=2)
    with pytest.raises(SignatureError, match="expected the server's key, got none"):
        Ledger.open(ledger.path).commit_round(mean, newer, given)
    with pytest.raises(SignatureError, match="signing_key"):
        Ledger.open(ledger.path, signing_key=generate_key())
    with pytest.raises(ArgumentError, match="an Ed25519PrivateKey or its 32 bytes"):
        Ledger.open(ledger.path, signing_key="secret")
    again = Ledger.open(ledger.path, signing_key=SERVER)
    assert again.refresh().commit_round(mean, newer, given).number == 2
    assert verify(ledger.path, server_key=public_key(SERVER)).ok


def test_a_signed_ledger_without_rounds_shows_its_servers_key(tmp_path):
    ledger = signed_ledger(tmp_path / "ledger", 0)
    assert Ledger.open(ledger.path, server_key=public_key(SERVER)).rounds == ()
    with pytest.raises(SignatureError, match="server_key: expected a ledger of"):
        Ledger.open(ledger.path, server_key=public_key(generate_key()))


def test_a_key_of_the_cryptography_package_is_its_32_bytes(tmp_path):
    key = Ed25519PrivateKey.from_private_bytes(SERVER)
    ledger = Ledger.create(tmp_path / "ledger", signing_key=key, files=FileLayer(tmp_path / "ledger", sync=False))
    states, mean = federation(parameters(0), 10)
    ledger.commit_round(parameters(0), mean, [ClientUpdate(c, w, state=states[c]) for c, w in WEIGHTS.items()])
    assert verify(ledger.path, server_key=public_key(SERVER)).signed == 1


def test_without_the_cryptography_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    ledger = signed_ledger(tmp_path / "ledger")
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    with pytest.raises(SignatureError, match=r"pip install 'protoken\[signatures\]'"):
        generate_key()
    assert Ledger.open(ledger.path).rounds == (1,)  # reading needs no signatures


def test_consistent_forgery_without_the_key_is_found(tmp_path):
    """All hashes fit; only the signature does not."""
    ledger = signed_ledger(tmp_path / "ledger")
    forge_manifest(Path(ledger.path), lambda manifest: manifest["metadata"].update(paid="mallory"))
    assert Ledger.open(ledger.path).round(1).metadata == {"paid": "mallory"}
    with pytest.raises(SignatureError, match=r"manifest\.sig"):
        Ledger.open(ledger.path, server_key=public_key(SERVER))
    assert not verify(ledger.path).ok
    (Path(ledger.path) / "rounds/00000001/manifest.sig").unlink()
    with pytest.raises(SignatureError, match="the server's signature, got nothing there"):
        Ledger.open(ledger.path, server_key=public_key(SERVER))


def test_every_flipped_byte_of_a_small_signed_ledger_is_detected(tmp_path):
    path = tmp_path / "ledger"
    ledger = Ledger.create(path, run="r", signing_key=SERVER, files=FileLayer(path, sync=False))
    base, state = {"w": torch.zeros(1, 2)}, {"w": torch.ones(1, 2)}
    update = sign_update(KEYS["alice"], ClientUpdate("a", 1.0, state=state), run="r", round=1, base=base)
    ledger.commit_round(base, state, [update])
    keys = {"server_key": public_key(SERVER), "pinned": str(ledger.head), "workers": 1}
    assert verify(path, **keys).ok
    missed, flips = [], 0
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        data = file.read_bytes()
        for at in range(len(data)):
            changed = bytearray(data)
            changed[at] ^= 1 << (at % 8)
            file.write_bytes(changed)
            flips += 1
            if verify(path, **keys).ok:
                missed.append((file.name, at))
        file.write_bytes(data)
    assert flips > 2000
    assert missed == []
    assert verify(path, **keys).ok


def test_removed_or_added_files_are_detected(tmp_path):
    ledger = signed_ledger(tmp_path / "ledger", 2)
    for file in sorted(p for p in Path(ledger.path).rglob("*") if p.is_file() and p.name != "lock"):
        data = file.read_bytes()
        file.unlink()
        assert not verify(ledger.path, server_key=public_key(SERVER)).ok, file
        file.write_bytes(data)
    extra = Path(ledger.path) / "rounds/00000001/clients/000009.safetensors"
    shutil.copyfile(Path(ledger.path) / "rounds/00000001/clients/000001.safetensors", extra)
    assert [p.where for p in verify(ledger.path).problems] == ["round 1"]


def test_signature_file_of_another_form_is_a_signature_error(tmp_path):
    ledger = signed_ledger(tmp_path / "ledger")
    place = Path(ledger.path) / "rounds/00000001/manifest.sig"
    for text in (b"", b"zz" * 64 + b"\n", place.read_bytes().upper(), json.dumps({"x": 1}).encode(), b"\xff" * 129):
        place.write_bytes(text)
        with pytest.raises(SignatureError):
            Ledger.open(ledger.path, server_key=public_key(SERVER))
