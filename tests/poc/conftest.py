"""Rounds and proofs that the tests of poc share."""

import pytest

from assay.poc import Proof, Round, prove


@pytest.fixture(scope="session")
def round_() -> Round:
    return Round(block_hash="block_alpha", public_key="node_A", seq_len=16, model="small")


@pytest.fixture(scope="session")
def proof(small_model, round_: Round) -> Proof:
    return prove(small_model, round_, round_.nonces(0, 40), batch_size=8)
