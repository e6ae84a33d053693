"""The header of a proof: its round, preset, checkpoint, engine and nonces."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import FailFast, Field

from assay.errors import ProofMismatch
from assay.files.jsonl import dumps
from assay.poc.protocol.checks import DIGEST, MAX_NONCE
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.pipelines import Pipeline, get_pipeline
from assay.poc.protocol.records import Record, is_valid, published_form
from assay.poc.protocol.round import MAX_COUNT, Round
from assay.poc.protocol.strict_file import STRICT, Text, format_error, read_as

KIND = "assay.poc.proof"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Header:
    """First line of a proof: everything about it that the records do not say.

    Args:
        round: Round, with its model named.
        pipeline: Description of the preset.
        digest: SHA-256 of the tensors of the checkpoint.
        weights: Weight mode of the model: trained, random-all or random-embed.
        frame: SHA-256 of the frame of the checkpoint, where the preset has one; else empty.
        fingerprint: Description of the prover's engine.
        nonces: Nonces of the records, in order, as runs ``[first, end, step]``.
    """

    round: Round
    pipeline: Pipeline
    digest: str
    weights: str
    frame: str = ""
    fingerprint: Fingerprint
    nonces: tuple[tuple[int, int, int], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the header line."""
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "round": self.round.as_dict(),
            "pipeline": self.pipeline.as_dict(),
            "model": {"reference": self.round.model, "digest": self.digest, "weights": self.weights}
            | ({"frame": self.frame} if self.frame else {}),
            "fingerprint": self.fingerprint.as_dict(),
            "nonces": [list(run) for run in self.nonces],
        }

    def check_model(self, reference: str, digest: str, weights: str = "trained") -> None:
        """Refuse a proof of another checkpoint than the one of a reference with ProofMismatch."""
        if (self.digest, self.weights) != (digest, weights):
            raise ProofMismatch(
                f"a proof of {self.round.model} ({self.weights}, {self.digest[:12]})",
                wanted=f"a proof of {reference} ({weights}, {digest[:12]})",
                do="verify with the checkpoint that the network agreed on (--model)",
            )

    def all_nonces(self) -> Iterator[int]:
        """Iterate over the nonces in the order of the records."""
        for run in self.nonces:
            yield from range(*run)

    def places_of(self, nonces: Sequence[int]) -> list[int]:
        """Return the index of each nonce in the sequence that the prover computed."""
        if len(self.nonces) > 1:
            places = {nonce: index for index, nonce in enumerate(self.all_nonces())}
            return [places[nonce] for nonce in nonces]
        first, _, step = self.nonces[0]
        return [(nonce - first) // step for nonce in nonces]

    @property
    def count(self) -> int:
        """Number of records that a complete proof has."""
        return sum(len(range(*run)) for run in self.nonces)

    @property
    def positions(self) -> int:
        """Number of positions of a nonce: its input, and the tokens that are decoded after it."""
        return self.round.seq_len + self.pipeline.steps

    def claims(self) -> dict[str, Any]:
        """Return every value that the prover chose and a validator can pin, by name."""
        return {
            **self.round.as_dict(),
            "digest": self.digest,
            "weights": self.weights,
            "prover_dtype": self.fingerprint.dtype,
            "builds": self.fingerprint,
            "nonces": self.nonces,
            "fewest_nonces": self.count,
        }

    def line(self, record: Record) -> str:
        """Return the line of a record, without its newline."""
        fields = published_form(self.pipeline).fields(record, self.round.r_target)
        return dumps({"nonce": record.nonce, **fields})

    def is_valid(self, record: Record) -> bool:
        """Return whether a record counts: a distance below the target, or any vector or tokens."""
        return not record.has_distance or is_valid(record.distance, self.round.r_target)


def runs_of(nonces: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Return ascending nonces as few runs ``(first, end, step)``."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    while start < len(nonces):
        step = nonces[start + 1] - nonces[start] if start + 1 < len(nonces) else 1
        end = start + 1
        while end < len(nonces) and nonces[end] - nonces[end - 1] == step:
            end += 1
        runs.append((nonces[start], nonces[end - 1] + step, step))
        start = end
    return tuple(runs)


@dataclass(frozen=True, kw_only=True)
class ModelLine:
    """What a header says of the model."""

    __pydantic_config__: ClassVar = STRICT

    reference: Text
    digest: Text
    weights: Text


@dataclass(frozen=True, kw_only=True)
class FramedModelLine(ModelLine):
    """What a header says of the model, with its frame where the preset has one."""

    frame: Annotated[str, Field(pattern=f"^({DIGEST.pattern})?$")] = ""


@dataclass(frozen=True, kw_only=True)
class _HeaderLine:
    __pydantic_config__: ClassVar = STRICT

    kind: Literal["assay.poc.proof"]
    schema: Literal[1]
    round: Round
    pipeline: dict[str, Any]
    model: FramedModelLine
    fingerprint: Fingerprint
    nonces: Annotated[tuple[tuple[int, int, int], ...], FailFast()]


def parse_header(line: bytes) -> Header:
    """Read the header line of a proof. Raises AssayError: the line is wrong; names what is."""
    read = read_as(_HeaderLine, line)
    round = read.round
    fingerprint = read.fingerprint
    pipeline = get_pipeline(round.preset)
    for is_wrong, seen, wanted in (
        (
            # Tuples become lists.
            read.pipeline != json.loads(dumps(pipeline.as_dict())),
            f"another pipeline than this version's {pipeline.name}",
            "the same description",
        ),
        (read.model.reference != round.model, "two different model references", "one"),
        (
            fingerprint.seq_len != round.seq_len or fingerprint.batch_size < 1,
            f"an engine of {fingerprint.batch_size} × {fingerprint.seq_len} positions",
            f"one for seq_len {round.seq_len}, of at least one row",
        ),
        (
            pipeline.framed is not bool(read.model.frame),
            "a frame, or none",
            "one for the presets that need it, and for no other",
        ),
    ):
        if is_wrong:
            raise format_error(seen, wanted)
    _check_runs(read.nonces, round)
    return Header(
        round=round,
        pipeline=pipeline,
        digest=read.model.digest,
        weights=read.model.weights,
        frame=read.model.frame,
        fingerprint=fingerprint,
        nonces=read.nonces,
    )


def _check_runs(runs: Sequence[tuple[int, int, int]], round: Round) -> None:
    """Refuse runs of nonces that do not ascend, or are not of the node of a round."""
    last = -1
    for first, end, step in runs:
        if not (last < first < end and step >= 1):
            raise format_error(f"run {[first, end, step]}", "runs that ascend without doubles")
        last = range(first, end, step)[-1]
        if last > MAX_NONCE:
            raise format_error(f"nonce {last}", f"nonces up to {MAX_NONCE}")
        if first % round.node_count != round.share or (last > first and step % round.node_count):
            raise format_error(
                f"run {[first, end, step]}", f"nonces of node {round.node_id} of {round.node_count}"
            )
    if not 0 < (count := sum(len(range(*run)) for run in runs)) <= MAX_COUNT:
        raise format_error(f"{count} nonces", f"at most {MAX_COUNT} in one proof, and one at least")
