"""References: what they lead to, what is known of a model without its weights, and what is
refused.
"""

import math
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from assay.errors import ModelError, ModelNotFound, UnsafeCheckpoint, UsageError
from assay.models import list_models, load_model, model_info
from assay.models import resolve as resolving
from assay.models.load import identify
from assay.models.resolve import resolve
from tests.models.storing import configure
from tests.wordings import refuses

from .conftest import SIZES


@pytest.fixture
def no_cache(monkeypatch):
    monkeypatch.setattr(resolving, "find_cached", lambda hub_id: None)


def answer(monkeypatch, names):
    """Makes the hub publish files of these names, or fail."""

    def model_info(self, hub_id, *, timeout):
        assert timeout <= 10
        if isinstance(names, Exception):
            raise names
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    monkeypatch.setattr(resolving.HfApi, "model_info", model_info)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("reference:qwen", "reference:qwen3"),
        ("reference:lama", "reference:llama"),
        ("shape:qwen3-0.6B", "shape:qwen3-0.6b"),
        ("shape:llama3.1-8b", "shape:llama-3.1-8b"),
    ],
)
def test_a_wrong_bundled_name_gets_a_suggestion(wrong, meant):
    with pytest.raises(ModelNotFound, match=f"did you mean '{meant}'"):
        load_model(wrong)


@pytest.mark.parametrize(
    ("bare", "meant"),
    [
        ("qwen3", "reference:qwen3"),
        ("organism", "reference:organism"),
        ("qwen3-4b", "shape:qwen3-4b"),
    ],
)
def test_a_bundled_name_without_its_prefix_gets_a_suggestion(monkeypatch, tmp_path, bare, meant):
    answer(monkeypatch, AssertionError("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match=f"did you mean '{meant}'"):
        load_model(bare)
    (tmp_path / bare).mkdir()
    with refuses(
        ModelNotFound, "a bundled name without its prefix gets a suggestion"
    ):  # a directory of that name is the directory
        load_model(bare)


@pytest.mark.parametrize("path", ["./absent", "a/b/c", "~absent/model", Path("owner/name")])
def test_a_missing_directory_is_not_looked_up_on_the_hub(monkeypatch, path):
    answer(monkeypatch, AssertionError("the hub was asked"))
    with refuses(ModelNotFound, "a missing directory is not looked up on the hub"):
        load_model(path)


def test_a_file_is_no_model(checkpoint):
    with refuses(ModelNotFound, "a file is no model"):
        load_model(checkpoint / "model.safetensors")


def beside(name, content="{}"):
    return lambda folder: (folder / name).write_text(content)


def only(name):
    def keep(folder):
        for file in folder.iterdir():
            file.unlink()
        (folder / name).write_text("{}")

    return keep


TOKENIZER = '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": %s}, "merges": []}}'


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (beside("model.safetensors.index.json", '{"weight_map": {}}'), "one set of weights"),
        (beside("model-00001-of-00002.safetensors"), "one set of weights"),
        (only("tokenizer.json"), "no config.json"),
        (lambda folder: configure(folder, is_causal=False), "is_causal"),
        (lambda folder: configure(folder, add_cross_attention=True), "add_cross_attention"),
        (lambda folder: configure(folder, return_dict=False), "return_dict"),
        (lambda folder: configure(folder, model_type="bert"), "is_decoder"),
        (lambda folder: configure(folder, model_type="xlm"), "causal = False"),
        (lambda folder: configure(folder, num_hidden_layers="2"), "num_hidden_layers"),
        (lambda folder: configure(folder, num_hidden_layers=10**9), "num_hidden_layers"),
        (lambda folder: configure(folder, max_position_embeddings=-5), "max_position_embeddings"),
        (lambda folder: configure(folder, rope_theta={"__float__": "NaN"}), "not a number"),
        (beside("tokenizer.json", "[" * 100_000), "tokenizer.*deep|tokenizer.*recursion"),
        (beside("tokenizer.json", TOKENIZER % 2**31), "highest token id"),
        (beside("tokenizer.json", TOKENIZER % -1), "too small"),
        (beside("tokenizer.json", TOKENIZER % "0.5, "), "tokenizer"),
        (
            beside("tokenizer.json", '{"normalizer": {"precompiled_charsmap": "/////wAA"}}'),
            "precompiled_charsmap.*shorter",
        ),
        (
            beside("tokenizer_config.json", '{"added_tokens_decoder": {"4294967295": {}}}'),
            "highest token id",
        ),
    ],
)
def test_a_model_as_users_have_them_is_refused_in_words(checkpoint, spoil, says):
    spoil(checkpoint)
    with pytest.raises(ModelError, match=says):
        load_model(checkpoint, device="cpu")


