"""What is refused before anything starts: versions, settings of vLLM, checkpoints, several
servers.
"""

import re
import sys
from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

from assay.errors import BackendUnavailable, ModelError, UsageError
from assay.models.load import identify
from assay.poc import NetworkPins
from assay.poc.launch import Launch, vllm_engine
from assay.poc.vllm import before_start, compatibility
from assay.poc.vllm import preflight as _preflight
from tests.models.storing import described
from tests.vllm.conftest import ROOT, settings_of_vllm
from tests.wordings import refuses

REFERENCE = ROOT / "src/assay/models/reference/qwen3"


@pytest.mark.parametrize(
    "version", ["0.9.2", "0.28.0", "0.31.2", "0.33.0", "0.320.0", "0.32.1.dev7+gabc", "1.0", "what"]
)
def test_versions_that_were_not_tested_are_refused(version: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compatibility, "installed_version", lambda: version)
    with refuses(BackendUnavailable, "versions that were not tested are refused"):
        compatibility.check_installed()


def check_config_says(config: Any, words: str | None) -> None:
    """Check that settings of vLLM are refused with these words; ``None`` for settings it takes."""
    with (
        nullcontext()
        if words is None
        else pytest.raises(UsageError, match=re.escape(words)) as refusal
    ):
        compatibility.check_config(config)
    assert words is None or (refusal.value.wanted and refusal.value.do)


def settings(**changes) -> SimpleNamespace:
    """The part of a ``VllmConfig`` that the gate reads; vLLM's own is not needed to refuse it."""
    no = (
        "quantization",
        "is_moe",
        "is_encoder_decoder",
        "is_multimodal_model",
        "is_hybrid",
        "is_attention_free",
    )
    values = {f"model.{name}": None for name in no} | {
        "model.enable_prompt_embeds": True,
        "model.runner_type": "generate",
        "model.dtype": "torch.bfloat16",
        "model.multimodal_config": SimpleNamespace(language_model_only=False),
        "parallel.worker_extension_cls": "assay.poc.vllm.WorkerExtension",
        "parallel.data_parallel_size": 1,
        "parallel.pipeline_parallel_size": 1,
        "parallel.tensor_parallel_size": 1,
        "parallel.distributed_executor_backend": "mp",
        "device.device_type": "cpu",
        "load.load_format": "auto",
        "compilation.is_custom_op_enabled": lambda name: True,
    }
    return settings_of_vllm({"cache_config": SimpleNamespace()} | values | changes)


ON_CUDA = {"device.device_type": "cuda"}
FLOAT32 = {"model.dtype": "torch.float32"}
LORA = {"lora_config": SimpleNamespace(max_lora_rank=8)}
AS_TEXT = {"model.multimodal_config": SimpleNamespace(language_model_only=True)}


def rotary(kind: str) -> dict:
    by_layer = {"full_attention": {"rope_type": kind, "original_max_position_embeddings": 64}}
    return {
        "model.hf_text_config": SimpleNamespace(
            rope_parameters=by_layer, max_position_embeddings=256
        )
    }


LONGROPE = rotary("longrope")
DYNAMIC = rotary("dynamic")
FP8 = {"cache.cache_dtype": "fp8"}
HYBRID = {"model.is_hybrid": True, "model.architecture": "FalconH1ForCausalLM"}
QWEN3_NEXT, LFM2 = ({"model.architecture": f"{name}ForCausalLM"} for name in ("Qwen3Next", "Lfm2"))
BY_TRITON = {"additional_config": {"gdn_prefill_backend": "triton"}}
TURNED_BY_TORCH = {"compilation.is_custom_op_enabled": lambda name: name != "rotary_embedding"}
ENGINES = {
    "parallel.data_parallel_size": 2,
    "parallel.data_parallel_size_local": 2,
    "parallel.data_parallel_backend": "mp",
    "parallel.data_parallel_external_lb": False,
    "parallel.data_parallel_hybrid_lb": False,
}


