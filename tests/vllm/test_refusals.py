"""Starts of a server that are refused before anything is loaded, as an operator sees them."""

import socket
from pathlib import Path

from _vllm import Server

REFUSED = {
    "engines": ({"--data-parallel-size": "2"}, "vLLM with 2 data-parallel engines", "start one server per engine"),
    "servers": ({"--api-server-count": "2"}, "2 API servers of one engine", "pass --api-server-count 1"),
    "embeds": ({"--enable-prompt-embeds": False}, "vLLM with no --enable-prompt-embeds", "add --enable-prompt-embeds"),
    "cache": (
        {"--kv-cache-dtype": "fp8"},
        "vLLM with a cache of another number format (kv fp8)",
        "leave --kv-cache",
    ),
}


def test_what_could_not_prove_is_refused_in_words_before_anything_is_loaded(tmp_path: Path):
    log = {"VLLM_LOGGING_LEVEL": "INFO"}
    servers = {
        name: Server(tmp_path / name, options=options, environment=log) for name, (options, *_) in REFUSED.items()
    }
    try:
        for server in servers.values():
            server.launch()
        for name, (_, seen, do) in REFUSED.items():
            server = servers[name]
            assert server.process.wait(900) == 1, server.tail()
            said = server.tail()
            assert f"assay refuses to start: {seen}\n  wanted: " in said
            assert f"\n  to do:  {do}" in said
            assert "EngineCore" not in said
            assert "Traceback" not in said
            assert not (server.data_dir / "service.sqlite3").exists()
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", server.port)) != 0
    finally:
        for server in servers.values():
            server.stop()
