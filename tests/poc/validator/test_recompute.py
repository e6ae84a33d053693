"""Draws of many nodes in one batch give the records that each node's own proof has."""

from dataclasses import replace

import numpy as np
import pytest

from assay.poc import Proof, Round, TokenRecord
from assay.poc.net.deployment import Deployment
from assay.poc.validator.worker import recompute
from assay.poc.verdict.judge import residuals
from tests.poc.validator.conftest import BATCH, KEYS, SEQ_LEN, body_of, proof_of
from tests.waiting import until


@pytest.mark.parametrize("preset", ["poc-2.0", "artifact", "hardened"])
def test_records_are_those_of_prove_bit_for_bit(small_model, preset):
    strength = {"strength": 256} if preset == "hardened" else {}
    blocks = ("block_alpha", "block_beta")
    proofs = [
        proof_of(small_model, key, range(10), block=block, preset=preset, **strength)
        for block in blocks
        for key in KEYS
    ]
    wanted = [(proof.round, [record.nonce for record in proof.records][i::2]) for i, proof in enumerate(proofs)]
    batches = []
    deployment = Deployment.of(small_model, compiled=False)
    engine = deployment.engine(SEQ_LEN, BATCH)
    real = engine.inputs
    engine.inputs = lambda round, nonces: batches.append(len(nonces)) or real(round, nonces)
    try:
        found = recompute(deployment, BATCH, wanted)
    finally:
        del engine.inputs
    for proof, (_, nonces), records in zip(proofs, wanted, found, strict=True):
        own = {record.nonce: record for record in proof.records}
        for nonce, record in zip(nonces, records, strict=True):
            if record.vector is None:
                assert record.distance == own[nonce].distance
            else:
                assert record.vector.tobytes() == own[nonce].vector.tobytes()
    total = sum(len(nonces) for _, nonces in wanted)
    alone = sum(-(-len(nonces) // BATCH) for _, nonces in wanted)
    assert len(batches) < alone
    assert len(batches) <= -(-total // BATCH) + (len(blocks) - 1) * (preset == "poc-2.0")


def test_one_round_may_stand_there_twice(small_model):
    proof = proof_of(small_model, "node_A", range(10))
    again = Round(**proof.round.as_dict())
    nonces = [record.nonce for record in proof.records]
    one, two = recompute(
        Deployment.of(small_model, compiled=False), BATCH, [(proof.round, nonces), (again, nonces[:3])]
    )
    assert [r.distance for r in one] == [r.distance for r in proof.records]
    assert [r.distance for r in two] == [r.distance for r in proof.records][:3]


PRESET = "decode-32"


def test_rows_of_many_nodes_are_replayed_together(small_model):
    proofs = [proof_of(small_model, key, range(10), preset=PRESET) for key in KEYS[:2]]
    wanted = [(proof.round, [record.nonce for record in proof.records]) for proof in proofs]
    found = recompute(Deployment.of(small_model, compiled=False), BATCH, wanted, [p.records for p in proofs])
    for proof, records in zip(proofs, found, strict=True):
        assert all(isinstance(record, TokenRecord) and record.margins is not None for record in records)
        assert [r.tokens.tobytes() for r in records] == [r.tokens.tobytes() for r in proof.records]
        assert residuals(proof.records, records).max() < 2e-3


def test_honest_nodes_and_liars_before_a_validator(validating, small_model):
    with validating(preset=PRESET) as running:
        honest = proof_of(small_model, "node_A", range(40), preset=PRESET)
        theirs = proof_of(small_model, "node_B", range(40), preset=PRESET)
        rolled = [replace(record, tokens=np.roll(record.tokens, 1)) for record in theirs.records]
        guessed = Proof.build(theirs.header, rolled, 1.0)
        running.send(body_of(honest))
        running.send(body_of(guessed))
        broken = body_of(proof_of(small_model, "node_C", range(40), preset=PRESET))
        for artifact in broken["artifacts"]:
            artifact["vector_b64"] = "/" * len(artifact["vector_b64"])  # NaN in every place
        running.send(broken)
        until(lambda: [running.verdict(key) for key in KEYS] == ["honest", "fraud", "fraud"])
        wrong = body_of(honest)
        wrong["encoding"]["tokens"] = 64
        running.send(wrong, status=422)
