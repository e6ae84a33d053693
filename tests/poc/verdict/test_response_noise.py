"""Noise of responses, their evidence in blocks, and their entries in a ledger."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from assay.errors import CalibrationError, DataError, UsageError
from assay.files.jsonl import dumps, loads
from assay.poc.verdict import Account, Ledger, ResponseNoise, audit_ledger
from assay.poc.verdict.entries import MOST_BLOCKS, RESPONSES, LedgerUpdate, response_identity
from assay.poc.verdict.response_noise import (
    PartNoise,
    ResponseBlocks,
    ResponseTest,
    noise_from_dict,
)
from assay.stats import LogNoise
from assay.stats.noise_laws import Spread
from assay.stats.token_law import COLUMNS
from tests.poc.verdict.ledgers import by_hand
from tests.poc.verdict.ledgers import update as of_nonces
from tests.stats.tokens import drawn, law_at
from tests.wordings import refuses

NOISE = ResponseNoise(
    tokens=PartNoise(law=law_at(0.0625), spread=Spread(0.05), between=0.2, effect=8.0),
    sketches=PartNoise(law=LogNoise(math.log(0.01), 0.4), spread=Spread(0.05), between=0.1),
    source="tests",
)


def response(seed: int, *, tokens: int = 80, multiple: float = 1.0) -> ResponseBlocks:
    """A response of a prover with this multiple of the honest noise."""
    rng = np.random.default_rng(seed)
    blocks = math.ceil(tokens / 32)
    distances = 0.01 * multiple * np.exp(0.3 * rng.standard_normal(blocks))
    return ResponseBlocks.whole(
        distances, drawn(1, tokens, law_at(0.0625), multiple=multiple, seed=seed)[0]
    )


def update(seed: int, blocks: ResponseBlocks | None = None, *, key: str = "node_A") -> LedgerUpdate:
    """The entry of a response."""
    found = response(seed) if blocks is None else blocks
    return LedgerUpdate(
        account=Account(public_key=key, digest="d" * 64, build="H100", preset=RESPONSES),
        round=response_identity(f"seed {seed}"),
        block_hash="block",
        noise=NOISE,
        nonces=range(len(found)),
        residuals=found.distances.tolist(),
        profiles=found.text,
        proof=f"{seed:064x}",
    )


def test_noise_comes_back_from_its_text():
    text = dumps(NOISE.as_dict())
    read = noise_from_dict(loads(text, "noise"))
    assert read == NOISE
    assert dumps(read.as_dict()) == text


@pytest.mark.parametrize(
    "change",
    [
        {"test": 99},
        {"source": 5},
        {"tokens": {}},
        {"sketches": NOISE.tokens.as_dict()},
        {"tokens": NOISE.tokens.as_dict() | {"between": "wide"}},
        {"tokens": NOISE.tokens.as_dict() | {"effect": 0.5}},
        {"sketches": NOISE.sketches.as_dict() | {"between": 1.9, "effect": 1e307}},
        {"tokens": NOISE.tokens.as_dict() | {"law": {"weights": [True] * COLUMNS}}},
        {"more": 1},
    ],
)
def test_what_is_no_noise_of_responses_is_refused(change: dict[str, object]):
    with pytest.raises(CalibrationError):
        noise_from_dict(NOISE.as_dict() | change)


def test_blocks_come_back_from_their_text_to_the_bit():
    blocks = response(0, tokens=70)
    read = ResponseBlocks.parse(blocks.distances.tolist(), blocks.text)
    assert np.array_equal(read.profiles, blocks.profiles)
    assert read.sizes == (32, 32, 6)
    assert read.sizes == (32, 32, 6)
    rest = read.without([0, 2])
    assert rest.sizes == (32,)
    assert np.array_equal(rest.profiles, blocks.profiles[32:64])


@pytest.mark.parametrize("text", ["AAAA", "%", "AAAAAA==", None])
def test_text_that_is_no_profile_of_these_blocks_is_refused(text: str | None):
    if text is None:
        text = response(0, tokens=20).text
    with pytest.raises(ValueError, match=r"."):
        ResponseBlocks.parse([0.1] * 3, text)


def test_tokens_and_sketches_are_averaged_and_not_multiplied():
    test = ResponseTest(NOISE)
    for seed in range(4):
        test.update(response(seed, multiple=6.0))
    result = test.result
    parts = (result.tokens.log_e_value, result.sketches.log_e_value)
    assert result.log_e_value == pytest.approx(np.logaddexp(*parts) - math.log(2))
    assert result.verdict == "fraud"


def test_a_response_without_sketches_or_without_seeds_is_judged_by_the_rest():
    tokens = ResponseBlocks.whole([math.nan] * 3, response(0).profiles)
    test = ResponseTest(NOISE).update(tokens)
    assert (test.result.tokens.n, test.result.sketches.n) == (80, 0)
    sketches = ResponseBlocks.whole(response(0).distances, np.zeros((0, COLUMNS)))
    test = ResponseTest(NOISE).update(sketches)
    assert (test.result.tokens.n, test.result.sketches.n, test.result.n) == (0, 3, 3)


def test_honest_responses_are_honest_once_both_kinds_of_evidence_say_so():
    test = ResponseTest(NOISE)
    for seed in range(24):
        test.update(response(seed))
    result = test.result
    assert result.verdict == "honest"
    assert result.log_evidence_honest == min(
        result.tokens.log_evidence_honest, result.sketches.log_evidence_honest
    )


def test_a_ledger_keeps_responses_beside_nonces_and_audits_both(tmp_path: Path):
    path = tmp_path / "ledger.sqlite3"
    with Ledger(path) as ledger:
        ledger.append([of_nonces(0), *(update(seed) for seed in range(3))])
        (cheat,) = ledger.append([update(9, response(9, multiple=30.0), key="node_B")])
        assert cheat.verdict == "fraud"
        (again,) = ledger.append([update(0)])  # a response that is handed in twice counts once
        assert (again.evidence.n, again.recorded, again.audits) == (9, 12, 4)
        ledger.export(tmp_path / "ledger.jsonl")
    for file in (path, tmp_path / "ledger.jsonl"):
        assert audit_ledger(file).clean


def test_an_edited_profile_is_found(tmp_path: Path):
    path = tmp_path / "ledger.sqlite3"
    with Ledger(path) as ledger:
        ledger.append([update(0)])
    with by_hand(path) as database:
        database.execute(
            'UPDATE updates SET entry = replace(entry, \'"profiles":"\', \'"profiles":"AAAA\')'
        )
    assert audit_ledger(path).faults[0].entry == 1


def test_what_is_no_response_is_refused_before_it_is_recorded(tmp_path: Path):
    with Ledger(tmp_path / "ledger.sqlite3") as ledger:
        with refuses(UsageError, "what is no response is refused before it is recorded"):
            ledger.append([replace(of_nonces(0), profiles=response(0).text)])
        with refuses(UsageError, "what is no response is refused before it is recorded, 2"):
            ledger.append([replace(update(0), residuals=[0.1, 0.1], nonces=range(2))])
        with refuses(UsageError, "what is no response is refused before it is recorded, 4"):
            distances = [0.1] * (MOST_BLOCKS + 1)
            ledger.append([update(0, ResponseBlocks.whole(distances, np.zeros((0, COLUMNS))))])
        with refuses(DataError, "what is no response is refused before it is recorded, 3"):
            ledger.append([replace(of_nonces(1), noise=NOISE)])
        assert ledger.head[0] == 0
