import copy
from dataclasses import replace

import pytest
import torch
from assay_research.redteam.attacks import Guesses, PartialForward, Shortcut
from torch.utils.flop_counter import FlopCounterMode

from assay.models import Model, load_model
from assay.models.decoder import backbone, decoder_layers
from assay.poc.protocol.transforms import Reading, unit
from research.tests.redteam.conftest import T

FULL = Shortcut((3,) * T)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=96)
        ).save_pretrained(path)
    return load_model(path, device="cpu")


def honest(model: Model, inputs: torch.Tensor, **positions) -> torch.Tensor:
    with torch.inference_mode():
        return unit(
            backbone(model.module)(
                inputs_embeds=inputs, use_cache=False, **positions
            ).last_hidden_state
        )


@pytest.mark.parametrize("name", ["small_model", "llama"])
def test_leaving_nothing_out_is_the_honest_forward(name, inputs_btd, request):
    model = request.getfixturevalue(name)
    whole = PartialForward(model, FULL)
    torch.testing.assert_close(
        whole.states(inputs_btd), honest(model, inputs_btd), atol=1e-5, rtol=0
    )
    assert whole.cost == 1.0
    every = Reading(torch.ones(4, T))
    torch.testing.assert_close(
        whole.read(inputs_btd, every), every.sum(honest(model, inputs_btd)), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(whole.read(inputs_btd, None), whole.states(inputs_btd)[:, -1])
    with torch.inference_mode():
        raw = backbone(model.module)(inputs_embeds=inputs_btd, use_cache=False).last_hidden_state
    framed = Reading(torch.ones(4, T), raw.mean(dim=(0, 1)), 1 / raw.std(dim=(0, 1)))
    torch.testing.assert_close(whole.read(inputs_btd, framed), framed.sum(raw), atol=1e-3, rtol=0)
    scaled = Reading(
        torch.cat([torch.zeros(4, T // 2), torch.ones(4, T - T // 2)], dim=1),
        first=T // 2,
        scaled=True,
    )
    torch.testing.assert_close(whole.read(inputs_btd, scaled), scaled.sum(raw), atol=1e-3, rtol=0)
    nothing = Shortcut((0,) * T)
    known = Guesses(model, inputs_btd, [framed, scaled])
    guessed = PartialForward(model, nothing, known).read(inputs_btd, scaled)
    assert (guessed - scaled.sum(raw)).norm() < scaled.sum(raw).norm(), (
        "guesses are of what the scale shows"
    )
    guessed = PartialForward(model, nothing, known).states(inputs_btd, framed)
    assert (guessed - framed.seen(raw)).norm() < (guessed - unit(raw)).norm(), (
        "guesses are of what the frame shows"
    )


def test_weights_in_float8_are_ranked_and_counted_as_those_they_stand_for(float8_scene, inputs_btd):
    model = replace(float8_scene.model, module=copy.deepcopy(float8_scene.model.module))
    for layer in decoder_layers(model.module):
        layer.mlp.up_proj.scales.data[: layer.mlp.up_proj.out_features // 2] *= 1e-6
    whole, half = (
        PartialForward(model, shortcut) for shortcut in (FULL, replace(FULL, neurons=(0.5,) * 3))
    )
    assert whole.cost == 1.0 > half.cost
    inputs = inputs_btd.to(torch.bfloat16)
    torch.testing.assert_close(half.states(inputs), whole.states(inputs), atol=1e-3, rtol=0)
    more = PartialForward(model, replace(FULL, neurons=(0.6,) * 3))
    assert (more.states(inputs) - whole.states(inputs)).abs().max() > 2e-3


def test_dropping_the_start_is_the_honest_forward_of_the_rest(small_model, inputs_btd):
    kept = PartialForward(small_model, Shortcut((0,) * 8 + (3,) * 24)).states(inputs_btd)
    rest = honest(small_model, inputs_btd[:, 8:], position_ids=torch.arange(8, T)[None])
    torch.testing.assert_close(kept[:, 8:], rest, atol=1e-5, rtol=0)
    assert (kept[:, :8] == 0).all(), "a position that nobody looked at contributes nothing"


def test_the_last_layer_is_needed_at_the_last_position_only(small_model, inputs_btd):
    lazy = PartialForward(small_model, Shortcut((2,) * (T - 1) + (3,), stale=True))
    torch.testing.assert_close(
        lazy.read(inputs_btd, None), honest(small_model, inputs_btd)[:, -1], atol=1e-5, rtol=0
    )
    assert lazy.cost < 0.8


def test_linear_parts_come_closer_than_dropped_ones(small_model, inputs_btd, guesses):
    truth = honest(small_model, inputs_btd)
    errors = {}
    for kind in ("linear", "drop"):
        parts = ("run", kind, "run")
        program = PartialForward(
            small_model, Shortcut((3,) * T, attention=parts, mlp=parts), guesses
        )
        errors[kind] = (program.states(inputs_btd) - truth).norm(dim=-1).mean()
    assert 0 < errors["linear"] < errors["drop"]


@pytest.mark.parametrize(
    "shortcut",
    [FULL, Shortcut((0,) * 8 + (3,) * 24), Shortcut((1,) * 16 + (3,) * 16, stale=True),
     Shortcut((3,) * T, mlp=("run", "drop", "run"))],
)  # fmt: skip
def test_the_cost_is_that_of_the_multiplications_done(small_model, inputs_btd, shortcut):
    def counted(program: PartialForward) -> int:
        with FlopCounterMode(display=False) as counter:
            program.states(inputs_btd)
        return counter.get_total_flops()

    measured = counted(PartialForward(small_model, shortcut)) / counted(
        PartialForward(small_model, FULL)
    )
    assert PartialForward(small_model, shortcut).cost == pytest.approx(measured, abs=0.03)
