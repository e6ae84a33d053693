"""``assay poc pins``: write the pins file of a network, and hold a proof against it."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

import assay
from assay.cli.flags import (
    ARGUMENT,
    CALIBRATION,
    PINS,
    PROOF,
    AgreedSettings,
    FileSettings,
    ModelName,
    NodeCount,
    NodeId,
    RoundNames,
    Strength,
)
from assay.cli.poc import pins
from assay.errors import UsageError
from assay.framework.output import Lines, show_tables, show_values


class NewPinsSettings(FileSettings, AgreedSettings):
    """Settings of ``assay poc pins new``: what is known of a network before its first proof."""

    model: ModelName
    from_proof: Annotated[tuple[Path, ...], PROOF] = Field(
        (), description="Honest proof whose round and build are taken over."
    )
    calibration: Annotated[tuple[Path, ...], CALIBRATION] = Field(
        (), description="Calibration file of this model to pin."
    )
    public_key: Annotated[tuple[str, ...], "KEY"] = Field(
        (), description="Key of a node that may prove; else any."
    )
    strength: Strength = 256
    node_count: NodeCount = 1
    false_convictions: Annotated[str | None, "K/N"] = Field(
        None, description="Accepted ones over all nodes: 1/100000."
    )
    fewest_nonces: Annotated[int, "NONCES"] = Field(
        32, ge=1, description="Number of nonces of the smallest proof."
    )
    dtype: Annotated[str | None, "DTYPE"] = Field(
        None,
        description="Number format of the build where there is no proof; else the first one of "
        "the preset.",
    )


class CheckPinsSettings(RoundNames):
    """Settings of ``assay poc pins check``: what is known of the round of a proof."""

    pins: Annotated[Path, ARGUMENT, PINS] = Field(
        description="What the network agreed on; other settings must agree with it."
    )
    proof: Annotated[Path | None, ARGUMENT, PROOF] = Field(None, description="Proof file.")
    node_id: NodeId = None


@pins.add(
    "new",
    NewPinsSettings,
    shown="model output from_proof calibration frame public_key preset seq_len false_convictions "
    "overwrite",
    example="assay poc pins new --model reference:qwen3 --from-proof honest.jsonl -o pins.toml",
)
def new(chosen: NewPinsSettings, as_json: bool) -> None:
    """Write a pins file for a model.

    Seeds have 256 bits. What only a proof can say is left to be filled in.
    """
    from assay.poc.network_pins import write_pins

    values = write_pins(
        chosen.output,
        chosen.model,
        proofs=chosen.from_proof,
        calibrations=chosen.calibration,
        public_keys=chosen.public_key,
        round_values=chosen.model_dump(
            include={"preset", "seq_len", "r_target", "strength", "node_count", "fewest_nonces"}
        ),
        dtype=chosen.dtype,
        frame=chosen.frame,
        false_convictions=chosen.false_convictions,
    )
    show_values("assay.poc.pins.new/1", values, as_json)


@pins.add(
    "check",
    CheckPinsSettings,
    example="assay poc pins check pins.toml proof.jsonl --block-hash BLOCK --public-key KEY",
)
def check(chosen: CheckPinsSettings, as_json: bool) -> int:
    """Say what a file pins and what it leaves open.

    With a proof, it says whether its header is allowed. A proof of which something would be taken
    on the prover's word gives exit code 2, as with verify.
    """
    from assay.poc.network_pins import find_pinned_calibration, list_open, list_pinned
    from assay.poc.verdict.calibration_file import Calibration, account_alpha, describe_promise
    from assay.poc.verdict.honest_noise import missing_law

    expected = chosen.model_dump(include={"block_hash", "public_key", "node_id"})
    if chosen.proof is None and any(value is not None for value in expected.values()):
        raise UsageError(
            "a round without a proof", wanted="the proof of that round", do="pass PROOF after PINS"
        )
    network = assay.poc.NetworkPins.load(chosen.pins)
    pinned = [
        Calibration.load(path) for model in network.models for path in network.calibrations(model)
    ]
    promise = describe_promise(network, account_alpha(network), pinned)
    values: dict[str, Any] = {
        "path": str(chosen.pins),
        "pinned": list_pinned(network),
        "open": list_open(network),
        "network": promise,
    }
    believed: tuple[str, ...] = ()
    if chosen.proof is not None:
        header = assay.poc.Proof.load(chosen.proof).header
        # A key and a share that the file lists are not only the prover's word.
        if network.nodes:
            stated = {"public_key": header.round.public_key, "node_id": header.round.node_id}
            expected |= {name: value for name, value in stated.items() if expected[name] is None}
        agreed = network.for_round(model=header.digest, **expected)
        agreed.check(header)
        believed = agreed.unpinned(header)
        if measured := find_pinned_calibration(network, header):
            noise = measured.find_build(header).source
        else:
            noise = missing_law(
                network.model(header.digest).reference,
                header.digest,
                header.round,
                frame=network.frame(header.digest),
            )
        values |= {"proof": str(chosen.proof), "unpinned": believed, "noise": noise}
    lines = {
        "pinned": values["pinned"],
        "open": values["open"],
        "network": [
            f"{name.replace('_', ' ')}: {'not stated' if value is None else value}"
            for name, value in promise.items()
        ],
    }
    shown = values | {name: Lines("\n".join(texts) or "nothing") for name, texts in lines.items()}
    if chosen.proof is not None:
        shown |= {"unpinned": ", ".join(believed) or "nothing: the header is allowed"}
    rows = [(name.replace("unpinned", "on the prover's word"), v) for name, v in shown.items()]
    show_tables("assay.poc.pins.check/1", values, as_json, (("", "value"), rows, ""))
    return 2 if believed else 0
