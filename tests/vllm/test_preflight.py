"""What a server refuses in its first seconds, with the command line read by the parser of the
installed vLLM.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from _vllm import KEY, OPTIONS, REFERENCE

from assay.poc.vllm import before_start
from tests.vllm.conftest import ON_GPU

NEEDED = [
    "--enable-prompt-embeds",
    "--worker-extension-cls",
    OPTIONS["--worker-extension-cls"],
    "--dtype",
    "float32",
]
SERVE = ["/bin/vllm", "serve", str(REFERENCE)]
ON_CPU_ONLY = pytest.mark.skipif(ON_GPU, reason="refused on the CPU only")
MODULE = ["/x/vllm/entrypoints/openai/api_server.py", "--model", str(REFERENCE)]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run the check as vLLM does; return the refusal, or None."""
    for name, value in {
        "VLLM_PLUGINS": "assay",
        "ASSAY_API_KEY": KEY,
        "ASSAY_DATA_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    # Set first, so that what is set during the test is taken back as well; the second one by vLLM's
    # own parser.
    for name in ("TRITON_F32_DEFAULT", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def run(*argv: str) -> str | None:
        monkeypatch.setattr("sys.argv", list(argv))
        try:
            before_start()
        except SystemExit as end:
            return str(end.code)
        return None

    return run


@pytest.mark.parametrize("command", [SERVE, MODULE])
def test_a_server_as_docs_recommend_it_starts(start, command):
    assert start(*command, *NEEDED, "--max-model-len", "256") is None
    assert os.environ["TRITON_F32_DEFAULT"] == "ieee"


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        ("--data-parallel-size 2", None),
        ("-dp 2 -asc 1", None),
        (
            "-dp 2 -dpl 1 -asc 1 --data-parallel-hybrid-lb",
            "2 data-parallel engines behind another load balancer",
        ),
        ("-dp 2 -dpl 1 -asc 1", "2 data-parallel engines that it does not start"),
        ("-asc=2", "2 API servers"),
        ("--revision main", "--revision main"),
        ("--kv-cache-dtype fp8_e5m2", "kv fp8_e5m2"),
        ("--grpc", "--grpc, a server without plugins"),
        ("-dp 2 --data-parallel-multi-port-external-lb", "--data-parallel-multi-port-external-lb"),
        ('--hf-overrides {"rope_theta":5000.0}', "--hf-overrides"),
        pytest.param("--enable-lora", "--enable-lora on the CPU", marks=ON_CPU_ONLY),
        pytest.param("-pp 2", "pipeline stages on the CPU", marks=ON_CPU_ONLY),
        ("-dpn 1 --data-parallel-size 1 -asc 1", None),
        ("--enable-prefix-caching --max-num-batched-tokens 48 --max-num-seqs 8", None),
    ],
)
def test_a_command_line_is_refused_before_the_engine_is_loaded(
    start, words: str, refusal: str | None
):
    said = start(*SERVE, *NEEDED, *words.split())
    assert (
        (refusal in said and "\n  wanted: " in said and "\n  to do:  " in said)
        if refusal
        else said is None
    )


