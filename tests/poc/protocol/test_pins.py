"""What a validator pins, what it accepts at its default, and what it would take on the prover's
word.
"""

from dataclasses import replace

import numpy as np
import pytest

from assay.errors import ProofFormatError, ProofMismatch, UsageError
from assay.files.jsonl import dumps
from assay.poc import Header, Pins, Proof, Round, judging_batch
from assay.poc.protocol.header import parse_header
from assay.poc.protocol.pins import CACHES, of_weights, with_cache
from assay.poc.verdict import noise_for
from tests.wordings import refuses


@pytest.fixture
def header(proof: Proof) -> Header:
    """Header of a proof of the published round but for its 16 positions."""
    return proof.header


def test_a_round_pins_what_it_says(header: Header, round_: Round):
    pins = Pins.of(round_)
    assert set(pins.given) == set(Round.__dataclass_fields__)
    pins.check(header)
    assert pins.unpinned(header) == ()
    assert "model" not in Pins.of(replace(round_, model="")).given
    assert Pins().unpinned(header) == ("block_hash", "public_key", "seq_len")


@pytest.mark.parametrize(
    "wrong",
    [
        *({"block_hash": ""}, {"preset": "poc-3"}, {"node_id": -1, "node_count": 2}),
        *(
            {"prover_dtype": dtype}
            for dtype in ("half", "", "bfloat16+", "bfloat16+fp8_e5m2-cache")
        ),
    ],
    ids=str,
)
def test_impossible_pins_are_refused(wrong):
    """An empty shell variable must not switch a check off."""
    with pytest.raises(UsageError):
        Pins(**wrong)


def test_pins_take_what_a_round_takes():
    assert Pins(preset="sign-flips").preset == "poc-2.0"
    assert Pins(preset="hardened", strength=32).strength == 256
    assert Pins(node_id=7).node_count is None


@pytest.mark.parametrize(
    "nonces", [range(40), list(range(40)), np.arange(40)], ids=["range", "list", "array"]
)
def test_the_set_of_nonces_is_pinned_as_a_whole(nonces, header: Header):
    Pins(nonces=nonces).check(header)
    for other in (nonces[:39], [*range(39), 40]):
        with refuses(ProofMismatch, "the set of nonces is pinned as a whole"):
            Pins(nonces=other).check(header)


def test_nonces_of_the_default_are_consecutive_and_enough(header: Header):
    for runs, believed in (
        (((0, 32, 1),), False),
        (((5, 37, 1),), False),
        (((0, 31, 1),), True),
        (((0, 64, 2),), True),
        (((0, 31, 1), (40, 41, 1)), True),
    ):
        assert ("nonces" in Pins().unpinned(replace(header, nonces=runs))) == believed


def test_number_formats_of_the_default(header: Header):
    for dtype in ("float32", "float16", "bfloat16"):
        stated = replace(header, fingerprint=replace(header.fingerprint, dtype=dtype))
        assert "prover_dtype" not in Pins().unpinned(stated)
    stated = replace(header, fingerprint=replace(header.fingerprint, dtype="float8"))
    assert "prover_dtype" in Pins().unpinned(stated)
    assert "prover_dtype" not in Pins(prover_dtype="float8").unpinned(stated)


def test_a_cache_that_rounds_belongs_to_the_number_format(header: Header):
    """Its law is wider, so a prover that may claim it chooses its law."""
    cached = with_cache(header.fingerprint.dtype, CACHES[0])
    stated = replace(header, fingerprint=replace(header.fingerprint, dtype=cached))
    assert "prover_dtype" in Pins().unpinned(stated)
    assert "prover_dtype" not in Pins(prover_dtype=cached).unpinned(stated)
    with refuses(ProofMismatch, "a cache that rounds belongs to the number format"):
        Pins(prover_dtype=of_weights(cached)).check(stated)
    assert noise_for(stated, header.fingerprint, None) is None


def test_a_header_chooses_neither_memory_nor_time(header: Header):
    huge = replace(header, fingerprint=replace(header.fingerprint, batch_size=10**12))
    assert judging_batch(huge) == 1024
    assert judging_batch(replace(huge, round=replace(header.round, seq_len=2**20))) == 1
    long = replace(header, round=replace(header.round, seq_len=8192))
    with refuses(ProofMismatch, "a header chooses neither memory nor time"):
        Pins().check(long)
    Pins(seq_len=8192).check(long)
    with refuses(ProofFormatError, "a header chooses neither memory nor time, 2"):
        parse_header(dumps(header.as_dict() | {"nonces": [[0, 2**53 - 1, 1]]}).encode())
