"""Draws of many nodes in one batch give the records that each node's own proof has."""

import tomllib
from dataclasses import replace

import numpy as np
import pytest

from assay.cli.serve import RunSettings
from assay.errors import DataError, UsageError
from assay.models import load_model
from assay.poc import Input, NetworkPins, Proof, Round, calibrate_model, cheats, measure_frame
from assay.poc.net.deployment import Deployment
from assay.poc.protocol.pins_file import PinnedFile
from assay.poc.service import ServiceSettings
from assay.poc.validator.recomputer import recompute
from assay.poc.verdict.residuals import residuals
from tests.poc.service.conftest import Rig, Service
from tests.poc.validator.conftest import (
    BATCH,
    BLOCKS,
    HEIGHT,
    KEYS,
    NODE_COUNT,
    SEQ_LEN,
    body_of,
    pins_text,
    proof_of,
)
from tests.waiting import until
from tests.wordings import refuses


def inputs_of(wanted) -> list[Input]:
    """Every nonce of several rounds, one round after the other."""
    return [Input(round, nonce) for round, nonces in wanted for nonce in nonces]


def split(records, wanted) -> list[list]:
    """The records of each round."""
    rest = iter(records)
    return [[next(rest) for _ in nonces] for _, nonces in wanted]


@pytest.mark.parametrize("preset", ["poc-2.0", "artifact", "hardened"])
def test_records_are_those_of_prove_bit_for_bit(small_model, preset):
    strength = {"strength": 256} if preset == "hardened" else {}
    blocks = ("block_alpha", "block_beta")
    proofs = [
        proof_of(small_model, key, range(10), block=block, preset=preset, **strength)
        for block in blocks
        for key in KEYS
    ]
    wanted = [
        (proof.round, [record.nonce for record in proof.records][i::2])
        for i, proof in enumerate(proofs)
    ]
    batches = []
    deployment = Deployment.of(small_model, compiled=False)
    engine = deployment.engine(SEQ_LEN, BATCH)
    real = engine.embeddings
    engine.embeddings = lambda inputs: batches.append(len(inputs)) or real(inputs)
    try:
        found = split(recompute(deployment, BATCH, inputs_of(wanted)), wanted)
    finally:
        del engine.embeddings
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
    wanted = [(proof.round, nonces), (again, nonces[:3])]
    deployment = Deployment.of(small_model, compiled=False)
    one, two = split(recompute(deployment, BATCH, inputs_of(wanted)), wanted)
    assert [r.distance for r in one] == [r.distance for r in proof.records]
    assert [r.distance for r in two] == [r.distance for r in proof.records][:3]


PRESET = "decode-32"


def test_rows_of_many_nodes_are_replayed_together(small_model):
    proofs = [proof_of(small_model, key, range(10), preset=PRESET) for key in KEYS[:2]]
    wanted = [(proof.round, [record.nonce for record in proof.records]) for proof in proofs]
    received = [record for proof in proofs for record in proof.records]
    deployment = Deployment.of(small_model, compiled=False)
    found = split(recompute(deployment, BATCH, inputs_of(wanted), received), wanted)
    for proof, records in zip(proofs, found, strict=True):
        assert all(record.tokens is not None and record.margins is not None for record in records)
        assert [r.tokens.tobytes() for r in records] == [r.tokens.tobytes() for r in proof.records]
        assert residuals(proof.records, records).max() < 2e-3


@pytest.mark.slow
def test_honest_nodes_and_liars_before_a_validator(validating, small_model):
    with validating(preset=PRESET) as running:
        honest = proof_of(small_model, "node_A", range(40), preset=PRESET)
        running.send(body_of(honest))
        for block, height in BLOCKS.items():
            running.announce(block, height)
            about = {"preset": PRESET, "block": block, "block_height": height}
            theirs = proof_of(small_model, "node_B", range(70), **about)
            rolled = [
                replace(record, tokens=np.roll(record.tokens, 1)) for record in theirs.records
            ]
            running.send(body_of(Proof.build(theirs.header, rolled, 1.0)))
            broken = body_of(proof_of(small_model, "node_C", range(70), **about))
            for artifact in broken["artifacts"]:
                artifact["vector_b64"] = "/" * len(artifact["vector_b64"])  # NaN in every place
            running.send(broken)
        until(lambda: [running.verdict(key) for key in KEYS] == ["honest", "fraud", "fraud"])
        wrong = body_of(honest)
        wrong["encoding"]["tokens"] = 64
        running.send(wrong, status=422)


