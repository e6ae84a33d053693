"""Ledgers of several validators: one decision, valid however much they saw of the same."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from assay_research.ledger_merge import StoppedLife, log_mean, merge_ledgers

from assay.errors import DataError, UsageError
from assay.poc import Noise
from assay.poc.verdict import Ledger
from assay.stats import LogNoise
from tests.poc.verdict import test_response_noise as responses
from tests.poc.verdict.ledgers import account, filled, honest, update
from tests.poc.verdict.test_life import drawn

LAW = LogNoise(-3.0, 0.5, 12)


def ledger_of(path: Path, audits: dict[str, list[list[float]]]) -> Path:
    """A ledger with audits of some nodes, in rounds that are numbered."""
    with Ledger(path) as ledger:
        for key, found in audits.items():
            ledger.append([update(seed, key=key, residuals=residuals) for seed, residuals in enumerate(found)])
    return path


def test_ledgers_and_exports_decide_together(tmp_path):
    good = [honest(8, seed) for seed in range(12)]
    bad = [[1.0] * 8 for _ in range(2)]
    one = ledger_of(tmp_path / "one.sqlite3", {"node_A": good, "node_B": bad})
    other = ledger_of(tmp_path / "other.sqlite3", {"node_A": good[:9], "node_C": good[:1]})
    with Ledger(other, read_only=True) as ledger:
        ledger.export(tmp_path / "other.jsonl")
        third = ledger.standing(account("node_C"))
    merged = merge_ledgers([one, tmp_path / "other.jsonl"])
    assert [(found.account.public_key, found.verdict) for found in merged] == [
        ("node_A", "honest"),
        ("node_B", "fraud"),
        ("node_C", "undecided"),
    ]
    assert [[share.n for share in found.shares] for found in merged] == [[96, 72], [16, 0], [0, 8]]
    b, c = merged[1:]
    assert b.log_e_value == pytest.approx(b.shares[0].log_e_value - math.log(2))  # the other one says nothing: 1
    assert c.log_e_value == pytest.approx(math.log((1 + math.exp(third.evidence.log_e_value)) / 2))
    assert merge_ledgers([other, one])[0].log_e_value == pytest.approx(merged[0].log_e_value)


def test_evidence_once_found_is_not_lost_while_others_catch_up(tmp_path):
    """A node is suspected in one ledger, and looks good in audits after that."""
    audits = [[1.0] * 8, *([x / 4 for x in honest(8, seed)] for seed in range(60))]
    one = ledger_of(tmp_path / "one.sqlite3", {"node_A": audits})
    other = ledger_of(tmp_path / "other.sqlite3", {"node_A": [honest(8)]})
    with Ledger(one, read_only=True) as ledger:
        standing = ledger.standing(account())
    (merged,) = merge_ledgers([one, other])
    assert merged.verdict == "fraud"
    assert merged.log_e_value > standing.evidence.log_e_value


def test_responses_are_merged_beside_nonces(tmp_path):
    path, other = tmp_path / "one.sqlite3", tmp_path / "other.sqlite3"
    with Ledger(path) as ledger:
        ledger.append([update(seed, residuals=honest(16, seed)) for seed in range(12)])
    with Ledger(other) as ledger:
        ledger.append([responses.update(9, responses.response(9, multiple=30.0), key="node_B")])
    nonces, of_responses = merge_ledgers([path, other])
    assert (nonces.verdict, nonces.shares[0].n) == ("honest", 192)
    assert (of_responses.verdict, of_responses.account.preset) == ("fraud", "responses")


def test_what_cannot_be_merged_is_refused(tmp_path):
    one, other = filled(tmp_path / "one.sqlite3", 3), filled(tmp_path / "other.sqlite3", 3)
    copy = Path(shutil.copy(one, tmp_path / "copy.sqlite3"))
    with pytest.raises(UsageError, match="which are one ledger"):
        merge_ledgers([one, other, copy])
    with pytest.raises(UsageError, match="0 ledgers"):
        merge_ledgers([])
    Ledger(tmp_path / "strict.sqlite3", alpha=1e-5).close()
    with pytest.raises(UsageError, match=r"alpha 1e-05 and 0\.001"):
        merge_ledgers([one, tmp_path / "strict.sqlite3"])
    assert len(merge_ledgers([one, tmp_path / "strict.sqlite3"], alpha=1e-4)) == 3
    with pytest.raises(UsageError, match="--alpha 1"):
        merge_ledgers([one], alpha=1.0)
    with Ledger(other, read_only=True) as ledger:
        ledger.export(tmp_path / "other.jsonl")
    lines = (tmp_path / "other.jsonl").read_text().splitlines()
    values = json.loads(lines[-2])
    values["residuals"][0] = 0.5
    (tmp_path / "other.jsonl").write_text(
        "\n".join([*lines[:-2], json.dumps(values, separators=(",", ":")), lines[-1]])
    )
    with pytest.raises(DataError, match="entry 3"):
        merge_ledgers([one, tmp_path / "other.jsonl"])


def test_the_average_is_that_of_the_numbers():
    values = [0.5, 20.0, 3.0]
    assert log_mean([math.log(x) for x in values]) == pytest.approx(math.log(np.mean(values)))
    assert log_mean([-2000.0, 900.0]) == pytest.approx(900 - math.log(2))


@pytest.mark.parametrize("shared", [1.0, 0.5])
def test_an_honest_node_is_accused_with_chance_alpha_at_most(shared):
    """Validators of whom each saw a share of the same residuals; with all of them, the product accuses far more."""
    rng = np.random.default_rng(3)
    nodes, validators, alpha, checked = 250, 3, 0.1, 48
    noise = Noise(LAW, "the law itself")
    accused = multiplied = 0
    for _ in range(nodes):
        same = drawn(LAW, (checked,), rng)
        logs = []
        for _ in range(validators):
            own = drawn(LAW, (checked,), rng)
            values = np.where(np.arange(checked) < shared * checked, same, own)
            life = StoppedLife(alpha=alpha, beta=0.01, ledgers=validators)
            for part in np.split(values, 3):
                life.update(noise, part)
            logs.append(life.stopped[0])
        accused += log_mean(logs) >= -math.log(alpha)
        multiplied += sum(logs) >= -math.log(alpha)
    assert accused / nodes <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / nodes)
    if shared == 1.0:
        assert multiplied > 1.2 * accused
