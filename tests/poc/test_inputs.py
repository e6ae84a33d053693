"""Batches that hold inputs of several rounds: the bits are those of a batch of each round's own."""

import random

import numpy as np
import pytest

from assay.poc import HFEngine, Input, Round, get_pipeline
from assay.poc.protocol.round import group_inputs

SEQ_LEN = 8
BATCH = 8


def _inputs(preset: str, blocks=("b1",), keys=("node_A", "node_B", "node_C"), each=5):
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
    inputs = [Input(round, round.node_id + 3 * i) for round in rounds for i in range(each)]
    random.Random(1).shuffle(inputs)
    return inputs


def _computed(engine: HFEngine, inputs) -> list[np.ndarray]:
    pipeline = get_pipeline(inputs[0].round.preset)
    batches = engine.run(inputs, pipeline)
    return [value for values in batches for value in values[pipeline.output]]


@pytest.mark.parametrize(
    "preset", ["poc-2.0", "artifact", "hardened", "layer-normalize", "permutation"]
)
def test_an_input_of_a_mixed_batch_has_the_bits_it_has_alone(small_model, preset):
    engine = HFEngine(small_model, batch_size=BATCH, seq_len=SEQ_LEN)
    inputs = _inputs(preset, blocks=("b1", "b2"))
    for places in group_inputs(inputs):
        group = [inputs[place] for place in places]
        for each, value in zip(group, _computed(engine, group), strict=True):
            assert np.array_equal(value, _computed(engine, each.round.inputs([each.nonce]))[0])


@pytest.mark.parametrize(
    ("preset", "count"),
    [("poc-2.0", 2), ("layer-reflections", 2), ("artifact", 1), ("hardened", 1)],
)
def test_blocks_share_a_batch_only_where_nothing_is_drawn_for_the_block(preset, count):
    inputs = _inputs(preset, blocks=("b1", "b2"))
    groups = group_inputs(inputs)
    assert len(groups) == count
    assert sorted(place for places in groups for place in places) == list(range(len(inputs)))


def test_rounds_of_another_shape_share_no_batch():
    base = {"block_hash": "b", "public_key": "k", "preset": "artifact"}
    rounds = [
        Round(**base),
        Round(**base, seq_len=64),
        Round(**base, strength=256),
        Round(**base | {"preset": "hardened"}),
    ]
    assert len(group_inputs([Input(round, 0) for round in rounds])) == 4


def test_inputs_of_a_round_are_made_as_they_are_read():
    round = Round(block_hash="b", public_key="k", node_count=3)
    inputs = round.inputs(range(0, 2**50, 3))
    assert len(inputs) == len(range(0, 2**50, 3))
    assert inputs[-1].nonce == range(0, 2**50, 3)[-1]
    assert list(inputs[2:4]) == [Input(round, 6), Input(round, 9)]
