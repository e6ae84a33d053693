import warnings

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM
from transformers.utils import logging as hf_logging

from assay.errors import BackendUnavailable, BadWeights, ModelError, OutOfMemory, UsageError
from assay.models import load_model
from assay.models.configuration import silence_transformers
from assay.models.device import free_bytes
from tests.models.storing import configure, rewrite
from tests.wordings import refuses


def test_a_loaded_model_is_the_stored_one_and_ready_to_run(checkpoint):
    model = load_model(checkpoint, device="cpu")
    with silence_transformers():
        plain = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert {n: p.tolist() for n, p in model.module.named_parameters()} == {
        n: p.tolist() for n, p in plain.named_parameters()
    }
    assert not model.module.training
    assert model.module.config._attn_implementation == "sdpa"
    assert model.tokenizer is None
    assert (model.hidden_size, model.num_layers, model.vocab_size, model.max_positions) == (
        32,
        2,
        96,
        64,
    )
    assert (model.architecture, model.weights, model.reference) == (
        "Qwen3ForCausalLM",
        "trained",
        str(checkpoint),
    )
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_dtype_is_honoured_and_positions_stay_exact(checkpoint, name):
    model = load_model(checkpoint, dtype=name, device="cpu")
    assert {p.dtype for p in model.module.parameters()} == {getattr(torch, name)}
    frequencies = dict(model.module.named_buffers())["model.rotary_emb.inv_freq"]
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, 10_000.0 ** -(torch.arange(0, 16, 2) / 16))


def test_the_digest_ignores_sharding_and_the_dtype_of_loading(write_checkpoint):
    whole = write_checkpoint("whole")
    sharded = write_checkpoint("sharded", shard="10KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    digests = {
        load_model(whole, device="cpu").digest,
        load_model(whole, dtype="float32", device="cpu").digest,
        load_model(sharded, device="cpu").digest,
    }
    assert len(digests) == 1


def test_the_digest_follows_values_names_shapes_and_stored_dtype(write_checkpoint):
    def one_bit(module):
        next(module.parameters()).data[0, 0] += 1

    directories = [
        write_checkpoint("plain"),
        write_checkpoint("bit", edit=one_bit),
        write_checkpoint("wide", dtype=torch.float32),
        write_checkpoint("llama", architecture="llama"),
        write_checkpoint("untied", tie_word_embeddings=False),
    ]
    assert len({load_model(directory, device="cpu").digest for directory in directories}) == len(
        directories
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_digest_and_the_same_random_bits(checkpoint):
    assert (
        load_model(checkpoint, device="cuda").digest == load_model(checkpoint, device="cpu").digest
    )
    there = load_model(checkpoint, device="cuda", weights="random-all", block_hash="b").module
    here = load_model(checkpoint, device="cpu", weights="random-all", block_hash="b").module
    for (_, a), (_, b) in zip(there.named_parameters(), here.named_parameters(), strict=True):
        assert torch.equal(a.cpu(), b)
    for (_, a), (_, b) in zip(there.named_buffers(), here.named_buffers(), strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": "float8", "quantise": "int8-rows"}, "dtype"),
        ({"quantise": "int8-rows"}, "quantise"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:x"}, "device"),
        ({"device": "cpu:3"}, "device"),
        ({"weights": "random"}, "weights"),
        ({"weights": "random-all"}, "block_hash"),
        ({"block_hash": "b"}, "block_hash"),
    ],
)
def test_wrong_arguments_are_usage_errors(checkpoint, arguments, field):
    with pytest.raises(UsageError) as raised:
        load_model(checkpoint, **arguments)
    assert raised.value.field == field


def test_the_name_of_a_number_format_is_a_dtype(checkpoint):
    model = load_model(checkpoint, dtype="float8", device="cpu")
    same = load_model(checkpoint, quantise="float8", device="cpu")
    assert (model.quantised, model.dtype) == ("float8", torch.bfloat16)
    weights = dict(same.module.named_parameters())
    for name, weight in model.module.named_parameters():
        assert torch.equal(weight.view(torch.uint8), weights[name].view(torch.uint8)), name


def test_a_cuda_device_that_is_not_there(checkpoint):
    with refuses(BackendUnavailable, "a cuda device that is not there"):
        load_model(checkpoint, device="cuda:99")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "model.norm.weight.*NaN"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "I8"),
    ],
)
def test_wrong_weights_are_refused(checkpoint, edit, says):
    rewrite(checkpoint, edit)
    load_model(checkpoint, device="cpu", weights="random-all", block_hash="b")
    for mode in ({}, {"weights": "random-embed", "block_hash": "b"}):
        with pytest.raises(BadWeights, match=says):
            load_model(checkpoint, device="cpu", **mode)


