"""One row, one result: whatever stands beside a row, and however it is computed, its numbers are those of it alone."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from assay.errors import ModelError
from assay.models.load import Model
from assay.models.rows import steps_of_passes
from assay.poc import HFEngine, Round, get_pipeline
from assay.poc.responses import replay, respond
from assay.poc.responses.prefill import HFPrefill, PromptAndOutput
from assay.vhack import Sample, per_sample_gradients, weight_svd
from assay.vhack.training.pool import sample_batches
from tests.vhack.adapter import made, worst_error
from tests.vhack.conftest import bytewise
from tests.vhack.test_architectures import EXPERTS, FALCON_H1, LATENT, OPT, ROUTED, SPARSE

LIMIT = 32  # rows of the tests are shorter, longer, and grow beyond it
CLOSE = 1e-4  # of float32, for sums in another order; a row by other factors is 0.1 to 2 away


def rotary(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": LIMIT} | more}


LONGROPE = rotary("longrope", factor=8.0, short_factor=[1.0] * 4, long_factor=[1.0, 3.0, 5.0, 7.0])
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 16}
LINEAR = {f"linear_{part}": 8 for part in ("key_head_dim", "value_head_dim")} | {"linear_num_value_heads": 4}
WINDOW = {"sliding_window": 16}
ZOO = {
    "Llama": {},
    "Llama longrope": LONGROPE,
    "Phi3 longrope": LONGROPE | {"original_max_position_embeddings": LIMIT, "eos_token_id": 2},
    "Llama dynamic": rotary("dynamic", factor=4.0),
    "Llama yarn": rotary("yarn", factor=4.0),
    "Llama llama3": rotary("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    "Mistral": WINDOW,
    "Qwen2": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "Qwen3": {},
    "Gemma2": WINDOW,
    "Gemma3": WINDOW,
    "Cohere": {},
    "Cohere2": WINDOW,
    "GptOss": WINDOW | MIXTURE,
    "Granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Qwen3Moe": EXPERTS,
    "Mixtral": MIXTURE | {"sliding_window": None},
    "DeepseekV3": LATENT | ROUTED | {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "DeepseekV32": LATENT | ROUTED | SPARSE | {"index_topk": LIMIT},
    "Doge": {"keep_window_size": 8},
    "OPT": OPT,
    "FalconH1": FALCON_H1,
    "Lfm2": {"layer_types": ["conv", "full_attention"], "conv_dim": 32, "block_dim": 32},
}
SLOW = {
    "Qwen3Next": SHARED | LINEAR | {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1},
    "Qwen2Moe": SHARED,
    "Olmo2": {},
    "Olmo3": WINDOW,
    "Exaone4": WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "Glm4": {},
    "BitNet": {},
    "TrOCR": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
}


def random_model(name):
    """A model of an architecture whose weights are large enough for every part to matter."""
    family = name.split()[0]
    module = made(family, "TextConfig" if family == "Gemma3" else "Config", **(ZOO | SLOW).get(name, {}))
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return Model(module, bytewise(), name, "0" * 64, "random-all")


@pytest.fixture(scope="module", params=[*ZOO, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def model(request):
    return random_model(request.param)


def tokens(length):
    return tuple(torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist())


def test_a_nonce_is_that_of_a_batch_of_one(model):
    inputs = torch.randn(16, 40, 32, generator=torch.Generator().manual_seed(0))
    beside = HFEngine(model, batch_size=16, seq_len=40).read(inputs)[5]
    (alone,) = HFEngine(model, batch_size=1, seq_len=40).read(inputs[5:6])
    assert (beside - alone).norm() < CLOSE * alone.norm()


def test_an_answer_beside_others_is_replayed_as_it_was_made_alone(model):
    prompts = [tokens(length) for length in (5, 20, 50, 31)]
    answers = respond(model, prompts, block_hash="B", public_key="K", max_tokens=24, stop=[])
    for found in replay(answers, model):
        assert found.margins.max() < CLOSE
        assert found.residuals.max() < 10 * CLOSE  # sketches are float16


def test_what_gives_a_token_is_a_pass_over_the_tokens_so_far(model):
    rows = [PromptAndOutput(tokens(20), tokens(24)), PromptAndOutput(tokens(60), tokens(7))]
    found = dict(HFPrefill(model).run(rows))[0]
    ids = torch.tensor([rows[0].prompt + rows[0].output])
    with torch.inference_mode():
        so_far = [model.module(input_ids=ids[:, : 20 + step], use_cache=False).logits[0, -1] for step in range(24)]
    wanted = torch.stack(so_far)
    assert ((found.logits - wanted).norm(dim=1) < CLOSE * wanted.norm(dim=1)).all()


def test_a_prefill_of_decoded_tokens_is_the_decoding(model):
    pipeline = get_pipeline("decode-64")
    round = Round(block_hash="B", public_key="K", seq_len=20, preset=pipeline.name, model="tiny")
    (made_,) = HFEngine(model, batch_size=4, seq_len=20).decoded(round, pipeline, range(3))
    (again,) = HFEngine(model, batch_size=4, seq_len=20).replayed(round, pipeline, range(3), made_.tokens)
    assert again.margins.max() < CLOSE
    assert np.abs(again.sketches.astype(float) - made_.sketches).max() < 10 * CLOSE


def test_the_gradient_of_a_sample_is_that_of_the_sample_alone(model):
    ends = (" x", "\n    return a + b\n", " more than the limit of them")
    samples = [Sample("def add(a, b):", end) for end in ends] + [Sample("a", " long completion of one token")]
    how = {"svd": weight_svd(model, min_coverage=0.0)}
    beside = per_sample_gradients(samples, model, **how)
    alone = [per_sample_gradients([sample], model, **how) for sample in samples]
    wanted = {name: torch.cat([one[name] for one in alone]) for name in beside}
    reached = [name for name in wanted if wanted[name].any()]
    assert worst_error(*({name: rows[name] for name in reached} for rows in (beside, wanted))) < CLOSE


def test_a_cache_that_only_its_architecture_knows_is_refused():
    """The decoding of MiniMax-Text is not its prefill, in transformers 5.17."""
    with pytest.raises(ModelError, match="MiniMax"):
        respond(random_model("MiniMax"), [tokens(5)], block_hash="B", public_key="K", max_tokens=4)


def test_rows_that_grow_side_by_side_are_sampled_on_one_side_of_the_limit():
    model, how = random_model("Llama longrope"), {"batch": 2, "max_new_tokens": 8, "temperature": 1.0, "seed": 0}
    rows = [list(tokens(length)) for length in (20, LIMIT - 7)]
    with pytest.raises(ModelError, match="20 to 33 tokens"):
        next(sample_batches(model, ["", ""], rows, **how))


@pytest.mark.parametrize(("kind", "starts"), [("longrope", [0, 3]), ("dynamic", [0, 3, 4, 5]), ("yarn", [0])])
def test_an_answer_has_a_pass_for_every_change_of_factors(kind, starts):
    for changes in (rotary(kind), {"rope_parameters": {"full_attention": rotary(kind)["rope_parameters"]}}):
        config = made("Llama").config
        config.update(changes | {"max_position_embeddings": LIMIT})
        assert [steps.start for steps in steps_of_passes(config, LIMIT - 2, 6)] == starts


@contextmanager
def set_to(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, before)


@contextmanager
def default(dtype):
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


@contextmanager
def products_in(precision):
    torch.set_float32_matmul_precision(precision)
    yield
    assert torch.get_float32_matmul_precision() == precision, "not what the program had set"
    torch.set_float32_matmul_precision("highest")


MODES = {
    "medium": lambda: products_in("medium"),
    "tf32": lambda: set_to(torch.backends.cuda.matmul, "allow_tf32", True),
    "bfloat16 products": lambda: set_to(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default(torch.float64),
    "bfloat16": lambda: default(torch.bfloat16),
    "inference": torch.inference_mode,
    "errors": lambda: np.errstate(all="raise"),
}


def computed(model):
    """Everything that a program may ask of a model, as arrays."""
    read = HFEngine(model, batch_size=16, seq_len=16)
    for preset in ("poc-2.0", "hardened", "artifact"):
        yield from read.outputs(Round(block_hash="B", public_key="K", seq_len=16), get_pipeline(preset), range(16))
    answers = respond(model, [tokens(20)], block_hash="B", public_key="K", max_tokens=40, stop=[])
    yield from (np.array(answers.receipts[0].output), answers.receipts[0].sketches)
    for found in replay(answers, model):
        yield from (found.margins, found.profiles, found.residuals)
    samples = [Sample("def add(a, b):", "\n    return a + b\n"), Sample("a", " b")]
    yield from (rows.numpy() for rows in per_sample_gradients(samples, model).values())


@pytest.fixture(scope="module")
def plain():
    model = random_model("Llama")
    return model, list(computed(model))


@pytest.mark.parametrize("mode", MODES)
def test_what_a_program_has_set_changes_no_number(mode, plain):
    model, wanted = plain
    with MODES[mode]():
        found = list(computed(model))
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))
