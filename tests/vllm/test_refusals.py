"""Starts of a server that are refused before anything is loaded, as an operator sees them.

Every start is a process of its own, forked from one that has imported vLLM.
"""

import socket
from pathlib import Path

from _vllm_forked import ForkedServer

from tests.vllm.conftest import ON_GPU

ENGINES = ("vLLM with 2 data-parallel engines", "start one server per engine")
CACHE = ("vLLM with a cache of another number format (kv fp8_e5m2)", "leave --kv-cache")
BY_ARGUMENT = {
    "engines": ({"--data-parallel-size": "2", "--data-parallel-size-local": "1"}, *ENGINES),
    "embeds": ({"--enable-prompt-embeds": False}, "vLLM with no --enable-prompt-embeds", "add --enable-prompt-embeds"),
    "cache": ({"--kv-cache-dtype": "fp8_e5m2"}, *CACHE),
}
BY_FILE = {
    "engines-in-file": ("data-parallel-size: 2\ndata-parallel-size-local: 1", *ENGINES),
    "cache-in-file": ("kv-cache-dtype: fp8_e5m2", *CACHE),
}
ON_CPU = {
    "adapters": ({"--enable-lora": None}, "vLLM with --enable-lora on the CPU", "leave it out, or serve on a GPU"),
    "stages": ({"--pipeline-parallel-size": "2"}, "vLLM with pipeline stages on the CPU", "use tensor parallelism"),
}


def test_what_could_not_prove_is_refused_in_words_before_anything_is_loaded(tmp_path: Path):
    refused: dict[str, tuple[dict, dict, str, str]] = {
        name: (options, {}, *words) for name, (options, *words) in (BY_ARGUMENT | ({} if ON_GPU else ON_CPU)).items()
    }
    for name, (text, *words) in BY_FILE.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(text + "\n")
        refused[name] = ({"--config": str(path)}, {}, *words)
    refused["front-end"] = ({}, {"VLLM_USE_RUST_FRONTEND": "1"}, "VLLM_USE_RUST_FRONTEND=1", "unset VLLM_USE_RUST")
    servers: dict[str, ForkedServer] = {}
    for name, (options, environment, _, _) in refused.items():
        log = {"VLLM_LOGGING_LEVEL": "INFO"} | environment
        servers[name] = ForkedServer(tmp_path / name, options=options, environment=log)
    try:
        for server in servers.values():
            server.launch()
        for name, (_, _, seen, do) in refused.items():
            server = servers[name]
            assert server.process.wait(900) == 1, server.tail()
            said = server.tail()
            assert f"assay refuses to start: {seen}" in said
            assert "\n  wanted: " in said
            assert f"\n  to do:  {do}" in said
            assert "EngineCore" not in said
            assert "Traceback" not in said
            assert not (server.data_dir / "service.sqlite3").exists()
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", server.port)) != 0
    finally:
        for server in servers.values():
            server.__exit__()