@pytest.mark.usefixtures("with_avx512")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"cache.cache_dtype": "auto"}, None),
        ({"cache.cache_dtype": "bfloat16"}, None),
        ({"cache.mamba_cache_dtype": "bfloat16", "cache.mamba_ssm_cache_dtype": "float32"}, None),
        ({"model.hf_overrides": {}}, None),
        ({"model.is_multimodal_model": True} | AS_TEXT, None),
        (LORA | ON_CUDA, None),
        (ON_CUDA | {"parallel.pipeline_parallel_size": 2}, None),
        (ON_CUDA | {"parallel.enable_expert_parallel": True}, None),
        ({"model.enable_prompt_embeds": False}, None),
        ({"parallel.worker_extension_cls": ""}, "--worker-extension-cls"),
        ({"parallel.pipeline_parallel_size": 2}, "tensor parallelism"),
        ({"parallel.decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel.enable_expert_parallel": True}, "--enable-expert-parallel on the CPU"),
        ({"model.runner_type": "pooling"}, "--runner pooling"),
        ({"model.quantization": "fp8"}, "--quantization fp8"),
        ({"model.quantization_config": SimpleNamespace()}, "--quantization-config"),
        ({"model.is_multimodal_model": True}, "add --language-model-only"),
        ({"model.is_encoder_decoder": True}, "an encoder-decoder model"),
        ({"load.load_format": "dummy"}, "--load-format dummy"),
        ({"load.load_format": "mistral"}, "--load-format mistral"),
        ({"model.hf_config_path": "elsewhere"}, "--hf-config-path"),
        ({"model.hf_overrides": {"rope_theta": 1e6}}, "--hf-overrides"),
        ({"cache.kv_sharing_fast_prefill": True}, "fast-prefill"),
        (LORA, "--enable-lora on the CPU"),
        (LORA | ON_CUDA | FLOAT32, "--enable-lora in float32 on a GPU"),
        ({"cache.cache_dtype": "fp8_e5m2"}, "(kv fp8_e5m2)"),
        ({"cache.cache_dtype": "float16"}, "--kv-cache-dtype"),
        ({"cache.cache_dtype": "nvfp4"}, "(kv nvfp4)"),
        ({"cache.calculate_kv_scales": True}, "--calculate-kv-scales"),
        ({"cache.mamba_cache_dtype": "float16"}, "(mamba float16)"),
        ({"cache.mamba_ssm_cache_dtype": "float16"}, "(mamba state float16)"),
        (LONGROPE | {"model.max_model_len": 64}, None),
        (LONGROPE | {"model.max_model_len": 65}, "--max-model-len 65"),
        (DYNAMIC, "dynamic NTK"),
        (FP8, None),
        ({"cache.cache_dtype": "fp8_e4m3"}, None),
        (FP8 | ON_CUDA, None),
        (FP8 | {"device.device_type": "xpu"}, "--kv-cache-dtype fp8 on xpu"),
        (FP8 | HYBRID, "keep a state"),
        (FP8 | {"cache.calculate_kv_scales": True}, "(kv scales)"),
        (FP8 | {"cache.kv_cache_dtype_skip_layers": ["0"]}, "(skipped layers)"),
        (HYBRID, None),
        (HYBRID | ON_CUDA, None),
        (HYBRID | ON_CUDA | FLOAT32, "--dtype bfloat16"),
        (HYBRID | ON_CUDA | QWEN3_NEXT, "pass --gdn-prefill-backend triton"),
        (HYBRID | ON_CUDA | QWEN3_NEXT | BY_TRITON, None),
        (HYBRID | {"model.architecture": "JambaForCausalLM"}, "vLLM with JambaForCausalLM on cpu"),
        (HYBRID | {"model.dtype": "torch.float16"}, "pass --dtype bfloat16"),
        (HYBRID | QWEN3_NEXT | FLOAT32, "pass --dtype bfloat16"),
        (HYBRID | LFM2, '"-rotary_embedding"'),
        (HYBRID | LFM2 | TURNED_BY_TORCH, None),
        ({"parallel.nnodes": 2}, None),
        (ENGINES, None),
        (ENGINES | {"model.is_moe": True}, "of a mixture on cpu"),
        (ENGINES | {"model.is_moe": True} | ON_CUDA, None),
        (ENGINES | {"parallel.data_parallel_external_lb": True}, "another load balancer"),
        (ENGINES | {"parallel.data_parallel_hybrid_lb": True}, "another load balancer"),
        (ENGINES | {"parallel.data_parallel_size_local": 1}, "on this host"),
        (ENGINES | {"parallel.data_parallel_backend": "ray"}, "on this host"),
    ],
)
def test_settings_are_taken_or_refused_in_words(changes: dict, words: str | None):
    config = settings(**changes)
    assert bool(compatibility.rounded_cache(config)) == (
        changes.get("cache.cache_dtype") in ("fp8", "fp8_e4m3")
    )
    check_config_says(config, words)


