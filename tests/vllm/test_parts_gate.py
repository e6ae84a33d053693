"""The gate, and what is refused before anything starts: versions, settings, several servers."""

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from assay.errors import BackendUnavailable, UsageError
from assay.poc.engines.vllm import _compatibility as _gate
from assay.poc.engines.vllm import before_start
from assay.poc.serving import plugin


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_a_runner_that_lacks_something_is_described_not_wrapped(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_gate, "STATE_FIELDS", {kind: ()})
    monkeypatch.setattr(_gate, "runner_kind", lambda runner: kind)
    missing = _gate.missing_in_runner(SimpleNamespace(device="cpu", execute_model=None))
    assert any(name.endswith("sample_tokens") for name in missing)
    assert not any(name.endswith("device") for name in missing)


@pytest.mark.parametrize("version", ["0.9.2", "0.27.1", "0.33.0", "1.0", "what"])
def test_versions_that_were_not_tested_are_refused(version: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_gate, "_version", lambda: version)
    with pytest.raises(BackendUnavailable, match="tested"):
        _gate.check_installed()


def test_a_version_without_something_that_is_used_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_gate, "_version", lambda: "0.32.0")
    monkeypatch.setattr(_gate, "CLASSES", {"json:JSONDecoder": ("decode", "sing"), "json:Nothing": ()})
    monkeypatch.setattr(_gate, "FIELDS", {"assay.poc:Round": ("block_hash", "colour"), "no.such.module:X": ("y",)})
    with pytest.raises(BackendUnavailable) as refusal:
        _gate.check_installed()
    seen = refusal.value.seen
    assert all(name in seen for name in ("JSONDecoder.sing", "json.Nothing", "Round.colour", "no.such.module.X"))
    assert "decode" not in seen
    assert "block_hash" not in seen


def test_without_vllm_the_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> str:
        raise _gate.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_gate.importlib.metadata, "version", absent)
    with pytest.raises(BackendUnavailable, match=r"assay\[vllm\]"):
        _gate.check_installed()


def settings_of_vllm(**changes) -> SimpleNamespace:
    """The part of a ``VllmConfig`` that the gate reads; vLLM's own is not needed to refuse it."""
    values = {
        "model_config.enable_prompt_embeds": True,
        "model_config.runner_type": "generate",
        "model_config.quantization": None,
        "model_config.is_encoder_decoder": False,
        "model_config.is_multimodal_model": False,
        "parallel_config.worker_extension_cls": "assay.poc.engines.vllm.WorkerExtension",
        "parallel_config.data_parallel_size": 1,
        "parallel_config.pipeline_parallel_size": 1,
        "device_config.device_type": "cpu",
        "load_config.load_format": "auto",
    } | changes
    config = SimpleNamespace(cache_config=SimpleNamespace())
    for path, value in values.items():
        part, _, name = path.partition(".")
        if not hasattr(config, part):
            setattr(config, part, SimpleNamespace())
        setattr(getattr(config, part), name, value)
    return config


def test_the_settings_that_docs_recommend_pass_the_gate():
    _gate.check_config(settings_of_vllm())


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model_config.enable_prompt_embeds", False, "--enable-prompt-embeds"),
        ("parallel_config.worker_extension_cls", "", "--worker-extension-cls"),
        ("parallel_config.data_parallel_size", 2, "one server per engine"),
        ("parallel_config.pipeline_parallel_size", 2, "tensor parallelism"),
        ("parallel_config.decode_context_parallel_size", 2, "context parallelism"),
        ("model_config.runner_type", "pooling", "--runner pooling"),
        ("model_config.quantization", "fp8", "fp8"),
        ("model_config.is_multimodal_model", True, "multimodal"),
        ("load_config.load_format", "dummy", "dummy"),
        ("cache_config.kv_sharing_fast_prefill", True, "fast-prefill"),
    ],
)
def test_settings_under_which_nonces_cannot_run_are_refused_in_words(path: str, value, words: str):
    with pytest.raises(UsageError) as refusal:
        _gate.check_config(settings_of_vllm(**{path: value}))
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("api_server_count", 2, "--api-server-count 1"),
        ("data_parallel_size", 2, "one server per engine"),
        ("revision", "abc", "--revision"),
    ],
)
def test_servers_that_cannot_own_a_round_are_refused_before_anything_is_opened(
    name: str, value, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ASSAY_DATA_DIR", str(tmp_path / "data"))
    app = SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(**{name: value})))
    with pytest.raises(UsageError) as refusal:
        plugin().attach_router(app)
    assert words in str(refusal.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        ("--data-parallel-size 2", "data-parallel"),
        ("--data_parallel_size=4", "data-parallel"),
        ("-dp 2", "data-parallel"),
        ("--api-server-count 3", "API servers"),
        ("-asc=2", "API servers"),
        ("--revision main", "--revision"),
        ("-dpn 1 --data-parallel-size 1 -asc 1 --api-server many", None),
        ("--data-parallel-size many", None),
    ],
)
def test_a_command_line_is_refused_before_the_engine_is_loaded(
    words: str, refusal: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", ["vllm", "serve", "model", "--port", "8000", *words.split()])
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    before_start()
    monkeypatch.setenv("VLLM_PLUGINS", "other,assay")
    with pytest.raises(UsageError, match=refusal) if refusal else nullcontext():
        before_start()


@pytest.mark.parametrize(
    ("words", "before", "after"),
    [
        ("--dtype float32", None, "ieee"),
        ("--dtype=float", None, "ieee"),
        ("--dtype float32", "tf32x3", "tf32x3"),  # somebody has chosen
        ("--dtype bfloat16", None, None),
        ("", None, None),
    ],
)
def test_triton_multiplies_float32_as_float32(words: str, before, after, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["vllm", "serve", "model", *words.split()])
    monkeypatch.setenv("VLLM_PLUGINS", "assay")
    # Set first, so that what is set during the test is taken back as well.
    monkeypatch.setenv("TRITON_F32_DEFAULT", before or "")
    if before is None:
        monkeypatch.delenv("TRITON_F32_DEFAULT")
    before_start()
    assert os.environ.get("TRITON_F32_DEFAULT") == after


@pytest.mark.parametrize(("name", "dtype", "words"), [("vlm", None, "hf or vllm"), ("vllm", "int8", "int8 on vLLM")])
def test_what_cannot_recompute_a_proof_is_refused(name: str, dtype, words: str):
    from assay.cli._engines import judging_engine

    prover = SimpleNamespace(dtype="float32", batch_size=8, seq_len=16)
    with pytest.raises(UsageError, match=words), judging_engine(name, "m", prover, dtype=dtype, device=None):
        pass


def test_a_device_for_vllm_is_refused():
    from assay.cli._vllm import vllm_engine

    with (
        pytest.raises(UsageError, match="--device"),
        vllm_engine("reference:qwen3", dtype=None, device="cuda", batch_size=8, seq_len=16),
    ):
        pass
