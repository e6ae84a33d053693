"""Whatever a prover can write into a proof is refused by name under the pins of its network, or
changes no verdict.

The table holds every field of a proof but its records. A field that is added to a header without a
decision here is an error.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from assay.errors import AssayError
from assay.files.jsonl import dumps
from assay.models import Model
from assay.poc import (
    PIPELINES,
    Build,
    Fingerprint,
    Header,
    NetworkPins,
    Pins,
    Pipeline,
    Proof,
    Round,
    check_proof,
    prove,
    verify,
)
from assay.poc.protocol.pins import describe_build
from assay.poc.protocol.pins_file import BUILD_FIELDS
from tests.wordings import refuses

KNOWN = {"block_hash": "block_alpha", "public_key": "node_A"}
ROUND = {"preset": "poc-2.0", "seq_len": 16, "strength": 256, "r_target": 1.416, "node_count": 1}
FREE = dict.fromkeys(
    ("device", "attention", "batch_size", "threads", "torch", "library", "kernels"), "*"
)


@dataclass(frozen=True)
class Lie:
    """What a prover writes, and what comes of it.

    ``read`` has words of the refusal when the file is read; ``pinned`` the name by which the pins
    refuse it; neither means that the verdict stays the same.
    """

    changed: dict[str, Any]
    read: str = ""
    pinned: str = ""


def pipeline_of(preset: str) -> dict[str, Any]:
    return {
        f"pipeline.{name}": value
        for name, value in json.loads(dumps(PIPELINES[preset].as_dict())).items()
    }


LIES = {
    "kind": Lie({"kind": "assay.poc.other"}, read="kind"),
    "schema": Lie({"schema": 2}, read="schema is 2"),
    "round.block_hash": Lie({"round.block_hash": "block_beta"}, pinned="block_hash"),
    "round.public_key": Lie({"round.public_key": "node_B"}, pinned="public_key"),
    "round.block_height": Lie({"round.block_height": 10**6}),  # part of no seed
    "round.node_id": Lie(
        {"round.node_id": 1, "round.node_count": 2, "nonces": [[1, 81, 2]]}, pinned="node_id"
    ),
    "round.node_count": Lie({"round.node_count": 2, "nonces": [[0, 80, 2]]}, pinned="node_count"),
    "round.model": Lie(
        {"round.model": "other", "model.reference": "other"}
    ),  # a label; the digest names the model
    "round.preset": Lie(
        {"round.preset": "permutation", **pipeline_of("permutation")}, pinned="preset"
    ),
    "round.seq_len": Lie({"round.seq_len": 1, "fingerprint.seq_len": 1}, pinned="seq_len"),
    "round.r_target": Lie({"round.r_target": 2.0}, pinned="r_target"),
    "round.strength": Lie({"round.strength": 32}, pinned="strength"),
    **{
        f"pipeline.{field.name}": Lie(
            {f"pipeline.{field.name}": "another"}, read="another pipeline"
        )
        for field in fields(Pipeline)
        if field.name != "number_formats"  # a rule of judging, and in no header
    },
    "model.reference": Lie({"model.reference": "other"}, read="two different model references"),
    "model.digest": Lie({"model.digest": "0" * 64}, pinned="digest"),
    "model.weights": Lie({"model.weights": "random-all"}, pinned="weights"),
    "fingerprint.engine": Lie({"fingerprint.engine": "vllm"}, pinned="engine"),
    "fingerprint.device": Lie({"fingerprint.device": "NVIDIA H200"}, pinned="device"),
    "fingerprint.dtype": Lie({"fingerprint.dtype": "bfloat16"}, pinned="made in bfloat16"),
    "fingerprint.attention": Lie({"fingerprint.attention": "eager"}, pinned="attention"),
    "fingerprint.batch_size": Lie({"fingerprint.batch_size": 10**9}, pinned="batch_size"),
    "fingerprint.seq_len": Lie({"fingerprint.seq_len": 1}, read="an engine of 8 × 1 positions"),
    "fingerprint.threads": Lie({"fingerprint.threads": 96}, pinned="threads"),
    "fingerprint.torch": Lie({"fingerprint.torch": "1.0"}, pinned="torch"),
    "fingerprint.library": Lie({"fingerprint.library": "transformers 1.0"}, pinned="library"),
    "fingerprint.kernels": Lie({"fingerprint.library": "{}, compiled"}, pinned="kernels"),
    "nonces": Lie({"nonces": [[0, 39, 1], [40, 41, 1]]}, pinned="fewest_nonces"),
    "footer.records": Lie({"footer.records": 41}, read="a footer that does not fit"),
    "footer.valid": Lie({"footer.valid": 40}, read="a footer that does not fit"),
    "footer.seconds": Lie({"footer.seconds": 0.0}),  # nothing is paid for it
    "footer.sha256": Lie({"footer.sha256": "0" * 64}, read="a footer that does not fit"),
}


@pytest.fixture(scope="module")
def honest(small_model: Model) -> Proof:
    round = Round(**KNOWN, seq_len=16, strength=256, model="small")
    return prove(small_model, round, range(40), batch_size=8)


def network(proof: Proof, **changed: object) -> NetworkPins:
    """The pins of the proof's network, on the very build or with wildcards, and with other values
    of the round.
    """
    known = describe_build(proof.header.fingerprint)
    build = known | {name: value for name, value in changed.items() if name in known}
    agreed = (
        ROUND
        | {"fewest_nonces": 32}
        | {name: value for name, value in changed.items() if name not in known}
    )
    round = {name: value for name, value in agreed.items() if value is not None}
    model = {"reference": "small", "digest": proof.header.digest, "builds": [build]}
    return NetworkPins.of({"schema": 1, "round": round, "models": [model]}, "pins.toml")


def leaves(header: Header) -> Iterator[str]:
    """Every field of a header, of its parts, and of the footer."""
    for name, value in header.as_dict().items():
        yield from (f"{name}.{part}" for part in value) if isinstance(value, dict) else (name,)
    yield from (f"pipeline.{field.name}" for field in fields(Pipeline))
    yield from (f"fingerprint.{field.name}" for field in fields(Fingerprint))
    yield from (f"footer.{name}" for name in ("records", "valid", "seconds", "sha256"))


def written(proof: Proof, path: Path, changed: dict[str, Any]) -> Path:
    """Write the proof with changed fields: records that fit its header, and a footer that fits
    them.
    """
    header = json.loads(dumps(proof.header.as_dict()))
    footer = {}
    for place, value in changed.items():
        part, _, name = place.rpartition(".")
        if part == "pipeline" and len(changed) > 1:
            header["pipeline"] = {
                k.partition(".")[2]: v for k, v in changed.items() if k.startswith("pipeline.")
            }
        elif part == "footer":
            footer[name] = value
        else:
            table = header[part] if part else header
            table[name] = value.format(table.get(name)) if isinstance(value, str) else value
    distances = [record.distance for record in proof.records]
    nonces = [nonce for run in header["nonces"] for nonce in range(*run)]
    target = header["round"]["r_target"]
    rows = [
        {"nonce": n, "distance": d, "valid": d < target}
        for n, d in zip(nonces, distances, strict=True)
    ]
    records = "".join(f"{dumps(row)}\n" for row in rows)
    valid = sum(row["valid"] for row in rows)
    sha256 = hashlib.sha256(records.encode()).hexdigest()
    whole = {
        "records": len(rows),
        "valid": valid,
        "seconds": proof.footer.seconds,
        "sha256": sha256,
    }
    path.write_text(f"{dumps(header)}\n{records}{dumps({'footer': whole | footer})}\n")
    return path


def test_every_field_is_decided(honest: Proof):
    assert set(LIES) == set(leaves(honest.header)) - {"pipeline.number_formats"}
    assert {field.name for field in fields(Pins)} == set(honest.header.claims())
    assert set(Build.model_fields) - {"name"} == {field.name for field in fields(Fingerprint)} - {
        "seq_len"
    }
    assert tuple(BUILD_FIELDS) == tuple(name for name in Build.model_fields if name != "name")


@pytest.mark.parametrize("field", LIES)
def test_a_field_is_refused_by_name_or_changes_no_verdict(
    field: str, honest: Proof, small_model: Model, tmp_path: Path
):
    lie = LIES[field]
    pins = network(honest).for_round(**KNOWN)
    path = written(honest, tmp_path / "proof.jsonl", lie.changed)
    if lie.read or lie.pinned:
        with pytest.raises(AssayError) as caught:
            check_proof(Proof.load(path), expect=pins)
        assert (lie.read or lie.pinned) in caught.value.seen
        assert lie.read or isinstance(Proof.load(path), Proof)  # the pins refuse it, not the reader
        return
    verdicts = [
        verify(proof, small_model, expect=pins, seed=1) for proof in (honest, Proof.load(path))
    ]
    one, other = ((v.verdict, v.exit_code, v.residuals, v.unpinned, v.noise) for v in verdicts)
    assert one == other
    assert one[:2] == ("honest", 0)


@pytest.mark.parametrize(
    "field", [name for name in LIES if name.startswith("fingerprint.") and LIES[name].pinned]
)
def test_a_wildcard_is_harmless(field: str, honest: Proof, small_model: Model, tmp_path: Path):
    """Without a calibration the law is that of the number format alone, which has no wildcard."""
    pins = network(honest, engine="*", **FREE).for_round(**KNOWN)
    lied = Proof.load(written(honest, tmp_path / "proof.jsonl", LIES[field].changed))
    if field == "fingerprint.dtype":
        with refuses(AssayError, "a wildcard is harmless"):
            check_proof(lied, expect=pins)
        return
    verdicts = [verify(proof, small_model, expect=pins, seed=1) for proof in (honest, lied)]
    one, other = ((v.verdict, v.exit_code, v.noise, v.nonces) for v in verdicts)
    assert one == other
    assert one[:2] == ("honest", 0)


def test_a_target_of_vectors_is_harmless(small_model: Model):
    """They have none, so the file has none either, and whatever a header says there moves no
    verdict.
    """
    verdicts = []
    for target in (1.416, 2.0):
        round = Round(**KNOWN, seq_len=16, strength=256, preset="artifact", r_target=target)
        proof = prove(small_model, round, range(40), batch_size=8)
        pins = network(proof, preset="artifact", r_target=None).for_round(**KNOWN)
        verdicts.append(verify(proof, small_model, expect=pins, seed=1))
    one, other = ((v.verdict, v.exit_code, v.residuals, v.unpinned) for v in verdicts)
    assert one == other
    assert one[:2] == ("honest", 0)
