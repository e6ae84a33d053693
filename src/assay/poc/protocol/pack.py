"""Packs: nonces of several rounds as the rows of one batch, for a validator that recomputes the work of many nodes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from assay.poc.protocol.pipelines import Pipeline, get_pipeline
from assay.poc.protocol.round import Round

Row = tuple[Round, int]
"""A nonce with its round."""


@dataclass(frozen=True, kw_only=True)
class Pack(Round):
    """Rows of several rounds, which an engine takes as the nonces of one round.

    The nonces of a pack are the places 0 to N − 1 of its rows, and the seed texts of a place are those of its row's own
    round and nonce. No engine lets a row depend on the other rows of its batch, so each row has the bits that it has in
    a batch of its own round.

    What a pipeline draws for the block (target, random head, steps between layers) is drawn once for all rows:
    :func:`group_rows` puts rows of several blocks together only where the pipeline draws nothing for the block.

    Args:
        rows: Rows of the pack, of one preset, length and strength.

    Example:
        >>> mine, yours = (Round(block_hash="block", public_key=key, preset="artifact") for key in ("a", "b"))
        >>> [(pack, places)] = group_rows([(mine, 3), (yours, 7)])
        >>> pack.texts("inputs", places)
        ['block_a_nonce3', 'block_b_nonce7']
    """

    rows: tuple[Row, ...] = ()

    def texts(self, stream: str, nonces: Iterable[int], *, count: int = 1, k: int = 0) -> list[str]:
        """Return the seed texts of the rows at some places, as their own rounds write them."""
        found: list[str] = []
        for _, run in groupby((self.rows[place] for place in nonces), key=lambda row: id(row[0])):
            chosen = list(run)
            found += chosen[0][0].texts(stream, [nonce for _, nonce in chosen], count=count, k=k)
        return found


def draws_for_block(pipeline: Pipeline) -> bool:
    """Return whether a pipeline draws anything for the block as a whole."""
    return pipeline.output == "distance" or pipeline.head == "random" or pipeline.layers != "none"


def group_rows(rows: Sequence[Row]) -> list[tuple[Pack, range]]:
    """Return rows in as few packs as possible, in their order, with the places of each: what an engine computes.

    Args:
        rows: Nonces with their rounds, of any presets, lengths and blocks.
    """
    shared: dict[Any, list[Row]] = {}
    for row in rows:
        round = row[0]
        block = round.block_hash if draws_for_block(get_pipeline(round.preset)) else None
        shared.setdefault((round.preset, round.seq_len, round.strength, round.model, block), []).append(row)
    return [(_pack(found), range(len(found))) for found in shared.values()]


def _pack(rows: Sequence[Row]) -> Pack:
    first = rows[0][0]
    names = ("block_hash", "public_key", "model", "preset", "seq_len", "strength")
    return Pack(**{name: getattr(first, name) for name in names}, rows=tuple(rows))
