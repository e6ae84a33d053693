"""Two real servers: the callbacks of a prover are validated by another."""

from pathlib import Path

import pytest

from tests.end_to_end.receiver import FlakyReceiver
from tests.poc.service.conftest import ROUND as SERVICE_ROUND
from tests.waiting import until

ROUND = SERVICE_ROUND | {"block_hash": "block_beta", "block_height": 12, "batch_size": 16, "seq_len": 16}
WANTED = 48


@pytest.fixture(scope="module")
def int4_checkpoint(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint with its linear weights rounded to four bits."""
    from assay.models import load_model
    from assay.poc.cheats import rounded

    path = tmp_path_factory.mktemp("int4") / "small"
    rounded(load_model(small_checkpoint, dtype="float32", device="cpu")).module.save_pretrained(path)
    return path


def _prove(server, receiver: FlakyReceiver) -> list[dict]:
    server.post("/init/generate", ROUND | {"callback_url": receiver.url})
    until(lambda: len(receiver.nonces()) >= WANTED, 60, said=lambda: server.log.read_text()[-2000:])
    server.post("/stop")
    return list(receiver.taken.values())


def _validate(server, batches: list[dict]) -> list[dict]:
    fields = ("public_key", "block_hash", "block_height", "nonces", "dist", "node_id")
    return [server.post("/validate", {name: batch[name] for name in fields}) for batch in batches]


@pytest.mark.slow
def test_a_cheating_prover_is_flagged_and_an_honest_one_is_not(launch, int4_checkpoint):
    validator = launch(name="validator")
    honest = launch("--callback-interval", "0.2", name="honest")
    cheat = launch("--callback-interval", "0.2", name="cheat", model=int4_checkpoint)
    receivers = [FlakyReceiver(trouble=0.3, patience=0.2, seed=seed) for seed in (1, 2)]
    try:
        mine, theirs = (_prove(s, r) for s, r in zip((honest, cheat), receivers, strict=True))
        # A validator has a key of its own and judges the nodes of the round, each by the node's key.
        validator.post("/init/validate", ROUND | {"public_key": "validator", "callback_url": receivers[0].url})
        for answer in _validate(validator, mine):
            assert not answer["fraud_detected"]
            assert answer["n_invalid"] == 0
            assert answer["residual_test"]["verdict"] != "fraud"
        assert answer["residual_test"]["verdict"] == "honest"
        assert answer["residual_test"]["checked"] >= WANTED
        # Both proved as node_A, and that key was judged honest here: the cheater is judged by another validator.
        validator.post("/init/validate", ROUND | {"public_key": "second validator"})
        last = _validate(validator, theirs)[-1]
        # fraud_detected is the published rule's word; so few flips may escape it, and the residuals do not.
        assert last["residual_test"]["verdict"] == "fraud"
    finally:
        for receiver in receivers:
            receiver.close()