@pytest.mark.slow
def test_files_of_a_frame_lead_from_a_service_to_a_verdict(
    validating, small_checkpoint, small_model, tmp_path
):
    """Frame, law and pins are files; nodes serve under them, and a validator judges what they hand
    in.
    """
    measure_frame(small_model).save(tmp_path / "frame")
    shape = {"preset": "tokens-1", "seq_len": SEQ_LEN, "formats": ("bfloat16", "float32")}
    with refuses(UsageError, "files of a frame lead from a service to a verdict"):
        calibrate_model(str(small_checkpoint), **shape, device="cpu")
    law = calibrate_model(str(small_checkpoint), **shape, device="cpu", frame=tmp_path / "frame")
    law.save(tmp_path / "law.json")
    pinned = {name: PinnedFile.of(tmp_path / name, tmp_path) for name in ("frame", "law.json")}
    tables = [f'file = "{one.file}"\nsha256 = "{one.sha256}"\n' for one in pinned.values()]
    text = pins_text(small_model, preset="tokens-1").replace('"float32"', '"bfloat16"')
    with refuses(DataError, "files of a frame lead from a service to a verdict, 2"):
        NetworkPins.of(tomllib.loads(text), tmp_path / "pins.toml")
    text = text.replace("[[models.builds]]", f"[models.frame]\n{tables[0]}[[models.builds]]")
    with validating(pins=text) as running:
        running.wait_ready()
        (law,) = running.controller.snapshot()["laws"]
        assert f"--preset tokens-1 --frame {tmp_path}" in law["missing"], "the pinned one"
    text += f"[[models.calibrations]]\n{tables[1]}"
    pins = NetworkPins.of(tomllib.loads(text), tmp_path / "pins.toml")
    model = load_model(small_checkpoint, device="cpu", dtype="bfloat16").with_frame(
        pins.frame(small_model.digest)
    )
    with validating(pins=text) as running:
        running.close()
        running.load = lambda: RunSettings(
            model=str(small_checkpoint), device="cpu", dtype="float32"
        ).deploy(pins)
        running.start()
        running.announce("block_beta", HEIGHT + 1)
        for key, ran in (("node_A", model), ("node_B", cheats.rounded(model, 4))):
            for block, height in BLOCKS.items():
                running.send(
                    artifacts_of(ran, key, pins, tmp_path / f"{key} {block}", block, height)
                )
        until(lambda: [running.verdict(key) for key in KEYS[:2]] == ["honest", "fraud"])


def artifacts_of(model, key, pins, folder, block, height):
    """Return what a service of a node answers to a job of the network's round, as the callback that
    it sends.
    """
    node = Rig()
    node.deployment = lambda: Deployment.of(model, compiled=False)
    service = Service(node, ServiceSettings(data_dir=folder, seq_len=SEQ_LEN, pins=pins))
    try:
        service.wait_ready()
        params = {"model": model.reference, "seq_len": SEQ_LEN, "k_dim": 32, "preset": "tokens-1"}
        body = {
            "block_hash": block,
            "block_height": height,
            "public_key": key,
            "node_id": KEYS.index(key),
        }
        nonces = list(range(KEYS.index(key), 64 * NODE_COUNT, NODE_COUNT))
        job = {
            "node_count": NODE_COUNT,
            "batch_size": BATCH,
            "params": params,
            "nonces": nonces,
            "wait": True,
        }
        answer = service.post("/generate", body | job)
        return body | {name: answer[name] for name in ("artifacts", "encoding")}
    finally:
        service.close()
