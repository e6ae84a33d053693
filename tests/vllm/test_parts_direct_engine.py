"""What the direct path reads of an engine, without vLLM: what keeps nonces requests, its passes and their cache."""

import pytest
import torch

from assay.poc.vllm import compatibility as _versions
from assay.poc.vllm.direct_worker import DirectPasses, _zeros_like, why_requests
from tests.vllm.direct import SPEC, FullAttentionSpec, MambaSpec, config, runner


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_versions, "installed_version", lambda: "0.32.0")


def test_an_ordinary_engine_takes_calls(newest):
    made = config()
    assert why_requests(runner(made), made, SPEC) is None


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"speculative_config": object()}, "speculative"),
        ({"lora_config": object()}, "lora"),
        ({"kv_transfer_config": object()}, "kv-transfer"),
        ({"model_config__enable_sleep_mode": True}, "sleep"),
        ({"parallel_config__pipeline_parallel_size": 2}, "stages"),
        ({"parallel_config__data_parallel_size": 2}, "data parallel"),
        ({"parallel_config__enable_eplb": True}, "eplb"),
        ({"parallel_config__use_ubatching": True}, "dbo"),
        ({"scheduler_config__max_num_batched_tokens": 7}, "longer than a step"),
    ],
)
def test_settings_under_which_nonces_stay_requests_are_named(newest, changed, word: str):
    made = config(**changed)
    assert word in why_requests(runner(made), made, SPEC)


def test_positions_of_several_dimensions_take_calls_where_they_were_run(newest):
    made = config(model_config__uses_mrope=True)
    on_gpu = runner(made)
    assert why_requests(on_gpu, made, SPEC) is None
    on_gpu.device = torch.device("cuda")
    assert "several dimensions" in why_requests(on_gpu, made, SPEC)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"specs": (FullAttentionSpec, FullAttentionSpec)}, "2 kinds"),
        ({"specs": (MambaSpec,)}, "MambaSpec"),
        ({"backend": "FLASHINFER"}, "FLASHINFER"),
        ({"shapes": ((9, 2, 4, 8), (9, 2, 4, 16))}, "several forms"),
        ({"shapes": ((2, 9, 4, 2, 8),)}, "several forms"),
    ],
)
def test_models_whose_nonces_stay_requests_are_named(newest, changed, word: str):
    made = config()
    assert word in why_requests(runner(made, **changed), made, SPEC)


def test_an_older_vllm_is_named_and_nothing_else_of_it_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_versions, "installed_version", lambda: "0.31.2")
    assert "before 0.32" in why_requests(None, None, SPEC)


@pytest.mark.parametrize(("seq_len", "batch"), [(8, 8), (64, 1), (63, 1), (2, 16), (5, 12)])
def test_a_pass_fits_into_a_step_of_the_engine(seq_len: int, batch: int):
    made = config()
    assert DirectPasses(runner(made), made, lambda spec: None)._batch(seq_len) == batch


def test_a_pass_is_shorter_where_its_cache_must_fit_into_the_memory_of_a_step():
    made = config()
    per_token = 4 * (2 * 8 + 16)  # keys and values of two heads, and an input, in float32
    passes = DirectPasses(runner(made), made, lambda spec: None, activations=64 * per_token)
    assert passes._batch(8) == 4


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)])
def test_the_private_cache_lies_in_memory_as_that_of_the_engine(order):
    own = torch.ones([(9, 2, 4, 8)[axis] for axis in order]).permute([order.index(axis) for axis in range(4)])
    made = _zeros_like(own, 5)
    assert (made.shape, made.any().item()) == ((5, 2, 4, 8), False)
    assert sorted(range(4), key=made.stride) == sorted(range(4), key=own.stride)


def test_every_layer_has_its_own_cache_again_after_a_pass_that_failed():
    made = config()
    over = runner(made)
    passes = DirectPasses(over, made, lambda spec: None)
    assert passes.prepare(SPEC) == 8
    layers = list(made.compilation_config.static_forward_context.values())
    before = [layer.kv_cache for layer in layers]

    def fail() -> None:
        with passes._private_cache(partial=True):
            assert all(layer.kv_cache is passes._cache for layer in layers)
            passes._cache.fill_(float("nan"))
            raise ValueError("in a layer")

    with pytest.raises(ValueError, match="in a layer"):
        fail()
    assert all(layer.kv_cache is own for layer, own in zip(layers, before, strict=True))
    with passes._private_cache(partial=True):
        assert not passes._cache.any()
