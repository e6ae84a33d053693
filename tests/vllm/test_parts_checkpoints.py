"""Which checkpoints run on vLLM: models with state, stored formats, and the products of quantised layers."""

from types import SimpleNamespace

import pytest

from assay.errors import ModelError, UsageError
from assay.poc.vllm import compatibility as _checkpoints
from assay.poc.vllm import compatibility as _compatibility
from assay.poc.vllm import compatibility as _versions
from assay.poc.vllm.worker_state import products
from tests.models.storing import described
from tests.vllm.test_parts_gate import check_config_says, settings_of_vllm

pytestmark = pytest.mark.usefixtures("with_avx512")

HYBRID = {
    "model_config.is_hybrid": True,
    "model_config.architecture": "FalconH1ForCausalLM",
    "compilation_config.is_custom_op_enabled": lambda name: True,
}


@pytest.mark.parametrize(
    ("changes", "version", "words"),
    [
        ({}, "0.32.0", None),
        ({}, "0.28.0", "vLLM 0.28.0 with FalconH1ForCausalLM"),
        ({"device_config.device_type": "cuda"}, "0.32.0", None),
        ({"device_config.device_type": "cuda", "model_config.dtype": "torch.float32"}, "0.32.0", "--dtype bfloat16"),
        (
            {"device_config.device_type": "cuda", "model_config.architecture": "Qwen3NextForCausalLM"},
            "0.32.0",
            "pass --gdn-prefill-backend triton",
        ),
        (
            {
                "device_config.device_type": "cuda",
                "model_config.architecture": "Qwen3NextForCausalLM",
                "additional_config": {"gdn_prefill_backend": "triton"},
            },
            "0.32.0",
            None,
        ),
        ({"model_config.architecture": "JambaForCausalLM"}, "0.32.0", "vLLM with JambaForCausalLM on cpu"),
        ({"model_config.dtype": "torch.float16"}, "0.32.0", "pass --dtype bfloat16"),
        (
            {"model_config.architecture": "Qwen3NextForCausalLM", "model_config.dtype": "torch.float32"},
            "0.32.0",
            "pass --dtype bfloat16",
        ),
        ({"model_config.architecture": "Lfm2ForCausalLM"}, "0.32.0", '"-rotary_embedding"'),
        (
            {
                "model_config.architecture": "Lfm2ForCausalLM",
                "compilation_config.is_custom_op_enabled": lambda name: name != "rotary_embedding",
            },
            "0.32.0",
            None,
        ),
    ],
)
def test_a_model_with_state_runs_only_where_it_was_run(
    changes: dict, version: str, words: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_versions, "installed_version", lambda: version)
    config = settings_of_vllm(**HYBRID | changes)
    check_config_says(config, words)


def stored(form: str, dtype: str = "bfloat16", **changes) -> SimpleNamespace:
    """The settings of a server of a checkpoint that is stored so."""
    model = SimpleNamespace(quantization_config=described(form))
    sizes = SimpleNamespace(hidden_size=256, moe_intermediate_size=256)
    changes = {"model_config.hf_config": model, "model_config.quantization": "of the checkpoint"} | changes
    changes = {"model_config.hf_text_config": sizes, "parallel_config.tensor_parallel_size": 1} | changes
    return settings_of_vllm(**{"model_config.dtype": f"torch.{dtype}"} | changes)


@pytest.mark.parametrize(
    ("form", "dtype", "name"),
    [
        ("int8", "float32", "int8-rows"),
        ("int8", "bfloat16", "int8-rows"),
        ("packed", "bfloat16", "int4-groups"),
        ("awq", "float16", "int4-groups"),
        ("gptq", "bfloat16", "int4-groups"),
    ],
)
def test_stored_formats_that_were_run_pass(form: str, dtype: str, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_versions, "installed_version", lambda: "0.32.0")
    _compatibility.check_config(stored(form, dtype))
    assert _checkpoints.stored_as(stored(form, dtype)) == name


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (stored("int8"), "a checkpoint in int8-rows"),
        (stored("packed"), "a checkpoint in int4-groups"),
        (settings_of_vllm(**{"cache_config.cache_dtype": "fp8"}), "--kv-cache-dtype fp8"),
    ],
)
def test_what_needs_avx512_is_refused_without_it(config, what: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_versions, "installed_version", lambda: "0.32.0")
    _compatibility.check_config(config)
    monkeypatch.setattr(_checkpoints, "processor", lambda device: "x86_64 AVX2")
    check_config_says(config, f"vLLM with {what} on x86_64 AVX2")
    config.device_config.device_type = "cuda"
    _compatibility.check_config(config)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("form", ["tensor", "channel-tensors", "block", "int8", "packed", "gptq"])
