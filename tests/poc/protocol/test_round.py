import json
from pathlib import Path

import pytest

from assay.errors import UsageError
from assay.poc import Round
from assay.streams import seed32
from tests.wordings import refuses

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "poc_kat.json").read_text())


def make(**changes) -> Round:
    return Round(**({"block_hash": "block_alpha", "public_key": "node_A"} | changes))


def test_seed_texts_are_the_published_ones():
    round = make()
    published = {
        "block_alpha_node_A_nonce0": round.text("inputs", 0),
        "block_alpha_node_A_nonce_0_signs": round.text("signs", 0),
        "block_alpha_node_A_nonce_0_hidden_r0": round.text("reflection", 0, index=0),
        "block_alpha_node_A_nonce_0_pick_12": round.text("pick", 0, k=12),
        "block_alpha_node_A_nonce_0_haar_hh_12_0": round.text("rotation", 0, k=12, index=0),
        "block_alpha_lm_head": round.block_text("random_head"),
        "block_alpha_target": round.block_text("target"),
        "block_alpha_layer_0_householder": round.block_text("layer_reflection", 0),
    }
    assert all(text == expected for expected, text in published.items())
    names = make(
        block_hash="{nonce}", public_key="é%s{index}"
    )  # what a text is made of may stand in a name
    assert names.texts("reflection", iter([0, 9]), count=2)[2:] == [
        f"{{nonce}}_é%s{{index}}_nonce_9_hidden_r{index}" for index in (0, 1)
    ]
    known = {row["text"]: row["seed"] for row in VECTORS["seed32"]}
    shared = published.keys() & known.keys()
    assert len(shared) >= 4
    for text in shared:
        assert seed32(text) == known[text]


def test_nodes_share_the_nonces_without_overlap():
    shares = [make(node_id=i, node_count=3).nonces(0, 5) for i in range(3)]
    assert list(shares[1]) == [1, 4, 7, 10, 13]
    assert sorted(nonce for share in shares for nonce in share) == list(range(15))


def test_numbers_from_1_mean_the_residue_and_the_same_inputs():
    shares = [make(node_id=i, node_count=3) for i in (1, 2, 3)]
    assert [list(round.nonces(0, 3)) for round in shares] == [[1, 4, 7], [2, 5, 8], [3, 6, 9]]
    assert [round.share for round in shares] == [1, 2, 0]
    last = shares[-1]
    assert last.check_nonces([0, 3, 6]) == [0, 3, 6]
    for nonces in ([1], [3, 5], range(3, 12)):
        with refuses(UsageError, "numbers from 1 mean the residue and the same inputs"):
            last.check_nonces(nonces)
    alone = make(node_id=1, node_count=1)
    assert list(alone.nonces(0, 3)) == [1, 2, 3]
    assert alone.text("inputs", 2) == make().text("inputs", 2)
    left = make(node_id=3, node_count=2)  # the first of three machines was taken away
    assert list(left.nonces(0, 2)) == [3, 5]


OUT_OF_RANGE = {
    "r_target": (0, 2.0001, -1.0, float("nan"), float("inf"), "1.4", True, 10**400),
    "seq_len": (0, 2**30, 1.5),
    "node_count": (0,),
    "node_id": (-1, 2**53, 0.5),
    "block_height": (-1,),
    "block_hash": ("", "a\nb", "\ud800"),
    "public_key": ("k" * 2000, 7),
    "strength": (64, 32.0),
    "model": (7, "\ud800"),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_values_out_of_range_are_refused(name):
    for value in OUT_OF_RANGE[name]:
        with pytest.raises(UsageError):
            make(**{"node_count": 3, name: value})


@pytest.mark.parametrize("nonces", [[-1], [2**53], [True], ["0"], [0, 0], [3, 1], [1.0]])
def test_bad_nonces_are_refused(nonces):
    with refuses(UsageError, "bad nonces are refused"):
        make().check_nonces(nonces)


def test_nonces_of_another_node_are_refused():
    round = make(node_id=1, node_count=3)
    round.check_nonces(range(1, 100, 3))
    for foreign in (range(0, 100, 3), range(1, 100), [1, 2]):
        with refuses(UsageError, "nonces of another node are refused"):
            round.check_nonces(foreign)


@pytest.mark.parametrize(
    ("start", "stop"), [(5, 5), (-1, 4), (7, 3), (0, 2**40), (2**60, 2**60 + 1)]
)
def test_bad_positions_are_refused(start, stop):
    with pytest.raises(UsageError):
        make().nonces(start, stop)