@pytest.mark.parametrize(
    ("executor", "second", "words"),
    [
        ("uni", True, None),
        ("ray", True, None),
        ("ray", False, "unset it"),
        ("external_launcher", True, "--distributed-executor-backend external_launcher"),
        ("a.package.Executor", True, "--distributed-executor-backend a.package.Executor"),
    ],
)
def test_workers_are_run_only_in_ways_that_were_tried(
    executor: str, second: bool, words: str | None, monkeypatch: pytest.MonkeyPatch
):
    envs = SimpleNamespace(VLLM_USE_RAY_V2_EXECUTOR_BACKEND=second)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(envs=envs))
    check_config_says(settings(**{"parallel.distributed_executor_backend": executor}), words)


def stored(form: str, dtype: str = "bfloat16", **changes) -> SimpleNamespace:
    """The settings of a server of a checkpoint that is stored so."""
    values = {"model.hf_config": SimpleNamespace(quantization_config=described(form))}
    values |= {"model.hf_text_config": SimpleNamespace(hidden_size=256, moe_intermediate_size=256)}
    values |= {"model.quantization": "of the checkpoint", "model.dtype": f"torch.{dtype}"}
    return settings(**values | changes)


MIXTURE = ON_CUDA | {"model.is_moe": True}


@pytest.mark.usefixtures("with_avx512")
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (stored("int8", "float32"), None),
        (stored("packed"), None),
        (stored("awq", "float16"), None),
        (stored("gptq"), None),
        *(
            (stored(form, **ON_CUDA), None)
            for form in ("tensor", "channel-tensors", "block", "int8", "packed", "gptq")
        ),
        *(
            (stored(form, **MIXTURE), None)
            for form in ("tensor", "channel-tensors", "block", "int8", "packed", "gptq")
        ),
        (stored("packed", "float32"), "int4-groups and --dtype float32 on cpu"),
        (stored("block"), "a checkpoint in float8-block on cpu"),
        (stored("tensor"), "a checkpoint in float8 on cpu"),
        (
            stored("int8", "float32", **ON_CUDA),
            "a checkpoint in int8-rows and --dtype float32 on cuda",
        ),
        (stored("int8", **{"device.device_type": "xpu"}), "a checkpoint in int8-rows on xpu"),
        (stored("int8", **{"model.is_moe": True}), "experts in int8-rows on cpu"),
        (
            stored("int8", **{"model.quantization_config": SimpleNamespace()}),
            "--quantization-config",
        ),
    ],
)
def test_stored_formats_are_taken_where_they_were_run(config, words: str | None):
    check_config_says(config, words)


@pytest.mark.usefixtures("with_avx512")
@pytest.mark.parametrize(
    ("config", "what"),
    [
        (stored("int8"), "a checkpoint in int8-rows"),
        (stored("packed"), "a checkpoint in int4-groups"),
        (settings(**FP8), "--kv-cache-dtype fp8"),
    ],
)
def test_what_needs_avx512_is_refused_without_it(
    config, what: str, monkeypatch: pytest.MonkeyPatch
):
    check_config_says(config, None)
    monkeypatch.setattr("assay.models.device.processor", lambda device: "x86_64 AVX2")
    check_config_says(config, f"vLLM with {what} on x86_64 AVX2")
    config.device_config.device_type = "cuda"
    check_config_says(config, None)


TWO = {"parallel.tensor_parallel_size": 2}
DEALT = {"parallel.enable_expert_parallel": True}


@pytest.mark.usefixtures("with_avx512")
@pytest.mark.parametrize(
    ("changes", "sizes", "words"),
    [
        ({}, {"moe_intermediate_size": 64}, None),
        ({}, {"moe_intermediate_size": None, "intermediate_size": 64}, None),
        (TWO, {"moe_intermediate_size": 128}, None),
        (TWO, {"moe_intermediate_size": 64}, "32 of their columns in a worker"),
        (TWO | DEALT, {"moe_intermediate_size": 64}, None),
        ({}, {"moe_intermediate_size": 32}, "32 of their columns in a worker and one scale for 32"),
        ({}, {"moe_intermediate_size": 32, "hidden_size": 32}, None),
        ({}, {"hidden_size": 32}, "256 of their columns"),
        # Engines that step together cut experts among the workers of all.
        (TWO | ENGINES, {"moe_intermediate_size": 128}, "32 of their columns in a worker"),
        (TWO | ENGINES | DEALT, {"moe_intermediate_size": 128}, None),
    ],
)
@pytest.mark.parametrize("form", ["packed", "awq", "gptq"])
def test_experts_whose_scales_vllm_would_mix_up_are_refused(
    form: str, changes: dict, sizes: dict, words: str | None
):
    config = stored(form, "float16" if form == "awq" else "bfloat16", **MIXTURE | changes)
    vars(config.model_config.hf_text_config).update(sizes)
    check_config_says(config, words)