def test_values_that_float16_cannot_hold_are_refused(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    assert load_model(checkpoint, dtype="float32", device="cpu").dtype == torch.float32
    with refuses(BadWeights, "values that float16 cannot hold are refused"):
        load_model(checkpoint, dtype="float16", device="cpu")


def test_sizes_that_do_not_fit_together(checkpoint):
    configure(checkpoint, num_key_value_heads=0)
    with pytest.raises(ModelError):
        load_model(checkpoint, device="cpu")


@pytest.mark.parametrize("place", ["from_pretrained", "from_config"])
def test_a_model_that_does_not_fit_is_not_called_corrupt(checkpoint, monkeypatch, place):
    def full(*_, **__):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes"
        )

    monkeypatch.setattr(AutoModelForCausalLM, place, full)
    mode = {} if place == "from_pretrained" else {"weights": "random-all", "block_hash": "b"}
    with refuses(OutOfMemory, "a model that does not fit is not called corrupt"):
        load_model(checkpoint, device="cpu", **mode)


def test_an_unreadable_tokenizer_is_named(checkpoint):
    (checkpoint / "tokenizer.json").write_text("{")
    with refuses(ModelError, "an unreadable tokenizer is named"):
        load_model(checkpoint, device="cpu")


def test_loading_is_silent_and_leaves_global_settings_alone(checkpoint, capfd):
    def state():
        return (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.initial_seed(),
            torch.random.get_rng_state().tolist(),
            hf_logging.get_verbosity(),
            hf_logging.is_progress_bar_enabled(),
            list(warnings.filters),
        )

    before = state()
    load_model(checkpoint, device="cpu")
    load_model(checkpoint, device="cpu", weights="random-all", block_hash="b")
    assert state() == before
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("family", "settings"), [("GptOss", GPT_OSS), ("Gemma2", {"attn_logit_softcapping": 2.0})]
)
def test_attention_that_sdpa_does_not_know_is_loaded_eager(tmp_path, family, settings):
    """The softmax of GPT-OSS has a sink, and Gemma 2 caps scores."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = getattr(transformers, f"{family}Config")(
        **sizes, **heads, **settings, sliding_window=8, initializer_range=0.3, pad_token_id=0
    )
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    theirs.save_pretrained(tmp_path)
    theirs.set_attn_implementation("eager")
    model = load_model(tmp_path)
    assert model.module.config._attn_implementation == "eager"
    ids = torch.randint(0, 128, (2, 24))
    with torch.inference_mode():
        torch.testing.assert_close(model.module(ids).logits, theirs(ids).logits, rtol=0, atol=0)


def test_a_limit_of_the_process_counts_as_the_end_of_a_gpu(monkeypatch):
    def has(**values):
        for name, value in values.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)

    has(mem_get_info=(60, 100), memory_allocated=10, memory_reserved=15)
    has(get_per_process_memory_fraction=1.0)
    assert free_bytes(torch.device("cuda")) == 60 + 15 - 10
    has(get_per_process_memory_fraction=0.4)
    assert free_bytes(torch.device("cuda")) == 40 - 10


def test_the_limit_of_a_container_counts_as_the_end_of_memory(tmp_path, monkeypatch):
    """A header could claim a batch for which a container has no room, and the kernel killed it."""
    monkeypatch.setattr("assay.memory.GROUP", tmp_path)
    monkeypatch.setattr("assay.models.device.kept_bytes", lambda: 7)
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 600000\nactive_file 100\ninactive_file 2000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    assert free_bytes(torch.device("cpu")) == 100_000 + 2100 + 7
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(torch.device("cpu")) > 1_000_000


def test_the_limit_of_a_gpu_without_a_number_is_asked_for_as_torch_wants_it(monkeypatch):
    for name in ("mem_get_info", "memory_allocated", "memory_reserved"):
        value = (60, 100) if name == "mem_get_info" else 0
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)

    def fraction(device):
        # torch takes a number, None or a device with a number.
        assert device is None or isinstance(device, int) or device.index is not None
        return 0.5

    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", fraction)
    assert free_bytes(torch.device("cuda")) == free_bytes(torch.device("cuda", 1)) == 50
