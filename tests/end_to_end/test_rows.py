"""One row, one result: whatever stands beside a row, and however it is computed, its numbers are
those of it alone.
"""

from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from assay.errors import ModelError
from assay.models import Model
from assay.models.shared_passes import steps_of_passes
from assay.poc import HFEngine, Round, get_pipeline
from assay.poc.responses import replay, respond
from assay.poc.responses.prefill import HFPrefill, PromptAndOutput
from assay.vhack import Sample, per_sample_gradients
from assay.vhack.training.sampling import sample_batches
from tests.models.zoo import LIMIT, USUAL, ZOO, random_model, rotary
from tests.usual import usual
from tests.vhack.adapter import made
from tests.vhack.conftest import bytewise
from tests.wordings import refuses

CLOSE = 1e-4  # of float32, for sums in another order; a row by other factors is 0.1 to 2 away


@pytest.fixture(scope="module", params=usual(ZOO, *USUAL))
def model(request):
    return random_model(request.param)


def tokens(length):
    return tuple(
        torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    )


def test_a_nonce_is_that_of_a_batch_of_one(model):
    inputs = torch.randn(16, 40, 32, generator=torch.Generator().manual_seed(0))
    beside = HFEngine(model, batch_size=16, seq_len=40).read(inputs)[5]
    (alone,) = HFEngine(model, batch_size=1, seq_len=40).read(inputs[5:6])
    assert (beside - alone).norm() < CLOSE * alone.norm()


def test_an_answer_beside_others_is_replayed_as_it_was_made_alone(model):
    prompts = [tokens(length) for length in (5, 20, 50, 31)]
    answers = respond(model, prompts, block_hash="B", public_key="K", max_tokens=24, end_tokens=[])
    for found in replay(answers, model):
        assert found.margins.max() < CLOSE
        assert found.residuals.max() < 10 * CLOSE  # sketches are float16


def test_what_gives_a_token_is_a_pass_over_the_tokens_so_far(model):
    rows = [PromptAndOutput(tokens(20), tokens(24)), PromptAndOutput(tokens(60), tokens(7))]
    found = dict(HFPrefill(model).run(rows))[0]
    ids = torch.tensor([rows[0].prompt + rows[0].output])
    with torch.inference_mode():
        so_far = [
            model.module(input_ids=ids[:, : 20 + step], use_cache=False).logits[0, -1]
            for step in range(24)
        ]
    wanted = torch.stack(so_far)
    assert ((found.logits - wanted).norm(dim=1) < CLOSE * wanted.norm(dim=1)).all()


def test_a_prefill_of_decoded_tokens_is_the_decoding(model):
    pipeline = get_pipeline("decode-64")
    round = Round(block_hash="B", public_key="K", seq_len=20, preset=pipeline.name, model="tiny")
    engine = HFEngine(model, batch_size=4, seq_len=20)
    (decoded,) = engine.run(round.inputs(range(3)), pipeline)
    (again,) = engine.run(round.inputs(range(3)), pipeline, decoded["tokens"])
    assert again["margins"].max() < CLOSE
    assert np.abs(again["sketches"].astype(float) - decoded["sketches"]).max() < 10 * CLOSE


def test_a_cache_that_only_its_architecture_knows_is_refused():
    with refuses(ModelError, "a cache that only its architecture knows is refused"):
        respond(random_model("MiniMax"), [tokens(5)], block_hash="B", public_key="K", max_tokens=4)


def test_a_model_that_keeps_nothing_of_what_it_has_read_does_not_decode():
    """Each token would follow the one before it alone."""
    module = OpenAIGPTLMHeadModel(OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4)).eval()
    model = Model(module, None, "gpt", "0" * 64, "random-all")
    pipeline = get_pipeline("decode-64")
    round = Round(block_hash="B", public_key="K", seq_len=20, preset=pipeline.name, model="tiny")
    engine = HFEngine(model, batch_size=1, seq_len=20)
    with pytest.raises(ModelError):
        respond(model, [tokens(5)], block_hash="B", public_key="K", max_tokens=4)
    with pytest.raises(ModelError):
        next(engine.run(round.inputs(range(1)), pipeline))


def test_rows_that_grow_side_by_side_are_sampled_on_one_side_of_the_limit():
    model = random_model("Llama longrope")
    how = {"batch": 2, "max_new_tokens": 8, "temperature": 1.0, "seed": 0}
    rows = [list(tokens(length)) for length in (20, LIMIT - 7)]
    with refuses(ModelError, "rows that grow side by side are sampled on one side of the limit"):
        next(sample_batches(model, ["", ""], rows, **how))


@pytest.mark.parametrize(
    ("kind", "starts"), [("longrope", [0, 3]), ("dynamic", [0, 3, 4, 5]), ("yarn", [0])]
)
def test_an_answer_has_a_pass_for_every_change_of_factors(kind, starts):
    for changes in (
        rotary(kind),
        {"rope_parameters": {"full_attention": rotary(kind)["rope_parameters"]}},
    ):
        config = made("Llama").config
        config.update(changes | {"max_position_embeddings": LIMIT})
        assert [steps.start for steps in steps_of_passes(config, LIMIT - 2, 6)] == starts


def on_and_off(change, value, usual):
    """A context in which the setting of a process has a value."""

    @contextmanager
    def changed():
        change(value)
        try:
            yield
        finally:
            change(usual)

    return changed


MODES = {
    "bfloat16 products": on_and_off(torch.set_float32_matmul_precision, "medium", "highest"),
    "by its switch": on_and_off(
        partial(setattr, torch.backends.mkldnn.matmul, "fp32_precision"), "bf16", "none"
    ),
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "float64": on_and_off(torch.set_default_dtype, torch.float64, torch.float32),
    "without gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "errors of numpy": partial(np.errstate, all="raise"),
}


def computed(model):
    """Everything that a program may ask of a model, as arrays."""
    read = HFEngine(model, batch_size=16, seq_len=16)
    for preset in ("poc-2.0", "hardened", "artifact"):
        inputs = Round(block_hash="B", public_key="K", seq_len=16).inputs(range(16))
        for values in read.run(inputs, get_pipeline(preset)):
            yield from values.values()
    answers = respond(
        model, [tokens(20)], block_hash="B", public_key="K", max_tokens=40, end_tokens=[]
    )
    yield from (np.array(answers.receipts[0].output), answers.receipts[0].sketches)
    for found in replay(answers, model):
        yield from (found.margins, found.profiles, found.residuals)
    samples = [Sample("def add(a, b):", "\n    return a + b\n"), Sample("a", " b")]
    yield from (rows.numpy() for rows in per_sample_gradients(samples, model).values())


@pytest.fixture(scope="module")
def plain():
    model = random_model("Llama", bytewise())
    return model, list(computed(model))


@pytest.mark.parametrize("mode", MODES)
def test_what_a_program_has_set_changes_no_number(mode, plain):
    model, wanted = plain
    with MODES[mode]():
        found = list(computed(model))
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))
