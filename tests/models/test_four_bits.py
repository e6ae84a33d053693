"""Checkpoints that are stored in four bits: restored as their layouts define them, and refused by name otherwise."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from assay.errors import BadWeights, ModelError
from assay.models import load_model
from assay.models.load import identify
from assay.models.quantized import AWQ_PLACES, read_format, unpack_words
from assay.poc import Round, prove
from tests.models.storing import FOUR_BITS, described, packed, rewrite, store
from tests.models.test_stored import mixture_checkpoint  # noqa: F401 - a fixture

LAYER = "model.layers.1.mlp.down_proj"
GROUP = 32


@pytest.fixture(scope="module", params=FOUR_BITS)
def stored(request: pytest.FixtureRequest, small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    """A small checkpoint in each layout, and the layout."""
    return store(small_checkpoint, tmp_path_factory.mktemp("four") / "model", request.param), request.param


def entry(tensors: dict[str, torch.Tensor], form: str, row: int, column: int) -> float:
    """One number of the layer's weight, by the definition of its layout, with whole numbers of Python."""

    def four_bits(name: str, at: tuple[int, int], place: int) -> int:
        return int(tensors[f"{LAYER}.{name}"][at]) % 2**32 >> 4 * place & 15

    group, awq = column // GROUP, [0, 2, 4, 6, 1, 3, 5, 7]
    if form == "awq":
        at, place = row // 8, awq.index(row % 8)
        return (four_bits("qweight", (column, at), place) - four_bits("qzeros", (group, at), place)) * float(
            tensors[f"{LAYER}.scales"][group, row]
        )
    if form == "gptq":
        zero = four_bits("qzeros", (group, row // 8), row % 8) + 1
        number = four_bits("qweight", (column // 8, row), column % 8)
        return (number - zero) * float(tensors[f"{LAYER}.scales"][group, row])
    zero = 8 if form == "packed" else four_bits("weight_zero_point", (row // 8, group), row % 8)
    number = four_bits("weight_packed", (row, column // 8), column % 8)
    return (number - zero) * float(tensors[f"{LAYER}.weight_scale"][row, group])


def test_a_weight_is_what_its_layout_says(stored, small_checkpoint: Path):
    path, form = stored
    model = load_model(path, device="cpu", dtype="float32")
    assert (model.quantised, model.dtype) == ("int4-groups", torch.float32)
    weight, tensors = model.module.get_submodule(LAYER).weight.detach(), load_file(path / "model.safetensors")
    for row in range(0, weight.shape[0], 3):
        for column in range(0, weight.shape[1], 5):
            assert float(weight[row, column]) == entry(tensors, form, row, column)
    before = load_model(small_checkpoint, device="cpu", dtype="float32").module.get_submodule(LAYER).weight.detach()
    assert 0.02 < (weight - before).norm() / before.norm() < 0.15
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight


def test_a_weight_in_another_dtype_is_rounded_once_and_its_scale_first(stored):
    path, form = stored
    weight = load_model(path, device="cpu", dtype="bfloat16").module.get_submodule(LAYER).weight
    tensors = load_file(path / "model.safetensors")
    name = f"{LAYER}.{'scales' if form in ('awq', 'gptq') else 'weight_scale'}"
    tensors[name] = tensors[name].to(torch.bfloat16).float()
    for row, column in ((0, 0), (1, 33), (7, 9), (60, 63)):
        exact = torch.tensor(entry(tensors, form, row, column))
        assert weight[row, column] == exact.to(torch.bfloat16)


def test_packing_and_unpacking_are_inverse_also_for_words_with_the_highest_bit():
    numbers = torch.randint(0, 16, (5, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for places in (tuple(range(8)), AWQ_PLACES):
        assert torch.equal(unpack_words(packed(numbers, places), places), numbers)
    assert int(packed(torch.full((8,), 15))) == -1


@pytest.mark.parametrize("form", ["packed", "gptq"])
def test_experts_are_restored_one_by_one(mixture_checkpoint: Path, tmp_path: Path, form: str):  # noqa: F811
    model = load_model(store(mixture_checkpoint, tmp_path / "model", form), device="cpu", dtype="float32")
    plain = load_model(mixture_checkpoint, device="cpu", dtype="float32")
    for name in ("gate_up_proj", "down_proj"):
        ours, theirs = (getattr(m.module.model.layers[0].mlp.experts, name) for m in (model, plain))
        assert 0.02 < (ours - theirs).norm() / theirs.norm() < 0.15


def test_digest_and_fingerprint_say_what_is_stored(stored):
    path, _ = stored
    model = load_model(path, device="cpu")
    assert identify(path, dtype="bfloat16").digest == model.digest
    proof = prove(model, Round(block_hash="b", public_key="k", seq_len=16), range(8), batch_size=8)
    assert proof.header.fingerprint.dtype == "int4-groups"


@pytest.mark.parametrize(
    ("form", "change", "said"),
    [
        ("awq", {"bits": 8}, "bits 8"),
        ("awq", {"version": "gemv"}, "version 'gemv'"),
        ("awq", {"zero_point": False}, "zero_point False"),
        ("awq", {"group_size": 0}, "group_size 0"),
        ("gptq", {"desc_act": True}, "desc_act True"),
        ("gptq", {"sym": False}, "sym False"),
        ("gptq", {"checkpoint_format": "gptq_v2"}, "checkpoint_format 'gptq_v2'"),
    ],
)
def test_other_configurations_are_refused_by_name(form: str, change, said: str):
    with pytest.raises(ModelError, match=f"is quantised with {said}"):
        read_format("model", {"quantization_config": described(form) | change})


@pytest.mark.parametrize(
    ("change", "said"),
    [({"actorder": "group"}, "actorder 'group'"), ({"num_bits": 8}, "num_bits 8"), ({"type": "float"}, "type 'float'")],
)
def test_other_compressed_tensors_are_refused_by_name(change, said: str):
    config = described("packed")
    config["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(ModelError, match=f"is quantised with {said}"):
        read_format("model", {"quantization_config": config})


@pytest.mark.parametrize(
    ("form", "change", "said"),
    [
        ("gptq", lambda t: t[f"{LAYER}.qzeros"].fill_(0), "other zeros"),
        ("gptq", lambda t: t[f"{LAYER}.g_idx"].fill_(0), "out of order"),
        ("gptq", lambda t: t.pop(f"{LAYER}.scales"), "is missing"),
        ("awq", lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"] * torch.inf}), "NaN or infinity"),
        ("awq", lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].long()}), "packed in int32"),
        ("packed", lambda t: t[f"{LAYER}.weight_shape"].fill_(1), "weight_shape"),
        ("packed", lambda t: t.update({f"{LAYER}.extra": torch.ones(2)}), "surplus"),
        ("packed-zeros", lambda t: t.pop(f"{LAYER}.weight_zero_point"), "is missing"),
    ],
)
def test_damaged_checkpoints_are_refused(small_checkpoint: Path, tmp_path: Path, form: str, change, said: str):
    path = store(small_checkpoint, tmp_path / "model", form)
    rewrite(path, change)
    with pytest.raises(BadWeights, match=said):
        load_model(path, device="cpu")


def test_groups_that_do_not_divide_the_columns_are_refused(small_checkpoint: Path, tmp_path: Path):
    path = store(small_checkpoint, tmp_path / "model", "packed")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 48
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadWeights, match="in groups of 48"):
        load_model(path, device="cpu")
