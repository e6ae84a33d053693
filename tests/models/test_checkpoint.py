import hashlib
import json
import os
import pickle
import re
import stat
import struct
import warnings
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from assay.errors import AssayError, BadWeights, ModelNotFound, UnsafeCheckpoint
from assay.files.weights import check_served, warn_of_unread, weight_files
from assay.models import load_model
from assay.models.checkpoint import check_finite, digest_tensors, list_tensors, stored_dtype
from assay.models.load import identify, load_tokenizer
from tests.wordings import refuses

INDEX = "model.safetensors.index.json"


def test_the_digest_is_the_one_documented(tmp_path):
    save_file(
        {"b": torch.tensor([[1.0, 2.0]]), "a": torch.tensor(3.0)}, tmp_path / "model.safetensors"
    )
    one = hashlib.sha256(b"a\nF32\n[]\n" + b"\x00\x00\x40\x40").digest()
    two = hashlib.sha256(b"b\nF32\n[1, 2]\n" + b"\x00\x00\x80\x3f\x00\x00\x00\x40").digest()
    assert digest_tensors(list_tensors(tmp_path)) == hashlib.sha256(one + two).hexdigest()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.pkl", "last.ckpt"]
)
def test_a_pickle_is_refused_and_never_opened(checkpoint, name):
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    (checkpoint / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(UnsafeCheckpoint, match=name):
        load_model(checkpoint)


def test_no_weights_at_all(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with refuses(ModelNotFound, "no weights at all"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    "names", [("model-00001-of-00002", "model-00002-of-00002"), ("a", "b"), ("Model",)]
)
def test_files_without_an_index_are_refused_by_name(checkpoint, names):
    """None is known to be the whole model."""
    whole = checkpoint / "model.safetensors"
    for name in names:
        (checkpoint / f"{name}.safetensors").write_bytes(whole.read_bytes())
    with pytest.raises(BadWeights, match=f"model.safetensors and {names[0]}"):
        load_model(checkpoint)
    whole.unlink()
    with pytest.raises(ModelNotFound, match=f"{names[0]}.safetensors without an index"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors.more.safetensors", "adapter_model.safetensors", "consolidated.safetensors"],
)
def test_a_server_gets_no_folder_of_which_it_would_load_other_weights(checkpoint, name):
    digest = identify(checkpoint, dtype="float32").digest
    assert digest == load_model(checkpoint, device="cpu").digest
    (checkpoint / name).write_bytes((checkpoint / "model.safetensors").read_bytes())
    with pytest.raises(BadWeights, match=name):
        identify(checkpoint, dtype="float32")


SECOND_SETS = (
    "model.safetensors.more.safetensors",
    "model.fp16.safetensors",
    "MODEL.SAFETENSORS",
    "Model.SafeTensors",
    "model-00001-of-00002.safetensors",
    "modél.safetensors",
    "mode\N{LATIN SMALL LETTER E}\N{COMBINING ACUTE ACCENT}l.safetensors",
)
NAMED_SETS = (
    "pytorch_model.bin",
    "PYTORCH_MODEL.BIN",
    "pytorch_model-00001-of-00002.bin",
    "consolidated.00.pth",
    "weights.gguf",
    "weights.GGUF",
    "tf_model.h5",
    "flax_model.msgpack",
    "original/consolidated.safetensors",
    "onnx/model.onnx",
    "original/model.safetensors",
)


@pytest.mark.parametrize("shard", [None, "10KB"])
@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("name", SECOND_SETS)
def test_a_second_set_of_weights_is_refused_whatever_it_is_called(
    write_checkpoint, name, link, shard
):
    directory = write_checkpoint(**({} if shard is None else {"shard": shard}))
    if name.lower().startswith("mod") and not name.lower().startswith("model") and shard:
        pytest.skip("no loader takes it beside an index")
    first = min(directory.glob("*.safetensors"))
    second = directory / name
    if second.exists():
        pytest.skip("it is one of the shards")
    if link:
        second.symlink_to(first)
    else:
        second.write_bytes(first.read_bytes())
    with pytest.raises(BadWeights, match=re.escape(name)):
        load_model(directory, device="cpu")
    with pytest.raises(BadWeights, match=re.escape(name)):
        identify(directory, dtype="float32")


@pytest.mark.parametrize("shard", [None, "10KB"])
@pytest.mark.parametrize("name", [*NAMED_SETS, "other\x1b[2J.gguf"])
def test_weights_that_are_not_read_are_named(write_checkpoint, name, shard):
    directory = write_checkpoint(**({} if shard is None else {"shard": shard}))
    digest = load_model(directory, device="cpu").digest
    second = directory / name
    second.parent.mkdir(exist_ok=True)
    second.write_bytes(min(directory.glob("*.safetensors")).read_bytes())
    with pytest.warns(UserWarning, match=re.escape(ascii(name))):
        assert load_model(directory, device="cpu").digest == digest
    for kept in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
        (directory / kept).touch()
    second.unlink()
    assert load_model(directory, device="cpu").digest == digest


@pytest.mark.parametrize(
    "name",
    [
        *("weights.bin", "a.ckpt", "x.pkl", "README.md", "model", ".model.safetensors"),
        *("model.safetensors.bak", "a/b/c/model.safetensors", "openvino_model.bin"),
    ],
)
@pytest.mark.parametrize(
    "form",
    ["safetensors", "gguf", "torch", "pickle", "large", "float32", "bfloat16", "int8", "zeros"],
)
def test_weights_are_known_by_their_content_whatever_they_are_called(tmp_path, name, form):
    begins = {
        "safetensors": struct.pack("<Q", 8) + b"{}      ",
        "gguf": b"GGUF\3\0\0\0",
        "torch": b"PK\3\4archive",
        "pickle": pickle.dumps({}),
        "large": b"a",
        "zeros": bytes(100),
    }
    numbers = torch.randn(300, generator=torch.Generator().manual_seed(0)) / 50
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        scale = 1000 if dtype is torch.int8 else 1
        raw = (numbers * scale).to(dtype).view(torch.uint8).numpy().tobytes()
        begins[str(dtype).removeprefix("torch.")] = raw
    (tmp_path / "model.safetensors").touch()
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(begins[form])
    if form == "large":
        os.truncate(tmp_path / name, 2**27)
    with pytest.warns(UserWarning, match=re.escape(name)):
        warn_of_unread(tmp_path, {"model.safetensors"})


def test_what_is_beside_weights_is_not_taken_for_them(tmp_path):
    for name in (
        "optimizer.pt",
        "rng_state_0.pth",
        ".git/lfs/objects/ab/cd",
        "vocab.json",
        "a.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"PK\3\4" if "vocab" not in name else b"{}")
    beside = {
        "a.png": b"\x89PNG\r\n\0\xff",
        "a.jpg": b"\xff\xd8\xff\xe0\0\x10JFIF\0",
        "a.pdf": b"%PDF-1.7\n\xd0\xd4\xc5\xd8\0",
        "tokenizer.model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0",
        "LICENSE": "Copyright ©, für alle Gebühren".encode("latin-1"),
        "README.zh.md": "模型权重".encode() * 1000 + "权".encode()[:2],
        "runs/events.out.tfevents.1": b"\x18\0\0\0\0\0\0\0\xa3",
        ".DS_Store": b"\0\0\0\1Bud1\0",
    }
    (tmp_path / "runs").mkdir()
    for name, content in beside.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.gguf")
    warn_of_unread(tmp_path, {"model.safetensors"})


def test_a_name_of_the_index_is_taken_to_the_letter(write_checkpoint):
    """Two forms of one letter of Unicode are two names of files."""
    directory = write_checkpoint(shard="10KB")
    index = json.loads((directory / INDEX).read_text())
    first = min(index["weight_map"].values())
    (directory / first).rename(directory / "e\N{COMBINING ACUTE ACCENT}.safetensors")
    index["weight_map"] = {
        name: "\N{LATIN SMALL LETTER E WITH ACUTE}.safetensors" if file == first else file
        for name, file in index["weight_map"].items()
    }
    (directory / INDEX).write_text(json.dumps(index))
    with refuses(BadWeights, "a name of the index is taken to the letter"):
        load_model(directory, device="cpu")


def test_beside_an_index_only_files_of_mistral_are_another_set(write_checkpoint):
    directory = write_checkpoint(shard="10KB")
    (directory / "other.safetensors").touch()
    check_served(directory)
    (directory / "consolidated.00.safetensors").touch()
    with refuses(BadWeights, "beside an index only files of mistral are another set"):
        check_served(directory)


def test_the_files_of_an_adapter_and_of_mistral_are_no_weights(tmp_path):
    for name in (
        "model",
        "adapter_model",
        "consolidated",
        "consolidated-00001-of-00002",
        "._model",
    ):
        (tmp_path / f"{name}.safetensors").touch()
    assert weight_files(tmp_path) == (tmp_path / "model.safetensors",)


@pytest.mark.parametrize("keep", [0, 4, 200, 6000])
def test_a_file_cut_short(checkpoint, keep):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with refuses(BadWeights, "a file cut short") as refused:
        load_model(checkpoint)
    assert "wanted:" not in refused.value.seen


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        json.dumps({"weight_map": {"a": "b" * 300}}),
        "[" * 100_000,
    ],
)
def test_an_unreadable_index(write_checkpoint, index):
    directory = write_checkpoint(shard="10KB")
    (directory / INDEX).write_text(index)
    with refuses(BadWeights, "an unreadable index"):
        load_model(directory)


def test_an_index_cannot_point_outside_its_directory(write_checkpoint):
    directory = write_checkpoint(shard="10KB")
    outside = directory.parent / "outside.safetensors"
    save_file({"a": torch.ones(1)}, outside)
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with refuses(BadWeights, "an index cannot point outside its directory"):
        load_model(directory)


def test_a_tensor_in_two_files(tmp_path):
    for name in ("one.safetensors", "two.safetensors"):
        save_file({"same": torch.ones(2)}, tmp_path / name)
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {"same": "one.safetensors", "x": "two.safetensors"}})
    )
    assert len(weight_files(tmp_path)) == 2
    with refuses(BadWeights, "a tensor in two files"):
        list_tensors(tmp_path)


