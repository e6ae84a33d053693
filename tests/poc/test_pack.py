"""Batches that hold nonces of several nodes: the bits are those of a batch of each node's own."""

import random

import numpy as np
import pytest

from assay.poc import HFEngine, Round, get_pipeline
from assay.poc.protocol.round import group_rows

SEQ_LEN = 8
BATCH = 8


def _rows(preset: str, blocks=("b1",), keys=("node_A", "node_B", "node_C"), each=5):
    rounds = [
        Round(
            block_hash=block,
            public_key=key,
            preset=preset,
            seq_len=SEQ_LEN,
            node_id=i,
            node_count=3,
        )
        for block in blocks
        for i, key in enumerate(keys)
    ]
    rows = [(round, round.node_id + 3 * i) for round in rounds for i in range(each)]
    random.Random(1).shuffle(rows)
    return rows


def _computed(engine: HFEngine, round: Round, nonces) -> list[np.ndarray]:
    return [
        value
        for batch in engine.outputs(round, get_pipeline(round.preset), nonces)
        for value in batch
    ]


@pytest.mark.parametrize(
    "preset", ["poc-2.0", "artifact", "hardened", "layer-normalize", "permutation"]
)
def test_a_row_of_a_mixed_batch_has_the_bits_it_has_alone(small_model, preset):
    engine = HFEngine(small_model, batch_size=BATCH, seq_len=SEQ_LEN)
    rows = _rows(preset, blocks=("b1", "b2"))
    for pack, places in group_rows(rows):
        together = _computed(engine, pack, places)
        for (round, nonce), value in zip(pack.rows, together, strict=True):
            alone = _computed(engine, round, [nonce])[0]
            assert np.array_equal(value, alone), (round.public_key, nonce)


@pytest.mark.parametrize(
    ("preset", "count"),
    [("poc-2.0", 2), ("layer-reflections", 2), ("artifact", 1), ("hardened", 1)],
)
def test_blocks_share_a_batch_only_where_nothing_is_drawn_for_the_block(preset, count):
    rows = _rows(preset, blocks=("b1", "b2"))
    made = group_rows(rows)
    assert len(made) == count
    assert sorted(map(repr, (row for pack, _ in made for row in pack.rows))) == sorted(
        map(repr, rows)
    )
    assert all(len(pack.rows) == len(places) for pack, places in made)


def test_rounds_of_another_shape_are_another_pack():
    base = {"block_hash": "b", "public_key": "k", "preset": "artifact"}
    rounds = [
        Round(**base),
        Round(**base, seq_len=64),
        Round(**base, strength=256),
        Round(**base | {"preset": "hardened"}),
    ]
    assert len(group_rows([(round, 0) for round in rounds])) == 4