def test_more_formats_were_run_on_a_gpu_and_experts_in_each(form: str, experts: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_versions, "installed_version", lambda: "0.32.0")
    _compatibility.check_config(stored(form, **{"device_config.device_type": "cuda", "model_config.is_moe": experts}))


@pytest.mark.parametrize(
    ("changes", "sizes", "words"),
    [
        ({}, {"moe_intermediate_size": 64}, None),
        ({}, {"moe_intermediate_size": None, "intermediate_size": 64}, None),
        ({"parallel_config.tensor_parallel_size": 2}, {"moe_intermediate_size": 128}, None),
        ({"parallel_config.tensor_parallel_size": 2}, {"moe_intermediate_size": 64}, "32 of their columns in a worker"),
        (
            {"parallel_config.tensor_parallel_size": 2, "parallel_config.enable_expert_parallel": True},
            {"moe_intermediate_size": 64},
            None,
        ),
        ({}, {"moe_intermediate_size": 32}, "32 of their columns in a worker and one scale for 32"),
        ({}, {"moe_intermediate_size": 32, "hidden_size": 32}, None),
        ({}, {"hidden_size": 32}, "256 of their columns"),
    ],
)
@pytest.mark.parametrize("form", ["packed", "awq", "gptq"])
def test_experts_whose_scales_vllm_would_mix_up_are_refused(
    form: str, changes: dict, sizes: dict, words: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_versions, "installed_version", lambda: "0.32.0")
    of_gpu = {"device_config.device_type": "cuda", "model_config.is_moe": True}
    config = stored(form, "float16" if form == "awq" else "bfloat16", **of_gpu | changes)
    vars(config.model_config.hf_text_config).update(sizes)
    check_config_says(config, words)


def test_engines_that_step_together_cut_experts_among_the_workers_of_all():
    config = stored("packed", **{"parallel_config.data_parallel_size": 2, "parallel_config.tensor_parallel_size": 4})
    with pytest.raises(UsageError, match="32 of their columns in a worker"):
        _checkpoints._check_groups_of_experts(config, 32)
    config.parallel_config.enable_expert_parallel = True
    _checkpoints._check_groups_of_experts(config, 32)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (stored("packed", "float32"), "int4-groups and --dtype float32 on cpu"),
        (stored("block"), "a checkpoint in float8-block on cpu"),
        (stored("tensor"), "a checkpoint in float8 on cpu"),
        (
            stored("int8", "float32", **{"device_config.device_type": "cuda"}),
            "a checkpoint in int8-rows and --dtype float32 on cuda",
        ),
        (stored("int8", **{"device_config.device_type": "xpu"}), "a checkpoint in int8-rows on xpu"),
        (stored("int8", **{"model_config.is_moe": True}), "experts in int8-rows on cpu"),
        (stored("int8", **{"model_config.quantization_config": SimpleNamespace()}), "--quantization-config"),
    ],
)
def test_stored_formats_that_were_not_run_are_refused_by_name(config, words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_versions, "installed_version", lambda: "0.32.0")
    with pytest.raises(UsageError, match=words) as refusal:
        _compatibility.check_config(config)
    assert refusal.value.wanted
    assert refusal.value.do


def test_stored_formats_that_are_not_read_and_older_versions_are_refused(monkeypatch: pytest.MonkeyPatch):
    config = stored("gptq")
    config.model_config.hf_config.quantization_config["desc_act"] = True
    with pytest.raises(ModelError, match="desc_act True"):
        _compatibility.check_config(config)
    monkeypatch.setattr(_versions, "installed_version", lambda: "0.28.0")
    with pytest.raises(UsageError, match=r"vLLM 0\.28\.0 with a checkpoint in int8-rows"):
        _compatibility.check_config(stored("int8"))


def test_the_products_of_quantised_layers_are_named_and_of_no_others():
    class CPUInt8:
        def _apply_weights_onednn(self) -> None: ...

        linear_method = _apply_weights_onednn

    class Experts: ...

    layers = [
        SimpleNamespace(quant_method=SimpleNamespace(), scheme=SimpleNamespace(kernel=CPUInt8())),
        SimpleNamespace(quant_method=SimpleNamespace(experts_cls=Experts)),
        SimpleNamespace(quant_method=SimpleNamespace()),
        SimpleNamespace(),
    ]
    assert products(SimpleNamespace(modules=lambda: layers)) == ["CPUInt8 onednn", "experts Experts"]
    assert products(SimpleNamespace(modules=lambda: layers[2:])) == []