def test_an_empty_file_of_tensors(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    with refuses(BadWeights, "an empty file of tensors"):
        list_tensors(tmp_path)


def test_the_stored_dtype_is_that_of_most_values(tmp_path):
    save_file(
        {
            "small": torch.ones(3),
            "large": torch.ones(9, dtype=torch.float16),
            "mask": torch.ones(99) > 0,
        },
        tmp_path / "model.safetensors",
    )
    assert stored_dtype(list_tensors(tmp_path)) == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 517, 999])
def test_one_value_that_is_not_finite_is_found(dtype, bad, place):
    values = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    check_finite("w", values, "here")
    values[place] = bad
    with refuses(BadWeights, "one value that is not finite is found"):
        check_finite("w", values, "here")


KINDS = {
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "loop": lambda path: path.symlink_to(path.name),
    "loop of two": lambda path: (
        path.symlink_to(f"{path.name}.2"),
        path.with_name(f"{path.name}.2").symlink_to(path.name),
    ),
    "loop of folders": lambda path: path.symlink_to("."),
    "sparse": lambda path: (path.touch(), os.truncate(path, 2**36)),
}


def outcome_of(load, folder):
    """What loading comes to: a refusal in three parts, or nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a large file beside weights
        try:
            load(folder)
        except AssayError as error:
            return bool(error.seen and error.wanted and error.do)
    return None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "model.safetensors", INDEX, "tokenizer.json", "tokenizer_config.json"),
        *("special_tokens_map.json", "added_tokens.json", "generation_config.json", "vocab.json"),
        *("chat_template.jinja", "merges.txt", "tokenizer.model", "README.md"),
    ],
)
def test_files_of_other_kinds_are_refused_or_harmless(checkpoint, name, kind):
    """A sparse file of 64 GiB takes no room on the disk, and in memory all that there is."""
    path = checkpoint / name
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    loads = (partial(load_model, device="cpu"), partial(identify, dtype="float32"), load_tokenizer)
    outcomes = [outcome_of(load, checkpoint) for load in loads]
    assert False not in outcomes
    if kind == "sparse" and name not in ("README.md", "model.safetensors"):
        assert outcomes == [True] * 3
    if name in ("config.json", "model.safetensors"):
        assert outcomes[:2] == [True] * 2
    if name == "README.md":
        assert outcomes == [None] * 3