def test_stored_formats_that_are_not_read_are_refused():
    assert [compatibility.stored_as(stored(form)) for form in ("int8", "gptq")] == [
        "int8-rows",
        "int4-groups",
    ]
    config = stored("gptq")
    config.model_config.hf_config.quantization_config["desc_act"] = True
    with refuses(ModelError, "stored formats that are not read are refused"):
        compatibility.check_config(config)


def test_the_name_of_the_extension_before_03_works_and_says_what_it_is_now(
    caplog: pytest.LogCaptureFixture,
):
    (old_module, name), now = compatibility.OLD_EXTENSION.rsplit(".", 1), compatibility.EXTENSION
    assert getattr(import_module(old_module), name) is getattr(
        import_module(now.rpartition(".")[0]), name
    )
    arguments = SimpleNamespace(host="127.0.0.1", worker_extension_cls=compatibility.OLD_EXTENSION)
    _preflight.check_arguments(arguments, _preflight.PluginSettings())
    assert [now in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("agreed", "changes", "seen"),
    [
        ({}, {}, None),
        ({"library": "vllm 0.31.*"}, {}, "library vllm 0.32.0"),
        ({"dtype": "float32", "engine": "hf"}, {}, "engine vllm, dtype bfloat16"),
        ({}, {"cache.cache_dtype": "fp8"}, "dtype bfloat16+fp8_e4m3-cache"),
        ({"dtype": "bfloat16+fp8_e4m3-cache"}, {"cache.cache_dtype": "fp8"}, None),
        ({"torch": "1.0"}, {}, "torch "),
        ({"digest": "0" * 64}, {}, "model '"),
        ({}, {"model.max_model_len": 256}, "255 positions"),
    ],
)
def test_pins_are_compared_before_an_engine_is_loaded(
    agreed: dict, changes: dict, seen: str | None
):
    free = dict.fromkeys(("device", "attention", "batch_size", "threads", "torch", "kernels"), "*")
    build = free | {"engine": "vllm", "dtype": "bfloat16", "library": "vllm 0.32.*"} | agreed
    own = identify(REFERENCE, dtype="bfloat16").digest
    model = {"reference": "m", "digest": build.pop("digest", own), "builds": [build]}
    round = {
        "preset": "hardened",
        "seq_len": 256,
        "strength": 256,
        "node_count": 1,
        "fewest_nonces": 32,
    }
    pins = NetworkPins.of({"schema": 1, "round": round, "models": [model]}, "pins.toml")
    config = settings(**{"model.max_model_len": 512, "scheduler.x": 1} | changes)
    with pytest.raises(UsageError) if seen else nullcontext() as refusal:
        _preflight.check_pins(pins, str(REFERENCE), config, "0.32.0")
    assert seen is None or seen in str(refusal.value)


def refuse(*_) -> None:
    raise UsageError("a server", wanted="another", do="begin again")


@pytest.mark.parametrize(
    ("plugins", "argv", "parent", "checked"),
    [
        ("assay", ["/bin/vllm", "serve", "m"], None, True),
        ("other,assay", ["/x/vllm/entrypoints/openai/api_server.py", "--model", "m"], None, True),
        (
            "assay",
            ["/x/vllm/entrypoints/launchers/api_server/entry.py", "--model", "m"],
            None,
            True,
        ),
        ("other", ["/bin/vllm", "serve", "m"], None, False),
        ("assay", ["/bin/vllm", "bench", "serve"], None, False),
        ("assay", ["/bin/assay", "poc", "prove"], None, False),
        ("assay", ["/bin/vllm", "serve", "m"], SimpleNamespace(), False),  # a worker of the server
    ],
)
def test_only_the_first_process_of_a_server_with_the_plugin_is_checked(
    plugins: str, argv: list[str], parent, checked: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    monkeypatch.setattr("multiprocessing.parent_process", lambda: parent)
    monkeypatch.setattr(_preflight, "check_installed", refuse)
    with pytest.raises(SystemExit, match="wanted: another") if checked else nullcontext():
        before_start()


def test_a_device_for_vllm_is_refused():
    with refuses(UsageError, "a device for vllm is refused"):
        vllm_engine(
            Launch(model="reference:qwen3", device="cuda"), None, batch_size=8, seq_len=16
        ).__enter__()
