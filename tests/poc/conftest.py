"""Rounds and proofs that the tests of poc share."""

import pytest

from assay import load_model
from assay.poc import Proof, Round, prove


@pytest.fixture(scope="session")
def round_() -> Round:
    return Round(block_hash="block_alpha", public_key="node_A", seq_len=16, model="small")


@pytest.fixture(scope="module")
def unhooked_model(small_checkpoint):
    """The small checkpoint for one file alone: a hook that another test left on a shared model
    changes the kernels.
    """
    return load_model(small_checkpoint, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def proof(small_model, round_: Round) -> Proof:
    return prove(small_model, round_, round_.nonces(0, 40), batch_size=8)