def test_workers_of_a_server_on_another_host_have_no_port_and_need_no_key(
    start, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("ASSAY_API_KEY")
    several = ("--nnodes", "2", "-tp", "2", "--master-addr", "127.0.0.1")
    assert start(*SERVE, *NEEDED, *several, "--node-rank", "1", "--headless") is None
    assert "without a key of assay" in start(*SERVE, *NEEDED, *several, "--node-rank", "0")


def test_the_extension_is_needed_and_prompt_embeddings_only_for_some_presets(start):
    assert f"add {' '.join(NEEDED[1:3])}" in start(*SERVE, NEEDED[0])
    assert start(*SERVE, *NEEDED[1:]) is None


@pytest.mark.parametrize("command", [SERVE, MODULE])
def test_a_configuration_file_counts_as_the_command_line(start, command, tmp_path: Path):
    path = tmp_path / "server.yaml"
    path.write_text("enable-prompt-embeds: true\nkv-cache-dtype: fp8_e5m2\n")
    assert "kv fp8_e5m2" in start(*command, *NEEDED[1:], "--config", str(path))
    path.write_text("dtype: float32\nenable-prompt-embeds: true\n")
    assert start(*command, *NEEDED[1:3], "--config", str(path)) is None
    assert os.environ["TRITON_F32_DEFAULT"] == "ieee"


@pytest.mark.parametrize(
    "words", ["-asc 3", "--api-server-count=3", "-dp 3 -asc 3", "-dp 1 --config"]
)
def test_one_api_server_has_the_round(start, words: str, tmp_path: Path):
    path = tmp_path / "server.yaml"
    path.write_text("api-server-count: 3\n")
    said = start(*SERVE, *NEEDED, *words.split(), *([str(path)] if "--config" in words else []))
    assert said.startswith("assay refuses to start: 3 API servers")
    assert "--api-server-count 1" in said


def test_engines_share_one_api_server_without_a_word(start):
    assert start(*SERVE, *NEEDED, "-dp", "2") is None
    assert sys.argv[-2:] == ["--api-server-count", "1"]


def test_answers_are_recorded_of_one_engine(start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ASSAY_RESPONSES", "sketched")
    monkeypatch.setenv("ASSAY_RESPONSES_PUBLIC_KEY", "node_A")
    said = start(*SERVE, *NEEDED, "-dp", "3")
    assert said.startswith(
        "assay refuses to start: ASSAY_RESPONSES=sketched with 3 data-parallel engines"
    )


def test_a_port_that_others_reach_needs_a_key(start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ASSAY_API_KEY")
    assert "without a key of assay" in start(*SERVE, *NEEDED)
    assert "without a key of assay" in start(*SERVE, *NEEDED, "--host", "0.0.0.0")
    assert start(*SERVE, *NEEDED, "--host", "127.0.0.1") is None
    monkeypatch.setenv("ASSAY_API_KEY", "short")
    assert "an API key of fewer than 16" in start(*SERVE, *NEEDED)


@pytest.mark.parametrize(("value", "refusal"), [("1", "VLLM_USE_RUST_FRONTEND"), ("0", None)])
def test_the_front_end_without_plugins_is_refused(
    start, value: str, refusal, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", value)
    said = start(*SERVE, *NEEDED)
    assert refusal in said if refusal else said is None


@pytest.mark.parametrize(
    ("words", "before", "after"),
    [
        ("--dtype=float", None, "ieee"),
        ("--dtype float32", "tf32x3", "tf32x3"),  # chosen by the operator
        ("--dtype bfloat16", None, None),
        ("", None, None),
    ],
)
def test_triton_multiplies_float32_as_float32(
    start, words: str, before, after, monkeypatch: pytest.MonkeyPatch
):
    if before:
        monkeypatch.setenv("TRITON_F32_DEFAULT", before)
    assert start(*SERVE, *NEEDED[:3], *words.split()) is None
    assert os.environ.get("TRITON_F32_DEFAULT") == after


def test_arguments_that_vllm_refuses_are_left_to_it(start):
    assert start(*SERVE, *NEEDED, "--data-parallel-size", "many") == "2"
    assert start(*SERVE, *NEEDED, "--max-model-len", "1000000000") is None


def test_the_worker_extension_without_the_plugin_is_refused(start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("VLLM_PLUGINS")
    said = start(*SERVE, *NEEDED)
    assert said is not None
    assert said.startswith(
        "assay refuses to start: vLLM with the worker extension of assay and without VLLM_PLUGINS"
    )
    assert start(*SERVE, "--dtype", "float32") is None  # a server that has nothing to do with assay


def test_a_server_that_cannot_prove_ends_in_words_before_anything_is_loaded(tmp_path: Path):
    """Here without a package: vLLM only logs a plugin that cannot be imported."""
    program = (
        "import sys; sys.modules['structlog'] = None; sys.argv = sys.argv[1:];"
        "from vllm.plugins import load_general_plugins; load_general_plugins()"
    )
    environment = os.environ | {
        "VLLM_PLUGINS": "assay",
        "ASSAY_API_KEY": KEY,
        "ASSAY_DATA_DIR": str(tmp_path),
    }
    command = [sys.executable, "-c", program, *SERVE, *NEEDED]
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 1, ended.stderr
    assert "assay refuses to start: the package structlog is not installed" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []
