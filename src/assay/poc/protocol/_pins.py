"""What a validator pins of a proof, whose header the prover wrote, and what it takes on the prover's word."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from assay import streams
from assay.errors import ProofMismatch, UsageError
from assay.models import NUMBER_FORMATS
from assay.poc.protocol._pipelines import get_pipeline
from assay.poc.protocol._record import Header
from assay.poc.protocol._round import MAX_NONCE, Round

FEWEST_NONCES = 32  # of the smallest proof that is accepted without a pinned set of nonces
LONGEST_UNPINNED = 4096  # positions that a header may make a validator compute for one nonce
FORMATS = (*streams.DTYPES, *NUMBER_FORMATS)


@dataclass(frozen=True, kw_only=True)
class Pins:
    """Values that a validator knows before it reads a proof; None where it gives nothing.

    A value that is not given is accepted at its published default: preset ``poc-2.0``, 256 positions, 32-bit seeds,
    r_target 1.416, node 0 of 1, at least 32 consecutive nonces of the share from any position on, and a number format
    of the preset, or any dtype where the preset names none. The block and the key have no default. Whatever is neither
    given nor at its default is taken on the prover's word, and :meth:`unpinned` names it.

    Args:
        block_hash: Block that seeds the round.
        public_key: Key of the node that is paid.
        block_height: Height of the block; part of no seed, so nothing depends on it.
        node_id: Share of the node, from 0.
        node_count: Number of nodes that share the nonces of the key.
        model: Reference that the header must state; the checkpoint itself is compared by its digest.
        preset: Name of a row of :data:`assay.poc.PIPELINES`.
        seq_len: Number of positions of a nonce.
        r_target: Distance below which a nonce is valid.
        strength: Bits of seed of the inputs.
        nonces: All nonces of the proof, in order.
        prover_dtype: Number format that the prover states.

    Raises:
        UsageError: A value is out of range.
    """

    block_hash: str | None = None
    public_key: str | None = None
    block_height: int | None = None
    node_id: int | None = None
    node_count: int | None = None
    model: str | None = None
    preset: str | None = None
    seq_len: int | None = None
    r_target: float | None = None
    strength: Literal[32, 256] | None = None
    nonces: Sequence[int] | None = None
    prover_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.preset is not None:
            object.__setattr__(self, "preset", get_pipeline(self.preset).name)
        placeholders: dict[str, Any] = {"block_hash": "any", "public_key": "any", "node_count": MAX_NONCE}
        given = {name: value for name in Round.__dataclass_fields__ if (value := getattr(self, name)) is not None}
        round = Round(**(placeholders | given))
        if self.strength is not None:
            object.__setattr__(self, "strength", round.strength)  # a preset with versioned texts always has 256
        if self.prover_dtype is not None and self.prover_dtype not in FORMATS:
            raise UsageError(
                f"number format {self.prover_dtype!r:.40}", wanted=" or ".join(FORMATS), do="choose one of them"
            )

    @classmethod
    def of(cls, round: Round) -> "Pins":
        """Return pins of all that a round says, and of the model only if the round names one."""
        return cls(**{**round.as_dict(), "model": round.model or None})

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the values that are pinned."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)

    def check(self, header: Header) -> None:
        """Refuse a header that contradicts a pin, or asks for far more work than the default while nothing pins it.

        Raises:
            ProofMismatch: Names the value, stated and wanted.
        """
        claims, dtype = header.claims(), header.fingerprint.dtype
        formats = header.pipeline.number_formats if self.prover_dtype is None else (self.prover_dtype,)
        if formats and dtype not in formats:
            raise ProofMismatch(
                f"a proof of {header.pipeline.name} made in {dtype}",
                wanted=f"one made in {' or '.join(formats)}",
                do=f"ask the node to prove in {formats[0]}; only if the network agreed on {dtype}: "
                f"--prover-dtype {dtype}",
            )
        for name in self.given:
            stated, wanted = claims[name], getattr(self, name)
            if not (_are(header, wanted) if name == "nonces" else stated == wanted):
                raise ProofMismatch(
                    f"a proof with {name} {stated!r:.60}",
                    wanted=f"{name} {wanted!r:.60}",
                    do="ask the node for its proof of this round",
                )
        if self.seq_len is None and header.round.seq_len > LONGEST_UNPINNED:
            raise ProofMismatch(
                f"a proof with seq_len {header.round.seq_len}, which nothing pins",
                wanted=f"at most {LONGEST_UNPINNED} positions: a header must not choose the work of its validator",
                do=f"if the network agreed on that length, pass --seq-len {header.round.seq_len}",
            )

    def unpinned(self, header: Header) -> tuple[str, ...]:
        """Return the names of the values that are taken on the prover's word: not pinned, and not at their default."""
        round, pipeline, formats = header.round, header.pipeline, header.pipeline.number_formats or streams.DTYPES
        (first, end, step), *more = header.nonces
        at_default = {
            "block_hash": False,
            "public_key": False,
            "preset": round.preset == Round.preset,
            "seq_len": round.seq_len == Round.seq_len,
            "strength": round.versioned or round.strength == Round.strength,
            "r_target": pipeline.output == "vector" or round.r_target == Round.r_target,  # vectors have no target
            "node_id": round.node_id == Round.node_id,
            "node_count": round.node_count == Round.node_count,
            "nonces": not more and step == round.node_count and len(range(first, end, step)) >= FEWEST_NONCES,
            "prover_dtype": header.fingerprint.dtype in formats,
        }
        return tuple(name for name, default in at_default.items() if not default and getattr(self, name) is None)


def _are(header: Header, nonces: Sequence[int]) -> bool:
    return len(nonces) == header.count and all(a == b for a, b in zip(nonces, header.all_nonces(), strict=True))
