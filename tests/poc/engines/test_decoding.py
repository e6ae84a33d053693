"""Decoding: no other nonce of the batch has a part in tokens, margins and sketches."""

import numpy as np
import pytest
from torch import nn

from assay.errors import BadWeights, UsageError
from assay.models import load_model
from assay.poc import PIPELINES, HFEngine, Round, get_pipeline
from assay.poc.engines.base import check_supported
from assay.poc.protocol.pipelines import runs_on_vllm
from tests.usual import usual
from tests.wordings import refuses

STEPS = 64
PROMPT = 16
PIPELINE = get_pipeline(f"decode-{STEPS}")
ROUND = Round(
    block_hash="block_alpha",
    public_key="node_A",
    preset=PIPELINE.name,
    seq_len=PROMPT,
    model="small",
)


@pytest.fixture(scope="module")
def engine(small_model) -> HFEngine:
    return HFEngine(small_model, batch_size=16, seq_len=PROMPT)


@pytest.fixture(scope="module")
def honest(engine: HFEngine):
    """Tokens and sketches of nonces 0 to 15."""
    (batch,) = engine.run(ROUND.inputs(range(16)), PIPELINE)
    return batch


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_size", usual([16, 3], 3))
def test_a_nonce_has_the_same_bits_wherever_it_stands(
    small_checkpoint, dtype: str, batch_size: int
):
    engine = HFEngine(
        load_model(small_checkpoint, dtype=dtype, device="cpu"),
        batch_size=batch_size,
        seq_len=PROMPT,
    )
    pipeline = get_pipeline("decode-32")
    found: dict[int, set[tuple[bytes, bytes]]] = {}
    for nonces in (range(8), [*range(5, 9), 3, 0], [7], [99, 7, 3]):
        batches = list(engine.run(ROUND.inputs(nonces), pipeline))
        rows = [
            (tokens.tobytes(), sketches.tobytes())
            for values in batches
            for tokens, sketches in zip(values["tokens"], values["sketches"], strict=True)
        ]
        sizes = [len(values["tokens"]) for values in batches]
        assert sizes[:-1] == [batch_size] * (len(batches) - 1)
        for nonce, bits in zip(nonces, rows, strict=True):
            found.setdefault(nonce, set()).add(bits)
    assert {len(bits) for bits in found.values()} == {1}
    assert len({bits for of_nonce in found.values() for bits in of_nonce}) == len(found)


def test_logits_beyond_the_dtype_are_an_error_and_no_tokens(small_checkpoint):
    model = load_model(small_checkpoint, dtype="float16", device="cpu")
    head_VD = model.module.get_output_embeddings().weight.detach()
    model.module.lm_head.weight = nn.Parameter(head_VD * (6e4 / head_VD.abs().max()))
    engine = HFEngine(model, batch_size=16, seq_len=PROMPT)
    with pytest.raises(BadWeights):
        list(engine.run(ROUND.inputs(range(2)), PIPELINE))


def test_a_replay_says_what_the_model_gives_after_any_tokens(engine: HFEngine, honest):
    (same,) = engine.run(ROUND.inputs(range(16)), PIPELINE, honest["tokens"])
    assert (same["margins"] < 1e-4).all()
    assert np.abs(same["sketches"].astype(float) - honest["sketches"]).max() < 2e-3
    changed = honest["tokens"].copy()
    changed[4, 10] = (changed[4, 10] + 1) % engine.vocab_size
    changed[5, 20] = engine.vocab_size  # no token at all
    (other,) = engine.run(ROUND.inputs(range(16)), PIPELINE, changed)
    assert other["margins"][4, 10] > 0
    assert other["margins"][4, :10].max() < 1e-4
    assert np.isinf(other["margins"][5, 20])
    assert np.isfinite(np.delete(other["margins"], 5, axis=0)).all()
    untouched = [row for row in range(16) if row not in (4, 5)]
    np.testing.assert_array_equal(other["margins"][untouched], same["margins"][untouched])
    np.testing.assert_array_equal(other["sketches"][untouched], same["sketches"][untouched])


def test_what_does_not_fit_the_model_is_refused_by_name(small_model):
    engine = HFEngine(small_model, batch_size=16, seq_len=100)
    with refuses(UsageError, "what does not fit the model is refused by name") as raised:
        next(engine.run(ROUND.inputs(range(1)), PIPELINE))
    assert "--seq-len 64" in raised.value.do


def test_vllm_takes_what_decodes_and_not_what_reads_the_trained_head_once(engine: HFEngine):
    check_supported(engine, PIPELINE)
    assert runs_on_vllm(PIPELINE)
    assert not runs_on_vllm(PIPELINES["permutation"])
