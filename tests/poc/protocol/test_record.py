"""Records and fingerprints: which distances count, which nonces cannot share a proof, and what
names an engine.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from assay.errors import ProofFormatError, ProofMismatch
from assay.poc import Fingerprint, Round
from assay.poc.protocol.distinct_seeds import check_distinct_seeds
from assay.poc.protocol.records import is_distance, is_valid
from tests.wordings import refuses

COLLIDING = Round(block_hash="b", public_key="k")


def colliding_pairs(count: int) -> list[tuple[int, int]]:
    """Find nonces below 2^18 that share an input seed."""
    from assay import streams

    seeds_N = streams.seeds(COLLIDING.texts("inputs", range(2**18)))[:, 0]
    order_N = np.argsort(seeds_N, kind="stable")
    equal = np.flatnonzero(np.diff(seeds_N[order_N]) == 0)[:count]
    return [(int(order_N[i]), int(order_N[i + 1])) for i in equal]


def test_valid_is_strictly_below_the_target():
    assert is_valid(1.3999999, 1.4)
    assert not is_valid(1.4, 1.4)
    assert not is_valid(math.nan, 1.4)


def test_distances_end_at_two():
    assert all(map(is_distance, (0.0, 2.0, 2 + 5e-7)))
    assert not any(map(is_distance, (-1e-9, 2.00001, math.nan, math.inf)))


def test_nonces_that_share_a_forward_pass_are_refused():
    one, other = colliding_pairs(1)[0]
    around = sorted({one, other, *range(30)})
    with pytest.raises(ProofMismatch, match=f"such as {one} and {other}"):
        check_distinct_seeds(COLLIDING, around)
    check_distinct_seeds(COLLIDING, sorted({one, *range(30)}))
    strong = Round(block_hash="b", public_key="k", strength=256)
    check_distinct_seeds(strong, around)


@pytest.mark.slow
def test_collisions_that_chance_explains_are_not_refused():
    """Of 2^18 consecutive nonces about eight pairs collide; a node did not choose them."""
    assert len(colliding_pairs(100)) > 2
    check_distinct_seeds(COLLIDING, range(2**18))
    chosen = [nonce for pair in colliding_pairs(100) for nonce in pair]
    with refuses(ProofMismatch, "collisions that chance explains are not refused"):
        check_distinct_seeds(COLLIDING, sorted(chosen + list(range(900, 1400))))


VALUES = {
    "engine": "hf",
    "device": "x86_64 AVX512",
    "dtype": "float32",
    "attention": "sdpa",
    "batch_size": 8,
    "seq_len": 16,
    "threads": 2,
    "torch": "2.13.0",
    "library": "transformers 5.17.0, compiled, tp 2",
}
"""As the first version wrote it into proofs and calibrations."""


def test_a_file_joins_the_kernels_to_the_library():
    read = Fingerprint.from_dict(VALUES)
    assert (read.library, read.kernels) == ("transformers 5.17.0", ("compiled", "tp 2"))
    assert json.dumps(read.as_dict()) == json.dumps(VALUES)
    assert read.id == "4d2509591f4d"
    assert replace(read, kernels=()).as_dict() == VALUES | {"library": "transformers 5.17.0"}


@pytest.mark.parametrize("text", ["", ", ", "a, ", "a,b", "transformers 5.17.0"])
def test_any_text_is_written_back_as_it_was_read(text: str):
    assert Fingerprint.from_dict(VALUES | {"library": text}).as_dict()["library"] == text


@pytest.mark.parametrize(
    "wrong",
    [VALUES | {"kernels": ("x",)}, VALUES | {"colour": "red"}, {"engine": "hf", "library": ""}],
)
def test_other_fields_are_refused(wrong):
    with pytest.raises(ProofFormatError):
        Fingerprint.from_dict(wrong)
