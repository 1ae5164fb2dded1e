"""Updates that cannot be used but were aggregated: kept, flagged, and out of the way."""

from __future__ import annotations

import pytest
import torch
from ledger_cases import (
    NAMES,
    federation,
    parameters,
    small_ledger,
    updates,
)

from protoken.errors import NonFiniteError
from protoken.ledger import ClientUpdate, Ledger, LowRank
from protoken.ledger.verification import verify


def test_bad_update_that_was_aggregated_is_kept_flagged_and_out_of_the_way(tmp_path):
    ledger = small_ledger(tmp_path / "ledger", 0)
    base = parameters(0)
    states, mean = federation(base)
    bad = {**states["bob"], NAMES[0]: states["bob"][NAMES[0]].clone()}
    bad[NAMES[0]][2, 3] = float("nan")
    given = [ClientUpdate(u.client, u.weight, state=bad if u.client == "bob" else u.state) for u in updates(states)]
    with pytest.raises(NonFiniteError, match="on_bad='quarantine'"):
        ledger.commit_round(base, mean, given)
    committed = ledger.commit_round(base, mean, given, on_bad="quarantine")
    record = committed.client("bob")
    assert record.quarantined is not None
    assert "finite numbers" in record.quarantined
    assert record.weight == 0.3
    assert [c.client for c in committed.usable] == ["alice", "carol"]
    with pytest.raises(NonFiniteError, match="quarantined in round 1"):
        committed.delta("bob", NAMES[0])
    kept = committed.quarantined_tensor("bob", NAMES[0])
    assert torch.isnan(kept[2, 3])
    assert torch.equal(committed.delta("alice", NAMES[0]), states["alice"][NAMES[0]] - base[NAMES[0]])
    # its effect is owed to nobody: 0.3 of what bob did is the residual
    lost = 0.3 * (states["bob"][NAMES[1]] - base[NAMES[1]])
    torch.testing.assert_close(committed.residual(NAMES[1]), lost, rtol=0, atol=1e-6)
    assert verify(ledger.path, conservation=True).ok
    assert Ledger.open(ledger.path).round(1).client("bob").quarantined == record.quarantined


@pytest.mark.parametrize(
    "sent",
    [
        {NAMES[0]: torch.zeros(3, 3), NAMES[1]: torch.zeros(4)},
        {NAMES[0]: torch.zeros(6, 5)},
        {NAMES[0]: torch.zeros(6, 5), NAMES[1]: torch.zeros(4), "../../x": torch.zeros(1)},
        {},
        {NAMES[0]: LowRank(torch.zeros(2, 5), torch.full((6, 2), float("nan"))), NAMES[1]: torch.zeros(4)},
        {NAMES[0]: torch.zeros(6, 5, dtype=torch.complex64), NAMES[1]: [0.0] * 4},
    ],
    ids=["shape", "missing", "unknown name", "nothing", "NaN factors", "no tensors of numbers"],
)
def test_updates_bad_in_other_ways_are_quarantined_too(tmp_path, sent):
    ledger = small_ledger(tmp_path / "ledger", 0)
    base = parameters(0)
    with ledger.begin_round(base) as writer:
        writer.add(ClientUpdate("good", 0.5, delta={n: torch.zeros_like(base[n]) for n in NAMES}))
        record = writer.add(ClientUpdate("bad", 0.5, delta=sent), on_bad="quarantine")
        writer.commit(base)
    assert record.quarantined
    assert verify(ledger.path).ok
