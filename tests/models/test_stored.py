"""Checkpoints that are stored in eight or four bits: what is read as it is, and what is refused by
its name.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from assay.errors import BackendUnavailable, BadWeights, ModelError, UsageError
from assay.models import load_model, number_formats
from assay.models.eight_bits import EightBitExperts, EightBitLinear, round_rows
from assay.models.load import check_loadable, identify
from assay.models.number_formats import check_format, read_format
from assay.poc import HFEngine, Round, calibrate, prove, verify
from tests.models.storing import (
    FORMATS,
    FOUR_BITS,
    configure,
    described,
    make_mixture,
    restored,
    rewrite,
    store,
)
from tests.usual import usual
from tests.wordings import refuses

NAMES = dict.fromkeys(FORMATS, "float8") | {
    "block": "float8-block",
    "block-tensors": "float8-block",
    "int8": "int8-rows",
}
NAMES |= dict.fromkeys(FOUR_BITS, "int4-groups")
LAYER = "model.layers.1.mlp.down_proj"
GROUP = 32


@pytest.fixture(scope="module")
def written(small_checkpoint, tmp_path_factory):
    """A function that gives the small checkpoint in a format, written once."""
    paths: dict[str, Path] = {}

    def write(form):
        if form not in paths:
            paths[form] = store(small_checkpoint, tmp_path_factory.mktemp("stored") / "model", form)
        return paths[form]

    return write


@pytest.fixture(params=usual(NAMES, "channel", "block", "int8", "packed", "gptq"))
def stored(request, written):
    """A small checkpoint in each format, and the name of the format."""
    return written(request.param), NAMES[request.param]


@pytest.fixture(scope="module")
def mixture_checkpoint(tmp_path_factory):
    """A mixture of random weights."""
    return make_mixture("qwen3-moe", tmp_path_factory.mktemp("checkpoint") / "mixture")


@pytest.mark.parametrize("stored", usual(FORMATS, "channel", "block", "int8"), indirect=True)
def test_a_layer_multiplies_by_what_is_stored(stored):
    path, name = stored
    model = load_model(path, device="cpu")
    assert (model.quantised, model.dtype) == (name, torch.bfloat16)
    layer = model.module.get_submodule(LAYER)
    assert isinstance(layer, EightBitLinear)
    x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ restored(path, LAYER).T
    error = (layer(x).double() - exact).norm() / exact.norm()
    # Of an input in e4m3 every number is off by up to 1/16, and by 1/127 of the largest in int8.
    assert 1e-3 < error < 0.04
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight


@pytest.mark.parametrize("form", usual(("channel", "block", "int8"), "block"))
def test_experts_stored_one_by_one_are_stacked(mixture_checkpoint, tmp_path, form):
    path = store(mixture_checkpoint, tmp_path / "model", form)
    model = load_model(path, device="cpu")
    plain = load_model(mixture_checkpoint, device="cpu", dtype="float32")
    experts = model.module.model.layers[0].mlp.experts
    assert isinstance(experts, EightBitExperts)
    x = torch.randn(16, 128)
    router = plain.module.model.layers[0].mlp.gate
    _, shares, chosen = router(x)
    ours = experts(x, chosen, shares)
    theirs = plain.module.model.layers[0].mlp.experts(x, chosen, shares)
    assert 1e-3 < (ours - theirs).norm() / theirs.norm() < 0.08
    alone = experts(x[3:4], chosen[3:4], shares[3:4])
    assert torch.equal(alone, ours[3:4])


def entry(tensors, form, row, column):
    """One number of the layer's weight, by the definition of its layout, with whole numbers of
    Python.
    """

    def four_bits(name, at, place):
        return int(tensors[f"{LAYER}.{name}"][at]) % 2**32 >> 4 * place & 15

    group = column // GROUP
    awq = [0, 2, 4, 6, 1, 3, 5, 7]
    if form == "awq":
        at = row // 8
        place = awq.index(row % 8)
        number = four_bits("qweight", (column, at), place)
        zero = four_bits("qzeros", (group, at), place)
        return (number - zero) * float(tensors[f"{LAYER}.scales"][group, row])
    if form == "gptq":
        zero = four_bits("qzeros", (group, row // 8), row % 8) + 1
        number = four_bits("qweight", (column // 8, row), column % 8)
        return (number - zero) * float(tensors[f"{LAYER}.scales"][group, row])
    zero = 8 if form == "packed" else four_bits("weight_zero_point", (row // 8, group), row % 8)
    number = four_bits("weight_packed", (row, column // 8), column % 8)
    return (number - zero) * float(tensors[f"{LAYER}.weight_scale"][row, group])


@pytest.mark.parametrize("form", usual(FOUR_BITS, "packed", "gptq"))
def test_a_weight_is_what_its_layout_says(written, form, small_checkpoint):
    path = written(form)
    model = load_model(path, device="cpu", dtype="float32")
    assert (model.quantised, model.dtype) == ("int4-groups", torch.float32)
    weight = model.module.get_submodule(LAYER).weight.detach()
    tensors = load_file(path / "model.safetensors")
    for row in range(0, weight.shape[0], 3):
        for column in range(0, weight.shape[1], 5):
            assert float(weight[row, column]) == entry(tensors, form, row, column)
    before = (
        load_model(small_checkpoint, device="cpu", dtype="float32")
        .module.get_submodule(LAYER)
        .weight.detach()
    )
    assert 0.02 < (weight - before).norm() / before.norm() < 0.15
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight


@pytest.mark.parametrize("form", usual(FOUR_BITS, "packed", "gptq"))
def test_a_weight_in_another_dtype_is_rounded_once_and_its_scale_first(written, form):
    path = written(form)
    weight = load_model(path, device="cpu", dtype="bfloat16").module.get_submodule(LAYER).weight
    tensors = load_file(path / "model.safetensors")
    name = f"{LAYER}.{'scales' if form in ('awq', 'gptq') else 'weight_scale'}"
    tensors[name] = tensors[name].to(torch.bfloat16).float()
    for row, column in ((0, 0), (1, 33), (7, 9), (60, 63)):
        exact = torch.tensor(entry(tensors, form, row, column))
        assert weight[row, column] == exact.to(torch.bfloat16)


@pytest.mark.parametrize("form", ["packed", "gptq"])
def test_experts_in_four_bits_are_restored_one_by_one(mixture_checkpoint, tmp_path, form):
    model = load_model(
        store(mixture_checkpoint, tmp_path / "model", form), device="cpu", dtype="float32"
    )
    plain = load_model(mixture_checkpoint, device="cpu", dtype="float32")
    for name in ("gate_up_proj", "down_proj"):
        ours, theirs = (getattr(m.module.model.layers[0].mlp.experts, name) for m in (model, plain))
        assert 0.02 < (ours - theirs).norm() / theirs.norm() < 0.15


def test_the_digest_covers_the_scales_and_the_configuration(stored, tmp_path):
    path, _ = stored
    digest = load_model(path, device="cpu").digest
    assert identify(path, dtype="bfloat16").digest == digest
    tensors = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    name = next(name for name in tensors if "scale" in name)
    seen = {digest}
    for changed, stated in (
        (tensors | {name: tensors[name] * 2}, config),
        (
            tensors,
            config | {"quantization_config": config["quantization_config"] | {"note": "another"}},
        ),
    ):
        other = tmp_path / str(len(seen))
        other.mkdir()
        save_file(changed, other / "model.safetensors")
        (other / "config.json").write_text(json.dumps(stated))
        seen.add(load_model(other, device="cpu").digest)
    assert len(seen) == 3


def test_a_node_proves_with_it_and_a_validator_verifies(stored):
    path, name = stored
    model = load_model(path, device="cpu")
    round = Round(block_hash="b", public_key="k", seq_len=16)
    first = prove(model, round, range(40), batch_size=8)
    second = prove(model, round, range(40), batch_size=5)
    assert first.header.fingerprint.dtype == name
    again = load_model(
        path, device="cpu", quantise=name
    )  # as `verify` asks for what the header states
    engine = HFEngine(again, batch_size=5, seq_len=16)
    verdict = verify(
        first, again, engine=engine, expect=round, calibration=calibrate(first, second)
    )
    assert verdict.verdict in ("honest", "undecided")
    assert max(map(abs, verdict.residuals)) < 1e-6


TENSORS = "channel-tensors"
F8 = torch.float8_e4m3fn
GROUP_0 = ("config_groups", "group_0")


@pytest.mark.parametrize(
    ("form", "place", "value", "said"),
    [
        ("channel", ("quant_method",), "bitsandbytes", "quant_method 'bitsandbytes'"),
        ("channel", ("quant_method",), None, "quant_method None"),
        ("channel", ("quant_method",), [], "quant_method []"),
        ("channel", ("activation_scheme",), "static", "activation_scheme 'static'"),
        ("channel", ("fmt",), "e5m2", "fmt 'e5m2'"),
        ("channel", ("weight_block_size",), [0, 128], "the size of a block"),
        ("channel", ("weight_block_size",), "128", "the size of a block"),
        (TENSORS, ("format",), "nvfp4-pack-quantized", "format 'nvfp4-pack-quantized'"),
        (TENSORS, ("format",), "pack-quantized", "input_activations"),
        (TENSORS, ("kv_cache_scheme",), {"num_bits": 8}, "kv_cache_scheme"),
        (TENSORS, ("transform_config",), {"config_groups": {"R4": {}}}, "transform_config"),
        (TENSORS, ("config_groups",), {}, "config_groups"),
        (TENSORS, (*GROUP_0, "weights", "num_bits"), 4, "num_bits 4"),
        (TENSORS, (*GROUP_0, "weights", "strategy"), "group", "strategy 'group'"),
        (TENSORS, (*GROUP_0, "weights", "symmetric"), False, "symmetric False"),
        (TENSORS, (*GROUP_0, "input_activations"), None, "num_bits None"),
        (TENSORS, (*GROUP_0, "input_activations", "dynamic"), False, "dynamic False"),
        (TENSORS, (*GROUP_0, "input_activations", "type"), "int", "type 'int'"),
        (TENSORS, (*GROUP_0, "output_activations"), {"num_bits": 8}, "output_activations"),
        ("awq", ("bits",), 8, "bits 8"),
        ("awq", ("version",), "gemv", "version 'gemv'"),
        ("awq", ("zero_point",), False, "zero_point False"),
        ("awq", ("group_size",), 0, "group_size 0"),
        ("gptq", ("desc_act",), True, "desc_act True"),
        ("gptq", ("sym",), False, "sym False"),
        ("gptq", ("checkpoint_format",), "gptq_v2", "checkpoint_format 'gptq_v2'"),
        ("packed", (*GROUP_0, "weights", "actorder"), "group", "actorder 'group'"),
        ("packed", (*GROUP_0, "weights", "num_bits"), 8, "num_bits 8"),
        ("packed", (*GROUP_0, "weights", "type"), "float", "type 'float'"),
    ],
)
def test_other_configurations_are_refused_by_name(form, place, value, said):
    config = owner = described(form)
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = value
    with pytest.raises(ModelError, match=re.escape(f"is quantised with {said}")):
        read_format("model", {"quantization_config": config})


def changed(name, how):
    """A change of one tensor of the layer."""
    return lambda tensors: tensors.update({f"{LAYER}.{name}": how(tensors[f"{LAYER}.{name}"])})


def left_out(name):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("form", "change", "said"),
    [
        (TENSORS, left_out(f"{LAYER}.weight_scale"), "has 0 tensors of scales"),
        (TENSORS, changed("weight_scale", lambda _: torch.ones(3, 1)), "has the shape"),
        (TENSORS, changed("weight_scale", lambda scale: -scale), "not positive"),
        (TENSORS, changed("weight_scale", lambda scale: scale * torch.nan), "NaN or infinity"),
        (TENSORS, changed("weight", lambda weight: weight[:-1].contiguous()), "has the shape"),
        (TENSORS, changed("weight", lambda weight: weight.view(torch.int8)), "is stored as I8"),
        (TENSORS, lambda t: t[f"{LAYER}.weight"].view(torch.uint8).fill_(127), "NaN or infinity"),
        (TENSORS, left_out("model.norm.weight"), "'model.norm.weight' is missing"),
        (TENSORS, lambda t: t.update({"model.layers.9.extra": torch.ones(2)}), "surplus"),
        (
            TENSORS,
            lambda t: t.update({"model.norm.weight": torch.ones(64).to(F8)}),
            "no weight of a linear",
        ),
        ("gptq", lambda t: t[f"{LAYER}.qzeros"].fill_(0), "other zeros"),
        ("gptq", lambda t: t[f"{LAYER}.g_idx"].fill_(0), "out of order"),
        ("gptq", left_out(f"{LAYER}.scales"), "is missing"),
        ("awq", changed("scales", lambda scales: scales * torch.inf), "NaN or infinity"),
        ("awq", changed("qweight", lambda weight: weight.long()), "packed in int32"),
        ("packed", lambda t: t[f"{LAYER}.weight_shape"].fill_(1), "weight_shape"),
        ("packed", lambda t: t.update({f"{LAYER}.extra": torch.ones(2)}), "surplus"),
        ("packed-zeros", left_out(f"{LAYER}.weight_zero_point"), "is missing"),
    ],
)
def test_damaged_checkpoints_are_refused(small_checkpoint, tmp_path, form, change, said):
    path = store(small_checkpoint, tmp_path / "model", form)
    rewrite(path, change)
    with pytest.raises(BadWeights, match=said):
        load_model(path, device="cpu")


def test_a_head_that_is_neither_stored_nor_tied_is_missing(small_checkpoint, tmp_path):
    path = store(small_checkpoint, tmp_path / "model", "channel-tensors")
    configure(path, tie_word_embeddings=False)
    with refuses(BadWeights, "a head that is neither stored nor tied is missing"):
        load_model(path, device="cpu")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_an_expert_that_is_stored_in_another_way_than_the_first_is_refused(
    mixture_checkpoint, tmp_path, dtype
):
    path = store(mixture_checkpoint, tmp_path / "model", "channel-tensors")
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    rewrite(path, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    for load in (check_loadable, load_model):
        with pytest.raises(BadWeights) as refused:
            load(path, device="cpu")
        assert name in refused.value.seen


@pytest.mark.parametrize("in_eight_bits", [False, True])
def test_a_stored_head_is_apart_from_the_embedding_to_which_it_would_be_tied(
    small_checkpoint, tmp_path, in_eight_bits
):
    path = store(small_checkpoint, tmp_path / "model", "channel-tensors")
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    head = {"lm_head.weight": -embedding}
    if in_eight_bits:
        head = dict(
            zip(("lm_head.weight", "lm_head.weight_scale"), round_rows(-embedding), strict=True)
        )
    rewrite(path, lambda tensors: tensors.update(head))
    module = load_model(path, device="cpu").module
    assert torch.equal(module.get_input_embeddings().weight, embedding)
    assert torch.equal(module.lm_head.weight.float(), head["lm_head.weight"].float())


def test_groups_that_do_not_divide_the_columns_are_refused(small_checkpoint, tmp_path):
    path = store(small_checkpoint, tmp_path / "model", "packed")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 48
    (path / "config.json").write_text(json.dumps(config))
    with refuses(BadWeights, "groups that do not divide the columns are refused"):
        load_model(path, device="cpu")


def test_a_stored_format_is_not_rounded_again_nor_asked_of_other_checkpoints(
    stored, small_checkpoint
):
    with refuses(UsageError, "a stored format is not rounded again nor asked of other checkpoints"):
        load_model(
            stored[0], device="cpu", quantise="float8" if stored[1] != "float8" else "int8-rows"
        )
    with refuses(UsageError, "a stored format is not rounded again nor asked of other checkpoints"):
        load_model(stored[0], device="cpu", weights="random-all", block_hash="b")
    with refuses(
        UsageError, "a stored format is not rounded again nor asked of other checkpoints, 2"
    ):
        load_model(small_checkpoint, device="cpu", quantise="float8-block")


def cuda(monkeypatch, *capability):
    """A CUDA device of that capability, where triton is installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(number_formats, "find_spec", lambda name: object())
    return torch.device("cuda")


def form_of(name, **more):
    form = read_format("model", {"quantization_config": described(name, **more)})
    assert form is not None
    return form


@pytest.mark.parametrize(
    "form", [form_of("block", block=128), form_of("int8")], ids=lambda form: form.name
)
def test_a_format_is_refused_where_it_was_not_tested(form, monkeypatch):
    check_format(form, cuda(monkeypatch, 9, 0))
    with pytest.raises(BackendUnavailable, match=f"{form.name} on cuda"):
        check_format(form, cuda(monkeypatch, 10, 0))
    device = cuda(monkeypatch, 9, 0)
    monkeypatch.setattr(number_formats, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=f"{form.name} on cuda"):
        check_format(form, device)
    check_format(form, torch.device("cpu"))


def test_blocks_of_another_size_are_refused_on_cuda(monkeypatch):
    with refuses(BackendUnavailable, "blocks of another size are refused on cuda") as refused:
        check_format(form_of("block", block=64), cuda(monkeypatch, 9, 0))
    assert "128 x 128" in refused.value.wanted
