"""Decoders inside models that read images too, and decoders whose layers keep a state."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from assay.errors import ModelError
from assay.models import load_model, model_info
from assay.models.decoder import decoder_layers
from assay.models.load import identify
from assay.poc import HFEngine, Round, prove
from tests.models.storing import DECODER, make_hybrid, make_wrapper
from tests.models.test_load import configure
from tests.wordings import refuses

ALONE: dict[str, Callable[[], torch.nn.Module]] = {
    "idefics3": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
    "qwen2_5_vl": lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER, rope_parameters=ROTATION)),
}
ROTATION = {"rope_type": "default", "rope_theta": 1e6}


def distances(model, engine):
    round = Round(block_hash="block", public_key="node", seq_len=16, preset="poc-2.0", model="m")
    return [record.distance for record in prove(model, round, range(8), engine=engine).records]


@pytest.mark.parametrize("kind", ALONE)
def test_a_decoder_that_is_wrapped_proves_as_it_does_alone(kind, tmp_path):
    path = make_wrapper(kind, tmp_path / kind)
    model = load_model(path, dtype="float32", device="cpu")
    assert (model.hidden_size, model.num_layers, model.vocab_size, model.max_positions) == (
        128,
        4,
        512,
        256,
    )
    assert len(decoder_layers(model.module)) == 4
    assert model_info(path).hidden_size == 128
    assert identify(path, dtype="float32").digest == model.digest
    alone = ALONE[kind]().eval()
    alone.model.load_state_dict(model.module.get_decoder().state_dict())
    unwrapped = replace(model, module=alone)
    of_wrapped, of_alone = (
        distances(each, HFEngine(each, batch_size=8, seq_len=16)) for each in (model, unwrapped)
    )
    assert of_wrapped == pytest.approx(of_alone, abs=2e-6)


@pytest.mark.parametrize("kind", ["falcon_h1", "lfm2"])
def test_a_nonce_of_a_model_with_state_does_not_depend_on_the_others(kind, tmp_path):
    model = load_model(make_hybrid(kind, tmp_path / kind), dtype="float32", device="cpu")
    many, one = (HFEngine(model, batch_size=size, seq_len=16) for size in (8, 2))
    assert distances(model, many) == pytest.approx(distances(model, one), abs=1e-6)


def test_numbers_that_json_does_not_have_are_read_as_transformers_writes_them(checkpoint):
    configure(checkpoint, time_step_limit=[0.0, {"__float__": "Infinity"}])
    assert load_model(checkpoint, device="cpu").module.config.time_step_limit == [0.0, float("inf")]


def test_a_model_without_a_decoder_is_refused(checkpoint):
    configure(checkpoint, model_type="florence2")
    with refuses(ModelError, "a model without a decoder is refused"):
        load_model(checkpoint)