def test_attention_that_is_causal_whatever_is_decoder_says_is_read(tmp_path):
    """Pythia does not say is_decoder, of which GPT-NeoX has the default False."""
    config = GPTNeoXConfig(**SIZES, rotary_pct=0.5)
    theirs = GPTNeoXForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    ids = torch.randint(0, 96, (1, 24))
    changed = ids.clone()
    changed[0, -1] = 95 - ids[0, -1]
    with torch.inference_mode():
        logits = model.module(ids).logits
        torch.testing.assert_close(logits, theirs(ids).logits)
        torch.testing.assert_close(model.module(changed).logits[:, :-1], logits[:, :-1])


def test_a_pickle_beside_safetensors_is_not_read_and_a_long_name_is_no_directory(checkpoint):
    digest = load_model(checkpoint, device="cpu").digest
    (checkpoint / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.warns(UserWarning, match=r"pytorch_model\.bin"):
        assert load_model(checkpoint, device="cpu").digest == digest
    with refuses(
        ModelNotFound, "a pickle beside safetensors is not read and a long name is no directory"
    ):
        load_model(Path("a" * 5000))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": 3}', "\xff", "[" * 100_000])
def test_an_unreadable_configuration(checkpoint, text):
    (checkpoint / "config.json").write_bytes(text.encode("latin-1"))
    with refuses(ModelError, "an unreadable configuration"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model_type": "no-such-model"}, "no-such-model"),
        ({"model_type": "vit"}, "vit"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_labels": 10**6}, "num_labels = 1000000"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps = inf"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "rope_theta = 0"),
        (
            {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**6}},
            "num_hidden_layers = 1000000",
        ),
        ({"model_type": "qwen3_vl", "vision_config": {"depth": 5000}}, "depth = 5000"),
        ({"model_type": "xlstm", "num_blocks": 5000}, "num_blocks = 5000"),
        (
            {"model_type": "cohere2_moe", "first_k_dense_replace": 10**6},
            "first_k_dense_replace = 1000000",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
    ],
)
def test_a_configuration_that_cannot_be_used(checkpoint, settings, says):
    configure(checkpoint, **settings)
    with pytest.raises(ModelError, match=says):
        load_model(checkpoint)


def test_code_that_comes_with_a_checkpoint_is_not_run(checkpoint):
    configure(checkpoint, model_type="custom", auto_map={"AutoConfig": "evil.Config"})
    (checkpoint / "evil.py").write_text("raise SystemExit('code was run')")
    with refuses(ModelError, "code that comes with a checkpoint is not run"):
        load_model(checkpoint)


def test_a_hub_id_is_not_taken_for_random_weights(monkeypatch, no_cache):
    answer(monkeypatch, httpx.ConnectTimeout("timed out"))
    for name in ("HuggingFaceTB/SmolLM2", "gpt2"):
        with refuses(ModelNotFound, "a hub id is not taken for random weights") as raised:
            load_model(name)
        assert "shape:" not in raised.value.do


def test_an_adapter_is_refused(checkpoint):
    (checkpoint / "adapter_config.json").write_text("{}")
    with refuses(ModelError, "an adapter is refused"):
        load_model(checkpoint)


@pytest.mark.usefixtures("no_cache")
def test_a_hub_model_that_is_a_pickle_is_refused_before_the_download(monkeypatch):
    answer(monkeypatch, ["config.json", "pytorch_model.bin"])
    monkeypatch.setattr(resolving, "snapshot_download", lambda *a, **k: pytest.fail("downloaded"))
    with refuses(UnsafeCheckpoint, "a hub model that is a pickle is refused before the download"):
        load_model("owner/name")


def test_a_whole_copy_in_the_cache_needs_no_network(monkeypatch, checkpoint):
    answer(monkeypatch, AssertionError("the hub was asked"))
    monkeypatch.setattr(resolving, "snapshot_download", lambda *a, **k: str(checkpoint))
    assert (
        load_model("owner/name", device="cpu").digest == load_model(checkpoint, device="cpu").digest
    )


def test_half_a_copy_in_the_cache_is_completed(monkeypatch, checkpoint):
    calls = []

    def snapshot_download(hub_id, *, local_files_only=False, **options):
        calls.append(local_files_only)
        return str(checkpoint.parent if local_files_only else checkpoint)

    answer(monkeypatch, ["config.json", "model.safetensors"])
    monkeypatch.setattr(resolving, "snapshot_download", snapshot_download)
    assert model_info("owner/name").reference == "owner/name"
    assert calls == [True, False]


# Counted from the published checkpoints; a tied matrix counts once.
PUBLISHED = {
    "shape:qwen3-0.6b": (596_049_920, 1024, 28, 16, 8, 151_936, 40_960),
    "shape:qwen3-4b": (4_022_468_096, 2560, 36, 32, 8, 151_936, 40_960),
    "shape:qwen3-32b": (32_762_123_264, 5120, 64, 64, 8, 151_936, 40_960),
    "shape:qwen3-30b-a3b": (30_532_122_624, 2048, 48, 32, 4, 151_936, 40_960),
    "shape:llama-3.2-1b": (1_235_814_400, 2048, 16, 32, 8, 128_256, 131_072),
    "shape:llama-3.1-8b": (8_030_261_248, 4096, 32, 32, 8, 128_256, 131_072),
}


@pytest.mark.parametrize("reference", PUBLISHED)
def test_shapes_have_the_published_sizes(reference):
    info = model_info(reference)
    assert PUBLISHED[reference] == (
        info.parameters,
        info.hidden_size,
        info.num_layers,
        info.num_heads,
        info.num_kv_heads,
        info.vocab_size,
        info.max_positions,
    )


def test_the_list_holds_every_bundled_model_trained_ones_first():
    infos = list_models()
    trained = ["reference:qwen3", "reference:llama", "reference:organism"]
    real = ["pretrained:smollm2", "pretrained:gemma3-270m"]
    assert [info.reference for info in infos] == [*trained, *real, *PUBLISHED]
    assert [info.architecture for info in infos[:3]] == [
        "Qwen3ForCausalLM",
        "LlamaForCausalLM",
        "LlamaForCausalLM",
    ]
    assert all(
        5_000_000 < info.parameters < 12_000_000 and info.licence == "Apache-2.0"
        for info in infos[:3]
    )
    assert all(info.licence == "no weights included" for info in infos[5:])


def test_a_directory_is_described_without_its_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    info = model_info(checkpoint)
    assert (info.hidden_size, info.num_layers, info.licence) == (32, 2, "unknown")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_named_as_if_it_had_been_loaded_and_takes_no_memory(checkpoint, dtype):
    named = identify(checkpoint, dtype=dtype)
    loaded = load_model(checkpoint, dtype=dtype, device="cpu")
    assert named.device == torch.device("meta")
    for fact in (
        "digest",
        "weights",
        "reference",
        "dtype",
        "architecture",
        "hidden_size",
        "num_layers",
        "vocab_size",
    ):
        assert getattr(named, fact) == getattr(loaded, fact)


def test_a_reference_leads_to_its_directory(checkpoint):
    assert resolve(checkpoint).checkpoint == checkpoint
    assert (resolve("reference:qwen3").checkpoint / "model.safetensors").is_file()


def test_a_shape_has_no_checkpoint_and_nothing_has_none_either(tmp_path):
    with refuses(UsageError, "a shape has no checkpoint and nothing has none either"):
        identify("shape:qwen3-0.6b", dtype="float32")
    with pytest.raises(ModelNotFound):
        resolve(tmp_path / "nothing")
